// Attention of up to 32 columns to one part of the keys: scores, softmax, products with V.
//
// Scores are computed transposed, S^T = K Q^T, and so is the result, O^T = V^T P^T: a vector holds
// 16 columns (a column is one query of one head) of one key or of one dimension. Then K tiles are
// loaded as they lie in the pool, maxima and sums are plain vector operations, and the weights P^T
// have the order in which AMX wants its right operand. What must be transposed is V: once per part,
// for all columns that share the KV head.
//
//     K [32 keys, dim] . Q^T [dim, 16 columns]  ->  S^T [32 keys, 16 columns]   float32
//     P^T = 2^(S^T - reference)                                                 bfloat16
//     V^T [dim, 32 keys] . P^T [32 keys, 16 columns]  ->  O^T [dim, 16 columns] float32
//
// Tiles of kKeys and parts of kPart keys have fixed boundaries, the multiples of their sizes. A
// part's result is computed from nothing but the part, tile by tile, and merged into that of the
// parts before. So parts may be computed anywhere, and an output is the same whichever columns,
// chunks or members it was computed with. What a column does not see adds exact zeros.
//
// AMX and AVX share a port, and do not run faster side by side: first all scores of a tile, then
// all its weights. What matters is that a tile's scores stay in the first-level cache.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "attention_source.h"
#include "attention_tile.h"
#include "ops.h"
#include "tile.h"

namespace baton::attend {

constexpr float kLowest = -1e30f;

// Result of up to 16 columns over some keys: `out` [head_dim, 16], the sums of
// 2^(score - reference) * V, and `sum`, those of 2^(score - reference). Scores are in units of
// log 2.
struct State {
  float* out;
  float* reference;
  float* sum;

  static int64_t floats(int64_t head_dim) { return (head_dim + 2) * kLanes; }
  static State at(float* base, int64_t head_dim) {
    return {base, base + head_dim * kLanes, base + (head_dim + 1) * kLanes};
  }
};

// 16 columns: their queries in the order of AMX [head_dim / 32, 16 pairs, 16 columns, 2], and the
// position of each column's query, ascending. `seen` is the union of what the columns see.
struct Columns {
  const bf16* queries;
  const int32_t* positions;
  Range seen;
};

// What one member works with.
struct Workspace {
  float* scores;  // [2, kKeys, 16]; then weights, pairs of keys in bfloat16 [2, kKeys / 2, 16, 2]
  bf16* values;   // V^T of a part [head_dim / 16, kPart / 32, 16 dimensions, 32 keys]
  float* states;  // [2, State::floats]
  Ahead* ahead;
};

// V^T of the step at `begin` into `out`, tiles of 16 dimensions kPart * 16 values apart. Keys
// outside of `range` become zeros, whatever is there; a half outside of it is not read.
inline void transpose_values(const Head& source, int64_t begin, Range range, bf16* out) {
  const int64_t dim = source.pool.head_dim;
  const bf16* rows[kStep];
  __mmask32 inside = 0;
  for (int64_t i = 0; i < kStep; ++i) {
    const bool first_half = (i < 16 || begin + 16 >= range.end) && begin + 16 > range.begin;
    if (i % 16 == 0) rows[i] = source.row(1, first_half ? begin : begin + 16);
    if (i % 16 != 0) rows[i] = rows[i - 1] + dim;
    inside |= __mmask32{begin + i >= range.begin && begin + i < range.end} << i;
  }
  for (int64_t d = 0; d < dim; d += 32) {
    __m512i low[16], high[16];
    for (int i = 0; i < 16; ++i) {
      const __mmask32 first = -(inside >> 2 * i & 1), second = -(inside >> (2 * i + 1) & 1);
      const __m512i a = _mm512_maskz_loadu_epi16(first, rows[2 * i] + d);
      const __m512i b = _mm512_maskz_loadu_epi16(second, rows[2 * i + 1] + d);
      low[i] = _mm512_unpacklo_epi16(a, b);
      high[i] = _mm512_unpackhi_epi16(a, b);
    }
    transpose(low);
    transpose(high);
    for (int i = 0; i < 16; ++i) {
      // Unpacking took dimensions 0-3 of every 8 into `low`, 4-7 into `high`.
      const int at = i / 4 * 8 + i % 4;
      bf16* row = out + (d + at / 16 * 16) * kPart + at % 16 * 32;
      _mm512_store_si512(row, low[i]);
      _mm512_store_si512(row + 4 * 32, high[i]);
    }
  }
}

// Sets the scores of a step that a column does not see to -infinity.
inline void mask(const Columns& columns, int64_t begin, int64_t window, float* scores) {
  const __m512i queries = _mm512_load_si512(columns.positions);
  const __m512i reach = _mm512_set1_epi32(window == 0 ? INT32_MAX : static_cast<int32_t>(window));
  for (int64_t i = 0; i < kStep; ++i) {
    // A key in the future is behind by a negative number, which is large as an unsigned one.
    const __m512i key = _mm512_set1_epi32(static_cast<int32_t>(begin + i));
    const __mmask16 hidden = _mm512_cmpge_epu32_mask(_mm512_sub_epi32(queries, key), reach);
    _mm512_mask_store_ps(scores + i * kLanes, hidden, _mm512_set1_ps(-__builtin_inff()));
  }
}

inline __m512 maximum(const float* scores) {
  __m512 greatest[4];
  for (int j = 0; j < 4; ++j) greatest[j] = _mm512_load_ps(scores + j * kLanes);
  for (int64_t i = 4; i < kStep; i += 4) {
    for (int j = 0; j < 4; ++j) {
      greatest[j] = _mm512_max_ps(greatest[j], _mm512_load_ps(scores + (i + j) * kLanes));
    }
  }
  return _mm512_max_ps(_mm512_max_ps(greatest[0], greatest[1]),
                       _mm512_max_ps(greatest[2], greatest[3]));
}

// Weights of a step's 32 keys as pairs of keys in bfloat16, which may overwrite the scores; returns
// their sums.
inline __m512 weigh(const float* scores, __m512 scale, __m512 reference, float* out) {
  __m512 sums[4] = {};
  for (const float* end = scores + kStep * kLanes; scores < end; scores += 4 * kLanes) {
    __m512 w[4];
    for (int j = 0; j < 4; ++j) {
      w[j] = exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(scores + j * kLanes), scale, reference));
      sums[j] = _mm512_add_ps(sums[j], w[j]);
    }
    _mm512_store_si512(out, pair_bf16(w[0], w[1]));
    _mm512_store_si512(out + kLanes, pair_bf16(w[2], w[3]));
    out += 2 * kLanes;
  }
  return _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
}

