// How the spans of a step are divided into items of work.
//
// An item is a block of columns of one KV head of a span, with all keys that they see. A prefill
// chunk makes many, a decode one per KV head. Decodes whose block tables begin alike, as those of
// prompts that the prefix cache shares do, are worked on in groups: an item is then one KV head of
// several spans. Decodes whose keys are a large share of the step are split by parts of keys.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_source.h"
#include "ops.h"

namespace baton::attend {

constexpr int64_t kMinColumns = 128;  // of a block: fewer make transposing V expensive
constexpr int64_t kItemsPerMember = 8;
constexpr int64_t kGroupsPerMember = 4;  // larger groups read less, smaller ones end more evenly

// A block's queries and results stay in the second-level cache.
inline int64_t max_columns(int64_t head_dim) { return round_up(65536 / head_dim, 32); }

// Columns [first, first + columns) of a KV head of a span, and the positions that they see. Of a
// group it is the first span of `count`, whose tables are alike up to position `shared`.
struct Item {
  const Span* span;
  int64_t head, first, columns;
  Range keys;
  int64_t count = 1, shared = 0;
};

class Items {
  // Spans [first, first + count) that are alike up to position `shared`; most are alone.
  struct Family {
    int64_t first, count, shared;
  };

 public:
  Items(const Pool& pool, const AttentionShape& shape, const Span* spans, int64_t num_spans,
        int members)
      : pool_(pool), spans_(spans), num_spans_(num_spans), members_(members),
        window_(shape.window), group_(shape.heads / pool.kv_heads) {
    int64_t columns = 0;
    for (int64_t i = 0; i < num_spans_; ++i) {
      parts_ += parts_of(spans_[i]) * pool_.kv_heads;
      if (!is_narrow(spans_[i])) columns += spans_[i].queries * group_;
    }
    const int64_t wanted = columns * pool_.kv_heads / (members_ * kItemsPerMember);
    block_ = std::clamp(round_up(wanted, 32), kMinColumns, max_columns(pool_.head_dim));
    for (Cursor cursor = start(); cursor.visit < 2 * num_spans_; advance(cursor)) {
      count_ += cursor.items;
    }
  }

  // What queries [first, last] of a span see.
  Range seen(const Span& span, int64_t first, int64_t last) const {
    return {window_ == 0 ? 0 : std::max<int64_t>(0, span.start + first - window_ + 1),
            span.start + last + 1};
  }

  int64_t parts_of(const Span& span) const {
    const Range range = seen(span, 0, span.queries - 1);
    return (range.end + kPart - 1) / kPart - range.begin / kPart;
  }

  // Whether one head of the span would be a large part of a member's share. It makes no items.
  bool is_split(const Span& span) const {
    const int64_t parts = parts_of(span);
    return members_ > 1 && is_narrow(span) && parts > 1 &&
           parts * kItemsPerMember * members_ > parts_;
  }

  int64_t count() const { return count_; }

  // The families' items one after the other. A member's indices only grow, so a cursor goes on from
  // where it was. Spans are visited twice: first the wide ones, then the narrow ones.
  struct Cursor {
    int64_t visit, begin;
    Family family;
    int64_t items;  // of the family
  };

  Cursor start() const { return at(0, 0); }

  Item find(Cursor& cursor, int64_t index) const {
    while (index >= cursor.begin + cursor.items) advance(cursor);
    index -= cursor.begin;
    const Family& family = cursor.family;
    return is_narrow(spans_[family.first]) ? narrow_item(family, index)
                                           : wide_item(spans_[family.first], index);
  }

 private:
  bool is_narrow(const Span& span) const { return span.queries * group_ <= kLanes; }

  // A window would have spans begin in different parts, and leave them little to share.
  bool may_share(const Span& span) const {
    return window_ == 0 && is_narrow(span) && !is_split(span);
  }

  // A family ends where sharing drops to less than half: what follows is a family of its own.
  Family family_of(int64_t first) const {
    Family family = {first, 1, INT64_MAX};
    for (int64_t i = first + 1; i < num_spans_ && may_share(spans_[first]); ++i, ++family.count) {
      const int64_t shared = std::min(spans_[i].shared, family.shared);
      if (!may_share(spans_[i]) || spans_[i].queries != spans_[first].queries) break;
      if (shared < kPart || (family.count > 1 && shared < family.shared / 2)) break;
      family.shared = shared;
    }
    return family;
  }

  // Groups of a family: no larger than a member's share of the step allows, nor than its scratch.
  int64_t groups_of(const Family& family) const {
    int64_t parts = 0;
    for (int64_t i = 0; i < family.count; ++i) parts += parts_of(spans_[family.first + i]);
    const int64_t slots = max_columns(pool_.head_dim) / kLanes;
    const int64_t least = (family.count + slots - 1) / slots;
    const int64_t even = (parts * members_ * kGroupsPerMember + parts_ - 1) / parts_;
    return std::clamp(even, least, family.count);
  }

  int64_t blocks_of(const Span& span) const {
    return (span.queries * group_ + block_ - 1) / block_;
  }

  Cursor at(int64_t visit, int64_t begin) const {
    if (visit >= 2 * num_spans_) return {visit, begin, {}, 0};
    const Family family = family_of(visit % num_spans_);
    const Span& span = spans_[family.first];
    const bool now = is_narrow(span) == (visit >= num_spans_) && !is_split(span);
    const int64_t each = is_narrow(span) ? groups_of(family) : blocks_of(span);
    return {visit, begin, family, now ? each * pool_.kv_heads : 0};
  }
  void advance(Cursor& cursor) const {
    cursor = at(cursor.visit + cursor.family.count, cursor.begin + cursor.items);
  }

  Item wide_item(const Span& span, int64_t index) const {
    // The last columns of a span see the most keys: they come first.
    const int64_t first = (blocks_of(span) - 1 - index / pool_.kv_heads) * block_;
    const int64_t columns = std::min(block_, span.queries * group_ - first);
    return {&span, index % pool_.kv_heads, first, columns,
            seen(span, first / group_, (first + columns - 1) / group_)};
  }

  // A head's groups follow one another: members that have them at a time read the same keys.
  Item narrow_item(const Family& family, int64_t index) const {
    const int64_t groups = groups_of(family), group = index % groups;
    const int64_t first = family.count * group / groups;
    const int64_t last = family.count * (group + 1) / groups;
    const Span& span = spans_[family.first + first];
    return {&span, index / groups, 0, span.queries * group_, seen(span, 0, span.queries - 1),
            last - first, last - first > 1 ? family.shared : 0};
  }

  const Pool& pool_;
  const Span* const spans_;
  const int64_t num_spans_;
  const int members_;
  const int64_t window_, group_;  // group: heads that share a KV head
  int64_t parts_ = 0;             // of all spans and KV heads
  int64_t block_ = 0;             // columns of a wide item
  int64_t count_ = 0;
};

}  // namespace baton::attend
