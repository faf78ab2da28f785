// Vectors and tiles of attention: powers of two, transposes, products of pairs of tiles.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "ops.h"
#include "tile.h"

namespace baton::attend {

// 2^x to 4e-6, far below what rounding to bfloat16 costs; 2^0 is 1. A polynomial of least relative
// error in x - floor(x), with the ends fixed.
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

// Calls begin<slot>(i) and, after the next has begun, end<slot>(i) for i in [0, count).
template <typename Begin, typename End>
inline void alternate(int64_t count, Begin&& begin, End&& end) {
  for (int64_t i = 0; i <= count; ++i) {
    if (i % 2 == 0) {
      if (i < count) begin.template operator()<0>(i);
      if (i > 0) end.template operator()<1>(i - 1);
    } else {
      if (i < count) begin.template operator()<1>(i);
      end.template operator()<0>(i - 1);
    }
  }
}

}  // namespace baton::attend