// Adds `later` to `state`.
inline void merge(const State& state, const State& later, int64_t head_dim) {
  const __m512 before = _mm512_load_ps(state.reference);
  const __m512 fresh = _mm512_load_ps(later.reference);
  const __m512 after = _mm512_max_ps(before, fresh);
  const __m512 old_factor = exp2_ps(_mm512_sub_ps(before, after));
  const __m512 factor = exp2_ps(_mm512_sub_ps(fresh, after));
  _mm512_store_ps(state.reference, after);
  const auto add = [&](float* to, const float* from) {
    const __m512 kept = _mm512_mul_ps(_mm512_load_ps(to), old_factor);
    _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_load_ps(from), factor, kept));
  };
  add(state.sum, later.sum);
  for (int64_t i = 0; i < head_dim; ++i) add(state.out + i * kLanes, later.out + i * kLanes);
}

inline void clear(const State& state, int64_t head_dim) {
  std::fill_n(state.out, head_dim * kLanes, 0.0f);
  std::fill_n(state.reference, kLanes, kLowest);
  std::fill_n(state.sum, kLanes, 0.0f);
}

// The work on `Groups` groups of columns.
template <int Groups>
class Part {
 public:
  // V^T of the part is in the workspace. `range` is not empty.
  Part(const Head& source, Range range, const Columns* columns, int64_t window, float scale,
       const Workspace& work, const State* states)
      : source_(source), range_(range), columns_(columns), window_(window),
        scale_(_mm512_set1_ps(scale)), work_(work), states_(states), dim_(source.pool.head_dim) {
    for (int g = 0; g < Groups; ++g) references_[g] = _mm512_set1_ps(kLowest);
    for (int g = 0; g < Groups; ++g) sums_[g] = _mm512_setzero_ps();
  }

  void run() {
    for (int64_t at = range_.begin; at < range_.end; at = at / kKeys * kKeys + kKeys) {
      const Range tile = range_.within(at, kKeys);
      origin_ = tile.begin / kStep * kStep;
      steps_ = (tile.end - origin_ + kStep - 1) / kStep;
      score_keys();
      for (int g = 0; g < Groups; ++g) weigh_group(g);
      add_values();
      fresh_ = false;
    }
    for (int g = 0; g < Groups; ++g) {
      _mm512_store_ps(states_[g].reference, references_[g]);
      _mm512_store_ps(states_[g].sum, sums_[g]);
    }
  }

 private:
  float* scores_of(int64_t group, int64_t step) const {
    return work_.scores + (group * kKeys + step * kStep) * kLanes;
  }

  void score_keys() {
    for (int g = 0; g < Groups; ++g) maxima_[g] = _mm512_set1_ps(-__builtin_inff());
    const auto begin = [&]<int Slot>(int64_t i) { multiply_keys<Slot>(i % Groups, i / Groups); };
    const auto end = [&]<int Slot>(int64_t i) {
      const int64_t group = i % Groups, step = i / Groups;
      end_pair<Slot>(scores_of(group, step));
      find_maximum(group, step);
    };
    alternate(steps_ * Groups, begin, end);
  }

