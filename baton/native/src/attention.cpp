// Causal attention over the paged pool with online softmax (FlashAttention, arXiv:2205.14135).
//
// The queries of a span and the heads that share a KV head are one sequence of columns: column
// query * group + head of the group, `group` = heads / kv_heads. What the members share out is in
// attention_items.h; what is read once for several decodes, in attention_group.h.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "attention_few.h"
#include "attention_group.h"
#include "attention_items.h"
#include "attention_part.h"
#include "attention_source.h"
#include "attention_tile.h"
#include "ops.h"
#include "tile.h"

namespace baton {
namespace {

using attend::Ahead;
using attend::Columns;
using attend::Group;
using attend::Head;
using attend::Item;
using attend::Items;
using attend::kFew;
using attend::kKeys;
using attend::kLanes;
using attend::kPart;
using attend::kStep;
using attend::max_columns;
using attend::Range;
using attend::State;
using attend::Supply;
using attend::Unit;
using attend::Workspace;

constexpr TileConfig kTiles = tile_config({16, 16, 16, 16, 16, 16, 16, 16});
constexpr int64_t kRound = 8;  // parts of a split context that are computed at a time

// Denormals as zeros, as AMX has them, for the calling thread: they are slow, and mean nothing.
class FlushDenormals {
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned before_;
};

// What one member works with, for one block of columns, or as many narrow spans.
struct Scratch {
  Workspace work;
  bf16* queries;       // [groups of columns, head_dim * 16]
  int32_t* positions;  // [groups, 16]
  float* states;       // [groups, State::floats]

  static int64_t bytes(int64_t head_dim) {
    const int64_t columns = max_columns(head_dim), dim = head_dim;
    return 2 * kKeys * kLanes * 4 + kPart * dim * 2 + columns * (dim * 2 + 4) +
           (columns / kLanes + 2) * State::floats(dim) * 4;
  }
  Scratch(uint8_t* base, int64_t head_dim) {
    const int64_t columns = max_columns(head_dim);
    work.scores = reinterpret_cast<float*>(base);
    work.states = work.scores + 2 * kKeys * kLanes;
    work.values = reinterpret_cast<bf16*>(work.states + 2 * State::floats(head_dim));
    queries = work.values + kPart * head_dim;
    positions = reinterpret_cast<int32_t*>(queries + columns * head_dim);
    states = reinterpret_cast<float*>(positions + columns);
  }
};

// Arguments of `attention`, and what one member does with them.
class Attention {
 public:
  Attention(Member& member, const Pool& pool, int64_t layer, const AttentionShape& shape,
            const Span* spans, int64_t num_spans, const bf16* q, int64_t stride, bf16* out,
            uint8_t* scratch, Tiles& tiles)
      : member_(member), pool_(pool), layer_(layer), shape_(shape), spans_(spans),
        num_spans_(num_spans), items_(pool, shape, spans, num_spans, member.size()), q_(q),
        stride_(stride), out_(out), dim_(pool.head_dim), group_(shape.heads / pool.kv_heads),
        scale_(shape.scale * 1.44269504f),
        scratch_(scratch + member.index() * Scratch::bytes(pool.head_dim), pool.head_dim),
        tiles_(tiles),
        shared_(reinterpret_cast<float*>(scratch + member.size() * Scratch::bytes(pool.head_dim))) {
    scratch_.work.ahead = &ahead_;
  }

  void run() {
    for (int64_t i = 0; i < num_spans_; ++i) {
      if (items_.is_split(spans_[i])) run_split(spans_[i]);
    }
    run_items();
  }

 private:
  Head source_of(const Item& item) const { return {pool_, item.span->blocks, layer_, item.head}; }

  void run_items() {
    const int64_t items = items_.count();
    Items::Cursor cursor = items_.start();
    member_.for_each_ahead(items, [&](int64_t index, int64_t after) {
      const Item item = items_.find(cursor, index);
      const Item next = after < items ? items_.find(cursor, after) : Item{};
      const auto run = item.count > 1 ? &Attention::run_group : &Attention::run_item;
      (this->*run)(item, after < items ? &next : nullptr);
    });
  }

  void run_item(const Item& item, const Item* next) {
    const Head source = source_of(item);
    const int64_t groups = (item.columns + kLanes - 1) / kLanes;
    for (int64_t i = 0; i < groups; ++i) load_queries(item, i, i);
    const int64_t begin = item.keys.begin / kPart * kPart;
    for (int64_t part = begin; part < item.keys.end; part += kPart) {
      aim(item, next, part);
      if (item.columns <= kFew) {
        attend_few(source, part, columns_at(item, 0, 0), part == begin, state_at(0));
        continue;
      }
      load_values(source, item.keys.within(part, kPart));
      for (int64_t i = 0; i < groups; i += 2) {
        const int64_t second = std::min(i + 1, groups - 1);
        const Columns columns[] = {columns_at(item, i, i), columns_at(item, second, second)};
        const State states[] = {state_at(i), state_at(second)};
        const auto attend = i + 1 < groups ? attend::attend<2> : attend::attend<1>;
        attend(source, part, columns, shape_.window, scale_, part == begin, scratch_.work, states);
      }
    }
    for (int64_t i = 0; i < groups; ++i) finish(item, i, state_at(i));
  }

