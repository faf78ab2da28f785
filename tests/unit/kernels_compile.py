"""Compile the kernels for GPUs that are not here; print a JSON list of what was compiled.

Triton brings its own assembler, so no GPU, driver or CUDA toolkit is needed. A process of its own,
because one that interprets Triton kernels cannot compile them.

    python -m tests.unit.kernels_compile
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from baton.kernels import attention_decode, attention_prefill, kv_copy, tiles

POINTERS = {
    **dict.fromkeys(("block_tables", "seq_lens", "query_start", "context_lens"), "*i32"),
    **dict.fromkeys(("slots", "src", "dst"), "*i64"),
    **dict.fromkeys(("partial", "log_sums"), "*fp32"),
}
SPLITS = {"MAX_SPLITS": 32, "MIN_SPLIT": 256}


Compiled = dict[str, str | int]


def compile_kernel(
    kernel: Any, arch: int, dtype: str, constants: dict[str, int], **options: int
) -> Compiled:
    """Compile down to machine code, with those of `constants` that the kernel has as arguments.

    Says how much shared memory (bytes) one program takes.
    """
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "scale_log2":
            signature[name] = "fp32"
        elif "stride" in name or name in ("batch", "splits", "elements"):
            signature[name] = "i32"
        else:
            signature[name] = POINTERS.get(name, f"*{dtype}")
        # As at a launch: pointers and strides are multiples of 16.
        if signature[name].startswith("*") or (signature[name] == "i32" and "stride" in name):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert compiled.asm["cubin"]
    return {"kernel": kernel.__name__, "arch": arch, "shared": compiled.metadata.shared}


def attention(
    arch: int, dtype: str, head_dim: int, group: int, window: int, ones: tuple[str, ...] = ()
) -> list[Compiled]:
    memory = tiles._SMALL if divmod(arch, 10) in tiles._SMALL_GPUS else tiles._LARGE
    pad = max(64, tiles.head_pad(head_dim))
    float32 = tiles._FLOAT32[pad] if dtype == "fp32" else None
    constants = {
        "WINDOW": window,
        "HEAD_DIM": head_dim,
        "HEAD_PAD": tiles.head_pad(head_dim),
        "GROUP": group,
        "BLOCK_SIZE": 32,
        **dict.fromkeys(ones, 1),
    }
    prefill = float32 or tiles._PREFILL[pad, memory]
    decode = float32 or tiles._DECODE[pad, memory]
    return [
        compile_kernel(
            attention_prefill._attend_tiles,
            arch,
            dtype,
            constants
            | {"ROWS": prefill.rows, "TILE_TOKENS": prefill.rows // group, "KEYS": prefill.keys},
            num_warps=prefill.num_warps,
            num_stages=prefill.num_stages,
        ),
        compile_kernel(
            attention_decode._attend_splits,
            arch,
            dtype,
            constants | SPLITS | {"ROWS": 16, "KEYS": decode.keys},
            num_warps=decode.num_warps,
            num_stages=decode.num_stages,
        ),
    ]


def compile_all() -> list[Compiled]:
    """Every two-byte tile for the GPUs that it is for, the larger float32 ones, and all kernels."""
    done = []
    for arch in (80, 86):
        for head_dim in (64, 128, 256):
            done += attention(arch, "bf16", head_dim, group=4, window=0)
    for head_dim in (128, 256):
        done += attention(86, "fp32", head_dim, group=1, window=0)
    done += attention(90, "fp16", 80, group=7, window=1024)
    # A launch turns integer arguments that are 1 into constants: one sequence of one block.
    done += attention(90, "bf16", 128, group=8, window=0, ones=("batch", "table_stride", "splits"))
    join = {"WINDOW": 0, "HEAD_DIM": 80, "HEAD_PAD": 128} | SPLITS
    done.append(compile_kernel(attention_decode._join_splits, 80, "bf16", join, num_warps=4))
    write = {"HEAD_DIM": 80, "BLOCK_SIZE": 32, "CHUNK": 1024}
    done.append(compile_kernel(kv_copy._write_tokens, 80, "bf16", write, num_warps=4))
    done.append(compile_kernel(kv_copy._copy_blocks, 80, "bf16", {"CHUNK": 8192}, num_warps=8))
    return done


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compile_all()))
