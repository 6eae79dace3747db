"""What an Amplifier holds, and whether its steps allocate."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

from bench.baselines import Fused
from bench.results import Memory
from bench.shapes import MODELS
from bench.workload import FACTOR, Workload

STEPS = 10
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    NAMES = (
        *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
        *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
    )
    _fields_ = tuple((name, ctypes.c_size_t) for name in NAMES)


def available() -> bool:
    """Whether this system tells: Linux with glibc 2.33 or newer."""
    return hasattr(ctypes.CDLL(None), "mallinfo2") and _CLEAR_REFS.exists()


def _allocated(device: torch.device) -> int:
    """Bytes handed out and not given back."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def _status(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def _peak_growth(fused: Fused, device: torch.device) -> int:
    """By how much steps raise the most memory ever held above what is held before them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        _CLEAR_REFS.write_text("5")  # the peak begins anew
        before = _status("VmRSS:")
    for _ in range(STEPS):
        fused.run()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    return max(_status("VmHWM:") - before, 0)


def measure_memory(model: str, dtype: str, device: torch.device, backend: str) -> Memory:
    """State, workspace and growth for one list of shapes, with the options' defaults."""
    from bench.micro import DTYPES

    workload = Workload(MODELS[model](), DTYPES[dtype], device, 0.25, copies=1, keep=False)
    first = Fused(workload, backend, {})
    first.take(workload.sets[0], FACTOR)
    first.run()  # loads what is loaded once
    del first
    gc.collect()
    before = _allocated(device)
    fused = Fused(workload, backend, {})
    fused.take(workload.sets[0], FACTOR)
    fused.run()
    gc.collect()
    held = _allocated(device) - before
    state = fused.amplifier.bound.settled_state()
    tensors = sum(t.nbytes for t in (state.values, state.sketch, state.parity))
    fused.run()
    return Memory(
        model=model,
        dtype=dtype,
        gradients=workload.gradient_bytes,
        state=tensors,
        workspace=max(held - tensors, 0),
        growth=_peak_growth(fused, device),
    )
