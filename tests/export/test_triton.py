"""Triton's model repository: the very file, and a configuration that Triton's protobuf reads."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import text_format
from torch import nn
from tritonclient.grpc import model_config_pb2

from epdistill.errors import ExportError
from epdistill.export.manifest import manifest_path
from epdistill.export.onnx_export import export_onnx
from epdistill.export.runtime import OnnxClassifier
from epdistill.export.serving.settings import Limits
from epdistill.export.triton import validate, write_models

CLASSES = ("a cat", "two\nlines", "Zürich")


def exported(out: Path, *, pixels: bool = False) -> Path:
    """A file of a small network on 3 x 6 x 4 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
        images = torch.randint(0, 256, (8, 3, 6, 4)) / 255
    export_onnx(
        net, out, image_shape=(3, 6, 4), classes=CLASSES, images=images, metadata={}, pixels=pixels
    )
    return out


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("triton") / "net.onnx")


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("triton") / "net-v1.2_u8.onnx", pixels=True)


def parsed(path: Path) -> Any:
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def test_the_repository_holds_the_file_that_passed(floats: Path, tmp_path: Path) -> None:
    (model,) = write_models([floats], tmp_path / "repository")
    root = tmp_path / "repository" / "net"
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) == [
        "1/model.json", "1/model.onnx", "config.pbtxt", "labels.txt",
    ]  # fmt: skip
    assert (root / "1/model.onnx").read_bytes() == floats.read_bytes()
    assert model.onnx == root / "1/model.onnx" and model.config == root / "config.pbtxt"
    assert model.validated
    images = np.random.default_rng(0).random((2, 3, 6, 4), dtype=np.float32)
    copy = OnnxClassifier.open_checked(model.onnx, require_manifest=True)
    assert np.array_equal(copy.run(images), OnnxClassifier.open_checked(floats).run(images))
    # A class is a line.
    assert (root / "labels.txt").read_text() == "a cat\ntwo lines\nZürich\n"


def test_triton_s_protobuf_reads_what_was_meant(
    floats: Path, bytewise: Path, tmp_path: Path
) -> None:
    limits = Limits(batch=16, delay=0.0015, queue=99, deadline=2.5)
    models = write_models([floats, bytewise], tmp_path, limits=limits)
    enum = model_config_pb2
    for model, kind, layout, dims in (
        (models[0], enum.TYPE_FP32, enum.ModelInput.FORMAT_NCHW, [3, 6, 4]),
        (models[1], enum.TYPE_UINT8, enum.ModelInput.FORMAT_NHWC, [6, 4, 3]),
    ):
        config = parsed(model.config)
        assert config.name == model.name == model.config.parent.name
        assert config.backend == "onnxruntime" and config.platform == "onnxruntime_onnx"
        assert config.default_model_filename == model.onnx.name
        assert list(config.version_policy.specific.versions) == [1]
        assert config.max_batch_size == 16
        (given,), (answer,) = config.input, config.output
        assert (given.name, given.data_type, given.format) == ("images", kind, layout)
        assert list(given.dims) == dims
        assert (answer.name, answer.data_type) == ("logits", enum.TYPE_FP32)
        assert list(answer.dims) == [3] and answer.label_filename == "labels.txt"
        # The graph's own dimensions are those after the batch.
        graph = onnx.load(model.onnx).graph
        for declared, said in ((graph.input[0], given), (graph.output[0], answer)):
            sizes = [dim.dim_value for dim in declared.type.tensor_type.shape.dim]
            assert declared.name == said.name and sizes == [0, *said.dims]
        batching = config.dynamic_batching
        assert batching.max_queue_delay_microseconds == 1500
        queue = batching.default_queue_policy
        assert queue.timeout_action == enum.ModelQueuePolicy.REJECT
        assert queue.max_queue_size == 99
        assert queue.default_timeout_microseconds == 2_500_000
        assert not queue.allow_timeout_override
        (group,) = config.instance_group
        assert (group.kind, group.count) == (enum.ModelInstanceGroup.KIND_AUTO, 1)


def test_a_second_export_replaces_the_first(floats: Path, tmp_path: Path) -> None:
    (tmp_path / "net" / "1").mkdir(parents=True)
    (tmp_path / "net" / "config.pbtxt").write_text("old")
    (tmp_path / "net" / "1" / "model.onnx").write_text("old")
    (model,) = write_models([floats], tmp_path)
    assert parsed(model.config).name == "net"
    assert model.onnx.read_bytes() == floats.read_bytes()


def test_a_changed_file_is_refused(floats: Path, tmp_path: Path) -> None:
    changed = tmp_path / "net.onnx"
    data = bytearray(floats.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    shutil.copy(manifest_path(floats), manifest_path(changed))
    with pytest.raises(ExportError, match="damaged or was replaced"):
        write_models([changed], tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_a_name_that_triton_does_not_take_is_refused(floats: Path, tmp_path: Path) -> None:
    odd = tmp_path / 'my "net".onnx'
    shutil.copy(floats, odd)
    shutil.copy(manifest_path(floats), manifest_path(odd))
    with pytest.raises(ExportError, match="another file name with --out"):
        write_models([odd], tmp_path / "repository")


def test_a_place_that_cannot_be_written(floats: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="expected a writable folder"):
        write_models([floats], tmp_path / "file")


@pytest.mark.parametrize("text", ["nonsense: 1", "max_batch_size: many", "input [", "name: 'a"])
def test_what_is_no_configuration_is_refused(text: str) -> None:
    with pytest.raises(ExportError, match="is not one"):
        validate(text)


def test_without_tritonclient_nothing_is_claimed(
    floats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    (model,) = write_models([floats], tmp_path)
    assert not model.validated and model.config.is_file()
