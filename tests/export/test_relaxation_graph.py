"""A teacher's file holds its relaxation: the same sweeps, for every kind of layer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from epdistill.errors import ExportError
from epdistill.export.graph import parse_checked
from epdistill.export.manifest import manifest_path, read_manifest
from epdistill.export.onnx_export import ExportResult, export_teacher
from epdistill.export.relaxation_graph import relaxation_graph
from epdistill.export.runtime import OnnxClassifier
from epdistill.sealed import read_sealed
from epdistill.teachers.architecture import Architecture, LayerSpec, Pool
from epdistill.teachers.model import EPCNN
from epdistill.teachers.schedule import Schedule

CLASSES = ("a", "b", "c", "d")


def teacher(
    pools: tuple[Pool, ...] = ("max", "max", "none"),
    *,
    size: int = 12,
    schedule: Schedule | None = None,
    stride: int = 1,
    readout: str = "cross-entropy",
    activation: str = "half",
    scale: float = 2.0,
) -> EPCNN:
    layers = [LayerSpec(5 + n, pool=pool) for n, pool in enumerate(pools)]
    layers[0] = LayerSpec(5, stride=stride, pool=pools[0])
    if readout == "mse":
        side = size
        for layer in layers:
            side = layer.out_size(side)
        layers.append(LayerSpec(len(CLASSES), kernel=side, padding=0, pool="none"))
    architecture = Architecture(
        3, size, tuple(layers), len(CLASSES), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4),
        activation=activation, readout=readout,  # type: ignore[arg-type]
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return EPCNN(architecture, schedule, init_scale=scale).eval()


def images(n: int, size: int = 12) -> torch.Tensor:
    return torch.rand((n, 3, size, size), generator=torch.Generator().manual_seed(1))


def opened(model: EPCNN, **how: bool) -> OnnxClassifier:
    data = relaxation_graph(model, **how).SerializeToString()
    return OnnxClassifier(data, source="teacher.onnx", threads=1, loops=True)


RED_BLACK = Schedule(omega=1.5, tolerance=0.0, sweeps=3)
SYNCHRONOUS = Schedule("synchronous", 1.0, 0.0, 3)


@pytest.mark.parametrize("schedule", [RED_BLACK, RED_BLACK.with_(omega=1.0), SYNCHRONOUS])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"size": 13},  # maps of odd sides lose their last row in the pool
        {"pools": ("average", "average", "average"), "size": 13, "scale": 4.0},
        {"pools": ("max",)},
        {"stride": 2, "size": 17},
        {"readout": "mse", "activation": "unit"},
    ],
)
def test_sweep_for_sweep_the_torch_relaxation(schedule: Schedule, shape: dict[str, object]) -> None:
    model = teacher(schedule=schedule, **shape)  # type: ignore[arg-type]
    batch = images(5, model.image_size)
    found = opened(model)(batch)
    with torch.no_grad():
        torch.testing.assert_close(found, model(batch), rtol=1e-5, atol=1e-6)
        longer = model.with_schedule(schedule.with_(sweeps=schedule.sweeps + 1))(batch)
    if len(model.shapes) > 1:  # not settled yet: the number of sweeps shows
        assert (found - longer).abs().max() > 1e-4


def test_bytes_are_divided_by_255() -> None:
    model = teacher(schedule=RED_BLACK)
    batch = (images(4) * 255).round() / 255
    classifier = opened(model, pixels=True)
    assert classifier.signature.pixels and classifier.input_shape == (3, 12, 12)
    torch.testing.assert_close(classifier(batch), opened(model)(batch), rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    out = tmp_path_factory.mktemp("teacher") / "model.onnx"
    return export_teacher(
        teacher(), out, sweeps=60, classes=CLASSES, images=images(9), metadata={"data": "none"}
    )


def test_the_file_opens_only_beside_its_manifest(exported: ExportResult, tmp_path: Path) -> None:
    classifier = OnnxClassifier.open_checked(exported.path, threads=1)
    assert classifier.metadata["epdistill.kind"] == "teacher"
    assert read_manifest(exported.manifest).kind == "teacher"
    batch = images(3)
    with torch.no_grad():
        settled = teacher()(batch)
    # Sixty sweeps are enough for this net: the answer is that of the settled states.
    torch.testing.assert_close(classifier(batch), settled, rtol=0, atol=2e-3)
    with pytest.raises(ExportError, match="control-flow operator Loop"):
        OnnxClassifier.open(exported.path)
    alone = tmp_path / "model.onnx"
    alone.write_bytes(exported.path.read_bytes())
    with pytest.raises(ExportError, match="control-flow operator Loop"):
        OnnxClassifier.open_checked(alone)
    forged = read_sealed(exported.manifest) | {"kind": "student"}
    manifest_path(alone).write_text(json.dumps(forged))
    with pytest.raises(ExportError, match="control-flow operator Loop"):
        OnnxClassifier.open_checked(alone)


def test_other_loops_are_refused_even_for_a_teacher(exported: ExportResult) -> None:
    data = exported.path.read_bytes()
    parse_checked(data, "m", loops=True)
    endless, unfixed, nested, other = (onnx.load_from_string(data) for _ in range(4))
    for tensor in endless.graph.initializer:
        if tensor.name == "sweeps":
            tensor.CopyFrom(numpy_helper.from_array(np.array(10**9), "sweeps"))
    (loop,) = (node for node in unfixed.graph.node if node.op_type == "Loop")
    loop.input[0] = "batch"
    (loop,) = (node for node in nested.graph.node if node.op_type == "Loop")
    loop.attribute[0].g.node.append(helper.make_node("Loop", ["sweeps", ""], []))
    other.graph.node.append(helper.make_node("If", ["x"], ["y"]))
    for proto, message in (
        (endless, "fixed length"), (unfixed, "fixed length"), (nested, "nested"), (other, "If"),
    ):  # fmt: skip
        with pytest.raises(ExportError, match=message):
            parse_checked(proto.SerializeToString(), "m", loops=True)


@pytest.mark.parametrize("sweeps", [0, 10**6])
def test_numbers_of_sweeps_that_make_no_sense(tmp_path: Path, sweeps: int) -> None:
    with pytest.raises(ExportError, match="expected 1 to"):
        export_teacher(
            teacher(), tmp_path / "m.onnx", sweeps=sweeps, classes=CLASSES, images=images(2),
            metadata={},
        )  # fmt: skip
