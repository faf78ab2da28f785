// One forward pass: the operations of all layers in one run of the team.

#include <immintrin.h>

#include <algorithm>
#include <chrono>

#include "model.h"

namespace baton {

// One member's way through the stages of a batch. All members make the same calls.
class Pass {
 public:
  Pass(Member& member, Model& model, const Pool& pool, Profile& profile)
      : member_(member),
        model_(model),
        shape_(model.shape_),
        pool_(pool),
        profile_(member.index() == 0 ? &profile : nullptr),
        stride_(round_up(model.shape_.hidden, kTileDepth)),
        rows_(model.rows_),
        hidden_(model.hidden_),
        attended_(model.attended_),
        last_(__rdtsc()) {}

  void look_up(const int32_t* tokens) {
    embed(member_, tokens, rows_, model_.plain(Weight::kEmbedding), model_.packed(Weight::kHead),
          shape_.hidden, hidden_, stride_);
    count(Operation::kEmbed);
  }

  // A layer up to its KV being in the pool.
  void begin_layer(int64_t layer) {
    const bf16* normed = norm(Weight::kInputNorm, layer);
    multiply(member_, normed, rows_, model_.packed(Weight::kQkv, layer),
             model_.plain(Weight::kQkvBias, layer), model_.qkv_, shape_.qkv());
    count(Operation::kQkv);
    const RopeShape rope = {shape_.heads, model_.plain(Weight::kQkNorm, layer), shape_.eps,
                            reinterpret_cast<const float*>(model_.plain(Weight::kCos)),
                            reinterpret_cast<const float*>(model_.plain(Weight::kSin))};
    rope_and_write(member_, model_.qkv_, rows_, shape_.qkv(), rope, model_.positions_.data(),
                   model_.slots_.data(), pool_, layer);
    count(Operation::kRope);
  }

  // The rest of a layer. Behind the last one, only rows whose logits are wanted go on.
  void end_layer(int64_t layer) {
    const AttentionShape attention_shape = {shape_.heads, shape_.scale, model_.windows_[layer]};
    attention(member_, pool_, layer, attention_shape, model_.spans_.data(),
              static_cast<int64_t>(model_.spans_.size()), model_.qkv_, shape_.qkv(), attended_,
              model_.scratch_);
    count(Operation::kAttention);
    if (layer == shape_.layers - 1) keep_picked();
    multiply_add(member_, attended_, rows_, model_.packed(Weight::kOutput, layer),
                 model_.plain(Weight::kOutputBias, layer), hidden_, stride_);
    count(Operation::kOutput);
    const bf16* normed = norm(Weight::kPostNorm, layer);
    multiply_silu(member_, normed, rows_, model_.packed(Weight::kGateUp, layer),
                  model_.plain(Weight::kGateUpBias, layer), model_.mlp_);
    count(Operation::kMlpUp);
    multiply_add(member_, model_.mlp_, rows_, model_.packed(Weight::kDown, layer),
                 model_.plain(Weight::kDownBias, layer), hidden_, stride_);
    count(Operation::kMlpDown);
  }

  void logits(float* out, int64_t stride, int64_t* best) {
    const bf16* normed = norm(Weight::kNorm, 0);
    multiply_f32(member_, normed, rows_, model_.packed(Weight::kHead), out, stride);
    count(Operation::kLogits);
    argmax(member_, out, rows_, shape_.vocab, stride, best);
    count(Operation::kSample);
  }

 private:
  const bf16* norm(Weight weight, int64_t layer) {
    rms_norm(member_, hidden_, rows_, stride_, shape_.hidden, model_.plain(weight, layer),
             shape_.eps, model_.normed_);
    count(Operation::kNorm);
    return model_.normed_;
  }

  void keep_picked() {
    const auto picked = static_cast<int64_t>(model_.picked_.size());
    if (picked == rows_) return;
    gather(member_, model_.picked_.data(), picked, hidden_, shape_.hidden, stride_,
           model_.picked_hidden_, attended_, shape_.attended(), model_.picked_attended_);
    count(Operation::kSample);
    hidden_ = model_.picked_hidden_;
    attended_ = model_.picked_attended_;
    rows_ = picked;
  }

  // The time since the last call belongs to `operation`, except what was waited.
  void count(Operation operation) {
    if (!profile_) return;
    const uint64_t now = __rdtsc(), waited = member_.waited() - waited_;
    profile_->cycles[static_cast<int>(operation)] += now - last_ - waited;
    profile_->cycles[static_cast<int>(Operation::kWaiting)] += waited;
    last_ = now;
    waited_ += waited;
  }

  Member& member_;
  Model& model_;
  const ModelShape& shape_;
  const Pool& pool_;
  Profile* profile_;  // null for all but one member
  int64_t stride_, rows_;
  bf16 *hidden_, *attended_;
  uint64_t last_, waited_ = 0;
};

void Model::forward(const Batch& batch, const PoolView& view, int64_t begin, int64_t end,
                    float* logits, int64_t stride, int64_t* best) {
  const auto started = std::chrono::steady_clock::now();
  const uint64_t first_cycle = __rdtsc();
  const Pool pool = {view.data, shape_.layers, shape_.kv_heads, view.block_size, shape_.head_dim};
  if (begin == 0) {
    plan(batch, view);
    reserve(rows_);
    profile_.steps += 1;
  }
  const int64_t layers = shape_.layers;
  // Without a row to sample, the last layer's KV is the end.
  if (picked_.empty()) end = std::min(end, layers);
  team_.run([&](Member& member) {
    Pass pass(member, *this, pool, profile_);
    for (int64_t stage = begin; stage < end; ++stage) {
      if (stage == 0) pass.look_up(batch.tokens);
      if (stage > 0) pass.end_layer(stage - 1);
      if (stage < layers) pass.begin_layer(stage);
      if (stage == layers) pass.logits(logits, stride, best);
    }
  });
  profile_.total += __rdtsc() - first_cycle;
  const std::chrono::nanoseconds passed = std::chrono::steady_clock::now() - started;
  profile_.nanoseconds += static_cast<uint64_t>(passed.count());
}

}  // namespace baton
