"""Find the fastest tiles of the attention kernels on this GPU and store them in the table.

    python -m tools.tune_kernels                      measure, print, rewrite the table
    python -m tools.tune_kernels --dry-run            measure and print
    python -m tools.tune_kernels --compare            Triton's prefill next to torch's own

Needs a GPU that nothing else uses; takes some minutes, most of them compiling. Every candidate is
timed on a few shapes, relative to the fastest on each; the best on the whole is kept.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import torch

from baton.kernels import attention_decode, attention_prefill, flash, tile_table, tiles
from baton.kernels.tile_table import Tile

HEAD_DIMS = (64, 128, 256)
BLOCK_SIZE = 32
KV_HEADS, GROUP = 8, 4
DECODES = ((1, 8192), (8, 2048), (64, 1024), (256, 512))
"""(sequences, tokens each): from one long one to many short ones."""
PREFILLS = ((2048, 0), (512, 7680), (8192, 0))
"""(tokens, context before them)."""

Timer = Callable[[Callable[[], object]], float]
"""Seconds, or any other unit, that a call takes on the GPU."""


def prefill_tiles() -> Iterator[Tile]:
    for rows, keys, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        yield Tile(rows, keys, warps, stages)


def decode_tiles() -> Iterator[Tile]:
    for keys, warps, stages, programs in product(
        (32, 64, 128), (2, 4, 8), (2, 3, 4), (1, 2, 3, 4, 6)
    ):
        yield Tile(16, keys, warps, stages, programs)


def best_tile(
    candidates: Sequence[Tile], shapes: Sequence[Callable[[Tile], float | None]]
) -> tuple[Tile, float]:
    """The tile with the least geometric mean, over shapes, of its time relative to the fastest
    there; and that mean. A shape's function gives None for a tile that does not run."""
    times = [[shape(tile) for tile in candidates] for shape in shapes]
    scores: dict[int, float] = {}
    for index in range(len(candidates)):
        logs = []
        for row in times:
            time = row[index]
            if time is None:
                break
            logs.append(math.log(time / min(t for t in row if t is not None)))
        else:
            scores[index] = math.exp(sum(logs) / len(logs))
    if not scores:
        raise SystemExit("no candidate ran on this GPU")
    index = min(scores, key=lambda i: scores[i])
    return candidates[index], scores[index]


def rewritten(
    source: str,
    arch: int,
    found: Mapping[str, Mapping[int, Tile]],
    measured_on: str,
) -> str:
    """The text of the table with the tiles of one architecture replaced. `found` maps "PREFILL" and
    "DECODE" to tiles by head size."""
    head, _, _ = source.partition("SOURCES: dict[int, str] = {")
    sources = {**tile_table.SOURCES, arch: measured_on}
    lines = ["SOURCES: dict[int, str] = {"]
    lines += [f'    {key}: "{value}",' for key, value in sources.items()]
    lines += ["}", "", "# (architecture, head_pad), for two-byte types"]
    for name, table in (("PREFILL", tile_table.PREFILL), ("DECODE", tile_table.DECODE)):
        merged = {**table, **{(arch, pad): tile for pad, tile in found[name].items()}}
        lines.append(f"{name}: dict[tuple[int, int], Tile] = {{")
        lines += [f"    {key}: {_literal(name, tile)}," for key, tile in merged.items()]
        lines += ["}", ""]
    return head + "\n".join(lines).rstrip() + "\n"


def _literal(table: str, tile: Tile) -> str:
    text = (
        f"Tile(rows={tile.rows}, keys={tile.keys}, num_warps={tile.num_warps}, "
        f"num_stages={tile.num_stages}"
    )
    return text + (f", programs={tile.programs})" if table == "DECODE" else ")")


