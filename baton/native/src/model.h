// A decoder on the CPU: its weights, its team, and the memory that a forward pass works in.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "memory.h"
#include "ops.h"
#include "team.h"

namespace baton {

// Fields as in baton/model/spec.py. Filled by Python (baton/native/library.py has the same).
struct ModelShape {
  int64_t vocab, layers, hidden, intermediate, heads, kv_heads, head_dim, positions;
  float eps, scale;
  int32_t qkv_bias, output_bias, mlp_bias, qk_norm, tied;

  int64_t attended() const { return heads * head_dim; }
  int64_t qkv() const { return (heads + 2 * kv_heads) * head_dim; }
};

// The numbers are part of the C interface; from kInputNorm on there is one per layer.
enum class Weight : int32_t {
  kEmbedding,  // absent where it is tied: rows are looked up in kHead
  kNorm,
  kHead,
  kCos,
  kSin,
  kInputNorm,
  kQkv,
  kQkvBias,
  kQkNorm,
  kOutput,
  kOutputBias,
  kPostNorm,
  kGateUp,
  kGateUpBias,
  kDown,
  kDownBias,
};
constexpr int kWeights = 16;
constexpr bool per_layer(Weight weight) { return weight >= Weight::kInputNorm; }

// What a weight is made from, and how it is kept.
struct Form {
  enum Kind { kAbsent, kPlain, kMatrix, kGateUp } kind;
  int64_t out, in;     // of the source, row-major
  int64_t item_bytes;  // of the source
};

// One step's work. Rows are the spans' tokens one after the other. Filled by Python.
struct Batch {
  int64_t rows, spans;
  const int32_t* tokens;       // [rows]
  const int32_t* queries;      // [spans] tokens of each span; their sum is `rows`
  const int32_t* starts;       // [spans] position of each span's first token
  const int32_t* table_sizes;  // [spans] blocks in each table
  const int32_t* sampled;      // [spans] 1: the logits of the span's last row are wanted
  const int32_t* blocks;       // the spans' block tables, one after the other
};

struct PoolView {
  bf16* data;
  int64_t blocks, block_size;
};

enum class Operation : int32_t {
  kEmbed,
  kNorm,
  kQkv,
  kRope,
  kAttention,
  kOutput,
  kMlpUp,
  kMlpDown,
  kLogits,
  kSample,
  kWaiting,
};
constexpr int kOperations = 11;

// Time stamp counts of thread 0 by operation. Its waits at barriers are kWaiting alone.
struct Profile {
  uint64_t cycles[kOperations] = {};
  uint64_t total = 0;
  uint64_t nanoseconds = 0;  // of the same time: the unit of the counts
  uint64_t steps = 0;
};

class Model {
 public:
  // Throws std::invalid_argument for shapes that `why_not` refuses, std::bad_alloc.
  Model(const ModelShape& shape, const int64_t* windows, int threads, const std::vector<int>& cpus);

  // Why the operations cannot run the shape; empty where they can.
  static std::string why_not(const ModelShape& shape);

  // Copy a weight in, packed as the products want it. `values` is checked.
  // Throws std::invalid_argument.
  void load(Weight weight, int64_t layer, const void* source, int64_t values);

  // Run stages [begin, end) of a batch. Stage k is: what layer k - 1 has left to do after its KV is
  // written (attention, MLP); then layer k up to its KV being written, or behind the last layer the
  // logits. So there are layers + 1 stages, and after stages [0, e) the KV of layers [0, e) is in
  // the pool. The stages of one batch are run in order, with nothing else in between.
  //
  // `logits` [sampled spans, stride] float32 and `best` [sampled spans] (see argmax) are written by
  // the last stage. Throws std::invalid_argument for a batch that leaves the vocabulary, the
  // positions or the pool, before anything is written.
  void forward(const Batch& batch, const PoolView& pool, int64_t begin, int64_t end, float* logits,
               int64_t stride, int64_t* best);

  Profile take_profile();

 private:
  friend class Pass;

  Form form(Weight weight) const;
  uint8_t*& place(Weight weight, int64_t layer);
  const bf16* plain(Weight weight, int64_t layer = 0) const;
  Packed packed(Weight weight, int64_t layer = 0) const;
  int64_t lay_out(uint8_t* memory);
  void plan(const Batch& batch, const PoolView& pool);
  void add_span(const Span& span, int64_t table_size, const PoolView& pool);
  void reserve(int64_t rows);
  int64_t divide_workspace(int64_t rows, uint8_t* memory);

  ModelShape shape_;
  std::vector<int64_t> windows_;
  Team team_;
  Memory weights_;
  std::vector<uint8_t*> places_;  // by layer, then weight; null: absent
  std::vector<bool> loaded_;
  bool complete_ = false;  // every weight is there

  // The plan of the current batch.
  int64_t rows_ = 0;
  std::vector<int32_t> positions_, picked_;  // picked: rows whose logits are wanted
  std::vector<int64_t> slots_;
  std::vector<Span> spans_;

  // Workspace for `capacity_` rows. Panels have whole groups of 16 rows.
  int64_t capacity_ = 0;
  Memory workspace_;
  bf16 *hidden_ = nullptr, *picked_hidden_ = nullptr;      // [rows, hidden], padded to 32
  bf16* qkv_ = nullptr;                                    // [rows, qkv]
  bf16 *normed_ = nullptr, *mlp_ = nullptr;                // panels
  bf16 *attended_ = nullptr, *picked_attended_ = nullptr;  // panels
  uint8_t* scratch_ = nullptr;                             // attention's
  Profile profile_;
};

}  // namespace baton
