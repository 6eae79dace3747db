"""A few steps of every kind on small gradients, for compute-sanitizer."""

from __future__ import annotations

import torch
from torch import nn

from gradamp_fast import Amplifier

SIZES = (1, 33, 1009, 4097, 8193, 140_001)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS: list[dict[str, object]] = [
    {},
    {"timing": "exact", "threshold": "quantile"},
    {"max_norm": 0.5},
    {"match_norm": True, "timing": "exact"},
]


def main() -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    for options in OPTIONS:
        parameters = nn.ParameterList(
            nn.Parameter(torch.zeros(size, dtype=DTYPES[i % 4], device="cuda"))
            for i, size in enumerate(SIZES)
        )
        amplifier = Amplifier(
            parameters, backend="cuda", group_by="tensor", min_steps=1, refresh=1, **options
        )
        scale, found_inf = torch.full((1,), 2.0, device="cuda"), torch.zeros(1, device="cuda")
        for _ in range(3):
            for p in parameters:
                values = torch.randn(p.numel() + 1, device="cuda", generator=generator)
                p.grad = values.to(p.dtype)[1:]  # misaligned
            amplifier.step(grad_scale=scale, found_inf=found_inf)
        assert amplifier.report().steps == 3


if __name__ == "__main__":
    main()
