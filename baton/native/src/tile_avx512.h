// What tile_amx.h does, with AVX-512 BF16: sums in vector registers, the left operand as 32-bit
// broadcasts (a pair of values each), the right one as vectors of 16 pairs.
//
// VDPBF16PS has a latency of 4 to 6 and a throughput of one or two a cycle (Zen 4: 6 and one): with
// 16 independent sums, nothing waits.
#pragma once

#include <immintrin.h>

#include <array>
#include <cstdint>
#include <cstring>

#include "ops.h"
#include "tile.h"

namespace baton {

// There are no tiles to configure.
struct TileConfig {};
constexpr TileConfig tile_config(const std::array<uint8_t, 8>&) { return {}; }
inline bool tiles_ready() { return true; }

class Tiles {
 public:
  explicit Tiles(const TileConfig&) {}
  void use(const TileConfig&) {}
};

// A pair of values, for all lanes.
inline __m512bh broadcast_pair(const bf16* at) {
  int32_t pair;
  std::memcpy(&pair, at, sizeof pair);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}
inline __m512bh load_pairs(const bf16* at) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(at));
}

// Whether lines are fetched one by one between products, which leave room for that.
constexpr bool kTrickle = true;

// See tile_amx.h. There is nothing to gain from two slots: sums are stored by `begin_pair`.
struct Chain {
  const bf16 *upper, *lower;
  int64_t stride, step;
  const bf16* right;
  int64_t steps;
};

// [16, 16] sums of one half of a chain.
inline void multiply_half(const bf16* left, const Chain& chain, bool fresh, float* to) {
  __m512 sums[kTileRows];
#pragma GCC unroll 16
  for (int64_t r = 0; r < kTileRows; ++r) {
    sums[r] = fresh ? _mm512_setzero_ps() : _mm512_load_ps(to + r * 16);
  }
  const int64_t stride = chain.stride / 2;
  for (int64_t i = 0; i < chain.steps; ++i) {
    const bf16* right = chain.right + i * kTileRows * kTileDepth;
    const bf16* rows[4] = {left + i * chain.step, left + i * chain.step + 4 * stride,
                           left + i * chain.step + 8 * stride, left + i * chain.step + 12 * stride};
    for (int64_t pair = 0; pair < kTileDepth / 2; ++pair) {
      const __m512bh w = load_pairs(right + pair * kTileDepth);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kTileRows; ++r) {
        const bf16* at = rows[r / 4] + r % 4 * stride + 2 * pair;
        sums[r] = _mm512_dpbf16_ps(sums[r], w, broadcast_pair(at));
      }
    }
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < kTileRows; ++r) _mm512_store_ps(to + r * 16, sums[r]);
}

template <int Slot>
inline void begin_pair(const Chain& chain, bool fresh, float* sums) {
  multiply_half(chain.upper, chain, fresh, sums);
  multiply_half(chain.lower, chain, fresh, sums + 256);
}
template <int Slot>
inline void end_pair(float*) {}

// As many products as 2 x 2 tiles take per step, in registers.
inline void multiply_repeatedly(const bf16* left, const bf16* right, int64_t steps) {
  constexpr int64_t kProducts = 1024, kSums = 16;
  __m512bh a = load_pairs(left);
  const __m512bh b = load_pairs(right);
  __m512 sums[kSums] = {};
  // To the compiler, no two sums are the same.
#pragma GCC unroll 16
  for (__m512& sum : sums) asm volatile("" : "+v"(sum));
  for (int64_t i = 0; i < steps * (kProducts / kSums); ++i) {
#pragma GCC unroll 16
    for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, a, b);
    asm volatile("" : "+v"(a));
  }
  for (__m512& sum : sums) asm volatile("" ::"v"(sum));
}

}  // namespace baton
