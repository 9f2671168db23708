"""What is evaluated: one way to predict, and the gradients an attacker may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from epdistill.errors import EvaluationError

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Horizons:
    """The time inside a relaxing model, for the temporal sweep.

    Attributes:
        unrolled: From a number of sweeps to a view whose gradient goes through that many
            sweeps from the start.
        after: From a number of sweeps to a predictor that answers after exactly that many.
        settle: Images (N,C,H,W) in [0,1] to labels (N,) and settled states (N,units): for
            the shape of basins.
        tolerance: The residual at which states count as settled.
    """

    unrolled: Callable[[int], nn.Module]
    after: Callable[[int], nn.Module]
    settle: Callable[[Tensor], tuple[Tensor, Tensor]]
    tolerance: float = 1e-4


@dataclass(frozen=True, eq=False)
class Published:
    """How the published protocol attacks and judges this model.

    Attributes:
        view: What is attacked by gradient; None for a black box.
        predict: Images (N,C,H,W) in [0,1] to logits (N,K): what is judged.
        note: All of it in words, for the results.
        corrupted: What is judged on corrupted images; `predict` without it.
    """

    view: nn.Module | None
    predict: Predict
    note: str
    corrupted: Predict | None = None


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
        stochastic: The answer to one image varies from call to call. Attacks then climb the
            expectation over draws (Athalye et al., ICML 2018), and the label judged is that
            of the mean probability over the suite's `samples` draws: with a single draw,
            each further attack would be one more throw of the dice.
        horizons: For models that relax: the temporal sweep's views and predictors.
        published: For the published protocol; without it the first view and `predict`.
        identity: Anything that pins down the weights (a SHA-256), so that an interrupted
            evaluation is not continued with another model.
    """

    name: str
    kind: str
    predict: Predict
    views: Mapping[str, nn.Module] = field(default_factory=dict)
    device: torch.device | str = "cpu"
    stochastic: bool = False
    horizons: Horizons | None = None
    published: Published | None = None
    identity: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise EvaluationError("received a subject without a name; expected a unique name")

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Every module whose train/eval mode matters while this subject is evaluated."""
        parts: list[object] = [self.predict, *self.views.values()]
        if self.published is not None:
            how = self.published
            parts += [how.view, how.predict, how.corrupted]
        return tuple(part for part in parts if isinstance(part, nn.Module))


def module_subject(
    name: str,
    kind: str,
    module: nn.Module,
    device: torch.device | str = "cpu",
    *,
    stochastic: bool = False,
    identity: str = "",
) -> Subject:
    """The subject of an ordinary feedforward module: it is judged and attacked as one.

    Args:
        name: Unique within one evaluation.
        kind: For example `"student"`.
        module: Maps images (N,C,H,W) in [0,1] to logits (N,K), and is differentiable.
        device: Where the module lives.
        stochastic: Its answers vary from call to call.
        identity: Pins down the weights.
    """
    views = {"model": module}
    return Subject(name, kind, module, views, device, stochastic=stochastic, identity=identity)


class MeanAnswer:
    """A stochastic model's answer: the logarithm of the mean probability over some draws.

    Images (N,C,H,W) to (N,K); no gradient is taken through it. The draws come from
    the generator that is current when it is called.
    """

    def __init__(self, predict: Predict, samples: int) -> None:
        self._predict, self._samples = predict, samples

    def __call__(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W) in [0,1] to log mean probabilities (N,K)."""
        draws = [self._predict(images).log_softmax(dim=1) for _ in range(self._samples)]
        total: Tensor = torch.logsumexp(torch.stack(draws), dim=0)
        return total - torch.log(torch.tensor(float(self._samples)))
