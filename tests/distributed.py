"""Runs a function, or a script, in several processes that can talk to each other."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import runpy
import socket
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
# A process that waits in vain, for another that hangs, gives up after this: longer than a busy
# machine takes to start them all. One that fails closes its connections, which ends the others.
PATIENCE = datetime.timedelta(seconds=300)


def run(function: Callable[..., Any], processes: int, folder: Path, *args: Any) -> list[Any]:
    """``function(rank, *args)`` in each of the processes, joined by gloo; what each returns.

    The function is one of a module's; ``folder`` is empty. Fails with every traceback.
    """
    return _run(_joined, processes, folder, function, args)


def run_script(script: Path, processes: int, folder: Path) -> list[str]:
    """A script with the environment that torchrun makes for it; what each process prints."""
    with socket.socket() as held:  # so that nobody else is given the port meanwhile
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        return _run(_script, processes, folder, str(script), held.getsockname()[1])


def _run(body: Callable[..., Any], processes: int, folder: Path, *args: Any) -> list[Any]:
    context = mp.get_context("forkserver")  # imports what takes long once, for all tests
    context.set_forkserver_preload(PRELOADED)
    children = [
        context.Process(target=_child, args=(body, rank, processes, str(folder), *args))
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


def _child(body: Callable[..., Any], rank: int, processes: int, folder: str, *args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank))
    try:
        torch.save(body(rank, processes, folder, *args), f"{folder}/returned.{rank}")
    except BaseException:
        Path(folder, f"failed.{rank}").write_text(traceback.format_exc())
        raise


def _joined(
    rank: int, processes: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=processes, timeout=PATIENCE
    )
    dist.barrier()  # one that fails at once would leave while others still connect to it
    result = function(rank, *args)
    # One that fails does not come here: it says why, and its end closes the connections.
    dist.destroy_process_group()
    return result


def _script(rank: int, processes: int, folder: str, script: str, port: int) -> str:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(script, run_name="__main__")
    return printed.getvalue()
