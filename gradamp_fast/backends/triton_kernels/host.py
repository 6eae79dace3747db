"""What the host keeps for the kernel: its tables and workspace, and its launches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from ...plan import Plan, Slot
from . import layers, step, tile
from .addresses import DTYPE_BITS

INTERPRETED: bool = knobs.runtime.interpret
_TILE: int = tile.TILE.value
_GROUP: int = step.GROUP.value
_ROW: int = layers.ROW.value
_MEASURE: int = step.MEASURE.value
_MULTIPLY: int = step.MULTIPLY.value
# Programs on a processor at a time: as many as every GPU takes, if registers allow.
_MAX_PROGRAMS = 16
# Of a processor; a warp's registers all lie in one of its quarters.
_REGISTERS, _QUARTERS, _WARP, _GRANULE = 65536, 4, 32, 8


def compiler_options(dtypes: int, cooperative: bool, hip: bool) -> dict[str, Any]:
    """What the kernel is compiled with, for a set of dtypes, a bit for each."""
    options: dict[str, Any] = {
        "num_warps": 1,
        "enable_fp_fusion": True,
        "launch_cooperative_grid": cooperative,
    }
    if not hip and not dtypes & DTYPE_BITS[torch.float64]:
        options["maxnreg"] = _REGISTERS // (_MAX_PROGRAMS * _WARP)
    return options


class Tables:
    """Where tensors, tiles and layers lie, and the workspace; made once, on the device.

    ``pointers`` holds them in the order of the kernel's parameters.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        layer_count = len(plan.layers)
        tile_tensor: list[int] = []
        tensors: list[tuple[int, ...]] = []
        tiles_of = [0] * (layer_count + 1)
        for index, slot in enumerate(plan.slots):
            tiles = -(-slot.numel // _TILE)
            tensors.append(_tensor_row(slot, len(tile_tensor)))
            tile_tensor += [index] * tiles
            tiles_of[slot.layer] += tiles  # -1, the excluded, is the last
            if slot.layer >= 0:
                self.measured_tiles = len(tile_tensor)
        if plan.measured == 0:
            self.measured_tiles = 0
        self.tiles = len(tile_tensor)

        layer_tiles, first, groups = [], 0, 0
        for tiles in tiles_of:
            of_layer = -(-tiles // _GROUP)
            layer_tiles.append((first, tiles, groups, of_layer))
            first, groups = first + tiles, groups + of_layer

        def rows(count: int) -> Tensor:
            return torch.zeros((max(count, 1), _ROW), dtype=torch.float64, device=device)

        tickets = step.LAYER_TICKETS.value + layer_count + 1 + groups
        self.pointers = (
            torch.tensor(tensors, dtype=torch.int64, device=device),
            torch.tensor(tile_tensor or [0], dtype=torch.int32, device=device),
            torch.tensor(layer_tiles, dtype=torch.int32, device=device),
            rows(self.tiles),
            rows(groups),
            rows(layer_count + 1),
            torch.zeros(max(layer_count, 1), dtype=torch.float64, device=device),  # scores
            torch.zeros(2, dtype=torch.float64, device=device),  # verdict
            torch.zeros(tickets, dtype=torch.int32, device=device),
        )


def _tensor_row(slot: Slot, first_tile: int) -> tuple[int, ...]:
    bucket_log2 = slot.bucket_log2 if slot.layer >= 0 else -1
    return (slot.numel, first_tile, slot.first_bucket, slot.layer, bucket_log2, 0, 0, 0)


class Launcher:
    """Launches the kernel with the parameters that stay the same for one plan.

    ``parameters`` are the tensors before ``addresses``, ``sizes`` the numbers between
    ``found_inf`` and ``unscale``. One compilation for each set of dtypes.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        table: Tensor,
        sizes: Sequence[int],
        device: torch.device,
        two_phases: bool,
    ) -> None:
        self.parameters, self.sizes, self.device = tuple(parameters), tuple(sizes), device
        self.two_phases, self.cooperative = two_phases, two_phases and not INTERPRETED
        self._table = table
        self._tiles = max(max(sizes[-2:]), 1)
        self._launch: dict[int, Any] = {}

    def load(self, dtypes: int) -> None:
        """Compiles and loads for a set of dtypes, a bit for each, unless that is done."""
        if dtypes in self._launch:
            return
        if INTERPRETED:
            import numpy  # computes there, and warns where a GPU gives NaN or infinity

            launch = step.step_kernel[(min(self._tiles, 3),)]
            self._launch[dtypes] = numpy.errstate(all="ignore")(launch)
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a step cannot be captured before its kernel is compiled: call "
                "amplifier.prepare() or take one step with gradients of these dtypes first"
            )
        try:
            self._launch[dtypes] = self._bind(dtypes)
        except (AssertionError, RuntimeError):
            if not self.cooperative:
                raise
            self.cooperative = False  # refused: two launches have equal bits
            self._launch[dtypes] = self._bind(dtypes)

    def _bind(self, dtypes: int) -> Any:
        arguments = (*self.parameters, self._table, 0, 0, *self.sizes, 0, 0, dtypes, False)
        options = compiler_options(dtypes, self.cooperative, bool(torch.version.hip))
        kernel = step.step_kernel.warmup(*arguments, grid=(1,), **options)
        kernel[(1, 1, 1)](*arguments)  # loads it; phases 0 do nothing
        registers = -(-kernel.n_regs // _GRANULE) * _GRANULE * _WARP
        resident = min(_QUARTERS * (_REGISTERS // _QUARTERS // registers), _MAX_PROGRAMS)
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        grid = (min(self._tiles, processors * resident), 1, 1)
        kernel[grid](*arguments)  # a refusal of this grid shows here
        return kernel[grid]

    @functools.cached_property
    def _first(self) -> tuple[Any, ...]:
        """Addresses spare the launch a look at each tensor; the interpreter wants tensors."""
        if INTERPRETED:
            return self.parameters
        return tuple(parameter.data_ptr() for parameter in self.parameters)

    def __call__(
        self, dtypes: int, table: Tensor, grad_scale: int, found_inf: int, unscale: bool
    ) -> None:
        launch = self._launch[dtypes]
        addresses = table if INTERPRETED else table.data_ptr()
        if self.cooperative:
            launches: tuple[int, ...] = (_MEASURE | _MULTIPLY,)
        else:
            launches = (_MEASURE, _MULTIPLY) if self.two_phases else (_MEASURE,)
        for phases in launches:
            launch(
                *self._first, addresses, grad_scale, found_inf, *self.sizes, int(unscale), phases,
                dtypes, INTERPRETED,
            )  # fmt: skip
