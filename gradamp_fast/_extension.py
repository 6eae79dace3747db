"""Finds and loads the compiled part, ``gradamp_fast._C``; without one the package still works."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

_FOLDER = Path(__file__).parent
_BUILD_INFO = re.compile(rb"gradamp_fast build \{\n(.*?)\n\}", re.DOTALL)


def _binary(folder: Path | None = None) -> Path | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (path := (folder or _FOLDER) / f"_C{suffix}").is_file():
            return path
    return None


def _passed_over() -> Path | None:
    """The folder of a gradamp_fast with a binary behind this one on Python's path.

    So it is where Python runs in a clone and the package was installed elsewhere.
    """
    folders = (Path(entry, "gradamp_fast") for entry in sys.path)
    return next((folder for folder in folders if folder != _FOLDER and _binary(folder)), None)


def built_with() -> dict[str, str]:
    """What the binary was built with, without loading it; empty if there is no binary.

    Keys: ``torch`` (such as ``"2.14.1+cu130"``), ``cuda`` (``"13.0"``, or ``""`` if it holds no
    CUDA kernels), ``archs`` (``"8.0 9.0+PTX"``), ``cxx`` (the compiler) and ``summary`` (what was
    built, and why no more than that: pip does not show what the build says).
    """
    binary = _binary()
    found = _BUILD_INFO.search(binary.read_bytes()) if binary else None
    if found is None:
        return {}
    return dict(item.split("=", 1) for item in found[1].decode().splitlines())


def _rebuild_command() -> str:
    # Without these pip has to fetch them, which it does in isolation alone.
    tools = ("setuptools", "cmake", "ninja", "pybind11")
    at_hand = all(importlib.util.find_spec(tool) for tool in tools)
    isolation = " --no-build-isolation" if at_hand else ""
    pip = f"{sys.executable} -m pip install{isolation} --no-deps"
    source = _FOLDER.parent
    if (source / "setup.py").is_file() and (source / "CMakeLists.txt").is_file():
        return f"{pip} -e {source}"
    return f"{pip} --no-cache-dir --force-reinstall <the source folder of gradamp_fast>"


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    if _binary() is None and (other := _passed_over()):
        return None, (
            f"Python found the sources in {_FOLDER}, which hold no compiled extension, before the "
            f"installed gradamp_fast in {other}: run it in another folder than {_FOLDER.parent}, "
            f"or install from there so that the sources are used: {_rebuild_command()}"
        )
    if _binary() is None:
        return None, (
            f"gradamp_fast has no compiled extension for Python {sys.version.split()[0]} in "
            f"{_FOLDER}: it was installed without a C++ compiler, or before torch. "
            f"Install both, then build it: {_rebuild_command()}"
        )
    torch_then = built_with().get("torch", "unknown")
    builds = (
        f"gradamp_fast's compiled extension was built with torch {torch_then}, and torch "
        f"{torch.__version__} is running"
    )
    if _minor(torch_then) != _minor(torch.__version__):
        return None, f"{builds}. Rebuild it: {_rebuild_command()}"
    try:
        return importlib.import_module("gradamp_fast._C"), None
    except ImportError as error:
        return None, f"{builds}; it does not load ({error}). Rebuild it: {_rebuild_command()}"


def check_lists(extension: ModuleType, expected: Mapping[str, object]) -> None:
    """RuntimeError if the extension was built from sources that name or order things otherwise."""
    for name, ours in expected.items():
        theirs = getattr(extension, name, None)
        if theirs != ours:
            raise RuntimeError(
                f"gradamp_fast's compiled extension has {name} {theirs}, and the package {ours}: "
                f"rebuild gradamp_fast: {_rebuild_command()}"
            )


def load() -> ModuleType | None:
    """The compiled extension, or None if there is none for this torch; never raises."""
    return _load()[0]


def reason() -> str | None:
    """Why ``load()`` returned None, with the command that mends it; None if it did not."""
    return _load()[1]
