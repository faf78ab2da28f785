"""Flags, environment and file map to one dataclass; mistakes are named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from baton.config import flag_of, option, parse_config
from baton.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Config:
    name: str = option("", "who")
    dtype: str = option("auto", "number format", choices=("auto", "float32"))
    num_blocks: int = option(0, "blocks")
    lease_ttl: float = option(3.0, "seconds, 50% of something")
    prefix_caching: bool = option(True, "reuse")
    conductor: tuple[str, ...] = option((), "where")

    def __post_init__(self) -> None:
        if self.num_blocks < 0:
            raise ConfigError("--num-blocks must not be negative")


def parse(*argv: str, environ: Mapping[str, str] | None = None, file: str | None = None) -> Config:
    extra: Sequence[str] = ("--config", file) if file else ()
    return parse_config(Config, [*argv, *extra], environ or {}, "prog")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def write_file(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write_file


def test_defaults() -> None:
    assert parse() == Config()


def test_flags() -> None:
    config = parse(
        *("--name", "w", "--num-blocks", "8", "--lease-ttl=0.5", "--no-prefix-caching"),
        *("--conductor", "a:1,b:2", "--conductor", "c:3", "--dtype", "float32"),
    )
    assert config == Config("w", "float32", 8, 0.5, False, ("a:1", "b:2", "c:3"))


def test_environment() -> None:
    environ = {
        "BATON_NAME": "w",
        "BATON_NUM_BLOCKS": "8",
        "BATON_PREFIX_CACHING": "off",
        "BATON_CONDUCTOR": "a:1, b:2",
        "PATH": "/bin",
    }
    expected = Config(name="w", num_blocks=8, prefix_caching=False, conductor=("a:1", "b:2"))
    assert parse(environ=environ) == expected


def test_file(write: Callable[[str], str]) -> None:
    file = write("name: w\nnum-blocks: 8\nlease_ttl: 2\nprefix_caching: no\nconductor: [a:1]\n")
    expected = Config(
        name="w", num_blocks=8, lease_ttl=2.0, prefix_caching=False, conductor=("a:1",)
    )
    assert parse(file=file) == expected
    assert parse(environ={"BATON_CONFIG": file}) == expected


def test_precedence_is_flag_environment_file_default(write: Callable[[str], str]) -> None:
    file = write("name: file\nnum_blocks: 1\nlease_ttl: 1\n")
    environ = {"BATON_NAME": "environment", "BATON_NUM_BLOCKS": "2"}
    config = parse("--name", "flag", environ=environ, file=file)
    assert (config.name, config.num_blocks, config.lease_ttl) == ("flag", 2, 1.0)


def test_an_empty_file_changes_nothing(write: Callable[[str], str]) -> None:
    assert parse(file=write("# nothing\nname:\n")) == Config()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-block", "8"], "unknown option --num-block; did you mean --num-blocks?"),
        (["--num-blocks", "many"], "--num-blocks needs a whole number, not 'many'"),
        (["--num-blocks", "1.5"], "whole number"),
        (["--lease-ttl", "soon"], "--lease-ttl needs a number"),
        (["--lease-ttl", "nan"], "--lease-ttl needs a number"),
        (["--dtype", "int3"], "--dtype must be one of auto, float32, not 'int3'"),
        (["--num-blocks", "-1"], "must not be negative"),
        (["--name"], "expected one argument"),
        (["--config", "/nowhere/at-all"], "cannot read the configuration file /nowhere/at-all"),
    ],
)
def test_wrong_flags(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        parse(*argv)


def test_wrong_environment() -> None:
    with pytest.raises(ConfigError, match="needs true or false"):
        parse(environ={"BATON_PREFIX_CACHING": "perhaps"})
    with pytest.raises(ConfigError, match="BATON_NUM_BLOKS; did you mean BATON_NUM_BLOCKS"):
        parse(environ={"BATON_NUM_BLOKS": "8"})


def test_variables_of_other_processes_are_left_alone() -> None:
    assert parse(environ={"BATON_CLUSTER_TOKEN": "x", "BATON_HTTP_PORT": "80"}) == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_bloks: 8\n", "unknown key num_bloks; did you mean num_blocks"),
        ("- a\n- b\n", "must hold `key: value` lines, not list"),
        ("a: [\n", "is not YAML"),
        ("num_blocks: true\n", "needs a whole number, not True"),
        ("name: [a, b]\n", "--name needs a text"),
    ],
)
def test_wrong_files(write: Callable[[str], str], text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(file=write(text))


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse("--help")
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    for key in ("name", "num_blocks", "conductor"):
        assert flag_of(key) in shown
    assert "50% of something" in shown
    assert "--no-prefix-caching" in shown


def test_required_options() -> None:
    @dataclass(frozen=True)
    class Required:
        name: str

    with pytest.raises(ConfigError, match=r"required option is missing: .*name"):
        parse_config(Required, [], {}, "prog")


def test_unsupported_field_types_are_found_at_once() -> None:
    @dataclass(frozen=True)
    class Odd:
        values: tuple[int, ...] = ()

    with pytest.raises(TypeError, match="values"):
        parse_config(Odd, [], {}, "prog")
