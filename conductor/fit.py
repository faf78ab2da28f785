"""Whether a worker or a store may join the fleet: one protocol, one model, one layout of KV."""

from __future__ import annotations

from collections.abc import Iterable

from baton import __version__
from baton.errors import LayoutMismatch, ProtocolMismatch
from baton.types.fleet import PROTOCOL, WorkerInfo


def check_fit(info: WorkerInfo, others: Iterable[WorkerInfo], fingerprint: str | None) -> None:
    """Raises ProtocolMismatch or LayoutMismatch, naming both sides. `others`: who is live;
    `fingerprint`: of the model that the conductor has the tokenizer of, if it knows one."""
    if info.protocol != PROTOCOL:
        raise ProtocolMismatch(
            f"{info.role} {info.name} runs baton {info.version or 'of an older version'} (protocol "
            f"{info.protocol}), but this conductor runs {__version__} (protocol {PROTOCOL}): "
            "start both from the same version"
        )
    if fingerprint is not None and info.layout.model != fingerprint:
        raise LayoutMismatch(
            f"worker {info.name} serves {info.model_name} ({info.layout.describe()}), but "
            f"this conductor serves the model with fingerprint {fingerprint[:12]}: "
            "start both with the same model"
        )
    for other in others:
        if other.name != info.name and other.layout != info.layout:
            raise LayoutMismatch(
                f"worker {info.name} has {info.layout.describe()}, but worker {other.name} of "
                f"this fleet has {other.layout.describe()}: start both with the same settings"
            )
