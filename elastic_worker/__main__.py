"""`python -m elastic_worker --role prefill --conductor host:port [...]`"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.config import option
from baton.types.fleet import Role
from baton.worker.config import WorkerConfig
from baton.worker.start import start

if TYPE_CHECKING:
    from baton.worker.lives import Make


@dataclass(frozen=True, slots=True)
class ElasticConfig(WorkerConfig):
    """Of a worker that can change its role."""

    role: str = option("prefill", "what it begins as", choices=("prefill", "decode"))


def main() -> None:
    start(ElasticConfig, "python -m elastic_worker", lambda config: Role(config.role), _makes)


def _makes() -> Mapping[Role, Make]:
    from decode_worker import make as decode
    from prefill_worker import make as prefill

    return {Role.PREFILL: prefill.over_grpc, Role.DECODE: decode.over_grpc}


if __name__ == "__main__":
    main()
