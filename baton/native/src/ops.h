// The operations of a decoder on one CPU with AMX: bfloat16 in and out, float32 inside.
//
// Every operation is called by all members of a team with equal arguments, and ends with a barrier
// unless its comment says otherwise. None allocates. Pointers are aligned to 64 bytes.
//
// A result row depends on nothing but its own inputs, bit for bit: not on how many other rows
// there are, nor on how the work was divided among members. So every loop over a reduced dimension
// runs in one fixed order with fixed tile boundaries.
#pragma once

#include <cstdint>

#include "team.h"

namespace baton {

using bf16 = uint16_t;

constexpr int64_t kTileRows = 16;   // rows of an AMX tile
constexpr int64_t kTileDepth = 32;  // bfloat16 values in a tile row

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// --- products (gemm.cpp) -------------------------------------------------------------------------

// Left operands [rows, depth] are held as "panels": 16 rows by 32 columns, 1 KiB, tile after tile:
//     element (r, c) of panels(depth) is at
//     (((r / 16) * (depth / 32) + c / 32) * 16 + r % 16) * 32 + c % 32,   depth a multiple of 32
// so that a tile load touches 16 consecutive cache lines whatever the depth. Rows beyond `rows` in
// the last panel may hold anything; columns beyond the true depth must be zero.
constexpr int64_t panel_index(int64_t row, int64_t column, int64_t depth) {
  return (((row / kTileRows) * (depth / kTileDepth) + column / kTileDepth) * kTileRows +
          row % kTileRows) * kTileDepth + column % kTileDepth;
}

// A weight [out, in] in the order in which AMX reads it; made by `pack`, which pads both.
struct Packed {
  const bf16* data = nullptr;
  int64_t out = 0;    // true rows of the weight
  int64_t depth = 0;  // columns, rounded up to a multiple of 32
};

// bf16 values that `Packed::data` of an [out, in] weight takes.
int64_t packed_size(int64_t out, int64_t in);

// Pack `weight` [out, in], row-major.
void pack(Member& member, const bf16* weight, int64_t out, int64_t in, bf16* packed);

// Like `pack` for gate [half, in] and up [half, in], interleaved in groups of 16 rows (gate's
// first), as `multiply_silu` wants them. Packed::out is 2 * half, half a multiple of 16.
void pack_gate_up(Member& member, const bf16* gate_up, int64_t half, int64_t in, bf16* packed);

// Row `row` of a packed weight, `in` values: what an embedding look-up needs when the embedding is
// tied to the output head. Not collective.
void unpack_row(const Packed& weight, int64_t row, int64_t in, bf16* out);

// out[r, c] = a[r, :] . w[c, :] + bias[c], row-major with `stride` values per row. bias may be null.
void multiply(Member&, const bf16* a_panels, int64_t rows, const Packed& w, const bf16* bias,
              bf16* out, int64_t stride);
// The same in float32, without bias: logits.
void multiply_f32(Member&, const bf16* a_panels, int64_t rows, const Packed& w, float* out,
                  int64_t stride);
// residual[r, c] += a[r, :] . w[c, :] + bias[c]; the sum is rounded once.
void multiply_add(Member&, const bf16* a_panels, int64_t rows, const Packed& w, const bf16* bias,
                  bf16* residual, int64_t stride);
// out = silu(gate) * up, as panels of depth round_up(half, 32), of w packed by `pack_gate_up`;
// bias [2 * half] in the plain order, or null.
void multiply_silu(Member&, const bf16* a_panels, int64_t rows, const Packed& w, const bf16* bias,
                   bf16* out_panels);

// --- attention (attention.cpp) -------------------------------------------------------------------

// The block pool [blocks, layers, 2, kv_heads, block_size, head_dim], bfloat16.
struct Pool {
  bf16* data;
  int64_t layers, kv_heads, block_size, head_dim;

