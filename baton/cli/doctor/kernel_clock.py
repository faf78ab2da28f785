"""What the kernel knows of its clock: adjtimex(2)."""

from __future__ import annotations

import ctypes

_TIME_ERROR = 5  # the return value while nothing keeps the clock in step


class _Timex(ctypes.Structure):
    """The beginning of `struct timex`; the rest is room."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("rest", ctypes.c_byte * 256),
    )


def kernel_clock() -> tuple[bool, float]:
    """(whether it is kept in step, seconds that it may be wrong by at most). Raises OSError."""
    found = _Timex()  # modes 0: nothing is changed
    library = ctypes.CDLL(None, use_errno=True)
    state = library.adjtimex(ctypes.byref(found))
    if state < 0:
        raise OSError(ctypes.get_errno(), "adjtimex")
    return state != _TIME_ERROR, found.maxerror / 1e6
