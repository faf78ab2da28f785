"""A conductor and a worker without a model: what the command line needs to see of them.

`python tests/unit/fake_cluster.py conductor|worker BEHAVIOUR` runs one as a process. The worker
lets the conductor know that it lives by a file named after it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

EVENTS = [
    {"id": "r1", "choices": [{"index": 0, "text": "hello", "finish_reason": None}]},
    {"id": "r1", "choices": [{"index": 0, "text": " world", "finish_reason": "length"}]},
    {
        "id": "r1",
        "choices": [],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    },
]


def sse(events: list[dict[str, Any]], done: bool = True) -> bytes:
    lines = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    return b"".join(lines) + (b"data: [DONE]\n\n" if done else b"")


class Handler(BaseHTTPRequestHandler):
    directory: Path

    def do_GET(self) -> None:
        if self.path == "/ready":
            self._send(200, b"{}")
        elif self.path == "/v1/models":
            self._send(200, json.dumps({"data": [{"id": "fake"}]}).encode())
        else:
            workers = [
                {"name": path.name, "state": "live", "pid": int(path.read_text())}
                for path in self.directory.iterdir()
            ]
            self._send(200, json.dumps({"workers": workers}).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._send(200, sse(EVENTS))

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


def run_conductor(directory: Path, announce: bool) -> None:
    Handler.directory = directory
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"127.0.0.1:{server.server_address[1]}"
    signal.signal(
        signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown, daemon=True).start()
    )
    if announce:
        event = {"event": "listening", "http": address, "grpc": "127.0.0.1:1"}
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()
    server.serve_forever(poll_interval=0.02)
    sys.stderr.write("WARNING fake conductor drained\n")


def run_worker(directory: Path, name: str) -> None:
    (directory / name).write_text(str(os.getpid()))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    sys.stdin.read()


def main() -> None:
    role, behaviour, directory, name = sys.argv[1:5]
    if behaviour == "dies":
        sys.exit("the fake reason why it cannot start")
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (Path(directory) / name).write_text(str(os.getpid()))
        sys.stdin.read()
    elif role == "conductor":
        run_conductor(Path(directory), announce=behaviour != "silent")
    else:
        run_worker(Path(directory), name)


if __name__ == "__main__":
    main()
