// AMX tiles: permission, configurations, the scope in which a thread has them, pairs of products.
//
//     static constexpr TileConfig kFull = tile_config({16, 16, 16, 16, 16, 16, 16, 16});
//     Tiles tiles(kFull);   // this thread only; released at the end of the scope
//     _tile_loadd(0, panel, 64);
//
// GCC's _tile_loadd and _tile_loadconfig do not tell the compiler that they read memory: between
// ordinary stores into a buffer and a tile load from it there must be a `settle()`. Tile stores
// need nothing.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cstdint>

#include "ops.h"
#include "tile.h"

namespace baton {

// The operand of LDTILECFG (palette 1).
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// Eight tiles of 64 bytes by `rows[i]` (1 to 16) rows. A product takes time by the rows of its left
// operand, and loads touch only the rows that are there.
constexpr TileConfig tile_config(const std::array<uint8_t, 8>& rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = rows[tile];
  }
  return config;
}

// Asks the kernel for the tile registers; true if this process and all its threads may use them.
// Must be called before the first tile instruction; asking again costs a system call.
inline bool tiles_ready() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// The calling thread's tiles, from construction (which zeroes them) to destruction.
class Tiles {
 public:
  explicit Tiles(const TileConfig& config) { use(config); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // Another configuration; zeroes all tiles.
  void use(const TileConfig& config) {
    settle();
    _tile_loadconfig(&config);
  }
};

// Whether lines are fetched one by one between products, which leave room for that.
constexpr bool kTrickle = false;

// Products come in pairs of tiles, in one of two slots (tiles 0, 1 and 2, 3). While the tiles of
// one slot fill, those of the other are stored: a store waits for its product, and nothing behind
// it would start.
template <int Slot>
inline void clear_pair() {
  if constexpr (Slot == 0) {
    _tile_zero(0);
    _tile_zero(1);
  } else {
    _tile_zero(2);
    _tile_zero(3);
  }
}

// [32, 16] float32.
template <int Slot>
inline void load_pair(const float* from) {
  if constexpr (Slot == 0) {
    _tile_loadd(0, from, 64);
    _tile_loadd(1, from + 256, 64);
  } else {
    _tile_loadd(2, from, 64);
    _tile_loadd(3, from + 256, 64);
  }
}

template <int Slot>
inline void multiply_pair(const bf16* upper, const bf16* lower, int64_t stride, const void* right,
                          int64_t right_stride) {
  _tile_loadd(6, right, right_stride);
  _tile_loadd(4, upper, stride);
  _tile_loadd(5, lower, stride);
  if constexpr (Slot == 0) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
  } else {
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 5, 6);
  }
}

// [32, 16] float32.
template <int Slot>
inline void store_pair(float* to) {
  if constexpr (Slot == 0) {
    _tile_stored(0, to, 64);
    _tile_stored(1, to + 256, 64);
  } else {
    _tile_stored(2, to, 64);
    _tile_stored(3, to + 256, 64);
  }
}

// Left operands of a chain of products: 16 rows from `upper` on and 16 from `lower` on, `stride`
// bytes apart, and every next step of depth 32 `step` values further; of the right operand, every
// step is a tile of 1 KiB behind the last.
struct Chain {
  const bf16 *upper, *lower;
  int64_t stride, step;
  const bf16* right;
  int64_t steps;
};

// Begins [32, 16] sums of a chain of products, plus what `sums` holds unless `fresh`;
// they are in `sums` after `end_pair` of the same slot.
template <int Slot>
inline void begin_pair(const Chain& chain, bool fresh, float* sums) {
  fresh ? clear_pair<Slot>() : load_pair<Slot>(sums);
  for (int64_t i = 0; i < chain.steps; ++i) {
    multiply_pair<Slot>(chain.upper + i * chain.step, chain.lower + i * chain.step, chain.stride,
                        chain.right + i * kTileRows * kTileDepth, 64);
  }
}
template <int Slot>
inline void end_pair(float* sums) {
  store_pair<Slot>(sums);
}

// Four tile products per step on operands of 8 KiB, two tiles of each side as in gemm.cpp: what
// nothing is faster than.
inline void multiply_repeatedly(const bf16* left, const bf16* right, int64_t steps) {
  constexpr int64_t kTile = kTileRows * kTileDepth;
  constexpr int64_t kLine = 64;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t at = step % 2 * 2 * kTile;
    _tile_loadd(4, left + at, kLine);
    _tile_loadd(6, right + at, kLine);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + at + kTile, kLine);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + at + kTile, kLine);
    _tile_dpbf16ps(3, 5, 7);
    _tile_dpbf16ps(2, 5, 6);
  }
}

}  // namespace baton
