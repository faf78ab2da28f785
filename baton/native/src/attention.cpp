// Causal attention over the paged pool with online softmax (FlashAttention, arXiv:2205.14135).
//
// The queries of a span and the heads that share a KV head are one sequence of columns: column
// query * group + head of the group, `group` = heads / kv_heads. An item of work is a block of
// columns of one KV head, with all keys that they see; a prefill chunk makes many of them, a decode
// one per KV head. Decodes whose keys are a large share of the step are split by parts of keys.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "attention_few.h"
#include "attention_part.h"
#include "attention_source.h"
#include "attention_tile.h"
#include "ops.h"
#include "tile.h"

namespace baton {
namespace {

using attend::Ahead;
using attend::Columns;
using attend::Head;
using attend::kFew;
using attend::kKeys;
using attend::kPart;
using attend::kLanes;
using attend::kStep;
using attend::Range;
using attend::State;
using attend::Workspace;

constexpr TileConfig kTiles = tile_config({16, 16, 16, 16, 16, 16, 16, 16});
constexpr int64_t kMinColumns = 128;  // of a block: fewer make transposing V expensive
constexpr int64_t kRound = 8;         // parts of a split context that are computed at a time
constexpr int64_t kItemsPerMember = 8;

// A block's queries and results stay in the second-level cache.
int64_t max_columns(int64_t head_dim) { return round_up(65536 / head_dim, 32); }

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

// What one member works with, for one block of columns.
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
        num_spans_(num_spans), q_(q), stride_(stride), out_(out), dim_(pool.head_dim),
        group_(shape.heads / pool.kv_heads), scale_(shape.scale * 1.44269504f),
        scratch_(scratch + member.index() * Scratch::bytes(pool.head_dim), pool.head_dim),
        tiles_(tiles),
        shared_(reinterpret_cast<float*>(scratch + member.size() * Scratch::bytes(pool.head_dim))) {
    scratch_.work.ahead = &ahead_;
    plan();
  }

  void run() {
    for (int64_t i = 0; i < num_spans_; ++i) {
      if (is_split(spans_[i])) run_split(spans_[i]);
    }
    run_items();
  }

 private:
  bool is_narrow(const Span& span) const { return span.queries * group_ <= kLanes; }

  Range seen(const Span& span, int64_t first, int64_t last) const {
    const int64_t window = shape_.window;
    return {window == 0 ? 0 : std::max<int64_t>(0, span.start + first - window + 1),
            span.start + last + 1};
  }

  int64_t parts_of(const Span& span) const {
    const Range range = seen(span, 0, span.queries - 1);
    return (range.end + kPart - 1) / kPart - range.begin / kPart;
  }

  void plan() {
    int64_t columns = 0;
    for (int64_t i = 0; i < num_spans_; ++i) {
      parts_ += parts_of(spans_[i]) * pool_.kv_heads;
      if (!is_narrow(spans_[i])) columns += spans_[i].queries * group_;
    }
    const int64_t wanted = columns * pool_.kv_heads / (member_.size() * kItemsPerMember);
    block_ = std::clamp(round_up(wanted, 32), kMinColumns, max_columns(dim_));
  }

  // Whether one head of the span would be a large part of a member's share.
  bool is_split(const Span& span) const {
    const int64_t parts = parts_of(span);
    return member_.size() > 1 && is_narrow(span) && parts > 1 &&
           parts * kItemsPerMember * member_.size() > parts_;
  }

  int64_t blocks_of(const Span& span) const {
    return (span.queries * group_ + block_ - 1) / block_;
  }
  int64_t items_of(const Span& span) const {
    return is_split(span) ? 0 : blocks_of(span) * pool_.kv_heads;
  }

  // Spans are visited twice: first the wide ones, then the narrow ones.
  const Span& span_at(int64_t visit) const { return spans_[visit % num_spans_]; }
  int64_t items_at(int64_t visit) const {
    const Span& span = span_at(visit);
    return is_narrow(span) == (visit >= num_spans_) ? items_of(span) : 0;
  }

  // Columns [first, first + columns) of a KV head of a span, and the positions that they see.
  struct Item {
    const Span* span;
    int64_t head, first, columns;
    Range keys;
  };

  Head source_of(const Item& item) const { return {pool_, item.span->blocks, layer_, item.head}; }

  // The spans' items one after the other. A member's indices only grow, so a cursor goes on from
  // where it was.
  struct Cursor {
    int64_t visit = 0, begin = 0;
  };

  Item find(Cursor& cursor, int64_t index) const {
    while (index >= cursor.begin + items_at(cursor.visit)) {
      cursor.begin += items_at(cursor.visit++);
    }
    const Span& span = span_at(cursor.visit);
    index -= cursor.begin;
    // The last columns of a span see the most keys: they come first.
    const int64_t first = (blocks_of(span) - 1 - index / pool_.kv_heads) * block_;
    const int64_t columns = std::min(block_, span.queries * group_ - first);
    return {&span, index % pool_.kv_heads, first, columns,
            seen(span, first / group_, (first + columns - 1) / group_)};
  }

