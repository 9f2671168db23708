"""Reading the published arrays: from a folder, from the tar, and what is refused."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from epdistill.errors import EvaluationError
from epdistill.robustness.corruptions import EXTRA, FAMILY, MAIN, cifar10c
from epdistill.robustness.corruptions.cifar10c import open_cifar10c

NAMES = (*MAIN, *EXTRA)
PER_SEVERITY = 6


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six test images instead of 10,000."""
    monkeypatch.setattr(cifar10c, "PER_SEVERITY", PER_SEVERITY)
    monkeypatch.setattr(cifar10c, "IMAGES", 5 * PER_SEVERITY)
    monkeypatch.setattr(cifar10c, "ARRAY_SHAPE", (5 * PER_SEVERITY, 32, 32, 3))


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shape = (5 * PER_SEVERITY, 32, 32, 3)
    made = {name: random.integers(0, 256, shape, dtype=np.uint8) for name in NAMES}
    return made | {"labels": np.tile(np.array([3, 8, 8, 0, 6, 9], dtype=np.uint8), 5)}


@pytest.fixture
def folder(tmp_path: Path, arrays: dict[str, np.ndarray], small: None) -> Path:
    home = tmp_path / "CIFAR-10-C"
    home.mkdir()
    for name, array in arrays.items():
        np.save(home / f"{name}.npy", array)
    return home