def gpu_time(run: Callable[[], object]) -> float:
    """Median milliseconds on the GPU, with a cold L2 cache."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=60, return_mode="median"))


def _pool(head_dim: int, tokens: int) -> torch.Tensor:
    blocks = -(-tokens // BLOCK_SIZE)
    shape = (blocks, 1, 2, KV_HEADS, BLOCK_SIZE, head_dim)
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _tables(batch: int, tokens: int) -> torch.Tensor:
    width = -(-tokens // BLOCK_SIZE)
    order = torch.randperm(batch * width, device="cuda", dtype=torch.int64)
    return order.view(batch, width).to(torch.int32)


def decode_shape(head_dim: int, batch: int, tokens: int) -> Callable[[], object]:
    kv, tables = _pool(head_dim, batch * tokens), _tables(batch, tokens)
    q = torch.randn(batch, KV_HEADS * GROUP, head_dim, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((batch,), tokens, device="cuda", dtype=torch.int32)
    attend = attention_decode.PagedDecode()
    return lambda: attend(q, kv, 0, tables, lengths, head_dim**-0.5)


def prefill_shape(
    head_dim: int,
    tokens: int,
    context: int,
    attend: Callable[..., object] = attention_prefill.attention_prefill,
) -> Callable[[], object]:
    kv, tables = _pool(head_dim, tokens + context), _tables(1, tokens + context)
    q = torch.randn(tokens, KV_HEADS * GROUP, head_dim, device="cuda", dtype=torch.bfloat16)
    starts = torch.tensor([0, tokens], device="cuda", dtype=torch.int32)
    contexts = torch.tensor([context], device="cuda", dtype=torch.int32)
    return lambda: attend(q, kv, 0, tables, starts, contexts, head_dim**-0.5)


def timed(
    table: dict[tuple[int, int], Tile],
    key: tuple[int, int],
    run: Callable[[], object],
    timer: Timer,
) -> Callable[[Tile], float | None]:
    """A shape's time with a tile, which stands in the table while it is measured."""

    def measure(tile: Tile) -> float | None:
        from triton.runtime.errors import OutOfResources

        before, table[key] = table[key], tile
        try:
            return timer(run)
        except OutOfResources:
            return None
        finally:
            table[key] = before

    return measure


def tune(arch: int, timer: Timer) -> dict[str, dict[int, Tile]]:
    found: dict[str, dict[int, Tile]] = {"PREFILL": {}, "DECODE": {}}
    for pad in HEAD_DIMS:
        for name, table, candidates, shapes in (
            ("DECODE", tile_table.DECODE, decode_tiles(), [decode_shape(pad, *s) for s in DECODES]),
            (
                "PREFILL",
                tile_table.PREFILL,
                prefill_tiles(),
                [prefill_shape(pad, *s) for s in PREFILLS],
            ),
        ):
            measures = [timed(table, (arch, pad), run, timer) for run in shapes]
            tile, score = best_tile(list(candidates), measures)
            stored = [measure(table[arch, pad]) for measure in measures]
            found[name][pad] = tile
            print(f"{name} {pad}: {tile}, {score:.3f} of the best per shape; stored one: {stored}")
    return found


def compare(timer: Timer) -> None:
    for head_dim, (tokens, context) in product((64, 128), PREFILLS):
        ours = timer(prefill_shape(head_dim, tokens, context))
        try:
            theirs = timer(prefill_shape(head_dim, tokens, context, flash.attention_prefill))
        except RuntimeError as error:
            print(f"torch's FlashAttention does not read this pool: {error}")
            return
        print(
            f"head {head_dim}, {tokens} after {context}: Triton {ours:.3f}, flash {theirs:.3f} ms"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="do not rewrite the table")
    parser.add_argument("--compare", action="store_true", help="prefill: Triton and flash")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA GPU on this machine")
    if options.compare:
        compare(gpu_time)
        return
    arch = tiles.architecture(torch.cuda.get_device_capability())
    found = tune(arch, gpu_time)
    if not options.dry_run:
        path = Path(tile_table.__file__)
        name = torch.cuda.get_device_name()
        path.write_text(rewritten(path.read_text(encoding="utf-8"), arch, found, name), "utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
