"""Each native operation against a twin in float32, and its bits against itself."""

from __future__ import annotations

import math

import pytest
import torch

from baton.kernels.reference import kv_write
from baton.model.hf_config import RopeSpec
from baton.model.rope import rope_table
from tests import native_kit as native
from tests.kernels_kit import BLOCK_SIZES, Case, fill, naive, random_queries
from tests.native_kit import Product, needs_native, randn

pytestmark = needs_native

ROWS = (1, 2, 15, 16, 17, 33, 70)
SHAPES = ((16, 32), (48, 64), (50, 96), (33, 40), (257, 200), (512, 1024))  # (out, in)
CLOSE = {"rtol": 1e-2, "atol": 1e-2}
"""One rounding to bfloat16 of values of about one."""


def matrices(rows: int, out: int, depth: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = depth**-0.5
    return randn(rows, depth, seed=1), randn(out, depth, seed=2, scale=scale), randn(out, seed=3)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("out", "depth"), SHAPES)
def test_products(rows: int, out: int, depth: int) -> None:
    x, w, bias = matrices(rows, out, depth)
    plain = x.float() @ w.float().T
    residual = randn(rows, out, seed=4)
    exact = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(native.product(Product.FLOAT32, x, w), plain, **exact)
    for given, added in ((None, 0), (bias, bias.float())):
        wanted = (plain + added).bfloat16()
        torch.testing.assert_close(native.product(Product.PLAIN, x, w, given), wanted, **CLOSE)
        wanted = (residual.float() + plain + added).bfloat16()
        summed = native.product(Product.ADD, x, w, given, residual)
        torch.testing.assert_close(summed, wanted, **CLOSE)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("half", "depth"), [(16, 32), (48, 40), (80, 64), (272, 200)])
@pytest.mark.parametrize("biased", [False, True])
def test_gated_product(rows: int, half: int, depth: int, biased: bool) -> None:
    x, w, bias = matrices(rows, 2 * half, depth)
    given = bias if biased else None
    gate, up = (x.float() @ w.float().T + (bias.float() if biased else 0)).chunk(2, dim=1)
    wanted = (torch.nn.functional.silu(gate) * up).bfloat16()
    torch.testing.assert_close(native.product(Product.SILU, x, w, given), wanted, **CLOSE)


@pytest.mark.parametrize("kind", list(Product))
@pytest.mark.parametrize(("out", "depth"), [(64, 96), (288, 1024), (1056, 200)])
def test_a_row_of_a_product_depends_on_nothing_else(kind: Product, out: int, depth: int) -> None:
    x, w, bias = matrices(70, out, depth)
    bias_or_none = None if kind is Product.FLOAT32 else bias
    residual = randn(70, out, seed=4) if kind is Product.ADD else None
    whole = native.product(kind, x, w, bias_or_none, residual, threads=1)
    for threads in (2, 3):
        assert torch.equal(whole, native.product(kind, x, w, bias_or_none, residual, threads))
    for first, last in ((0, 1), (5, 7), (3, 19), (11, 43), (69, 70)):
        part = None if residual is None else residual[first:last]
        alone = native.product(kind, x[first:last], w, bias_or_none, part, threads=2)
        assert torch.equal(whole[first:last], alone)


@pytest.mark.parametrize(("out", "depth"), SHAPES)
def test_rows_can_be_unpacked(out: int, depth: int) -> None:
    w = randn(out, depth)
    assert torch.equal(native.unpacked(w), w)


