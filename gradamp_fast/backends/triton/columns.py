"""Where numbers lie in the kernel's tensors, as its constants.

Those of the state and of the options' values are made of the lists in reference/state.py, so
that no kernel names a place by a number of its own.
"""

from __future__ import annotations

import torch
import triton.language as tl

from ...model.gradients import DTYPES
from ...model.plan import LONG_BUCKET_LOG2, SHORT_BUCKET_LOG2
from ...reference.state import ENUMS, GLOBAL_FIELDS, LAYER_FIELDS


def _places(names: tuple[str, ...], wanted: str) -> tuple[tl.constexpr, ...]:
    return tuple(tl.constexpr(names.index(name)) for name in wanted.split())


# ---- the state --------------------------------------------------------------------------

GLOBALS, FIELDS = tl.constexpr(len(GLOBAL_FIELDS)), tl.constexpr(len(LAYER_FIELDS))
STEP, SKIPPED_STEPS, EPOCH, THRESHOLD, FACTOR, TOTAL_NORM, ROUND_SKIPPED = _places(
    GLOBAL_FIELDS, "step skipped_steps epoch threshold factor total_norm round_skipped"
)
GATED, RISING = _places(GLOBAL_FIELDS, "gated rising")
STEPS, WEIGHT_SUM, VARIANCE, POWER, MEAN_POWER, NOISE = _places(
    LAYER_FIELDS, "steps weight_sum variance power mean_power noise"
)
AGREEMENT, SELECTED, AMPLIFIED_STEPS, CHANGED_AT, MEMBER_NUMEL = _places(
    LAYER_FIELDS, "agreement selected amplified_steps changed_at member_numel"
)
LAYER_FACTOR, SETTLED, LEAST_VARIANCE, ON_UPDATE = _places(
    LAYER_FIELDS, "factor settled least_variance on_update"
)

# ---- options as numbers -----------------------------------------------------------------

CONFIG = (
    *("measure", "threshold", "select", "schedule_unit", "exact", "match_norm", "max_norm"),
    *("needs_norm", "threshold_value", "decay", "min_steps", "refresh", "seed"),
    *("max_factor", "windows"),
)
# "windows" is their number; start, stop and factor of each come after it.
CONFIG_MEASURE, CONFIG_THRESHOLD, CONFIG_SELECT, CONFIG_UNIT = _places(
    CONFIG, "measure threshold select schedule_unit"
)
CONFIG_EXACT, CONFIG_MATCH_NORM, CONFIG_MAX_NORM, CONFIG_NEEDS_NORM = _places(
    CONFIG, "exact match_norm max_norm needs_norm"
)
CONFIG_VALUE, CONFIG_DECAY, CONFIG_MIN_STEPS, CONFIG_REFRESH, CONFIG_SEED, CONFIG_WINDOWS = _places(
    CONFIG, "threshold_value decay min_steps refresh seed windows"
)
(CONFIG_MAX_FACTOR,) = _places(CONFIG, "max_factor")

FLUCTUATION, DIRECTION, VARIANCE_OF_ELEMENTS = _places(
    ENUMS["measure"], "fluctuation direction variance"
)
STD, QUANTILE, NUMBER = _places(ENUMS["threshold"], "std quantile number")
(BELOW,) = _places(ENUMS["select"], "below")
ALWAYS, BY_EPOCH = _places(ENUMS["schedule_unit"], "always epoch")

# ---- a row of sums: of a tile, a group of tiles or a layer --------------------------------

ROW = tl.constexpr(8)
ROW_COUNT, ROW_MEAN, ROW_SUM, ROW_M2, ROW_POWER, ROW_DOT, ROW_BEFORE, ROW_AFTER = (
    tl.constexpr(place) for place in range(8)
)
# In a tile's row the mean is one element of the tile, and the next two columns hold the sums of
# the distances from it and of their squares. Elsewhere the sum is 0, and in the row of a layer its
# place is taken by what the layer is multiplied by in this step.
ROW_MULTIPLIER = ROW_SUM

# ---- the tables -------------------------------------------------------------------------

TENSOR_FIELDS = tl.constexpr(8)  # five and padding
NUMEL, FIRST_TILE, FIRST_BUCKET, LAYER, BUCKET_LOG2 = (tl.constexpr(i) for i in range(5))
TILING_FIELDS = tl.constexpr(4)  # of each layer
TILES_FROM, TILES, GROUPS_FROM, GROUPS = (tl.constexpr(i) for i in range(4))
# Programs that are done, steps that are, whether a layer is not finite, each on a line of the cache
# of its own, for programs wait on one while others write to the rest; then for each layer its
# groups that are done, and for each group its tiles.
PROGRAMS, GENERATION, NONFINITE, LAYER_TICKETS = (tl.constexpr(i * 32) for i in range(4))

# An address and the code of the dtype behind it share a word.
DTYPE_SHIFT, ADDRESS_BITS = tl.constexpr(60), tl.constexpr((1 << 60) - 1)
DTYPE_COUNT = tl.constexpr(len(DTYPES))
FLOAT64 = tl.constexpr(DTYPES.index(torch.float64))

# ---- updates ----------------------------------------------------------------------------

# Rules; 0: gradients are multiplied instead. With AMSGRAD some group of Adam's has a third state.
SGD, ADAM, AMSGRAD = (tl.constexpr(rule) for rule in (1, 2, 3))
# With updates the table of addresses has so many words for each tensor: its gradient's, as else;
# then addresses, 0 where there is none; and in the last the place of its group's hyper-parameters
# in the table, behind all tensors.
UPDATE_WORDS = tl.constexpr(8)
(PARAMETER, FIRST_STATE, SECOND_STATE, THIRD_STATE, COUNT, HYPER) = (
    tl.constexpr(i) for i in range(1, 7)
)
# Words of a group. "rate": address and dtype of its learning rate, 0 if "lr" holds it. "sign": the
# bit of an fp64 number that turns a gradient where the objective is maximized. Numbers are fp64.
HYPER_FIELDS = (
    *("rate", "lr", "weight_decay", "beta1", "beta2", "eps", "sign", "nesterov", "decoupled"),
)
RATE, LR, WEIGHT_DECAY, BETA1, BETA2, EPS = _places(
    HYPER_FIELDS, "rate lr weight_decay beta1 beta2 eps"
)
SIGN, NESTEROV, DECOUPLED = _places(HYPER_FIELDS, "sign nesterov decoupled")

# ---- the sketch -------------------------------------------------------------------------

SHORT_LOG2, LONG_LOG2 = tl.constexpr(SHORT_BUCKET_LOG2), tl.constexpr(LONG_BUCKET_LOG2)
SHORT, LONG = tl.constexpr(1 << SHORT_BUCKET_LOG2), tl.constexpr(1 << LONG_BUCKET_LOG2)
