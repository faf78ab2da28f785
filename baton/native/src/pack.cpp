// Weights in the order in which AMX reads them.
//
// A packed weight is a sequence of panels of 32 rows of the weight (columns of the result), each
// contiguous: for every 32 columns of the weight two tiles of 1 KiB, one per 16 rows. In a tile,
// line i holds columns 2i and 2i + 1 of all 16 rows, side by side:
//     w[row, column] is at tile(row / 16, column / 32)[column % 32 / 2][row % 16][column % 2]
#include <immintrin.h>

#include <algorithm>

#include "ops.h"

namespace baton {
namespace {

constexpr int64_t kTile = kTileRows * kTileDepth;  // values in a tile

// Where a tile comes from: `rows` rows of `columns` values are there, the others are zero.
struct Source {
  const bf16* at;
  int64_t stride, rows, columns;
};

void pack_full_tile(const Source& from, bf16* tile) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto stride = static_cast<int>(from.stride);
  const __m512i starts = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(stride));
  for (int line = 0; line < kTileRows; ++line) {
    const __m512i pairs = _mm512_i32gather_epi32(starts, from.at + 2 * line, sizeof(bf16));
    // Past the caches: a weight is packed once and read much later. The barrier orders it.
    _mm512_stream_si512(reinterpret_cast<__m512i*>(tile + line * kTileDepth), pairs);
  }
}

void pack_edge_tile(const Source& from, bf16* tile) {
  std::fill_n(tile, kTile, bf16{0});
  for (int64_t row = 0; row < from.rows; ++row) {
    for (int64_t column = 0; column < from.columns; ++column) {
      tile[column / 2 * kTileDepth + row * 2 + column % 2] = from.at[row * from.stride + column];
    }
  }
}

// 16 rows of a weight into every other tile of a panel. `rows` <= 0: zeros.
void pack_rows(const bf16* weight, int64_t rows, int64_t in, bf16* packed) {
  for (int64_t column = 0; column < in; column += kTileDepth, packed += 2 * kTile) {
    const Source from{weight + column, in, std::clamp<int64_t>(rows, 0, kTileRows),
                      std::min(kTileDepth, in - column)};
    const bool full = from.rows == kTileRows && from.columns == kTileDepth;
    full ? pack_full_tile(from, packed) : pack_edge_tile(from, packed);
  }
}

}  // namespace

int64_t packed_size(int64_t out, int64_t in) {
  return round_up(out, 2 * kTileRows) * round_up(in, kTileDepth);
}

void pack(Member& member, const bf16* weight, int64_t out, int64_t in, bf16* packed) {
  const int64_t depth = round_up(in, kTileDepth);
  member.for_each((out + 2 * kTileRows - 1) / (2 * kTileRows), [&](int64_t panel) {
    for (int64_t side = 0; side < 2; ++side) {
      const int64_t row = (2 * panel + side) * kTileRows;
      bf16* at = packed + 2 * panel * kTileRows * depth + side * kTile;
      pack_rows(weight + row * in, out - row, in, at);
    }
  });
}

void pack_gate_up(Member& member, const bf16* gate_up, int64_t half, int64_t in, bf16* packed) {
  const int64_t depth = round_up(in, kTileDepth);
  member.for_each(half / kTileRows, [&](int64_t panel) {
    for (int64_t side = 0; side < 2; ++side) {
      const int64_t row = side * half + panel * kTileRows;
      bf16* at = packed + 2 * panel * kTileRows * depth + side * kTile;
      pack_rows(gate_up + row * in, kTileRows, in, at);
    }
  });
}

void unpack_row(const Packed& weight, int64_t row, int64_t in, bf16* out) {
  const __m512i lines = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192,
                                          208, 224, 240);
  const bf16* at = weight.data + row / (2 * kTileRows) * (2 * kTileRows) * weight.depth +
                   row % (2 * kTileRows) / kTileRows * kTile + row % kTileRows * 2;
  for (int64_t column = 0; column < in; column += kTileDepth, at += 2 * kTile) {
    const __m512i pairs = _mm512_i32gather_epi32(lines, at, sizeof(uint32_t));
    const __mmask32 mask = _bzhi_u32(~0u, std::min(kTileDepth, in - column));
    _mm512_mask_storeu_epi16(out + column, mask, pairs);
  }
}

}  // namespace baton
