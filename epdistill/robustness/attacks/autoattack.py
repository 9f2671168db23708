"""AutoAttack: the authors' own code, pyautoattack, with its standard settings.

Nothing weaker may carry the name (torchattacks' AutoAttack takes 10 steps where
the original takes 100). The adapter changes no number of the attack; it only
keeps in what pyautoattack 0.2.0 would let out:

- It seeds the global generators, by the clock without a seed: they are restored.
- FAB's backward pass adds to `.grad` of every parameter: the model it sees has
  gradients with respect to the images alone.
- Square writes -inf into the tensor that the model returned: it gets a copy.
- It prints, warns, and ends a running trace: its printing is swallowed, its
  warnings go at level INFO to the logger of this module, the trace goes on.
- It casts to float32: only what it broke is taken over, the rest stays bit for bit.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks.common import Judged, in_ball
from epdistill.robustness.guards import L2, LINF
from epdistill.robustness.subjects import Predict

logger = logging.getLogger(__name__)

# The standard version attacks this many classes per image, or all others if fewer.
TARGETS = 9


@dataclass(frozen=True)
class AutoAttackSettings:
    """AutoAttack has nothing to choose but how much memory it takes.

    Attributes:
        batch_size: Images attacked together. Its random numbers are drawn per batch, so
            that results of single images vary with it.
    """

    batch_size: int = 250

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise EvaluationError(f"received {self}; expected batch_size >= 1")


def autoattack_linf(
    model: Predict,
    images: Tensor,  # (N,C,H,W) in [0,1]
    labels: Tensor,  # (N,) int64
    eps: float,
    *,
    seed: int,
    settings: AutoAttackSettings = AutoAttackSettings(),
    index: Tensor | None = None,  # (N,) int64
) -> Tensor:
    """The standard ensemble of Croce and Hein (ICML 2020): APGD-CE, APGD-T, FAB-T, Square.

    Args:
        model: Differentiable; images in [0,1] to logits (N,K), K >= 4.
        images: (N,C,H,W) floating point in [0,1].
        labels: (N,) int64, the true classes.
        eps: Radius, on pixels in [0,1]; 0 returns the images as they are.
        seed: Passed on to pyautoattack. An image's random numbers depend on which images
            it is attacked together with.
        settings: Images per batch.
        index: Accepted and not used: pyautoattack knows no numbers of images.

    Returns:
        (N,C,H,W), detached, checked to be inside the ball and [0,1]. An image that
        withstood, or that the model got wrong from the start, comes back as it was.

    Raises:
        EvaluationError: pyautoattack is not installed, bad arguments, non-finite logits,
            a model without gradients or with fewer than 4 classes.
    """
    craft = _standard("Linf", eps, seed, settings)
    return in_ball(craft, LINF, model, images, labels, eps, index, gradients=True)


def autoattack_l2(
    model: Predict,
    images: Tensor,  # (N,C,H,W) in [0,1]
    labels: Tensor,  # (N,) int64
    eps: float,
    *,
    seed: int,
    settings: AutoAttackSettings = AutoAttackSettings(),
    index: Tensor | None = None,  # (N,) int64
) -> Tensor:
    """As `autoattack_linf`, in the L2 ball; its Square refuses some shapes (14x14, say)."""
    craft = _standard("L2", eps, seed, settings)
    return in_ball(craft, L2, model, images, labels, eps, index, gradients=True)


def _standard(
    norm: str, eps: float, seed: int, settings: AutoAttackSettings
) -> Callable[[Judged, Tensor, Tensor, Sequence[int]], Tensor]:
    def craft(model: Judged, images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        library = _library()
        if norm == "L2":
            _check_tiles(images)
        with torch.no_grad():
            classes = model(images[:1]).shape[1]
        if classes < 4:
            raise EvaluationError(
                f"the model has {classes} classes; expected at least 4: AutoAttack's targeted "
                "loss compares four, use APGD with loss='ce' and Square instead"
            )
        with _contained(library):
            attack = library.AutoAttack(
                _ImagesOnly(model, images.dtype),
                norm=norm,
                eps=eps,
                seed=seed,
                version="standard",
                device=images.device,
            )
            # With fewer than 10 classes, all wrong ones are targets, as the authors advise.
            targets = min(TARGETS, classes - 1)
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
            single = images.float()
            found, _ = attack.run_standard_evaluation(
                single, labels, batch_size=settings.batch_size
            )
        changed = (found != single).flatten(1).any(dim=1)[:, None, None, None]
        return torch.where(changed, found.to(images.dtype), images)

    return craft


def _library() -> Any:
    try:
        return importlib.import_module("pyautoattack")
    except ImportError as error:
        raise EvaluationError(
            f"AutoAttack needs the authors' package pyautoattack, which does not import ({error}); "
            "install it: pip install 'epdistill[autoattack]'"
        ) from error


def _check_tiles(images: Tensor) -> None:
    """Refuse the shapes on which pyautoattack's Square ends in an error in L2."""
    height, width = images.shape[2:]
    # Its first tiles start at a margin measured on the height, in both directions.
    tile = height // 5
    tiles_fit = tile > 0 and all(
        (height - 5 * tile) // 2 + tile * (side // tile) <= side or tile == 1
        for side in (height, width)
    )
    if not tiles_fit:
        raise EvaluationError(
            f"received images of {height}x{width} pixels; AutoAttack's own Square cannot take "
            "that shape in L2: use square_l2 and apgd_l2, or resize the images"
        )


