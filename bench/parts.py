"""The parts of a run of the benchmarks, piece by piece; needs neither rich nor matplotlib.

python -m bench.parts --out FOLDER   on a GPU, and only stored: all but training, quickly
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from bench import memory, micro, optimizers, scaling, whole_step
from bench.results import Failure, Results, Row, describe_machine
from gradamp_fast import backends

PARTS = ("models", "optimizers", "scaling", "training", "memory")
HEADLINE = "headline"  # of models, what is promised: lagged, a quarter amplified
Unit = tuple[str, Callable[[], None]]


def units(
    results: Results, parts: Sequence[str], device: torch.device, quick: bool
) -> Iterator[Unit]:
    """What is to be done, piece by piece: a label, and a call that adds to the results."""

    def keep(found: tuple[list[Row], list[Failure]]) -> None:
        results.rows.extend(found[0])
        results.failures.extend(found[1])

    if "models" in parts or HEADLINE in parts:
        effort = micro.QUICK if quick else micro.FULL
        wanted = [c for c in micro.cases(device, quick) if "models" in parts or c.headline]
        for case in wanted:
            yield (
                str(case),
                lambda case=case: keep(  # type: ignore[misc]
                    micro.run_case(case, device, effort, quick)
                ),
            )
    if "optimizers" in parts:
        effort = micro.QUICK if quick else micro.FULL
        for update in optimizers.cases(quick):
            yield (
                str(update),
                lambda update=update: keep(  # type: ignore[misc]
                    optimizers.run_case(update, device, effort)
                ),
            )
    if "scaling" in parts:
        curve_effort = scaling.QUICK if quick else scaling.FULL
        for point in scaling.points(device, quick):
            yield (
                f"{point.section}: {point.case.model}",
                lambda point=point: keep(  # type: ignore[misc]
                    scaling.run_point(point, device, curve_effort)
                ),
            )
    if "training" in parts:
        pairs = 5 if quick else 20
        for job in whole_step.jobs(device, quick):
            yield (
                "training",
                lambda job=job: results.training.append(  # type: ignore[misc]
                    whole_step.run_job(job, device, pairs)
                ),
            )
    backend = next(n for n in backends.NAMES if backends.unavailable(n, device) is None)
    if "memory" in parts and memory.available():
        for model in ("resnet18",) if quick else ("resnet18", "vit_b_16"):
            yield (
                f"memory: {model}",
                lambda model=model: results.memory.append(  # type: ignore[misc]
                    memory.measure_memory(model, "fp32", device, backend)
                ),
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.parts", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    given = parser.parse_args()
    device = torch.device("cuda")
    results = Results(describe_machine(device), quick=True)
    parts = [part for part in PARTS if part != "training"]
    for label, piece in units(results, parts, device, quick=True):
        print(label, flush=True)
        try:
            piece()
        except Exception as error:  # the other pieces are measured all the same
            reason = f"{type(error).__name__}: {error}"
            results.failures.append(Failure(label, "all of it", reason, wrong=True))
        results.save(given.out)
    for failure in results.failures:
        print(f"{failure.case}: {failure.subject}: {failure.reason}")
    return int(any(failure.wrong for failure in results.failures))


if __name__ == "__main__":
    sys.exit(main())
