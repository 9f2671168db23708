"""torchattacks 3.5.1, mended.

Square's random search is the library's own; the two PGDs are its classes with
the loop replaced. What the library does wrong, and what is done here instead:

- PGDL2 leaves small balls by float32 rounding: here it stays that far inside.
- PGD returns the last iterate: the best one is kept per image (wrong beats
  right, then the larger loss).
- PGDL2 averages the loss over the batch and adds 1e-10 to the gradient's norm,
  so on confident models steps shrink with the batch size and with confidence:
  each image's gradient is normalised on its own, without a floor.
- Cross-entropy loses its direction in float32 once p(label) rounds to 1: its
  inner margin is climbed instead (see `margin_of_cross_entropy`), which has the
  same direction and never fades.
- Random numbers come from the global generator, which Square also reseeds:
  here from local generators, and an image's numbers depend on the seed and the
  image's own number alone, not on the batch it is in.
- After an attack the whole model is put back into train mode, which thaws
  frozen BatchNorm: here each submodule gets back its own mode.
- The device is that of the model's first parameter, and without one a warning
  is printed: here it is the images' device.
- Square writes -inf into the very tensor that the model returned, takes a tie
  for a success, and its squares never reach the last row and column (15 of an
  8x8 image's 64 pixels): all three mended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torchattacks
from torch import Tensor, nn

from epdistill.errors import EvaluationError
from epdistill.robustness.guards import check_logits, derive_seed
from epdistill.robustness.subjects import Predict

# Small enough to change no length, large enough to divide by.
TINY = 1e-30


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


class _KeepBest:
    """The loop that replaces torchattacks' own in PGD and PGDL2."""

    steps: int
    random_start: bool
    eps: float
    alpha: float
    get_logits: Callable[[Tensor], Tensor]

    def use_seed(self, seed: int, numbers: Sequence[int], restarts: int) -> None:
        self.seed = seed
        self.numbers = tuple(numbers)
        self.restarts = restarts

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        best = images
        best_loss = torch.full_like(images[:, 0, 0, 0], float("-inf"))
        best_wrong = torch.zeros_like(labels, dtype=torch.bool)
        for restart in range(self.restarts):
            current = images
            if self.random_start:
                current = self.project(images, images + self.start(images, restart))
            for step in range(self.steps + 1):
                # The last iterate is only looked at.
                climb = step < self.steps
                current = current.detach().requires_grad_(climb)
                with torch.set_grad_enabled(climb):
                    logits = self.get_logits(current)
                    loss = margin_of_cross_entropy(logits, labels)
                wrong = logits.argmax(dim=1) != labels
                better = torch.where(wrong == best_wrong, loss > best_loss, wrong).detach()
                best = torch.where(better[:, None, None, None], current, best).detach()
                best_loss = torch.where(better, loss, best_loss).detach()
                best_wrong = best_wrong | wrong
                if climb:
                    direction = self.direction(_gradient(loss, current))
                    moved = current.detach() + self.alpha * direction
                    current = self.project(images, moved)
        return best

    def start(self, images: Tensor, restart: int) -> Tensor:
        raise NotImplementedError

    def direction(self, gradient: Tensor) -> Tensor:
        raise NotImplementedError

    def project(self, images: Tensor, moved: Tensor) -> Tensor:
        raise NotImplementedError

    def draw(self, images: Tensor, normal: bool, *use: str | int) -> Tensor:
        return _draw(self.seed, self.numbers, images.shape[1:], normal, *use).to(images)


# torchattacks is not typed: to mypy its classes are Any.
class BestPGDLinf(_KeepBest, torchattacks.PGD):  # type: ignore[misc]
    """PGD in the Linf ball that returns the best iterate of each image."""

    def start(self, images: Tensor, restart: int) -> Tensor:
        """A uniformly random perturbation, (N,C,H,W)."""
        return self.eps * (2 * self.draw(images, False, "start", restart) - 1)

    def direction(self, gradient: Tensor) -> Tensor:
        """Steepest ascent in Linf, (N,C,H,W)."""
        return gradient.sign()

    def project(self, images: Tensor, moved: Tensor) -> Tensor:
        """The nearest images inside the ball and [0,1], (N,C,H,W)."""
        delta = (moved - images).clamp(-self.eps, self.eps)
        return (images + delta).clamp(0, 1)


