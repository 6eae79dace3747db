"""Gradient amplification for PyTorch in one kernel launch over all parameters."""

from . import optim
from ._version import __version__
from .amplifier import Amplifier
from .drop_in import fused_amplify, reset
from .grad_scaler import GradScaler
from .options import Options
from .report import History, LayerReport, Report
from .schedule import Schedule

__all__ = [
    "Amplifier",
    "GradScaler",
    "History",
    "LayerReport",
    "Options",
    "Report",
    "Schedule",
    "__version__",
    "fused_amplify",
    "optim",
    "reset",
]
