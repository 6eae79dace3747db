"""The package's rooms: who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import gradamp_fast

PACKAGE = Path(gradamp_fast.__file__).parent
# From the ground up: what stands in a line imports from lines above it alone, and a file in a
# folder from that folder too. Names are files without their ending, or folders with all they hold.
FLOORS = (
    "_version _checks _extension call learning_rates optimizer_scale",
    "schedule",
    "options",
    "model",
    "reference",
    "backends report",
    "checkpoint bound_model optim",
    "ops",
    "attach",
    "amplifier",
    "drop_in grad_scaler integrations placement plot doctor",
    "__main__",
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str) -> Iterator[str]:
    """Modules of the package that one imports, wherever the statement stands, for types as well."""
    path = MODULES[module]
    folder = list(path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            if isinstance(node, ast.Import):
                assert not any(a.name.startswith("gradamp_fast") for a in node.names), module
            continue
        assert not (node.module or "").startswith("gradamp_fast"), module
        if node.level == 0:
            continue
        above = folder[: len(folder) + 1 - node.level]
        base = above + (node.module.split(".") if node.module else [])
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            found = whole if whole in MODULES else ".".join(base)
            if found != "" and found != module:
                yield found


def room(module: str) -> str:
    return module.partition(".")[0]


GRAPH = {module: set(imports(module)) for module in MODULES if module != "__init__"}


def test_every_module_has_a_floor() -> None:
    assert {room(module) for module in GRAPH} == set(FLOOR)
    assert sum(map(len, GRAPH.values())) > 50


def test_no_arrow_points_up() -> None:
    up = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if room(module) != room(other) and FLOOR[room(other)] >= FLOOR[room(module)]
    ]
    assert not up


def test_there_is_no_circle() -> None:
    left = {module: set(others) for module, others in GRAPH.items()}
    while left:
        free = [module for module, others in left.items() if not others & set(left)]
        assert free, f"each of these imports another: {sorted(left)}"
        for module in free:
            del left[module]
