"""Staying alive: what can go wrong while an EP-CNN is taught, seen at every step.

Counted in steps, never by the clock, so that a resumed run sees the same.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from epdistill.teachers.energy import States
from epdistill.teachers.learning import Step

WINDOW = 50
COLLAPSED = 0.9999
UNSETTLED_RISE = 0.2


@dataclass(frozen=True)
class Trouble:
    """Something to be told to the person in front of the log.

    Attributes:
        name: `non-finite`, `collapsed` or `unsettled`.
        message: One line: what was seen and what to change.
        fatal: Whether the parameters can no longer be trusted.
    """

    name: str
    message: str
    fatal: bool


def collapsed_layers(states: States) -> list[int]:
    """The layers (from 1) in which all but one state in ten thousand are exactly 0 or exactly 1."""
    found = []
    for n, state in enumerate(states, start=1):
        stuck = ((state == 0) | (state == 1)).double().mean()
        alike = max(float((state == 0).double().mean()), float((state == 1).double().mean()))
        if float(stuck) >= COLLAPSED and alike >= COLLAPSED:
            found.append(n)
    return found


class Watch:
    """Looks at every step; remembers the last `WINDOW` shares of settled images."""

    def __init__(self) -> None:
        self._settled: deque[float] = deque(maxlen=WINDOW)
        self._best = 0.0
        self._told: set[str] = set()

    def look(self, step: Step) -> list[Trouble]:
        """What is wrong with a step; each kind that is not fatal is told once."""
        troubles = []
        gradients = step.gradients
        parts = [*gradients.weights, *gradients.biases, step.logits, *step.free.states]
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            troubles.append(
                Trouble(
                    "non-finite",
                    "states or gradients are not finite: lower the learning rates, and beta "
                    "where the nudged phases are unsettled",
                    True,
                )
            )
            return troubles
        stuck = collapsed_layers(step.free.states)
        if stuck:
            layers = ", ".join(map(str, stuck))
            troubles.append(
                Trouble(
                    "collapsed",
                    f"all states of layer {layers} are 0 or all are 1, so nothing passes: raise "
                    "init_scale if this is the start, lower the learning rates if it is not",
                    False,
                )
            )
        self._settled.append(float(step.free.certificate.converged.double().mean()))
        if len(self._settled) == WINDOW:
            share = sum(self._settled) / WINDOW
            self._best = max(self._best, share)
            if share < self._best - UNSETTLED_RISE:
                troubles.append(
                    Trouble(
                        "unsettled",
                        f"only {share:.0%} of the images settle, {self._best:.0%} did before: "
                        "give the free phase more sweeps, lower the learning rates, or raise "
                        "weight_decay",
                        False,
                    )
                )
        fresh = [t for t in troubles if t.fatal or t.name not in self._told]
        self._told.update(t.name for t in fresh)
        return fresh
