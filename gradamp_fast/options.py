"""What a user may ask for, validated together, and what it comes to where something is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from types import FunctionType
from typing import Any, Literal, get_args

from ._checks import in_range, nearest, one_of, plain, whole_number
from .schedule import Schedule

Measure = Literal["fluctuation", "direction", "variance", "random"]
ThresholdRule = Literal["mean", "std", "quantile"]
Threshold = Literal["mean", "std", "quantile", "number"]
ScheduleUnit = Literal["always", "epoch", "step"]
Select = Literal["below", "above"]
Timing = Literal["lagged", "exact"]
Placement = Literal["gradient", "backward"]
BackendName = Literal["auto", "cuda", "triton", "cpu", "torch"]
GroupBy = Literal["module", "tensor"] | Callable[[str], str | None]
Names = str | Iterable[str] | Callable[[str], bool]

# What may differ between a checkpoint and the run that loads it.
NOT_STATE = ("backend", "error_if_nonfinite")


class _LeftOut:
    """In the place of a default that depends on ``grow``."""

    def __repr__(self) -> str:
        return "<as grow says>"


LEFT_OUT: Any = _LeftOut()
# What is meant where an option is left out, without and with grow=True.
DEFAULTS: dict[bool, dict[str, Any]] = {
    False: {
        "factor": 2.0,
        "measure": "fluctuation",
        "threshold": "mean",
        "decay": 0.99,
        "min_steps": 100,
        "refresh": 100,
    },
    True: {
        "factor": 1.4,
        "measure": "direction",
        "threshold": 0.0,
        "decay": 0.9,
        "min_steps": 50,
        "refresh": 10,
    },
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of an ``Amplifier``; ValueError names the option, its value and its range.

    Where ``factor``, ``measure``, ``threshold``, ``decay``, ``min_steps`` or ``refresh`` is left
    out it is what ``DEFAULTS`` says for ``grow``.

    Attributes:
        grow: give every layer a factor of its own, 1 at first, that grows while the layer is
            selected and then stands.
        max_factor: with ``grow=True``, the most that a layer's grows to (None: 1024.0); > 1.
        factor: what selected gradients are multiplied by; finite, > 0, not 1. With ``grow=True``
            what a selected layer's own factor is multiplied by at each decision; > 1.
        measure: the score of a layer: ``"fluctuation"`` (ln F/R, low where gradients agree
            from step to step), ``"direction"`` (the same, blind to each step's size),
            ``"variance"`` (ln V) or ``"random"`` (drawn anew from (0, 1) for each decision).
        threshold: over all layers' scores: ``"mean"``, ``"std"``, ``"quantile"`` or a number.
        select: layers ``"below"`` or ``"above"`` the threshold.
        num_std: distance from the mean in standard deviations, for ``threshold="std"``
            (None: 1.0); > 0.
        quantile: which one, for ``threshold="quantile"`` (None: 0.5); in (0, 1).
        seed: of the draws, for ``measure="random"`` (None: 0); in [0, 2**32).
        decay: of the running means, in [0, 1); None averages since the last restart.
        min_steps: steps a layer needs before it may be selected; >= 1.
        refresh: a decision every so many steps, or ``"epoch"``.
        schedule: when to amplify; None is always.
        timing: ``"lagged"`` multiplies by the selection that stood before the step,
            ``"exact"`` by the one made in it.
        placement: ``"gradient"`` multiplies the selected layers' gradients, ``"backward"`` what
            flows out of them while gradients are computed, so that earlier layers feel it.
        measure_every: with ``placement="backward"`` every so many steps is plain and measured,
            the others are amplified (None: 10); >= 2.
        max_amplification: with ``placement="backward"``, bound of the product over all selected
            layers (None: 16.0); > 1.
        match_norm: rescale so that the global norm is what it was.
        max_norm: clip the global norm, as ``torch.nn.utils.clip_grad_norm_`` does.
        group_by: ``"module"``, ``"tensor"`` or a function from parameter name to layer name
            (None excludes the parameter).
        include, exclude: globs over parameter names, or a function of the name; exclude wins.
        exclude_bias_and_norm: exclude parameters of at most one dimension.
        error_if_nonfinite: raise for NaN and Inf instead of skipping; synchronises.
        backend: ``"auto"`` or the one to use.
    """

    grow: bool = False
    max_factor: float | None = None
    factor: float = LEFT_OUT
    measure: Measure = LEFT_OUT
    threshold: ThresholdRule | float = LEFT_OUT
    select: Select = "below"
    num_std: float | None = None
    quantile: float | None = None
    seed: int | None = None
    decay: float | None = LEFT_OUT
    min_steps: int = LEFT_OUT
    refresh: int | Literal["epoch"] = LEFT_OUT
    schedule: Schedule | None = None
    timing: Timing = "lagged"
    placement: Placement = "gradient"
    measure_every: int | None = None
    max_amplification: float | None = None
    match_norm: bool = False
    max_norm: float | None = None
    group_by: GroupBy = "module"
    include: Names | None = None
    exclude: Names | None = None
    exclude_bias_and_norm: bool = False
    error_if_nonfinite: bool = False
    backend: BackendName = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) is not LEFT_OUT:
                object.__setattr__(self, field.name, _plain(field.name, value))
        for name, default in DEFAULTS[self.grow is True].items():
            if getattr(self, name) is LEFT_OUT:
                object.__setattr__(self, name, default)
        self._validate()

    def _validate(self) -> None:
        check_factor(self.factor, grow=self.grow is True)
        one_of("measure", self.measure, get_args(Measure))
        if isinstance(self.threshold, str):
            one_of("threshold", self.threshold, (*get_args(ThresholdRule), "a number"))
        else:
            in_range("threshold", self.threshold, math.isfinite, "a finite number")
        one_of("select", self.select, get_args(Select))
        for option, rule in (("num_std", "std"), ("quantile", "quantile")):
            if getattr(self, option) is not None and self.threshold != rule:
                raise ValueError(
                    f"{option}={getattr(self, option)!r} goes with threshold={rule!r} only; "
                    f"threshold is {self.threshold!r}"
                )
        if self.num_std is not None:
            in_range("num_std", self.num_std, lambda x: 0 < x < math.inf, "finite and > 0")
        if self.quantile is not None:
            in_range("quantile", self.quantile, lambda x: 0 < x < 1, "in (0, 1)")
        if self.seed is not None:
            whole_number("seed", self.seed, "a whole number in [0, 2**32)", 0, 2**32 - 1)
            if self.measure != "random":
                raise ValueError(
                    f"seed={self.seed!r} goes with measure='random' only; "
                    f"measure is {self.measure!r}"
                )
        if self.decay is not None:
            in_range("decay", self.decay, lambda x: 0 <= x < 1, "None or in [0, 1)")
        whole_number("min_steps", self.min_steps, "a whole number >= 1")
        if self.refresh != "epoch":
            whole_number("refresh", self.refresh, 'a whole number >= 1 or "epoch"')
        if not isinstance(self.schedule, Schedule | None):
            raise ValueError(
                f"schedule={self.schedule!r} is not a Schedule: give "
                "gradamp_fast.Schedule([(start, stop), ...], unit='epoch' or 'step')"
            )
        one_of("timing", self.timing, get_args(Timing))
        if self.max_norm is not None:
            in_range("max_norm", self.max_norm, lambda x: 0 < x < math.inf, "finite and > 0")
            if self.match_norm:
                raise ValueError(
                    f"match_norm=True and max_norm={self.max_norm!r} both set the global norm: "
                    "leave one of them out"
                )
        if not callable(self.group_by):
            one_of("group_by", self.group_by, ("module", "tensor"))
        for option in ("grow", "match_norm", "exclude_bias_and_norm", "error_if_nonfinite"):
            if not isinstance(getattr(self, option), bool):
                raise ValueError(f"{option}={getattr(self, option)!r} is not True or False")
        one_of("backend", self.backend, get_args(BackendName))
        self._validate_placement()
        self._validate_growth()

    def _validate_growth(self) -> None:
        if not self.grow:
            if self.max_factor is not None:
                raise ValueError(
                    f"max_factor={self.max_factor!r} goes with grow=True only; grow is False"
                )
            return
        if self.max_factor is not None:
            in_range("max_factor", self.max_factor, lambda x: 1 < x < math.inf, "finite and > 1")
        reasons = {
            ("match_norm", True): "it takes back in every step what has grown",
            ("placement", "backward"): "there the factors of layers compound",
            ("measure", "random"): "a draw does not know whether gradients agree",
        }
        for (option, value), reason in reasons.items():
            if getattr(self, option) == value:
                raise ValueError(f"{option}={value!r} does not go with grow=True: {reason}")
        for start, stop, factor in () if self.schedule is None else self.schedule.windows:
            if factor is not None and factor <= 1:
                raise ValueError(
                    f"schedule window {(start, stop, factor)} does not go with grow=True: nothing "
                    "grows by a factor of 1 or less"
                )

    def _validate_placement(self) -> None:
        one_of("placement", self.placement, get_args(Placement))
        only = ("measure_every", "max_amplification")
        if self.placement == "gradient":
            for option in only:
                if getattr(self, option) is not None:
                    raise ValueError(
                        f"{option}={getattr(self, option)!r} goes with placement='backward' only; "
                        "placement is 'gradient'"
                    )
            return
        if self.measure_every is not None:
            whole_number("measure_every", self.measure_every, "a whole number >= 2", least=2)
        if self.max_amplification is not None:
            most = self.max_amplification
            in_range("max_amplification", most, lambda x: 1 < x < math.inf, "finite and > 1")
        for option, value in (("timing", "lagged"), ("match_norm", False), ("group_by", "module")):
            if getattr(self, option) != value:
                raise ValueError(
                    f"{option}={getattr(self, option)!r} does not go with placement='backward', "
                    f"which multiplies before the step: leave it at {value!r}"
                )

    @classmethod
    def make(cls, given: Mapping[str, Any]) -> Options:
        """Options from a mapping; ValueError names one that does not exist."""
        _check_names(given)
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, except for callables, which stay what they are."""
        stored = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in stored.items():
            if isinstance(value, Schedule):
                stored[name] = value.to_dict()
            elif isinstance(value, tuple):
                stored[name] = list(value)
        return stored

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Options:
        given = dict(stored)
        if isinstance(given.get("schedule"), Mapping):
            given["schedule"] = Schedule.from_dict(given["schedule"])
        return cls.make(given)

    def to_checkpoint(self) -> dict[str, Any]:
        """What a checkpoint holds and compares: plain values, callables by name."""
        return {
            name: _qualified_name(value) if callable(value) else value
            for name, value in self.to_dict().items()
            if name not in NOT_STATE
        }

    def differing(self, given: Mapping[str, Any]) -> list[str]:
        """Names of the options given that are not what they are here.

        A function is the same if the same lines of code made it, as with a lambda written in a
        loop. ValueError for an option that does not exist.
        """
        _check_names(given)
        return [
            name
            for name, value in given.items()
            if not _same(_plain(name, value), getattr(self, name))
        ]

    def rules(self) -> Rules:
        """What a step goes by: the one place that says what an option left out means."""
        rule, schedule = self.threshold, self.schedule
        values = {
            "mean": 0.0,
            "std": 1.0 if self.num_std is None else self.num_std,
            "quantile": 0.5 if self.quantile is None else self.quantile,
        }
        windows = () if schedule is None else schedule.windows
        backward = self.placement == "backward"
        return Rules(
            grow=self.grow,
            max_factor=1024.0 if self.max_factor is None else self.max_factor,
            factor=self.factor,
            measure=self.measure,
            threshold=rule if isinstance(rule, str) else "number",
            threshold_value=values[rule] if isinstance(rule, str) else rule,
            select=self.select,
            seed=self.seed or 0,
            decay=1.0 if self.decay is None else self.decay,
            min_steps=self.min_steps,
            refresh=0 if self.refresh == "epoch" else self.refresh,
            schedule_unit="always" if schedule is None else schedule.unit,
            windows=tuple(
                (float(start), float(stop), math.nan if factor is None else float(factor))
                for start, stop, factor in windows
            ),
            exact=self.timing == "exact",
            match_norm=self.match_norm,
            max_norm=0.0 if self.max_norm is None else self.max_norm,
            measure_every=(self.measure_every or 10) if backward else 1,
            max_amplification=(self.max_amplification or 16.0) if backward else math.inf,
        )


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Options as a step goes by them: names and numbers, nothing left out.

    Attributes:
        max_factor: 1024 also without ``grow``.
        factor: what the state begins with; a state's own may differ later.
        threshold: ``"number"`` if the threshold is ``threshold_value`` itself.
        threshold_value: standard deviations, quantile or threshold; 0 for ``"mean"``.
        decay: 1 averages since the last restart.
        refresh: a decision every so many counted steps; 0: when ``set_epoch`` tells a new epoch.
        schedule_unit: that of ``windows``; ``"always"`` without any.
        windows: (start, stop, factor); a factor of NaN is the state's.
        exact: multiply by the selection made in this step.
        max_norm: 0 does not clip.
        measure_every: every so many steps is measured; 1 unless ``placement="backward"``.
        max_amplification: bound of the product over all selected layers; infinite unless
            ``placement="backward"``.
    """

    grow: bool
    max_factor: float
    factor: float
    measure: Measure
    threshold: Threshold
    threshold_value: float
    select: Select
    seed: int
    decay: float
    min_steps: int
    refresh: int
    schedule_unit: ScheduleUnit
    windows: tuple[tuple[float, float, float], ...]
    exact: bool
    match_norm: bool
    max_norm: float
    measure_every: int
    max_amplification: float

    @property
    def needs_epochs(self) -> bool:
        """Whether a step means nothing before ``set_epoch``."""
        return self.schedule_unit == "epoch" or self.refresh == 0

    @property
    def needs_norm(self) -> bool:
        """Whether gradients are multiplied by what depends on their norm."""
        return self.match_norm or self.max_norm > 0

    @property
    def two_phases(self) -> bool:
        """Whether gradients are multiplied by what this step's sums have yet to say."""
        return self.exact or self.needs_norm

    @property
    def backward(self) -> bool:
        """Whether backpropagation amplifies, and not the step."""
        return self.measure_every > 1


def _check_names(given: Iterable[str]) -> None:
    names = [field.name for field in fields(Options)]
    for name in given:
        if name not in names:
            raise ValueError(f"there is no option {name!r}{nearest(name, names)}")


def _plain(option: str, value: Any) -> Any:
    """The value without what could change later or cannot be stored: numpy numbers, lists."""
    if option in ("include", "exclude") and value is not None and not callable(value):
        return (plain(value),) if isinstance(value, str) else tuple(map(plain, value))
    return plain(value)


def _same(a: object, b: object) -> bool:
    return a == b or (
        isinstance(a, FunctionType)
        and isinstance(b, FunctionType)
        and a.__qualname__ == b.__qualname__
        and a.__code__ == b.__code__
    )


def check_factor(value: object, grow: bool = False) -> None:
    """ValueError unless the value can be a factor, or with ``grow`` what one grows by."""
    if grow:
        range_ = "finite and > 1 with grow=True, or nothing would grow"
        in_range("factor", value, lambda x: 1 < x < math.inf, range_)
        return
    in_range("factor", value, lambda x: 0 < x < math.inf and x != 1, "finite, > 0 and not 1")


def _qualified_name(value: Callable[..., Any]) -> str:
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{getattr(value, '__module__', '')}.{name}"
