"""int8 and float16 files: what they may lose is bounded, and what they did lose is told."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from epdistill.errors import ExportError, ParityError
from epdistill.export.half import halve
from epdistill.export.manifest import Manifest, manifest_path, read_manifest, seal_of
from epdistill.export.onnx_export import export_onnx
from epdistill.export.quantise import (
    CALIBRATION_IMAGES,
    SEARCHED,
    Setting,
    calibration_choice,
    quantise,
)
from epdistill.export.reduced import (
    Reduced,
    check_sound,
    finished,
    judge,
    logits_of,
    read_source,
    ship,
)
from epdistill.export.runtime import OnnxClassifier

SHAPE = (1, 8, 8)
CLASSES = tuple(str(digit) for digit in range(10))
ROBUSTNESS = {
    "measured_on": "tiny-001",
    "suite": "quick",
    "attacks": ["pgd", "square"],
    "threats": [
        {"threat": "linf", "eps": 0.1, "accuracy": 0.25, "ci95": [0.2, 0.3], "n": 100},
        {"threat": "clean", "eps": None, "accuracy": 0.9, "ci95": [0.8, 0.95], "n": 100},
    ],
}
PLAIN = Setting(per_channel=True, calibration="minmax", float_ends=False)


class Net(nn.Module):
    """Normalisation, BatchNorms to fold, a residual sum, a pool and a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.conv1((x - 0.3) / 0.35)))
        h = torch.relu(h + self.norm2(self.conv2(h)))
        return self.head(F.max_pool2d(h, 2).flatten(1))


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    return images, torch.tensor(data.target, dtype=torch.int64)


IMAGES, LABELS = digits()
CALIBRATION = IMAGES[:200].numpy()
HELD_OUT, TRUTH = IMAGES[1000:1500].numpy(), LABELS[1000:1500].numpy()


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net()
        optimiser = torch.optim.Adam(net.parameters(), 5e-3)
        for step in range(60):
            rows = slice(step % 10 * 100, step % 10 * 100 + 100)
            optimiser.zero_grad()
            F.cross_entropy(net(IMAGES[rows]), LABELS[rows]).backward()
            optimiser.step()
    return net.eval()


@pytest.fixture(scope="module", params=[False, True], ids=["floats", "bytes"])
def exported(
    request: pytest.FixtureRequest, trained: nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("reduced") / "model.onnx"
    export_onnx(
        trained,
        out,
        image_shape=SHAPE,
        classes=CLASSES,
        images=IMAGES[:16],
        metadata={"student_run": "tiny-001"},
        pixels=request.param,
        figures={"test_accuracy": 0.9, "test_images": 359, "robustness": ROBUSTNESS},
    )
    return out


def int8(path: Path, **changes: object) -> Reduced:
    data, manifest = read_source(path)
    arguments: dict[str, object] = {
        "calibration": CALIBRATION,
        "images": HELD_OUT,
        "labels": TRUTH,
        "max_drop": 1.0,
        "searched": (PLAIN,),
    }
    return quantise(data, manifest, **{**arguments, **changes})  # type: ignore[arg-type]


def test_int8_keeps_the_accuracy_in_a_smaller_integer_graph(exported: Path, tmp_path: Path) -> None:
    data, source = read_source(exported)
    found = ship(int8(exported), tmp_path / "int8.onnx", source, HELD_OUT, max_drop=1.0)
    manifest = read_manifest(manifest_path(found.path))
    assert manifest.precision == "int8" and manifest == found.manifest
    written = found.path.read_bytes()
    assert manifest.sha256 == hashlib.sha256(written).hexdigest() != source.sha256
    assert len(written) < len(data)

    proto = onnx.load_from_string(written)
    assert [entry.domain for entry in proto.opset_import] == [""]
    quantisers = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    zero_points = {t.name: numpy_helper.to_array(t).dtype for t in proto.graph.initializer}
    assert quantisers
    for node in quantisers:  # every activation is unsigned
        assert zero_points[node.input[2]] == np.uint8
    kinds = {str(dtype) for dtype in zero_points.values()}
    assert {"int8", "uint8"} <= kinds
    assert not any(node.op_type == "BatchNormalization" for node in proto.graph.node)

    lost = manifest.figures["quantisation"]
    classifier = OnnxClassifier.open_checked(found.path, threads=1)
    before = logits_of(OnnxClassifier.open_checked(exported, threads=1), HELD_OUT)
    after = logits_of(classifier, HELD_OUT)
    assert lost["float_accuracy"] == (before.argmax(1) == TRUTH).mean() > 0.9
    assert lost["accuracy"] == (after.argmax(1) == TRUTH).mean() >= lost["float_accuracy"] - 0.01
    assert lost["agreement"] == (after.argmax(1) == before.argmax(1)).mean() > 0.97
    assert lost["source_sha256"] == source.sha256
    assert not np.array_equal(before, after)
    said = json.loads(classifier.metadata["epdistill.quantisation"])
    assert said["source_sha256"] == source.sha256 and said["calibration"] == "minmax"
    assert "epdistill.parity" not in classifier.metadata
    assert classifier.metadata["student_run"] == "tiny-001"
    # What was measured on the float32 file is not claimed for this one.
    assert "robustness" not in manifest.figures
    card = found.path.with_suffix(".md").read_text()
    assert "| linf | 0.1 | 0.2500 |" in exported.with_suffix(".md").read_text()
    assert "linf" not in card and "test accuracy" not in card
    assert "int8" in card and f"{lost['accuracy']:.4f}" in card


def test_int8_twice_gives_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    source = read_source(exported)[1]
    one, two = (
        ship(int8(exported), tmp_path / name, source, HELD_OUT, max_drop=1.0).manifest.sha256
        for name in ("one.onnx", "two.onnx")
    )
    assert one == two


def test_the_search_takes_the_least_divergent_of_those_within_the_bound(exported: Path) -> None:
    found = int8(exported, searched=SEARCHED)
    assert len(found.trials) == len(SEARCHED) == 4
    best = min(found.trials, key=lambda trial: trial["divergence"])
    assert found.judged.divergence == best["divergence"]
    assert found.setting["per_channel"] == best["per_channel"]
    assert found.setting["calibration"] == best["calibration"]
    assert not found.setting["float_ends"]
    # They are different files, not one file four times.
    assert len({trial["divergence"] for trial in found.trials}) == 4


def test_where_nothing_keeps_the_accuracy_the_ends_stay_float_and_then_it_is_refused(
    exported: Path, tmp_path: Path
) -> None:
    found = int8(exported, max_drop=-101.0)  # a gain that nothing can reach
    assert [trial["float_ends"] for trial in found.trials] == [False, True]
    with_ends, without = (
        [node.op_type for node in item.proto.graph.node]
        for item in (int8(exported), int8(exported, searched=(replace(PLAIN, float_ends=True),)))
    )
    assert without.count("DequantizeLinear") < with_ends.count("DequantizeLinear")
    out = tmp_path / "int8.onnx"
    with pytest.raises(ParityError, match=r"top-1 falls by .* --max-drop"):
        ship(found, out, read_source(exported)[1], HELD_OUT, max_drop=-101.0)
    assert not list(tmp_path.iterdir())


def test_ranges_taken_from_the_wrong_images_are_found_out(exported: Path, tmp_path: Path) -> None:
    ruined = int8(exported, calibration=np.full((8, *SHAPE), 0.3, np.float32))
    assert ruined.judged.drop_points > 5
    with pytest.raises(ParityError, match=r"expected at most 0\.5"):
        ship(ruined, tmp_path / "m.onnx", read_source(exported)[1], HELD_OUT, max_drop=0.5)


def test_float16_is_half_as_large_and_nearly_the_same(exported: Path, tmp_path: Path) -> None:
    data, source = read_source(exported)
    reduced = halve(data, source, images=HELD_OUT, labels=TRUTH)
    found = ship(reduced, tmp_path / "half.onnx", source, HELD_OUT, max_drop=0.0)
    assert found.manifest.precision == "float16"
    assert found.manifest.size_bytes < 0.75 * source.size_bytes
    kinds = {t.data_type for t in onnx.load(found.path).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    before = logits_of(OnnxClassifier.open_checked(exported), HELD_OUT)
    after = logits_of(OnnxClassifier.open_checked(found.path), HELD_OUT)
    assert 0 < np.abs(before - after).max() < 0.02 * np.abs(before).max()


def test_judging_counts_labels_and_measures_probabilities() -> None:
    before = np.log(np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]], np.float32))
    after = np.log(np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.5, 0.5]], np.float32))
    found = judge(before, after, np.array([0, 1, 1, 0]))
    assert (found.float_accuracy, found.accuracy, found.agreement) == (0.75, 0.5, 0.75)
    assert found.drop_points == 25.0
    expected = (0.2 * np.log(0.2 / 0.8) + 0.8 * np.log(0.8 / 0.2)) / 4
    assert found.divergence == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ParityError, match="non-finite"):
        judge(before, after * np.float32("nan"), np.array([0, 1, 1, 0]))


