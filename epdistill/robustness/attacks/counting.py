"""Counting what a model is asked: black-box attacks are measured in queries."""

from __future__ import annotations

from torch import Tensor, nn

from epdistill.robustness.subjects import Predict


class Counted(nn.Module):
    """A model that counts its answers.

    Attributes:
        queries: Images answered since the last `reset`: a batch of N counts N.
        calls: Forward passes since the last `reset`.
    """

    def __init__(self, model: Predict) -> None:
        super().__init__()
        # A module becomes a submodule, so that its modes and device stay visible.
        self.model = model
        self.reset()

    def reset(self) -> None:
        """Start again from 0."""
        self.queries = 0
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        """What the model answers, unchanged."""
        self.queries += len(images)
        self.calls += 1
        return self.model(images)


def counted(model: Predict) -> Counted:
    """`model` with its answers counted: the same answers, gradients and submodules.

    Args:
        model: Any callable, images (N,C,H,W) to logits (N,K).
    """
    return Counted(model)
