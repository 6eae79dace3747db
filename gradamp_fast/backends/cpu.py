"""C++ on the CPU: vectorised, on torch's threads."""

from __future__ import annotations

from typing import ClassVar

import torch

from .. import _extension
from ._compiled import CompiledBackend


class CpuBackend(CompiledBackend):
    """The compiled step for gradients on the CPU."""

    name: ClassVar[str] = "cpu"

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        if device.type != "cpu":
            return "the cpu backend serves gradients on the CPU"
        return _extension.reason()
