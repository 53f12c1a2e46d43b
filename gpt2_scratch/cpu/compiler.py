"""Compiles the C files beside it for the host CPU."""

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


def can_compile() -> bool:
    """Whether to expect `build` to work: on Linux, with AVX2 or AVX512 and a C compiler ($CC, or else `cc`)."""
    registers = torch.backends.cpu.get_cpu_capability()
    return sys.platform == "linux" and registers.startswith("AVX") and shutil.which(compiler()[0]) is not None


def compiler() -> list[str]:
    """The command, such as ["ccache", "gcc"]."""
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


def build(source: str, *flags: str) -> Any:
    """A C file of this folder as a library; None if it cannot be compiled."""
    if not can_compile():
        return None
    fixed = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-nodefaultlibs"]
    if torch.backends.cpu.get_cpu_capability() == "AVX2":  # no AVX-512, or ATEN_CPU_CAPABILITY=avx2
        fixed.append("-mno-avx512f")
    try:
        # Link with the OpenMP library that torch has loaded: two thread pools would compete for the cores.
        openmp: Any = re.search(r"/.*/lib(gomp|iomp5|omp)\b.*", Path("/proc/self/maps").read_text())
        with tempfile.TemporaryDirectory() as folder:
            path, file = Path(__file__).with_name(source), f"{folder}/{source}.so"
            command = [*compiler(), *fixed, *flags, path, openmp[0], "-o", file]
            subprocess.run(command, check=True, capture_output=True)
            return ctypes.CDLL(file)  # stays loaded after its file is deleted
    except (OSError, TypeError, subprocess.CalledProcessError):
        return None
