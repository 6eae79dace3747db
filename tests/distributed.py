"""Runs a function in several processes that can talk to each other."""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "gradamp_fast",
    "oracle",
]
# A process that waits in vain, for another that failed, gives up after this.
PATIENCE = datetime.timedelta(seconds=60)


def run(function: Callable[..., Any], processes: int, folder: Path, *args: Any) -> list[Any]:
    """``function(rank, *args)`` in each of the processes, joined by gloo; what each returns.

    The function is one of a module's; ``folder`` is empty. Fails with the first traceback.
    """
    context = mp.get_context("forkserver")  # imports what takes long once, for all tests
    context.set_forkserver_preload(PRELOADED)
    children = [
        context.Process(target=_child, args=(function, rank, processes, str(folder), args))
        for rank in range(processes)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    failures = sorted(folder.glob("failed.*"), key=lambda path: path.stat().st_mtime_ns)
    assert not failures, "\n" + "\n".join(f"{f.name}: {f.read_text()}" for f in failures)
    assert all(child.exitcode == 0 for child in children), [c.exitcode for c in children]
    return [
        torch.load(folder / f"returned.{rank}", weights_only=False) for rank in range(processes)
    ]


def _child(
    function: Callable[..., Any], rank: int, processes: int, folder: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank))
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=processes, timeout=PATIENCE
    )
    try:
        torch.save(function(rank, *args), f"{folder}/returned.{rank}")
    except BaseException:
        Path(folder, f"failed.{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()
