"""Staying alive: what can go wrong while an EP-CNN is taught, seen at every step.

Counted in steps, never by the clock, so that a resumed run sees the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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


def _stuck(states: States) -> Tensor:
    """Per layer, how many states are exactly 0 and how many exactly 1: (L, 2) int64."""
    return torch.stack([torch.stack([(s == 0).sum(), (s == 1).sum()]) for s in states])


def collapsed_layers(states: States, stuck: Sequence[Sequence[int]] | None = None) -> list[int]:
    """The layers (from 1) in which all but one state in ten thousand are exactly 0 or exactly 1.

    Args:
        states: s_1..s_L.
        stuck: Per layer, how many are 0 and how many 1, if they have been counted.
    """
    found = []
    counts = _stuck(states).tolist() if stuck is None else stuck
    for n, (state, (zeros, ones)) in enumerate(zip(states, counts, strict=True), start=1):
        least = COLLAPSED * state.numel()
        if zeros + ones >= least and max(zeros, ones) >= least:
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
        states = step.free.states
        parts = [*gradients.weights, *gradients.biases, step.logits, *states]
        finite = torch.stack([torch.isfinite(part).all() for part in parts]).all()
        settled = step.free.certificate.converged.sum()
        # One look at a GPU instead of thirty.
        looked = torch.cat([torch.stack([finite.long(), settled]), _stuck(states).flatten()])
        sound, count, *stuck_counts = looked.tolist()
        if not sound:
            troubles.append(
                Trouble(
                    "non-finite",
                    "states or gradients are not finite: lower the learning rates, and beta "
                    "where the nudged phases are unsettled",
                    True,
                )
            )
            return troubles
        pairs = list(zip(stuck_counts[::2], stuck_counts[1::2], strict=True))
        stuck = collapsed_layers(states, pairs)
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
        self._settled.append(count / len(step.logits))
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
