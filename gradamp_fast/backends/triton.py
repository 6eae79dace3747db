"""Triton: the step in one kernel launch, compiled on first use."""

from __future__ import annotations

import functools
import os
from typing import ClassVar

import torch

from ..call import Call, Outcome
from ..options import Rules
from ..plan import Plan
from ..state import State
from ._compiled import for_kernel
from .stepping import Backend


class TritonBackend(Backend):
    """The fused step without a compiler of C++ or CUDA; reads the gradients in Python.

    Captured in a CUDA graph, a step copies the table of addresses from memory that the backend
    owns: the backend must live as long as the graph.
    """

    name: ClassVar[str] = "triton"

    def __init__(self, plan: Plan, state: State, rules: Rules) -> None:
        from .triton_kernels.addresses import AddressTable, GradientAddresses
        from .triton_kernels.host import Launcher, Tables

        self.device = state.device
        self.on_gpu = self.device.type == "cuda"
        if self.on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a step cannot be captured before the Amplifier has its tables on the device: "
                "call amplifier.prepare() or take one step first"
            )
        with torch.cuda.device(self.device if self.on_gpu else -1):
            tables = Tables(plan, self.device)
            numbers = torch.tensor(configuration(rules), dtype=torch.float64)
            self.addresses = GradientAddresses(plan, self.device)
            self.table = AddressTable(len(plan.slots), self.device)
            self.launcher = Launcher(
                (
                    *(state.values, state.sketch, state.parity),
                    *(numbers.to(self.device), *tables.pointers),
                ),
                self.table.upload([0] * len(plan.slots)),
                (
                    *(plan.measured, len(plan.layers), plan.buckets),
                    *(tables.measured_tiles, tables.tiles),
                ),
                self.device,
                rules.two_phases,
            )
            self.launcher.load(self.addresses.dtypes)
            if self.on_gpu:
                self.stream = torch.cuda.current_stream()
                self.done = torch.cuda.Event()
                self.done.record(self.stream)

    def step(self, call: Call) -> Outcome:
        outcome = self.addresses.read(call)
        if outcome is not Outcome.DONE:
            return outcome
        if self.on_gpu and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                self._run(call)
        else:
            self._run(call)
        self.addresses.reader.write_back()
        return Outcome.DONE

    def _run(self, call: Call) -> None:
        dtypes = self.addresses.dtypes
        changed, self.addresses.gradients = self.addresses.gradients, []  # let go of
        self.launcher.load(dtypes)
        capturing = self.on_gpu and torch.cuda.is_current_stream_capturing()
        if self.on_gpu and not capturing:
            stream = torch.cuda.current_stream()
            if stream != self.stream:
                stream.wait_event(self.done)
                self.stream = stream
        self.launcher(
            dtypes,
            self.table.upload(self.addresses.words),
            0 if call.grad_scale is None else call.grad_scale.data_ptr(),
            0 if call.found_inf is None else call.found_inf.data_ptr(),
            call.unscale,
        )
        if self.on_gpu and not capturing:
            self.done.record(self.stream)
        # Which ones were written is known on the device only.
        torch.autograd.graph.increment_version(
            changed if call.found_inf is None else [*changed, call.found_inf]
        )

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device.type == "cpu" and not interpreted:
            return "triton serves CPU tensors only under TRITON_INTERPRET=1"
        if device.type not in ("cpu", "cuda"):
            return f"the triton backend serves gradients on a GPU of torch.cuda, not {device.type}"
        if device.type == "cuda" and interpreted:
            return "under TRITON_INTERPRET=1 triton serves CPU tensors only: unset it"
        return _interpreter_problem() if interpreted else _compiler_problem()


def configuration(rules: Rules) -> list[float]:
    """The rules as numbers, in the order of the constants in triton_kernels/layers.py."""
    given = for_kernel(rules)
    windows = given["windows"]
    return [
        *(
            float(given[name])
            for name in (
                "measure", "threshold", "select", "schedule_unit", "exact", "match_norm",
                "max_norm", "threshold_value", "decay", "min_steps", "refresh", "seed",
            )
        ),
        float(len(windows)),
        *(number for window in windows for number in window),
    ]  # fmt: skip


def _import_problem() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}): pip install triton"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        return f"triton {triton.__version__} is too old: install 3.6 or newer"
    return None


def _interpreter_problem() -> str | None:
    if problem := _import_problem():
        return problem
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(tl.sum, InterpretedFunction):
        return "TRITON_INTERPRET was set after triton was imported: set it before Python starts"
    return None


@functools.cache
def _compiler_problem() -> str | None:
    """Why triton cannot compile for the current GPU. It needs a C compiler for its launcher."""
    if problem := _import_problem():
        return problem
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # whatever a driver or compiler that is missing raises
        return f"triton cannot use this GPU: {error}"
    return None
