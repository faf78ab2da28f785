"""Block keys: equal for equal prefixes, and for nothing else."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.hashing import KEY_BYTES, block_keys, root_key

ROOT = root_key("model", "float32", 4)
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@settings(deadline=None)
@given(tokens, st.integers(1, 9))
def test_one_key_per_full_block(context: list[int], block_size: int) -> None:
    keys = block_keys(ROOT, context, block_size)
    assert len(keys) == len(context) // block_size
    assert all(len(key) == KEY_BYTES for key in keys)
    assert len(set(keys)) == len(keys)


@settings(deadline=None)
@given(tokens, st.integers(0, 10))
def test_a_chain_can_be_continued_anywhere(context: list[int], blocks: int) -> None:
    whole = block_keys(ROOT, context, 4)
    blocks = min(blocks, len(whole))
    begun = block_keys(ROOT, context[: 4 * blocks], 4)
    parent = begun[-1] if begun else ROOT
    assert begun + block_keys(parent, context[4 * blocks :], 4) == whole


@settings(deadline=None)
@given(tokens, tokens)
def test_keys_agree_exactly_on_the_shared_prefix(one: list[int], two: list[int]) -> None:
    pairs = zip(block_keys(ROOT, one, 4), block_keys(ROOT, two, 4), strict=False)
    for index, (left, right) in enumerate(pairs):
        end = 4 * (index + 1)
        assert (left == right) == (one[:end] == two[:end])


def test_everything_that_shapes_the_numbers_or_the_sharing_is_in_the_root() -> None:
    variants = [
        root_key("model", "float32", 4),
        root_key("other", "float32", 4),
        root_key("model", "bfloat16", 4),
        root_key("model", "float32", 8),
        root_key("model", "float32", 4, quantization="fp8"),
        root_key("model", "float32", 4, cache_salt="tenant"),
        root_key("model", "float32", 4, adapter="tenant"),
        root_key("modelfloat32", "", 4),
    ]
    assert len(set(variants)) == len(variants)


def test_keys_are_the_same_in_every_process_and_version() -> None:
    """Stored blocks and other workers depend on these bytes."""
    assert ROOT.hex() == "583ba3b412568b0d318786902a624a50"
    assert [key.hex() for key in block_keys(ROOT, range(9), 4)] == [
        "ebc387c98ee16a522605b95611fc2363",
        "7288d7d9bb8baccb1ab8254a4f85c00c",
    ]
