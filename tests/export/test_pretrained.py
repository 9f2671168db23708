"""The exported student that comes with the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from epdistill.cli import main
from epdistill.export.manifest import card_path, manifest_path, read_manifest
from epdistill.export.pretrained import FILE, FOLDER, SHIPPED, named
from epdistill.export.runtime import OnnxClassifier


def test_it_is_whole_small_and_says_what_it_is() -> None:
    path = named(Path(SHIPPED))
    manifest = read_manifest(manifest_path(path))
    assert manifest.precision == "int8" and manifest.size_bytes < 2**20
    lost = manifest.figures["quantisation"]
    assert lost["drop_points"] <= 0.5
    assert manifest.figures["test_images"] == 10_000
    assert manifest.figures["robustness"]["threats"]
    words = card_path(path).read_text()
    assert manifest.sha256 in words
    assert f"{manifest.figures['test_accuracy']:.4f}" in words
    # `open_checked` compares the bytes with the manifest.
    classifier = OnnxClassifier.open_checked(path, threads=1)
    images = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)
    assert classifier.run(images).shape == (3, 10)
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 20 * 2**20


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named(Path(SHIPPED)) == FOLDER / FILE
    assert named(Path("other.onnx")) == Path("other.onnx")
    Path(SHIPPED).mkdir()
    assert named(Path(SHIPPED)) == Path(SHIPPED)


def test_predict_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 32), (90, 140, 220)).save("sky.png")
    monkeypatch.setattr(sys, "argv", ["epdistill", "predict", SHIPPED, "sky.png", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    told = json.loads(capsys.readouterr().out)
    assert Path(told["model"]).name == FILE
    (found,) = told["predictions"]
    assert (
        found["image"] == "sky.png"
        and found["label"] in read_manifest(manifest_path(FOLDER / FILE)).classes
    )


def test_the_server_takes_it() -> None:
    from epdistill.export.serving.models import load_models

    loaded = load_models([named(Path(SHIPPED))], threads=1)
    assert list(loaded) == [Path(FILE).stem]
