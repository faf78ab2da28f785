"""The tokenizer against transformers' conventions, on small tokenizers made here."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from baton.errors import InvalidRequest, ModelLoadError
from baton.tokenizer import Tokenizer, load_tokenizer
from tests.fake_worker import bytes_to_chars

MESSAGES = [{"role": "system", "content": "be <b>"}, {"role": "user", "content": "hi 'x'"}]
PLAIN_TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


def byte_level(bos_by_processor: bool = False) -> tokenizers.Tokenizer:
    chars = bytes_to_chars()
    vocab = {chars[byte]: byte for byte in range(256)} | {"he": 256, "ll": 257}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("l", "l")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens(["<tool>"])
    if bos_by_processor:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 258)]
        )
    return backend


def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2: spaces are ▁, bytes fall back to <0xNN>, the decoder strips one space."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "▁hi", "▁you", "h", "i", "y", "o", "u", "<unk>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def save(
    path: Path,
    backend: tokenizers.Tokenizer | None = None,
    template_file: str | None = None,
    **config: Any,
) -> Path:
    (backend or byte_level()).save(str(path / "tokenizer.json"))
    values = {"bos_token": "<s>", "eos_token": "</s>"} | config
    (path / "tokenizer_config.json").write_text(json.dumps(values))
    if template_file is not None:
        (path / "chat_template.jinja").write_text(template_file)
    return path


def load(path: Path, **kwargs: Any) -> Tokenizer:
    return load_tokenizer(save(path, **kwargs))


def test_text_goes_there_and_back(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    ids = tokenizer.encode("hello, wörld 🎼")
    assert ids[:2] == [256, 257]
    assert tokenizer.decode(ids) == "hello, wörld 🎼"
    assert b"".join(map(tokenizer.token_bytes, ids)) == "hello, wörld 🎼".encode()
    assert tokenizer.num_tokens == 261
    assert tokenizer.special_ids == {258, 259}
    assert tokenizer.byte_level


def test_special_tokens_are_left_out_on_request(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    ids = [258, *b"a", 260, 259]
    assert tokenizer.decode(ids) == "a<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>a<tool></s>"


def test_bytes_of_special_unknown_and_padded_ids(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    assert tokenizer.token_bytes(260) == b"<tool>"
    assert tokenizer.token_bytes(9999) == b""


@pytest.mark.parametrize(
    ("config", "by_processor", "expected"),
    [
        ({}, False, b"ab"),
        ({}, True, (258, *b"ab")),
        ({"add_bos_token": True}, False, (258, *b"ab")),
        ({"add_bos_token": True, "add_eos_token": True}, True, (258, *b"ab", 259)),
        ({"add_bos_token": False}, True, b"ab"),
    ],
)
def test_begin_and_end_tokens_as_the_config_says(
    tmp_path: Path, config: dict[str, bool], by_processor: bool, expected: Any
) -> None:
    tokenizer = load(tmp_path, backend=byte_level(by_processor), **config)
    assert tokenizer.encode("ab") == list(expected)
    assert tokenizer.encode("ab", add_special_tokens=False) == list(b"ab")


def test_sentencepiece_style(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, backend=sentencepiece())
    assert not tokenizer.byte_level
    assert tokenizer.decode([257, 258]) == "hi you"
    assert tokenizer.token_bytes(257) == b" hi"
    assert tokenizer.token_bytes(0xC3) == b"\xc3"
    assert tokenizer.decode([0xC3, 0xA9]) == "é"


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    assert len(load(tmp_path, backend=backend).encode("abcdef")) == 6


@pytest.mark.parametrize(
    "template",
    [
        PLAIN_TEMPLATE,
        "{{ bos_token }}{% for m in messages %}\n    {% if m['role'] == 'user' %}\n"
        "[{{ m['content'] | tojson }}]{{ eos_token }}\n    {% else %}\nS:{{ m['content'] }}\n"
        "    {% endif %}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}"
        "{% endfor %}{{ tools is none }}{{ documents is defined }}",
        "{{ strftime_now('%Y') }}",
    ],
)
def test_templates_render_as_with_transformers(tmp_path: Path, template: str) -> None:
    path = save(tmp_path, chat_template=template, tokenizer_class="TokenizersBackend")
    ours = load_tokenizer(path).render_chat(MESSAGES)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(path)).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    assert ours == theirs


def test_where_the_template_may_be(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert load(tmp_path, chat_template=named).render_chat(MESSAGES) == "D"
    in_file = load(tmp_path, chat_template="config", template_file="file")
    assert in_file.render_chat(MESSAGES) == "file"
    without = load_tokenizer(_without_template(tmp_path))
    with pytest.raises(InvalidRequest, match="no chat template"):
        without.render_chat(MESSAGES)


def _without_template(path: Path) -> Path:
    (path / "chat_template.jinja").unlink()
    return save(path, bos_token={"content": "<s>", "lstrip": False})


def test_special_tokens_may_be_objects_and_in_their_own_file(tmp_path: Path) -> None:
    save(tmp_path, chat_template="{{ bos_token }}{{ eos_token }}")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ bos_token }}{{ eos_token }}"})
    )
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    )
    assert load_tokenizer(tmp_path).render_chat(MESSAGES) == "<s></s>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_refuses_is_the_client_s_error(tmp_path: Path, template: str) -> None:
    tokenizer = load(tmp_path, chat_template=template)
    with pytest.raises(InvalidRequest, match="chat template refused"):
        tokenizer.render_chat(MESSAGES)


def test_broken_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load_tokenizer(tmp_path)
    save(tmp_path, chat_template="{% for %}")
    with pytest.raises(ModelLoadError, match="cannot be compiled"):
        load_tokenizer(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ModelLoadError, match="tokenizer_config"):
            load_tokenizer(tmp_path)


def test_current_time_is_local(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, chat_template="{{ strftime_now('%Y-%m') }}")
    assert tokenizer.render_chat(MESSAGES) == time.strftime("%Y-%m")


def test_long_texts_are_encoded_without_holding_the_gil(tmp_path: Path) -> None:
    """Else one long prompt stops every stream and lets the workers' leases run out."""
    tokenizer = load_tokenizer(save(tmp_path, byte_level()))
    ended: list[float] = []

    def encode() -> None:
        tokenizer.encode("hello " * 200_000)
        ended.append(time.perf_counter())

    thread = threading.Thread(target=encode)
    start = last = time.perf_counter()
    thread.start()
    longest = 0.0
    while not ended:
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    longest = max(longest, time.perf_counter() - last)
    thread.join()
    assert longest < 0.5 * (ended[0] - start)  # this thread went on meanwhile