  // Several spans that begin alike. Each has its place in the scratch.
  void run_group(const Item& item, const Item* next) {
    const Group group(item.span, item.count, item.shared);
    Supply supply(group, next ? first_keys(*next).length() : 0);
    for (int64_t i = 0; i < item.count; ++i) load_queries(member_of(item, i), 0, i);
    for (Unit unit = {0, 0}; group.has(unit); unit = group.after(unit)) {
      const int64_t spread = supply.begin(unit), part = unit.part * kPart;
      if (spread > 0) aim_at(item, group, supply.target(), next, spread);
      const Item one = member_of(item, unit.span);
      const Columns columns = columns_at(one, 0, unit.span);
      const State state = state_at(unit.span);
      if (item.columns <= kFew) {
        attend_few(source_of(one), part, columns, part == 0, state);
      } else {
        if (!group.repeats(unit)) load_values(source_of(one), group.keys(unit));
        attend::attend<1>(source_of(one), part, &columns, shape_.window, scale_, part == 0,
                          scratch_.work, &state);
      }
    }
    for (int64_t i = 0; i < item.count; ++i) finish(member_of(item, i), 0, state_at(i));
  }

  // A span of a group as an item of its own.
  Item member_of(const Item& item, int64_t index) const {
    const Span* span = item.span + index;
    return {span, item.head, 0, item.columns, items_.seen(*span, 0, span->queries - 1)};
  }

  // Attention of at most kFew columns to a part, which needs no V^T.
  void attend_few(const Head& source, int64_t part, const Columns& columns, bool fresh,
                  const State& state) {
    attend::attend_few(source, part, columns, shape_.window, scale_, fresh, scratch_.work, state,
                       tiles_);
    tiles_.use(kTiles);
  }

  static Range first_keys(const Item& item) { return item.keys.within(item.keys.begin, kPart); }

  // Calls of `fetch` for a step of at most kFew columns: two, and one for each pass over V.
  int64_t calls_of_few() const { return 2 + (dim_ + attend::kFewDims - 1) / attend::kFewDims; }

  // Spread the fetching of what a unit of a group reads, or the first part of `next`, over the work
  // on `spread` keys: two calls for each step of many columns, and two more while V is transposed,
  // which is not always done.
  void aim_at(const Item& item, const Group& group, const Unit& target, const Item* next,
              int64_t spread) {
    const int64_t steps = (spread + kStep - 1) / kStep;
    const int64_t calls = steps * (item.columns <= kFew ? calls_of_few() : 2);
    if (group.has(target)) {
      ahead_.aim(source_of(member_of(item, target.span)), group.cold(target), calls);
    } else {
      ahead_.aim(source_of(*next), first_keys(*next), calls);
    }
  }

  // Spread the fetching of what comes after an item's part, which may be the first part of `next`,
  // over the work on that part: two calls for each step while V is transposed, and two for each
  // group of columns.
  void aim(const Item& item, const Item* next, int64_t part) {
    const Range now = item.keys.within(part, kPart);
    const int64_t steps = (now.end + kStep - 1) / kStep - now.begin / kStep;
    const int64_t calls =
        steps * (item.columns <= kFew ? calls_of_few()
                                      : 2 + 2 * ((item.columns + kLanes - 1) / kLanes));
    if (part + kPart < item.keys.end) {
      ahead_.aim(source_of(item), item.keys.within(part + kPart, kPart), calls);
    } else if (next) {
      ahead_.aim(source_of(*next), first_keys(*next), calls);
    } else {
      ahead_.aim(source_of(item), {0, 0}, calls);
    }
  }

  // Parts, some at a time, each with its own result; then each head's are merged in their order.
  void run_split(const Span& span) {
    const Range keys = items_.seen(span, 0, span.queries - 1);
    const int64_t first = keys.begin / kPart, parts = items_.parts_of(span), heads = pool_.kv_heads;
    const auto slot = [&](int64_t head, int64_t index) {
      return State::at(shared_ + (head * (kRound + 1) + index) * State::floats(dim_), dim_);
    };
    for (int64_t done = 0; done < parts; done += kRound) {
      const int64_t count = std::min(kRound, parts - done), items = count * heads;
      const auto item_at = [&](int64_t index) {
        const int64_t part = (first + done + index % count) * kPart;
        return Item{&span, index / count, 0, span.queries * group_, keys.within(part, kPart)};
      };
      member_.for_each_ahead(items, [&](int64_t index, int64_t after) {
        const Item item = item_at(index), next = item_at(std::min(after, items - 1));
        const Head source = source_of(item);
        const int64_t part = item.keys.begin / kPart * kPart;
        load_queries(item, 0, 0);
        aim(item, after < items ? &next : nullptr, part);
        const Columns columns = columns_at(item, 0, 0);
        // The first part of all is put where the others will be merged.
        const State state = slot(item.head, done + index % count == 0 ? 0 : index % count + 1);
        if (item.columns <= kFew) {
          attend_few(source, part, columns, true, state);
        } else {
          load_values(source, item.keys);
          attend::attend<1>(source, part, &columns, shape_.window, scale_, true, scratch_.work,
                            &state);
        }
      });
      member_.for_each(heads, [&](int64_t head) {
        for (int64_t index = done == 0 ? 1 : 0; index < count; ++index) {
          attend::merge(slot(head, 0), slot(head, index + 1), dim_);
        }
        if (done + count == parts) {
          finish({&span, head, 0, span.queries * group_, keys}, 0, slot(head, 0));
        }
      });
    }
  }

