"""Incremental detokenization and stop strings, against decoding everything at once."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.tokenizer import Tokenizer, TokenizerConfig
from conductor.answer_text import AnswerText
from conductor.detokenize import (
    ByteLevelDetokenizer,
    Detokenizer,
    PrefixDetokenizer,
    make_detokenizer,
)
from tests.fake_worker import NUM_TOKENS, tiny_tokenizer
from tests.unit.test_tokenizer import byte_level, sentencepiece

BYTES = tiny_tokenizer()
MERGED = Tokenizer(byte_level(), TokenizerConfig({}))
PIECES = Tokenizer(sentencepiece(), TokenizerConfig({}))

TEXTS = st.text(alphabet=st.sampled_from("hiyou h é€🎼\n"), max_size=30)


def run(detokenizer: Detokenizer, ids: list[int]) -> tuple[list[str], str]:
    pieces = [detokenizer.push(token_id) for token_id in ids]
    return pieces, "".join(pieces) + detokenizer.flush()


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, NUM_TOKENS + 3), max_size=40), skip=st.booleans())
def test_byte_level_equals_full_decode_for_any_ids(ids: list[int], skip: bool) -> None:
    for detokenizer in (ByteLevelDetokenizer(BYTES, skip), PrefixDetokenizer(BYTES, [], skip)):
        assert run(detokenizer, ids)[1] == BYTES.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_pieces_of_valid_text_are_whole_characters(text: str) -> None:
    ids = MERGED.encode(text)
    for detokenizer in (make_detokenizer(MERGED, []), PrefixDetokenizer(MERGED, [])):
        pieces, whole = run(detokenizer, ids)
        assert whole == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(prompt=TEXTS, answer=TEXTS)
def test_sentencepiece_answers_keep_the_space_that_continues_the_prompt(
    prompt: str, answer: str
) -> None:
    prompt_ids = PIECES.encode(prompt)
    ids = PIECES.encode(answer)
    pieces, whole = run(make_detokenizer(PIECES, prompt_ids), ids)
    together = PIECES.decode([*prompt_ids, *ids])
    assert PIECES.decode(prompt_ids) + whole == together
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_cut_off_character_is_replaced_only_at_the_end() -> None:
    for detokenizer in (ByteLevelDetokenizer(BYTES), PrefixDetokenizer(BYTES, [])):
        assert [detokenizer.push(byte) for byte in "🎼".encode()[:3]] == ["", "", ""]
        assert detokenizer.flush() == "\ufffd"
        assert detokenizer.flush() == ""


def test_a_prompt_that_ends_inside_of_a_character_is_no_context() -> None:
    detokenizer = PrefixDetokenizer(PIECES, [0xC3])
    assert run(detokenizer, [257])[1] == "hi"


def make(stop: list[str], min_tokens: int = 0) -> AnswerText:
    return AnswerText(ByteLevelDetokenizer(BYTES), stop, min_tokens)


def feed(text: AnswerText, raw: bytes) -> list[str]:
    return [text.push(byte) for byte in raw]


def test_a_possible_stop_string_is_held_back_until_it_is_clear() -> None:
    text = make(["END"])
    assert feed(text, b"aEN") == ["a", "", ""]
    assert text.push(ord("x")) == "ENx"
    assert not text.stopped


def test_the_earliest_of_several_stop_strings_ends_the_answer() -> None:
    text = make(["world", "lo w"])
    shown = "".join(feed(text, b"hello world"))
    assert shown == "hel"
    assert text.stopped
    assert text.flush() == ""


def test_held_back_text_comes_out_at_the_end() -> None:
    text = make(["END"])
    assert "".join(feed(text, b"EN")) == ""
    assert text.flush() == "EN"


def test_a_stop_string_may_end_in_a_replacement_character() -> None:
    text = make(["\ufffd"])
    assert "".join(feed(text, b"a\xf0\x9f")) == "a"
    assert text.flush() == ""
    assert text.stopped


def test_stop_strings_wait_for_min_tokens() -> None:
    text = make(["a"], min_tokens=3)
    assert "".join(feed(text, b"aab")) == "aab"
    assert feed(text, b"a") == [""]
    assert text.stopped


@settings(max_examples=300, deadline=None)
@given(
    raw=st.binary(max_size=30).map(lambda raw: bytes(b"ab\xc3\xa9"[byte % 4] for byte in raw)),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=3),
)
def test_text_before_the_first_stop_string_is_shown_once(raw: bytes, stop: list[str]) -> None:
    answer = make(stop)
    shown = ""
    whole = ""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for byte in raw:
        shown += answer.push(byte)
        whole += decoder.decode(bytes([byte]))
        if answer.stopped:
            break
    if not answer.stopped:
        whole += decoder.decode(b"", final=True)
        shown += answer.flush()
    ends = [whole.find(word) for word in stop if word in whole]
    assert shown == whole[: min(ends)] if ends else shown == whole
    assert answer.stopped == bool(ends)


@pytest.mark.parametrize("raw", [b"", b"abc", "é🎼".encode()])
def test_length_counts_characters(raw: bytes) -> None:
    text = make([])
    feed(text, raw)
    text.flush()
    assert text.length == len(raw.decode())