class BestPGDL2(_KeepBest, torchattacks.PGDL2):  # type: ignore[misc]
    """PGD in the L2 ball that returns the best iterate of each image."""

    def start(self, images: Tensor, restart: int) -> Tensor:
        """A perturbation of random direction and uniformly random length, (N,C,H,W)."""
        radius = _draw(self.seed, self.numbers, (1, 1, 1), False, "radius", restart).to(images)
        return self.eps * radius * _unit(self.draw(images, True, "start", restart))

    def direction(self, gradient: Tensor) -> Tensor:
        """Steepest ascent in L2, (N,C,H,W)."""
        return _unit(gradient)

    def project(self, images: Tensor, moved: Tensor) -> Tensor:
        """Images inside the ball and [0,1], (N,C,H,W)."""
        delta = moved - images
        length = delta.flatten(1).norm(dim=1)[:, None, None, None]
        # Adding to pixels near 1 rounds each of them by up to a quarter of the type's
        # epsilon, which matters in small balls: keep that much away from the sphere.
        rounding = torch.finfo(images.dtype).eps / 4 * math.sqrt(images[0].numel())
        radius = max(0.0, self.eps - rounding)
        inside = delta * (radius / length.clamp_min(max(radius, TINY)))
        # Clamping afterwards only brings the image closer to the original.
        projected: Tensor = (images + inside).clamp(0, 1)
        return projected


class LocalSquare(torchattacks.Square):  # type: ignore[misc]
    """Square with local random numbers, exact ties and whole-image coverage."""

    def use_seed(self, seed: int, numbers: Sequence[int]) -> None:
        """Fix all randomness; `numbers` are the images' numbers in their data set."""
        self.seed = seed
        self.numbers = tuple(numbers)
        # Positions, sizes and signs of the squares are common to a batch.
        self.shared = torch.Generator().manual_seed(derive_seed(seed, "squares"))

    def random_choice(self, shape: Sequence[int]) -> Tensor:
        """Random signs, -1.0 or 1.0."""
        if len(shape) == 4:  # the first stripes: one set per image
            uniform = _draw(self.seed, self.numbers, shape[1:], False, "stripes")
        else:
            uniform = torch.rand(tuple(shape), generator=self.shared)
        return torch.where(uniform < 0.5, -1.0, 1.0).to(self.device)

    def random_int(self, low: int = 0, high: int = 1, shape: Sequence[int] = (1,)) -> Tensor:
        """Random integers, both ends included."""
        # torchattacks never draws `high`. Below 0 it falls when a square is
        # larger than a flat image.
        return torch.randint(low, max(low, high) + 1, tuple(shape), generator=self.shared)

    def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The label's lead over the best other class, (N,), twice: broken where it is <= 0."""
        logits: Tensor = self.get_logits(x)
        rows = y.unsqueeze(1)
        others = logits.scatter(1, rows, float("-inf")).amax(dim=1)
        margin = logits.gather(1, rows).squeeze(1) - others
        # Where a tie still reads as the label, the image is not broken yet.
        held = (margin <= 0) & (logits.argmax(dim=1) == y)
        margin = torch.where(held, torch.finfo(margin.dtype).tiny, margin)
        return margin, margin.clone()


def _gradient(loss: Tensor, images: Tensor) -> Tensor:
    """The gradient of each image's loss; never touches `.grad`."""
    gradient = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss.sum(), images, allow_unused=True)
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


def _unit(vectors: Tensor) -> Tensor:
    """(N,...) scaled to Euclidean length 1 each; zero stays zero."""
    tiny = torch.finfo(vectors.dtype).tiny
    # By the largest entry first: squares of small gradients would underflow.
    largest = vectors.flatten(1).abs().amax(dim=1)[:, None, None, None]
    scaled = vectors / largest.clamp_min(tiny)
    length = scaled.flatten(1).norm(dim=1)[:, None, None, None]
    unit: Tensor = scaled / length.clamp_min(tiny)
    return unit


def _draw(
    seed: int, numbers: Sequence[int], shape: Sequence[int], normal: bool, *use: str | int
) -> Tensor:
    """Random numbers (len(numbers), *shape), each row fixed by the seed and its number."""
    rows = torch.empty(len(numbers), *shape)
    generator = torch.Generator()
    for row, number in zip(rows, numbers, strict=True):
        generator.manual_seed(derive_seed(seed, number, *use))
        if normal:
            row.normal_(generator=generator)
        else:
            row.uniform_(generator=generator)
    return rows