  State state_at(int64_t group) const {
    return State::at(scratch_.states + group * State::floats(dim_), dim_);
  }

  // Of a group of columns, at a place in the scratch.
  Columns columns_at(const Item& item, int64_t group, int64_t slot) const {
    const int64_t first = item.first + group * kLanes;
    const int64_t last = std::min(first + kLanes, item.first + item.columns) - 1;
    return {scratch_.queries + slot * kLanes * dim_, scratch_.positions + slot * kLanes,
            items_.seen(*item.span, first / group_, last / group_)};
  }

  // Queries and positions of a group of an item's columns; columns beyond repeat the last one.
  void load_queries(const Item& item, int64_t group, int64_t slot) {
    const Span& span = *item.span;
    const bf16* rows[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t column = item.first + std::min(group * kLanes + i, item.columns - 1);
      const int64_t query = column / group_;
      rows[i] = q_ + (span.first_row + query) * stride_ +
                (item.head * group_ + column % group_) * dim_;
      scratch_.positions[slot * kLanes + i] = static_cast<int32_t>(span.start + query);
    }
    for (int64_t d = 0; d < dim_; d += 32) {
      __m512i pairs[16];
      for (int i = 0; i < 16; ++i) pairs[i] = _mm512_loadu_si512(rows[i] + d);
      attend::transpose(pairs);
      bf16* to = scratch_.queries + slot * kLanes * dim_ + d * kLanes;
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, pairs[i]);
    }
  }

  // V^T of the positions of `range`, which are in one part, into the workspace.
  void load_values(const Head& source, Range range) {
    for (int64_t at = range.begin / kStep * kStep; at < range.end; at += kStep) {
      ahead_.fetch();
      attend::transpose_values(source, at, range,
                               scratch_.work.values + at % kPart / kStep * attend::kTile);
      ahead_.fetch();
    }
    settle();
  }

  // Divide by the sums, and put a group of an item's columns into the output's panels.
  void finish(const Item& item, int64_t group, const State& state) {
    const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(state.sum));
    const int64_t count = std::min(kLanes, item.columns - group * kLanes);
    for (int64_t d = 0; d < dim_; d += 32) {
      __m512i pairs[16];
      for (int i = 0; i < 16; ++i) {
        const float* at = state.out + (d + 2 * i) * kLanes;
        pairs[i] = attend::pair_bf16(_mm512_mul_ps(_mm512_load_ps(at), factor),
                                     _mm512_mul_ps(_mm512_load_ps(at + kLanes), factor));
      }
      attend::transpose(pairs);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = item.first + group * kLanes + i;
        const int64_t column = (item.head * group_ + at % group_) * dim_ + d;
        const int64_t row = item.span->first_row + at / group_;
        _mm512_storeu_si512(out_ + panel_index(row, column, shape_.heads * dim_), pairs[i]);
      }
    }
  }

  Member& member_;
  const Pool& pool_;
  const int64_t layer_;
  const AttentionShape& shape_;
  const Span* const spans_;
  const int64_t num_spans_;
  const Items items_;
  const bf16* const q_;
  const int64_t stride_;
  bf16* const out_;
  const int64_t dim_, group_;
  const float scale_;  // of scores in units of log 2
  Ahead ahead_;
  Scratch scratch_;
  Tiles& tiles_;
  float* const shared_;  // [kv_heads, 1 + kRound] states of a split span
};

}  // namespace

void attention(Member& member, const Pool& pool, int64_t layer, const AttentionShape& shape,
               const Span* spans, int64_t num_spans, const bf16* q, int64_t stride,
               bf16* out_panels, uint8_t* scratch) {
  const FlushDenormals flush;
  Tiles tiles(kTiles);
  Attention(member, pool, layer, shape, spans, num_spans, q, stride, out_panels, scratch, tiles)
      .run();
}

int64_t attention_scratch(int64_t kv_heads, int64_t head_dim, int members) {
  return members * Scratch::bytes(head_dim) +
         kv_heads * (kRound + 1) * State::floats(head_dim) * static_cast<int64_t>(sizeof(float));
}

}  // namespace baton
