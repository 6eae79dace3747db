"""CUDA C++: one kernel launch a step."""

from __future__ import annotations

from typing import ClassVar

import torch

from .. import _extension
from ._compiled import CompiledBackend


class CudaBackend(CompiledBackend):
    """The compiled step for gradients on an NVIDIA GPU."""

    name: ClassVar[str] = "cuda"

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        if device.type != "cuda" or torch.version.hip:
            return "the cuda backend serves gradients on an NVIDIA GPU"
        if reason := _extension.reason():
            return reason
        built = _extension.built_with()
        if not built.get("cuda"):
            return (
                "the extension was built without CUDA kernels: install nvcc and rebuild with "
                f"GRADAMP_CUDA=1 ({built.get('summary', '')})"
            )
        extension = _extension.load()
        assert extension is not None
        problem: str | None = extension.cuda_unavailable(
            -1 if device.index is None else device.index
        )
        return problem
