"""What a run shows while it trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from torch import nn

    from bench.train import Epoch


@contextmanager
def watch(
    label: str, steps: int, epochs: int
) -> Iterator[tuple[Callable[[], None], Callable[[int, Epoch, nn.Module], None]]]:
    """Shows one run of `steps` steps; yields `on_step` and `on_epoch` for `bench.train`."""
    console = Console()
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=steps, note="")

        def on_step() -> None:
            bar.advance(task)

        def on_epoch(number: int, epoch: Epoch, model: nn.Module) -> None:
            note = f"loss {epoch.train_loss:.3f}, accuracy {epoch.accuracy:.1%}"
            bar.update(task, note=note)
            if not console.is_terminal:
                print(f"{label}: epoch {number + 1}/{epochs}, {note}", flush=True)

        yield on_step, on_epoch
