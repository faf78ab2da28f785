"""Text to token ids and back: `tokenizer.json`, its special tokens and the chat template.

Torch-free and transformers-free; it follows the conventions of Hugging Face directories in both
dialects (template inside tokenizer_config.json, or beside it in chat_template.jinja).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from baton.errors import InvalidRequest, ModelLoadError

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """What tokenizer_config.json and its neighbours say beyond tokenizer.json.

    `add_bos` and `add_eos` are None unless the file sets either of them: then the post-processor
    in tokenizer.json decides. Where the two contradict each other the flags win, as the model's
    authors meant them (transformers 4 followed the flags, transformers 5 the post-processor).
    """

    special_tokens: Mapping[str, str]
    chat_template: str | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None


class Tokenizer:
    """One model's tokenizer. Immutable after construction; safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._config = config
        self._template = _compile(config.chat_template) if config.chat_template else None
        self._bytes: dict[int, bytes] = {}

    @cached_property
    def num_tokens(self) -> int:
        """One more than the largest token id (a model's vocabulary may be padded beyond it)."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @cached_property
    def byte_level(self) -> bool:
        """Whether decoding is the concatenation of each token's bytes, whatever its neighbours."""
        decoder = json.loads(self._backend.to_str()).get("decoder") or {}
        inner = decoder.get("decoders", [decoder])
        return len(inner) == 1 and inner[0].get("type") == "ByteLevel"

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the model's begin and end tokens where it wants them."""
        config = self._config
        explicit = config.add_bos is not None or config.add_eos is not None
        native = add_special_tokens and not explicit
        # A batch of one: `encode` would hold the GIL, for many seconds with megabytes of text.
        batch = self._backend.encode_batch_fast([text], add_special_tokens=native)
        ids: list[int] = batch[0].ids
        if add_special_tokens and explicit:
            before = self._special("bos_token") if config.add_bos else []
            after = self._special("eos_token") if config.add_eos else []
            ids = [*before, *ids, *after]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become replacement characters."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for inside a text; empty for an id without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id)
            known = b"" if token is None else self._bytes_of(token)
            self._bytes[token_id] = known
        return known

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt text of a conversation; it already contains its special tokens.

        Raises InvalidRequest when the model has no template or the template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template: send a prompt to /v1/completions instead",
                param="messages",
            )
        given: dict[str, Any] = {"add_generation_prompt": True, "tools": None, "documents": None}
        given.update(self._config.special_tokens)
        given.update(variables)
        try:
            return self._template.render(messages=list(messages), **given)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise InvalidRequest(
                f"the chat template refused these messages: {error}", param="messages"
            ) from error

    def _special(self, name: str) -> list[int]:
        token = self._config.special_tokens.get(name)
        number = None if token is None else self._backend.token_to_id(token)
        return [] if number is None else [number]

    def _bytes_of(self, token: str) -> bytes:
        if self.byte_level:
            if all(char in _BYTE_OF for char in token):
                return bytes(_BYTE_OF[char] for char in token)
            return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()


def load_tokenizer(path: Path) -> Tokenizer:
    """Load from a model directory. Raises ModelLoadError when a file is missing or broken."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelLoadError(f"{path} has no tokenizer.json: is it a Hugging Face directory?")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ModelLoadError(f"{file} cannot be read: {error}") from error
    return Tokenizer(backend, _load_config(path))


def _load_config(path: Path) -> TokenizerConfig:
    data = _read_json(path / "tokenizer_config.json")
    special = {**_read_json(path / "special_tokens_map.json"), **data}
    explicit = "add_bos_token" in data or "add_eos_token" in data
    tokens = {name: _content(special.get(name)) for name in _SPECIAL_NAMES}
    return TokenizerConfig(
        special_tokens={name: token for name, token in tokens.items() if token is not None},
        chat_template=_find_template(path, data),
        add_bos=bool(data.get("add_bos_token", False)) if explicit else None,
        add_eos=bool(data.get("add_eos_token", False)) if explicit else None,
    )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ModelLoadError(f"{file} must hold a JSON object")
    return data


def _content(token: object) -> str | None:
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _find_template(path: Path, data: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = data.get("chat_template")
    if isinstance(template, list):  # several named templates: [{"name", "template"}]
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks answers for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (declared so by the base class)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = time.strftime
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ModelLoadError(f"the chat template cannot be compiled: {error}") from error


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which would end up in the prompt.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _byte_alphabet() -> dict[str, int]:
    """Printable stand-ins for all bytes in byte-level BPE vocabularies (GPT-2, Radford 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _byte_alphabet()
