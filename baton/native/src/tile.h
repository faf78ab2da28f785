// AMX tiles: permission, configurations, and the scope in which a thread has them.
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
inline bool amx_ready() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// What was stored before is in memory for what is loaded after, as far as the compiler goes.
inline void settle() { asm volatile("" ::: "memory"); }

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

}  // namespace baton