def test_an_answer_that_depends_on_its_batch_is_refused(exported: Path) -> None:
    class Moody:
        input_shape = SHAPE

        def run(self, images: np.ndarray) -> np.ndarray:
            return images.reshape(len(images), -1)[:, :10] + 0.1 * len(images) * np.arange(10)

    with pytest.raises(ParityError, match="in a batch of 1"):
        check_sound(Moody(), HELD_OUT, seed=0)  # type: ignore[arg-type]
    check_sound(OnnxClassifier.open_checked(exported), HELD_OUT, seed=0)


def test_a_teacher_and_a_file_without_manifest_are_refused(exported: Path, tmp_path: Path) -> None:
    alone = tmp_path / "model.onnx"
    alone.write_bytes(exported.read_bytes())
    with pytest.raises(ExportError, match="manifest"):
        read_source(alone)
    beside = json.loads(manifest_path(exported).read_text()) | {"kind": "teacher"}
    manifest_path(alone).write_text(json.dumps(beside | {"seal": seal_of(beside)}))
    with pytest.raises(ExportError, match="distill a student"):
        read_source(alone)


def test_domains_that_nothing_uses_are_not_declared(exported: Path) -> None:
    data, manifest = read_source(exported)
    proto = onnx.load_from_string(data)
    proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    assert finished(proto, manifest.metadata) == data


def test_calibration_images_are_drawn_by_the_seed() -> None:
    chosen = calibration_choice(1000, 3)
    assert len(chosen) == CALIBRATION_IMAGES == len(set(chosen.tolist()))
    assert chosen.tolist() == sorted(chosen.tolist())
    assert np.array_equal(chosen, calibration_choice(1000, 3))
    assert not np.array_equal(chosen, calibration_choice(1000, 4))
    assert calibration_choice(5, 0).tolist() == [0, 1, 2, 3, 4]


def test_old_manifests_speak_of_float32_students(exported: Path, tmp_path: Path) -> None:
    content = json.loads(manifest_path(exported).read_text())
    for key in ("kind", "precision", "figures", "seal"):
        del content[key]
    path = tmp_path / "m.json"
    path.write_text(json.dumps(content))
    found = read_manifest(path)
    assert isinstance(found, Manifest)
    assert (found.kind, found.precision, found.figures) == ("student", "float32", {})
