"""The documentation is true: its code runs, and what it says is printed is printed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import missing_libraries

from gradamp_fast import Amplifier, _extension

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))
]  # fmt: skip
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int

    def run(self, page: Path, names: dict[str, Any]) -> None:
        # a line number in a traceback is one of the page
        code = compile("\n" * self.line + self.text, str(page), "exec", dont_inherit=True)
        exec(code, names)


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(found[1], found[2], text.count("\n", 0, found.start()) + 1)
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


def pages_with(language: str) -> list[Any]:
    return [
        pytest.param(page, id=page.stem)
        for page in PAGES
        if page != TROUBLESHOOTING and any(b.language == language for b in blocks(page))
    ]


# ---- code ---------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages_with("python"))
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's blocks run one after another, with the names that earlier ones defined."""
    if "heatmap" in page.read_text():
        pytest.importorskip("matplotlib")
    if "tensorboard" in page.read_text():
        pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    missing: list[str] = []
    for block in blocks(page):
        if block.language == "python":
            missing += missing_libraries(block.text)
            if not missing_libraries(block.text):
                block.run(page, names)
    if missing:
        pytest.skip(f"some blocks did not run; not installed: {', '.join(missing)}")


def test_the_change_to_a_training_loop_works() -> None:
    """README's diff, applied to a loop's body."""
    [block] = [b for b in blocks(ROOT / "README.md") if b.language == "diff"]
    lines = block.text.splitlines()
    assert len(lines) == 4
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    names: dict[str, Any] = {}
    setup = """
import torch
model = torch.nn.Linear(3, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loss = model(torch.randn(5, 3)).square().mean()
"""
    exec(setup, names)
    exec(after, names)
    assert names["gradamp_fast"].fused_amplify(names["model"]).report().steps == 2


# ---- what the pages point at --------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_and_targets_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"\bmake ([a-z-]+)(?: +#.*)?$", text, re.MULTILINE):
        assert target in targets
    for name in re.findall(
        r"`((?:gradamp_fast|csrc|tests|bench|cmake|requirements)/[\w./]*)`", text
    ):
        assert (ROOT / name).exists(), name


def test_the_options_are_all_there_with_their_defaults() -> None:
    from dataclasses import fields

    from gradamp_fast import Options
    from gradamp_fast.options import DEFAULTS

    head, _, tail = (ROOT / "docs" / "options.md").read_text().partition("\n## Growing\n")
    growing = re.findall(r"^\| `(\w+)` \| `(.*?)` \| `(.*?)` \|", tail, re.MULTILINE)
    for grow in (False, True):
        assert {row[0]: eval(row[1 + grow]) for row in growing} == DEFAULTS[grow]
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", head, re.MULTILINE))
    assert {name: eval(default) for name, default in rows.items()} == {
        field.name: getattr(Options(), field.name) for field in fields(Options)
    }


# ---- error messages -----------------------------------------------------------------


def pattern(text: str) -> str:
    return ".*?".join(map(re.escape, " ".join(text.split()).split("…")))


