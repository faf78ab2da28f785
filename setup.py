"""Builds the CPU's native operations; everything else about the package is in pyproject.toml.

Optional: where there is no compiler, or it cannot make them, baton is installed without them and
computes through torch. They are plain C++ behind a C interface: no header of Python or torch.
"""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("baton/native/src")
# What `baton.native.library` looks for before it loads a library.
AVX512 = "avx2 fma bmi2 f16c lzcnt avx512f avx512bw avx512vl avx512dq avx512bf16"
# GCC 12 warns about its own header's undefined vectors (GCC bug 105593).
WARNINGS = "-Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized"


def native(name: str, cpu: str, *defined: str) -> Extension:
    return Extension(
        f"baton.native.{name}",
        sources=sorted(map(str, SOURCES.glob("*.cpp"))),
        depends=sorted(map(str, SOURCES.glob("*.h"))),
        extra_compile_args=[
            *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden"),
            *(f"-m{feature}" for feature in cpu.split()),
            *(f"-D{macro}" for macro in defined),
            *WARNINGS.split(),
        ],
        extra_link_args=["-pthread", "-Wl,-z,defs"],
        optional=True,
    )


class BuildNative(build_ext):
    """Objects of each extension in a folder of its own: they come from the same sources."""

    def build_extension(self, ext: Extension) -> None:
        shared = self.build_temp
        self.build_temp = str(Path(shared) / ext.name)
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = shared


# The same operations with AMX, and for CPUs without it.
EXTENSIONS = [
    native("_core", f"{AVX512} amx-tile amx-bf16"),
    native("_core_avx512", AVX512, "BATON_AVX512"),
]
SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"

setup(ext_modules=EXTENSIONS if SUPPORTED else [], cmdclass={"build_ext": BuildNative})
