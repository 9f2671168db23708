"""Loading, splitting, batching: bundled digits, made-up folders, made-up official files."""

import hashlib
import json
import pickle
import struct
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from epdistill.data import (
    NAMES,
    DataSet,
    Split,
    batches,
    channels_inside,
    describe,
    fingerprint,
    load,
    to_float,
)
from epdistill.errors import DataError, RecipeError


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load("digits")


def pixels(split: Split) -> Counter[bytes]:
    """The images as a multiset."""
    return Counter(image.numpy().tobytes() for image in split.images)


def refused(name: str, **arguments) -> str:
    """The message of the DataError, which must be one line."""
    with pytest.raises(DataError) as raised:
        load(name, **arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# digits and splits


def test_digits_are_the_bundled_images_split_by_class(digits):
    from sklearn.datasets import load_digits

    assert (digits.channels, digits.image_size) == (1, 8)
    assert digits.classes == tuple("0123456789")
    sizes = [len(part) for part in (digits.train, digits.validation, digits.test)]
    assert sizes == [1295, 143, 359]
    per_class = torch.bincount(torch.from_numpy(load_digits().target))
    in_test = torch.bincount(digits.test.labels)
    in_validation = torch.bincount(digits.validation.labels)
    assert (in_test - per_class * 0.2).abs().max() <= 0.5
    assert (in_validation - (per_class - in_test) * 0.1).abs().max() <= 0.5

    together = pixels(digits.train) + pixels(digits.validation) + pixels(digits.test)
    bundled = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert together == Counter(image.tobytes() for image in bundled)
    assert digits.train.images.max() == 255


def test_labels_stay_with_their_images(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    bundled = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    label_of = dict(zip((i.tobytes() for i in bundled), bunch.target.tolist(), strict=True))
    for part in (digits.train, digits.validation, digits.test):
        expected = [label_of[image.numpy().tobytes()] for image in part.images]
        assert part.labels.tolist() == expected


def test_the_test_set_of_digits_never_changes(digits):
    # A changed value here makes every figure reported on digits incomparable.
    assert fingerprint(digits.test) == (
        "a2671b49a64f69f5a989cb589ea632fbef63dd7e93ff080f818454141fc0dfe4"
    )


def test_loading_again_gives_the_same_and_leaves_the_global_state(digits):
    torch.manual_seed(77)
    before = torch.get_rng_state()
    again = load("digits")
    assert torch.equal(torch.get_rng_state(), before)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(again, part).images, getattr(digits, part).images)
        assert torch.equal(getattr(again, part).labels, getattr(digits, part).labels)


def test_the_seed_moves_the_validation_split_only(digits):
    other = load("digits", seed=1)
    assert not torch.equal(other.validation.images, digits.validation.images)
    assert fingerprint(other.test) == fingerprint(digits.test)
    assert pixels(other.train) + pixels(other.validation) == (
        pixels(digits.train) + pixels(digits.validation)
    )


def test_limit_keeps_a_stratified_prefix(digits):
    small, smaller = load("digits", limit=100), load("digits", limit=10)
    assert len(small.train) == 100
    assert torch.bincount(small.train.labels).tolist() == [10] * 10
    assert torch.bincount(smaller.train.labels).tolist() == [1] * 10
    assert pixels(smaller.train) <= pixels(small.train) <= pixels(digits.train)
    assert fingerprint(small.validation) == fingerprint(digits.validation)
    assert len(load("digits", limit=10_000).train) == len(digits.train)
    assert "limit is 9; expected at least the number of classes, 10" in refused("digits", limit=9)


def test_mean_and_std_are_those_of_the_train_split(digits):
    values = digits.train.images.double() / 255
    assert digits.mean == pytest.approx((values.mean().item(),), abs=1e-12)
    assert digits.std == pytest.approx((values.std(correction=0).item(),), abs=1e-12)


def test_a_constant_channel_has_a_positive_std():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    images[:, 1] = 255
    split = Split(images, torch.tensor([0, 1, 0, 1]))
    flat = DataSet("flat", ("a", "b"), split, split, split)
    assert flat.mean == (0.0, 1.0, 0.0)
    assert flat.std == (1 / 255,) * 3


def test_image_size_resizes_any_source():
    larger = load("digits", image_size=16)
    assert larger.train.images.shape == (1295, 1, 16, 16)
    assert larger.test.images.dtype == torch.uint8
    assert torch.equal(larger.test.labels, load("digits").test.labels)
    small = load("digits").test.images[0, 0].numpy()
    expected = Image.fromarray(small).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(larger.test.images[0, 0].numpy(), np.asarray(expected))


@pytest.mark.parametrize("size", [7, 225, 0, -8])
def test_image_sizes_outside_8_to_224_are_refused(size):
    assert f"is {size}; expected 8 to 224 pixels" in refused("digits", image_size=size)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_validation_fractions_outside_0_to_1_are_refused(fraction):
    assert "expected more than 0" in refused("digits", validation_fraction=fraction)


def test_unknown_names_get_a_suggestion():
    message = refused("cifer10")
    assert "'cifer10' (did you mean cifar10?)" in message
    assert all(name in message for name in NAMES)
    assert "did you mean" not in refused("zzzzzz")
    assert "folder:PATH" in refused("folder:")


def test_a_folder_given_without_its_prefix_gets_a_suggestion(tmp_path):
    assert f"did you mean folder:{tmp_path}?" in refused(str(tmp_path))


# batches and conversion


def test_batches_in_order_cover_the_split_once(digits):
    got = list(batches(digits.test, 100, generator=None))
    assert [len(labels) for _, labels in got] == [100, 100, 100, 59]
    assert torch.equal(torch.cat([images for images, _ in got]), digits.test.images)
    assert torch.equal(torch.cat([labels for _, labels in got]), digits.test.labels)


def test_shuffled_batches_cover_the_split_once_and_follow_the_generator(digits):
    torch.manual_seed(5)
    before = torch.get_rng_state()

    def epoch(seed: int, **options) -> Split:
        generator = torch.Generator().manual_seed(seed)
        images, labels = zip(*batches(digits.test, 64, generator=generator, **options), strict=True)
        return Split(torch.cat(images), torch.cat(labels))

    first = epoch(0)
    order = torch.randperm(359, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first.images, digits.test.images[order])
    assert torch.equal(first.labels, digits.test.labels[order])
    assert torch.equal(first.images, epoch(0).images)
    assert not torch.equal(first.images, epoch(1).images)
    assert torch.equal(epoch(0, drop_last=True).images, first.images[:320])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_order_is_drawn_at_the_call(digits):
    generator = torch.Generator().manual_seed(0)
    waiting = batches(digits.test, 64, generator=generator)
    state = generator.get_state()
    list(waiting)
    assert torch.equal(generator.get_state(), state)
    assert not torch.equal(state, torch.Generator().manual_seed(0).get_state())


def test_impossible_batch_sizes_are_refused(digits):
    with pytest.raises(RecipeError, match="batch size is 0; expected at least 1"):
        batches(digits.test, 0, generator=None)
    with pytest.raises(RecipeError, match="expected a batch size of at most 359"):
        batches(digits.test, 360, generator=None, drop_last=True)


def test_to_float_maps_the_range_onto_0_to_1():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    values = to_float(images)
    assert values.dtype == torch.float32
    assert torch.equal(values.flatten(), torch.arange(256, dtype=torch.float32) / 255)
    with pytest.raises(DataError, match=r"expected torch\.uint8"):
        to_float(values)


def test_channels_inside_changes_the_order_in_memory_alone():
    images = torch.rand(2, 3, 4, 5)
    found = channels_inside(images)
    assert torch.equal(found, images)
    assert found.stride() == (60, 1, 15, 3)
    elsewhere = images.to("meta")
    assert channels_inside(elsewhere) is elsewhere


def test_a_split_checks_what_it_is_given():
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"expected torch.int64 \(3,\)"):
        Split(images, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match=r"expected torch\.uint8"):
        Split(images.float(), torch.zeros(3, dtype=torch.int64))
    moved = Split(images, torch.zeros(3, dtype=torch.int64)).to("meta")
    assert moved.images.is_meta and moved.labels.is_meta