@pytest.mark.parametrize("width", [32, 40, 64, 200, 1024])
def test_rms_norm(width: int) -> None:
    x, weight = randn(37, width, scale=3.0), 1 + randn(width, seed=1, scale=0.2)
    result = native.rms_norm(x, weight, 1e-5)
    wanted = torch.nn.functional.rms_norm(x.float(), (width,), weight.float(), 1e-5).bfloat16()
    torch.testing.assert_close(result, wanted, rtol=8e-3, atol=0)
    for threads in (2, 3):
        assert torch.equal(result, native.rms_norm(x, weight, 1e-5, threads))
    assert torch.equal(result[20:21], native.rms_norm(x[20:21], weight, 1e-5))


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_and_write(head_dim: int, normed: bool) -> None:
    rows, heads, kv_heads, block_size, layer = 21, 6, 2, 16, 1
    qkv = randn(rows, (heads + 2 * kv_heads) * head_dim)
    qk_norm = 1 + randn(heads + kv_heads, head_dim, seed=1, scale=0.2) if normed else None
    table = rope_table(RopeSpec(theta=10_000.0, kind="default"), head_dim, 100, "cpu")
    generator = torch.Generator().manual_seed(2)
    positions = torch.randperm(100, generator=generator)[:rows]
    slots = torch.randperm(5 * block_size, generator=generator)[:rows]
    pools = [
        torch.full((5, 2, 2, kv_heads, block_size, head_dim), torch.nan, dtype=torch.bfloat16)
        for _ in range(3)
    ]
    arguments = (heads, qk_norm, table, positions.int(), slots)
    written = native.rope_and_write(qkv, *arguments, pools[0], layer)
    again = native.rope_and_write(qkv, *arguments, pools[1], layer, threads=3)

    qk = qkv.float().view(rows, -1, head_dim)[:, : heads + kv_heads]
    if qk_norm is not None:
        qk = torch.nn.functional.rms_norm(qk, (head_dim,), None, 1e-6) * qk_norm.float()
    cos, sin = table[:, positions, None]
    a, b = qk.chunk(2, dim=-1)
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).bfloat16()
    q = written.view(rows, -1, head_dim)[:, :heads]
    torch.testing.assert_close(q, rotated[:, :heads], **CLOSE)
    v = qkv.view(rows, -1, head_dim)[:, heads + kv_heads :]
    kv_write(rotated[:, heads:], v, pools[2], layer, slots)
    torch.testing.assert_close(pools[0], pools[2], equal_nan=True, **CLOSE)
    assert torch.equal(written, again)
    assert torch.equal(pools[0].isnan(), pools[2].isnan())
    assert torch.equal(pools[0].nan_to_num(), pools[1].nan_to_num())


@pytest.mark.parametrize("width", [1, 15, 16, 100, 5000])
def test_argmax(width: int) -> None:
    logits = torch.randn(9, width, generator=torch.Generator().manual_seed(width))
    assert native.argmax(logits, threads=2) == logits.argmax(dim=1).tolist()
    ties = logits.round()
    assert native.argmax(ties) == [row.tolist().index(row.max()) for row in ties]


def test_argmax_tells_of_what_is_not_finite() -> None:
    logits = torch.zeros(6, 40)
    logits[0, 39] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    logits[3, :39] = -torch.inf
    logits[4, 7], logits[4, 8] = 1.0, -torch.nan
    logits[5] = -3.0e38
    assert native.argmax(logits) == [-1, -1, -1, 39, -1, 0]


