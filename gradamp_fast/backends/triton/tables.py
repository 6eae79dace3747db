"""What the kernel looks up: where tensors, tiles and layers lie, and where the gradients are."""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.plan import Plan, Slot
from .columns import LAYER_TICKETS, ROW
from .step import GROUP
from .tile import TILE

_TILE: int = TILE.value
_GROUP: int = GROUP.value
_ROW: int = ROW.value
_FIRST_TICKETS: int = LAYER_TICKETS.value


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

        tickets = _FIRST_TICKETS + layer_count + 1 + groups
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


class AddressTable:
    """A table of words on the device, uploaded when one has changed.

    A step that is captured in a CUDA graph gets a table of its own, copied from pinned memory
    that nothing writes again: the graph copies it at every replay.
    """

    # So many steps with different addresses may be captured without an eager one between; pinned
    # memory cannot be allocated during a capture.
    SPARES = 8

    def __init__(self, words: int, device: torch.device) -> None:
        self.device = device
        self._words: list[int] = []
        self.table = torch.zeros(words, dtype=torch.int64, device=device)
        self._captured: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._spares: list[tuple[Tensor, Tensor]] = []
        self._refill()

    def _refill(self) -> None:
        while self.device.type == "cuda" and len(self._spares) < self.SPARES:
            pinned = torch.zeros(
                self.table.numel(), dtype=torch.int64, device="cpu", pin_memory=True
            )
            self._spares.append((pinned, torch.zeros_like(self.table)))

    def upload(self, words: list[int]) -> Tensor:
        """The words on the device, first in the table: int64."""
        if self.device.type != "cuda":
            self.table[: len(words)].copy_(torch.tensor(words, dtype=torch.int64, device="cpu"))
        elif torch.cuda.is_current_stream_capturing():
            return self._capture(tuple(words))
        elif words != self._words:
            self._refill()
            # torch's allocator of pinned memory keeps the block until the copy is made.
            staged = torch.tensor(words, dtype=torch.int64, device="cpu", pin_memory=True)
            self.table[: len(words)].copy_(staged, non_blocking=True)
            self._words = words
        return self.table

    def _capture(self, words: tuple[int, ...]) -> Tensor:
        if words not in self._captured:
            if not self._spares:
                raise RuntimeError(
                    f"{self.SPARES} steps with different gradients were captured in CUDA graphs "
                    "without an eager one between: take an eager step first"
                )
            pinned, table = self._spares.pop()
            pinned[: len(words)].copy_(torch.tensor(words, dtype=torch.int64, device="cpu"))
            self._captured[words] = pinned, table
        pinned, table = self._captured[words]
        table.copy_(pinned, non_blocking=True)
        return table
