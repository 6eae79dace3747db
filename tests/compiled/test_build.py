"""What is installed, what the build decides, and what is said where there is no binary."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gradamp_fast import _extension, _version

ROOT = Path(__file__).resolve().parents[2]
NOWHERE = "/nowhere"


def script(name: str) -> ModuleType:
    """A file of ``cmake/``, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "cmake" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


probe, this_machine = script("probe"), script("this_machine")


def run(*command: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def one_line(text: str) -> str:
    """CMake breaks the lines of its errors."""
    return " ".join(text.split())


# ---- version --------------------------------------------------------------------------


def test_version_stands_in_one_place():
    version = _version.__version__
    assert importlib.metadata.version("gradamp_fast") == version
    latest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest[1] == version
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt"):
        assert f'"{version}"' not in (ROOT / name).read_text()


# ---- loading the binary ---------------------------------------------------------------


def without_packages(path: list[str]) -> list[str]:
    return [entry for entry in path if not Path(entry, "gradamp_fast").is_dir()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in which the extension is looked for, and nowhere else."""
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    monkeypatch.setattr(sys, "path", without_packages(sys.path))
    _extension._load.cache_clear()
    yield tmp_path
    _extension._load.cache_clear()


def put_binary(folder: Path, torch_version: str) -> None:
    info = f"gradamp_fast build {{\ntorch={torch_version}\ncuda=\nsummary=CPU ONLY; a=b\n}}"
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (folder / f"_C{suffix}").write_bytes(b"\x7fELF\0" + info.encode() + b"\0")


def no_import(name: str) -> None:
    raise AssertionError(f"{name} was loaded")


def test_missing_binary_is_told_with_the_command_that_builds_it(folder: Path):
    assert _extension.load() is None
    assert _extension.built_with() == {}
    assert "no compiled extension" in _extension.reason()
    assert f"{sys.executable} -m pip install --no-build-isolation" in _extension.reason()


def test_without_build_tools_the_command_lets_pip_fetch_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pybind11" else found(name)
    )
    assert f"{sys.executable} -m pip install --no-deps" in _extension.reason()


def test_an_installed_package_behind_the_sources_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As in a clone after ``pip install .``."""
    site = tmp_path / "site-packages"
    (site / "gradamp_fast").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    assert "it was installed without a C++ compiler" in _extension.reason()
    _extension._load.cache_clear()
    put_binary(site / "gradamp_fast", torch.__version__)
    assert f"before the installed gradamp_fast in {site / 'gradamp_fast'}" in _extension.reason()
    assert f"run it in another folder than {tmp_path.parent}" in _extension.reason()


@pytest.mark.parametrize("then", ["1.13.0+cu117", "2.1.0", "unknown"])
def test_binary_of_another_torch_is_never_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, then: str
):
    put_binary(folder, then)
    monkeypatch.setattr(importlib, "import_module", no_import)
    assert _extension.load() is None
    assert f"built with torch {then}, and torch {torch.__version__} is" in _extension.reason()
    assert f"{sys.executable} -m pip install --no-build-isolation" in _extension.reason()


def test_binary_without_build_information_is_never_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    (folder / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"\x7fELF")
    monkeypatch.setattr(importlib, "import_module", no_import)
    assert _extension.load() is None
    assert "unknown" in _extension.reason()


def test_binary_that_does_not_load_is_told_with_the_cause(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def undefined_symbol(name: str) -> None:
        raise ImportError("undefined symbol: _ZN2at4_ops")

    put_binary(folder, torch.__version__)
    monkeypatch.setattr(importlib, "import_module", undefined_symbol)
    assert _extension.load() is None
    assert "undefined symbol: _ZN2at4_ops" in _extension.reason()
    assert "Rebuild it" in _extension.reason()


def test_patch_version_and_local_label_may_differ(folder: Path, monkeypatch: pytest.MonkeyPatch):
    major, minor = torch.__version__.split(".")[:2]
    put_binary(folder, f"{major}.{minor}.99+elsewhere")
    monkeypatch.setattr(importlib, "import_module", lambda name: name)
    assert _extension.load() == "gradamp_fast._C"
    assert _extension.reason() is None
    assert _extension.built_with()["summary"] == "CPU ONLY; a=b"


def test_in_a_source_folder_the_command_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_extension, "_FOLDER", ROOT / "no such package")
    assert f"-e {ROOT}" in _extension.reason()


def test_package_works_without_a_binary(tmp_path: Path):
    shutil.copytree(
        ROOT / "gradamp_fast",
        tmp_path / "gradamp_fast",
        ignore=shutil.ignore_patterns("_C*", "__pycache__"),
    )
    script = (
        "import torch, gradamp_fast\n"
        "from gradamp_fast import _extension\n"
        "assert _extension.load() is None, _extension.built_with()\n"
        "model = torch.nn.Linear(3, 2)\n"
        "model(torch.ones(1, 3)).sum().backward()\n"
        "gradamp_fast.fused_amplify(model)\n"
        "print(gradamp_fast.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))


# ---- what the build decides -----------------------------------------------------------

HOPPER_TOOLKIT = {"75", "80", "86", "89", "90"}  # CUDA 12.4


@pytest.mark.parametrize(
    ("wish", "archs", "cmake"),
    [
        ("", "7.5 8.0 8.6 8.9 9.0+PTX", "75-real 80-real 86-real 89-real 90"),
        ("9.0", "9.0", "90-real"),
        ("8.0;9.0+PTX", "8.0 9.0+PTX", "80-real 90"),
        ("8.0, 9.0a 8.0", "8.0 9.0a", "80-real 90a-real"),
        ("Ampere;Hopper", "8.0 8.6+PTX 9.0+PTX", "80-real 86 90"),
        ("Ada+PTX", "8.9+PTX", "89"),
    ],
)
def test_architectures(wish: str, archs: str, cmake: str):
    chosen = probe.architectures(wish, HOPPER_TOOLKIT)
    assert chosen == archs.split()
    assert list(map(probe.cmake_architecture, chosen)) == cmake.split()


@pytest.mark.parametrize("wish", ["sm_90", "9", "12.0", "Kepler", "9.0+ptx"])
def test_wrong_architectures_are_named(wish: str):
    with pytest.raises(SystemExit, match=f'TORCH_CUDA_ARCH_LIST: .*"{re.escape(wish)}"'):
        probe.architectures(wish, HOPPER_TOOLKIT)


def put_nvcc(path: Path, version: str) -> str:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    path.chmod(0o755)
    return str(path)


def test_nvcc_must_have_the_major_version_of_torch(tmp_path: Path):
    old = put_nvcc(tmp_path / "12" / "bin" / "nvcc", "12.4")
    new = put_nvcc(tmp_path / "13" / "bin" / "nvcc", "13.2")
    lib = tmp_path / "torch" / "lib"
    assert probe.find_nvcc({"CUDA_HOME": str(tmp_path / "13")}, "13.0", lib) == (new, "13.2")
    assert probe.find_nvcc({"CUDACXX": new, "CUDA_HOME": NOWHERE}, "13.0", lib) == (new, "13.2")
    with pytest.raises(probe.CannotBuild) as error:
        probe.find_nvcc({"CUDA_HOME": str(tmp_path / "12")}, "13.0", lib)
    assert f"{old} is CUDA 12.4" in str(error.value)
    assert '"nvidia-cuda-nvcc==13.0.*"' in str(error.value)


def test_nvcc_of_the_wheels_beside_torch_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = put_nvcc(tmp_path / "bin" / "nvcc", "12.4")
    monkeypatch.setenv("PATH", str(Path(old).parent))
    nvcc = put_nvcc(tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc", "13.0")
    found = probe.find_nvcc({}, "13.0", tmp_path / "site" / "torch" / "lib")
    assert found == (nvcc, "13.0")


def configure(folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    cmake = pytest.importorskip("cmake")
    ninja = pytest.importorskip("ninja")
    return run(
        Path(cmake.CMAKE_BIN_DIR, "cmake"),
        *("-S", ROOT, "-B", folder, "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja.BIN_DIR}/ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
        **environ,
    )


def test_misspelt_wish_for_cuda_is_an_error(tmp_path: Path):
    done = configure(tmp_path, GRADAMP_CUDA="yes")
    assert done.returncode != 0
    assert "GRADAMP_CUDA=yes is not one of auto, 0, 1" in one_line(done.stdout)


def test_cuda_demanded_without_nvcc_is_an_error_with_the_fix(tmp_path: Path):
    done = configure(tmp_path, GRADAMP_CUDA="1", CUDACXX=NOWHERE)
    assert done.returncode != 0
    assert "GRADAMP_CUDA=1, but" in one_line(done.stdout)
    assert "install" in done.stdout


def put_launcher(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text('#!/bin/sh\nexec "$@"\n')
    path.chmod(0o755)
    return path


def test_compilers_with_a_launcher_and_flags(tmp_path: Path):
    """And in folders whose names have spaces."""
    launcher = put_launcher(tmp_path / "has spaces" / "ccache")
    path = f"{launcher.parent}{os.pathsep}{os.environ['PATH']}"
    given = {"CXX": "ccache g++ -DONE=1", "CXXFLAGS": "-DTWO=2", "GRADAMP_CUDA": "0"}
    done = configure(tmp_path / "a build", PATH=path, **given)
    if "NO COMPILED EXTENSION" in done.stdout:
        pytest.skip("there is no g++")
    assert done.returncode == 0, done.stdout
    edges = (tmp_path / "a build" / "build.ninja").read_text()
    assert f'LAUNCHER = "{launcher}"' in edges
    assert re.search(r"FLAGS = .*-DTWO=2 +-DONE=1", edges)


def test_nvcc_with_a_launcher_and_flags(tmp_path: Path):
    facts = probe.torch_facts()
    try:
        nvcc, _ = probe.find_nvcc({}, facts["TORCH_CUDA"], Path(facts["TORCH_LIB"]))
    except probe.CannotBuild as reason:
        pytest.skip(str(reason))
    launcher = put_launcher(tmp_path / "sccache")
    given = {"TORCH_CUDA_ARCH_LIST": "9.0", "GRADAMP_CUDA": "1"}
    done = configure(tmp_path / "build", CUDACXX=f"{launcher} {nvcc} -lineinfo", **given)
    assert done.returncode == 0, done.stdout
    assert f"(9.0), for torch {torch.__version__}, with {nvcc}" in one_line(done.stdout)
    edges = (tmp_path / "build" / "build.ninja").read_text()
    assert f"LAUNCHER = {launcher}" in edges
    assert re.search(r"FLAGS = .*-lineinfo", edges)


def test_a_build_elsewhere_leaves_the_sources_alone(tmp_path: Path):
    """What they link to for editors would be gone with it."""
    link = ROOT / "compile_commands.json"
    before = os.readlink(link) if link.is_symlink() else None
    done = configure(tmp_path / "build", GRADAMP_CUDA="0")
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "build" / "compile_commands.json").is_file()
    assert (os.readlink(link) if link.is_symlink() else None) == before


def test_instruction_sets_share_no_code():
    """The linker keeps one copy of a weak function: an AVX-512 one would crash older machines."""
    objects = list(ROOT.glob("build/cmake-*/CMakeFiles/tile_*.dir/csrc/cpu/*.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("the extension was not built in this folder, or there is no nm")
    for path in objects:
        symbols = run("nm", "--defined-only", "-C", path).stdout
        assert re.findall(r"^[0-9a-f]+ [WVu] .*$", symbols, re.MULTILINE) == []


def test_the_demonstration_waits_for_no_more_than_this_machine_can_use():
    wish = this_machine.wish
    setting, line = wish({}, [])
    assert setting == "GRADAMP_CUDA=0"
    assert "only the CPU part is built; `make build` builds for all" in line
    setting, line = wish({"GRADAMP_CUDA": ""}, [(9, 0), (8, 0), (9, 0)])
    assert setting == "TORCH_CUDA_ARCH_LIST=8.0;9.0"
    assert "(8.0;9.0)" in line
    assert wish({"GRADAMP_CUDA": "1"}, []) == wish({"TORCH_CUDA_ARCH_LIST": "7.5"}, []) == ("", "")


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_the_demonstration_builds_what_is_missing(tmp_path: Path):
    """For this machine alone; a full build, where there is one, serves as well."""

    def steps(target: str) -> str:
        return run("make", "-n", "-C", ROOT, target, f"VENV={tmp_path}").stdout

    (tmp_path / ".installed").touch()
    assert "this_machine.py" in steps("demo")
    assert "this_machine.py" not in steps("build")
    (tmp_path / ".built-for-demo").touch()
    assert "pip install" not in steps("demo")
    assert "pip install" in steps("build")
    (tmp_path / ".built").touch()
    for target in ("demo", "build"):
        assert "pip install" not in steps(target)
    assert "bench.accuracy.demo" in steps("demo")


# ---- distributions --------------------------------------------------------------------


def source_files() -> set[str]:
    folders = ("bench", "cmake", "csrc", "examples", "gradamp_fast", "requirements", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    made = re.compile(r"__pycache__|\.so$|\.pyc$")
    return {str(path.relative_to(ROOT)) for path in files if not made.search(str(path))}


@pytest.mark.slow
def test_source_distribution_is_complete_and_installs_without_a_compiler(tmp_path: Path):
    pytest.importorskip("build")
    copy = tmp_path / "copy"
    # Also what other tests may write at this moment.
    ignore = shutil.ignore_patterns(
        *(".*cache", ".git", ".hypothesis", ".venv*", "__pycache__"),
        *("build", "data", "dist", "out", "*.egg-info", "compile_commands.json"),
    )
    shutil.copytree(ROOT, copy, ignore=ignore)
    built = run(
        *(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, copy)
    )
    assert built.returncode == 0, built.stdout
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    expected = source_files() | {"CMakeLists.txt", "LICENSE", "Makefile", "README.md", "setup.py"}
    assert expected - names == set()
    assert not [name for name in names if name.endswith((".so", ".pyc"))]

    target = tmp_path / "target"
    pip = (sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation")
    done = run(*pip, "--target", target, archive, CXX=NOWHERE, GRADAMP_CUDA="auto")
    assert done.returncode == 0, done.stdout
    assert "gradamp_fast: NO COMPILED EXTENSION" in done.stdout
    assert "no C++ compiler was found" in done.stdout
    assert (target / "gradamp_fast" / "py.typed").is_file()
    assert not list(target.glob("gradamp_fast/_C*"))
