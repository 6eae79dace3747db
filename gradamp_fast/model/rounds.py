"""Rounds: with several optimizers a step is one call of each of them."""

from __future__ import annotations

import weakref
from collections.abc import Collection

from ..call import Call
from .optimizers import Holding


class Rounds:
    """Says of each call where in its round it stands.

    A round ends when an optimizer that has stepped in it steps again, or when all that have are
    gone, as between two trainings. When all have stepped, the last call takes its decision; else
    that is taken before the next round begins. An optimizer that becomes known after that, as to
    a GradScaler, still steps in the round, and its decision takes the place of the first; with
    ``once`` the first stands, as where each makes factors grow.

    Attributes:
        undecided: whether the round under way still waits for its decision.
    """

    def __init__(self, once: bool) -> None:
        self._once = once
        self.undecided = False
        self._stepped: weakref.WeakSet[Holding] = weakref.WeakSet()
        self._known: weakref.WeakSet[Holding] = weakref.WeakSet()
        self._begun = self._decided = False

    def place(self, call: Call, holding: Holding | None, holdings: Collection[Holding]) -> Call:
        """The call with its place; without a holding it is the whole model's, and a whole round.

        Every call has to be placed before it is made, and told to ``made`` afterwards.
        """
        if holding is None:
            if self._begun:
                self._end()
            return call  # as it is: one that begins a round and decides
        if holding in self._stepped or self._stepped.isdisjoint(holdings):
            self._end()
        last = len(self._stepped) + 1 >= len(holdings)
        if holding.hook is None and holding not in self._known:
            last = False  # a scaler learns of its optimizers as they step: others may follow
        return call._replace(
            begins_round=not self._begun, decides=last and not (self._once and self._decided)
        )

    def made(self, call: Call, holding: Holding | None, empty: bool) -> None:
        """``empty``: no parameter had a gradient, so that the round is as it was."""
        if holding is None:
            self.undecided = self.undecided and empty
            return
        if not empty:
            self._begun = True
            self._decided = self._decided or call.decides
            self.undecided = not self._decided
        self._stepped.add(holding)
        self._known.add(holding)

    def _end(self) -> None:
        self._stepped.clear()
        self._begun = self._decided = False