class _ImagesOnly(nn.Module):
    """A model whose backward pass reaches the images and no parameter."""

    def __init__(self, model: Judged, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W) float32 to logits (N,K), a tensor of the caller's own."""
        if not (torch.is_grad_enabled() and images.requires_grad):
            with torch.no_grad():
                logits: Tensor = self.model(images.to(self.dtype))
                return logits.clone()
        logits = _DetachParameters.apply(images, self)
        return logits


class _DetachParameters(torch.autograd.Function):
    """Keeps the model's graph to itself and passes on the gradient of the images."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, wrapper: _ImagesOnly) -> Tensor:
        """Logits (N,K); their graph stays in `ctx`."""
        with torch.enable_grad():
            ctx.images = images.detach().requires_grad_()
            ctx.logits = wrapper.model(ctx.images.to(wrapper.dtype))
        if not ctx.logits.requires_grad:
            raise EvaluationError(
                "the model's logits have no gradient with respect to the images; expected a "
                "differentiable view: attack a model like this as a black box"
            )
        logits: Tensor = ctx.logits
        return logits.detach().clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        """The images' gradient (N,C,H,W); FAB asks for several of one forward pass."""
        (gradient,) = torch.autograd.grad(ctx.logits, ctx.images, outer[0], retain_graph=True)
        return gradient, None


class _Forward(logging.Handler):
    """Passes another logger's warnings on to ours, at level INFO."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log one record again; anything below a warning is progress, and dropped."""
        if record.levelno >= logging.WARNING:
            logger.info("pyautoattack: %s", record.getMessage())


@contextlib.contextmanager
def _contained(library: Any) -> Iterator[None]:
    """Restore the global generators, the trace and the logger, and swallow what is printed."""
    # The library counts calls of a dynamic model over the whole process.
    counted: dict[str, int] = library.autoattack.checks.funcs
    counted.update(dict.fromkeys(counted, 0))
    theirs = logging.getLogger("auto-attack")
    trace, propagate, handlers = sys.gettrace(), theirs.propagate, theirs.handlers
    theirs.propagate, theirs.handlers = False, [_Forward()]
    try:
        with (
            torch.random.fork_rng(devices=range(torch.cuda.device_count())),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            yield
    finally:
        theirs.propagate, theirs.handlers = propagate, handlers
        sys.settrace(trace)
