"""What replicas are made from, and what is refused before Ray starts."""

from __future__ import annotations

import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from epdistill.cli import main
from epdistill.errors import ExportError
from epdistill.export.manifest import manifest_path
from epdistill.export.serving.ray_local import _needed
from epdistill.export.serving.replicas import Plan, planned
from epdistill.export.serving.settings import Limits


def copied(source: Path, target: Path) -> Path:
    """A model and its manifest under another path."""
    shutil.copy(source, target)
    shutil.copy(manifest_path(source), manifest_path(target))
    return target


def test_a_plan_travels_and_builds_the_application(model: Path) -> None:
    plan = planned([model], threads=1, limits=Limits(batch=3), token="abc")
    sent: Plan = pickle.loads(pickle.dumps(plan))
    assert sent == plan and list(sent.digests) == [str(model)]
    assert sent.build().title == "epdistill"


def test_a_late_replica_does_not_serve_a_swapped_file(
    model: Path, other: Path, tmp_path: Path
) -> None:
    served = copied(model, tmp_path / "net.onnx")
    plan = planned([served])
    plan.build()
    copied(other, served)  # whole, with a manifest of its own
    with pytest.raises(ExportError, match="was replaced after it was deployed"):
        plan.build()


def test_a_damaged_file_stops_a_replica(model: Path, tmp_path: Path) -> None:
    served = copied(model, tmp_path / "net.onnx")
    plan = planned([served])
    served.write_bytes(served.read_bytes()[:-1])
    with pytest.raises(ExportError, match="damaged or was replaced"):
        plan.build()


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, {"CPU": 3, "GPU": 0}),
        ({"num_replicas": 2}, {"CPU": 6, "GPU": 0}),
        ({"num_replicas": "auto"}, {"CPU": 3, "GPU": 0}),
        ({"autoscaling_config": {"min_replicas": 2, "max_replicas": 9}}, {"CPU": 6, "GPU": 0}),
        (
            {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5, "num_gpus": 1}},
            {"CPU": 1, "GPU": 2},
        ),
    ],
)
def test_what_the_first_replicas_reserve(options: dict[str, Any], needed: dict[str, float]) -> None:
    assert _needed(Plan({}, threads=3), options) == needed


def test_mistakes_are_one_line(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    broken = tmp_path / "broken.toml"
    broken.write_text("num_replicas = ")
    for arguments, message in (
        (("--engine", "triton"), "expected uvicorn or ray"),
        (("--replicas", "2"), "are of --engine ray"),
        (("--ray-options", broken), "are of --engine ray"),
        (("--engine", "ray", "--linger", "1"), "--linger is not of --engine ray"),
        (("--engine", "ray", "--ray-options", broken), "expected a TOML file"),
        (("--engine", "ray", "--ray-options", tmp_path), "expected a TOML file"),
        (("--engine", "ray", "--replicas", "2"), "pip install 'epdistill[ray]'"),
    ):
        command = ["epdistill", "serve", str(model), "--port", "0", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capfd.readouterr()
        assert caught.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
        assert message in printed.err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray, when it is imported
def test_ray_s_options_and_arguments(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without starting Ray: what its own configuration may say, and what is refused."""
    pytest.importorskip("ray")
    from epdistill.export.serving import ray_engine

    monkeypatch.setenv("EPDISTILL_TOKEN", "abc")
    plan = planned([model], threads=2)
    options = {"num_replicas": 3, "ray_actor_options": {"resources": {"rack": 1}}}
    bound = ray_engine.deployed(plan, options)._bound_deployment
    assert bound.name == "epdistill" and bound.num_replicas == 3
    assert bound.ray_actor_options["num_cpus"] == 2
    assert bound.ray_actor_options["resources"] == {"rack": 1}
    assert bound.max_ongoing_requests == plan.limits.requests
    scaling = {"autoscaling_config": {"min_replicas": 1, "max_replicas": 4}}
    assert ray_engine.deployed(plan, scaling)._bound_deployment is not None
    for wrong in ({"replicas": 2}, {"num_replicas": "many"}, {"ray_actor_options": 3}):
        with pytest.raises(ExportError, match="Ray refuses the options"):
            ray_engine.deployed(plan, wrong)

    given = {"models": [str(model)], "threads": 1, "limits": {"batch": 8}}
    assert ray_engine.application(given)._bound_deployment.name == "epdistill"
    for bad in ({}, {"models": 3}, {**given, "speed": 1}, {**given, "limits": {"batches": 1}}):
        with pytest.raises(ExportError, match="received"):
            ray_engine.application(bad)
