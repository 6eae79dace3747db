"""One step of amplification in slow, obvious fp64: the tests' own reading of the rules.

Nothing here is shared with the library. Gradients are fp64 numpy vectors in memory order,
keyed by parameter name; a complex gradient is given as its interleaved reals.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Vector = np.ndarray
Order = tuple[int, ...] | None

# Of growing amplification.
LOW = 0.1  # a mean direction above it: the learning rate is low
SURGE = 4.0  # times the least running variance


def murmur_finaliser(x: int) -> int:
    """MurmurHash3's 32-bit finaliser."""
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def sign(i: int) -> int:
    return -1 if murmur_finaliser(i // 32) >> (i % 32) & 1 else 1


@functools.cache
def signs(n: int) -> Vector:
    words = [murmur_finaliser(word) for word in range(n // 32 + 1)]
    return np.array([-1.0 if words[i // 32] >> (i % 32) & 1 else 1.0 for i in range(n)])


def bucket_length(n: int) -> int:
    if n < 4096:
        return 1
    return 16 if n < 131072 else 512


def bucket_sums(g: Vector) -> Vector:
    signed = signs(g.size) * g
    length = bucket_length(g.size)
    if length == 1:
        return signed
    return np.array([signed[i : i + length].sum() for i in range(0, g.size, length)])


@dataclass
class Layer:
    """What the steps so far left behind for one layer."""

    parameters: list[str]
    n: int = 0
    k: int = 0
    V: float = 0.0
    Q: float = 0.0
    D: float = 0.0
    F: float = 0.0
    R: float = 0.0
    selected: bool = False
    a: float = 1.0  # what growth came to
    settled: bool = False
    V_min: float = math.inf
    means: dict[str, Vector] = field(default_factory=dict)  # fp32, one entry a bucket
    # Parameters that had a gradient so far, and the order of its elements in memory.
    members: dict[str, Order] = field(default_factory=dict)

    def restart(self) -> None:
        self.k = 0
        self.V = self.Q = self.D = self.F = self.R = 0.0
        self.V_min = math.inf
        self.means.clear()

    def meet(self, now: Mapping[str, Order]) -> None:
        """Those have a gradient; a first one, or one in another order, begins the layer anew."""
        if self.members and any(self.members.get(name, "none") != now[name] for name in now):
            self.restart()
            self.selected, self.a, self.settled = False, 1.0, False
        self.members |= now

    @property
    def surging(self) -> bool:
        return self.V_min < self.V / SURGE

    def grown(self) -> float:
        """The factor of its own, less what a surge takes back."""
        if not self.surging:
            return self.a
        return max(self.a * math.sqrt(SURGE * self.V_min / self.V), 1.0)


class Oracle:
    """``layers`` maps a layer's name to its parameters' names; ``excluded`` lists the rest."""

    def __init__(
        self,
        layers: Mapping[str, Sequence[str]],
        excluded: Sequence[str] = (),
        *,
        factor: float = 2.0,
        measure: str = "fluctuation",
        threshold: str | float = "mean",
        select: str = "below",
        num_std: float = 1.0,
        quantile: float = 0.5,
        seed: int = 0,
        decay: float | None = 0.99,
        min_steps: int = 100,
        refresh: int | str = 100,
        windows: Sequence[tuple] | None = None,
        unit: str = "epoch",
        timing: str = "lagged",
        match_norm: bool = False,
        max_norm: float | None = None,
        grow: bool = False,
        max_factor: float = 1024.0,
    ) -> None:
        self.layers = {name: Layer(list(parameters)) for name, parameters in layers.items()}
        self.excluded = list(excluded)
        self.factor, self.measure, self.select = factor, measure, select
        self.threshold, self.num_std, self.quantile = threshold, num_std, quantile
        self.seed, self.decay, self.min_steps, self.refresh = seed, decay, min_steps, refresh
        self.windows, self.unit, self.timing = windows, unit, timing
        self.match_norm, self.max_norm = match_norm, max_norm
        self.grow, self.max_factor = grow, max_factor
        self.rising = False  # the learning rate: a warm-up
        self.first = True  # no layer could grow before the coming decision
        self.steps = self.skipped_steps = self.now = 0
        self.epoch = -1
        self.tau = math.nan
        self.ruling: dict[str, bool] = {}  # the answer to take where a score is all but tau
        self.total_norm = math.nan

    # ---- statistics and state -------------------------------------------------------

    def weight(self, k: int) -> float:
        if self.decay is None:
            return 1 / k
        return (1 - self.decay) / (1 - self.decay**k)

    def update(self, layer: Layer, gradients: Mapping[str, Vector]) -> None:
        everything = np.concatenate([gradients[name] for name in gradients])
        mean = everything.sum() / everything.size
        v = np.square(everything - mean).sum() / everything.size
        sums = {name: bucket_sums(g) for name, g in gradients.items()}
        zeros = {name: np.zeros(s.size, np.float32) for name, s in sums.items()}
        old = {name: layer.means.get(name, zeros[name]).astype(np.float64) for name in sums}

        layer.k += 1
        w = self.weight(layer.k)
        q = sum(np.square(s).sum() for s in sums.values())
        layer.V += w * (v - layer.V)
        layer.Q += w * (q - layer.Q)
        if layer.k >= 2:
            root = math.sqrt(q) * math.sqrt(sum(np.square(h).sum() for h in old.values()))
            dot = sum((sums[name] * old[name]).sum() for name in sums)
            layer.D += self.weight(layer.k - 1) * ((dot / root if root else 0.0) - layer.D)
        for name, s in sums.items():
            layer.means[name] = (old[name] + w * (s - old[name])).astype(np.float32)
        layer.R = sum(np.square(layer.means[name].astype(np.float64)).sum() for name in sums)
        layer.F = (1 - w) ** 2 * layer.F + w**2 * q
        layer.n = everything.size
        if 5 * layer.k >= self.min_steps and layer.V > 0:
            layer.V_min = min(layer.V_min, layer.V)

    # ---- decision -------------------------------------------------------------------

    def score(self, name: str) -> float:
        layer = self.layers[name]
        if self.measure == "random":
            return self.draw(list(self.layers).index(name)) if layer.k >= 1 else math.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.measure == "variance":
                return float(np.log(layer.V)) if layer.k >= 1 else math.nan
            if layer.k < 2:
                return math.nan
            if self.measure == "direction":
                return -layer.D
            return float(np.log(np.float64(layer.F) / np.float64(layer.R)))

    def draw(self, index: int) -> float:
        """Uniform in (0, 1), anew for each decision."""
        counted = self.steps - self.skipped_steps
        decision = self.epoch if self.refresh == "epoch" else counted // self.refresh
        stream = murmur_finaliser(murmur_finaliser(self.seed) ^ decision)
        return (murmur_finaliser(stream ^ index) + 0.5) / 2**32

    def eligible(self) -> dict[str, float]:
        scores = {n: self.score(n) for n in self.layers if self.layers[n].k >= self.min_steps}
        return {name: score for name, score in scores.items() if math.isfinite(score)}

    def decide(self) -> None:
        scores = self.eligible()
        values = np.array(list(scores.values()))
        if not isinstance(self.threshold, str):
            self.tau = float(self.threshold)
        elif not scores:
            self.tau = math.nan
        elif self.threshold == "mean":
            self.tau = float(values.mean())
        elif self.threshold == "std":
            away = self.num_std * float(values.std())
            self.tau = float(values.mean()) + (-away if self.select == "below" else away)
        else:
            self.tau = float(np.quantile(values, self.quantile))
        for name, layer in self.layers.items():
            score = scores.get(name, math.nan)
            layer.selected = score < self.tau if self.select == "below" else score > self.tau
            if abs(score - self.tau) < 1e-4 * max(1.0, abs(self.tau)):
                layer.selected = self.ruling.get(name, layer.selected)
        if self.grow and scores and self.window() and not self.rising:
            self.grow_or_settle([self.layers[name] for name in scores])

    def grow_or_settle(self, layers: Sequence[Layer]) -> None:
        """``layers`` are the eligible ones."""
        direction = sum(layer.n * layer.D for layer in layers) / sum(layer.n for layer in layers)
        too_high = self.first and direction <= LOW
        for layer in layers:
            if layer.settled:
                continue
            if too_high or not layer.selected:
                back = 1.0 if self.first else self.active_factor()
                layer.a = max(layer.grown() / back, 1.0)
                layer.settled, layer.V_min = True, layer.V or math.inf
            elif not layer.surging:
                layer.a = min(layer.a * self.active_factor(), self.max_factor)
        self.first = False

    def release(self) -> None:
        self.first = True
        for layer in self.layers.values():
            layer.settled, layer.V_min = False, math.inf

    def set_epoch(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        self.epoch, self.now = epoch, self.steps
        if self.refresh == "epoch":
            self.decide()
            if self.decay is None:
                for layer in self.layers.values():
                    layer.restart()

    def window(self) -> list[float] | None:
        """The factor of the window that is open, if it has one; None if there is no window."""
        if self.windows is None:
            return [self.factor]
        now = self.epoch if self.unit == "epoch" else self.now
        for start, stop, *own in self.windows:
            if start <= now < stop:
                return own or [self.factor]
        return None

    def active_factor(self) -> float:
        window = self.window()
        return 1.0 if window is None else window[0]

    def factors(self) -> dict[str, float]:
        """What each parameter's gradient is multiplied by, as the state stands."""
        if self.window() is None:
            return {}
        return {
            name: layer.grown() if self.grow else self.active_factor()
            for layer in self.layers.values()
            if self.grow or layer.selected
            for name in layer.parameters
        }

    # ---- the step -------------------------------------------------------------------

    def step(
        self,
        gradients: Mapping[str, Vector],
        *,
        grad_scale: float | None = None,
        found_inf: bool = False,
        unscale: bool = True,
        orders: Mapping[str, Order] | None = None,
    ) -> dict[str, float] | None:
        """What each gradient given is multiplied by, before rounding; None: a skipped step."""
        if not gradients:
            return {}
        inverse = 1.0 if grad_scale is None else float(np.float32(1 / grad_scale))
        true = {name: g * inverse for name, g in gradients.items()}
        present = {
            layer: {name: true[name] for name in state.parameters if name in true}
            for layer, state in self.layers.items()
        }
        present = {n: of for n, of in present.items() if sum(g.size for g in of.values())}
        for layer, of in present.items():
            self.layers[layer].meet({n: (orders or {}).get(n) for n, g in of.items() if g.size})
        finite = all(np.isfinite(g).all() for of in present.values() for g in of.values())
        self.now = self.steps
        standing = self.factors()
        self.steps += 1
        if found_inf or not finite:
            self.skipped_steps += 1
            return None

        for name, of in present.items():
            if set(self.layers[name].members) <= set(of):
                self.update(self.layers[name], of)
        counted = self.steps - self.skipped_steps
        if self.refresh != "epoch" and counted % self.refresh == 0:
            self.decide()
        if self.timing == "exact":
            standing = self.factors()

        multipliers = {name: standing.get(name, 1.0) for name in true}
        coefficient = self.rescale(true, multipliers)
        rest = inverse if unscale else 1.0
        return {name: m * coefficient * rest for name, m in multipliers.items()}

    def rescale(self, true: Mapping[str, Vector], multipliers: Mapping[str, float]) -> float:
        before = math.sqrt(sum(np.square(g).sum() for g in true.values()))
        after = math.sqrt(sum(multipliers[n] ** 2 * np.square(g).sum() for n, g in true.items()))
        if self.match_norm:
            return before / after if after else 1.0
        if self.max_norm is not None:
            self.total_norm = after
            return min(1.0, self.max_norm / (after + 1e-6))
        return 1.0
