// Products of bfloat16 matrices, by AMX or AVX-512 (gemm_amx.h, gemm_avx512.h).
//
// The result is computed in blocks of 32 rows by 32 columns: four tiles of float32 sums, two tiles
// of each operand. Blocks of one panel of weights (32 columns) one below the other form a strip:
//
//                 panel of weights, in slabs of 512
//     rows        ┌────┐
//     ┌────────┐  │    │ one slab (16 or 32 KiB) stays in the first-level cache while all blocks of the
//     │ strip  │  ├────┤ strip take it in; the left operand passes by it, streamed from the
//     │ (<=512)│  │    │ second level (tile loads with the non-temporal hint)
//     └────────┘  └────┘
//
// Sums of a block that is not complete wait in `sums_`. Those of the last complete block are
// finished (bias, rounding, ...) a few rows at a time between the next block's tile products, which
// leave the vector units idle.
//
// Sums of a row are taken in order of depth whatever the blocks: products add in one order, and storing
// and loading float32 sums does not change them.
#include <algorithm>

#include "finish.h"
#include "ops.h"
#include "tile.h"

#ifdef BATON_AVX512
#include "gemm_avx512.h"
#else
#include "gemm_amx.h"
#endif

namespace baton {
namespace {

constexpr int64_t kTile = kTileRows * kTileDepth;  // values in a tile
constexpr int64_t kBlockRows = 2 * kTileRows;
constexpr int64_t kBlock = kBlockRows * kPanelColumns;    // sums in a block
constexpr int64_t kLine = 64;                             // bytes in a cache line
constexpr int64_t kStepBytes = 2 * kTile * sizeof(bf16);  // of weights in one step of depth 32
constexpr int64_t kStepLines = kStepBytes / kLine;
constexpr int64_t kTurns = 4;  // of fetching weights, per step

constexpr int64_t kFewBlocks = 4;
constexpr int64_t kFarBytes = 2 << 20;   // a larger result is stored past the caches
constexpr int64_t kJobBytes = 64 << 10;  // of weights taken at once

// How a product is divided: into jobs of some panels of one strip.
struct Plan {
  int64_t rows, depth;        // depth in steps
  int64_t blocks, strip;      // blocks in all, and in a strip
  int64_t panels, chunk;      // panels in all, and in a job
  int64_t chunks, jobs;

  Plan(int members, int64_t rows, const Packed& w)
      : rows(rows), depth(w.depth / kTileDepth), blocks((rows + kBlockRows - 1) / kBlockRows) {
    const int64_t fit = kStripBytes / (kBlockRows * w.depth * static_cast<int64_t>(sizeof(bf16)));
    const int64_t strips = (blocks + std::clamp<int64_t>(fit, 1, kMaxStrip) - 1) /
                           std::clamp<int64_t>(fit, 1, kMaxStrip);
    strip = (blocks + strips - 1) / strips;
    panels = (w.out + kPanelColumns - 1) / kPanelColumns;
    // Small enough for at least eight turns per member, where there are so many panels.
    const int64_t most = std::max<int64_t>(1, panels / (8 * members));
    chunk = std::clamp<int64_t>(kJobBytes / (depth * kStepBytes), 1, most);
    chunks = (panels + chunk - 1) / chunk;
    jobs = chunks * ((blocks + strip - 1) / strip);
  }

  int64_t first_panel(int64_t job) const { return job % chunks * chunk; }
  int64_t end_panel(int64_t job) const { return std::min(panels, first_panel(job) + chunk); }
  int64_t first_block(int64_t job) const { return job / chunks * strip; }
  int64_t end_block(int64_t job) const { return std::min(blocks, first_block(job) + strip); }
};

// Brings weights into the cache in the order in which this member will read them. Four times per
// step of depth 32, as many loads at once as the first-level cache takes would delay the tiles'.
class Ahead {
 public:
  // A job begins whose weights are [first, end); those of the next begin at `next`, or null.
  void begin(const bf16* first, const bf16* end, const bf16* next, int64_t lead) {
    const bool arrived = at_ != nullptr && end_ == nullptr;
    end_ = reinterpret_cast<const char*>(end);
    next_ = reinterpret_cast<const char*>(next);
    if (arrived) return;
    at_ = reinterpret_cast<const char*>(first);
    allow(lead / kLine, lead / kLine);
    turn();
  }

  // The following turns bring `per_turn` lines each, and all together at most `lines`.
  void allow(int64_t lines, int64_t per_turn) {
    lines_ = lines;
    per_turn_ = per_turn;
  }

  void turn() {
    if (lines_ <= 0 || at_ == nullptr) return;
    for (int64_t line = 0; line < per_turn_; ++line) _mm_prefetch(at_ + line * kLine, kWeightsHint);
    at_ += per_turn_ * kLine;
    lines_ -= per_turn_;
    if (end_ != nullptr && at_ >= end_) {
      at_ = next_;
      end_ = nullptr;
    }
  }

 private:
  const char* at_ = nullptr;
  const char* end_ = nullptr;   // of the current job's weights; null once at_ is in the next job's
  const char* next_ = nullptr;
  int64_t lines_ = 0, per_turn_ = 0;
};

// One member's part of a product.
template <typename Finish>
class Worker {
 public:
  Worker(const Plan& plan, const bf16* a, const Packed& w, const Finish& finish)
      : plan_(plan), a_(a), w_(w), finish_(finish) {}

