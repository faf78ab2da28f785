// Operations on single rows, in AVX-512: embedding, norm, rotation, KV write, gather, argmax.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "ops.h"
#include "vec.h"

namespace baton {
namespace {

struct Range {
  int64_t begin, end;
};

// The member's share of [0, count): all rows cost the same, so a fixed division needs no counter.
Range share(const Member& member, int64_t count) {
  const int64_t size = member.size();
  return {count * member.index() / size, count * (member.index() + 1) / size};
}

// Of [n] values; four sums that meet in one fixed order.
float sum_of_squares(const bf16* x, int64_t n) {
  __m512 sums[4] = {};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    for (int k = 0; k < 4; ++k) {
      const __m512 v = load_bf16(x + i + 16 * k);
      sums[k] = _mm512_fmadd_ps(v, v, sums[k]);
    }
  }
  for (; i < n; i += 16) {
    const __m512 v = load_bf16(x + i, first_lanes(n - i));
    sums[0] = _mm512_fmadd_ps(v, v, sums[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]),
                                            _mm512_add_ps(sums[2], sums[3])));
}

float inverse_rms(const bf16* x, int64_t n, float eps) {
  return 1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + eps);
}

void norm_row(const bf16* x, int64_t row, int64_t width, const bf16* weight, float eps,
              bf16* out_panels) {
  const int64_t depth = round_up(width, kTileDepth);
  const __m512 scale = _mm512_set1_ps(inverse_rms(x, width, eps));
  bf16* out = out_panels + panel_index(row, 0, depth);
  for (int64_t c = 0; c < depth; c += kTileDepth, out += kTileRows * kTileDepth) {
    for (int64_t half = 0; half < kTileDepth; half += 16) {
      const __mmask16 lanes = first_lanes(width - c - half);
      const __m512 value = _mm512_mul_ps(load_bf16(x + c + half, lanes), scale);
      store_bf16(out + half, _mm512_mul_ps(value, load_bf16(weight + c + half, lanes)));
    }
  }
}

// One head of a query or key: norm where the family has one, then rotation, all in float32.
void rotate_head(const bf16* x, const bf16* norm, const float* cos, const float* sin, float eps,
                 int64_t head_dim, bf16* out) {
  const int64_t half = head_dim / 2;
  const __m512 scale = _mm512_set1_ps(norm ? inverse_rms(x, head_dim, eps) : 1.0f);
  for (int64_t i = 0; i < half; i += 16) {
    __m512 a = load_bf16(x + i), b = load_bf16(x + half + i);
    if (norm) {
      a = _mm512_mul_ps(_mm512_mul_ps(a, scale), load_bf16(norm + i));
      b = _mm512_mul_ps(_mm512_mul_ps(b, scale), load_bf16(norm + half + i));
    }
    const __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
    store_bf16(out + i, _mm512_fnmadd_ps(b, s, _mm512_mul_ps(a, c)));
    store_bf16(out + half + i, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)));
  }
}

int64_t argmax_row(const float* row, int64_t width) {
  const __m512 least = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 best = least;
  __m512i where = _mm512_setzero_si512();  // width is below 2^31: token ids are int32
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __mmask16 nan = 0;
  for (int64_t i = 0; i < width; i += 16) {
    const __m512 v = _mm512_mask_loadu_ps(least, first_lanes(width - i), row + i);
    nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __mmask16 greater = _mm512_cmp_ps_mask(v, best, _CMP_GT_OQ);
    best = _mm512_mask_mov_ps(best, greater, v);
    where = _mm512_mask_mov_epi32(where, greater, index);
    index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
  }
  const float top = _mm512_reduce_max_ps(best);
  if (nan || !std::isfinite(top)) return -1;
  const __mmask16 ties = _mm512_cmp_ps_mask(best, _mm512_set1_ps(top), _CMP_EQ_OQ);
  return _mm512_mask_reduce_min_epi32(ties, where);
}

}  // namespace

void embed(Member& member, const int32_t* tokens, int64_t rows, const bf16* table,
           const Packed& head, int64_t width, bf16* out, int64_t stride) {
  const auto [begin, end] = share(member, rows);
  for (int64_t r = begin; r < end; ++r) {
    if (table) {
      std::memcpy(out + r * stride, table + tokens[r] * width, width * sizeof(bf16));
    } else {
      unpack_row(head, tokens[r], width, out + r * stride);
    }
  }
  member.barrier();
}

void rms_norm(Member& member, const bf16* x, int64_t rows, int64_t stride, int64_t width,
              const bf16* weight, float eps, bf16* out_panels) {
  const auto [begin, end] = share(member, rows);
  for (int64_t r = begin; r < end; ++r) norm_row(x + r * stride, r, width, weight, eps, out_panels);
  member.barrier();
}

void rope_and_write(Member& member, bf16* qkv, int64_t rows, int64_t stride,
                    const RopeShape& shape, const int32_t* positions, const int64_t* slots,
                    const Pool& pool, int64_t layer) {
  const int64_t dim = pool.head_dim, rotated = shape.heads + pool.kv_heads;
  const int64_t heads = rotated + pool.kv_heads;
  const auto [begin, end] = share(member, rows * heads);  // of all rows' heads
  for (int64_t row = begin / heads; row * heads < end; ++row) {
    const int64_t first = std::max(begin - row * heads, int64_t{0});
    const int64_t last = std::min(end - row * heads, heads);
    const int64_t block = slots[row] / pool.block_size, offset = slots[row] % pool.block_size;
    const int64_t angle = positions[row] * (dim / 2);
    for (int64_t head = first; head < last; ++head) {
      bf16* x = qkv + row * stride + head * dim;
      if (head >= rotated) {
        bf16* value = pool.rows(block, layer, 1, head - rotated) + offset * dim;
        std::memcpy(value, x, dim * sizeof(bf16));
        continue;
      }
      bf16* out =
          head < shape.heads ? x : pool.rows(block, layer, 0, head - shape.heads) + offset * dim;
      rotate_head(x, shape.qk_norm ? shape.qk_norm + head * dim : nullptr, shape.cos + angle,
                  shape.sin + angle, shape.eps, dim, out);
    }
  }
  member.barrier();
}

void gather(Member& member, const int32_t* picked, int64_t count, const bf16* x, int64_t width,
            int64_t stride, bf16* out, const bf16* panels, int64_t depth, bf16* out_panels) {
  const auto [begin, end] = share(member, count);
  for (int64_t r = begin; r < end; ++r) {
    std::memcpy(out + r * stride, x + picked[r] * stride, width * sizeof(bf16));
    for (int64_t c = 0; c < depth; c += kTileDepth) {
      std::memcpy(out_panels + panel_index(r, c, depth), panels + panel_index(picked[r], c, depth),
                  kTileDepth * sizeof(bf16));
    }
  }
  member.barrier();
}

void argmax(Member& member, const float* logits, int64_t rows, int64_t width, int64_t stride,
            int64_t* best) {
  member.for_each(rows, [&](int64_t r) { best[r] = argmax_row(logits + r * stride, width); });
}

}  // namespace baton
