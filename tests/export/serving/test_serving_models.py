"""Only a file that its manifest vouches for is served, and only what is safe to run."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from epdistill.errors import ExportError
from epdistill.export.manifest import TEACHER, Manifest, sha256_of, write_artifact
from epdistill.export.serving.models import load_models, names, newest_export


@pytest.fixture
def copy(tmp_path: Path, model: Path) -> Path:
    for suffix in (".onnx", ".json"):
        shutil.copy(model.with_suffix(suffix), tmp_path)
    return tmp_path / model.name


def refused(path: Path, message: str) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        load_models([path], threads=1)
    assert "\n" not in str(caught.value)


def test_200_flipped_bits_are_all_detected(copy: Path) -> None:
    whole = copy.read_bytes()
    chosen = random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[chosen.randrange(len(whole))] ^= 1 << chosen.randrange(8)
        copy.write_bytes(damaged)
        refused(copy, "damaged or was replaced")
    copy.write_bytes(whole)
    assert list(load_models([copy], threads=1)) == ["digits"]


def test_flipped_bits_of_the_manifest_are_all_detected(copy: Path) -> None:
    """Every bit of every tenth byte."""
    beside = copy.with_suffix(".json")
    whole = beside.read_bytes()
    for place in range(0, len(whole), 10):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            beside.write_bytes(damaged)
            refused(copy, "manifest")
    beside.write_bytes(whole)
    assert list(load_models([copy], threads=1)) == ["digits"]


def test_a_manifest_s_lies_are_detected(copy: Path, other: Path) -> None:
    beside = copy.with_suffix(".json")
    honest = json.loads(beside.read_text())
    for changes in (
        {"kind": "teacher"},
        {"classes": honest["classes"][::-1]},
        {"parity": {**honest["parity"], "agreement": 0.5}},
        {"self_sha256": "0" * 64},
        {"self_sha256": None},
    ):
        beside.write_text(json.dumps({**honest, **changes}))
        refused(copy, "manifest .* damaged or was edited")
    for text in ("", beside.read_text()[:-2], "[]", "{}"):
        beside.write_text(text)
        refused(copy, "manifest")
    shutil.copy(other.with_suffix(".json"), beside)
    refused(copy, "damaged or was replaced")


def test_truncated_swapped_and_unvouched_files_are_refused(copy: Path, other: Path) -> None:
    whole = copy.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        copy.write_bytes(whole[:length])
        refused(copy, "damaged or was replaced")
    shutil.copy(other, copy)
    refused(copy, "damaged or was replaced")
    copy.write_bytes(whole)
    copy.with_suffix(".json").unlink()
    refused(copy, "manifest .* cannot be read")
    refused(copy.with_name("none.onnx"), "cannot read")


def linear(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.ones((16, 3), np.float32), "weight")
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"], axis=1),
            helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
            *nodes,
        ],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def vouched(folder: Path, proto: onnx.ModelProto, **changes: Any) -> Path:
    """A hostile file whose manifest is in order."""
    data = proto.SerializeToString()
    path = folder / "m.onnx"
    write_artifact(
        path, data, Manifest(sha256_of(data), len(data), ("a", "b", "c"), (1, 4, 4), **changes)
    )
    return path


def test_external_data_foreign_operators_and_loops_are_refused(tmp_path: Path) -> None:
    elsewhere = linear()
    tensor = elsewhere.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret.bin")
    refused(vouched(tmp_path, elsewhere), "in another file")
    foreign = linear(helper.make_node("Inverse", ["logits"], ["x"], domain="com.microsoft"))
    refused(vouched(tmp_path, foreign), "com.microsoft")
    body = helper.make_graph([], "body", [], [])
    loop = linear(helper.make_node("Loop", ["", ""], ["x"], body=body))
    refused(vouched(tmp_path, loop), "control-flow operator Loop")
    branch = linear(helper.make_node("If", ["logits"], ["x"], then_branch=body, else_branch=body))
    refused(vouched(tmp_path, branch, kind=TEACHER), "control-flow operator If")
    assert list(load_models([vouched(tmp_path, linear())], threads=1)) == ["m"]


def test_providers_are_chosen_among_those_there_are(model: Path) -> None:
    chosen = load_models([model], threads=1, providers=["CPUExecutionProvider"])
    assert chosen["digits"].classifier._session.get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(ExportError, match=r"NoneExecutionProvider; expected one of .*CPU"):
        load_models([model], providers=["NoneExecutionProvider"])


def test_names() -> None:
    assert names([Path("a/one.onnx"), Path("b/two.onnx")]) == ["one", "two"]
    same = [Path("runs/x-001/model.onnx"), Path("runs/x-002/model.onnx"), Path("int8.onnx")]
    assert names(same) == ["x-001-model", "x-002-model", "int8"]
    with pytest.raises(ExportError, match="2 models called a-model"):
        names([Path("x/a/model.onnx"), Path("y/a/model.onnx")])


def test_the_newest_export_has_the_newest_manifest(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="epdistill export"):
        newest_export(tmp_path)
    for number, name in enumerate(("old", "new", "bare")):
        run = tmp_path / name
        run.mkdir()
        (run / "model.onnx").touch()
        if name != "bare":
            (run / "model.json").touch()
            os.utime(run / "model.json", (number, number))
    assert newest_export(tmp_path) == tmp_path / "new" / "model.onnx"


def test_bytes_in_are_served_as_uint8(tmp_path: Path) -> None:
    """A graph that takes uint8 (N, H, W, C)."""
    proto = linear()
    proto.graph.node.insert(0, helper.make_node("Cast", ["pixels"], ["images"], to=1))
    del proto.graph.input[:]
    proto.graph.input.append(
        helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 4, 4, 1])
    )
    (served,) = load_models([vouched(tmp_path, proto)], threads=1).values()
    assert served.datatype == "UINT8" and served.item_shape == (4, 4, 1)