  // `after` is the job that follows, or plan.jobs.
  void run(int64_t job, int64_t after) {
    const bool alone = plan_.strip == 1;
    ahead_.begin(panel(plan_.first_panel(job)), panel(plan_.end_panel(job)),
                 after < plan_.jobs ? panel(plan_.first_panel(after)) : nullptr,
                 lead_bytes(plan_.rows, plan_.strip <= kFewBlocks));
    for (int64_t p = plan_.first_panel(job); p < plan_.end_panel(job); ++p) {
      alone ? stream(p) : strip(p, plan_.first_block(job), plan_.end_block(job));
    }
    if (after >= plan_.jobs) finish_rows(waiting_.rows);
  }

 private:
  // A block of the result whose rows, from `next` on, are not finished.
  struct Waiting {
    const float* sums = nullptr;
    int64_t panel = 0, first_row = 0, rows = 0, next = 0;
  };

  const bf16* panel(int64_t p) const { return w_.data + p * plan_.depth * 2 * kTile; }

  void finish_rows(int64_t count) {
    const int64_t end = std::min(waiting_.rows, waiting_.next + count);
    for (; waiting_.next < end; ++waiting_.next) {
      finish_(waiting_.first_row + waiting_.next, waiting_.panel,
              waiting_.sums + waiting_.next * kPanelColumns);
    }
  }

  // One block of the result and the whole depth: weights are read once.
  void stream(int64_t p) {
    ahead_.allow(plan_.depth * kStepLines, kStepLines / kTurns);
    block<false>(p, 0, 0, plan_.depth, sums_);
  }

  void strip(int64_t p, int64_t first_block, int64_t end_block) {
    const int64_t blocks = end_block - first_block;
    // Few blocks wait for memory: the first one takes the slab in as `stream` does. Many blocks
    // share the fetching of the next slab.
    const int64_t sharing = plan_.strip <= kFewBlocks ? 1 : blocks;
    for (int64_t k = 0; k < plan_.depth; k += kSlabSteps) {
      const int64_t end = std::min(plan_.depth, k + kSlabSteps);
      ahead_.allow((end - k) * kStepLines, (kStepLines / kTurns + sharing - 1) / sharing);
      for (int64_t b = 0; b < blocks; ++b) {
        block<true>(p, first_block + b, k, end, sums_ + b * kBlock);
      }
    }
  }

  // Adds depth steps [k, end) to a block; where `end` is all of it, the block waits to be finished.
  template <bool kStreamLeft>
  void block(int64_t p, int64_t b, int64_t k, int64_t end, float* sums) {
    const int64_t first_row = b * kBlockRows;
    const Waiting block{sums, p, first_row, std::min(kBlockRows, plan_.rows - first_row), 0};
    block.rows > kTileRows ? add<2, kStreamLeft>(p, b, k, end, block.rows, sums)
                           : add<1, kStreamLeft>(p, b, k, end, block.rows, sums);
    if (end == plan_.depth) waiting_ = block;
  }

  template <int kTiles, bool kStreamLeft>
  void add(int64_t p, int64_t b, int64_t k, int64_t end, int64_t rows, float* sums) {
    const bf16* upper = a_ + (2 * b * plan_.depth + k) * kTile;
    const bf16* lower = upper + plan_.depth * kTile;
    const bf16* weights = panel(p) + k * 2 * kTile;
    add_to_block<kTiles, kStreamLeft>(
        upper, lower, weights, end - k, rows, k == 0, sums, [&] { ahead_.turn(); },
        [&](int64_t count) { finish_rows(count); });
  }

  const Plan& plan_;
  const bf16* a_;
  const Packed& w_;
  const Finish finish_;
  Ahead ahead_;
  Waiting waiting_;
  alignas(64) float sums_[kMaxStrip * kBlock];
};

template <typename Finish>
void product(Member& member, const bf16* a, int64_t rows, const Packed& w, const Finish& finish) {
  const Plan plan(member.size(), rows, w);
  const Tiles tiles(kBlockTiles[std::min(rows, kBlockRows) - 1]);
  Worker<Finish> worker(plan, a, w, finish);
  member.for_each_ahead(plan.jobs, [&](int64_t job, int64_t after) { worker.run(job, after); });
}

}  // namespace

void multiply(Member& member, const bf16* a_panels, int64_t rows, const Packed& w, const bf16* bias,
              bf16* out, int64_t stride) {
  // Whole lines only: a row begins with one, and the last panel's columns all exist.
  const bool lines = stride % kPanelColumns == 0 && w.out % kPanelColumns == 0;
  const bool far = lines && rows * stride * static_cast<int64_t>(sizeof(bf16)) > kFarBytes;
  product(member, a_panels, rows, w, StoreBf16{bias, out, stride, w.out, far});
}

void multiply_f32(Member& member, const bf16* a_panels, int64_t rows, const Packed& w, float* out,
                  int64_t stride) {
  product(member, a_panels, rows, w, StoreFloat{out, stride, w.out});
}

void multiply_add(Member& member, const bf16* a_panels, int64_t rows, const Packed& w,
                  const bf16* bias, bf16* residual, int64_t stride) {
  product(member, a_panels, rows, w, AddBf16{bias, residual, stride, w.out});
}

void multiply_silu(Member& member, const bf16* a_panels, int64_t rows, const Packed& w,
                   const bf16* bias, bf16* out_panels) {
  product(member, a_panels, rows, w, StoreSilu{bias, out_panels, w.out / 2});
}

}  // namespace baton
