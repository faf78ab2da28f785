// What attention does with one tile of keys: scores, softmax, products with V.
//
// Scores are computed transposed, S^T = K Q^T, and so is the result, O^T = V^T P^T: a vector holds
// 16 columns (a column is one query of one head) of one key or of one dimension. Then K tiles are
// loaded as they lie in the pool, maxima and sums are plain vector operations, and the weights P^T
// have the order in which AMX wants its right operand. What must be transposed is V: once per tile
// of keys, for all columns that share the KV head.
//
//     K [32 keys, dim] . Q^T [dim, 16 columns]  ->  S^T [32 keys, 16 columns]   float32
//     P^T = 2^(S^T - max), bfloat16, written over S^T
//     V^T [dim, 32 keys] . P^T [32 keys, 16 columns]  ->  O^T [dim, 16 columns]  float32
//
// Tiles of keys have fixed boundaries, the multiples of kKeys. Each has a maximum of its own, and is
// merged into the tiles before it; so tiles may be computed apart, in any order, and an output is
// the same whichever columns, chunks or members it was computed with.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "ops.h"
#include "tile.h"

namespace baton::attend {

constexpr int64_t kKeys = 256;  // keys of a tile; a multiple of kStep
constexpr int64_t kStep = 32;   // keys of a step: the depth of one product with V
constexpr int64_t kLanes = 16;  // columns of a group
constexpr float kLowest = -1e30f;

// K and V of one KV head of one sequence.
struct Head {
  const Pool& pool;
  const int32_t* blocks;
  int64_t layer, head;

  // The row of a position; up to a multiple of 16, the rows of the next positions follow it.
  const bf16* row(int64_t which, int64_t position) const {
    const uint32_t at = static_cast<uint32_t>(position);
    const uint32_t size = static_cast<uint32_t>(pool.block_size);
    return pool.rows(blocks[at / size], layer, which, head) + at % size * pool.head_dim;
  }
};

// Positions [begin, end).
struct Range {
  int64_t begin, end;
};

// Result of up to 16 columns over some keys: `out` [head_dim, 16] sums of 2^(score - max) * V, and
// `sum` of 2^(score - max). Scores are in units of log 2.
struct State {
  float* out;
  float* max;
  float* sum;

  static int64_t floats(int64_t head_dim) { return (head_dim + 2) * kLanes; }
  static State at(float* base, int64_t head_dim) {
    return {base, base + head_dim * kLanes, base + (head_dim + 1) * kLanes};
  }
};

// 16 columns: their queries in the order of AMX [head_dim / 32, 16 pairs, 16 columns, 2], and the
// position of each column's query. `seen` is the union of what the columns see.
struct Columns {
  const bf16* queries;
  const int32_t* positions;
  Range seen;
};

// What one member works with.
struct Workspace {
  float* scores;    // [2, kKeys, 16]; weights [2, kKeys / 2, 32] bfloat16 with twice the stride
  bf16* values;     // V^T [head_dim / 16, kKeys / 32, 16 dimensions, 32 keys]
  float* products;  // [2, 2, 16, 16]
};

// 2^x for x <= 0 to 4e-6, far below what rounding to bfloat16 costs; 2^0 is 1. A polynomial of least
// relative error in x - floor(x), with the ends fixed.
inline __m512 exp2_ps(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0x1.bc31cap-7f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.aa3fc6p-5f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ee5886p-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62d51ap-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);
}

// Lane i of the result: a[i] and b[i], rounded to bfloat16, a in the lower half.
inline __m512i pair_bf16(__m512 a, __m512 b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
  return _mm512_permutexvar_epi16(order, both);
}

// Transpose 16 x 16 values of 32 bits in place.
inline void transpose(__m512i (&rows)[16]) {
  __m512i half[16];
  for (int i = 0; i < 16; i += 2) {
    half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = i; j < i + 4; ++j) {
      half[j] = _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0x88);
      half[j + 4] = _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0xdd);
  }
}