def outcome(page: Path, block: Block, names: dict[str, Any]) -> str:
    """What a block raises or warns of, as Python prints it; "" if nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            block.run(page, names)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "\n".join(f"{type(w.message).__name__}: {w.message}" for w in caught)


def test_every_message_is_one_that_its_code_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    names: dict[str, Any] = {}
    printed = ""
    checked = 0
    for block in blocks(TROUBLESHOOTING):
        if block.language == "python":
            assert not printed, (
                f"line {block.line}: the message before is not documented: {printed}"
            )
            printed = outcome(TROUBLESHOOTING, block, names)
        elif block.language == "text" and printed:
            message = " ".join(printed.split())
            assert re.fullmatch(pattern(block.text), message), f"line {block.line}: {message}"
            printed = ""
            checked += 1
    assert checked > 20
    assert not printed


def built_for_another_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str | None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (folder / f"_C{suffix}").write_bytes(b"gradamp_fast build {\ntorch=1.0.0\n}")
    monkeypatch.setattr(_extension, "_FOLDER", folder)
    return _extension._load.__wrapped__()[1]


def without_binary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.setattr(_extension, "_FOLDER", folder)
    monkeypatch.setattr(_extension, "_passed_over", lambda: None)
    return _extension._load.__wrapped__()[1]


def behind_the_sources(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.setattr(_extension, "_FOLDER", folder)
    monkeypatch.setattr(_extension, "_passed_over", lambda: folder / "installed")
    return _extension._load.__wrapped__()[1]


def probe() -> Any:
    spec = importlib.util.spec_from_file_location("probe", ROOT / "cmake" / "probe.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(Exception, match="torch") as raised:
        probe().torch_facts()
    return str(raised.value)


def without_nvcc(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    with pytest.raises(Exception, match="nvcc") as raised:
        probe().find_nvcc({"CUDACXX": "/nowhere/nvcc"}, "13.0", folder)
    return str(raised.value)


def unknown_architecture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    with pytest.raises(SystemExit) as raised:
        probe().architectures("Hoper", {"90"})
    return str(raised.value)


def unknown_wish(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    cmake = shutil.which(
        "cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if cmake is None:
        pytest.skip("cmake is not installed")
    done = subprocess.run(
        [cmake, "-S", str(ROOT), "-B", str(folder)],
        env={**os.environ, "GRADAMP_CUDA": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    return done.stderr


def without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    from gradamp_fast import plot

    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError) as raised:
        plot._plain_text()
    return f"ImportError: {raised.value}"


def without_a_stack(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "gradamp_fast.integrations.huggingface"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError) as raised:
        importlib.import_module(name)
    return f"ImportError: {raised.value}"


def resumed_without_state(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Trainer that clips resumes a run that had no callback."""
    pytest.importorskip("transformers")
    from gradamp_fast.integrations.huggingface import GradientAmplificationCallback

    args = SimpleNamespace(max_grad_norm=1.0)
    state = SimpleNamespace(epoch=1.0, global_step=3, stateful_callbacks={})
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = GradientAmplificationCallback()
        callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    return "\n".join(f"{w.category.__name__}: {w.message}" for w in caught)


def cut_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A snapshot as four processes make it, loaded by one."""
    amplifier = Amplifier(torch.nn.Linear(500, 10, bias=False))
    stored = amplifier.state_dict()
    stored["sketches"]["weight"] = torch.zeros(314)
    stored["cuts"] = [["weight", "S(0) over 4", [0, 1500, 3000, 4500], [94, 94, 94, 32]]]
    with pytest.raises(ValueError, match="weight") as raised:
        amplifier.load_state_dict(stored)
    return f"ValueError: {raised.value}"


ELSEWHERE: dict[str, Callable[[Path, pytest.MonkeyPatch], str | None]] = {
    "It was built for another torch": built_for_another_torch,
    "There is no compiled extension": without_binary,
    "The sources stand before the installed package": behind_the_sources,
    "torch was not found while building": without_torch,
    "No nvcc": without_nvcc,
    "An unknown architecture": unknown_architecture,
    "A value of GRADAMP_CUDA": unknown_wish,
    "A stack is missing": without_a_stack,
    "The Trainer clips first": resumed_without_state,
    "A checkpoint from before amplification": resumed_without_state,
    "matplotlib is missing": without_matplotlib,
    "A sketch that was cut elsewhere": cut_elsewhere,
}


def sections_without_code() -> dict[str, Block]:
    """Sections that show a message alone, by title."""
    text = TROUBLESHOOTING.read_text()
    found = {}
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        if "```python" not in body:
            [message] = re.findall(r"^```text\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
            found[title] = Block("text", message, 0)
    return found


def test_every_message_without_code_is_brought_about_here() -> None:
    assert set(sections_without_code()) == set(ELSEWHERE)


@pytest.mark.parametrize("title", ELSEWHERE)
def test_a_message_of_the_build_is_one_that_is_printed(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = ELSEWHERE[title](tmp_path, monkeypatch)
    assert printed
    assert re.search(pattern(sections_without_code()[title].text), " ".join(printed.split())), (
        printed
    )
