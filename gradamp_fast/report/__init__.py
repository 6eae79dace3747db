"""What an Amplifier knows, on the host: reports, tables, files and the history of a run."""

from .export import ScalarWriter, log_scalars
from .history import History
from .numbers import LayerReport
from .report import Report, Snapshot, make_report, take_snapshot
from .table import render

__all__ = [
    "History",
    "LayerReport",
    "Report",
    "ScalarWriter",
    "Snapshot",
    "log_scalars",
    "make_report",
    "render",
    "take_snapshot",
]
