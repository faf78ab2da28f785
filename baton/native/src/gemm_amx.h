// A block of a product with AMX, and how gemm.cpp divides products for it.
//
// Tiles: 0 1 / 2 3 the sums, 4 and 5 the left operand, 6 and 7 the weights.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "ops.h"
#include "tile.h"

namespace baton {

// Found by measuring, with 48 KiB of first-level and 2 MiB of second-level cache per core.
constexpr int64_t kSlabSteps = 16;           // 32 KiB of weights
constexpr int64_t kMaxStrip = 16;            // blocks
constexpr int64_t kStripBytes = 1100 << 10;  // of left operand in a strip

// Where weights are fetched to: the first level.
constexpr _mm_hint kWeightsHint = _MM_HINT_T0;

// From what is read of the weights to what is fetched.
constexpr int64_t lead_bytes([[maybe_unused]] int64_t rows, bool few_blocks) {
  return few_blocks ? 1024 : kSlabSteps * 2048;
}

constexpr TileConfig block_tiles(int64_t rows) {
  const auto upper = static_cast<uint8_t>(std::min<int64_t>(rows, 16));
  const auto lower = static_cast<uint8_t>(std::clamp<int64_t>(rows - 16, 1, 16));
  return tile_config({upper, upper, lower, lower, upper, lower, 16, 16});
}

// Tiles for blocks of [0, 32) + 1 rows.
constexpr auto kBlockTiles = [] {
  std::array<TileConfig, 32> configs;
  for (int64_t rows = 1; rows <= 32; ++rows) configs[rows - 1] = block_tiles(rows);
  return configs;
}();

template <bool kStream>
void load_upper(const bf16* tile) {
  if constexpr (kStream) {
    _tile_stream_loadd(4, tile, 64);
  } else {
    _tile_loadd(4, tile, 64);
  }
}

template <bool kStream>
void load_lower(const bf16* tile) {
  if constexpr (kStream) {
    _tile_stream_loadd(5, tile, 64);
  } else {
    _tile_loadd(5, tile, 64);
  }
}

template <int kTiles>
void begin_sums(bool fresh, const float* sums) {
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTiles == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_stream_loadd(0, sums, 128);
    _tile_stream_loadd(1, sums + 16, 128);
    if constexpr (kTiles == 2) {
      _tile_stream_loadd(2, sums + 512, 128);
      _tile_stream_loadd(3, sums + 528, 128);
    }
  }
}

template <int kTiles>
void store_sums(float* sums) {
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  if constexpr (kTiles == 2) {
    _tile_stored(2, sums + 512, 128);
    _tile_stored(3, sums + 528, 128);
  }
}

// Adds `steps` steps of depth 32 to a block's sums [32, 32], or puts them there if `fresh`. The
// block has `rows` rows, at most 16 * kTiles; the tiles have been configured for as many, or more.
// `turn` is called four times for each step, and `finish(n)` once, n adding up to 32 or more.
// kStreamLeft: the left operand is not to stay in the first-level cache.
template <int kTiles, bool kStreamLeft, typename Turn, typename Finish>
inline void add_to_block(const bf16* upper, const bf16* lower, const bf16* weights, int64_t steps,
                         [[maybe_unused]] int64_t rows, bool fresh, float* sums, Turn&& turn,
                         Finish&& finish) {
  constexpr int64_t kTile = kTileRows * kTileDepth;
  const int64_t rows_each = (32 + steps - 1) / steps;
  begin_sums<kTiles>(fresh, sums);
  for (; steps > 0; --steps, upper += kTile, lower += kTile, weights += 2 * kTile) {
    turn();
    load_upper<kStreamLeft>(upper);
    _tile_loadd(6, weights, 64);
    _tile_dpbf16ps(0, 4, 6);
    turn();
    _tile_loadd(7, weights + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    turn();
    if constexpr (kTiles == 2) {
      load_lower<kStreamLeft>(lower);
      _tile_dpbf16ps(3, 5, 7);
      _tile_dpbf16ps(2, 5, 6);
    }
    turn();
    finish(rows_each);
  }
  store_sums<kTiles>(sums);
}

}  // namespace baton
