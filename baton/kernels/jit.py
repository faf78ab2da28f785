"""Triton, where it is installed: it is an extra, and every module here imports without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from baton.errors import ConfigError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = None


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or without Triton the function itself, which `require_triton` keeps unused."""
    return function if triton is None else triton.jit(function)


def require_triton(device: str) -> None:
    """Raise ConfigError, with what to do, unless Triton kernels can run on tensors of `device`."""
    if triton is None:
        raise ConfigError(
            "the Triton kernels need the package triton, which is not installed; install it with "
            "`pip install 'baton-llm[cuda]'`, or choose the kernels 'reference'"
        )
    if not device.startswith("cuda") and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"the Triton kernels cannot run on device {device!r}; choose the kernels 'reference', "
            "or set TRITON_INTERPRET=1 to run them in Triton's interpreter (for tests: it is slow)"
        )