// V^T of the step at `begin` into `out` (two tiles per 32 dimensions, `tile_stride` values apart);
// keys outside of `range` become zeros, whatever is there.
inline void transpose_values(const Head& source, int64_t begin, Range range, bf16* out,
                             int64_t tile_stride) {
  const int64_t dim = source.pool.head_dim;
  const bf16* rows[kStep];
  for (int64_t half = 0; half < kStep; half += 16) {
    const int64_t first = begin + half;
    const bool any = first < range.end && first + 16 > range.begin;
    const bf16* base = any ? source.row(1, first) : nullptr;
    for (int64_t i = 0; i < 16; ++i) {
      const bool inside = first + i >= range.begin && first + i < range.end;
      rows[half + i] = inside ? base + i * dim : nullptr;
    }
  }
  const bool whole = begin >= range.begin && begin + kStep <= range.end;
  for (int64_t d = 0; d < dim; d += 32) {
    __m512i low[16], high[16];
    for (int i = 0; i < 16; ++i) {
      const __mmask32 first = whole || rows[2 * i] ? ~0u : 0, second = whole || rows[2 * i + 1] ? ~0u : 0;
      const __m512i a = _mm512_maskz_loadu_epi16(first, rows[2 * i] + d);
      const __m512i b = _mm512_maskz_loadu_epi16(second, rows[2 * i + 1] + d);
      low[i] = _mm512_unpacklo_epi16(a, b);
      high[i] = _mm512_unpackhi_epi16(a, b);
    }
    transpose(low);
    transpose(high);
    bf16* tiles = out + d / 16 * tile_stride;
    for (int i = 0; i < 16; ++i) {
      // Unpacking took dimensions 0-3 of every 8 into `low`, 4-7 into `high`.
      const int at = i / 4 * 8 + i % 4;
      bf16* row = tiles + at / 16 * tile_stride + at % 16 * 32;
      _mm512_store_si512(row, low[i]);
      _mm512_store_si512(row + 4 * 32, high[i]);
    }
  }
}

// Scores of one step and `Groups` groups of 16 columns, unscaled.
template <int Groups>
inline void multiply_keys(const Head& source, int64_t begin, Range range, const Columns* columns,
                          float* scores) {
  const int64_t dim = source.pool.head_dim;
  // A half of the step that nobody sees may be in a block that the span does not have: any rows do.
  const int64_t first = begin + 16 > range.begin ? begin : begin + 16;
  const int64_t second = begin + 16 < range.end ? begin + 16 : begin;
  const bf16* upper = source.row(0, first);
  const bf16* lower = source.row(0, second);
  _tile_zero(0);
  _tile_zero(1);
  if (Groups == 2) _tile_zero(2);
  if (Groups == 2) _tile_zero(3);
  for (int64_t d = 0; d < dim; d += 32) {
    _tile_loadd(6, columns[0].queries + d * kLanes, 64);
    _tile_loadd(4, upper + d, dim * 2);
    _tile_loadd(5, lower + d, dim * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (Groups == 2) _tile_loadd(7, columns[1].queries + d * kLanes, 64);
    if (Groups == 2) _tile_dpbf16ps(2, 4, 7);
    if (Groups == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, scores, 64);
  _tile_stored(1, scores + 16 * kLanes, 64);
  if (Groups == 2) _tile_stored(2, scores + kKeys * kLanes, 64);
  if (Groups == 2) _tile_stored(3, scores + (kKeys + 16) * kLanes, 64);
}

// The greatest of the step's scores and of `greatest`. What a column does not see becomes -infinity.
inline __m512 maximum(const Columns& columns, int64_t begin, int64_t window, float* scores,
                      __m512 greatest) {
  const int32_t lowest = columns.positions[0], highest = columns.positions[kLanes - 1];
  const bool all = begin + kStep - 1 <= lowest && (window == 0 || begin > highest - window);
  if (all) {
    __m512 other = greatest;
    for (int64_t i = 0; i < kStep; i += 2) {
      greatest = _mm512_max_ps(greatest, _mm512_load_ps(scores + i * kLanes));
      other = _mm512_max_ps(other, _mm512_load_ps(scores + (i + 1) * kLanes));
    }
    return _mm512_max_ps(greatest, other);
  }
  const __m512i last = _mm512_load_si512(columns.positions);
  const __m512i reach = _mm512_set1_epi32(window == 0 ? INT32_MAX : static_cast<int32_t>(window));
  for (int64_t i = 0; i < kStep; ++i) {
    // A key in the future is behind by a negative number, which is large as an unsigned one.
    const __m512i behind = _mm512_sub_epi32(last, _mm512_set1_epi32(static_cast<int32_t>(begin + i)));
    const __mmask16 seen = _mm512_cmplt_epu32_mask(behind, reach);
    const __m512 score = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-__builtin_inff()),
                                              _mm512_load_ps(scores + i * kLanes));
    _mm512_store_ps(scores + i * kLanes, score);
    greatest = _mm512_max_ps(greatest, score);
  }
  return greatest;
}

