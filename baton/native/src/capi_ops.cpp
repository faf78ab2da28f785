// Single operations with row-major operands, for tests: tests/native_kit.py mirrors the functions.
// Each makes its own team of `threads`.

#include "memory.h"
#include "ops.h"
#include "team.h"

namespace baton {
namespace {

// Values in memory of their own, aligned as operations want them. Pages that nobody wrote to are 0.
class Panels {
 public:
  Panels(int64_t rows, int64_t width)
      : rows_(rows),
        width_(width),
        depth_(round_up(width, kTileDepth)),
        memory_(round_up(rows, kTileRows) * depth_ * int64_t{sizeof(bf16)}) {}
  Panels(const bf16* x, int64_t rows, int64_t width) : Panels(rows, width) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < width; ++c) data()[panel_index(r, c, depth_)] = x[r * width + c];
    }
  }
  void copy_to(bf16* x) const {
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < width_; ++c) x[r * width_ + c] = data()[panel_index(r, c, depth_)];
    }
  }
  // Whether the columns that pad the depth are zero, as a product needs them.
  bool padded() const {
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = width_; c < depth_; ++c) {
        if (data()[panel_index(r, c, depth_)]) return false;
      }
    }
    return true;
  }
  bf16* data() const { return reinterpret_cast<bf16*>(memory_.data()); }

 private:
  int64_t rows_, width_, depth_;
  Memory memory_;
};

}  // namespace
}  // namespace baton

using namespace baton;

#pragma GCC visibility push(default)
extern "C" {

// result = x . w^T + bias: into bf16 (0), into float32 (1), added to bf16 (2), or silu(gate) * up
// of a weight [2 * half, in] (3). x [rows, in]; w [out, in]; bias [out] or null. True unless
// padding was written to.
int32_t baton_op_product(int32_t threads, int32_t kind, const bf16* x, int64_t rows, int64_t in,
                         const bf16* w, int64_t out, const bf16* bias, void* result) {
  Team team(threads, {});
  const Panels left(x, rows, in), gated(rows, kind == 3 ? out / 2 : 1);
  Memory weight(packed_size(out, in) * int64_t{sizeof(bf16)});
  auto* packed = reinterpret_cast<bf16*>(weight.data());
  const Packed matrix = {packed, out, round_up(in, kTileDepth)};
  auto* values = static_cast<bf16*>(result);
  team.run([&](Member& member) {
    if (kind == 3) {
      pack_gate_up(member, w, out / 2, in, packed);
      multiply_silu(member, left.data(), rows, matrix, bias, gated.data());
    } else {
      pack(member, w, out, in, packed);
    }
    if (kind == 0) multiply(member, left.data(), rows, matrix, bias, values, out);
    if (kind == 1) {
      multiply_f32(member, left.data(), rows, matrix, static_cast<float*>(result), out);
    }
    if (kind == 2) multiply_add(member, left.data(), rows, matrix, bias, values, out);
  });
  if (kind == 3) gated.copy_to(values);
  return gated.padded();
}

// All rows of a weight [out, in], packed and unpacked.
void baton_op_unpack(const bf16* w, int64_t out, int64_t in, bf16* result) {
  Team team(1, {});
  Memory weight(packed_size(out, in) * int64_t{sizeof(bf16)});
  auto* packed = reinterpret_cast<bf16*>(weight.data());
  team.run([&](Member& member) { pack(member, w, out, in, packed); });
  const Packed matrix = {packed, out, round_up(in, kTileDepth)};
  for (int64_t row = 0; row < out; ++row) unpack_row(matrix, row, in, result + row * in);
}

// True unless padding was written to.
int32_t baton_op_rms_norm(int32_t threads, const bf16* x, int64_t rows, int64_t width,
                          const bf16* weight, float eps, bf16* result) {
  Team team(threads, {});
  const Panels out(rows, width);
  team.run([&](Member& member) {
    rms_norm(member, x, rows, width, width, weight, eps, out.data());
  });
  out.copy_to(result);
  return out.padded();
}

void baton_op_rope_and_write(int32_t threads, bf16* qkv, int64_t rows, int64_t stride,
                             const RopeShape* shape, const int32_t* positions,
                             const int64_t* slots, const Pool* pool, int64_t layer) {
  Team team(threads, {});
  team.run([&](Member& member) {
    rope_and_write(member, qkv, rows, stride, *shape, positions, slots, *pool, layer);
  });
}

// q and result [rows, heads * head_dim]. Orders the spans.
void baton_op_attention(int32_t threads, const Pool* pool, int64_t layer,
                        const AttentionShape* shape, Span* spans, int64_t num_spans,
                        const bf16* q, int64_t rows, bf16* result) {
  Team team(threads, {});
  order_spans(spans, num_spans, pool->block_size);
  const int64_t width = shape->heads * pool->head_dim;
  const Panels out(rows, width);
  Memory scratch(attention_scratch(pool->kv_heads, pool->head_dim, threads) + 64);
  team.run([&](Member& member) {
    attention(member, *pool, layer, *shape, spans, num_spans, q, width, out.data(),
              scratch.data());
  });
  out.copy_to(result);
}

void baton_op_argmax(int32_t threads, const float* logits, int64_t rows, int64_t width,
                     int64_t* best) {
  Team team(threads, {});
  team.run([&](Member& member) { argmax(member, logits, rows, width, width, best); });
}

}  // extern "C"
#pragma GCC visibility pop
