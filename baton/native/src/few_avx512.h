// Products of a few columns with AVX-512 BF16: see few_amx.h.
//
// K is transposed on its way: a vector of one pair of dimensions of 16 keys, times the same pair of
// one query, adds up a score in the order of depth, as the products of pairs of tiles do.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "attention_source.h"
#include "ops.h"
#include "tile.h"

namespace baton::attend {

constexpr TileConfig kFewScores, kFewValues;

// Transposes 4 x 4 values of 32 bits within each of the four lanes of 128 bits.
inline void transpose_lanes(const __m512i (&rows)[4], __m512i (&columns)[4]) {
  const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]);
  const __m512i b = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]);
  const __m512i d = _mm512_unpackhi_epi32(rows[2], rows[3]);
  columns[0] = _mm512_unpacklo_epi64(a, c);
  columns[1] = _mm512_unpackhi_epi64(a, c);
  columns[2] = _mm512_unpacklo_epi64(b, d);
  columns[3] = _mm512_unpackhi_epi64(b, d);
}

// 16 bytes of each of four rows, `stride` values apart.
inline __m512i load_lanes(const bf16* at, int64_t stride) {
  const auto quad = [&](int64_t row) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + row * stride));
  };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(quad(0)), quad(1), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(quad(2)), quad(3), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Scores [16 keys, kFew] of 16 consecutive rows of `dim` values, which is Dim unless that is 0: with
// addresses that are known, no registers are short.
template <int64_t Dim>
inline void score_few(const bf16* rows, int64_t dim, const bf16* queries, float* to,
                      Ahead& ahead) {
  if constexpr (Dim != 0) dim = Dim;
  __m512 sums[kFew] = {};
  for (int64_t d = 0; d < dim; d += 8) {
    ahead.trickle(8);
    __m512i keys[4], pairs[4];
    for (int64_t i = 0; i < 4; ++i) keys[i] = load_lanes(rows + 4 * i * dim + d, dim);
    transpose_lanes(keys, pairs);
    for (int64_t pair = 0; pair < 4; ++pair) {
      const bf16* query = queries + (d / 2 + pair) * 2 * kLanes;
      const auto x = reinterpret_cast<__m512bh>(pairs[pair]);
      for (int64_t column = 0; column < kFew; ++column) {
        sums[column] = _mm512_dpbf16_ps(sums[column], x, broadcast_pair(query + 2 * column));
      }
    }
  }
  __m512i by_column[4], by_key[4];
  for (int i = 0; i < 4; ++i) by_column[i] = _mm512_castps_si512(sums[i]);
  transpose_lanes(by_column, by_key);
  for (int i = 0; i < 4; ++i) _mm512_store_si512(to + i * 16, by_key[i]);
}

template <int Slot>
inline void begin_few(const bf16* const (&halves)[2], int64_t dim, const bf16* queries,
                      float* to, Ahead& ahead) {
  for (int64_t half = 0; half < 2; ++half, to += 16 * kFew) {
    switch (dim) {
      case 64: score_few<64>(halves[half], dim, queries, to, ahead); break;
      case 128: score_few<128>(halves[half], dim, queries, to, ahead); break;
      default: score_few<0>(halves[half], dim, queries, to, ahead);
    }
  }
}
template <int Slot>
inline void end_few(float*) {}

template <int N>
class FewSums {
 public:
  // Values need not be interleaved before.
  static constexpr bool kDirect = true;

  void store(float* to) const {
    for (int i = 0; i < N * kFew; ++i) _mm512_store_ps(to + i * 16, sums_[i]);
  }

  void scale(const float* factors, float*) {
    for (int i = 0; i < N * kFew; ++i) {
      sums_[i] = _mm512_mul_ps(sums_[i], _mm512_set1_ps(factors[i % kFew]));
    }
  }

  void add(const bf16* weights, const bf16* values) {
    for (int64_t pair = 0; pair < kStep / 2; ++pair) {
      __m512i tiles[N];
      for (int n = 0; n < N; ++n) {
        tiles[n] = _mm512_load_si512(values + n * kTile + pair * 2 * kLanes);
      }
      add_pair(weights + 2 * pair, tiles);
    }
  }

  // The same with V as it lies in the pool: two halves of 16 rows of `dim` values.
  void add_rows(const bf16* weights, const bf16* const (&halves)[2], int64_t dim,
                Ahead& ahead) {
    for (int64_t half = 0; half < 2; ++half) {
      const bf16* row = halves[half];
      for (int64_t pair = 0; pair < 8; ++pair, row += 2 * dim) {
        ahead.trickle(8);
        __m512i tiles[N];
        for (int n = 0; n < N; n += 2) {
          const __m512i a = _mm512_loadu_si512(row + n * 16);
          const __m512i b = _mm512_loadu_si512(row + dim + n * 16);
          tiles[n] = _mm512_unpacklo_epi16(a, b);
          tiles[n + 1] = _mm512_unpackhi_epi16(a, b);
        }
        add_pair(weights + half * 16 + 2 * pair, tiles);
      }
    }
  }

 private:
  void add_pair(const bf16* weights, const __m512i (&tiles)[N]) {
    for (int column = 0; column < kFew; ++column) {
      const __m512bh weight = broadcast_pair(weights + column * kStep);
      for (int n = 0; n < N; ++n) {
        __m512& sum = sums_[n * kFew + column];
        sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(tiles[n]), weight);
      }
    }
  }

  __m512 sums_[N * kFew] = {};
};

}  // namespace baton::attend
