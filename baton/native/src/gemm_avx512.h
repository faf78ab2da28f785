// A block of a product with AVX-512 BF16, and how gemm.cpp divides products for it.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "ops.h"
#include "tile.h"

namespace baton {

// Found by measuring, with 32 KiB of first-level and 1 MiB of second-level cache per core.
constexpr int64_t kSlabSteps = 8;           // 16 KiB of weights
constexpr int64_t kMaxStrip = 16;           // blocks
constexpr int64_t kStripBytes = 512 << 10;  // of left operand in a strip

constexpr int64_t kRowsAtOnce = 8;  // of a block, whose 16 vectors of sums stay in registers

// Where weights are fetched to: the second level, which may wait for more lines than the first. From
// there vectors come fast enough, and the first level is full of what is in use.
constexpr _mm_hint kWeightsHint = _MM_HINT_T1;

// From what is read of the weights to what is fetched: the first rows take in a whole slab before
// the next ones do.
constexpr int64_t lead_bytes([[maybe_unused]] int64_t rows, [[maybe_unused]] bool few_blocks) {
  return kSlabSteps * 2048;
}

constexpr std::array<TileConfig, 32> kBlockTiles{};

// Adds to the sums [Rows, 32] of rows 32 values apart at `left`; calls `turn` so often per step.
template <int Rows, typename Turn>
inline void add_rows(const bf16* left, const bf16* weights, int64_t steps, bool fresh, float* sums,
                     int turns, Turn&& turn) {
  constexpr int64_t kTile = kTileRows * kTileDepth;
  __m512 low[Rows], high[Rows];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    low[r] = fresh ? _mm512_setzero_ps() : _mm512_load_ps(sums + r * 32);
    high[r] = fresh ? _mm512_setzero_ps() : _mm512_load_ps(sums + r * 32 + 16);
  }
  for (; steps > 0; --steps, left += kTile, weights += 2 * kTile) {
    for (int i = 0; i < turns; ++i) turn();
#pragma GCC unroll 4
    for (int64_t pair = 0; pair < kTileDepth / 2; ++pair) {
      const __m512bh w0 = load_pairs(weights + pair * kTileDepth);
      const __m512bh w1 = load_pairs(weights + kTile + pair * kTileDepth);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const __m512bh x = broadcast_pair(left + r * kTileDepth + 2 * pair);
        low[r] = _mm512_dpbf16_ps(low[r], w0, x);
        high[r] = _mm512_dpbf16_ps(high[r], w1, x);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    _mm512_store_ps(sums + r * 32, low[r]);
    _mm512_store_ps(sums + r * 32 + 16, high[r]);
  }
}

// The same for up to kRowsAtOnce rows.
template <typename Turn>
inline void add_some_rows(int64_t rows, const bf16* left, const bf16* weights, int64_t steps,
                          bool fresh, float* sums, int turns, Turn&& turn) {
  switch (rows) {
    case 1: return add_rows<1>(left, weights, steps, fresh, sums, turns, turn);
    case 2: return add_rows<2>(left, weights, steps, fresh, sums, turns, turn);
    case 3: return add_rows<3>(left, weights, steps, fresh, sums, turns, turn);
    case 4: return add_rows<4>(left, weights, steps, fresh, sums, turns, turn);
    case 5: return add_rows<5>(left, weights, steps, fresh, sums, turns, turn);
    case 6: return add_rows<6>(left, weights, steps, fresh, sums, turns, turn);
    case 7: return add_rows<7>(left, weights, steps, fresh, sums, turns, turn);
    default: return add_rows<8>(left, weights, steps, fresh, sums, turns, turn);
  }
}

// See gemm_amx.h. Slabs that stay in the first-level cache while all the rows take them in.
template <int kTiles, bool kStreamLeft, typename Turn, typename Finish>
inline void add_to_block(const bf16* upper, const bf16* lower, const bf16* weights, int64_t steps,
                         int64_t rows, bool fresh, float* sums, Turn&& turn, Finish&& finish) {
  constexpr int64_t kTile = kTileRows * kTileDepth;
  finish(32);
  const int64_t groups = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  const auto turns = static_cast<int>((4 + groups - 1) / groups);
  for (int64_t k = 0; k < steps; k += kSlabSteps) {
    const int64_t count = std::min(kSlabSteps, steps - k);
    for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
      const bf16* left = (r < 16 ? upper : lower) + k * kTile + r % 16 * kTileDepth;
      add_some_rows(std::min(kRowsAtOnce, rows - r), left, weights + k * 2 * kTile, count,
                    fresh && k == 0, sums + r * 32, turns, turn);
    }
  }
}

}  // namespace baton
