"""Only self-contained feedforward classifiers are run, and only the bytes that were judged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from epdistill.errors import DataError, ExportError
from epdistill.export.graph import MAX_BYTES, local_paths, parse_checked, strip_traces
from epdistill.export.manifest import (
    Manifest,
    manifest_path,
    read_manifest,
    sha256_of,
    write_artifact,
)
from epdistill.export.runtime import OnnxClassifier, available_cores

SHAPE = (1, 4, 4)
WEIGHT = np.arange(48, dtype=np.float32).reshape(16, 3) / 48


def linear(
    batch: int | str | None = "batch",
    inner: tuple[int | str, ...] = SHAPE,
    answer: tuple[int | str | None, ...] = ("batch", 3),
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """flatten(images) @ WEIGHT as an ONNX model."""
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", kind, [batch, *inner])],
        [helper.make_tensor_value_info("logits", kind, list(answer))],
        [numpy_helper.from_array(WEIGHT, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def opened(proto: onnx.ModelProto) -> OnnxClassifier:
    return OnnxClassifier(proto.SerializeToString(), source="m.onnx", threads=1)


def shipped(folder: Path) -> Path:
    data = linear().SerializeToString()
    path = folder / "m.onnx"
    write_artifact(path, data, Manifest(sha256_of(data), len(data), ("0", "1", "2"), SHAPE))
    return path


def test_it_computes_and_describes_itself() -> None:
    classifier = opened(linear())
    batch = np.random.default_rng(0).random((5, *SHAPE), dtype=np.float32)
    np.testing.assert_allclose(classifier.run(batch), batch.reshape(5, 16) @ WEIGHT, rtol=1e-6)
    assert classifier.classes == ("0", "1", "2")
    assert classifier.input_shape == SHAPE
    assert classifier.metadata == {}
    tensor = torch.from_numpy(batch).requires_grad_()
    answer = classifier(tensor)
    assert isinstance(answer, torch.Tensor) and not answer.requires_grad
    np.testing.assert_array_equal(answer.numpy(), classifier.run(batch))
    flipped = batch.transpose(0, 1, 3, 2)  # not contiguous
    np.testing.assert_array_equal(classifier.run(flipped), classifier.run(flipped.copy()))


def test_the_session_is_pinned() -> None:
    options = opened(linear())._session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.inter_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert opened(linear())._session.get_providers() == ["CPUExecutionProvider"]
    data = linear().SerializeToString()
    assert OnnxClassifier(data, source="m").threads == available_cores() >= 1
    with pytest.raises(ExportError, match="at least 1"):
        OnnxClassifier(data, source="m", threads=0)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 1, 4, 5), np.float32),
        np.zeros(SHAPE, np.float32),
        np.zeros((2, *SHAPE), np.float64),
        np.zeros((2, *SHAPE), np.uint8),
    ],
)
def test_images_of_another_kind_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"expects float32 of shape \(N, 1, 4, 4\)"):
        opened(linear())(bad)


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (linear(batch=8), "batches of exactly 8"),
        (linear(batch=1), "batches of exactly 1"),
        (linear(answer=(8, 3)), "batches of exactly 8"),
        (linear(inner=(1, "h", 4)), "with fixed C, H, W"),
        (linear(inner=(16,)), "with fixed C, H, W"),
        (linear(answer=("batch", "k")), r"expected float32 \(batch, K\)"),
        (linear(answer=("batch", 3, 1)), r"expected float32 \(batch, K\)"),
        (linear(kind=TensorProto.DOUBLE), "float32"),
    ],
)
def test_other_shapes_than_a_classifier_s_are_refused(proto: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        opened(proto)


def test_two_inputs_or_outputs_are_refused() -> None:
    two_in, two_out = linear(), linear()
    two_in.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    two_out.graph.output.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, [1, 16]))
    with pytest.raises(ExportError, match=r"2 inputs \(images, more\)"):
        opened(two_in)
    with pytest.raises(ExportError, match=r"2 outputs \(logits, flat\)"):
        opened(two_out)


@pytest.mark.parametrize("where", ["initializer", "attribute", "hidden in a function"])
def test_external_data_is_refused(where: str) -> None:
    tensor = numpy_helper.from_array(WEIGHT, "elsewhere")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret.bin")
    proto = linear()
    if where == "initializer":
        proto.graph.initializer.append(tensor)
    elif where == "attribute":
        proto.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    else:
        node = helper.make_node("Constant", [], ["c"], value=tensor)
        proto.functions.append(
            helper.make_function("", "F", [], ["c"], [node], [helper.make_opsetid("", 20)])
        )
    with pytest.raises(ExportError, match="elsewhere in another file"):
        opened(proto)


@pytest.mark.parametrize("op", ["Loop", "If", "Scan", "SequenceMap", "Unheard"])
def test_control_flow_is_refused(op: str) -> None:
    """Also under a name this package has not heard of: what counts is the graph it carries."""
    body = helper.make_graph([], "body", [], [])
    proto = linear()
    proto.graph.node.append(helper.make_node(op, [], ["x"], body=body))
    with pytest.raises(ExportError, match=f"control-flow operator {op}"):
        opened(proto)


@pytest.mark.parametrize("op", ["Loop", "If", "Scan"])
def test_control_flow_inside_a_function_is_refused(op: str) -> None:
    proto = linear()
    node = helper.make_node(op, [], ["x"])
    proto.functions.append(
        helper.make_function("", "F", [], ["x"], [node], [helper.make_opsetid("", 20)])
    )
    with pytest.raises(ExportError, match=f"control-flow operator {op}"):
        opened(proto)


def test_foreign_operators_are_refused() -> None:
    used, declared = linear(), linear()
    used.graph.node[0].domain = "com.microsoft"
    declared.opset_import.append(helper.make_opsetid("my.ops", 1))
    with pytest.raises(ExportError, match=r"'com\.microsoft'"):
        opened(used)
    with pytest.raises(ExportError, match=r"'my\.ops'"):
        opened(declared)


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_what_is_no_model_is_one_line(
    tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"m\.onnx") as caught:
        OnnxClassifier.open(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_and_a_folder_are_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(ExportError, match="cannot read") as caught:
            OnnxClassifier.open_checked(path)
        assert "\n" not in str(caught.value)


def test_every_cut_is_refused_without_a_manifest(tmp_path: Path) -> None:
    data = linear().SerializeToString()
    path = tmp_path / "m.onnx"
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(ExportError):
            OnnxClassifier.open(path)


def test_an_invalid_graph_is_onnxruntime_s_error_in_one_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    proto = linear()
    proto.graph.node[1].input[1] = "nobody"
    with pytest.raises(ExportError, match="not a valid ONNX model") as caught:
        opened(proto)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_cannot_take_a_batch_says_so() -> None:
    proto = linear()
    shape = numpy_helper.from_array(np.array([2, 16], dtype=np.int64), "two")
    proto.graph.initializer.append(shape)
    proto.graph.node[0].CopyFrom(helper.make_node("Reshape", ["images", "two"], ["flat"]))
    with pytest.raises(ExportError, match="batch of 3") as caught:
        opened(proto).run(np.zeros((3, *SHAPE), np.float32))
    assert "\n" not in str(caught.value)


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: takes no space
    with pytest.raises(ExportError, match="expected at most"):
        OnnxClassifier.open(path)


@pytest.mark.parametrize("classes", ["[1, 2, 3]", "{", '"abc"', '["a"]'])
def test_wrong_class_names_are_refused(classes: str) -> None:
    proto = linear()
    proto.metadata_props.add(key="epdistill.classes", value=classes)
    with pytest.raises(ExportError, match="expected"):
        opened(proto)


def test_the_manifest_vouches_for_the_file(tmp_path: Path) -> None:
    path = shipped(tmp_path)
    assert OnnxClassifier.open_checked(path).input_shape == SHAPE
    manifest = read_manifest(manifest_path(path))
    assert manifest.image_shape == SHAPE and manifest.classes == ("0", "1", "2")
    manifest_path(path).unlink()
    assert OnnxClassifier.open_checked(path).input_shape == SHAPE


@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer"])
def test_a_tampered_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = shipped(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[data.index(WEIGHT.tobytes()) + 9] ^= 1  # one bit of a weight: still a valid model
        OnnxClassifier(bytes(data), source="m")
    elif damage == "truncated":
        del data[-5:]
    else:
        data += b"\0"
    path.write_bytes(bytes(data))
    with pytest.raises(ExportError, match="damaged or was replaced"):
        OnnxClassifier.open_checked(path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"name": "x"}',
        '{"format_version": 99}',
        '{"sha256": "x", "size_bytes": "y", "image_shape": [1, 2, 3], "classes": []}',
    ],
)
def test_a_bad_manifest_is_refused(tmp_path: Path, content: str) -> None:
    path = shipped(tmp_path)
    manifest_path(path).write_text(content)
    with pytest.raises(ExportError, match=r"m\.json") as caught:
        OnnxClassifier.open_checked(path)
    assert "\n" not in str(caught.value)


def test_a_manifest_for_other_bytes_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="other bytes"):
        write_artifact(tmp_path / "m.onnx", b"model", Manifest(sha256_of(b"other"), 5, (), SHAPE))
    assert not list(tmp_path.iterdir())


def test_traces_are_stripped_at_every_depth() -> None:
    proto = linear()
    proto.doc_string = "about"
    proto.graph.doc_string = "about"
    proto.graph.node[0].doc_string = 'File "/srv/build/net.py", line 3'
    proto.graph.node[0].metadata_props.add(key="trace", value="/srv/build/net.py")
    proto.graph.initializer[0].doc_string = "/srv/build/net.py"
    proto.graph.input[0].metadata_props.add(key="a", value="b")
    proto.metadata_props.add(key="kept", value="yes")
    assert local_paths(proto.SerializeToString()) == ["/srv/build/net.py"]
    strip_traces(proto)
    assert local_paths(proto.SerializeToString()) == []
    bare = linear()
    bare.metadata_props.add(key="kept", value="yes")
    assert proto == bare


def test_paths_are_looked_for_in_text_and_not_in_weights() -> None:
    proto = linear()
    proto.graph.initializer[0].raw_data = f"{Path.cwd()}/x/y.py".encode()
    assert local_paths(proto.SerializeToString()) == []
    proto.graph.node[0].name = f"{Path.cwd()}/somewhere"
    assert str(Path.cwd()) in local_paths(proto.SerializeToString())


def test_parsing_returns_what_was_given() -> None:
    assert parse_checked(linear().SerializeToString(), "m") == linear()


def test_telemetry_is_off_before_onnxruntime_is_imported(tmp_path: Path) -> None:
    script = """
import os, sys
import epdistill
del os.environ["ORT_DISABLE_TELEMETRY"]  # the runtime must not rely on the package alone
from pathlib import Path
from epdistill.export.runtime import OnnxClassifier
assert "onnxruntime" not in sys.modules
seen = []
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            seen.append(os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Spy())
OnnxClassifier.open_checked(Path(sys.argv[1]))
assert seen == ["1"], seen
"""
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(shipped(tmp_path))],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