  void run_items() {
    int64_t items = 0;
    for (int64_t i = 0; i < num_spans_; ++i) items += items_of(spans_[i]);
    Cursor cursor;
    member_.for_each_ahead(items, [&](int64_t index, int64_t after) {
      const Item item = find(cursor, index);
      const Item next = after < items ? find(cursor, after) : Item{};
      run_item(item, after < items ? &next : nullptr);
    });
  }

  void run_item(const Item& item, const Item* next) {
    const Head source = source_of(item);
    const int64_t groups = (item.columns + kLanes - 1) / kLanes;
    for (int64_t i = 0; i < groups; ++i) load_queries(item, i);
    const int64_t begin = item.keys.begin / kPart * kPart;
    for (int64_t part = begin; part < item.keys.end; part += kPart) {
      aim(item, next, part);
      if (item.columns <= kFew) {
        attend_few(source, part, columns_at(item, 0), part == begin, state_at(0));
        continue;
      }
      load_values(source, item.keys.within(part, kPart));
      for (int64_t i = 0; i < groups; i += 2) {
        const int64_t second = std::min(i + 1, groups - 1);
        const Columns columns[] = {columns_at(item, i), columns_at(item, second)};
        const State states[] = {state_at(i), state_at(second)};
        const auto attend = i + 1 < groups ? attend::attend<2> : attend::attend<1>;
        attend(source, part, columns, shape_.window, scale_, part == begin, scratch_.work, states);
      }
    }
    for (int64_t i = 0; i < groups; ++i) finish(item, i, state_at(i));
  }

  // Attention of at most kFew columns to a part, which needs no V^T.
  void attend_few(const Head& source, int64_t part, const Columns& columns, bool fresh,
                  const State& state) {
    attend::attend_few(source, part, columns, shape_.window, scale_, fresh, scratch_.work, state,
                       tiles_);
    tiles_.use(kTiles);
  }

  // Spread the fetching of what comes after an item's part, which may be the first part of `next`,
  // over the work on that part: two calls for each step while V is transposed, and two for each
  // group of columns; of few columns, two and one for each pass over V.
  void aim(const Item& item, const Item* next, int64_t part) {
    const Range now = item.keys.within(part, kPart);
    const int64_t steps = (now.end + kStep - 1) / kStep - now.begin / kStep;
    const int64_t calls =
        steps * (item.columns <= kFew ? 2 + (dim_ + attend::kFewDims - 1) / attend::kFewDims
                                      : 2 + 2 * ((item.columns + kLanes - 1) / kLanes));
    if (part + kPart < item.keys.end) {
      ahead_.aim(source_of(item), item.keys.within(part + kPart, kPart), calls);
    } else if (next) {
      ahead_.aim(source_of(*next), next->keys.within(next->keys.begin, kPart), calls);
    } else {
      ahead_.aim(source_of(item), {0, 0}, calls);
    }
  }

  // Parts, some at a time, each with its own result; then each head's are merged in their order.
  void run_split(const Span& span) {
    const Range keys = seen(span, 0, span.queries - 1);
    const int64_t first = keys.begin / kPart, parts = parts_of(span), heads = pool_.kv_heads;
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
        load_queries(item, 0);
        aim(item, after < items ? &next : nullptr, part);
        const Columns columns = columns_at(item, 0);
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

  Columns columns_at(const Item& item, int64_t group) const {
    const int64_t first = item.first + group * kLanes;
    const int64_t last = std::min(first + kLanes, item.first + item.columns) - 1;
    return {scratch_.queries + group * kLanes * dim_, scratch_.positions + group * kLanes,
            seen(*item.span, first / group_, last / group_)};
  }

  // Queries and positions of a group of an item's columns; columns beyond repeat the last one.
  void load_queries(const Item& item, int64_t group) {
    const Span& span = *item.span;
    const bf16* rows[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t column = item.first + std::min(group * kLanes + i, item.columns - 1);
      const int64_t query = column / group_;
      rows[i] = q_ + (span.first_row + query) * stride_ +
                (item.head * group_ + column % group_) * dim_;
      scratch_.positions[group * kLanes + i] = static_cast<int32_t>(span.start + query);
    }
    for (int64_t d = 0; d < dim_; d += 32) {
      __m512i pairs[16];
      for (int i = 0; i < 16; ++i) pairs[i] = _mm512_loadu_si512(rows[i] + d);
      attend::transpose(pairs);
      bf16* to = scratch_.queries + group * kLanes * dim_ + d * kLanes;
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
  const bf16* const q_;
  const int64_t stride_;
  bf16* const out_;
  const int64_t dim_, group_;
  const float scale_;  // of scores in units of log 2
  Ahead ahead_;
  Scratch scratch_;
  Tiles& tiles_;
  float* const shared_;  // [kv_heads, 1 + kRound] states of a split span
  int64_t parts_ = 0;    // of all spans and KV heads
  int64_t block_ = 0;    // columns of a wide item
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
