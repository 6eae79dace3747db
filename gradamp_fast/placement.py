"""Models pickled with ``placement="backward"`` look here for the class of their hooks."""

from .backends.backward import _Hook

__all__ = ["_Hook"]
