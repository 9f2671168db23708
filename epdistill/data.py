"""Data sets as uint8, in memory or streamed: loading, splitting, batching, describing.

    dataset = load("digits")
    for images, labels in batches(dataset.train, 128, generator=generator):
        logits = model(to_float(images.to(device)))

A data set has three parts. `test` is the official test set (for sources without
one: a fixed fifth of the images). `validation` is a stratified share of the
official *training* set, drawn from a seed; every choice is made on it. `train`
is the rest.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epdistill import _sources
from epdistill.cutting import first_of, take_share
from epdistill.errors import DataError, RecipeError
from epdistill.streaming import Files, Images, Stream, chunks

__all__ = [
    "NAMES",
    "DataSet",
    "Images",
    "Split",
    "batches",
    "describe",
    "fingerprint",
    "load",
    "to_float",
]

NAMES = ("digits", *_sources.TORCHVISION)
FOLDER = "folder:"
DEFAULT_ROOT = Path("data")
MIN_SIZE, MAX_SIZE = 8, 224
TEST_FRACTION = 0.2
STD_FLOOR = 1 / 255  # one grey level: a constant channel must not divide by zero


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels.

    Attributes:
        images: uint8 (N, C, H, W), in memory or (`Files`) on disk.
        labels: int64 (N,).
    """

    images: Images
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(
                f"received images {self.images.dtype} of shape {tuple(self.images.shape)}; "
                "expected torch.uint8 (N, C, H, W)"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"received labels {self.labels.dtype} of shape {tuple(self.labels.shape)}; "
                f"expected torch.int64 ({len(self.images)},)"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @contextmanager
    def feed(self, rows: Iterable[Tensor]) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """Batch after batch while a `with` lasts.

        Args:
            rows: The images' numbers in each batch, (N,) int64.

        Yields:
            An iterator of those numbers and the images, uint8 (N, C, H, W).
        """
        if isinstance(self.images, Files):
            with self.images.feed(rows) as ahead:
                yield ahead
        else:
            yield ((pick, self.images[pick]) for pick in rows)

    def to(self, device: torch.device | str) -> Split:
        """The same split on a device."""
        return Split(self.images[:].to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class DataSet:
    """A named data set and how it was loaded.

    Attributes:
        name: As given to `load`.
        classes: Names; label i means `classes[i]`.
        train: What is learnt from.
        validation: What choices are made on.
        test: What is reported, touched once per figure.
        root: As given to `load`.
        seed: What the validation split was drawn from.
        validation_fraction: Its share of the training set.
        limit: At most so many training images, or None.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    root: str | None = None
    seed: int = 0
    validation_fraction: float = 0.1
    limit: int | None = None

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        return self.train.images.shape[-1]

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel of the train split, on the scale [0, 1]."""
        return tuple(mean for mean, _ in self._moments)

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel of the train split, on [0, 1]; at least 1/255."""
        return tuple(std for _, std in self._moments)

    @cached_property
    def _moments(self) -> tuple[tuple[float, float], ...]:
        # Integer sums over a histogram: exact, whatever the order of summation.
        histograms = [torch.zeros(256, dtype=torch.int64) for _ in range(self.channels)]
        for part in chunks(self.train.images):
            for histogram, channel in zip(histograms, part.cpu().unbind(1), strict=True):
                histogram += torch.bincount(channel.reshape(-1), minlength=256)
        moments = []
        for histogram in histograms:
            counts = histogram.tolist()
            total = sum(counts)
            first = sum(value * count for value, count in enumerate(counts))
            second = sum(value * value * count for value, count in enumerate(counts))
            variance = (total * second - first * first) / (total * total)
            moments.append((first / total / 255, max(math.sqrt(variance) / 255, STD_FLOOR)))
        return tuple(moments)


def load(
    name: str,
    *,
    root: Path | None = None,
    download: bool = False,
    image_size: int | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
    stream: Stream = "auto",
    workers: int = 2,
) -> DataSet:
    """Load a data set by name.

    Names: `digits` (scikit-learn's bundled 1,797 digits of 8x8 pixels; no file
    needed), `mnist`, `fashion-mnist`, `cifar10`, `cifar100`, `svhn` (torchvision's
    readers; of the official CIFAR files they unpickle the batches, after checking
    their MD5) and `folder:PATH` (own images, `PATH/<class>/*.png`; where both
    `PATH/train/<class>` and `PATH/test/<class>` exist, the latter is the test set
    and other folders beside them are not read).

    The test set is the official one. `digits` and plain folders have none: there
    it is the fifth of each class whose content has the smallest SHA-256, so it
    depends on nothing but the images (not on `seed`, file names or library
    versions). In `digits`, writers are shared between the splits. The validation
    split is a share of each class of the training set (rounded, at least one
    image), drawn by a generator of its own from `seed`; the global random state
    is neither read nor changed.

    Args:
        name: One of `NAMES`, or `folder:PATH`.
        root: Where torchvision's files lie; `./data` by default.
        download: Whether missing files may be fetched.
        image_size: Side in pixels, 8 to 224, to which the centre square of each
            image is resized (bilinear, antialiased); None keeps the size.
        validation_fraction: Above 0 and below 1.
        seed: Of the validation split.
        limit: Keep about the first `limit` training images, in the classes'
            proportions and at least one of each; for quick tries. Smaller limits
            keep a subset of what larger ones keep.
        stream: Of a folder: leave the images on disk and decode them when they are needed;
            `auto` does so where they would take more than a quarter of the memory. The
            images are the same.
        workers: Processes that then decode ahead of training.

    Raises:
        DataError: An unknown name, an argument out of range, or data that are
            missing, damaged or too few; one line each.
    """
    if image_size is not None:
        _check_size(name, image_size)
    if not 0 < validation_fraction < 1:
        raise DataError(
            f"validation_fraction is {validation_fraction}; expected more than 0 and less than 1"
        )
    if stream is True and not name.startswith(FOLDER):
        raise DataError(
            f"data.stream = true for {name}, which is read whole; expected it with {FOLDER}PATH "
            "alone: leave it away"
        )
    raw = _read(name, root or DEFAULT_ROOT, download, image_size, stream, workers)
    height, width = raw.train[0].shape[-2:]
    if image_size is None:
        _check_size(name, width)
        if height != width:
            raise DataError(f"{name} has images of {width}x{height}; expected squares")
    _check_counts(name, raw)
    if limit is not None and limit < len(raw.classes):
        raise DataError(
            f"limit is {limit}; expected at least the number of classes, {len(raw.classes)}"
        )

    images, labels = raw.train
    kept = torch.arange(len(labels))
    if raw.test is None:
        ranking = torch.tensor(sorted(range(len(labels)), key=lambda index: raw.keys[index]))
        chosen, kept = take_share(labels, ranking, TEST_FRACTION)
        test_images, test_labels = _take(images, chosen), labels[chosen]
    else:
        test_images, test_labels = raw.test
    shuffled = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))
    validation, train = (kept[i] for i in take_share(labels[kept], shuffled, validation_fraction))
    if limit is not None:
        train = train[first_of(labels[train], limit)]

    size = image_size or width
    return DataSet(
        name=name,
        classes=raw.classes,
        train=Split(_resized(_take(images, train), size), labels[train]),
        validation=Split(_resized(_take(images, validation), size), labels[validation]),
        test=Split(_resized(test_images, size), test_labels),
        root=None if root is None else str(root),
        seed=seed,
        validation_fraction=validation_fraction,
        limit=limit,
    )


def _take(images: Tensor | Files, chosen: Tensor) -> Tensor | Files:
    return images.subset(chosen) if isinstance(images, Files) else images[chosen]


def _resized(images: Tensor | Files, size: int) -> Tensor | Files:
    # Files are decoded at their final size.
    return images if isinstance(images, Files) else _sources.resize(images, size)


def _read(
    name: str, root: Path, download: bool, image_size: int | None, stream: Stream, workers: int
) -> _sources.Raw:
    if name == "digits":
        return _sources.read_digits()
    if name in _sources.TORCHVISION:
        return _sources.read_torchvision(name, root, download)
    if name.startswith(FOLDER) and name != FOLDER:
        try:
            # The shell leaves the ~ of `folder:~/pets` alone.
            path = Path(name.removeprefix(FOLDER)).expanduser()
            return _sources.read_folder(path, image_size, stream, workers)
        except (OSError, RuntimeError) as error:  # no permission, no such user, no memory
            reason = " ".join(str(error).split())
            raise DataError(
                f"{name} cannot be read ({reason}); expected {FOLDER}PATH with one readable "
                "folder of images per class"
            ) from error
    near = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.5)
    if name != FOLDER and Path(name).is_dir():
        near = [FOLDER + name]
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise DataError(
        f"unknown data set {name!r}{hint}; expected one of {', '.join(NAMES)} or {FOLDER}PATH"
    )


def _check_size(name: str, size: int) -> None:
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise DataError(
            f"image size of {name} is {size}; expected {MIN_SIZE} to {MAX_SIZE} pixels: "
            "pass another `--image-size`"
        )


def _check_counts(name: str, raw: _sources.Raw) -> None:
    """Every split needs an image of every class."""
    counts = torch.bincount(raw.train[1], minlength=len(raw.classes))
    fewest = int(counts.argmin())
    needed, splits = (
        (3, "train, validation, test") if raw.test is None else (2, "train, validation")
    )
    if counts[fewest] < needed:
        raise DataError(
            f"class {raw.classes[fewest]!r} of {name} has {counts[fewest]} training image(s); "
            f"expected at least {needed}, one for each split ({splits}): add images"
        )


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1], value v becoming v / 255; same shape and device."""
    if images.dtype != torch.uint8:
        raise DataError(f"received {images.dtype} images; expected torch.uint8 in 0..255")
    return images.to(torch.float32).div_(255)


def channels_inside(images: Tensor) -> Tensor:
    """The same images (N, C, H, W) with their channels innermost in memory, if on a processor.

    It convolves a batch faster so, 1.2 to 2 times per training step on x86. On other devices the
    images are left as they are.
    """
    if images.device.type != "cpu":
        return images
    return images.contiguous(memory_format=torch.channels_last)


def batches(
    split: Split, batch_size: int, *, generator: torch.Generator | None, drop_last: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through a split once.

    Args:
        split: On any device; the batches lie on the same one.
        batch_size: Images per batch.
        generator: A CPU generator that draws the order (at the call, all at once:
            its state before the call reproduces the epoch); None keeps the order.
        drop_last: Leave away a last batch that is not full.

    Returns:
        An iterator of uint8 images (B, C, H, W) and int64 labels (B,).

    Raises:
        RecipeError: `batch_size` is below 1, or `drop_last` would leave nothing.
    """
    count = len(split)
    if batch_size < 1:
        raise RecipeError(f"batch size is {batch_size}; expected at least 1")
    if drop_last and 0 < count < batch_size:
        raise RecipeError(
            f"batch size is {batch_size}, the split has {count} images and only full batches "
            f"are used; expected a batch size of at most {count}"
        )
    end = count - count % batch_size if drop_last else count
    starts = range(0, end, batch_size)
    if generator is None:
        return (
            (split.images[start : start + batch_size], split.labels[start : start + batch_size])
            for start in starts
        )
    order = torch.randperm(count, generator=generator)[:end].to(split.images.device)
    return (
        (split.images[chosen], split.labels[chosen])
        for chosen in (order[start : start + batch_size] for start in starts)
    )


def fingerprint(split: Split) -> str:
    """SHA-256 of a split's shape, pixels and labels, as 64 hex digits."""
    digest = hashlib.sha256(repr(tuple(split.images.shape)).encode())
    for part in chunks(split.images):
        digest.update(part.cpu().contiguous().numpy().tobytes())
    digest.update(split.labels.cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def describe(dataset: DataSet) -> dict[str, Any]:
    """What a run notes of its data: JSON values only.

    `load` with the noted name, root, image_size, validation_fraction, seed and
    limit gives the same data set again; `test_sha256` tells whether it did (for
    JPEG folders, other versions of the decoder may differ by a grey level).
    """
    return {
        "name": dataset.name,
        "root": dataset.root,
        "image_size": dataset.image_size,
        "channels": dataset.channels,
        "classes": list(dataset.classes),
        "train_images": len(dataset.train),
        "validation_images": len(dataset.validation),
        "test_images": len(dataset.test),
        "seed": dataset.seed,
        "validation_fraction": dataset.validation_fraction,
        "limit": dataset.limit,
        "test_sha256": fingerprint(dataset.test),
    }
