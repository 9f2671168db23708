"""Square, a random search that needs answers and no gradients, from torchattacks, mended.

What torchattacks 3.5.1 does wrong, and what is done here instead:

- It writes -inf into the very tensor that the model returned, and takes a tie
  for a success: neither here.
- In Linf its squares never reach the last row and column (15 of an 8x8 image's
  64 pixels): here they do.
- In L2 it fails on images whose first tiles or squares do not fit (14x14, and
  most that are not square): here tiles are centred and squares cut to size, and
  the image stays inside small balls in spite of rounding.
- It reseeds the global generators: here all generators are local.

In Linf the loop is the library's own, so positions, sizes and signs of the
squares are common to a batch: there an image's random numbers do depend on its
batch (the first stripes do not). In L2 every image has its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchattacks
from torch import Tensor

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks.common import (
    TINY,
    Judged,
    draw,
    in_ball,
    lead_of_label,
    lengths,
    project_l2,
    unit,
)
from epdistill.robustness.guards import L2, LINF, derive_seed
from epdistill.robustness.subjects import Predict

# Iterations for which an image's random numbers are drawn at once.
BLOCK = 64


@dataclass(frozen=True)
class SquareSettings:
    """How hard Square tries (Andriushchenko et al., ECCV 2020), on the margin loss.

    Attributes:
        queries: Proposals per image, after the first query with random stripes or tiles.
        p_init: Share of the pixels that the first squares cover; the schedule that
            shrinks it is stretched or squeezed to `queries`.
    """

    queries: int = 200
    p_init: float = 0.8

    def __post_init__(self) -> None:
        if self.queries < 1 or not 0 < self.p_init <= 1:
            raise EvaluationError(f"received {self}; expected queries >= 1 and 0 < p_init <= 1")


def square_linf(
    model: Predict,
    images: Tensor,  # (N,C,H,W) in [0,1]
    labels: Tensor,  # (N,) int64
    eps: float,
    *,
    seed: int,
    settings: SquareSettings = SquareSettings(),
    index: Tensor | None = None,  # (N,) int64
) -> Tensor:
    """Random search with squares of extreme perturbation in the Linf ball.

    Args:
        model: Any callable, images in [0,1] to logits (N,K): an ONNX session will do.
        images: (N,C,H,W) floating point in [0,1].
        labels: (N,) int64, the true classes.
        eps: Radius, on pixels in [0,1]; 0 returns the images as they are.
        seed: Fixes all random numbers. The squares are common to a batch, so that an
            image's result depends on which images are attacked together with it.
        settings: Queries and size of the first squares.
        index: The images' numbers in their data set, on which their first stripes depend.

    Returns:
        (N,C,H,W), detached, checked to be inside the ball and [0,1]. An image that
        withstood comes back in its best attempt.

    Raises:
        EvaluationError: Bad arguments or non-finite logits.
    """

    def craft(judged: Judged, origin: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        return _search(LocalSquare, LINF, judged, origin, labels, numbers, eps, seed, settings)

    return in_ball(craft, LINF, model, images, labels, eps, index, gradients=False)


def square_l2(
    model: Predict,
    images: Tensor,  # (N,C,H,W) in [0,1]
    labels: Tensor,  # (N,) int64
    eps: float,
    *,
    seed: int,
    settings: SquareSettings = SquareSettings(),
    index: Tensor | None = None,  # (N,) int64
) -> Tensor:
    """Random search that moves the perturbation's energy between squares of the image.

    Arguments, result and errors as for `square_linf`, with the radius in L2; here
    all of an image's random numbers depend on `seed` and its number alone.
    """

    def craft(judged: Judged, origin: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        return _search(LocalSquareL2, L2, judged, origin, labels, numbers, eps, seed, settings)

    return in_ball(craft, L2, model, images, labels, eps, index, gradients=False)


def _search(
    kind: type[LocalSquare],
    norm: str,
    judged: Judged,
    origin: Tensor,
    labels: Tensor,
    numbers: Sequence[int],
    eps: float,
    seed: int,
    settings: SquareSettings,
) -> Tensor:
    attack = kind(
        judged,
        norm={LINF: "Linf", L2: "L2"}[norm],
        eps=eps,
        n_queries=settings.queries,
        p_init=settings.p_init,
        loss="margin",
        resc_schedule=True,
    )
    attack.use_seed(seed, numbers)
    attack.init_hyperparam(origin)
    found: Tensor = attack.attack_single_run(origin, labels)[1]
    return found


# torchattacks is not typed: to mypy its classes are Any.
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
            uniform = draw(self.seed, self.numbers, shape[1:], False, "stripes")
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
        margin = lead_of_label(logits, y)
        # Where a tie still reads as the label, the image is not broken yet.
        held = (margin <= 0) & (logits.argmax(dim=1) == y)
        margin = torch.where(held, torch.finfo(margin.dtype).tiny, margin)
        return margin, margin.clone()


class LocalSquareL2(LocalSquare):
    """The L2 search (Algorithm 3 of the paper) with windows of its own for each image."""

    def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[None, Tensor]:
        """Images (N,C,H,W) and labels (N,) to nothing (as in the base class) and best images."""
        best = project_l2(x, x + self.eps * unit(self._tiles(x)), self.eps)
        margin, _ = self.margin_and_loss(best, y)
        height, width = x.shape[2:]
        columns = 5 + x.shape[1]
        table = torch.empty(len(x), BLOCK, columns)
        for query in range(self.n_queries):
            held = (margin > 0).nonzero().flatten()
            if len(held) == 0:
                break
            rows = held.cpu()
            if query % BLOCK == 0:
                numbers = [self.numbers[row] for row in rows.tolist()]
                use = ("windows", query // BLOCK)
                table[rows] = draw(self.seed, numbers, (BLOCK, columns), False, *use)
            size = max(round(math.sqrt(self.p_selection(query) * height * width)), 3)
            size = min(size + 1 - size % 2, height, width)
            delta = self._moved(best[held] - x[held], size, table[rows, query % BLOCK])
            tried = project_l2(x[held], x[held] + self.eps * unit(delta), self.eps)
            found, _ = self.margin_and_loss(tried, y[held])
            better = found < margin[held]
            margin[held] = torch.where(better, found, margin[held])
            best[held] = torch.where(better[:, None, None, None], tried, best[held])
        return None, best

    def _tiles(self, x: Tensor) -> Tensor:
        """The first perturbation: bumps of random sign on a centred grid, (N,C,H,W)."""
        n, channels, height, width = x.shape
        size = max(min(height, width) // 5, 1)
        down, across = height // size, width // size
        uniform = draw(self.seed, self.numbers, (channels, down, across), False, "tiles")
        signs = torch.where(uniform < 0.5, -1.0, 1.0).to(x)
        turned = draw(self.seed, self.numbers, (down, across), False, "turned").to(x) < 0.5
        bump = self.bump(size).to(x)
        bumps = torch.where(turned[:, None, :, :, None, None], bump.T, bump)
        grid = signs[..., None, None] * bumps  # (N,C,down,across,size,size)
        flat = grid.permute(0, 1, 2, 4, 3, 5).reshape(n, channels, down * size, across * size)
        top, left = (height - down * size) // 2, (width - across * size) // 2
        tiles = torch.zeros_like(x)
        tiles[:, :, top : top + down * size, left : left + across * size] = flat
        return tiles

    def _moved(self, delta: Tensor, size: int, uniform: Tensor) -> Tensor:
        """One window of each perturbation emptied, its energy put into a bump in another.

        `delta` is (M,C,H,W), `uniform` (M,5+C): two corners, the bump's turn, its signs.
        """
        channels, height, width = delta.shape[1:]
        place = uniform.to(delta)
        row, column = (place[:, i] * (room - size + 1) for i, room in ((0, height), (1, width)))
        row2, column2 = (place[:, i] * (room - size + 1) for i, room in ((2, height), (3, width)))
        target = _window(row.long(), column.long(), size, channels)
        source = _window(row2.long(), column2.long(), size, channels)
        signs = torch.where(place[:, 5:] < 0.5, -1.0, 1.0).to(delta)
        bump = self.bump(size).to(delta)
        turned = torch.where(place[:, 4, None, None] < 0.5, bump.T, bump)
        old = delta[target]
        union = torch.zeros_like(delta)
        union[target] = union[source] = 1.0
        energy = lengths(delta * union) ** 2
        spare = (self.eps**2 - lengths(delta) ** 2).clamp_min(0)
        new = turned[:, None] * signs[:, :, None, None]
        new = new + old / old.norm(dim=(2, 3), keepdim=True).clamp_min(TINY)
        new = new / new.norm(dim=(2, 3), keepdim=True).clamp_min(TINY)
        moved = delta.clone()
        moved[source] = 0.0
        moved[target] = new * (spare / channels + energy).sqrt()
        return moved

    def bump(self, size: int) -> Tensor:
        """The paper's eta: two bumps of opposite sign, (size,size), of length 1."""
        # The base class's own would draw its turn from the global generator.
        bump = torch.zeros(size, size, device=self.device)
        half = size // 2
        if half:
            bump[:half] = self.eta_rectangles(half, size)
        bump[half:] = -self.eta_rectangles(size - half, size)
        return bump / bump.square().sum().sqrt()


def _window(
    rows: Tensor, columns: Tensor, size: int, channels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices of one size x size window per image, of shape (M,C,size,size) when used."""
    device = rows.device
    image = torch.arange(len(rows), device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    along = torch.arange(size, device=device)
    down = (rows[:, None] + along)[:, None, :, None]
    across = (columns[:, None] + along)[:, None, None, :]
    return image, channel, down, across
