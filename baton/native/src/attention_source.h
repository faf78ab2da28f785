// Where attention reads K and V: rows of the paged pool, and what it fetches before it reads.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "ops.h"
#include "tile.h"

namespace baton::attend {

constexpr int64_t kPart = 512;  // keys of a part; a multiple of kKeys
constexpr int64_t kKeys = 128;  // keys of a tile: what is scored, then weighed, then multiplied
constexpr int64_t kStep = 32;   // keys of a step: the depth of one product with V
constexpr int64_t kLanes = 16;  // columns of a group
constexpr int64_t kFew = 4;     // columns that attention_few.h is for
constexpr int64_t kTile = 512;  // bfloat16 values of a tile

// K and V of one KV head of one sequence.
struct Head {
  const Pool& pool;
  const int32_t* blocks;
  int64_t layer, head;

  // The row of a position; up to a multiple of 16, the rows of the next positions follow it.
  const bf16* row(int64_t which, int64_t position) const {
    const uint32_t at = static_cast<uint32_t>(position);
    const uint32_t size = static_cast<uint32_t>(pool.block_size);
    return pool.rows(blocks[at / size], layer, which, head) + at % size * pool.head_dim;
  }
};

// Positions [begin, end).
struct Range {
  int64_t begin, end;

  int64_t length() const { return end - begin; }

  // The positions that are in the same part, or tile, as `position`.
  Range within(int64_t position, int64_t size) const {
    const int64_t first = position / size * size;
    return {std::max(begin, first), std::min(end, first + size)};
  }
};

// Fetches the keys and values that are worked on next into the second-level cache, a little at each
// of many calls, so that memory is not idle while there is something to compute.
class Ahead {
 public:
  // The next `calls` calls of `fetch` fetch K and V of `range`.
  void aim(const Head& source, Range range, int64_t calls) {
    trickle(pieces_ * 16 * kMaxLines);
    pool_ = &source.pool;
    blocks_ = source.blocks;
    layer_ = source.layer;
    head_ = source.head;
    begin_ = range.begin / 16 * 16;
    pieces_ = range.begin < range.end ? (range.end - begin_ + 15) / 16 * 2 : 0;
    calls_ = calls;
    called_ = fetched_ = due_ = 0;
  }

  void fetch() {
    const int64_t wanted = std::min(pieces_, pieces_ * ++called_ / calls_);
    for (; fetched_ < wanted; ++fetched_) {
      const bf16* rows = piece();
      for (int64_t i = 0; i < 16 * pool_->head_dim; i += 32) _mm_prefetch(rows + i, _MM_HINT_T1);
    }
  }

  // Like `fetch`, for loops that call `trickle`: what one call of `fetch` brings are more lines than
  // a core can wait for at a time, and it stands still until some are there.
  void allow() {
    if constexpr (!kTrickle) return fetch();
    trickle(pieces_ * 16 * kMaxLines);
    due_ = std::min(pieces_, pieces_ * ++called_ / calls_);
  }

  // Fetches up to `lines` of what was allowed.
  void trickle(int64_t lines) {
    if constexpr (!kTrickle) return;
    for (; lines > 0 && fetched_ < due_; --lines) {
      if (line_ == 0) rows_ = piece();
      _mm_prefetch(rows_ + line_ * 32, _MM_HINT_T1);
      line_ += 1;
      if (line_ * 32 == 16 * pool_->head_dim) line_ = 0, fetched_ += 1;
    }
  }

 private:
  static constexpr int64_t kMaxLines = 8;  // in a row

  // The rows of the next piece.
  const bf16* piece() const {
    const Head source = {*pool_, blocks_, layer_, head_};
    return source.row(1 - fetched_ % 2, begin_ + fetched_ / 2 * 16);
  }

  const Pool* pool_ = nullptr;
  const int32_t* blocks_ = nullptr;
  int64_t layer_ = 0, head_ = 0, begin_ = 0;
  int64_t pieces_ = 0, calls_ = 1;  // a piece is K or V of 16 positions
  int64_t fetched_ = 0, called_ = 0;
  const bf16* rows_ = nullptr;  // of the piece of which `line_` lines have been fetched
  int64_t due_ = 0, line_ = 0;
};

}  // namespace baton::attend
