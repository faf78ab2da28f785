// AVX-512 helpers that several operations share: bfloat16 <-> float32, exp, SiLU.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace baton {

// The mask of the first `n` of 16 lanes; n may be 0, or 16 and more.
inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << (n < 0 ? 0 : n)) - 1);
}

// 16 bfloat16 values as float32; lanes outside `mask` are not read, and 0.
inline __m512 load_bf16(const uint16_t* at, __mmask16 mask = 0xffff) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// Round to nearest even; denormals become zero (as AMX reads them anyway), NaN stays NaN.
inline __m256i to_bf16(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

inline void store_bf16(uint16_t* at, __m512 x, __mmask16 mask = 0xffff) {
  _mm256_mask_storeu_epi16(at, mask, to_bf16(x));
}

// e^x to 1 ulp for all x, including denormal results, infinities and NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by the degree-6 polynomial of least relative error
// (3e-9, by Remez exchange with the first two coefficients fixed to 1).
inline __m512 exp_ps(__m512 x) {
  // Beyond these bounds the result is 0 or infinity. The order of operands lets NaN through.
  x = _mm512_min_ps(_mm512_set1_ps(90.0f), _mm512_max_ps(_mm512_set1_ps(-105.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // ln 2 in two parts; n times the first is exact.
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
  __m512 p = _mm512_set1_ps(0.00138146128f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.00836871006f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.0416683890f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.166665211f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.499999940f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// x / (1 + e^-x).
inline __m512 silu_ps(__m512 x) {
  const __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(e, _mm512_set1_ps(1.0f)));
}

}  // namespace baton
