"""API keys at rest, in a file and in Redis, and the command that makes them."""

from __future__ import annotations

import asyncio
import json
import secrets
import stat
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from baton.cli.main import app
from baton.errors import ConfigError
from baton.keys.file import KeyFile, read_keys
from baton.keys.key import (
    ApiKey,
    KeySet,
    digest_of,
    new_key,
    parse_duration,
    parse_key,
)
from baton.keys.store import KeyStore, open_redis_keys
from baton.rpc.redis_options import RedisOptions
from tests.redis_server import BINARY, WHY_NOT, RedisServer, redis_server

needs_redis = pytest.mark.skipif(BINARY is None, reason=WHY_NOT)
run = CliRunner().invoke


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(params=["file", pytest.param("redis", marks=needs_redis)])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[KeyStore]:
    if request.param == "file":
        (tmp_path / "keys").write_text("")
        kept: KeyStore = KeyFile(tmp_path / "keys")
    else:
        url = request.getfixturevalue("server").url
        kept = open_redis_keys(RedisOptions(url, cluster=secrets.token_hex(4)))
    yield kept
    await kept.aclose()


def test_keys_cannot_be_guessed_and_are_recognised() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("bt-") and len(key) == 46 for key in made)


def test_a_key_is_found_by_its_digest_until_its_time() -> None:
    key = ApiKey("a", digest_of("bt-x"), expires_s=100.0)
    known = KeySet([key])
    assert known.find("bt-x", 99.9) == key
    assert known.find("bt-x", 100.0) is None
    assert known.find("bt-y", 0.0) is None
    assert known.find("\ud800", 0.0) is None
    assert "bt-x" not in repr(key)


def test_a_line_is_a_key_and_back() -> None:
    for expires_s in (None, 1_800_000_000.0):
        key = ApiKey("team-1.x", digest_of("k"), expires_s)
        assert parse_key(str(key)) == key
    assert parse_key(f"a {digest_of('k').upper()}") == ApiKey("a", digest_of("k"))


@pytest.mark.parametrize(
    "line",
    ["a", "a b", "a b c d e", f"../a {'0' * 64}", f"a {'0' * 63}", f"a {'g' * 64}",
     f"a {'0' * 64} tomorrow", f"a {'0' * 64} 2026-01-01T00:00:00", "bt-secret bt-secret"],
)  # fmt: skip
def test_what_is_no_key_is_refused_without_repeating_it(line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_key(line)
    assert "bt-secret" not in refused.value.message


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("2m", 120), ("1h", 3600), ("2d", 86400 * 2)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "-1s", "1w", "1.5h"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ConfigError, match="is no time"):
        parse_duration(text)


async def test_keys_are_added_changed_and_taken_out(store: KeyStore) -> None:
    one, two = ApiKey("a", digest_of("1")), ApiKey("b", digest_of("2"))
    await store.add(one)
    await store.add(two)
    assert set((await store.read()).keys) == {one, two}
    assert await store.replace(one.id, lambda key: replace(key, expires_s=5.0)) == one
    assert replace(one, expires_s=5.0) in (await store.read()).keys
    await store.replace(one.id, lambda _: None)
    assert (await store.read()).keys == (two,)
    with pytest.raises(ConfigError, match="no key"):
        await store.replace(one.id, lambda _: None)


@needs_redis
async def test_every_change_in_redis_has_another_number(server: RedisServer) -> None:
    kept = open_redis_keys(RedisOptions(server.url, cluster=secrets.token_hex(4)))
    assert await kept.version() == 0
    key = ApiKey("a", digest_of("1"))
    await kept.add(key)
    version, known = await kept.read_with_version()
    assert (version, known.keys) == (1, (key,))
    await kept.replace(key.id, lambda _: None)
    assert await kept.version() == 2
    await kept.aclose()


async def test_comments_and_order_stay(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    old = ApiKey("a", digest_of("1"))
    path.write_text(f"# ours\n\n{old}  # of the bot\nb {digest_of('2')}")  # no newline at its end
    await KeyFile(path).add(ApiKey("c", digest_of("3")))
    assert path.read_text().splitlines()[:2] == ["# ours", ""]
    assert [key.tenant for key in read_keys(path).keys] == ["a", "b", "c"]
    await KeyFile(path).replace(old.id, lambda _: None)
    assert path.read_text().startswith("# ours\n\nb ")


def test_a_new_file_is_for_its_owner(tmp_path: Path) -> None:
    asyncio.run(KeyFile(tmp_path / "new").add(ApiKey("a", digest_of("1"))))
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_two_who_write_at_once_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("")

    def add_some(tenant: str) -> None:
        for number in range(20):
            asyncio.run(KeyFile(path).add(ApiKey(tenant, digest_of(f"{tenant}{number}"))))

    threads = [threading.Thread(target=add_some, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_keys(path)) == 40


@pytest.mark.parametrize("content", [b"\xff\xfe", b"# ok\nwrong line here now\n"])
def test_a_wrong_file_says_where(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"keys(, line 2: | is not UTF-8)"):
        read_keys(path)


def test_the_command_with_a_file(tmp_path: Path) -> None:
    where = ["--file", str(tmp_path / "keys")]
    made = json.loads(run(app, ["keys", "create", "a", "--json", *where]).stdout)
    assert made["key"] not in (tmp_path / "keys").read_text()
    assert digest_of(made["key"]) in (tmp_path / "keys").read_text()
    plain = run(app, ["keys", "create", "b", "--expires", "1h", *where])
    assert plain.stdout.startswith("bt-")
    assert plain.stdout.count("\n") == 1
    rotated = json.loads(run(app, ["keys", "rotate", made["id"], "--json", *where]).stdout)
    assert (rotated["tenant"], rotated["expires"]) == ("a", None)
    listed = json.loads(run(app, ["keys", "list", "--json", *where]).stdout)
    assert [bool(key["expires"]) for key in listed] == [True, True, False]
    assert made["key"] not in json.dumps(listed)
    assert run(app, ["keys", "revoke", made["id"], *where]).exit_code == 0
    assert len(read_keys(tmp_path / "keys")) == 2
    assert "ended" not in run(app, ["keys", "list", *where]).stdout


@needs_redis
def test_the_command_with_redis(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_REDIS", server.url)
    monkeypatch.setenv("BATON_CLUSTER_NAME", secrets.token_hex(4))
    made = json.loads(run(app, ["keys", "create", "a", "--json"]).stdout)
    assert json.loads(run(app, ["keys", "list", "--json"]).stdout)[0]["id"] == made["id"]
    assert run(app, ["keys", "revoke", made["id"]]).exit_code == 0
    assert json.loads(run(app, ["keys", "list", "--json"]).stdout) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["create", "a b", "--file", "x"], "tenant's name"),
        (["create", "a", "--file", "/nowhere/at/all"], "cannot open"),
        (["create", "a", "--expires", "soon", "--file", "x"], "is no time"),
        (["list", "--file", "/nowhere"], "cannot read"),
        (["list"], "--file FILE or --redis URL"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BATON_REDIS", raising=False)
    done = run(app, ["keys", *arguments])
    assert isinstance(done.exception, ConfigError)
    assert says in done.exception.message
