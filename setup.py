"""Builds the CPU's native operations; everything else about the package is in pyproject.toml.

Optional: where there is no compiler, or it cannot make them, baton is installed without them and
computes through torch. They are plain C++ behind a C interface: no header of Python or torch.
"""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("baton/native/src")
# What `baton.native.library` looks for before it loads the library.
CPU = "avx2 fma bmi2 f16c lzcnt avx512f avx512bw avx512vl avx512dq avx512bf16 amx-tile amx-bf16"
# GCC 12 warns about its own header's undefined vectors (GCC bug 105593).
WARNINGS = "-Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized"

NATIVE = Extension(
    "baton.native._core",
    sources=sorted(map(str, SOURCES.glob("*.cpp"))),
    depends=sorted(map(str, SOURCES.glob("*.h"))),
    extra_compile_args=[
        *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden"),
        *(f"-m{feature}" for feature in CPU.split()),
        *WARNINGS.split(),
    ],
    extra_link_args=["-pthread", "-Wl,-z,defs"],
    optional=True,
)

SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"

setup(ext_modules=[NATIVE] if SUPPORTED else [])
