// Attention of up to 4 columns to one part of the keys: what a decode of grouped heads has.
//
// With so few columns, transposing V and 16 lanes of weights cost more than the products. Here a
// vector of scores holds 4 columns of 4 keys, and the result is not transposed, O = P V: the right
// operand V has its rows interleaved by pairs, the left one, P, as many rows as there are columns.
//
//     K [32 keys, dim] . Q^T [dim, 4 columns]        ->  S^T [32 keys, 4 columns]
//     P [4 columns, 32 keys] . V [32 keys, dim]      ->  O [4 columns, dim]
//
// The result is that of `Part`, bit for bit: AMX sums up a product's even keys and its odd keys in
// their order, whichever operand they are in, and all other sums keep the order they have there.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "attention_part.h"
#include "attention_source.h"
#include "attention_tile.h"
#include "ops.h"
#include "tile.h"

#ifdef BATON_AVX512
#include "few_avx512.h"
#else
#include "few_amx.h"
#endif

namespace baton::attend {

constexpr int64_t kFewDims = 64;  // dimensions whose sums stay in tiles for a whole part
// Scores and weights of a part lie where `Part` has the scores of a tile of keys.
static_assert(kPart * kFew * 3 / 2 <= 2 * kKeys * kLanes);

// Lanes that are 4 apart, which belong to one column, combined by `combine` and in all of them.
template <typename Combine>
inline __m512 across_keys(__m512 x, Combine&& combine) {
  x = combine(x, _mm512_shuffle_f32x4(x, x, 0xb1));
  return combine(x, _mm512_shuffle_f32x4(x, x, 0x4e));
}

class FewPart {
 public:
  // `range` is not empty.
  FewPart(const Head& source, Range range, const Columns& columns, int64_t window, float scale,
          const Workspace& work, const State& state)
      : source_(source), range_(range), columns_(columns), window_(window),
        scale_(_mm512_set1_ps(scale)), work_(work), state_(state), dim_(source.pool.head_dim),
        origin_(range.begin / kStep * kStep), steps_((range.end - origin_ + kStep - 1) / kStep),
        weights_(reinterpret_cast<bf16*>(work.scores + kPart * kFew)) {}

  void run(Tiles& tiles) {
    tiles.use(kFewScores);
    score_keys();
    weigh_keys();
    tiles.use(kFewValues);
    for (int64_t d = 0; d < dim_; d += kFewDims) {
      d + kFewDims <= dim_ ? add_values<4>(d) : add_values<2>(d);
    }
  }

 private:
  float* scores_of(int64_t step) const { return work_.scores + step * kStep * kFew; }

  // The rows of the halves of a step. One that nobody sees may be in a block that the span does not
  // have: any rows do in its place.
  void find_rows(int64_t which, int64_t at, const bf16* (&halves)[2]) const {
    halves[0] = source_.row(which, at + 16 > range_.begin ? at : at + 16);
    halves[1] = source_.row(which, at + 16 < range_.end ? at + 16 : at);
  }

  void score_keys() {
    const auto begin = [&]<int Slot>(int64_t step) {
      const bf16* halves[2];
      find_rows(0, origin_ + step * kStep, halves);
      begin_few<Slot>(halves, dim_, columns_.queries, scores_of(step), *work_.ahead);
      work_.ahead->allow();
    };
    const auto end = [&]<int Slot>(int64_t step) { end_few<Slot>(scores_of(step)); };
    alternate(steps_, begin, end);
  }

  // Sets the scores of a step that a column does not see to -infinity.
  void mask_step(int64_t step) const {
    const __m512i queries = _mm512_broadcast_i32x4(
        _mm_load_si128(reinterpret_cast<const __m128i*>(columns_.positions)));
    const __m512i reach =
        _mm512_set1_epi32(window_ == 0 ? INT32_MAX : static_cast<int32_t>(window_));
    const __m512i offsets = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    float* scores = scores_of(step);
    for (int64_t i = 0; i < kStep; i += 4) {
      const int32_t key = static_cast<int32_t>(origin_ + step * kStep + i);
      const __m512i behind =
          _mm512_sub_epi32(queries, _mm512_add_epi32(_mm512_set1_epi32(key), offsets));
      const __mmask16 hidden = _mm512_cmpge_epu32_mask(behind, reach);
      _mm512_mask_store_ps(scores + i * kFew, hidden, _mm512_set1_ps(-__builtin_inff()));
    }
  }

  __m512 maximum_of(int64_t step) const {
    const int64_t begin = origin_ + step * kStep;
    const bool all = begin + kStep - 1 <= columns_.positions[0] &&
                     (window_ == 0 || begin > columns_.positions[kFew - 1] - window_);
    if (!all) mask_step(step);
    const float* scores = scores_of(step);
    __m512 greatest = _mm512_load_ps(scores);
    for (int64_t i = 1; i < kStep / 4; ++i) {
      greatest = _mm512_max_ps(greatest, _mm512_load_ps(scores + i * kLanes));
    }
    return greatest;
  }

