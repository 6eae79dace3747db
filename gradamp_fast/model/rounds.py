"""Rounds: with several optimizers a step is one call of each of them."""

from __future__ import annotations

import weakref
from collections.abc import Collection

from ..call import Call
from .optimizers import Holding


class Rounds:
    """Says of each call where in its round it stands.

    A round ends when all optimizers have stepped in it, or when one of them steps again. In the
    first case its last call takes its decision; else it is taken before the next round begins.

    Attributes:
        undecided: whether the round under way still waits for its decision.
    """

    def __init__(self) -> None:
        self.undecided = False
        self._stepped: weakref.WeakSet[Holding] = weakref.WeakSet()
        self._begun = self._last = False

    def place(self, call: Call, holding: Holding | None, holdings: Collection[Holding]) -> Call:
        """The call with its place; without a holding it is the whole model's, and a whole round.

        Every call has to be placed before it is made, and told to ``made`` afterwards.
        """
        if holding is None or holding in self._stepped:
            self._end()
        self._last = holding is None or len(self._stepped) + 1 >= len(holdings)
        return call._replace(begins_round=not self._begun, decides=self._last)

    def made(self, call: Call, holding: Holding | None, empty: bool) -> None:
        """``empty``: no parameter had a gradient, so that the round is as it was."""
        if not empty:
            self._begun = True
            self.undecided = not call.decides
        if self._last:
            self._end()
        elif holding is not None:
            self._stepped.add(holding)

    def _end(self) -> None:
        self._stepped.clear()
        self._begun = False
