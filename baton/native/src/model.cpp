// A model's weights and memory, and the plan that a batch is turned into.

#include "model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace baton {
namespace {

constexpr Weight kAll[] = {
    Weight::kEmbedding, Weight::kNorm,     Weight::kHead,   Weight::kCos,
    Weight::kSin,       Weight::kInputNorm, Weight::kQkv,    Weight::kQkvBias,
    Weight::kQkNorm,    Weight::kOutput,   Weight::kOutputBias, Weight::kPostNorm,
    Weight::kGateUp,    Weight::kGateUpBias, Weight::kDown,  Weight::kDownBias,
};
static_assert(std::size(kAll) == kWeights);

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace

std::string Model::why_not(const ModelShape& shape) {
  const auto number = [](const char* name, int64_t value, const char* wanted) {
    return std::string(name) + " is " + std::to_string(value) + ", not " + wanted;
  };
  if (shape.head_dim % 32 || shape.head_dim > 256 || shape.head_dim <= 0) {
    return number("head_dim", shape.head_dim, "a multiple of 32 up to 256");
  }
  if (shape.intermediate % 16) {
    return number("intermediate_size", shape.intermediate, "a multiple of 16");
  }
  if (shape.kv_heads <= 0 || shape.heads % shape.kv_heads) {
    return number("num_attention_heads", shape.heads, "a multiple of the KV heads");
  }
  return "";
}

Model::Model(const ModelShape& shape, const int64_t* windows, int threads,
             const std::vector<int>& cpus)
    : shape_(shape), windows_(windows, windows + shape.layers), team_(threads, cpus) {
  const std::string reason = why_not(shape);
  if (!reason.empty()) refuse(reason);
  places_.resize(shape.layers * kWeights);
  loaded_.resize(places_.size());
  weights_ = Memory(lay_out(nullptr));
  lay_out(weights_.data());
}

Form Model::form(Weight weight) const {
  const ModelShape& s = shape_;
  const auto plain = [](bool there, int64_t rows, int64_t width = 1) {
    return Form{there ? Form::kPlain : Form::kAbsent, rows, width, sizeof(bf16)};
  };
  const auto matrix = [](int64_t out, int64_t in) {
    return Form{Form::kMatrix, out, in, sizeof(bf16)};
  };
  const Form table = {Form::kPlain, s.positions, s.head_dim / 2, sizeof(float)};
  switch (weight) {
    case Weight::kEmbedding: return plain(!s.tied, s.vocab, s.hidden);
    case Weight::kNorm: return plain(true, s.hidden);
    case Weight::kHead: return matrix(s.vocab, s.hidden);
    case Weight::kCos: return table;
    case Weight::kSin: return table;
    case Weight::kInputNorm: return plain(true, s.hidden);
    case Weight::kQkv: return matrix(s.qkv(), s.hidden);
    case Weight::kQkvBias: return plain(s.qkv_bias, s.qkv());
    case Weight::kQkNorm: return plain(s.qk_norm, s.heads + s.kv_heads, s.head_dim);
    case Weight::kOutput: return matrix(s.hidden, s.attended());
    case Weight::kOutputBias: return plain(s.output_bias, s.hidden);
    case Weight::kPostNorm: return plain(true, s.hidden);
    case Weight::kGateUp: return {Form::kGateUp, 2 * s.intermediate, s.hidden, sizeof(bf16)};
    case Weight::kGateUpBias: return plain(s.mlp_bias, 2 * s.intermediate);
    case Weight::kDown: return matrix(s.hidden, s.intermediate);
    case Weight::kDownBias: return plain(s.mlp_bias, s.hidden);
  }
  return {Form::kAbsent, 0, 0, 0};
}

// Gives every weight its place in `memory`, in the order in which they are read; returns the size
// that it must have.
int64_t Model::lay_out(uint8_t* memory) {
  Layout layout(memory);
  for (int64_t layer = 0; layer < shape_.layers; ++layer) {
    for (const Weight weight : kAll) {
      const Form f = form(weight);
      if (f.kind == Form::kAbsent || (layer && !per_layer(weight))) continue;
      const bool is_plain = f.kind == Form::kPlain;
      const int64_t bytes = is_plain ? f.out * f.in * f.item_bytes
                                     : packed_size(f.out, f.in) * int64_t{sizeof(bf16)};
      place(weight, layer) = layout.take<uint8_t>(bytes);
    }
  }
  return layout.used();
}

uint8_t*& Model::place(Weight weight, int64_t layer) {
  return places_[layer * kWeights + static_cast<int>(weight)];
}

const bf16* Model::plain(Weight weight, int64_t layer) const {
  return reinterpret_cast<const bf16*>(places_[layer * kWeights + static_cast<int>(weight)]);
}

Packed Model::packed(Weight weight, int64_t layer) const {
  const Form f = form(weight);
  return {plain(weight, layer), f.out, round_up(f.in, kTileDepth)};
}

void Model::load(Weight weight, int64_t layer, const void* source, int64_t values) {
  const auto number = static_cast<int>(weight);
  const std::string name = "weight " + std::to_string(number);
  if (number < 0 || number >= kWeights) refuse("there is no " + name);
  if (layer < 0 || layer >= (per_layer(weight) ? shape_.layers : 1)) {
    refuse("no layer " + std::to_string(layer) + " for " + name);
  }
  const Form f = form(weight);
  const int64_t wanted = f.kind == Form::kAbsent ? 0 : f.out * f.in;
  if (values != wanted || !wanted) {
    refuse(name + " has " + std::to_string(values) + " values, not " + std::to_string(wanted));
  }
  const auto* from = static_cast<const bf16*>(source);
  uint8_t* to = place(weight, layer);
  if (f.kind == Form::kPlain) {
    std::memcpy(to, source, values * f.item_bytes);
  } else {
    auto* packed = reinterpret_cast<bf16*>(to);
    team_.run([&](Member& member) {
      if (f.kind == Form::kMatrix) pack(member, from, f.out, f.in, packed);
      if (f.kind == Form::kGateUp) pack_gate_up(member, from, f.out / 2, f.in, packed);
    });
  }
  loaded_[layer * kWeights + number] = true;
  complete_ = true;
  for (size_t i = 0; i < places_.size(); ++i) complete_ &= !places_[i] || loaded_[i];
}

// Where each row's position and KV are, and which rows are sampled. Refuses what would be read or
// written outside of the model's tables and the pool.
void Model::plan(const Batch& batch, const PoolView& pool) {
  if (!complete_) refuse("not all weights were loaded");
  if (pool.block_size <= 0 || pool.block_size % 16) {
    refuse("blocks of " + std::to_string(pool.block_size) + " tokens, not a multiple of 16");
  }
  for (int64_t row = 0; row < batch.rows; ++row) {
    if (batch.tokens[row] < 0 || batch.tokens[row] >= shape_.vocab) {
      refuse("token " + std::to_string(batch.tokens[row]) + " is outside of the vocabulary");
    }
  }
  rows_ = 0;
  positions_.clear(), slots_.clear(), spans_.clear(), picked_.clear();
  const int32_t* table = batch.blocks;
  for (int64_t i = 0; i < batch.spans; table += batch.table_sizes[i], ++i) {
    const int64_t queries = batch.queries[i], start = batch.starts[i];
    if (queries <= 0 || start < 0 || start + queries > shape_.positions ||
        rows_ + queries > batch.rows) {
      refuse("a sequence's " + std::to_string(queries) + " tokens from " + std::to_string(start) +
             " leave the batch or the model's positions");
    }
    add_span({rows_, queries, start, table}, batch.table_sizes[i], pool);
    if (batch.sampled[i]) picked_.push_back(static_cast<int32_t>(rows_ - 1));
  }
  if (rows_ != batch.rows) {
    refuse("the sequences have " + std::to_string(rows_) + " tokens, not " +
           std::to_string(batch.rows));
  }
  order_spans(spans_.data(), static_cast<int64_t>(spans_.size()), pool.block_size);
}

void Model::add_span(const Span& span, int64_t table_size, const PoolView& pool) {
  const int64_t end = span.start + span.queries;
  const int64_t blocks = (end + pool.block_size - 1) / pool.block_size;
  if (blocks > table_size) refuse("a block table is too short");
  for (int64_t i = 0; i < blocks; ++i) {
    if (span.blocks[i] < 0 || span.blocks[i] >= pool.blocks) {
      refuse("block " + std::to_string(span.blocks[i]) + " is outside of the pool");
    }
  }
  for (int64_t at = span.start; at < end; ++at) {
    positions_.push_back(static_cast<int32_t>(at));
    slots_.push_back(span.blocks[at / pool.block_size] * pool.block_size + at % pool.block_size);
  }
  spans_.push_back(span);
  rows_ += span.queries;
}

// Workspace for `rows` rows.
void Model::reserve(int64_t rows) {
  if (rows <= capacity_) return;
  // Steps grow to the largest that the engine makes; doubling gets there in a few.
  const int64_t capacity = round_up(std::max(2 * capacity_, rows), 64);
  capacity_ = 0;  // should there be no memory, the next step must not use what is gone
  workspace_ = Memory();
  workspace_ = Memory(divide_workspace(capacity, nullptr));
  divide_workspace(capacity, workspace_.data());
  capacity_ = capacity;
}

int64_t Model::divide_workspace(int64_t rows, uint8_t* memory) {
  const int64_t hidden = round_up(shape_.hidden, kTileDepth);
  Layout layout(memory);
  hidden_ = layout.take<bf16>(rows * hidden);
  picked_hidden_ = layout.take<bf16>(rows * hidden);
  normed_ = layout.take<bf16>(rows * hidden);
  qkv_ = layout.take<bf16>(rows * shape_.qkv());
  attended_ = layout.take<bf16>(rows * shape_.attended());
  picked_attended_ = layout.take<bf16>(rows * shape_.attended());
  mlp_ = layout.take<bf16>(rows * round_up(shape_.intermediate, kTileDepth));
  scratch_ = layout.take<uint8_t>(
      attention_scratch(shape_.kv_heads, shape_.head_dim, team_.size()));
  return layout.used();
}

Profile Model::take_profile() { return std::exchange(profile_, {}); }

}  // namespace baton
