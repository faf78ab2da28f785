"""Keys and tenants over real HTTP: who is let in, to what, and how much of it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.fake_worker import Script, echo, fake_server, say, wait_for
from tests.tenants_kit import Files, ask, client_of, key_line, key_of, until_status

SECRET_PROMPT = "the quick brown secret"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def limited(name: str = "small", **limits: int) -> dict[str, Any]:
    return {"name": name, "limits": limits}


async def test_a_key_opens_its_tenants_door(files: Files) -> None:
    files.write_tenants({"name": "a"}, {"name": "b"})
    async with files.server() as cluster:
        for key in (key_of("a"), key_of("b")):
            assert (await ask(cluster, key)).status_code == 200
        for wrong in (None, "bt-nobody", key_of("a") + "x", key_of("a")[:-1], "x" * 5000):
            response = await ask(cluster, wrong)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.json()["error"]["type"] == "authentication_error"
        async with client_of(cluster, None) as client:
            for path in ("/health", "/ready", "/metrics", "/cluster", "/openapi.json"):
                assert (await client.get(path)).status_code == 200, path
            metrics = (await client.get("/metrics")).text
        assert "baton_unauthenticated_total 5.0" in metrics
        assert 'baton_tenant_tokens_total{kind="output",tenant="a"} 6.0' in metrics


async def test_openai_sees_its_own_errors(files: Files) -> None:
    files.write_tenants(limited(requests_per_minute=1), {"name": "elsewhere", "models": ["other"]})
    async with files.server() as cluster:

        async def complete(key: str) -> Any:
            async with openai.AsyncOpenAI(
                base_url=f"{cluster.url}/v1", api_key=key, max_retries=0, timeout=20
            ) as client:
                return await client.completions.create(model="tiny", prompt="x", max_tokens=3)

        with pytest.raises(openai.AuthenticationError):
            await complete("wrong")
        with pytest.raises(openai.PermissionDeniedError) as denied:
            await complete(key_of("elsewhere"))
        assert denied.value.code == "model_not_allowed"
        await complete(key_of("small"))
        with pytest.raises(openai.RateLimitError) as limit:
            await complete(key_of("small"))
        assert limit.value.code == "rate_limit_exceeded"
        headers = limit.value.response.headers
        assert 55 <= int(headers["retry-after"]) <= 61
        assert headers["x-ratelimit-limit-requests"] == "1"
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert 55 <= float(headers["x-ratelimit-reset-requests"].rstrip("s")) <= 61


async def test_what_was_reserved_and_not_used_comes_back(files: Files) -> None:
    files.write_tenants(
        limited(input_tokens_per_minute=1000, output_tokens_per_minute=100, requests_per_minute=50)
    )
    async with files.server(say("four")) as cluster:
        for number in range(1, 4):
            response = await ask(cluster, key_of("small"), max_tokens=90)
            assert response.status_code == 200, response.text
            headers = response.headers
            assert headers["x-ratelimit-limit-input-tokens"] == "1000"
            assert headers["x-ratelimit-remaining-input-tokens"] == str(1000 - 5 * number)
            assert headers["x-ratelimit-remaining-requests"] == str(50 - number)
            # Settled with 5 tokens when the last was sent; the header may be older than that.
            assert headers["x-ratelimit-remaining-output-tokens"] in (
                str(100 - 5 * number),
                str(10 - 5 * (number - 1)),
            )
            assert headers["x-ratelimit-limit-tokens"] == "100"
        refused = await ask(cluster, key_of("small"), max_tokens=90)
        assert refused.status_code == 429
        assert "output tokens" in refused.json()["error"]["message"]
        assert (await ask(cluster, key_of("small"), max_tokens=85)).status_code == 200


async def test_a_stream_has_the_headers_too(files: Files) -> None:
    files.write_tenants(limited(output_tokens_per_minute=100))
    async with files.server() as cluster:
        response = await ask(cluster, key_of("small"), stream=True)
        assert response.status_code == 200
        assert response.headers["x-ratelimit-limit-tokens"] == "100"
        assert response.headers["x-ratelimit-remaining-tokens"] == "90"
        wrong = await ask(cluster, key_of("small"), temperature=7)
        assert wrong.status_code == 400
        assert wrong.headers["x-ratelimit-remaining-tokens"] == "94"


async def test_requests_at_once_are_limited_and_a_client_that_goes_makes_room(
    files: Files,
) -> None:
    files.write_tenants(limited(concurrent_requests=2))
    async with (
        files.server(lambda task: Script(task.prompt, hang_at=1)) as cluster,
        client_of(cluster, key_of("small")) as client,
    ):

        async def begin() -> httpx.Response:
            body = {"model": "tiny", "prompt": "hello", "stream": True, "max_tokens": 10}
            request = client.build_request("POST", "/v1/completions", json=body)
            return await client.send(request, stream=True)

        first, second = await begin(), await begin()
        third = await ask(cluster, key_of("small"))
        assert third.status_code == 429
        assert third.json()["error"]["code"] == "rate_limit_exceeded"
        await first.aclose()
        await wait_for(lambda: cluster.conductor.running == 1)
        again = await begin()
        assert again.status_code == 200
        await again.aclose()
        await second.aclose()


async def test_a_request_that_failed_without_a_token_costs_nothing(files: Files) -> None:
    files.write_tenants(limited(input_tokens_per_minute=8, requests_per_minute=1))
    broken = asyncio.Event()

    def script(task: Any) -> Script:
        return Script(task.prompt, error_at=0) if broken.is_set() else echo(task)

    async with files.server(script) as cluster:
        broken.set()
        assert (await ask(cluster, key_of("small"))).status_code == 500
        broken.clear()
        assert (await ask(cluster, key_of("small"))).status_code == 200
        assert (await ask(cluster, key_of("small"))).status_code == 429


async def test_what_can_never_be_let_in_is_no_429(files: Files) -> None:
    files.write_tenants(
        limited(input_tokens_per_minute=4),
        {"name": "short", "max_prompt_tokens": 4, "max_output_tokens": 7},
    )
    async with files.server() as cluster:
        for tenant, code in (("small", "prompt_exceeds_limit"), ("short", "prompt_too_long")):
            response = await ask(cluster, key_of(tenant))
            assert response.status_code == 400
            assert response.json()["error"]["code"] == code
        too_long = await ask(cluster, key_of("short"), prompt="abc", max_tokens=8)
        assert too_long.json()["error"]["code"] == "max_tokens_too_large"
        answer = await ask(cluster, key_of("short"), prompt="abcd", max_tokens=None)
        assert answer.json()["usage"]["completion_tokens"] == 5
        assert (await ask(cluster, key_of("short"), prompt="ab", max_tokens=7)).status_code == 200


async def test_tenants_do_not_share_kv_and_do_not_jump_the_queue(files: Files) -> None:
    files.write_tenants(
        {"name": "a", "priority": 3},
        {"name": "b"},
        {"name": "c", "cache_salt": "common"},
        {"name": "d", "cache_salt": "common"},
    )
    async with files.server() as cluster:
        seen: dict[str, tuple[str, int]] = {}
        for who in "abcd":
            for salt, priority in (("", 0), ("x", -5), ("", 9)):
                await ask(cluster, key_of(who), cache_salt=salt, priority=priority)
                task = cluster.workers["decode-0"].tasks[-1]
                seen[f"{who}{salt}{priority}"] = task.cache_salt, task.priority
        salts = {name: salt for name, (salt, _) in seen.items()}
        assert salts["a0"] == salts["a9"]
        assert len({salts["a0"], salts["b0"], salts["ax-5"], salts["bx-5"], ""}) == 5
        assert salts["c0"] == salts["d0"] != salts["a0"]
        assert [seen[f"a{which}"][1] for which in ("0", "x-5", "9")] == [3, 3, 9]
        assert [seen[f"b{which}"][1] for which in ("0", "x-5", "9")] == [0, 0, 9]


async def test_what_belongs_to_another_tenant_is_not_there(files: Files) -> None:
    files.write_tenants({"name": "a"}, {"name": "b"}, {"name": "boss", "admin": True})
    async with files.server() as cluster:
        assert (await ask(cluster, key_of("a"), request_id="mine")).status_code == 200
        for who, status in (("a", 200), ("b", 404), ("boss", 200)):
            async with client_of(cluster, key_of(who)) as client:
                assert (await client.get("/trace/mine")).status_code == status


async def test_another_tenant_cannot_go_on_with_a_stream(files: Files) -> None:
    files.write_tenants({"name": "a"}, {"name": "b"})
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 10, "stream": True}
    async with files.server() as cluster:
        async with client_of(cluster, key_of("a")) as client:
            text = (await client.post("/v1/completions", json=body)).text
        event_id = next(line[4:] for line in text.splitlines() if line.startswith("id: "))
        for who, status in (("b", 400), ("a", 200)):
            async with client_of(cluster, key_of(who)) as client:
                headers = {"last-event-id": event_id}
                response = await client.post("/v1/completions", json=body, headers=headers)
                assert response.status_code == status, response.text


async def test_models_of_others(files: Files) -> None:
    files.write_tenants({"name": "a", "models": ["tiny"]}, {"name": "b", "models": ["big"]})
    async with files.server() as cluster:
        for who, names in (("a", ["tiny"]), ("b", [])):
            async with client_of(cluster, key_of(who)) as client:
                listed = (await client.get("/v1/models")).json()["data"]
                assert [model["id"] for model in listed] == names
                status = 200 if names else 403
                assert (await client.get("/v1/models/tiny")).status_code == status
                for path, body in (("tokenize", {"prompt": "x"}), ("detokenize", {"tokens": [1]})):
                    assert (await client.post(f"/{path}", json=body)).status_code == status


async def test_private_status(files: Files) -> None:
    files.write_tenants({"name": "a"}, {"name": "boss", "admin": True})
    async with files.server(private_status=True) as cluster:
        for path in ("/metrics", "/cluster"):
            for key, status in ((None, 401), (key_of("a"), 403), (key_of("boss"), 200)):
                async with client_of(cluster, key) as client:
                    assert (await client.get(path)).status_code == status
        async with client_of(cluster, None) as client:
            assert (await client.get("/health")).status_code == 200


async def test_keys_and_tenants_change_without_a_restart(
    files: Files, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("conductor.tenants.directory.POLL_S", 0.02)
    files.write_tenants({"name": "a"})
    async with files.server() as cluster:
        old, new = key_of("a"), key_of("a", 1)
        assert (await ask(cluster, new)).status_code == 401
        files.write(files.keys, key_line("a") + key_line("a", 1))
        await until_status(cluster, new, 200)
        assert (await ask(cluster, old)).status_code == 200
        files.write(
            files.keys, key_line("a", 1) + key_line("b") + key_line("a", 2, "2020-01-01T00:00:00Z")
        )
        await until_status(cluster, old, 401)
        assert (await ask(cluster, key_of("b"))).status_code == 401  # there is no such tenant
        assert (await ask(cluster, key_of("a", 2))).status_code == 401  # its time has passed
        files.write_tenants({"name": "a"}, {"name": "b"})
        await until_status(cluster, key_of("b"), 200)
        files.write(files.keys, f"# broken\n{key_of('a', 9)}\n")
        await wait_for(lambda: "keys.txt, line 2" in caplog.text)
        assert key_of("a", 9) not in caplog.text
        assert (await ask(cluster, new)).status_code == 200
        files.keys.unlink()
        await wait_for(lambda: "cannot read" in caplog.text)
        assert (await ask(cluster, new)).status_code == 200


async def test_logs_have_neither_keys_nor_prompts(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    files.write_tenants(limited(requests_per_minute=3), {"name": "a"})

    def script(task: Any) -> Script:
        return Script(task.prompt, error_at=2) if task.cache_salt else echo(task)

    async with files.server(script) as cluster:
        for key in (key_of("a"), key_of("small"), key_of("small"), "bt-unknown"):
            for more in ({}, {"stream": True}, {"temperature": 9}, {"stop": SECRET_PROMPT * 50}):
                await ask(cluster, key, prompt=SECRET_PROMPT, **more)
    for secret in (SECRET_PROMPT, "bt-a", "bt-small", "bt-unknown"):
        assert secret not in caplog.text
    assert repr(cluster.conductor.tenancy.directory.tenants).count("cache_salt") == 0


async def test_a_conductor_without_keys_says_so_when_strangers_reach_it(
    caplog: pytest.LogCaptureFixture, files: Files
) -> None:
    async with fake_server():
        pass
    assert "no API key" not in caplog.text
    async with fake_server(host="0.0.0.0"):
        pass
    assert caplog.text.count("no API key is asked for") == 1
    caplog.clear()
    async with fake_server(grpc_host="0.0.0.0"):
        pass
    assert "no API key is asked for" in caplog.text
    caplog.clear()
    files.write_tenants({"name": "a"})
    async with files.server(host="0.0.0.0"):
        pass
    assert "no API key" not in caplog.text
