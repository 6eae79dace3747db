"""The CUDA step without a GPU: its source compiled for the host, as a backend of CPU tensors."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradamp_fast.backends.compiled import for_kernel
from gradamp_fast.backends.stepping import Measuring
from gradamp_fast.call import Call, Outcome
from gradamp_fast.model.gradients import DTYPES, GradientReader
from gradamp_fast.model.plan import Plan
from gradamp_fast.options import Rules
from gradamp_fast.reference.state import State

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
ORDER = ("measure", "threshold", "threshold_value", "select", "exact", "match_norm", "max_norm")
ORDER += ("decay", "min_steps", "refresh", "schedule_unit", "seed")

# Assembly, and shared memory whose size the launch says, in what the host's compiler takes.
REPLACED = (
    (r'asm volatile\("mov.u32 %0, %%laneid;"[^;]*;', "lane = threadIdx.x % 32;"),
    (r'asm volatile\("mov.u32 %0, %%tid.x;"[^;]*;', "thread = threadIdx.x;"),
    (r'asm volatile\("atom.acq_rel.gpu.global.inc.u32[^;]*;"[^;]*;',
     "old = emulator::increment(ticket, count - 1);"),
    (r'asm volatile\("prefetch.L2 [^;]*;"[^;]*;', "static_cast<void>(p);"),
    (r"extern __shared__ uint4 kept_tiles\[\];",
     "static uint4 kept_tiles[kWarps * kKeptVectors];"),
)  # fmt: skip


def compiled(compiler: str, folder: Path) -> ctypes.CDLL:
    """The library of emulator.cpp, built in an empty folder."""
    source = folder / "csrc"
    for path in CSRC.rglob("*.*"):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
            copy = source / path.relative_to(CSRC)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text())
    counts = dict.fromkeys(REPLACED, 0)
    for path in (source / "cuda").glob("*.cu*"):
        text = path.read_text()
        for rule in REPLACED:
            text, count = re.subn(*rule, text)
            counts[rule] += count
        path.write_text(text)
        assert "asm" not in text, path.name
    assert set(counts.values()) == {1}, counts
    library = folder / "emulated.so"
    files = [HERE / "emulator.cpp", source / "tiles.cpp", source / "cuda" / "tables.cpp"]
    includes = [f"-I{HERE / 'shim'}", f"-I{source / 'cuda'}"]
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", "-x", "c++"]
    subprocess.run([compiler, *flags, *includes, *map(str, files), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.emulated_new.restype = ctypes.c_void_p
    return loaded


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)


class EmulatedBackend(Measuring):
    """A backend like CudaBackend; tests set what a step must not depend on."""

    name: ClassVar[str] = "emulated"
    library: ClassVar[ctypes.CDLL]
    capacity: ClassVar[int] = 4000
    blocks: ClassVar[int] = 2
    cooperative: ClassVar[bool] = True
    seed: ClassVar[int] = 0
    launches: ClassVar[int] = 0  # of the last step

    def __init__(self, plan: Plan, state: State, rules: Rules) -> None:
        self.reader = GradientReader(plan, state.device, state.members)
        self.plan, self.state = plan, state
        numbers: dict[str, Any] = for_kernel(rules)
        values = [float(numbers[name]) for name in ORDER] + [float(len(numbers["windows"]))]
        windows = [number for window in numbers["windows"] for number in window]
        count = len(plan.slots)
        self.engine = ctypes.c_void_p(
            self.library.emulated_new(
                (ctypes.c_int32 * count)(*(slot.layer for slot in plan.slots)),
                (ctypes.c_int64 * count)(*(slot.numel for slot in plan.slots)),
                (ctypes.c_int32 * count)(*(slot.bucket_log2 for slot in plan.slots)),
                (ctypes.c_int64 * count)(*(slot.first_bucket for slot in plan.slots)),
                (ctypes.c_uint32 * count)(*(slot.first_word for slot in plan.slots)),
                ctypes.c_int64(count),
                ctypes.c_int64(len(plan.layers)),
                (ctypes.c_double * len(values))(*values),
                (ctypes.c_double * max(len(windows), 1))(*windows),
                pointer(state.values),
                pointer(state.sketch),
                ctypes.c_int64(plan.buckets),
                pointer(state.parity),
            )
        )

    def __del__(self) -> None:
        self.library.emulated_delete(self.engine)

    def step(self, call: Call) -> Outcome:
        gradients = self.reader.read(call)
        if isinstance(gradients, Outcome):
            return gradients
        self.state.begin_anew(self.plan, self.reader.anew)
        self.launch(gradients, call, None)
        self.reader.write_back()
        return Outcome.DONE

    def measure(self, gradients: Sequence[Tensor | None], call: Call, sums: Tensor) -> None:
        self.launch(gradients, call, sums)

    def launch(self, gradients: Sequence[Tensor | None], call: Call, sums: Tensor | None) -> None:
        given = [g if g is not None and g.numel() else None for g in gradients]
        dtypes = [DTYPES.index(g.dtype) if g is not None else 0 for g in given]
        launches = self.library.emulated_step(
            self.engine,
            (ctypes.c_void_p * len(given))(*(pointer(g).value for g in given)),
            (ctypes.c_int32 * len(given))(*dtypes),
            pointer(call.grad_scale),
            pointer(call.found_inf),
            int(call.unscale),
            int(call.begins_round),
            int(call.decides),
            pointer(sums),
            self.capacity,
            self.blocks,
            int(self.cooperative),
            self.seed,
        )
        assert launches > 0, "a ticket was left over"
        type(self).launches = launches

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        return None if device.type == "cpu" else "emulated on the CPU"
