"""The parity gate: does the exported graph compute what the module computes?

Three computations of the same images are compared: torch in float32, torch in
float64 (which stands for the exact answer), and the graph. Rounding differs
between two correct float32 programs, so the graph is held to the *module's own*
rounding, measured, with a little room:

    |graph - f64|  <=  K max|f32 - f64|  +  ATOL spread

where both maxima run over one case (real images, uniform noise, extremes) and
`spread` is the case's largest range max - min of an image's float64 logits. The
spread, not the size of the logits, since adding a constant to all logits changes
no answer. K = 10 leaves room for other summation orders (Winograd and blocked
convolutions sum differently); ATOL = 1e-4 of the spread keeps the bound above
zero where float32 happens to be exact, and is far below what changes a
probability visibly. A wrong operator, a forgotten normalisation or a train-mode
BatchNorm misses this bound by orders of magnitude.

Beyond the bound: all answers finite; the same argmax as float64 on every image
whose two best float64 logits are further apart than the bound (closer is a tie);
and the answer to an image does not depend on the batch it comes in.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from epdistill.errors import DataError, ParityError

K = 10.0
ATOL = 1e-4
BATCH_SIZES = (1, 2, 7, 64)

Run = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class ParityRow:
    """One case at one batch size.

    Attributes:
        case: `"real"`, `"noise"` or `"extremes"`.
        batch_size: Images per call of the graph.
        n: Images compared.
        error: max |graph - float64| over their logits.
        float32_error: max |torch float32 - float64| over the case's logits.
        tolerance: The bound on `error` (and on `batch_error`).
        batch_error: max difference to the graph's answers in the largest batch.
        ties: Images whose two best float64 logits are closer than the bound.
        agreement: Share of the other images with float64's argmax (1 if all are ties).
    """

    case: str
    batch_size: int
    n: int
    error: float
    float32_error: float
    tolerance: float
    batch_error: float
    ties: int
    agreement: float


@dataclass(frozen=True)
class ParityReport:
    """The figures of a passed gate; one row per case and batch size."""

    rows: tuple[ParityRow, ...]

    @property
    def worst(self) -> ParityRow:
        """The row that used the largest part of its bound."""
        return max(self.rows, key=lambda row: row.error / row.tolerance if row.tolerance else 0.0)

    @property
    def max_abs_error(self) -> float:
        """`error` of the worst row."""
        return self.worst.error

    @property
    def tolerance(self) -> float:
        """`tolerance` of the worst row."""
        return self.worst.tolerance

    @property
    def n(self) -> int:
        """Answers compared, over all rows."""
        return sum(row.n for row in self.rows)

    @property
    def agreement(self) -> float:
        """Lowest share of agreeing answers of any row."""
        return min(row.agreement for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "max_abs_error": self.max_abs_error,
            "tolerance": self.tolerance,
            "agreement": self.agreement,
            "n": self.n,
            "k": K,
            "atol": ATOL,
            "rows": [asdict(row) for row in self.rows],
        }


@dataclass(frozen=True)
class _Case:
    """One set of images with the module's answers and the bound that follows from them."""

    name: str
    images: npt.NDArray[np.float32]  # (n, C, H, W)
    exact: npt.NDArray[np.float64]  # (n, K) float64 logits
    float32_error: float
    tolerance: float


def check_parity(
    reference: nn.Module, run: Run, images: Tensor, *, seed: int, bytes_only: bool = False
) -> ParityReport:
    """Compare a graph with the module it was made from.

    Neither the module (copies are used, in eval mode, on the CPU) nor the global
    random state is touched.

    Args:
        reference: Images in [0,1] to logits (N, K).
        run: The graph: float32 (n, C, H, W) arrays to (n, K) arrays.
        images: float32 (N, C, H, W) in [0,1], N >= 1: real images, all of which are used.
        seed: Seeds the noise images.
        bytes_only: The graph sees bytes: compare on multiples of 1/255.

    Returns:
        The figures; having them means the gate was passed.

    Raises:
        DataError: The images are not of that kind.
        ParityError: The graph computes something else; names the case, the figure and
            the bound.
    """
    check_images(images)
    single = deepcopy(reference).cpu().float().eval()
    double = deepcopy(reference).cpu().double().eval()
    rows: list[ParityRow] = []
    for name, pool in _pools(images.detach().cpu(), seed).items():
        if bytes_only:
            pool = (pool * 255).round() / 255
        case = _case(name, pool, single, double)
        # The largest batch goes first: it covers every image and is what the
        # answers in smaller batches are compared with.
        whole = _answers(case, run, max(BATCH_SIZES))
        rows.extend(_row(case, run, whole, batch_size) for batch_size in BATCH_SIZES)
    return ParityReport(tuple(rows))


