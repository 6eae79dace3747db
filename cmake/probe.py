"""What CMake has to know about the torch of this interpreter and the nvcc to use with it.

Run as ``python -I probe.py``; prints ``set(NAME [=[value]=])`` lines. ``-I`` ignores
PYTHONPATH, which is where pip puts its isolated build environment: what is found is the torch
that will load the extension. Whether CUDA sources are compiled is decided by nvcc alone, never
by the presence of a GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

DEFAULT_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
ARCH_NAMES = {  # the names torch.utils.cpp_extension knows, for the architectures that still are
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;12.0+PTX",
}
NVCC_WHEELS = ("cuda-nvcc", "cuda-cccl", "cuda-crt", "nvvm", "cuda-runtime")


class CannotBuild(Exception):
    """Why a part of the extension cannot be built, with the fix."""


def torch_facts() -> dict[str, str]:
    try:
        import torch
    except Exception as error:  # a torch that fails to import serves as little as none
        raise CannotBuild(
            f"torch cannot be imported by {sys.executable} ({error}): install torch there, then "
            "install gradamp_fast again with --no-build-isolation"
        ) from error
    folder = Path(torch.__file__).parent
    return {
        "TORCH_VERSION": torch.__version__,
        "TORCH_CUDA": torch.version.cuda or "",
        "TORCH_INCLUDE": f"{folder}/include;{folder}/include/torch/csrc/api/include",
        "TORCH_LIB": f"{folder}/lib",
        "TORCH_CXX11_ABI": str(int(torch.compiled_with_cxx11_abi())),
    }


def wheel_toolkits(torch_lib: Path) -> list[Path]:
    """Where NVIDIA's wheels put a toolkit, next to torch: nvidia/cu13, newest first."""
    site = torch_lib.parent.parent
    return sorted(site.glob("nvidia/cu[0-9]*"), reverse=True)


def nvcc_candidates(environ: Mapping[str, str], toolkits: list[Path]) -> Iterator[str]:
    if environ.get("CUDACXX"):
        yield environ["CUDACXX"]
        return  # asked for by name: nothing else will do
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            yield str(Path(environ[variable], "bin", "nvcc"))
            return
    yield "nvcc"
    yield from (str(toolkit / "bin" / "nvcc") for toolkit in toolkits)
    yield "/usr/local/cuda/bin/nvcc"


def nvcc_version(nvcc: str) -> str:
    """Such as "13.0"; "" if it does not run."""
    try:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return ""
    found = re.search(r"release (\d+\.\d+)", output)
    return found[1] if found else ""


def find_nvcc(environ: Mapping[str, str], torch_cuda: str, torch_lib: Path) -> tuple[str, str]:
    """Path and version of an nvcc whose major version is that of torch's CUDA."""
    major = torch_cuda.partition(".")[0]
    fix = (
        f"install a CUDA {major} toolkit and set CUDA_HOME to it, or: {sys.executable} -m pip "
        "install " + " ".join(f'"nvidia-{name}=={torch_cuda}.*"' for name in NVCC_WHEELS)
    )
    others = []
    for candidate in nvcc_candidates(environ, wheel_toolkits(torch_lib)):
        path = shutil.which(candidate)
        version = nvcc_version(path) if path else ""
        if not path or not version:
            others.append(f"{candidate} does not run")
        elif version.partition(".")[0] == major:
            return path, version
        else:
            others.append(f"{path} is CUDA {version}")
    raise CannotBuild(
        f"no nvcc for torch's CUDA {torch_cuda} was found ({', '.join(others)}): {fix}"
    )


def supported_archs(nvcc: str) -> set[str]:
    output = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    return set(re.findall(r"compute_(\d+)", output))


def architectures(arch_list: str, supported: set[str]) -> list[str]:
    """TORCH_CUDA_ARCH_LIST checked and spelt out: "Ampere 9.0+PTX" is 8.0, 8.6+PTX, 9.0+PTX."""
    if not arch_list.strip():
        known = [arch for arch in DEFAULT_ARCHS if arch.replace(".", "") in supported]
        return [*known[:-1], known[-1] + "+PTX"]
    for name, archs in ARCH_NAMES.items():
        arch_list = re.sub(rf"\b{name}\b(\+PTX)?", archs, arch_list)
    chosen = list(filter(None, re.split(r"[;\s,]+", arch_list)))
    for arch in chosen:
        found = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
        if not found:
            raise SystemExit(
                f'TORCH_CUDA_ARCH_LIST: "{arch}" is not an architecture; write "9.0" or "9.0+PTX", '
                f'several with ";" between, or one of {", ".join(ARCH_NAMES)}'
            )
        if found[1] + found[2] not in supported:
            raise SystemExit(
                f'TORCH_CUDA_ARCH_LIST: this nvcc does not know "{arch}"; it knows '
                + ", ".join(f"{a[:-1]}.{a[-1]}" for a in sorted(supported, key=int))
            )
    return list(dict.fromkeys(chosen))


def cmake_architecture(arch: str) -> str:
    """ "9.0" is "90-real", machine code alone; "9.0+PTX" is "90", which has both."""
    number = arch.replace(".", "")
    return number.removesuffix("+PTX") if arch.endswith("+PTX") else number + "-real"


def cuda_facts(environ: Mapping[str, str], torch: Mapping[str, str]) -> dict[str, str]:
    if environ.get("GRADAMP_CUDA") == "0":
        raise CannotBuild("GRADAMP_CUDA=0 asks for none")
    if not torch["TORCH_CUDA"]:
        raise CannotBuild(
            f"torch {torch['TORCH_VERSION']} is a build without CUDA: install one with CUDA"
        )
    lib = Path(torch["TORCH_LIB"])
    nvcc, version = find_nvcc(environ, torch["TORCH_CUDA"], lib)
    archs = architectures(environ.get("TORCH_CUDA_ARCH_LIST", ""), supported_archs(nvcc))
    toolkits = wheel_toolkits(lib)
    own = [toolkit for toolkit in toolkits if Path(nvcc).is_relative_to(toolkit)]
    return {
        "NVCC": nvcc,
        "NVCC_VERSION": version,
        "NVCC_LIBRARIES": str(own[0] / "lib") if own else "",
        "CUDART_FOLDERS": ";".join([*(str(toolkit / "lib") for toolkit in toolkits), str(lib)]),
        "ARCHS": " ".join(archs),
        "CUDA_ARCHITECTURES": ";".join(map(cmake_architecture, archs)),
    }


def main() -> None:
    facts: dict[str, str] = {}
    try:
        facts = torch_facts()
        facts |= cuda_facts(os.environ, facts)
    except CannotBuild as reason:
        facts["NO_CUDA" if facts else "NO_TORCH"] = str(reason)
    for name, value in facts.items():
        print(f"set(GRADAMP_{name} [=[{value}]=])")


if __name__ == "__main__":
    main()