  // K (which = 0) or V (1) of one head in one block: [block_size, head_dim], contiguous.
  bf16* rows(int64_t block, int64_t layer, int64_t which, int64_t head) const {
    return data + (((block * layers + layer) * 2 + which) * kv_heads + head) * block_size * head_dim;
  }
};

// Consecutive queries of one sequence: rows [first_row, first_row + queries) of the batch, at
// positions [start, start + queries). K and V of [0, start + queries) are in the pool.
struct Span {
  int64_t first_row, queries, start;
  const int32_t* blocks;
  int64_t shared = 0;  // leading positions in the same blocks as those of the span before
};

// Puts spans of as many queries whose tables begin alike next to each other, and sets `shared`.
// Other spans keep their order. Every span has a block.
void order_spans(Span* spans, int64_t num_spans, int64_t block_size);

struct AttentionShape {
  int64_t heads;
  float scale;
  int64_t window;  // a query sees itself and the window - 1 tokens before it; 0: all before it
};

// Causal attention of every span; spans are as `order_spans` leaves them. `q` is row-major [rows, heads * head_dim] with `stride` values
// per row; `out_panels` has depth heads * head_dim (a multiple of 32). head_dim is a multiple of
// 32, at most 256; block_size a multiple of 16; `scale` is positive. Of a span's blocks only those
// with a visible position are read. `scratch` is one memory for the whole team, of
// attention_scratch() bytes; nothing in it is kept from call to call.
void attention(Member&, const Pool& pool, int64_t layer, const AttentionShape& shape,
               const Span* spans, int64_t num_spans, const bf16* q, int64_t stride,
               bf16* out_panels, uint8_t* scratch);
int64_t attention_scratch(int64_t kv_heads, int64_t head_dim, int members);

// --- rows (rows.cpp) -----------------------------------------------------------------------------

// Embeddings of tokens, row-major [rows, width]: from `table` [vocab, width], or where that is null
// (tied embeddings) from the packed output head.
void embed(Member&, const int32_t* tokens, int64_t rows, const bf16* table, const Packed& head,
           int64_t width, bf16* out, int64_t stride);

// RMS norm (arXiv:1910.07467) of rows of `width` values, as panels of depth round_up(width, 32).
void rms_norm(Member&, const bf16* x, int64_t rows, int64_t stride, int64_t width,
              const bf16* weight, float eps, bf16* out_panels);

struct RopeShape {
  int64_t heads;
  const bf16* qk_norm;  // [heads + kv_heads, head_dim], or null
  float eps;
  const float* cos;     // [positions, head_dim / 2]; dimension i pairs with i + head_dim / 2
  const float* sin;
};

// Norm and rotate queries and keys of qkv rows [heads + 2 * kv_heads, head_dim] (in place for
// queries), and put K and V into the pool: row r at `slots[r]` = block * block_size + offset, at
// position `positions[r]`. The pool needs no alignment.
void rope_and_write(Member&, bf16* qkv, int64_t rows, int64_t stride, const RopeShape& shape,
                    const int32_t* positions, const int64_t* slots, const Pool& pool,
                    int64_t layer);

// Rows `picked` of row-major x and of panels.
void gather(Member&, const int32_t* picked, int64_t count, const bf16* x, int64_t width,
            int64_t stride, bf16* out, const bf16* panels, int64_t depth, bf16* out_panels);

// The greatest of each row, first on ties; -1 for a row with NaN or whose best is not finite.
void argmax(Member&, const float* logits, int64_t rows, int64_t width, int64_t stride,
            int64_t* best);

// --- ceilings (ceilings.cpp) ---------------------------------------------------------------------

// Measurements, not operations: what the whole team reaches at best, as every member sees it.

// FLOP per second of tile products on operands in the first-level cache; `steps` of 131,072 FLOP
// per member (a step takes about 25 ns).
double matrix_peak(Member&, int64_t steps);
// Bytes per second of reading `bytes` (a multiple of 256) once, in order, with prefetching.
double read_bandwidth(Member&, const uint8_t* data, int64_t bytes);

}  // namespace baton
