"""Compiles, loads and launches the kernel."""

from __future__ import annotations

from typing import Any

import torch
from triton import knobs

from ...call import Call
from ...model.plan import Plan
from ...options import Rules
from ...reference.state import State
from ..compiled import for_kernel
from . import step
from .columns import CONFIG
from .tables import AddressTable, Tables

INTERPRETED: bool = knobs.runtime.interpret
_MEASURE: int = step.MEASURE.value
_WRITE: int = step.WRITE.value
# Programs that run on a processor at a time: every GPU takes so many, if registers allow.
_MAX_PROGRAMS = 16
# A processor has so many registers, in four quarters; a warp has all of its own in one quarter, and
# gets them by eight for each thread.
_REGISTERS, _QUARTERS, _WARP, _GRANULE = 65536, 4, 32, 8


def compiler_options(cooperative: bool, hip: bool) -> dict[str, Any]:
    """What the kernel is compiled with."""
    options: dict[str, Any] = {
        "num_warps": 1,
        "enable_fp_fusion": True,
        "launch_cooperative_grid": cooperative,
    }
    if not hip:
        options["maxnreg"] = _REGISTERS // (_MAX_PROGRAMS * _WARP)
    return options


def configuration(rules: Rules) -> list[float]:
    """The rules as numbers, in the order of ``CONFIG``."""
    windows = rules.windows
    given = {**for_kernel(rules), "needs_norm": rules.needs_norm, "windows": len(windows)}
    return [
        *(float(given[name]) for name in CONFIG),
        *(number for window in windows for number in window),
    ]


class Launcher:
    """Launches the kernel for one plan, in the order of streams.

    One compilation for each set of dtypes, a bit for each, and rule of updates, 0 for none.
    """

    def __init__(self, plan: Plan, state: State, rules: Rules) -> None:
        self.device = state.device
        self.on_gpu = self.device.type == "cuda"
        self.two_phases = rules.two_phases
        self._grows = rules.grow
        self.cooperative = self.two_phases and not INTERPRETED
        tables = Tables(plan, self.device)
        numbers = torch.tensor(configuration(rules), dtype=torch.float64, device="cpu")
        # In the order of the kernel's parameters: before the addresses, and from found_inf to
        # unscale.
        self._tensors = (
            *(state.values, state.sketch, state.parity),
            *(numbers.to(self.device), *tables.pointers),
        )
        self._sizes = (
            *(plan.measured, len(plan.layers), plan.buckets),
            *(tables.measured_tiles, tables.tiles),
        )
        # Addresses spare the launch a look at each tensor; the interpreter wants tensors.
        self._first = (
            self._tensors if INTERPRETED else tuple(tensor.data_ptr() for tensor in self._tensors)
        )
        self._slots = len(plan.slots)
        # Without updates and with them: the tables' rows are not alike.
        self._tables = [AddressTable(self._slots, self.device)]
        self._tiles = max(tables.measured_tiles, tables.tiles, 1)
        self._launch: dict[tuple[int, int], Any] = {}
        if self.on_gpu:
            self._stream = torch.cuda.current_stream()
            self._done = torch.cuda.Event()
            self._done.record(self._stream)

    def __call__(self, dtypes: int, words: list[int], call: Call, update: int) -> None:
        """One step on what the words say, after the one before."""
        self.load(dtypes, update)
        capturing = self.on_gpu and torch.cuda.is_current_stream_capturing()
        if self.on_gpu and not capturing:
            stream = torch.cuda.current_stream()
            if stream != self._stream:
                stream.wait_event(self._done)
                self._stream = stream
        table = self._table(len(words), update).upload(words)
        if self.cooperative:
            launches: tuple[int, ...] = (_MEASURE | _WRITE,)
        else:
            launches = (_MEASURE, _WRITE) if self.two_phases else (_MEASURE,)
        for phases in launches:
            self._launch[dtypes, update](
                *self._first,
                table if INTERPRETED else table.data_ptr(),
                0 if call.grad_scale is None else call.grad_scale.data_ptr(),
                0 if call.found_inf is None else call.found_inf.data_ptr(),
                *self._sizes, int(call.unscale), int(call.begins_round), int(call.decides),
                phases, self._slots, dtypes, INTERPRETED, self._grows, update,
            )  # fmt: skip
        if self.on_gpu and not capturing:
            self._done.record(self._stream)

    def _table(self, words: int, update: int) -> AddressTable:
        """One that takes so many; a longer one where an optimizer has more groups than before."""
        if update and (len(self._tables) == 1 or self._tables[1].table.numel() < words):
            self._tables[1:] = [AddressTable(words, self.device)]
        return self._tables[1 if update else 0]

    def load(self, dtypes: int, update: int) -> None:
        """Compiles and loads for a set of dtypes and a rule, unless that is done."""
        if (dtypes, update) in self._launch:
            return
        if INTERPRETED:
            import numpy  # computes there, and warns where a GPU gives NaN or infinity

            launch = step.step_kernel[(min(self._tiles, 3),)]
            self._launch[dtypes, update] = numpy.errstate(all="ignore")(launch)
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a step cannot be captured before its kernel is compiled: call "
                "amplifier.prepare() or take one step with gradients of these dtypes first"
            )
        try:
            self._launch[dtypes, update] = self._bind(dtypes, update)
        except (AssertionError, RuntimeError):
            if not self.cooperative:
                raise
            self.cooperative = False  # refused: two launches have equal bits
            self._launch[dtypes, update] = self._bind(dtypes, update)

    def _bind(self, dtypes: int, update: int) -> Any:
        arguments = (
            *(*self._tensors, self._tables[0].table, 0, 0, *self._sizes, 0, 0, 0, 0, self._slots),
            *(dtypes, False, self._grows, update),
        )
        options = compiler_options(self.cooperative, bool(torch.version.hip))
        kernel = step.step_kernel.warmup(*arguments, grid=(1,), **options)
        kernel[(1, 1, 1)](*arguments)  # loads it; phases 0 do nothing
        registers = -(-kernel.n_regs // _GRANULE) * _GRANULE * _WARP
        resident = min(_QUARTERS * (_REGISTERS // _QUARTERS // registers), _MAX_PROGRAMS)
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        grid = (min(self._tiles, processors * resident), 1, 1)
        kernel[grid](*arguments)  # a refusal of this grid shows here
        return kernel[grid]