  // Weights of a step [columns, 32 keys]; returns their sums.
  __m512 weigh_step(int64_t step, __m512 reference) const {
    // 8 keys of 4 columns -> 4 columns of 8 keys.
    const __m512i order = _mm512_set_epi16(31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6,
                                           2, 29, 25, 21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4,
                                           0);
    const float* scores = scores_of(step);
    __m512 sum = _mm512_setzero_ps();
    __m512i keys[4];
    for (int i = 0; i < 4; ++i) {
      work_.ahead->trickle(16);
      const float* at = scores + i * 2 * kLanes;
      const __m512 a = exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(at), scale_, reference));
      const __m512 b = exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(at + kLanes), scale_, reference));
      sum = _mm512_add_ps(_mm512_add_ps(sum, a), b);
      const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
      keys[i] = _mm512_permutexvar_epi16(order, both);
    }
    const __m512i even[2] = {_mm512_shuffle_i32x4(keys[0], keys[1], 0x88),
                             _mm512_shuffle_i32x4(keys[2], keys[3], 0x88)};
    const __m512i odd[2] = {_mm512_shuffle_i32x4(keys[0], keys[1], 0xdd),
                            _mm512_shuffle_i32x4(keys[2], keys[3], 0xdd)};
    bf16* to = weights_ + step * kFew * kStep;
    _mm512_store_si512(to, _mm512_shuffle_i32x4(even[0], even[1], 0x88));
    _mm512_store_si512(to + kStep, _mm512_shuffle_i32x4(odd[0], odd[1], 0x88));
    _mm512_store_si512(to + 2 * kStep, _mm512_shuffle_i32x4(even[0], even[1], 0xdd));
    _mm512_store_si512(to + 3 * kStep, _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd));
    return across_keys(sum, [](__m512 x, __m512 y) { return _mm512_add_ps(x, y); });
  }

  // The first step of the next tile of keys.
  int64_t tile_end(int64_t step) const {
    const int64_t at = origin_ + step * kStep;
    return std::min(steps_, step + (kKeys - at % kKeys) / kStep);
  }

  // As `Part` does it, tile by tile.
  void weigh_keys() {
    __m512 reference = _mm512_set1_ps(kLowest), sums = _mm512_setzero_ps();
    for (int64_t first = 0, tile = 0; first < steps_; first = tile_end(first), ++tile) {
      const int64_t end = tile_end(first);
      __m512 max = _mm512_set1_ps(-__builtin_inff());
      for (int64_t step = first; step < end; ++step) max = _mm512_max_ps(max, maximum_of(step));
      max = across_keys(max, [](__m512 x, __m512 y) { return _mm512_max_ps(x, y); });
      max = _mm512_mul_ps(max, scale_);
      const __m512 limit = _mm512_add_ps(reference, _mm512_set1_ps(8.0f));
      const __mmask16 above = _mm512_cmp_ps_mask(max, limit, _CMP_GT_OQ);
      raised_[tile] = above != 0 && tile > 0;
      if (above) {
        const __m512 after = _mm512_mask_blend_ps(above, reference, max);
        const __m512 factor = exp2_ps(_mm512_sub_ps(reference, after));
        sums = _mm512_mul_ps(sums, factor);
        reference = after;
        _mm_store_ps(factors_[tile], _mm512_castps512_ps128(factor));
      }
      for (int64_t step = first; step < end; ++step) {
        work_.ahead->allow();
        sums = _mm512_add_ps(sums, weigh_step(step, reference));
      }
    }
    _mm512_store_ps(state_.reference, reference);
    _mm512_store_ps(state_.sum, sums);
  }

  // V of a step, dimensions [d, d + 16 * N): tiles of pairs of keys by 16 dimensions, which are 0-3
  // of every 8 in one tile and 4-7 in the next. Keys outside of the range become zeros.
  template <int N>
  void interleave(int64_t step, int64_t d, bf16* out) const {
    const int64_t at = origin_ + step * kStep;
    const bf16* halves[2];
    find_rows(1, at, halves);
    const bool inside = at >= range_.begin && at + kStep <= range_.end;
    for (int64_t i = 0; i < kStep; i += 2) {
      const bf16* row = halves[i / 16] + i % 16 * dim_ + d;
      for (int n = 0; n < N; n += 2) {
        __m512i a, b;
        if (inside) {
          a = _mm512_loadu_si512(row + n * 16);
          b = _mm512_loadu_si512(row + dim_ + n * 16);
        } else {
          const __mmask16 first = -(at + i >= range_.begin && at + i < range_.end);
          const __mmask16 second = -(at + i + 1 >= range_.begin && at + i + 1 < range_.end);
          a = _mm512_maskz_loadu_epi32(first, row + n * 16);
          b = _mm512_maskz_loadu_epi32(second, row + dim_ + n * 16);
        }
        _mm512_store_si512(out + n * kTile + i * 16, _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(out + (n + 1) * kTile + i * 16, _mm512_unpackhi_epi16(a, b));
      }
    }
  }

  // Room for the interleaved values of this step and the next.
  template <int N>
  bf16* values(int64_t step) const {
    return work_.values + step % 2 * N * kTile;
  }

  // Adds a step's product.
  template <int N>
  void add_step(int64_t step, int64_t d, FewSums<N>& sums) const {
    const bf16* weights = weights_ + step * kFew * kStep;
    if constexpr (FewSums<N>::kDirect) {
      const int64_t at = origin_ + step * kStep;
      if (at >= range_.begin && at + kStep <= range_.end) {
        const bf16* rows[2];
        find_rows(1, at, rows);
        const bf16* const halves[2] = {rows[0] + d, rows[1] + d};
        return sums.add_rows(weights, halves, dim_, *work_.ahead);
      }
      interleave<N>(step, d, values<N>(step));
    } else {
      if (step + 1 < steps_) interleave<N>(step + 1, d, values<N>(step + 1));
    }
    sums.add(weights, values<N>(step));
  }

  // The product of the weights and V's dimensions [d, d + 16 * N), into the state.
  template <int N>
  void add_values(int64_t d) const {
    FewSums<N> products;
    if constexpr (!FewSums<N>::kDirect) interleave<N>(0, d, values<N>(0));
    for (int64_t first = 0, tile = 0; first < steps_; first = tile_end(first), ++tile) {
      if (raised_[tile]) products.scale(factors_[tile], staging());
      for (int64_t step = first; step < tile_end(first); ++step) {
        work_.ahead->allow();
        add_step<N>(step, d, products);
      }
    }
    products.store(staging());
    for (int n = 0; n < N; ++n) {
      const float* sums = staging() + n * kFew * 16;
      float* out = state_.out + (d + n / 2 * 32 + n % 2 * 4) * kLanes;
      const __m512 low[2] = {_mm512_unpacklo_ps(_mm512_load_ps(sums), _mm512_load_ps(sums + 16)),
                             _mm512_unpacklo_ps(_mm512_load_ps(sums + 32),
                                                _mm512_load_ps(sums + 48))};
      const __m512 high[2] = {_mm512_unpackhi_ps(_mm512_load_ps(sums), _mm512_load_ps(sums + 16)),
                              _mm512_unpackhi_ps(_mm512_load_ps(sums + 32),
                                                 _mm512_load_ps(sums + 48))};
      put_row(out, 0, _mm512_shuffle_ps(low[0], low[1], 0x44));
      put_row(out, 1, _mm512_shuffle_ps(low[0], low[1], 0xee));
      put_row(out, 2, _mm512_shuffle_ps(high[0], high[1], 0x44));
      put_row(out, 3, _mm512_shuffle_ps(high[0], high[1], 0xee));
    }
  }

  // Dimensions `at`, at + 8, at + 16, at + 24 of the 4 columns; the other columns stay undefined.
  static void put_row(float* out, int64_t at, __m512 x) {
    _mm_store_ps(out + at * kLanes, _mm512_extractf32x4_ps(x, 0));
    _mm_store_ps(out + (at + 8) * kLanes, _mm512_extractf32x4_ps(x, 1));
    _mm_store_ps(out + (at + 16) * kLanes, _mm512_extractf32x4_ps(x, 2));
    _mm_store_ps(out + (at + 24) * kLanes, _mm512_extractf32x4_ps(x, 3));
  }

  // Behind the steps of V.
  float* staging() const { return reinterpret_cast<float*>(work_.values + 8 * kTile); }

  const Head& source_;
  const Range range_;
  const Columns& columns_;
  const int64_t window_;
  const __m512 scale_;
  const Workspace& work_;
  const State& state_;
  const int64_t dim_;
  const int64_t origin_, steps_;
  bf16* const weights_;  // [steps, columns, 32 keys]

  bool raised_[kPart / kKeys];  // before which tiles the sums are multiplied by the factors
  alignas(16) float factors_[kPart / kKeys][kFew];
};

// Like `attend<1>` of columns of which only the first kFew count, and which see some of the part.
// Changes the tiles' configuration.
inline void attend_few(const Head& source, int64_t part, const Columns& columns, int64_t window,
                       float scale, bool fresh, const Workspace& work, const State& state,
                       Tiles& tiles) {
  const int64_t dim = source.pool.head_dim;
  const Range range = columns.seen.within(part, kPart);
  const State own = fresh ? state : State::at(work.states, dim);
  FewPart(source, range, columns, window, scale, work, own).run(tiles);
  if (!fresh) merge(state, own, dim);
}

}  // namespace baton::attend
