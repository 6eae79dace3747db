"""The host's cost a layer in a model of very many: `python -m bench.large [PAGE]`.

Times what walks the model or reads the state; a step is timed elsewhere. Nothing is printed for a
call whose result is not what it should be. With a page, writes the table between
``<!-- large -->`` and ``<!-- end -->`` there.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.docs import table, with_lines
from gradamp_fast import Amplifier

LAYERS = 16_000
REPEATS = 5
Call = tuple[str, Callable[[], Any], Callable[[Any], bool]]


class Block(nn.Module):
    """Four layers of a weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        for index in range(4):
            self.add_module(f"linear{index}", nn.Linear(4, 4))


def calls(layers: int) -> list[Call]:
    """What is timed: its name, the call, and what has to hold for its result."""
    model = nn.ModuleList(Block() for _ in range(layers // 4))
    for number, parameter in enumerate(model.parameters(), 1):
        parameter.grad = torch.full_like(parameter, number)
    amplifier = Amplifier(model, min_steps=1, refresh=1)
    amplifier.step()
    amplifier.step()
    stored = amplifier.state_dict()

    widths = itertools.count(5)

    def replaced() -> None:
        model[0].linear0 = nn.Linear(4, next(widths))
        amplifier.rebind()

    def begun_anew(_: None) -> bool:
        return [layer.steps for layer in amplifier.report().layers[:2]] == [0, 2]

    def loaded() -> None:
        amplifier.reset()
        amplifier.load_state_dict(stored)

    def as_stored(_: None) -> bool:
        sketches = amplifier.state_dict()["sketches"]
        return all(torch.equal(sketches[name], t) for name, t in stored["sketches"].items())

    return [
        ("Amplifier(model)", lambda: Amplifier(model), lambda a: len(a.report().layers) == layers),
        ("rebind()", amplifier.rebind, lambda _: amplifier.report().layers[-1].steps == 2),
        ("state_dict()", amplifier.state_dict, lambda s: len(s["sketches"]) == 2 * layers),
        ("load_state_dict()", loaded, as_stored),
        ("report()", amplifier.report, lambda r: len(r.layers) == layers),
        ("summary()", amplifier.summary, lambda s: len(s.splitlines()) >= layers),
        ("rebind() to a replaced layer", replaced, begun_anew),
    ]


def microseconds(layers: int, repeats: int = REPEATS) -> dict[str, float]:
    """Least process time a layer of each call. RuntimeError if one's result is wrong."""
    found = {}
    for name, call, holds in calls(layers):
        if not holds(call()):
            raise RuntimeError(f"{name}: the result is wrong")
        least = float("inf")
        for _ in range(repeats):
            begin = time.process_time()
            call()
            least = min(least, time.process_time() - begin)
        found[name] = least / layers * 1e6
    return found


if __name__ == "__main__":
    rows = [(what, f"{took:.1f} µs") for what, took in microseconds(LAYERS).items()]
    lines = table(("call", "a layer"), rows)
    if len(sys.argv) > 1:
        page = Path(sys.argv[1])
        page.write_text(with_lines(page.read_text(), "large", lines))
    else:
        print(*lines, sep="\n")
