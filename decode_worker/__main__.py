"""`python -m decode_worker --conductor host:port [...]`"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from baton.types.fleet import Role
from baton.worker.config import WorkerConfig
from baton.worker.start import start

if TYPE_CHECKING:
    from baton.worker.lives import Make


def main() -> None:
    start(WorkerConfig, "python -m decode_worker", lambda _: Role.DECODE, _makes)


def _makes() -> Mapping[Role, Make]:
    from decode_worker.make import over_grpc

    return {Role.DECODE: over_grpc}


if __name__ == "__main__":
    main()
