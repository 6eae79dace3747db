"""Optimizers whose own pass measures, amplifies and updates: one kernel launch a step.

In the place of torch's classes of the same names. Alone they update as those do with
``fused=True``; once ``Amplifier.attach(optimizer)`` was called their steps amplify, and read every
gradient once.
"""

from .adam import Adam, AdamW
from .fused import Fused
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Fused"]
