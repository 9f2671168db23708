"""HopSkipJump (Chen, Jordan and Wainwright, S&P 2020): only the class is asked.

From an image that the model gets wrong: bisect to the boundary, estimate its
normal there from the answers to small random shifts, jump along it, repeat. The
numbered constants below are the paper's; sizes of shifts and bisections follow
its Algorithm 2. Written here, since torchattacks has no attack of this kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks.common import Judged, draw, lengths, nearest, unit
from epdistill.robustness.guards import L2, LINF, NORMS
from epdistill.robustness.subjects import Predict

# Shifts of the first estimate; the t-th takes sqrt(t) times as many, at most LARGEST.
SHIFTS, LARGEST = 100, 10_000
# An estimate from fewer answers than this is noise.
FEWEST = 10
# Random images tried as a start, and halvings of a jump.
STARTS, HALVINGS = 100, 20
# Size of the first shifts, before the boundary's distance is known.
FIRST_SHIFT = 0.1
# Images that the model is asked about at once.
CHUNK = 512


@dataclass(frozen=True)
class HopSkipJumpSettings:
    """How hard HopSkipJump tries.

    Attributes:
        queries: Answers per image, all told; never exceeded.
        norm: The distance that is made small, `"l2"` or `"linf"`.
    """

    queries: int = 1000
    norm: str = L2

    def __post_init__(self) -> None:
        if self.queries < 1 or self.norm not in NORMS:
            raise EvaluationError(
                f"received {self}; expected queries >= 1 and a norm among {', '.join(NORMS)}"
            )


def hop_skip_jump(
    model: Predict,
    images: Tensor,  # (N,C,H,W) in [0,1]
    labels: Tensor,  # (N,) int64
    *,
    seed: int,
    settings: HopSkipJumpSettings = HopSkipJumpSettings(),
    index: Tensor | None = None,  # (N,) int64
) -> Tensor:
    """The nearest images that break the model, found from its classes alone.

    Args:
        model: Any callable, images in [0,1] to logits (N,K), of which only the largest
            one's place is used.
        images: (N,C,H,W) floating point in [0,1].
        labels: (N,) int64, the true classes.
        seed: Fixes starts and shifts.
        settings: Queries and norm.
        index: The images' numbers in their data set; each image's random numbers depend on
            `seed` and its number. Default: 0..N-1.

    Returns:
        (N,C,H,W), detached, inside [0,1]. An image for which no start was found, or that
        the model got wrong from the start, comes back as it was.

    Raises:
        EvaluationError: Bad arguments or non-finite logits.
    """

    def craft(judged: Judged, origin: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        return _Hunt(judged, origin, labels, tuple(numbers), seed, settings).run()

    return nearest(craft, model, images, labels, index, gradients=False)


@dataclass
class _Hunt:
    """One batch: what each image has been asked, and its nearest broken image so far."""

    model: Judged
    origin: Tensor  # (N,C,H,W)
    labels: Tensor  # (N,) int64
    numbers: tuple[int, ...]
    seed: int
    settings: HopSkipJumpSettings
    used: Tensor = field(init=False)  # (N,) int64, queries

    def __post_init__(self) -> None:
        self.used = torch.zeros_like(self.labels)
        size = self.origin[0].numel()
        # How exactly the boundary is met, in parts of the distance.
        self.theta = size**-1.5 if self.settings.norm == L2 else size**-2.0

    def run(self) -> Tensor:
        """(N,C,H,W): the nearest broken images, the originals where there is none."""
        best = self.origin.clone()
        everyone = torch.arange(len(best), device=best.device)
        rows = everyone[~self._broken(self.origin, everyone)]
        start, rows = self._starts(rows)
        if len(rows) == 0:
            return best
        # Images of the rows at hand; `best` is written whenever one comes nearer.
        edge = self._to_boundary(rows, start)
        best[rows] = edge
        shift = torch.full_like(edge[:, 0, 0, 0], FIRST_SHIFT)
        turn = 0
        while True:
            turn += 1
            wanted = min(int(SHIFTS * math.sqrt(turn)), LARGEST)
            # Enough is kept back for the jump and for the way to the boundary.
            spare = self.settings.queries - self.used[rows] - HALVINGS - self._bisections()
            keep = spare >= FEWEST
            rows, edge, shift, spare = rows[keep], edge[keep], shift[keep], spare[keep]
            if len(rows) == 0:
                return best
            counts = spare.clamp_max(wanted).tolist()
            normal = self._normals(rows, edge, shift, counts, turn)
            away = self._distance(rows, edge)
            jumped = self._jump(rows, edge, normal, away / math.sqrt(turn))
            edge = self._to_boundary(rows, jumped)
            reach = self._distance(rows, edge)
            nearer = reach < self._distance(rows, best[rows])
            best[rows[nearer]] = edge[nearer]
            size = self.origin[0].numel()
            root = math.sqrt(size) if self.settings.norm == L2 else size
            shift = (root * self.theta * reach).clamp_min(torch.finfo(reach.dtype).eps)

    def _bisections(self) -> int:
        return math.ceil(math.log2(1 / self.theta)) + 1

    def _broken(self, images: Tensor, rows: Tensor) -> Tensor:
        """Whether the model errs on images (M,C,H,W) that belong to `rows` (M,); counted."""
        self.used += torch.bincount(rows, minlength=len(self.used)).to(self.used)
        parts = zip(torch.split(images, CHUNK), torch.split(self.labels[rows], CHUNK), strict=True)
        return torch.cat([self.model(part).argmax(dim=1) != label for part, label in parts])

    def _affordable(self, rows: Tensor) -> Tensor:
        return self.used[rows] < self.settings.queries

    def _distance(self, rows: Tensor, images: Tensor) -> Tensor:
        delta = images - self.origin[rows]
        if self.settings.norm == L2:
            return lengths(delta).flatten()
        return delta.flatten(1).abs().amax(dim=1)

    def _starts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Broken images, and the rows (out of `rows`) for which there is one."""
        found = self.origin.clone()
        have = torch.zeros_like(self.used, dtype=torch.bool)
        for turn in range(STARTS):
            asked = rows[~have[rows] & self._affordable(rows)]
            if len(asked) == 0:
                break
            tried = self._start(asked, turn)
            broken = self._broken(tried, asked)
            found[asked[broken]] = tried[broken]
            have[asked[broken]] = True
        rows = rows[have[rows]]
        return found[rows], rows

    def _start(self, rows: Tensor, turn: int) -> Tensor:
        """A candidate (M,C,H,W).

        The paper draws uniform noise, which a small model often puts into one class
        throughout: then the images of that class would seem robust. So coarse noise, the
        negative under noise and black and white noise take turns with it.
        """
        shape = self.origin.shape[1:]
        numbers = [self.numbers[row] for row in rows.tolist()]
        noise = draw(self.seed, numbers, shape, False, "start", turn).to(self.origin)
        kind = turn % 4
        if kind == 1:
            height, width = shape[1:]
            coarse = noise[:, :, : max(height // 4, 1), : max(width // 4, 1)]
            return F.interpolate(coarse, size=(height, width), mode="nearest")
        if kind == 2:
            return (1 - self.origin[rows] + 0.5 * (noise - 0.5)).clamp(0, 1)
        if kind == 3:
            return (noise < 0.5).to(noise)
        return noise

    def _between(self, rows: Tensor, images: Tensor, part: Tensor) -> Tensor:
        """Images nearer to the originals: `part` (M,) of the distance, in the norm's own way."""
        origin, part = self.origin[rows], part[:, None, None, None]
        if self.settings.norm == L2:
            return (origin + part * (images - origin)).clamp(0, 1)
        cube = part * self._distance(rows, images)[:, None, None, None]
        return torch.minimum(torch.maximum(images, origin - cube), origin + cube).clamp(0, 1)

    def _to_boundary(self, rows: Tensor, broken: Tensor) -> Tensor:
        """Bisect between originals and broken images; the ends returned are broken."""
        low = torch.zeros_like(broken[:, 0, 0, 0])
        high = torch.ones_like(low)
        edge = broken.clone()
        # In Linf the paper's exactness is absolute; in parts of the distance it is finer.
        for _ in range(self._bisections()):
            asked = (self._affordable(rows) & (high - low > self.theta)).nonzero().flatten()
            if len(asked) == 0:
                break
            middle = (low[asked] + high[asked]) / 2
            tried = self._between(rows[asked], broken[asked], middle)
            wrong = self._broken(tried, rows[asked])
            edge[asked[wrong]] = tried[wrong]
            high[asked[wrong]] = middle[wrong]
            low[asked[~wrong]] = middle[~wrong]
        return edge

    def _normals(
        self, rows: Tensor, edge: Tensor, shift: Tensor, counts: Sequence[int], turn: int
    ) -> Tensor:
        """The boundary's normals towards broken images (M,C,H,W): equation (16) of the paper."""
        normals = torch.empty_like(edge)
        for place, (row, count) in enumerate(zip(rows.tolist(), counts, strict=True)):
            number = [self.numbers[row]]
            shape = (count, *edge.shape[1:])
            noise = draw(self.seed, number, shape, self.settings.norm == L2, "shift", turn)[0]
            noise = noise if self.settings.norm == L2 else 2 * noise - 1
            size = shift[place]
            moved = (edge[place] + size * unit(noise.to(edge))).clamp(0, 1)
            # What was cut off at the box was not a shift.
            directions = (moved - edge[place]) / size
            owner = rows[place].expand(count)
            answers = torch.where(self._broken(moved, owner), 1.0, -1.0).to(edge)
            mean = answers.mean()
            # All alike: their mean is the best guess there is; else the mean is a baseline.
            weight = answers if bool(mean.abs() == 1) else answers - mean
            normals[place] = (weight[:, None, None, None] * directions).mean(dim=0)
        return normals.sign() if self.settings.norm == LINF else unit(normals)

    def _jump(self, rows: Tensor, edge: Tensor, normal: Tensor, step: Tensor) -> Tensor:
        """Move along the normal, halving the step until the image is broken."""
        jumped = edge.clone()
        left = torch.arange(len(rows), device=rows.device)
        for _ in range(HALVINGS):
            left = left[self._affordable(rows[left])]
            if len(left) == 0:
                break
            tried = (edge[left] + step[left, None, None, None] * normal[left]).clamp(0, 1)
            wrong = self._broken(tried, rows[left])
            jumped[left[wrong]] = tried[wrong]
            left = left[~wrong]
            step = step / 2
        return jumped
