"""Puts two vLLM engines together as one prefill and one decode server (its NixlConnector).

As vLLM documents it: the prefill engine answers one token and where its KV lies
(`kv_transfer_params`); the same request with that goes to the decode engine, whose stream is passed
through. Only as much of HTTP as the benchmark's client uses.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import orjson

from bench.client import ready
from bench.wire import ResponseParser

_HOST = "127.0.0.1"
_PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def _post(port: int, body: dict[str, Any]) -> bytes:
    content = orjson.dumps(body)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {_HOST}:{port}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def prefill_body(body: dict[str, Any]) -> dict[str, Any]:
    """What the prefill engine is asked."""
    kept = {key: value for key, value in body.items() if key != "stream_options"}
    return {**kept, "stream": False, "max_tokens": 1, "kv_transfer_params": _PREFILL}


class Proxy:
    """Answers POST as above, and GET with 200 when both engines are healthy."""

    def __init__(self, prefill_port: int, decode_port: int) -> None:
        self._prefill_port = prefill_port
        self._decode_port = decode_port

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET"):
                await self._health(writer)
            else:
                fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
                content = await reader.readexactly(int(fields[b"content-length"]))
                await self._complete(orjson.loads(content), writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # either side went away: the other one learns by its closed connection
        finally:
            writer.close()

    async def _health(self, writer: asyncio.StreamWriter) -> None:
        ports = (self._prefill_port, self._decode_port)
        healthy = [await ready(_HOST, port, "/health") for port in ports]
        status = b"200 OK" if all(healthy) else b"503 Not Ready"
        writer.write(b"HTTP/1.1 %s\r\ncontent-length: 0\r\n\r\n" % status)
        await writer.drain()

    async def _complete(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        answer = await self._prefill(prefill_body(body))
        params = orjson.loads(answer.body).get("kv_transfer_params") if answer.body else None
        if answer.status != 200 or params is None:
            message = answer.body or b"the prefill engine gave no kv_transfer_params"
            writer.write(
                b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: %d\r\n\r\n%s"
                % (len(message), message)
            )
            return
        reader, decode = await asyncio.open_connection(_HOST, self._decode_port)
        try:
            decode.write(_post(self._decode_port, {**body, "kv_transfer_params": params}))
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        finally:
            decode.close()

    async def _prefill(self, body: dict[str, Any]) -> ResponseParser:
        reader, writer = await asyncio.open_connection(_HOST, self._prefill_port)
        parser = ResponseParser()
        try:
            writer.write(_post(self._prefill_port, body))
            while not parser.ended and (data := await reader.read(1 << 16)):
                parser.feed(data)
        finally:
            writer.close()
        return parser


async def _serve(options: argparse.Namespace) -> None:
    proxy = Proxy(options.prefill, options.decode)
    async with await asyncio.start_server(proxy.handle, _HOST, options.port) as server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.vllm_proxy", description=__doc__)
    for name in ("port", "prefill", "decode"):
        parser.add_argument(f"--{name}", type=int, required=True)
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
