"""The definition of a step, in plain PyTorch and fp64, a file for each rule.

Every other backend computes what these files say. They run on any device with fp64, never
synchronise with the host, and also serve as the ``torch`` backend.

The measures are this project's own reading of S. Basodi, K. Pusuluri, X. Xiao, Y. Pan,
*Intelligent gradient amplification for deep neural networks* (arXiv 2305.18445), whose
formulas are not public.
"""

from .decide import (
    EARLY,
    LOW,
    SURGE,
    Standing,
    Sums,
    active_factor,
    chosen_scores,
    commit,
    decide,
    draws,
    end_round,
    last_decision,
    multipliers,
    scores,
    step_number,
)
from .moments import merge, moments_of
from .sketch import bucket_sums, signs
from .state import ENUMS, GLOBAL_FIELDS, LAYER_FIELDS, State
from .step import (
    excluded_squares,
    finish,
    mark_found_inf,
    measure,
    multiply,
    nonfinite_layers,
    product,
    standing,
    step,
    touched,
    update_all,
)
from .update import update

__all__ = [
    "EARLY", "ENUMS", "GLOBAL_FIELDS", "LAYER_FIELDS", "LOW", "SURGE", "Standing", "State",
    "Sums",
    "active_factor", "bucket_sums", "chosen_scores", "commit", "decide", "draws", "end_round",
    "excluded_squares", "finish", "last_decision", "mark_found_inf", "measure", "merge",
    "moments_of", "multipliers", "multiply", "nonfinite_layers", "product", "scores", "signs",
    "standing", "step", "step_number", "touched", "update", "update_all",
]  # fmt: skip
