"""One process of a command. Here, since a spawned process does not find what `__main__` defines."""

from __future__ import annotations

import argparse
import functools
import sys
import time

import torch

from bench.accuracy.budget import work
from bench.accuracy.stages import Experiment, NotReady
from bench.accuracy.store import Store
from bench.data import DataMissing, load
from bench.results import describe_machine


def store_for(given: argparse.Namespace) -> Store:
    kind = given.device.partition(":")[0]
    return Store(given.out / f"{given.data}-{kind}.csv", given.seen)


def worker(given: argparse.Namespace, experiment: Experiment, started: float) -> None:
    """Works until the budget, counted from `started` (time.time()), is spent."""
    device = torch.device(given.device)
    torch.backends.cudnn.benchmark = True
    machine = describe_machine(device)
    name = machine["name"]
    about = {
        "device": f"{name}, {machine['threads']} threads" if device.type == "cpu" else name,
        "torch": machine["torch"],
        "commit": given.commit or machine["commit"],
    }
    read = functools.cache(lambda name: load(name, given.root, device=device))
    try:
        budget = given.budget_s - (time.time() - started)
        say = functools.partial(print, flush=True)
        work(given.stage, experiment, store_for(given), read, about, budget, say)
    except (DataMissing, NotReady, ValueError) as error:
        sys.exit(f"python -m bench.accuracy: {error}")
