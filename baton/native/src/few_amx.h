// Products of a few columns with AMX: of a step's keys, and of its values.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "attention_source.h"
#include "ops.h"
#include "tile.h"

namespace baton::attend {

// Tiles 0 to 3: scores; 4 and 5: K; 6: queries.
constexpr TileConfig few_scores() {
  TileConfig config = tile_config({16, 16, 16, 16, 16, 16, 16, 16});
  for (int tile : {0, 1, 2, 3, 6}) config.row_bytes[tile] = kFew * 4;
  return config;
}
constexpr TileConfig kFewScores = few_scores();
// Tiles 0 to 3: sums of 16 dimensions each; 4 and 5: V; 6: weights.
constexpr TileConfig kFewValues = tile_config({kFew, kFew, kFew, kFew, 16, 16, kFew, 16});

// Begins the scores [32, kFew] of two halves of 16 keys; they are in `to` after `end_few`.
template <int Slot>
inline void begin_few(const bf16* const (&halves)[2], int64_t dim, const bf16* queries, float*,
                      Ahead&) {
  clear_pair<Slot>();
  for (int64_t d = 0; d < dim; d += 32) {
    multiply_pair<Slot>(halves[0] + d, halves[1] + d, dim * 2, queries + d * kLanes, 64);
  }
}
template <int Slot>
inline void end_few(float* to) {
  if constexpr (Slot == 0) {
    _tile_stored(0, to, kFew * 4);
    _tile_stored(1, to + 16 * kFew, kFew * 4);
  } else {
    _tile_stored(2, to, kFew * 4);
    _tile_stored(3, to + 16 * kFew, kFew * 4);
  }
}

// Sums [N, kFew, 16 dimensions] of products of weights and values, N of 2 or 4.
template <int N>
class FewSums {
 public:
  // Values must be interleaved, a step ahead of the products: they would wait for what was just
  // stored.
  static constexpr bool kDirect = false;

  FewSums() {
    clear_pair<0>();
    clear_pair<1>();
  }

  void store(float* to) const {
    _tile_stored(0, to, 64);
    _tile_stored(1, to + kFew * 16, 64);
    if constexpr (N == 4) {
      _tile_stored(2, to + 2 * kFew * 16, 64);
      _tile_stored(3, to + 3 * kFew * 16, 64);
    }
  }

  // Multiplies each column's sums by its factor. `staging`: room for `store`.
  void scale(const float* factors, float* staging) {
    store(staging);
    for (int i = 0; i < N * kFew; ++i) {
      float* row = staging + i * 16;
      const __m512 factor = _mm512_set1_ps(factors[i % kFew]);
      _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), factor));
    }
    settle();
    _tile_loadd(0, staging, 64);
    _tile_loadd(1, staging + kFew * 16, 64);
    if constexpr (N == 4) {
      _tile_loadd(2, staging + 2 * kFew * 16, 64);
      _tile_loadd(3, staging + 3 * kFew * 16, 64);
    }
  }

  // Adds weights [kFew, 32 keys] times interleaved values [N, 16 pairs of keys, 16 dimensions, 2].
  void add(const bf16* weights, const bf16* values) {
    settle();
    _tile_loadd(6, weights, 64);
    _tile_loadd(4, values, 64);
    _tile_dpbf16ps(0, 6, 4);
    _tile_loadd(5, values + kTile, 64);
    _tile_dpbf16ps(1, 6, 5);
    if constexpr (N == 4) {
      _tile_loadd(4, values + 2 * kTile, 64);
      _tile_dpbf16ps(2, 6, 4);
      _tile_loadd(5, values + 3 * kTile, 64);
      _tile_dpbf16ps(3, 6, 5);
    }
  }
};

}  // namespace baton::attend