// Weights of `keys` keys (a multiple of 32) from their scores, in place; returns their sums.
inline __m512 weigh(float* scores, int64_t keys, __m512 scale, __m512 max) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                    _mm512_setzero_ps()};
  for (int64_t i = 0; i < keys; i += 4) {
    float* at = scores + i * kLanes;
    __m512 weights[4];
    for (int j = 0; j < 4; ++j) {
      weights[j] = exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(at + j * kLanes), scale, max));
      sums[j] = _mm512_add_ps(sums[j], weights[j]);
    }
    _mm512_store_si512(at, pair_bf16(weights[0], weights[1]));
    _mm512_store_si512(at + 2 * kLanes, pair_bf16(weights[2], weights[3]));
  }
  return _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
}

// Factors for what is in `state` and for what is merged into it, where `max` and `sum` belong to
// the latter; sets the state's maximum and sum.
struct Factors {
  __m512 old, fresh;
};
inline Factors rescale(const State& state, __m512 max, __m512 sum) {
  const __m512 before = _mm512_load_ps(state.max);
  const __m512 after = _mm512_max_ps(before, max);
  const Factors factors = {exp2_ps(_mm512_sub_ps(before, after)), exp2_ps(_mm512_sub_ps(max, after))};
  const __m512 kept = _mm512_mul_ps(_mm512_load_ps(state.sum), factors.old);
  _mm512_store_ps(state.max, after);
  _mm512_store_ps(state.sum, _mm512_fmadd_ps(sum, factors.fresh, kept));
  return factors;
}

// out = out * old + product * fresh for `rows` dimensions.
inline void merge(float* out, const float* product, int64_t rows, const Factors& factors) {
  for (int64_t i = 0; i < rows; ++i) {
    const __m512 kept = _mm512_mul_ps(_mm512_load_ps(out + i * kLanes), factors.old);
    const __m512 added = _mm512_load_ps(product + i * kLanes);
    _mm512_store_ps(out + i * kLanes, _mm512_fmadd_ps(added, factors.fresh, kept));
  }
}

inline void merge(const State& state, const State& later, int64_t head_dim) {
  const Factors factors = rescale(state, _mm512_load_ps(later.max), _mm512_load_ps(later.sum));
  merge(state.out, later.out, head_dim, factors);
}