def check_images(images: Tensor) -> None:
    """Refuse what are not float32 images in [0,1].

    Raises:
        DataError: Another dtype, shape or range, or no image at all.
    """
    if images.dtype != torch.float32 or images.ndim != 4 or images.numel() == 0:
        raise DataError(
            f"received {images.dtype} images of shape {tuple(images.shape)}; expected at least one "
            "float32 image of shape (N, C, H, W)"
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0.0 and high <= 1.0):  # written so that NaN fails
        raise DataError(f"received images with values {low:g} to {high:g}; expected [0, 1]")


def _pools(images: Tensor, seed: int) -> dict[str, Tensor]:
    """The three cases' images; values in [0,1]."""
    shape = images.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand((max(BATCH_SIZES), *shape), generator=generator)
    rows, columns = torch.arange(shape[1])[:, None], torch.arange(shape[2])[None, :]
    board = ((rows + columns) % 2).to(torch.float32).expand(shape)
    extremes = torch.stack([torch.zeros(shape), torch.ones(shape), board, 1 - board])
    return {"real": images, "noise": noise, "extremes": extremes}


def _case(name: str, pool: Tensor, single: nn.Module, double: nn.Module) -> _Case:
    with torch.no_grad():
        chunks = torch.split(pool, max(BATCH_SIZES))
        rounded = torch.cat([single(chunk) for chunk in chunks]).double()
        exact = torch.cat([double(chunk.double()) for chunk in chunks])
    if exact.ndim != 2 or len(exact) != len(pool):
        raise ParityError(
            f"the model answers {len(pool)} images with shape {tuple(exact.shape)}; "
            "expected logits (N, K): export a classifier"
        )
    if not (torch.isfinite(exact).all() and torch.isfinite(rounded).all()):
        raise ParityError(
            f"the model itself gives non-finite logits on {name} images; expected finite ones: "
            "train it again with a smaller learning rate"
        )
    float32_error = float((rounded - exact).abs().max())
    spread = float((exact.amax(1) - exact.amin(1)).max())
    return _Case(
        name, pool.numpy(), exact.numpy(), float32_error, K * float32_error + ATOL * spread
    )


def _answers(case: _Case, run: Run, batch_size: int) -> npt.NDArray[np.float64]:
    """The graph's logits (n, K) for all images of a case, in full batches.

    A last batch is filled up from the front, so that exactly this size is tried.
    """
    n = len(case.images)
    answers = np.empty_like(case.exact)
    for start in range(0, n, batch_size):
        index = np.arange(start, start + batch_size) % n
        kept = min(batch_size, n - start)
        answers[start : start + kept] = _call(case, run, index)[:kept]
    return answers


def _row(case: _Case, run: Run, whole: npt.NDArray[np.float64], batch_size: int) -> ParityRow:
    """Hold one case at one batch size to its bound."""
    n = len(case.images)
    if batch_size == max(BATCH_SIZES):
        index, answers = np.arange(n), whole
    else:
        # From the middle on: not the images, nor the places in the batch, of the largest batch.
        index = (n // 2 + np.arange(batch_size)) % n
        answers = _call(case, run, index)
    exact = case.exact[index]
    where = f"{case.name} images in batches of {batch_size}"
    if not np.isfinite(answers).all():
        raise ParityError(
            f"parity failed on {where}: the graph gives non-finite logits where the model's are "
            "finite; nothing was written"
        )
    error = float(np.abs(answers - exact).max())
    batch_error = float(np.abs(answers - whole[index]).max())
    for figure, what in ((error, "error"), (batch_error, "difference to larger batches")):
        if figure > case.tolerance:
            raise ParityError(
                f"parity failed on {where}: {what} {figure:.3g}, expected at most "
                f"{case.tolerance:.3g}; nothing was written: the graph computes something else "
                "than the model"
            )
    clear = _gaps(exact) > case.tolerance
    agree = (answers.argmax(1) == exact.argmax(1))[clear]
    if not agree.all():
        raise ParityError(
            f"parity failed on {where}: another class for {int((~agree).sum())} of {agree.size} "
            f"images, expected 0 (error {error:.3g}, bound {case.tolerance:.3g}); "
            "nothing was written"
        )
    return ParityRow(
        case=case.name,
        batch_size=batch_size,
        n=len(index),
        error=error,
        float32_error=case.float32_error,
        tolerance=case.tolerance,
        batch_error=batch_error,
        ties=int((~clear).sum()),
        agreement=float(agree.mean()) if agree.size else 1.0,
    )


def _call(case: _Case, run: Run, index: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """The graph's logits (len(index), K) for some images, in one batch."""
    logits = run(case.images[index])
    expected = (len(index), case.exact.shape[1])
    if logits.shape != expected:
        raise ParityError(
            f"parity failed on {case.name} images in batches of {len(index)}: the graph answers "
            f"with shape {logits.shape}, expected {expected}; nothing was written"
        )
    return logits.astype(np.float64)


def _gaps(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Distance (n,) of the two largest of (n, K) logits; infinite when K is 1."""
    if logits.shape[1] < 2:
        return np.full(len(logits), np.inf)
    best = np.sort(logits, axis=1)
    return np.asarray(best[:, -1] - best[:, -2])
