"""Where images come from: scikit-learn's digits, torchvision's sets, the user's folders.

Each reader returns `Raw`, before any split is drawn: whole arrays in memory, or of a
large folder its files.
Everything that decodes or resizes goes through `epdistill.images`.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from epdistill.errors import DataError
from epdistill.images import SUFFIXES, decode, fit, read_bytes, read_header, to_pixels
from epdistill.streaming import Files, Stream, too_large

TORCHVISION = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}
SPLIT_NAMES = ("train", "test", "val", "valid", "validation")


class Raw(NamedTuple):
    """A source's arrays.

    Attributes:
        classes: Names; label i means `classes[i]`.
        train: uint8 images (N, C, H, W), or files that hold them, and int64 labels (N,).
        test: The official test set, or None where the source has none.
        keys: One digest of the content per training image where `test` is None
            (from these the fixed test set is drawn), else empty.
    """

    classes: tuple[str, ...]
    train: tuple[Tensor | Files, Tensor]
    test: tuple[Tensor | Files, Tensor] | None
    keys: tuple[bytes, ...] = ()


def read_digits() -> Raw:
    """The 1,797 handwritten digits bundled with scikit-learn: 8x8, grey values 0..16.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits",
    UCI repository (1998); scikit-learn ships the 13 writers of its test part.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    keys = tuple(hashlib.sha256(image.tobytes()).digest() for image in pixels)
    images = torch.from_numpy(pixels).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    return Raw(tuple(str(digit) for digit in range(10)), (images, labels), None, keys)


def read_torchvision(name: str, root: Path, download: bool) -> Raw:
    """Read one of torchvision's data sets, both official parts, at once.

    torchvision *unpickles* the official CIFAR batch files, after checking their
    MD5 against the published values; no other file is unpickled. Its files of
    MNIST and Fashion-MNIST are not checked after unpacking, so their shapes and
    labels are checked here.

    Raises:
        DataError: Files are missing or damaged, or the download failed.
    """
    from torchvision import datasets

    kind = getattr(datasets, TORCHVISION[name])
    files = _official_files(name, kind, root)
    missing = [file for file in files if not file.is_file()]
    if missing and not download:
        raise DataError(
            f"{name} is not in {root}: {missing[0]} is missing; type `--data-root DIR` to name "
            "the folder that holds it, or `--download` to fetch or unpack it there"
        )
    parts: list[dict[str, Any]] = [{"train": True}, {"train": False}]
    if name == "svhn":
        parts = [{"split": "train"}, {"split": "test"}]
    try:
        # Standard output belongs to the command's own result (`--json`).
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            # numpy >= 2.4 warns about how the official CIFAR files were pickled in 2009.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            train, test = (kind(root, download=download, **part) for part in parts)
        classes = _official_classes(name, train)
        return Raw(classes, _official_arrays(train, classes), _official_arrays(test, classes))
    # A damaged file raises almost anything: asserts, IndexError, zlib's and scipy's own errors.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if any(not file.is_file() for file in files):
            raise DataError(
                f"{name} could not be downloaded to {root} ({reason}); check the network, or "
                "put the official files there and leave `--download` away"
            ) from error
        raise DataError(
            f"{name} in {files[0].parent} is damaged ({reason}); expected the official files: "
            "delete them and type `--download`"
        ) from error


def _official_files(name: str, kind: Any, root: Path) -> list[Path]:
    """The files that torchvision's class `kind` reads."""
    if name == "svhn":
        return [root / kind.split_list[part][1] for part in ("train", "test")]
    if name.startswith("cifar"):
        listed = [entry[0] for entry in [*kind.train_list, *kind.test_list]]
        return [root / kind.base_folder / file for file in [*listed, kind.meta["filename"]]]
    return [root / kind.__name__ / "raw" / Path(archive).stem for archive, _ in kind.resources]


def _official_classes(name: str, part: Any) -> tuple[str, ...]:
    if name in ("mnist", "svhn"):
        return tuple(str(digit) for digit in range(10))
    return tuple(str(label) for label in part.classes)


