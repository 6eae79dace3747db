"""Triton: the step in one kernel launch, compiled on first use.

A step goes through ``addresses`` (reads the gradients) and ``updates`` (what an optimizer updates
by them), ``launch`` and ``tables`` (what the kernel looks up), to the kernel: ``step``, with
``tile`` for sums, ``decide`` for layers and ``update`` for what an optimizer does.
Importing this file does not import triton.
"""

from __future__ import annotations

import functools
import os
from typing import ClassVar

import torch

from ...call import Call, Outcome
from ...model.plan import Plan
from ...options import Rules
from ...reference.state import State
from ..stepping import Backend


class TritonBackend(Backend):
    """The fused step without a compiler of C++ or CUDA.

    The gradients are read in Python, or by the extension where there is one.

    Captured in a CUDA graph, a step copies the table of addresses from memory that the backend
    owns: the backend must live as long as the graph.
    """

    name: ClassVar[str] = "triton"

    def __init__(self, plan: Plan, state: State, rules: Rules) -> None:
        from .addresses import GradientAddresses
        from .launch import Launcher
        from .updates import UpdateRows

        self.plan, self.state, self.device = plan, state, state.device
        on_gpu = self.device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a step cannot be captured before the Amplifier has its tables on the device: "
                "call amplifier.prepare() or take one step first"
            )
        with torch.cuda.device(self.device if on_gpu else -1):
            self.addresses = GradientAddresses(plan, state, rules.needs_norm)
            self.rows = UpdateRows(plan)
            self.launcher = Launcher(plan, state, rules)
            if plan.layers:  # else it is an optimizer's, whose rule the first step tells
                self.launcher.load(self.addresses.dtypes, 0)

    def step(self, call: Call) -> Outcome:
        outcome = self.addresses.read(call)
        if outcome is not Outcome.DONE:
            return outcome
        words, rule = self.addresses.words, 0
        if call.update is not None:
            self.rows.read(call, self.addresses)
            words, rule = self.rows.words, self.rows.rule
        self.state.heed_members(self.plan)
        if self.launcher.on_gpu and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                self.launcher(self.addresses.dtypes, words, call, rule)
        else:
            self.launcher(self.addresses.dtypes, words, call, rule)
        if call.update is not None:
            self.rows.written()
        self.addresses.written(call)
        return Outcome.DONE

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
