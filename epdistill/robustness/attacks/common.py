"""What all attacks share: how they start and end, whom they ask, and their random numbers.

torchattacks reads the device off the model's first parameter (and prints where
there is none), asks models in whatever mode they are, returns whatever comes
out, and draws from the global generators, which it also reseeds. Here an attack
is framed by `in_ball` or `nearest`: arguments are checked, each submodule gets
its own mode back, every answer of the model is checked, and so is every image
that leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from epdistill.errors import EvaluationError
from epdistill.robustness.guards import (
    NORMS,
    check_adversarial,
    check_eps,
    check_images,
    check_logits,
    derive_seed,
    evaluation_mode,
)
from epdistill.robustness.subjects import Predict

# Small enough to change no length, large enough to divide by.
TINY = 1e-30


class Judged(nn.Module):
    """Any callable as the module that torchattacks expects, with its answers checked."""

    def __init__(self, model: Predict, device: torch.device, labels: Tensor) -> None:
        super().__init__()
        self._labels = labels.cpu()
        # In a tuple, so that it is not registered: its modes are ours to guard.
        self._model = (model,)
        # torchattacks reads the device off the first parameter.
        self.anchor = nn.Parameter(torch.empty(0, device=device), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W) to logits (N,K), finite, in float32 at least."""
        logits = check_logits(self._model[0](images), len(images), self._labels)
        # Half precision is too coarse to compare losses in.
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return logits.to(device=self.anchor.device, dtype=dtype)


# (judged model, images, labels, their numbers) -> adversarial images (N,C,H,W)
Craft = Callable[[Judged, Tensor, Tensor, Sequence[int]], Tensor]


def in_ball(
    craft: Craft,
    norm: str,
    model: Predict,
    images: Tensor,
    labels: Tensor,
    eps: float,
    index: Tensor | None,
    *,
    gradients: bool,
) -> Tensor:
    """Run an attack whose images must stay within `eps` of their originals.

    Args:
        craft: The attack itself.
        norm: `"linf"` or `"l2"`.
        model: Images in [0,1] to logits (N,K).
        images: (N,C,H,W) floating point in [0,1].
        labels: (N,) int64.
        eps: Radius on pixels in [0,1]; 0 returns the images as they are.
        index: (N,) int64, the images' numbers in their data set, or None for 0..N-1.
        gradients: Whether `craft` needs them; they work also inside a caller's `no_grad`.

    Returns:
        (N,C,H,W), detached, checked to be inside the ball and [0,1].

    Raises:
        EvaluationError: Bad arguments, answers that cannot be judged, or a broken ball.
    """
    check_images(images, labels)
    check_eps(eps)
    if eps == 0 or len(images) == 0:
        return images.detach().clone()
    found = _run(craft, model, images, labels, index, gradients)
    check_adversarial(images, found, norm, eps)
    return found


def nearest(
    craft: Craft,
    model: Predict,
    images: Tensor,
    labels: Tensor,
    index: Tensor | None,
    *,
    gradients: bool,
) -> Tensor:
    """Run an attack that looks for the nearest image which breaks the model.

    Arguments as for `in_ball`; there is no radius.

    Returns:
        (N,C,H,W), detached, checked to be finite and inside [0,1].

    Raises:
        EvaluationError: Bad arguments or answers that cannot be judged.
    """
    check_images(images, labels)
    if len(images) == 0:
        return images.detach().clone()
    found = _run(craft, model, images, labels, index, gradients)
    check_adversarial(images, found, NORMS[0], math.inf)
    return found


def _run(
    craft: Craft,
    model: Predict,
    images: Tensor,
    labels: Tensor,
    index: Tensor | None,
    gradients: bool,
) -> Tensor:
    modules = (model,) if isinstance(model, nn.Module) else ()
    numbers = _numbers(index, len(images))
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(modules))
        if gradients:
            # A caller's no_grad or inference_mode must not switch the gradients off.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
        else:
            stack.enter_context(torch.no_grad())
        origin = images.detach().clone()
        own = labels.detach().clone().to(origin.device)
        return craft(Judged(model, origin.device, labels), origin, own, numbers).detach().clone()


def _numbers(index: Tensor | None, n: int) -> Sequence[int]:
    if index is None:
        return range(n)
    if index.shape != (n,):
        raise EvaluationError(
            f"received an index of shape {tuple(index.shape)}; expected ({n},), one per image"
        )
    return [int(number) for number in index.tolist()]