// Products of steps [first, last) of V^T and the weights, 32 dimensions at a time, put or merged
// into the states.
template <int Groups>
inline void multiply_values(const Workspace& work, int64_t head_dim, int64_t first, int64_t last,
                            bool fresh, const State* states, const Factors* factors) {
  constexpr int64_t kTile = 512;  // bfloat16 values of a tile
  constexpr int64_t kSteps = kKeys / kStep;
  settle();
  for (int64_t d = 0; d < head_dim; d += 32) {
    const bf16* upper = work.values + d / 16 * kSteps * kTile;
    const bf16* lower = upper + kSteps * kTile;
    _tile_zero(0);
    _tile_zero(1);
    if (Groups == 2) _tile_zero(2);
    if (Groups == 2) _tile_zero(3);
    for (int64_t step = first; step < last; ++step) {
      const float* weights = work.scores + step * kStep * kLanes;
      _tile_loadd(6, weights, 128);
      _tile_loadd(4, upper + step * kTile, 64);
      _tile_loadd(5, lower + step * kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (Groups == 2) _tile_loadd(7, weights + kKeys * kLanes, 128);
      if (Groups == 2) _tile_dpbf16ps(2, 4, 7);
      if (Groups == 2) _tile_dpbf16ps(3, 5, 7);
    }
    float* to[2];
    for (int g = 0; g < Groups; ++g) to[g] = fresh ? states[g].out + d * kLanes : work.products + g * 512;
    _tile_stored(0, to[0], 64);
    _tile_stored(1, to[0] + 256, 64);
    if (Groups == 2) _tile_stored(2, to[1], 64);
    if (Groups == 2) _tile_stored(3, to[1] + 256, 64);
    if (fresh) continue;
    for (int g = 0; g < Groups; ++g) merge(states[g].out + d * kLanes, to[g], 32, factors[g]);
  }
}

inline void clear(const State& state, int64_t head_dim) {
  std::fill_n(state.out, head_dim * kLanes, 0.0f);
  std::fill_n(state.max, kLanes, kLowest);
  std::fill_n(state.sum, kLanes, 0.0f);
}

// Attention of `Groups` groups of columns to the keys of the tile at `tile`, whose V^T is in the
// workspace: put into the states if `fresh`, else merged into them.
template <int Groups>
inline void attend(const Head& source, int64_t tile, const Columns* columns, int64_t window,
                   float scale, bool fresh, const Workspace& work, const State* states) {
  const int64_t dim = source.pool.head_dim;
  const Range range = {std::max(tile, std::min(columns[0].seen.begin, columns[Groups - 1].seen.begin)),
                       std::min(tile + kKeys, std::max(columns[0].seen.end, columns[Groups - 1].seen.end))};
  if (range.begin >= range.end) {
    for (int g = 0; fresh && g < Groups; ++g) clear(states[g], dim);
    return;
  }
  const int64_t first = (range.begin - tile) / kStep;
  const int64_t last = (range.end - tile + kStep - 1) / kStep;
  __m512 greatest[Groups];
  for (int g = 0; g < Groups; ++g) greatest[g] = _mm512_set1_ps(-__builtin_inff());
  for (int64_t step = first; step < last; ++step) {
    float* scores = work.scores + step * kStep * kLanes;
    multiply_keys<Groups>(source, tile + step * kStep, range, columns, scores);
    for (int g = 0; g < Groups; ++g) {
      greatest[g] = maximum(columns[g], tile + step * kStep, window, scores + g * kKeys * kLanes,
                            greatest[g]);
    }
  }
  const __m512 units = _mm512_set1_ps(scale);
  Factors factors[Groups];
  for (int g = 0; g < Groups; ++g) {
    // The order of operands lets NaN through.
    const __m512 max = _mm512_max_ps(_mm512_set1_ps(kLowest), _mm512_mul_ps(greatest[g], units));
    float* scores = work.scores + (g * kKeys + first * kStep) * kLanes;
    const __m512 sum = weigh(scores, (last - first) * kStep, units, max);
    if (fresh) {
      _mm512_store_ps(states[g].max, max);
      _mm512_store_ps(states[g].sum, sum);
    } else {
      factors[g] = rescale(states[g], max, sum);
    }
  }
  multiply_values<Groups>(work, dim, first, last, fresh, states, factors);
}

}  // namespace baton::attend