def test_a_description_is_json_and_loads_the_same_data_again():
    dataset = load("digits", image_size=12, validation_fraction=0.2, seed=3, limit=200)
    noted = json.loads(json.dumps(describe(dataset)))
    assert (noted["train_images"], noted["test_images"]) == (200, 359)
    keys = ("name", "root", "image_size", "validation_fraction", "seed", "limit")
    again = load(**{key: noted[key] for key in keys})
    assert describe(again) == noted
    assert fingerprint(again.train) == fingerprint(dataset.train)


def test_the_fingerprint_sees_pixels_labels_and_order(digits):
    images, labels = digits.test.images, digits.test.labels
    changed = images.clone()
    changed[5, 0, 3, 3] ^= 1
    relabelled = labels.clone()
    relabelled[0] = (relabelled[0] + 1) % 10
    variants = [
        Split(images, labels),
        Split(changed, labels),
        Split(images, relabelled),
        Split(images.flip(0), labels.flip(0)),
        Split(images.reshape(359, 1, 4, 16), labels),
    ]
    assert len({fingerprint(split) for split in variants}) == len(variants)


# own folders


def save(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def fill(root: Path, classes=("cat", "dog"), count=10, shape=(10, 10), seed=0) -> None:
    """Write `count` random PNGs per class; a class's images have their own brightness."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        for index in range(count):
            array = rng.integers(80 * label, 80 * label + 80, shape, dtype=np.uint8)
            save(root / name / f"{index:02d}.png", array)


def test_a_grey_folder(tmp_path):
    fill(tmp_path)
    dataset = load(f"folder:{tmp_path}")
    assert dataset.classes == ("cat", "dog")
    assert (dataset.channels, dataset.image_size) == (1, 10)
    for part, count in ((dataset.test, 2), (dataset.validation, 1), (dataset.train, 7)):
        assert torch.bincount(part.labels).tolist() == [count, count]
        assert torch.equal(part.images.flatten(1).max(1).values >= 80, part.labels == 1)
    files = sorted(tmp_path.rglob("*.png"))
    written = Counter(np.asarray(Image.open(file)).tobytes() for file in files)
    read = pixels(dataset.train) + pixels(dataset.validation) + pixels(dataset.test)
    assert read == written


def test_the_test_share_of_a_folder_depends_on_content_alone(tmp_path):
    fill(tmp_path / "a")
    for file in sorted((tmp_path / "a").rglob("*.png")):
        name = hashlib.sha256(file.name.encode()).hexdigest()[:8]
        copy = tmp_path / "b" / file.parent.name / f"{name}.png"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    first = load(f"folder:{tmp_path / 'a'}")
    assert fingerprint(load(f"folder:{tmp_path / 'a'}", seed=9).test) == fingerprint(first.test)
    assert pixels(load(f"folder:{tmp_path / 'b'}").test) == pixels(first.test)


def test_one_colour_image_makes_all_rgb(tmp_path):
    fill(tmp_path)
    red = np.zeros((10, 10, 3), dtype=np.uint8)
    red[..., 0] = 200
    save(tmp_path / "cat" / "red.png", red)
    dataset = load(f"folder:{tmp_path}")
    assert dataset.channels == 3
    images = torch.cat([dataset.train.images, dataset.validation.images, dataset.test.images])
    is_red = (images[:, 0] == 200).flatten(1).all(1) & (images[:, 1:] == 0).flatten(1).all(1)
    assert is_red.sum() == 1
    grey = images[~is_red]
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2])


def test_mixed_sizes_need_an_image_size(tmp_path):
    fill(tmp_path, count=4)
    save(tmp_path / "dog" / "wide.png", np.full((20, 40), 130, dtype=np.uint8))
    message = refused(f"folder:{tmp_path}")
    assert "10x10 (8), 40x20 (1)" in message
    assert "--image-size" in message
    assert load(f"folder:{tmp_path}", image_size=8).test.images.shape[1:] == (1, 8, 8)


def test_common_oblong_images_need_an_image_size(tmp_path):
    fill(tmp_path, shape=(10, 14))
    assert "sizes 14x10 (20); expected squares" in refused(f"folder:{tmp_path}")


def test_common_squares_must_be_within_8_to_224(tmp_path):
    fill(tmp_path, shape=(6, 6))
    assert "is 6; expected 8 to 224" in refused(f"folder:{tmp_path}")


def test_official_train_and_test_folders_are_kept_apart(tmp_path):
    fill(tmp_path / "train", count=5)
    fill(tmp_path / "test", count=3, seed=1)
    dataset = load(f"folder:{tmp_path}")
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [8, 2, 6]
    files = sorted((tmp_path / "test").rglob("*.png"))
    assert pixels(dataset.test) == Counter(np.asarray(Image.open(f)).tobytes() for f in files)


def test_train_and_test_must_have_the_same_classes(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test", classes=("cat", "cow", "dog"))
    assert "differ in their classes (cow)" in refused(f"folder:{tmp_path}")


def test_train_beside_val_is_not_taken_for_two_classes(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "val")
    assert "has train/ with folders inside" in refused(f"folder:{tmp_path}")


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path, classes=("plane", "test", "train"))
    assert load(f"folder:{tmp_path}").classes == ("plane", "test", "train")


def test_hidden_and_other_files_are_passed_over(tmp_path):
    fill(tmp_path)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "cat" / "._00.png").write_bytes(b"resource fork")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "README.md").write_text("not a class")
    assert load(f"folder:{tmp_path}").classes == ("cat", "dog")


def test_bad_folders_are_named(tmp_path):
    missing = tmp_path / "nowhere"
    assert f"{missing} does not exist" in refused(f"folder:{missing}")
    file = tmp_path / "file"
    file.write_text("")
    assert f"{file} is a file; expected a folder" in refused(f"folder:{file}")
    assert "cannot be read" in refused("folder:~no-such-user-here/pets")


def test_fewer_than_two_classes(tmp_path):
    assert "has 0 class folder(s); expected at least two" in refused(f"folder:{tmp_path}")
    fill(tmp_path, classes=("cat",))
    assert "has 1 class folder(s)" in refused(f"folder:{tmp_path}")


def test_an_empty_class(tmp_path):
    fill(tmp_path)
    (tmp_path / "emu").mkdir()
    assert f"class folder {tmp_path / 'emu'} has no images" in refused(f"folder:{tmp_path}")


@pytest.mark.parametrize("damage", ["not an image", "cut short"])
def test_a_broken_image(tmp_path, damage):
    fill(tmp_path, shape=(32, 32))
    broken = tmp_path / "dog" / "03.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"hello" if damage == "not an image" else whole[: len(whole) // 2])
    assert f"{broken} is not a readable image" in refused(f"folder:{tmp_path}")


def test_too_few_images_of_a_class(tmp_path):
    fill(tmp_path / "plain", count=5)
    for index in range(3):
        (tmp_path / "plain" / "dog" / f"{index:02d}.png").unlink()
    message = refused(f"folder:{tmp_path / 'plain'}")
    assert "class 'dog'" in message and "has 2 training image(s); expected at least 3" in message
    fill(tmp_path / "split" / "train", count=1)
    fill(tmp_path / "split" / "test", count=1)
    assert "expected at least 2" in refused(f"folder:{tmp_path / 'split'}")


def test_three_images_a_class_are_enough(tmp_path):
    fill(tmp_path, count=3)
    dataset = load(f"folder:{tmp_path}")
    for part in (dataset.train, dataset.validation, dataset.test):
        assert part.labels.sort().values.tolist() == [0, 1]


# torchvision's sets, from made-up files in the official formats

LABELS = np.tile(np.arange(10), 5)  # five of each class


def made_up(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    """LeCun's IDX format: magic (type 8 is unsigned byte), big-endian sizes, bytes."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(root: Path, folder: str = "MNIST") -> np.ndarray:
    """50 training and 10 test images; returns the test images."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    test = made_up(10, 28, 28)
    (raw / "train-images-idx3-ubyte").write_bytes(idx(made_up(50, 28, 28)))
    (raw / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(test))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(10)))
    return test


@pytest.mark.parametrize(
    ("name", "folder", "first"),
    [("mnist", "MNIST", "0"), ("fashion-mnist", "FashionMNIST", "T-shirt/top")],
)
def test_mnist_files(tmp_path, name, folder, first):
    test = write_mnist(tmp_path, folder)
    dataset = load(name, root=tmp_path)
    assert (dataset.channels, dataset.image_size, dataset.classes[0]) == (1, 28, first)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [40, 10, 10]
    assert torch.equal(dataset.test.images[:, 0], torch.from_numpy(test))
    assert dataset.test.labels.tolist() == list(range(10))
    assert describe(dataset)["root"] == str(tmp_path)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def write_cifar10(root: Path, monkeypatch) -> np.ndarray:
    """50 training and 10 test images with their own checksums; returns the test images."""
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    test = made_up(10, 3, 32, 32)
    train = made_up(50, 3, 32, 32)
    contents = {
        "data_batch_1": {"data": train.reshape(50, -1), "labels": LABELS.tolist()},
        "test_batch": {"data": test.reshape(10, -1), "labels": list(range(10))},
        "batches.meta": {"label_names": [f"class {label}" for label in range(10)]},
    }
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    listed = {name: [name, md5(folder / name)] for name in contents}
    monkeypatch.setattr(CIFAR10, "train_list", [listed["data_batch_1"]])
    monkeypatch.setattr(CIFAR10, "test_list", [listed["test_batch"]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": listed["batches.meta"][1]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return test


def test_cifar_files(tmp_path, monkeypatch):
    test = write_cifar10(tmp_path, monkeypatch)
    dataset = load("cifar10", root=tmp_path)
    assert (dataset.channels, dataset.image_size, dataset.classes[3]) == (3, 32, "class 3")
    assert torch.equal(dataset.test.images, torch.from_numpy(test))
    assert dataset.test.labels.tolist() == list(range(10))


def test_a_cifar_file_with_another_checksum_is_not_unpickled(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    trace = tmp_path / "unpickled"

    class Trap:
        def __reduce__(self):
            return Path.touch, (trace,)

    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Trap()))
    assert "is damaged" in refused("cifar10", root=tmp_path)
    assert not trace.exists()


def test_svhn_files(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    listed = {}
    test = made_up(10, 3, 32, 32)
    labels = {"train": np.where(LABELS == 0, 10, LABELS), "test": np.arange(1, 11)}
    for part, images in (("train", made_up(50, 3, 32, 32)), ("test", test)):
        file = tmp_path / f"{part}_32x32.mat"
        savemat(file, {"X": images.transpose(2, 3, 1, 0), "y": labels[part][:, None]})
        listed[part] = ["", file.name, md5(file)]
    monkeypatch.setattr(SVHN, "split_list", listed)
    dataset = load("svhn", root=tmp_path)
    assert dataset.classes == tuple("0123456789")
    assert torch.equal(dataset.test.images, torch.from_numpy(test))
    assert dataset.test.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]

    (tmp_path / "test_32x32.mat").write_bytes(b"")
    assert "svhn in" in refused("svhn", root=tmp_path)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "digits"])
def test_missing_files_say_where_and_what_to_type(tmp_path, name):
    message = refused(name, root=tmp_path)
    assert f"{name} is not in {tmp_path}" in message
    assert "`--data-root DIR`" in message and "`--download`" in message


def test_the_root_is_data_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "mnist is not in data: data/MNIST/raw/train-images" in refused("mnist")
    write_mnist(tmp_path / "data")
    assert describe(load("mnist"))["root"] is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("train-images-idx3-ubyte", b""),
        ("train-images-idx3-ubyte", b"<html>404</html>"),
        ("t10k-images-idx3-ubyte", idx(made_up(10, 28, 28))[:-100]),
        ("train-labels-idx1-ubyte", idx(LABELS[:-1])),
        ("t10k-labels-idx1-ubyte", idx(np.full(10, 77))),
    ],
)
def test_damaged_files(tmp_path, file, content):
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / file).write_bytes(content)
    message = refused("mnist", root=tmp_path)
    assert f"mnist in {tmp_path / 'MNIST' / 'raw'} is damaged" in message
    assert "delete them and type `--download`" in message


def test_a_failed_download(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    def fail(self) -> None:
        raise URLError("no\nroute")

    monkeypatch.setattr(MNIST, "download", fail)
    message = refused("mnist", root=tmp_path, download=True)
    assert "could not be downloaded" in message and "no route" in message


def test_a_download_writes_nothing_on_standard_output(tmp_path, monkeypatch, capsys):
    from torchvision.datasets import MNIST

    def fetch(self) -> None:
        print("fetching")  # noqa: T201
        write_mnist(tmp_path)

    monkeypatch.setattr(MNIST, "download", fetch)
    assert len(load("mnist", root=tmp_path, download=True).test) == 10
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "fetching" in captured.err