def _official_arrays(part: Any, classes: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) and labels (N,) of a torchvision data set; ValueError if they clash."""
    images = torch.as_tensor(part.data)
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3:  # CIFAR comes as (N, H, W, C)
        images = images.permute(0, 3, 1, 2)
    labels = torch.as_tensor(part.targets if hasattr(part, "targets") else part.labels)
    if not 0 < len(images) == len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"labels {labels.min()}..{labels.max()} for {len(classes)} classes")
    return images.contiguous(), labels.to(torch.int64)


def read_folder(
    path: Path, image_size: int | None, stream: Stream = False, workers: int = 2
) -> Raw:
    """Read `PATH/<class>/*.png`, or `PATH/train/<class>` and `PATH/test/<class>`.

    Every image is decoded once (see `epdistill.images.decode`) and made grey if
    all images are grey, else RGB. Class folders are searched deeply; names that
    begin with a dot and files of other types are passed over.

    Args:
        path: The folder.
        image_size: Side in pixels to which the centre square is resized; None
            where all images are squares of one size.
        stream: Leave the images on disk; `auto` decides by their size in memory.
        workers: Processes that then decode ahead.

    Raises:
        DataError: No folder, fewer than two classes, an empty class, a broken
            image, or mixed sizes without `image_size`.
    """
    if not path.is_dir():
        state = "is a file" if path.exists() else "does not exist"
        raise DataError(f"{path} {state}; expected a folder with one folder of images per class")
    split_folders = [path / name for name in SPLIT_NAMES if _holds_classes(path / name)]
    if path / "train" in split_folders and path / "test" in split_folders:
        classes, train = _list_classes(path / "train")
        test_classes, test = _list_classes(path / "test")
        if classes != test_classes:
            odd = ", ".join(sorted(set(classes) ^ set(test_classes)))
            raise DataError(
                f"{path / 'train'} and {path / 'test'} differ in their classes ({odd}); "
                "expected the same class folders in both"
            )
    elif split_folders:
        # Read as classes, these would train a classifier of "train" against "val".
        raise DataError(
            f"{path} has {split_folders[0].name}/ with folders inside, but not both train/ and "
            "test/; expected PATH/<class>/ or both PATH/train/<class>/ and PATH/test/<class>/"
        )
    else:
        classes, train = _list_classes(path)
        test = []
    headers = [read_header(file) for file, _ in [*train, *test]]
    channels = 1 if all(grey for grey, _ in headers) else 3
    size = image_size or _common_size(path, [shape for _, shape in headers])
    train_labels = torch.tensor([label for _, label in train])
    test_labels = torch.tensor([label for _, label in test])
    train_images: Tensor | Files
    test_images: Tensor | Files
    pixels = (len(train) + len(test)) * channels * size * size
    if stream is True or (stream == "auto" and too_large(pixels)):
        train_images, test_images = (
            Files(tuple(file for file, _ in part), channels, size, workers)
            for part in (train, test)
        )
        keys = () if test else tuple(hashlib.sha256(read_bytes(file)).digest() for file, _ in train)
    else:
        train_images, keys = _decode_all([file for file, _ in train], channels, size)
        test_images, _ = _decode_all([file for file, _ in test], channels, size)
    if not test:
        return Raw(classes, (train_images, train_labels), None, keys)
    return Raw(classes, (train_images, train_labels), (test_images, test_labels))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _holds_classes(folder: Path) -> bool:
    """Whether a folder called `train` holds class folders (it may be a class: the vehicle)."""
    if not folder.is_dir():
        return False
    entries = list(folder.iterdir())
    return any(entry.is_dir() for entry in entries) and not any(map(_is_image, entries))


def _list_classes(folder: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """Class names in order, and (file, label) of every image, in order."""
    classes = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."
    )
    if len(classes) < 2:
        raise DataError(
            f"{folder} has {len(classes)} class folder(s); expected at least two, each with images"
        )
    listed = []
    for label, name in enumerate(classes):
        files = sorted(filter(_is_image, (folder / name).rglob("*")))
        if not files:
            raise DataError(
                f"class folder {folder / name} has no images; expected at least one file ending "
                f"in {' '.join(SUFFIXES)}: add images or remove the folder"
            )
        listed += [(file, label) for file in files]
    return tuple(classes), listed


def _common_size(path: Path, sizes: list[tuple[int, int]]) -> int:
    """The side that all images share."""
    seen = Counter(sizes)
    (width, height), _ = seen.most_common(1)[0]
    if len(seen) == 1 and width == height:
        return width
    listed = ", ".join(f"{w}x{h} ({count})" for (w, h), count in seen.most_common(5))
    more = f" and {len(seen) - 5} more" if len(seen) > 5 else ""
    raise DataError(
        f"images in {path} have sizes {listed}{more}; expected squares of one size: pass "
        "`--image-size N` to resize them"
    )


def _decode_all(files: list[Path], channels: int, size: int) -> tuple[Tensor, tuple[bytes, ...]]:
    """uint8 images (N, C, size, size) and the SHA-256 of each file."""
    images = torch.empty((len(files), channels, size, size), dtype=torch.uint8)
    keys = []
    for index, file in enumerate(files):
        content = read_bytes(file)
        images[index] = torch.from_numpy(decode(content, str(file), channels=channels, size=size))
        keys.append(hashlib.sha256(content).digest())
    return images, tuple(keys)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize uint8 (N, C, H, W), C 1 or 3, to (N, C, size, size) with `fit`."""
    if images.shape[-2:] == (size, size):
        return images
    resized = images.new_empty((*images.shape[:2], size, size))
    for index, image in enumerate(images):
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        resized[index] = torch.from_numpy(to_pixels(fit(Image.fromarray(pixels.numpy()), size)))
    return resized