  template <int Slot>
  void multiply_keys(int64_t group, int64_t step) {
    const int64_t at = origin_ + step * kStep;
    // A half of the step that nobody sees may be in a block that the span does not have: any rows
    // do in its place.
    const bf16* upper = source_.row(0, at + 16 > range_.begin ? at : at + 16);
    const bf16* lower = source_.row(0, at + 16 < range_.end ? at + 16 : at);
    const bf16* queries = columns_[group].queries;
    begin_pair<Slot>({upper, lower, dim_ * 2, 32, queries, dim_ / 32}, true,
                     scores_of(group, step));
  }

  void find_maximum(int64_t group, int64_t step) {
    const Columns& columns = columns_[group];
    const int64_t begin = origin_ + step * kStep;
    float* scores = scores_of(group, step);
    const bool all = begin + kStep - 1 <= columns.positions[0] &&
                     (window_ == 0 || begin > columns.positions[kLanes - 1] - window_);
    if (!all) mask(columns, begin, window_, scores);
    maxima_[group] = _mm512_max_ps(maxima_[group], maximum(scores));
    work_.ahead->fetch();
  }

  void weigh_group(int64_t group) {
    const __m512 max = _mm512_mul_ps(maxima_[group], scale_);
    // The reference follows the maximum at a distance, so that it seldom changes (weights up to 2^8
    // do no harm): FlashAttention-4's way.
    const __m512 limit = _mm512_add_ps(references_[group], _mm512_set1_ps(8.0f));
    const __mmask16 above = _mm512_cmp_ps_mask(max, limit, _CMP_GT_OQ);
    if (above) raise(group, _mm512_mask_blend_ps(above, references_[group], max));
    float* weights = scores_of(group, 0);
    for (int64_t step = 0; step < steps_; ++step) {
      work_.ahead->fetch();
      const __m512 sum = weigh(scores_of(group, step), scale_, references_[group],
                               weights + step * kTile / 2);
      sums_[group] = _mm512_add_ps(sums_[group], sum);
    }
  }

  void raise(int64_t group, __m512 reference) {
    const __m512 factor = exp2_ps(_mm512_sub_ps(references_[group], reference));
    sums_[group] = _mm512_mul_ps(sums_[group], factor);
    references_[group] = reference;
    for (int64_t d = 0; !fresh_ && d < dim_; ++d) {
      float* row = states_[group].out + d * kLanes;
      _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), factor));
    }
  }

  // Adds the product of V^T and the weights to the states.
  void add_values() {
    settle();
    const bf16* values = work_.values + origin_ % kPart / kStep * kTile;
    const auto out_of = [&](int64_t i) {
      return states_[i % Groups].out + i / Groups * 32 * kLanes;
    };
    const auto begin = [&]<int Slot>(int64_t i) {
      const bf16* upper = values + i / Groups * 32 * kPart;
      const bf16* lower = upper + 16 * kPart;
      const auto* weights = reinterpret_cast<const bf16*>(scores_of(i % Groups, 0));
      begin_pair<Slot>({upper, lower, 64, kTile, weights, steps_}, fresh_, out_of(i));
    };
    alternate(dim_ / 32 * Groups, begin,
              [&]<int Slot>(int64_t i) { end_pair<Slot>(out_of(i)); });
  }

  const Head& source_;
  const Range range_;
  const Columns* const columns_;
  const int64_t window_;
  const __m512 scale_;
  const Workspace& work_;
  const State* const states_;
  const int64_t dim_;

  int64_t origin_ = 0, steps_ = 0;  // the tile's first position, rounded down, and its steps
  bool fresh_ = true;               // the states hold nothing yet
  __m512 maxima_[Groups];           // of the tile, unscaled
  __m512 references_[Groups], sums_[Groups];
};

// Attention of `Groups` groups of columns to the keys of the part at `part`: put into the states if
// `fresh`, else merged into them.
template <int Groups>
inline void attend(const Head& source, int64_t part, const Columns* columns, int64_t window,
                   float scale, bool fresh, const Workspace& work, const State* states) {
  const int64_t dim = source.pool.head_dim;
  // Columns are in the order of their positions.
  const Range seen = {columns[0].seen.begin, columns[Groups - 1].seen.end};
  const Range range = {std::max(part, seen.begin), std::min(part + kPart, seen.end)};
  if (range.begin >= range.end) {
    for (int g = 0; fresh && g < Groups; ++g) clear(states[g], dim);
    return;
  }
  State own[Groups];
  for (int g = 0; g < Groups; ++g) {
    own[g] = fresh ? states[g] : State::at(work.states + g * State::floats(dim), dim);
  }
  Part<Groups>(source, range, columns, window, scale, work, own).run();
  for (int g = 0; !fresh && g < Groups; ++g) merge(states[g], own[g], dim);
}

}  // namespace baton::attend
