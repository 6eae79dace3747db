"""Whole training steps with SGD, with and without ``fused_amplify``, in turn on one model."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradamp_fast
from bench.results import Training, percentiles

# Decisions from the start: after the default's first 100 steps nothing would be left to time.
OPTIONS: dict[str, Any] = {"min_steps": 2, "refresh": 4}
WARM_UP = 5  # steps, the first decision among them


class Block(nn.Module):
    """Causal self-attention and a feed-forward part, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project_in, self.project_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """fp32 [batch, tokens, width] to the same."""
        batch, tokens, width = x.shape
        parts = self.project_in(self.before_attention(x)).chunk(3, dim=2)
        q, k, v = (p.view(batch, tokens, self.heads, -1).transpose(1, 2) for p in parts)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project_out(seen.transpose(1, 2).reshape(batch, tokens, width))
        mlp: Tensor = self.mlp(self.before_mlp(x))
        return x + mlp


class SmallGPT(nn.Module):
    """A GPT; by default of 17 million parameters."""

    def __init__(
        self,
        vocabulary: int = 4096,
        context: int = 128,
        width: int = 384,
        blocks: int = 8,
        heads: int = 6,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [batch, tokens] to logits [batch, tokens, vocabulary]."""
        x = self.blocks(self.token(tokens) + self.position[: tokens.shape[1]])
        logits: Tensor = self.head(self.norm(x))
        return logits


@dataclass(frozen=True)
class Job:
    """A model, its batch in words, and the loss of one step."""

    name: str
    batch: str
    model: nn.Module
    loss: Callable[[], Tensor]


def resnet50(device: torch.device, images: int, side: int) -> Job:
    """torchvision's, on random images."""
    from torchvision import models

    model = models.resnet50().to(device)
    batch = torch.randn(images, 3, side, side, device=device)
    labels = torch.randint(1000, (images,), device=device)
    return Job(
        "ResNet-50",
        f"{images} images of {side} x {side}",
        model,
        lambda: functional.cross_entropy(model(batch), labels),
    )


def small_gpt(device: torch.device, sequences: int, length: int) -> Job:
    """Predicts random tokens."""
    model = SmallGPT(context=length).to(device)
    tokens = torch.randint(4096, (sequences, length + 1), device=device)
    return Job(
        "GPT, 8 blocks of 384",
        f"{sequences} sequences of {length} tokens",
        model,
        lambda: functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        ),
    )


def jobs(device: torch.device, quick: bool) -> list[Callable[[], Job]]:
    """What is trained, sized to the device."""
    if device.type == "cuda":
        made: list[Callable[[], Job]] = [
            lambda: resnet50(device, 64, 224),
            lambda: small_gpt(device, 64, 512),
        ]
    else:
        made = [lambda: resnet50(device, 8, 112), lambda: small_gpt(device, 8, 128)]
    return made[1:] if quick else made


def run_job(make: Callable[[], Job], device: torch.device, pairs: int) -> Training:
    """Pairs of neighbouring steps, one plain and one amplified, in random order."""
    torch.manual_seed(0)
    job = make()
    optimizer = torch.optim.SGD(job.model.parameters(), lr=1e-3, momentum=0.9)
    order = random.Random(0)

    on_gpu = device.type == "cuda"

    def finished() -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def step(amplified: bool) -> tuple[float, float]:
        """Milliseconds of a step, and of the call in it."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        start = finished()
        optimizer.zero_grad()
        job.loss().backward()
        begun = time.perf_counter()
        for event in events[:1]:
            event.record()
        if amplified:
            gradamp_fast.fused_amplify(job.model, **OPTIONS)
        for event in events[1:]:
            event.record()
        call = (time.perf_counter() - begun) * 1e3
        optimizer.step()
        whole = (finished() - start) * 1e3
        return whole, events[0].elapsed_time(events[1]) if on_gpu else call

    for _ in range(WARM_UP):
        step(amplified=True)
    plain: list[float] = []
    amplified: list[float] = []
    inside: list[float] = []
    for _ in range(pairs):
        for with_it in order.sample((True, False), 2):
            whole, call = step(with_it)
            (amplified if with_it else plain).append(whole)
            if with_it:
                inside.append(call)
    gradamp_fast.reset(job.model)
    return Training(
        model=job.name,
        batch=job.batch,
        elements=sum(p.numel() for p in job.model.parameters()),
        pairs=pairs,
        plain=percentiles(plain),
        amplified=percentiles(amplified),
        overhead=percentiles([100 * (a / p - 1) for a, p in zip(amplified, plain, strict=True)]),
        inside=percentiles(inside),
    )
