"""Compile the kernels for GPUs that are not here; print a JSON list of what was compiled.

Triton brings its own assembler, so no GPU, driver or CUDA toolkit is needed. A process of its own,
because one that interprets Triton kernels cannot compile them.

    python -m tests.unit.kernels_compile
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from baton.kernels import attention_decode, attention_prefill, kv_copy, rows, sampling, tiles
from baton.kernels.tile_table import DECODE, PREFILL, Tile

POINTERS = {
    **dict.fromkeys(("block_tables", "seq_lens", "query_start", "context_lens"), "*i32"),
    **dict.fromkeys(("arrivals", "ids"), "*i32"),
    **dict.fromkeys(("slots", "src", "dst", "starts", "tokens", "finite"), "*i64"),
    **dict.fromkeys(("partial", "log_sums", "rotation", "temperatures", "highest"), "*fp32"),
    "scores": "*fp64",
}
INTEGERS = ("batch", "splits", "elements")
SPLITS = {"MAX_SPLITS": 32, "MIN_SPLIT": 256}
COMPILED_FOR = {80: 80, 89: 86, 90: 90, 100: 100}
"""The table's architectures, and the strictest GPU that each is for."""

Compiled = dict[str, str | int | bool]


def compile_kernel(
    kernel: Any, arch: int, dtype: str, constants: dict[str, int], **options: int
) -> Compiled:
    """Compile down to machine code, with those of `constants` that the kernel has as arguments.

    Says how much shared memory (bytes) one program takes, and whether what it counts is ordered.
    """
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("scale_log2", "eps"):
            signature[name] = "fp32"
        elif "stride" in name or name in INTEGERS or (name == "tokens" and kernel is ROPE):
            signature[name] = "i32"
        else:
            signature[name] = POINTERS.get(name, f"*{dtype}")
        # As at a launch: pointers and strides are multiples of 16.
        strides = "stride" in name and name != "table_stride"
        if signature[name].startswith("*") or (signature[name] == "i32" and strides):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert compiled.asm["cubin"]
    return {
        "kernel": kernel.__name__,
        "arch": arch,
        "shared": compiled.metadata.shared,
        "ordered": _ordered(compiled.asm["ptx"]),
    }


def _ordered(ptx: str) -> bool:
    """Whether partial results are stored, then a barrier, then counted with acquire and release."""
    return bool(re.search(r"st\.global.*?bar\.sync.*?atom\.global\.gpu\.acq_rel", ptx, re.DOTALL))


ROPE = rows._norm_rope_write


def prefill(arch: int, dtype: str, tile: Tile, constants: dict[str, int]) -> Compiled:
    return compile_kernel(
        attention_prefill._attend_tiles,
        arch,
        dtype,
        constants
        | {"ROWS": tile.rows, "KEYS": tile.keys, "TILE_TOKENS": tile.rows // constants["GROUP"]},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def decode(arch: int, dtype: str, tile: Tile, constants: dict[str, int]) -> Compiled:
    compiled = compile_kernel(
        attention_decode._attend,
        arch,
        dtype,
        constants | SPLITS | {"ROWS": tile.rows, "KEYS": tile.keys, "BATCH_PAD": 256},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return compiled | {"resident": tile.programs}


def heads(head_dim: int, group: int, window: int = 0) -> dict[str, int]:
    return {
        "WINDOW": window,
        "HEAD_DIM": head_dim,
        "HEAD_PAD": tiles.head_pad(head_dim),
        "GROUP": group,
        "KV_HEADS": 8,
        "BLOCK_SIZE": 32,
    }


def attention() -> list[Compiled]:
    """Every two-byte tile, the larger float32 ones, and odd shapes."""
    done = []
    for table_arch, pad in DECODE:
        arch = COMPILED_FOR[table_arch]
        done.append(decode(arch, "bf16", DECODE[table_arch, pad], heads(pad, 4)))
        done.append(prefill(arch, "bf16", PREFILL[table_arch, pad], heads(pad, 4)))
    for pad in (128, 256):
        done.append(decode(86, "fp32", tiles.FLOAT32[pad], heads(pad, 1)))
        done.append(prefill(86, "fp32", tiles.FLOAT32[pad], heads(pad, 1)))
    odd = heads(80, 7, 1024)
    done.append(decode(90, "fp16", DECODE[90, 128], odd))
    done.append(prefill(90, "fp16", PREFILL[90, 128], odd))
    # A launch turns other integer arguments that are 1 into constants.
    done.append(prefill(90, "bf16", PREFILL[90, 128], heads(128, 8) | {"kv_stride_block": 1}))
    return done


def row_wise(arch: int) -> list[Compiled]:
    norm = {"SIZE": 5000, "PADDED": 8192}
    rope = {
        "HEADS": 14,
        "KV_HEADS": 2,
        "HALF": 40,
        "HALF_PAD": 64,
        "BLOCK_SIZE": 32,
        "ROWS": rows._HEADS,
    }
    choose = {"VOCAB": 151_936, "CHUNK": sampling._CHUNK}
    write = {"HEAD_DIM": 80, "BLOCK_SIZE": 32, "CHUNK": 1024}
    return [
        compile_kernel(rows._norm_rows, arch, "bf16", norm | {"ADD": True}, num_warps=16),
        compile_kernel(rows._norm_rows, arch, "bf16", norm | {"ADD": False}, num_warps=16),
        compile_kernel(rows._silu_mul, arch, "bf16", {"SIZE": 5000, "CHUNK": 1024}),
        compile_kernel(ROPE, arch, "bf16", rope | {"NORM": True}),
        compile_kernel(ROPE, arch, "bf16", rope | {"NORM": False}),
        compile_kernel(sampling._best_of_chunk, arch, "bf16", choose, num_warps=8),
        compile_kernel(
            sampling._best_of_row, arch, "bf16", {"CHUNKS": 75, "PADDED": 128}, num_warps=1
        ),
        compile_kernel(kv_copy._write_tokens, arch, "bf16", write, num_warps=4),
        compile_kernel(kv_copy._copy_blocks, arch, "bf16", {"CHUNK": 8192}, num_warps=8),
    ]


def compile_all() -> list[Compiled]:
    return [*attention(), *row_wise(80), *row_wise(100)]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compile_all()))