def margin_of_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """What the attacks climb: m = log sum_{k != y} exp z_k - z_y, per image.

    The cross-entropy is softplus(m), so its gradient is sigmoid(m) grad m: a
    positive factor per image, which neither the sign nor the normalised step
    sees. But sigmoid(m), and with it the cross-entropy's gradient, is lost in
    float32 on confident images, while grad m is not.

    Args:
        logits: (N,K), K >= 2.
        labels: (N,) int64.

    Returns:
        (N,), monotone in the cross-entropy.
    """
    rows = labels.unsqueeze(1)
    others = logits.scatter(1, rows, float("-inf"))
    return torch.logsumexp(others, dim=1) - logits.gather(1, rows).squeeze(1)


def lead_of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the label's logit leads the best other one: z_y - max_{k != y} z_k.

    Args:
        logits: (N,K), K >= 2.
        labels: (N,) int64.

    Returns:
        (N,), negative where the model errs, unchanged by a shift of all logits.
    """
    rows = labels.unsqueeze(1)
    others = logits.scatter(1, rows, float("-inf")).amax(dim=1)
    return logits.gather(1, rows).squeeze(1) - others


def gradient_of(loss: Tensor, images: Tensor, *, keep_graph: bool = False) -> Tensor:
    """The gradient of each image's own loss; never touches `.grad`.

    Args:
        loss: (N,), the i-th depending on the i-th image alone.
        images: (N,C,H,W), requiring a gradient.
        keep_graph: Whether another loss of the same forward pass will follow.

    Returns:
        (N,C,H,W), finite.

    Raises:
        EvaluationError: There is no gradient, or it holds NaN or infinity.
    """
    gradient = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(
            loss.sum(), images, allow_unused=True, retain_graph=keep_graph
        )
    if gradient is None:
        raise EvaluationError(
            "the model's logits have no gradient with respect to the images; expected a "
            "differentiable view: attack a model like this as a black box"
        )
    if not bool(torch.isfinite(gradient).all()):
        raise EvaluationError(
            "the model's gradient with respect to the images holds NaN or infinity; expected "
            "finite numbers: an attack along it would prove nothing"
        )
    return gradient


def unit(vectors: Tensor) -> Tensor:
    """(N,C,H,W) scaled to Euclidean length 1 each; zero stays zero."""
    tiny = torch.finfo(vectors.dtype).tiny
    # By the largest entry first: squares of small gradients would underflow.
    largest = vectors.flatten(1).abs().amax(dim=1)[:, None, None, None]
    scaled = vectors / largest.clamp_min(tiny)
    return scaled / lengths(scaled).clamp_min(tiny)


def lengths(vectors: Tensor) -> Tensor:
    """The Euclidean lengths of (N,C,H,W), as (N,1,1,1)."""
    norms: Tensor = vectors.flatten(1).norm(dim=1)
    return norms[:, None, None, None]


def project_linf(images: Tensor, moved: Tensor, eps: float) -> Tensor:
    """The nearest images inside the Linf ball and [0,1], (N,C,H,W)."""
    return (images + (moved - images).clamp(-eps, eps)).clamp(0, 1)


def project_l2(images: Tensor, moved: Tensor, eps: float) -> Tensor:
    """`moved` drawn straight back into the L2 ball, then clamped to [0,1], (N,C,H,W)."""
    delta = moved - images
    # Adding to pixels near 1 rounds each of them by up to a quarter of the type's
    # epsilon, which matters in small balls: keep that much away from the sphere.
    rounding = torch.finfo(images.dtype).eps / 4 * math.sqrt(images[0].numel())
    radius = max(0.0, eps - rounding)
    inside = delta * (radius / lengths(delta).clamp_min(max(radius, TINY)))
    # Clamping afterwards only brings the image closer to the original.
    return (images + inside).clamp(0, 1)


def draw(
    seed: int, numbers: Sequence[int], shape: Sequence[int], normal: bool, *use: str | int
) -> Tensor:
    """Random numbers (len(numbers), *shape), each row fixed by the seed and its number.

    Args:
        seed: The attack's seed.
        numbers: The images' numbers in their data set.
        shape: Of one row.
        normal: Standard normal; otherwise uniform in [0,1).
        use: What they are for; other uses get other numbers.

    Returns:
        float32 on the CPU.
    """
    rows = torch.empty(len(numbers), *shape)
    generator = torch.Generator()
    for row, number in zip(rows, numbers, strict=True):
        generator.manual_seed(derive_seed(seed, number, *use))
        if normal:
            row.normal_(generator=generator)
        else:
            row.uniform_(generator=generator)
    return rows
