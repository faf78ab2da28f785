"""Triton, where it is installed: it is an extra, and every module here imports without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, overload

import torch

from baton.errors import ConfigError, InternalError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = None

__all__ = [
    "check_operands",
    "check_pool",
    "constant",
    "jit",
    "on_device_of",
    "require_triton",
    "tl",
]

_OLDEST_GPU = (8, 0)
"""Ampere: the first with bfloat16 and with asynchronous copies into shared memory."""


@overload
def jit(function: Callable[..., Any]) -> Any: ...


@overload
def jit(*, varying: tuple[str, ...]) -> Callable[[Callable[..., Any]], Any]: ...


def jit(function: Callable[..., Any] | None = None, *, varying: tuple[str, ...] = ()) -> Any:
    """`triton.jit`, or without Triton the function itself, which `require_triton` keeps unused.

    `varying` names integer arguments that change from step to step: Triton would compile a kernel
    anew, in the middle of serving, when one of them first is 1 or first divides by 16.
    """
    if function is None:
        return partial(_jit, varying=varying)
    return _jit(function, varying)


def _jit(function: Callable[..., Any], varying: tuple[str, ...]) -> Any:
    return function if triton is None else triton.jit(function, do_not_specialize=list(varying))


def constant(value: int) -> Any:
    """A global that kernels may use."""
    return value if triton is None else tl.constexpr(value)


def require_triton(device: str) -> None:
    """Raise ConfigError, with what to do, unless the Triton kernels can run on `device`."""
    if triton is None:
        raise ConfigError(
            "the Triton kernels need the package triton, which is not installed; install it with "
            "`pip install 'baton-llm[cuda]'`, or choose the kernels 'reference'"
        )
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device {device!r} was asked for, but torch sees no CUDA GPU; use the device "
                "'cpu', or install a CUDA build of torch and check the driver with nvidia-smi"
            )
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST_GPU:
            raise ConfigError(
                f"the Triton kernels need compute capability {_OLDEST_GPU[0]}.{_OLDEST_GPU[1]} or "
                f"newer, and {device!r} has {capability[0]}.{capability[1]}; choose the kernels "
                "'reference'"
            )
    elif os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"the Triton kernels cannot run on device {device!r}; choose the kernels 'reference', "
            "or set TRITON_INTERPRET=1 to run them in Triton's interpreter (for tests: it is slow)"
        )


def on_device_of(kv: torch.Tensor) -> AbstractContextManager[object]:
    """Make the pool's GPU the current one: Triton launches there, whatever its arguments say."""
    return torch.cuda.device(kv.device) if kv.is_cuda else nullcontext()


def check_pool(kv: torch.Tensor) -> None:
    """Raise InternalError unless kernels may compute addresses in the pool from its shape."""
    if kv.dim() != 6 or kv.shape[2] != 2 or not kv.is_contiguous():
        raise InternalError(
            "the KV pool must be contiguous [num_blocks, num_layers, 2, kv_heads, block_size, "
            f"head_dim], got shape {tuple(kv.shape)} with strides {kv.stride()}"
        )


def check_operands(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """`q` with neighbouring elements of a head side by side, checked against the pool."""
    check_pool(kv)
    if q.dtype != kv.dtype or q.shape[2] != kv.shape[5] or q.shape[1] % kv.shape[3]:
        raise InternalError(
            f"queries {tuple(q.shape)} {q.dtype} do not fit the pool {tuple(kv.shape)} {kv.dtype}"
        )
    return q if q.stride(2) == 1 else q.contiguous()
