// What happens to a block of sums when it is complete: one functor per kind of result.
//
// Each is called with a row, a panel of 32 columns, and the 32 float32 sums of that row in that
// panel, and writes the columns that exist. Rows and panels are given once each, in any order.
#pragma once

#include <immintrin.h>

#include "ops.h"
#include "vec.h"

namespace baton {

constexpr int64_t kPanelColumns = 32;  // two tiles side by side

// The first `n` of 32 lanes, n at least 1.
inline __mmask32 first_of_32(int64_t n) { return _bzhi_u32(~0u, n > 32 ? 32 : n); }

// `low` and `high` as 32 bfloat16 values, rounded to nearest even.
inline void store_pair(bf16* at, __mmask32 mask, __m512 low, __m512 high) {
  _mm512_mask_storeu_epi16(at, mask, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

// The same for a whole line, past the caches.
inline void stream_pair(bf16* at, __m512 low, __m512 high) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(at),
                      reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

// 32 sums, plus what is added to them in bfloat16.
struct SumPair {
  __m512 low, high;

  explicit SumPair(const float* sums)
      : low(_mm512_load_ps(sums)), high(_mm512_load_ps(sums + 16)) {}

  void add(const bf16* at, __mmask32 mask) {
    low = _mm512_add_ps(low, load_bf16(at, static_cast<__mmask16>(mask)));
    high = _mm512_add_ps(high, load_bf16(at + 16, static_cast<__mmask16>(mask >> 16)));
  }
};

// out = sums + bias
struct StoreBf16 {
  const bf16* bias;
  bf16* out;
  int64_t stride, columns;
  // Store past the caches. Rows of a large result are pages apart, and fall on few sets of a cache:
  // bringing each line in to write it once takes longer than the product. The barrier at the end
  // of a product orders these stores: its locked addition waits for them.
  bool far;

  void operator()(int64_t row, int64_t panel, const float* sums) const {
    const int64_t column = panel * kPanelColumns;
    const __mmask32 mask = first_of_32(columns - column);
    SumPair sum(sums);
    if (bias != nullptr) sum.add(bias + column, mask);
    bf16* at = out + row * stride + column;
    far ? stream_pair(at, sum.low, sum.high) : store_pair(at, mask, sum.low, sum.high);
  }
};

// out += sums + bias
struct AddBf16 {
  const bf16* bias;
  bf16* out;
  int64_t stride, columns;

  void operator()(int64_t row, int64_t panel, const float* sums) const {
    const int64_t column = panel * kPanelColumns;
    const __mmask32 mask = first_of_32(columns - column);
    bf16* at = out + row * stride + column;
    SumPair sum(sums);
    if (bias != nullptr) sum.add(bias + column, mask);
    sum.add(at, mask);
    store_pair(at, mask, sum.low, sum.high);
  }
};

// out = sums
struct StoreFloat {
  float* out;
  int64_t stride, columns;

  void operator()(int64_t row, int64_t panel, const float* sums) const {
    const int64_t column = panel * kPanelColumns;
    float* at = out + row * stride + column;
    _mm512_mask_storeu_ps(at, first_lanes(columns - column), _mm512_load_ps(sums));
    _mm512_mask_storeu_ps(at + 16, first_lanes(columns - column - 16), _mm512_load_ps(sums + 16));
  }
};

// out = silu(gate) * up as panels; a panel of sums is 16 columns of gate, then the same of up.
struct StoreSilu {
  const bf16* bias;
  bf16* out;
  int64_t half;

  void operator()(int64_t row, int64_t panel, const float* sums) const {
    const int64_t column = panel * kTileRows;
    __m512 gate = _mm512_load_ps(sums);
    __m512 up = _mm512_load_ps(sums + 16);
    if (bias != nullptr) {
      gate = _mm512_add_ps(gate, load_bf16(bias + column));
      up = _mm512_add_ps(up, load_bf16(bias + half + column));
    }
    const int64_t depth = round_up(half, kTileDepth);
    bf16* at = out + panel_index(row, column, depth);
    store_bf16(at, _mm512_mul_ps(silu_ps(gate), up));
    // An odd number of 16s: the rest of the last panel is the padding.
    if (column + 16 == half && half != depth) store_bf16(at + 16, _mm512_setzero_ps());
  }
};

}  // namespace baton
