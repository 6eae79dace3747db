"""How large an Amplifier's state is beside the gradients: `python -m bench.state_size [PAGE]`.

Prints the table; with a page, writes it between ``<!-- state size -->`` and ``<!-- end -->`` there.
Models are built on the meta device: nothing is downloaded or allocated.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.docs import table, with_lines
from gradamp_fast.model.walk import find_layers
from gradamp_fast.options import Options
from gradamp_fast.reference.state import State

MODELS = (
    *("vgg16", "vit_b_16", "resnet18", "convnext_tiny", "resnet50", "swin_t", "mnasnet1_0"),
    *("efficientnet_b0", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0"),
    "densenet121",
)


def sizes(model: str) -> tuple[int, int, int]:
    """Layers, bytes of the fp32 gradients and bytes of the state of a torchvision model."""
    from torchvision.models import get_model

    meta = torch.device("meta")
    with meta:
        built = get_model(model)
    plan = find_layers(built, Options.make({}))
    state = State(plan, 2.0, meta)
    held = sum(tensor.nbytes for tensor in (state.values, state.sketch, state.parity))
    return len(plan.layers), sum(p.nbytes for p in built.parameters()), held


def rows() -> Iterator[tuple[str, ...]]:
    """A row for each model, the smallest share first."""
    measured = []
    for name in MODELS:
        layers, gradients, held = sizes(name)
        measured.append((held / gradients, name, layers, gradients, held))
    measured.sort()
    for share, name, layers, gradients, held in measured:
        mib = (f"{size / 2**20:.2f} MiB" for size in (gradients, held))
        yield name, str(layers), *mib, f"{share:.1%}"


def page_with_table(text: str) -> str:
    """The page with the table as it is now."""
    return with_lines(text, "state size", lines())


def lines() -> list[str]:
    return table(("model", "layers", "gradients, fp32", "state", "share"), rows())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        page = Path(sys.argv[1])
        page.write_text(page_with_table(page.read_text()))
    else:
        print(*lines(), sep="\n")
