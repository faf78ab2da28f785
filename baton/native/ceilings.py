"""What threads of this machine reach at best, measured by the code that has to come close to it.

Every figure is one measurement of a few milliseconds: take the best of several.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_int32, c_int64, c_void_p

from baton.errors import InternalError
from baton.native.library import library

_PEAK_STEPS = 100_000  # 3 ms with AMX, ten times as long without


def matrix_peak(threads: int) -> float:
    """FLOP/s of products whose operands stay in the first-level caches, or in registers."""
    return _rate("baton_matrix_peak", (c_int32, c_int64), threads, _PEAK_STEPS)


def read_bandwidth(threads: int, address: int, nbytes: int) -> float:
    """Bytes/s of reading memory once; `address` is a multiple of 64 and `nbytes` one of 256."""
    return _rate("baton_read_bandwidth", (c_int32, c_void_p, c_int64), threads, address, nbytes)


def product_rate(threads: int, rows: int, out: int, depth: int, repeats: int) -> float:
    """FLOP/s of the best of some products `[rows, depth]` by a packed weight `[out, depth]`."""
    kinds = (c_int32, c_int64, c_int64, c_int64, c_int32)
    return _rate("baton_product_rate", kinds, threads, rows, out, depth, repeats)


def _rate(name: str, kinds: tuple[type, ...], *arguments: int) -> float:
    """Raises InternalError when memory or threads are lacking."""
    function = getattr(library(), name)
    function.restype, function.argtypes = c_int32, (*kinds, POINTER(c_double))
    rate = c_double()
    if function(*arguments, ctypes.byref(rate)):
        raise InternalError(f"{name} failed: memory or threads are lacking")
    return rate.value
