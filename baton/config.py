"""One frozen dataclass per process; flags, BATON_* variables and a YAML file all map to it.

    @dataclass(frozen=True, slots=True)
    class Config:
        name: str = option("", "name in logs and in the fleet")
        num_blocks: int = option(0, "blocks in the pool; 0 = from free memory")

    config = parse_config(Config, sys.argv[1:], os.environ, "python -m decode_worker")

`num_blocks` is `--num-blocks`, `BATON_NUM_BLOCKS` and the file's key `num_blocks`. Precedence:
flag, environment, file (`--config FILE` or BATON_CONFIG), default. Field types: str, int, float,
bool, tuple[str, ...] (repeat the flag, or separate by commas).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml

from baton.errors import ConfigError

T = TypeVar("T")

PREFIX = "BATON_"
FILE_KEY = "config"


def option(default: Any, help: str, choices: Sequence[str] = ()) -> Any:
    """A configuration field with its help text and, for strings, its allowed values."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": tuple(choices)})


def parse_config(cls: type[T], argv: Sequence[str], environ: Mapping[str, str], prog: str) -> T:
    """Build `cls` from all sources. Raises ConfigError (also from `cls.__post_init__`).

    `--help` prints and exits, as usual. Variables of the BATON_ family that `cls` does not know are
    left to other processes, unless one looks like a misspelling.
    """
    parsers = _parsers(cls)
    flags = _read_flags(cls, argv, prog)
    variables = _read_environ(parsers, environ)
    file = flags.pop(FILE_KEY, None) or variables.pop(FILE_KEY, None)
    values = {**_read_file(parsers, file), **variables, **flags}
    try:
        return cls(**{key: parsers[key](value, key) for key, value in values.items()})
    except TypeError as error:
        raise ConfigError(f"{prog}: a required option is missing: {error}") from error


def require(holds: bool, key: str, what: str) -> None:
    """For `__post_init__`. Raises ConfigError: the option must be `what`."""
    if not holds:
        raise ConfigError(f"{flag_of(key)} must be {what}")


def flag_of(key: str) -> str:
    return "--" + key.replace("_", "-")


Parser = Callable[[object, str], object]


def _parsers(cls: type) -> dict[str, Parser]:
    hints = get_type_hints(cls)
    return {field.name: _parser(field, hints[field.name]) for field in _fields(cls)}


def _fields(cls: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)


def _parser(field: dataclasses.Field[Any], hint: Any) -> Parser:
    choices = field.metadata.get("choices", ())
    if hint is str and choices:
        return lambda value, key: _one_of(str(value), key, choices)
    try:
        return {
            str: _parse_str,
            int: _parse_int,
            float: _parse_float,
            bool: _parse_bool,
            tuple[str, ...]: _parse_strings,
        }[hint]
    except KeyError:
        raise TypeError(
            f"field {field.name} has a type that configuration cannot express"
        ) from None


def _one_of(value: str, key: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ConfigError(f"{flag_of(key)} must be one of {', '.join(choices)}, not {value!r}")
    return value


def _parse_str(value: object, key: str) -> str:
    if isinstance(value, (dict, list)):
        raise ConfigError(f"{flag_of(key)} needs a text, not {value!r}")
    return str(value)


def _parse_int(value: object, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ConfigError(f"{flag_of(key)} needs a whole number, not {value!r}")
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{flag_of(key)} needs a whole number, not {value!r}") from None


def _parse_float(value: object, key: str) -> float:
    try:
        number = float(value) if isinstance(value, (int, float, str)) else float("nan")
    except ValueError:
        number = float("nan")
    if number != number or isinstance(value, bool):
        raise ConfigError(f"{flag_of(key)} needs a number, not {value!r}")
    return number


_BOOLS = {"1": True, "true": True, "yes": True, "on": True}
_BOOLS |= {"0": False, "false": False, "no": False, "off": False}


def _parse_bool(value: object, key: str) -> bool:
    if isinstance(value, bool):
        return value
    try:
        return _BOOLS[str(value).lower()]
    except KeyError:
        raise ConfigError(f"{flag_of(key)} needs true or false, not {value!r}") from None


def _parse_strings(value: object, key: str) -> tuple[str, ...]:
    parts = value if isinstance(value, list) else [value]
    texts = [_parse_str(part, key) for part in parts]
    return tuple(item.strip() for text in texts for item in text.split(",") if item.strip())


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")


def _read_flags(cls: type, argv: Sequence[str], prog: str) -> dict[str, Any]:
    """The options that were given, as texts (or bool, or list of texts)."""
    parser = _ArgumentParser(prog=prog, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options")
    hints = get_type_hints(cls)
    for field in _fields(cls):
        parser.add_argument(flag_of(field.name), **_argument(field, hints[field.name]))
    known, unknown = parser.parse_known_args(list(argv))
    if unknown:
        flags = [flag_of(field.name) for field in _fields(cls)]
        raise ConfigError(f"{prog}: unknown option {unknown[0]}{_suggest(unknown[0], flags)}")
    return vars(known)


def _argument(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    text = field.metadata.get("help", "").replace("%", "%%")
    shown = "" if field.default in ("", (), dataclasses.MISSING) else f" (default: {field.default})"
    common: dict[str, Any] = {
        "dest": field.name,
        "help": text + shown,
        "default": argparse.SUPPRESS,
    }
    if hint is bool:
        return {**common, "action": argparse.BooleanOptionalAction}
    if hint == tuple[str, ...]:
        return {**common, "action": "append"}
    metavar = "|".join(field.metadata.get("choices", ())) or field.name.upper()
    return {**common, "metavar": metavar}


def _read_environ(keys: Iterable[str], environ: Mapping[str, str]) -> dict[str, Any]:
    names = {PREFIX + key.upper(): key for key in (*keys, FILE_KEY)}
    for name in environ:
        if not name.startswith(PREFIX) or name in names:
            continue
        if difflib.get_close_matches(name, names, cutoff=0.92):
            raise ConfigError(f"unknown environment variable {name}{_suggest(name, names)}")
    return {key: environ[name] for name, key in names.items() if name in environ}


def _read_file(keys: Iterable[str], path: str | None) -> dict[str, Any]:
    if not path:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, not {type(content).__name__}")
    allowed = list(keys)
    values = {str(key).replace("-", "_"): value for key, value in content.items()}
    for key in values:
        if key not in allowed:
            raise ConfigError(f"{path}: unknown key {key}{_suggest(key, allowed)}")
    return {key: value for key, value in values.items() if value is not None}


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.split("=")[0], list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
