"""What is evaluated: one way to predict, and the gradients an attacker may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from epdistill.errors import EvaluationError

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model as the harness sees it.

    Judging and attacking are kept apart because the model that is deployed may
    have no gradient (an ONNX file), or several (an EP teacher: implicit,
    unrolled through 5 sweeps, through 30). An attack on a view counts only if
    `predict` errs on its image.

    Attributes:
        name: Unique within one evaluation.
        kind: `"teacher"`, `"student"`, `"onnx"`, ...
        predict: Maps images (N,C,H,W) float32 in [0,1] to logits (N,K); this alone
            decides what is right and wrong. If it is an `nn.Module` it is put into
            evaluation mode while it is judged.
        views: Differentiable surrogates by name, images (N,C,H,W) in [0,1] to logits
            (N,K), in the order in which they are attacked. Empty: black box only.
        device: Where `predict` and the views expect their images.
    """

    name: str
    kind: str
    predict: Predict
    views: Mapping[str, nn.Module] = field(default_factory=dict)
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if not self.name:
            raise EvaluationError("received a subject without a name; expected a unique name")

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Every module whose train/eval mode matters while this subject is evaluated."""
        own = (self.predict,) if isinstance(self.predict, nn.Module) else ()
        return (*own, *self.views.values())


def module_subject(
    name: str, kind: str, module: nn.Module, device: torch.device | str = "cpu"
) -> Subject:
    """The subject of an ordinary feedforward module: it is judged and attacked as one.

    Args:
        name: Unique within one evaluation.
        kind: For example `"student"`.
        module: Maps images (N,C,H,W) in [0,1] to logits (N,K), and is differentiable.
        device: Where the module lives.
    """
    return Subject(name, kind, module, {"model": module}, device)