@pytest.fixture
def tar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = folder.parent / "CIFAR-10-C.tar"
    with tarfile.open(path, "w") as file:
        file.add(folder, "CIFAR-10-C")
    monkeypatch.setattr(cifar10c, "TAR_BYTES", path.stat().st_size)
    monkeypatch.setattr(cifar10c, "TAR_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_published_figures() -> None:
    assert cifar10c.TAR_MD5 == "56bf5dcef84df0e2308c6dcbcbbd8499"
    assert cifar10c.TAR_BYTES == 2_918_471_680
    assert cifar10c.ARRAY_SHAPE == (50_000, 32, 32, 3)


def test_the_two_families_have_different_names() -> None:
    assert cifar10c.OFFICIAL_FAMILY == "cifar10c" and FAMILY == "cifar10c-style"


@pytest.mark.parametrize("source", ["folder", "outer folder", "tar"])
def test_images_and_labels_are_those_of_the_severity(
    source: str, folder: Path, tar: Path, arrays: dict[str, np.ndarray]
) -> None:
    path = {"folder": folder, "outer folder": folder.parent, "tar": tar}[source]
    opened = open_cifar10c(path)
    assert opened.family == "cifar10c" and opened.names == NAMES
    chosen = torch.tensor([5, 0, 2])
    for name, severity in (("fog", 1), ("saturate", 5), ("gaussian_noise", 3)):
        images, labels = opened.load(name, severity, chosen)
        rows = (severity - 1) * PER_SEVERITY + chosen.numpy()
        assert images.dtype == torch.uint8 and images.shape == (3, 3, 32, 32)
        assert np.array_equal(images.movedim(1, 3), arrays[name][rows])
        assert labels.dtype == torch.int64 and labels.tolist() == [9, 3, 8]
    images[:] = 0  # a copy: what was opened stays
    assert np.array_equal(opened.load(name, 3, chosen)[0].movedim(1, 3), arrays[name][rows])


@pytest.mark.parametrize("source", ["folder", "tar"])
def test_what_was_read_is_described_with_hashes(source: str, folder: Path, tar: Path) -> None:
    opened = open_cifar10c(folder if source == "folder" else tar)
    assert opened.describe()["sha256"] == {}
    opened.load("snow", 2, torch.arange(PER_SEVERITY))
    assert opened.describe() == {
        "family": "cifar10c",
        "source": "https://zenodo.org/records/2535967",
        "tar_md5": cifar10c.TAR_MD5 if source == "tar" else None,
        "sha256": {f"{name}.npy": sha256(folder / f"{name}.npy") for name in ("labels", "snow")},
    }


def test_arrays_of_the_published_size(tmp_path: Path) -> None:
    """Sparse files of the true shape: opening reads the labels and no more."""
    for name, shape in (("fog", (50_000, 32, 32, 3)), ("labels", (50_000,))):
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", np.uint8, shape)[-1] = 7
    with pytest.raises(EvaluationError, match=r"labels\.npy differs between severities"):
        open_cifar10c(tmp_path, ("fog",))
    np.save(tmp_path / "labels.npy", np.full(50_000, 7, np.uint8))
    images, labels = open_cifar10c(tmp_path, ("fog",)).load("fog", 5, torch.tensor([9_999, 0]))
    assert images[0].unique().tolist() == [7] and images[1].unique().tolist() == [0]
    assert labels.tolist() == [7, 7]


def test_what_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(EvaluationError, match=r"nowhere does not exist; expected CIFAR-10-C.tar"):
        open_cifar10c(folder / "nowhere")
    with pytest.raises(EvaluationError, match="received corruption 'rain'"):
        open_cifar10c(folder, ("rain",))
    (folder / "frost.npy").unlink()
    (folder / "labels.npy").unlink()
    with pytest.raises(EvaluationError, match=r"lacks frost\.npy, labels\.npy"):
        open_cifar10c(folder)


def test_what_cannot_be_loaded_is_refused(folder: Path) -> None:
    opened = open_cifar10c(folder, ("fog", "frost"))
    some = torch.tensor([0])
    cases = [
        ("snow", 1, some, "received corruption 'snow'; expected one of fog, frost"),
        ("fog", 0, some, "received severity 0"),
        ("fog", 1, torch.tensor([0, PER_SEVERITY]), r"received examples 0\.\.6; expected"),
        ("fog", 1, torch.tensor([-1]), r"received examples -1\.\.-1; expected"),
    ]
    for name, severity, examples, message in cases:
        with pytest.raises(EvaluationError, match=message):
            opened.load(name, severity, examples)


def damaged(array: np.ndarray) -> dict[str, tuple[np.ndarray | bytes, str]]:
    return {
        "short": (array[:-1], r"holds an array \(29, 32, 32, 3\)"),
        "channels first": (array.transpose(0, 3, 1, 2).copy(), r"array \(30, 3, 32, 32\)"),
        "floats": (array.astype(np.float32), "of float32; expected"),
        "column-major": (np.asfortranarray(array), "column-major; expected"),
        "no npy": (b"<html>not found</html>", r"is not a readable \.npy file"),
        "empty": (b"", r"is not a readable \.npy file"),
        "pickled": (np.array([{"a": 1}]), "of object; expected"),
    }


@pytest.mark.parametrize("what", list(damaged(np.zeros((30, 32, 32, 3), np.uint8))))
def test_a_wrong_array_is_refused(what: str, folder: Path, arrays: dict[str, np.ndarray]) -> None:
    content, message = damaged(arrays["fog"])[what]
    if isinstance(content, bytes):
        (folder / "fog.npy").write_bytes(content)
    else:
        np.save(folder / "fog.npy", content)
    with pytest.raises(EvaluationError, match=rf"fog\.npy.*{message}.*unpack CIFAR-10-C\.tar"):
        open_cifar10c(folder)


def test_a_truncated_array_is_refused(folder: Path) -> None:
    whole = (folder / "fog.npy").read_bytes()
    (folder / "fog.npy").write_bytes(whole[:-1])
    with pytest.raises(EvaluationError, match=f"{len(whole) - 1} bytes; expected {len(whole)}"):
        open_cifar10c(folder)


def test_wrong_labels_are_refused(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    for place, value, message in ((4, 10, r"holds label 10; expected 0\.\.9"), (4, 1, "differs")):
        labels = arrays["labels"].copy()
        labels[place] = value
        np.save(folder / "labels.npy", labels)
        with pytest.raises(EvaluationError, match=message):
            open_cifar10c(folder)


def test_another_tar_is_refused(tar: Path) -> None:
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    with pytest.raises(EvaluationError, match=f"{len(whole) - 512} bytes; expected {len(whole)}"):
        open_cifar10c(tar)
    tar.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(EvaluationError, match=f"has MD5 .*; expected {cifar10c.TAR_MD5}"):
        open_cifar10c(tar)
