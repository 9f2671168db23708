"""Expectation over transformation: attacks on models that answer at random.

Athalye et al. (ICML 2018): a gradient through one draw of a random model is
mostly noise; the attack must climb the loss of the expected answer.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from epdistill.errors import EvaluationError
from epdistill.robustness.guards import derive_seed


class Expectation(nn.Module):
    """The mean answer of a model that answers at random; see `expectation`."""

    def __init__(self, view: nn.Module, samples: int, seed: int) -> None:
        super().__init__()
        self.view = view
        self.samples = samples
        self.seed = seed

    def forward(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W) in [0,1] to the mean of the logits, (N,K)."""
        plain = images.detach().cpu().contiguous()
        content = hashlib.blake2b(plain.view(torch.uint8).numpy().tobytes()).hexdigest()
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            answers = []
            for sample in range(self.samples):
                torch.manual_seed(derive_seed(self.seed, "expectation", content, sample))
                answers.append(self.view(images))
        return torch.stack(answers).mean(dim=0)


def expectation(view: nn.Module, samples: int, *, seed: int = 0) -> Expectation:
    """A module that answers with the mean of `samples` forward passes of a random one.

    What is averaged is the logits, and with them the log-probabilities (up to a shift
    common to all classes). The mean of the probabilities would be what a model is judged
    by, but it is flat where draws are confident and disagree: each of them has p(label)
    at 0 or 1, and the gradient of their mean is lost in float32. That of the mean logits
    is the mean of the draws' own gradients, whatever their confidence.

    Each draw's generators are seeded from `seed`, the draw's number and the images'
    values. So the module is a function: the same images get the same noise (in the same
    batch), every step of an attack new noise, and no order of calls matters. torch's
    generators are restored after each forward pass; randomness from elsewhere (NumPy,
    Python) is neither seeded nor restored.

    Args:
        view: Differentiable; images (N,C,H,W) in [0,1] to logits (N,K). It must keep its
            randomness in evaluation mode.
        samples: Forward passes to average over, 20 for AutoAttack's authors.
        seed: Fixes the noise.

    Returns:
        A module with `view` as its submodule, for any white-box attack.

    Raises:
        EvaluationError: `samples` is less than 1.
    """
    if samples < 1:
        raise EvaluationError(f"received samples = {samples}; expected at least 1")
    return Expectation(view, samples, seed)