CASES = [
    Case(head_dim, group, block_size, window, torch.bfloat16, lengths, kv_heads)
    for (head_dim, group), block_size, window, lengths, kv_heads in zip(
        [
            (32, 1),
            (64, 4),
            (96, 2),
            (128, 2),
            (64, 7),
            (256, 1),
            (32, 8),
            (128, 1),
            (64, 4),
            (96, 3),
        ],
        BLOCK_SIZES * 2,
        [0, 20, 0, 70, 1, 0, 5, 0, 0, 33],
        [(1, 17), (31, 300), (33, 5), (127, 128), (700, 3)] * 2,
        [1, 2] * 5,
        strict=True,
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case) -> None:
    """Of the last tokens of every sequence, in a pool that is NaN wherever nothing was written."""
    filled = fill(case)
    most = 40
    for chunks in ([1] * len(case.lengths), [min(n, most) for n in case.lengths]):
        q = random_queries(case, sum(chunks)).contiguous()
        spans = [
            (chunk, length - chunk, table)
            for chunk, length, table in zip(chunks, case.lengths, filled.block_tables, strict=True)
        ]
        scale = 0.11
        result = native.attention(q, filled.kv, filled.layer, spans, scale, case.window)
        wanted = torch.cat(
            [
                naive(part, k, v, case.window, scale)
                for part, k, v in zip(q.split(chunks), filled.keys, filled.values, strict=True)
            ]
        )
        torch.testing.assert_close(result.double(), wanted, rtol=3e-2, atol=3e-2)
        for threads in (2, 3):
            again = native.attention(q, filled.kv, filled.layer, spans, scale, case.window, threads)
            assert torch.equal(result, again)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("length", [40, 300, 1500])
def test_a_query_attends_alike_in_every_chunk_and_batch(window: int, length: int) -> None:
    case = Case(64, 4, 32, window, torch.bfloat16, (length, 70), 2)
    filled = fill(case)
    q = random_queries(case, length).contiguous()
    table, other = filled.block_tables

    def attend(first: int, last: int, *more: tuple[int, int, torch.Tensor]) -> torch.Tensor:
        rows = torch.cat([q[first:last], q[: sum(count for count, _, _ in more)]])
        spans = [(last - first, first, table), *more]
        result = native.attention(
            rows, filled.kv, filled.layer, spans, math.sqrt(1 / 64), window, threads=2
        )
        return result[: last - first]

    whole = attend(0, length)
    assert bool(whole.isfinite().all())
    for first, last in ((0, 1), (length - 1, length), (5, 38), (17, 33), (length - 20, length)):
        assert torch.equal(attend(first, last), whole[first:last])
        assert torch.equal(attend(first, last, (1, 69, other), (9, 3, other)), whole[first:last])


@pytest.mark.parametrize(
    ("head_dim", "group", "block_size"),
    [(128, 2, 32), (64, 4, 16), (32, 8, 48), (256, 1, 16), (64, 7, 32)],
)
@pytest.mark.parametrize("window", [0, 600])
def test_spans_that_share_blocks_attend_as_they_do_alone(
    head_dim: int, group: int, block_size: int, window: int
) -> None:
    """A prefix in full and partial parts, a longer one that begins with it, and strangers between
    them, with one query or more."""
    generator = torch.Generator().manual_seed(head_dim)
    kv_heads, num_blocks = 2, 400
    shape = (num_blocks, 1, 2, kv_heads, block_size, head_dim)
    kv = torch.randn(shape, generator=generator).bfloat16()

    def blocks(tokens: int) -> torch.Tensor:
        count = -(-tokens // block_size)
        return torch.randint(num_blocks, (count,), generator=generator, dtype=torch.int32)

    common = blocks(1100)
    longer = torch.cat([common, blocks(1300)])
    spans = []
    for index in range(14):
        prefix = (common, longer, blocks(16), longer[: 520 // block_size])[index % 4]
        own = (1, 90, 700)[index % 3]
        queries = (1, 1, 2, 1, 1, 30)[index % 6]
        start = len(prefix) * block_size + own - queries
        spans.append((queries, max(start, 0), torch.cat([prefix, blocks(own + queries)])))
    first = [sum(queries for queries, _, _ in spans[:index]) for index in range(len(spans))]
    rows = first[-1] + spans[-1][0]
    q = torch.randn(rows, kv_heads * group, head_dim, generator=generator).bfloat16()
    together = [native.attention(q, kv, 0, spans, 0.2, window, threads) for threads in (1, 2, 3)]
    for at, span in zip(first, spans, strict=True):
        own_rows = slice(at, at + span[0])
        alone = native.attention(q[own_rows].contiguous(), kv, 0, [span], 0.2, window)
        assert bool(alone.isfinite().all())
        assert all(torch.equal(result[own_rows], alone) for result in together)
