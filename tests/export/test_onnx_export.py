"""What is written is self-contained, tells nothing of the machine, and passed the gate."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from epdistill.errors import DataError, ExportError, ParityError
from epdistill.export.onnx_export import ExportResult, export_onnx
from epdistill.export.runtime import OnnxClassifier
from epdistill.export.tracing import BATCH, OPSET

SHAPE = (3, 12, 12)
CLASSES = ("cat", "dog", "Ärger", "/m/01x", "five")


class Net(nn.Module):
    """Normalisation, conv, BatchNorm with its own statistics, residual, readout."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.4))
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, len(CLASSES))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            self.norm.running_mean.copy_(torch.randn(8, generator=generator))
            self.norm.running_var.copy_(torch.rand(8, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv1(x - self.mean)))
        h = h + torch.relu(self.conv2(h))
        return self.head(self.drop(nn.functional.adaptive_avg_pool2d(h, 1).flatten(1)))


def images(n: int = 9) -> Tensor:
    return torch.rand((n, *SHAPE), generator=torch.Generator().manual_seed(2))


def export(out: Path, model: nn.Module | None = None, **changes: object) -> ExportResult:
    arguments: dict[str, object] = {
        "image_shape": SHAPE,
        "classes": CLASSES,
        "images": images(),
        "metadata": {"teacher": "teach-001", "data": "generated"},
    }
    return export_onnx(model or Net(), out, **{**arguments, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    return export(tmp_path_factory.mktemp("export") / "new" / "model.onnx")


def test_the_result_describes_the_file(result: ExportResult) -> None:
    data = result.path.read_bytes()
    assert result.sha256 == hashlib.sha256(data).hexdigest()
    assert result.size_bytes == len(data)
    assert result.parity.agreement == 1.0
    assert result.parity.max_abs_error <= result.parity.tolerance
    assert result.manifest == result.path.with_name("model.json")
    manifest = json.loads(result.manifest.read_text())
    assert manifest["sha256"] == result.sha256
    assert manifest["classes"] == list(CLASSES)
    assert manifest["image_shape"] == list(SHAPE)
    assert manifest["parity"] == result.parity.to_json()
    assert sorted(entry.name for entry in result.path.parent.iterdir()) == [
        "model.json",
        "model.md",
        "model.onnx",
    ]


def test_the_graph_keeps_its_promises(result: ExportResult) -> None:
    proto = onnx.load_from_string(result.path.read_bytes())
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": OPSET}
    (entry,), (answer,) = proto.graph.input, proto.graph.output
    assert (entry.name, answer.name) == ("images", "logits")
    dims = entry.type.tensor_type.shape.dim
    assert dims[0].dim_param == BATCH and not dims[0].HasField("dim_value")
    assert tuple(dim.dim_value for dim in dims[1:]) == SHAPE
    assert answer.type.tensor_type.shape.dim[0].dim_param == BATCH


def test_nothing_of_this_machine_is_inside(result: ExportResult) -> None:
    data = result.path.read_bytes()
    for place in (Path.cwd(), Path(sys.prefix), Path(torch.__file__).parent, Path(__file__)):
        assert str(place).encode() not in data
    for trace in (b".py", b"stack_trace", b"forward", b"pkg.torch", b"File "):
        assert trace not in data
    proto = onnx.load_from_string(data)
    for item in (proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.input):
        assert not item.doc_string and not item.metadata_props


def test_metadata_can_be_read_back(result: ExportResult) -> None:
    classifier = OnnxClassifier.open_checked(result.path)
    assert classifier.classes == CLASSES
    assert classifier.input_shape == SHAPE
    assert classifier.metadata["teacher"] == "teach-001"
    assert classifier.metadata["epdistill.schema"] == "1"
    assert classifier.metadata["epdistill.input_range"] == "[0, 1]"
    assert classifier.metadata["epdistill.input_layout"] == "NCHW"
    assert classifier.metadata["Image.NominalPixelRange"] == "Normalized_0_1"
    assert classifier.metadata["Image.BitmapPixelFormat"] == "Rgb8"


def test_any_batch_size_gives_the_module_s_answers(result: ExportResult) -> None:
    classifier = OnnxClassifier.open_checked(result.path, threads=1)
    batch = images(11)
    with torch.no_grad():
        expected = Net().eval()(batch)
    for size in range(1, 12):
        answers = classifier(batch[:size])
        assert torch.allclose(answers, expected[:size], rtol=0, atol=result.parity.tolerance)
        assert answers.dtype == torch.float32
    np.testing.assert_array_equal(classifier(batch.numpy()), classifier(batch).numpy())


def test_twice_the_same_bytes_silently_and_the_model_untouched(
    result: ExportResult, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Net().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, disabled = torch.get_rng_state(), logging.root.manager.disable
    again = export(tmp_path / "again.onnx", model)
    assert capfd.readouterr() == ("", "")
    assert again.path.read_bytes() == result.path.read_bytes()
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.root.manager.disable == disabled


def test_a_failed_gate_writes_nothing_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = OnnxClassifier.run
    monkeypatch.setattr(OnnxClassifier, "run", lambda self, batch: honest(self, batch) * 1.01)
    (tmp_path / "model.onnx").write_bytes(b"older")
    with pytest.raises(ParityError, match="real images in batches of"):
        export(tmp_path / "model.onnx")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"older"


def test_a_model_that_fixes_its_batch_is_refused(tmp_path: Path) -> None:
    class Fixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(2, *SHAPE))

    with pytest.raises(ExportError, match="batch") as caught:
        export(tmp_path / "model.onnx", Fixed())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": images() * 255}, DataError, r"expected \[0, 1\]"),
        ({"images": images().double()}, DataError, "float32"),
        ({"image_shape": (3, 8, 8)}, DataError, "expected"),
        ({"classes": ["a", "b"]}, ExportError, r"expected logits of shape \(2, 2\)"),
        ({"model": nn.Conv2d(3, 5, 3)}, ExportError, "expected logits"),
        ({"model": nn.Linear(5, 5)}, ExportError, "the model fails"),
    ],
)
def test_what_cannot_work_is_refused_before_exporting(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.delattr(torch.onnx, "export")
    with pytest.raises(error, match=message):
        export(tmp_path / "model.onnx", **changes)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"data_root": "/data/cifar10"}, "absolute path"),
        ({"data_root": "C:\\data"}, "absolute path"),
        ({"note": f"made in {Path.cwd()}/runs"}, "path of this machine"),
        ({"epdistill.schema": "7"}, "writes itself"),
    ],
)
def test_metadata_that_must_not_leave_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    result: ExportResult,
    metadata: dict[str, str],
    message: str,
) -> None:
    def exported(module: nn.Module, batch: Tensor, *, pixels: bool) -> onnx.ModelProto:
        return onnx.load_from_string(result.path.read_bytes())

    monkeypatch.setattr("epdistill.export.onnx_export.trace", exported)
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "model.onnx", metadata=metadata)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: ExportResult
) -> None:
    def exported(module: nn.Module, batch: Tensor, *, pixels: bool) -> onnx.ModelProto:
        return onnx.load_from_string(result.path.read_bytes())

    monkeypatch.setattr("epdistill.export.onnx_export.trace", exported)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="cannot write"):
        export(tmp_path / "file" / "model.onnx")
    with pytest.raises(ExportError, match=r"ending in \.onnx"):
        export(tmp_path / "model.bin")


def test_importing_the_room_is_light() -> None:
    script = (
        "import sys\n"
        "import epdistill.export.runtime, epdistill.export.predict, epdistill.export.manifest\n"
        "assert not {'torch', 'onnx', 'onnxruntime'} & sys.modules.keys()\n"
        "import epdistill.export.onnx_export, epdistill.export.bench\n"
        "assert not {'onnx', 'onnxruntime', 'onnxscript'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
