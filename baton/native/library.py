"""The shared libraries behind ctypes: which can be used here, and their C interface.

There are two from the same sources: for AMX, and for AVX-512 BF16 without it. Structures and
numbers mirror `src/model.h`; `_INTERFACE` is compared with a library's own.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from baton.errors import InternalError

_INTERFACE = 3
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16")
VARIABLE = "BATON_NATIVE"
"""Environment: the name of the only variant to be used."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the libraries: what it computes products with, and the CPU flags that this takes."""

    name: str
    title: str
    file: str  # without suffix
    cpu_flags: tuple[str, ...]


VARIANTS = (
    Variant("amx", "AMX", "_core", ("amx_tile", "amx_bf16", *_AVX512)),
    Variant("avx512", "AVX-512 BF16", "_core_avx512", _AVX512),
)
"""The fastest first."""


class Weight(IntEnum):
    """From INPUT_NORM on there is one per layer."""

    EMBEDDING = 0
    NORM = 1
    HEAD = 2
    COS = 3
    SIN = 4
    INPUT_NORM = 5
    QKV = 6
    QKV_BIAS = 7
    QK_NORM = 8
    OUTPUT = 9
    OUTPUT_BIAS = 10
    POST_NORM = 11
    GATE_UP = 12
    GATE_UP_BIAS = 13
    DOWN = 14
    DOWN_BIAS = 15


OPERATIONS = (
    "embed",
    "norm",
    "qkv",
    "rope and KV write",
    "attention",
    "output",
    "MLP up",
    "MLP down",
    "logits",
    "sample",
    "waiting",
)


class CModelShape(ctypes.Structure):
    _fields_ = (
        *(
            (name, c_int64)
            for name in (
                *("vocab", "layers", "hidden", "intermediate"),
                *("heads", "kv_heads", "head_dim", "positions"),
            )
        ),
        ("eps", c_float),
        ("scale", c_float),
        *((name, c_int32) for name in ("qkv_bias", "output_bias", "mlp_bias", "qk_norm", "tied")),
    )


class CBatch(ctypes.Structure):
    _fields_ = (
        ("rows", c_int64),
        ("spans", c_int64),
        ("tokens", c_void_p),
        ("queries", c_void_p),
        ("starts", c_void_p),
        ("table_sizes", c_void_p),
        ("sampled", c_void_p),
        ("blocks", c_void_p),
    )


class CPool(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("blocks", c_int64), ("block_size", c_int64))


class CProfile(ctypes.Structure):
    _fields_ = (
        ("cycles", c_uint64 * len(OPERATIONS)),
        ("total", c_uint64),
        ("nanoseconds", c_uint64),
        ("steps", c_uint64),
    )


_SIGNATURES = {
    "baton_interface": (c_int32, ()),
    "baton_ready": (c_int32, ()),
    "baton_error": (c_char_p, ()),
    "baton_why_not": (c_char_p, (POINTER(CModelShape),)),
    "baton_model_new": (
        c_int32,
        (POINTER(CModelShape), c_void_p, c_int32, c_void_p, c_int32, POINTER(c_void_p)),
    ),
    "baton_model_free": (None, (c_void_p,)),
    "baton_model_load": (c_int32, (c_void_p, c_int32, c_int64, c_void_p, c_int64)),
    "baton_model_forward": (
        c_int32,
        (
            *(c_void_p, POINTER(CBatch), POINTER(CPool), c_int64, c_int64),
            *(c_void_p, c_int64, c_void_p),
        ),
    ),
    "baton_model_profile": (None, (c_void_p, POINTER(CProfile))),
}


@functools.cache
def variant() -> Variant | None:
    """The library that is used here: the first that can be, unless VARIABLE names one."""
    return next((each for each in _wanted() if why_not(each) is None), None)


def unavailable() -> str | None:
    """Why this machine or this installation cannot run the native operations; None if it can."""
    if variant() is not None:
        return None
    wanted = _wanted()
    if not wanted:
        names = " or ".join(each.name for each in VARIANTS)
        return f"{VARIABLE} is {os.environ[VARIABLE]!r}, not {names}"
    return why_not(wanted[-1])  # the one that takes least


def why_not(variant: Variant) -> str | None:
    """Why a library cannot be used here; None if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"only made for Linux on x86-64, and this is {sys.platform} on {platform.machine()}"
    missing = [flag for flag in variant.cpu_flags if flag not in _cpu_flags()]
    if missing:
        return f"this CPU lacks {', '.join(missing)}"
    path = library_path(variant)
    if path is None:
        return "it was not built at installation (that takes a C++20 compiler)"
    try:
        loaded = ctypes.CDLL(str(path))
        interface = loaded.baton_interface()
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded: {error}"
    if interface != _INTERFACE:
        return f"{path.name} was built from another version: install baton again"
    if not loaded.baton_ready():
        return f"the kernel does not let processes use {variant.title}"
    return None


def library_path(variant: Variant) -> Path | None:
    """Where a built library lies, if there is one."""
    here = Path(__file__)
    paths = (here.with_name(variant.file + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises InternalError where it is `unavailable()`."""
    chosen = variant()
    path = None if chosen is None else library_path(chosen)
    if path is None:
        raise InternalError(f"the native operations cannot be used: {unavailable()}")
    loaded = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def check(code: int) -> None:
    """Raises InternalError with the library's message when `code` says that a call failed."""
    if code:
        raise InternalError(f"native operation failed: {library().baton_error().decode()}")


def _wanted() -> list[Variant]:
    name = os.environ.get(VARIABLE)
    return [each for each in VARIANTS if not name or each.name == name]


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.split())
