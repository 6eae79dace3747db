"""Builds gradamp_fast/_C: runs CMake, where everything is decided; never imports torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# A compiler cannot be changed in a CMake build tree, so each choice has a tree of its own.
CHOICES = ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "GRADAMP_CUDA")


def tool(name: str) -> str:
    """Path of cmake or ninja: the wheel's if it can be imported, else the one on PATH."""
    try:
        if name == "cmake":
            from cmake import CMAKE_BIN_DIR as folder
        else:
            from ninja import BIN_DIR as folder
    except ImportError:
        folder = None
    path = shutil.which(name, path=folder) or shutil.which(name)
    if path is None:
        sys.exit(f"gradamp_fast: {name} was not found: {sys.executable} -m pip install {name}")
    return path


def build_folder() -> Path:
    chosen = [sys.prefix, str(shutil.which("nvcc"))]
    chosen += [f"{name}={os.environ.get(name, '')}" for name in CHOICES]
    key = hashlib.sha256("\n".join(chosen).encode()).hexdigest()[:8]
    return ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{key}"


def run(*command: str) -> None:
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        sys.exit("gradamp_fast: the build failed, see above: " + " ".join(command))


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        folder, target = build_folder(), Path(self.get_ext_fullpath(ext.name))
        cmake, jobs = tool("cmake"), os.environ.get("MAX_JOBS")
        run(
            cmake,
            *("-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        )
        run(cmake, "--build", str(folder), *(["--parallel", jobs] if jobs else []))
        target.unlink(missing_ok=True)
        built = folder / target.name
        if built.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, target)


# Optional: without a C++ compiler there is no binary, and the package works without one.
setup(
    ext_modules=[Extension("gradamp_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
