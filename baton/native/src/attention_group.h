// The order in which a group of spans that begin alike is worked on, and what is fetched when.
//
// A group goes from part to part, and through each part span by span: the keys and values that all
// share (256 KiB of 128 dimensions) come from memory for the first span, and for the others from
// the second-level cache. Each span's own parts keep their order, and its result its bits.
//
//     part 0:  span 0 (from memory)  span 1  span 2 ...
//     part 1:  span 0 (from memory)  span 1  span 2 ...
//     part 2:  span 0, span 1, span 2: each from memory, as they share it no longer
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_source.h"
#include "ops.h"

namespace baton::attend {

// Work of a span on a part.
struct Unit {
  int64_t span, part;

  bool operator==(const Unit&) const = default;
};

// `count` spans whose block tables are alike up to position `shared`.
class Group {
 public:
  Group(const Span* spans, int64_t count, int64_t shared)
      : spans_(spans), count_(count), shared_(shared) {
    for (int64_t i = 0; i < count_; ++i) end_ = std::max(end_, end_of(i));
  }

  bool has(const Unit& unit) const { return unit.part * kPart < end_; }

  // The unit behind one: parts that a span does not have are left out.
  Unit after(Unit unit) const {
    do {
      unit = unit.span + 1 < count_ ? Unit{unit.span + 1, unit.part} : Unit{0, unit.part + 1};
    } while (has(unit) && unit.part * kPart >= end_of(unit.span));
    return unit;
  }

  Range keys(const Unit& unit) const {
    return Range{0, end_of(unit.span)}.within(unit.part * kPart, kPart);
  }

  // The keys of a unit that no span has read before; may be empty.
  Range cold(const Unit& unit) const {
    Range range = keys(unit);
    if (unit.span > 0) range.begin = std::clamp(shared_, range.begin, range.end);
    return range;
  }

  // Whether the unit's keys are those of the unit before.
  bool repeats(const Unit& unit) const {
    return unit.span > 0 && (unit.part + 1) * kPart <= shared_;
  }

 private:
  int64_t end_of(int64_t span) const { return spans_[span].start + spans_[span].queries; }

  const Span* const spans_;
  const int64_t count_, shared_;
  int64_t end_ = 0;  // of the longest span
};

// What is fetched during which unit. Units that read what a span before them has read need nothing,
// others all of it: fetching is spread evenly over both, as far as the cache has room.
class Supply {
 public:
  // `more`: keys to fetch behind those of the last unit. The first unit's are there already.
  Supply(const Group& group, int64_t more) : group_(group), more_(more) {
    for (Unit unit = target_; group.has(unit); unit = group.after(unit)) {
      work_ += group.keys(unit).length();
      wanted_ += group.cold(unit).length();
    }
    waiting_ = group.cold(target_).length();
    wanted_ += more - waiting_;
  }

  // To be called when a unit begins, in their order. The number of keys during whose work the cold
  // keys of `target`, behind the last unit `more` ones, are to be fetched; 0 if nothing new is.
  int64_t begin(const Unit& unit) {
    const int64_t work = group_.keys(unit).length();
    int64_t spread = 0;
    waiting_ -= group_.cold(unit).length();
    if (busy_ <= 0 && wanted_ > 0 && waiting_ < kRoom) busy_ = spread = aim(unit);
    busy_ -= work;
    work_ -= work;
    return spread;
  }

  const Unit& target() const { return target_; }

 private:
  static constexpr int64_t kRoom = 2 * kPart;  // keys, of one head

  int64_t aim(const Unit& unit) {
    do {
      target_ = group_.after(target_);
    } while (group_.has(target_) && group_.cold(target_).length() == 0);
    const int64_t keys = group_.has(target_) ? group_.cold(target_).length() : more_;
    int64_t due = 0;  // work until the target's turn
    for (Unit u = unit; group_.has(u) && !(u == target_); u = group_.after(u)) {
      due += group_.keys(u).length();
    }
    const int64_t share = work_ * keys / wanted_;
    wanted_ -= keys;
    waiting_ += keys;
    return std::clamp<int64_t>(share, 1, due);
  }

  const Group& group_;
  const int64_t more_;
  Unit target_ = {0, 0};
  // In keys: work that has not begun; what no fetch has been aimed at; what was fetched and is not
  // yet used; work until the fetch under way ends.
  int64_t work_ = 0, wanted_ = 0, waiting_ = 0, busy_ = 0;
};

}  // namespace baton::attend
