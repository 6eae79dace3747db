"""Signed sums of short runs of a gradient: what it is compared with from step to step."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def signs(numel: int, device: torch.device, first_word: int = 0) -> Tensor:
    """Signs of ``numel`` elements of a tensor in memory order, +1 or -1: int8 [numel].

    The first of them is element ``32 * first_word``.
    """
    first = 32 * first_word
    capacity = 1 << max(first + numel - 1, 31).bit_length()
    return _signs(capacity, device)[first : first + numel]


@functools.lru_cache(maxsize=4)
def _signs(capacity: int, device: torch.device) -> Tensor:
    """Bit i % 32 of the hash of i // 32 set means minus."""
    word = murmur_finaliser(torch.arange(capacity // 32, device=device))
    bits = (word[:, None] >> torch.arange(32, device=device)) & 1
    return (1 - 2 * bits).to(torch.int8).flatten()


def murmur_finaliser(word: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser of int64 values below 2**32."""
    word = word ^ (word >> 16)
    word = (word * 0x85EBCA6B) & 0xFFFFFFFF
    word = word ^ (word >> 13)
    word = (word * 0xC2B2AE35) & 0xFFFFFFFF
    return word ^ (word >> 16)


def bucket_sums(values: Tensor, bucket_log2: int, first_word: int = 0) -> Tensor:
    """Signed sums of runs of ``2**bucket_log2`` elements: [n] -> [buckets].

    The last run may be short.
    """
    signed = values * signs(values.numel(), values.device, first_word)
    length = 1 << bucket_log2
    padding = -values.numel() % length
    return torch.nn.functional.pad(signed, (0, padding)).view(-1, length).sum(dim=1)
