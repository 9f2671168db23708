"""Several processes are one: the same parameters, and one clear line when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from epdistill.augment import Augmentation
from epdistill.checkpoints import STATE
from epdistill.distributed import ALONE, Shard, Team
from epdistill.errors import RecipeError
from epdistill.robustness.journal import NAME
from epdistill.runs import read_metrics
from epdistill.students.inputs import climb, noisy
from epdistill.students.matching import Matching, matching_loss
from epdistill.teachers.learning import tipped_weights
from epdistill.training import generator_of

WORKER = Path(__file__).with_name("team_worker.py")
HARNESS = Path(__file__).with_name("team_harness.py")
NET = {"teacher.channels": [8, 16], "student.name": "cnn", "student.width": 8}
# Settled to the last digit, with a beta at which no image of this net tips.
EP = {
    **NET,
    "teacher.beta": 0.05,
    "teacher.nudged_omega": 1.0,
    "teacher.tolerance": 1e-10,
    "teacher.sweeps": 600,
    "teacher.nudged_tolerance": 1e-11,
    "teacher.nudged_sweeps": 400,
}


class Thread(Team):
    """A rank that is a thread of this process, to try what takes no processes."""

    board: dict[int, Any]
    barrier: threading.Barrier

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        self.board[self.rank] = tensor.detach().clone()
        self.barrier.wait(60)
        parts = torch.stack([self.board[rank] for rank in range(self.size)])
        self.barrier.wait(60)
        return parts.sum(0) if operation == dist.ReduceOp.SUM else parts.amax(0)


def threads(work: Callable[[Team], Any], size: int = 2) -> list[Any]:
    """What `work` gives in each of `size` ranks."""
    Thread.board, Thread.barrier = {}, threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, [Thread(rank, size) for rank in range(size)]))


def launch(order: dict[str, Any], out: Path, size: int) -> list[subprocess.CompletedProcess[str]]:
    """Start `size` ranks of the worker and wait for all of them."""
    out.mkdir(exist_ok=True)
    return start([str(WORKER), json.dumps({**order, "out": str(out)})], size)


def start(program: list[str], size: int) -> list[subprocess.CompletedProcess[str]]:
    """Start `size` ranks of a program and wait for all of them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", *program]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost"}
    common["MASTER_PORT"] = str(port)
    started = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    ended = []
    for process in started:
        said, cried = process.communicate(timeout=600)
        ended.append(subprocess.CompletedProcess(command, process.returncode, said, cried))
    return ended


def train(order: dict[str, Any], out: Path, size: int) -> list[dict[str, Tensor]]:
    """The final state of every rank."""
    for ended in launch(order, out, size):
        assert ended.returncode == 0, ended.stderr
    return [load_file(out / f"rank{rank}.safetensors") for rank in range(size)]


def compare(order: dict[str, Any], tmp_path: Path, size: int = 2) -> float:
    """The largest difference between one process and several; all ranks must agree exactly."""
    (alone,) = train(order, tmp_path / "one", 1)
    together = train(order, tmp_path / "many", size)
    for name, value in together[0].items():
        for other in together[1:]:
            assert torch.equal(value, other[name]), name
    assert any(bool((value != 0).any()) for value in alone.values())
    assert alone.keys() == together[0].keys()
    rows = [read_metrics(tmp_path / who / "run") for who in ("one", "many")]
    assert len(rows[0]) == len(rows[1]) == order["epochs"]
    for one, many in zip(*rows, strict=True):
        # A residual is nothing but rounding once an image has settled.
        assert one == pytest.approx(many, rel=1e-9, abs=1e-10)
    apart = [float((value - together[0][name]).abs().max()) for name, value in alone.items()]
    # Shown by `pytest -s`.
    sys.stdout.write(f"\n{tmp_path.name}: {size} processes differ by {max(apart):.2g} from one\n")
    return max(apart)


def steps(order: dict[str, Any], out: Path) -> int:
    with safe_open(out / "rank0.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        return int(json.loads(file.metadata()["row"])["step"])


# 25 steps an epoch; batches of 33 are shared out as 16 and 17, or as 11 each.
SHORT = {"limit": 850, "epochs": 2, "batch": 33}


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "size"), [("ep", 2), ("bptt", 2), ("implicit", 2), ("ep", 3)])
def test_a_team_teaches_as_one_process(rule: str, size: int, tmp_path: Path) -> None:
    order = {**SHORT, "kind": "teacher", "recipe": {**EP, "teacher.rule": rule}}
    difference = compare(order, tmp_path, size)
    assert steps(order, tmp_path / "many") >= 50
    if rule == "ep":
        rows = read_metrics(tmp_path / "one" / "run")
        assert all(row["train.tipped"] == 0 for row in rows), "choose a net in which none tips"
    assert difference < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("tipped", ["exclude", "clip"])
def test_tipped_images_are_treated_over_the_whole_batch(tipped: str, tmp_path: Path) -> None:
    # Few steps: what tips an image also blows up the last digit.
    recipe = {**NET, "teacher.tipped": tipped, "teacher.tolerance": 1e-10, "teacher.sweeps": 600}
    order = {"kind": "teacher", "limit": 300, "epochs": 1, "batch": 33, "recipe": recipe}
    difference = compare(order, tmp_path)
    assert read_metrics(tmp_path / "one" / "run")[0]["train.tipped"] > 0
    assert difference < 1e-9


STUDENTS: dict[str, dict[str, Any]] = {
    # Some images of a hurried teacher have not settled: they count for no rank.
    "unsettled": {
        "teacher.sweeps": 13,
        "teacher.check_every": 1,
        "student.gradient_clip": 0.5,
    },
    "bce": {"student.distance": "bce", "student.temperature": 2.0},
    "cosine": {"student.distance": "cosine", "student.inputs": "noise"},
    "corruption": {"student.inputs": "corruption", "student.corruptions": ["spatter", "contrast"]},
    "adversarial": {"student.inputs": "adversarial", "student.adversarial_norm": "l2"},
    # Means over settled images and over all of them, in one loss.
    "mixed": {
        "teacher.sweeps": 13,
        "teacher.check_every": 1,
        "student.label_weight": 0.7,
        "student.targets": "clean",
    },
    "labels": {"student.loss": "ce", "student.inputs": "adversarial"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_a_team_distills_as_one_process(name: str, tmp_path: Path) -> None:
    order = {
        **SHORT, "kind": "student", "norm": False,
        "recipe": {**NET, "teacher.init_scale": 2.0, **STUDENTS[name]},
    }  # fmt: skip
    difference = compare(order, tmp_path)
    assert steps(order, tmp_path / "many") >= 50
    assert difference < 1e-9
    if name in ("unsettled", "mixed"):
        settled = read_metrics(tmp_path / "one" / "run")[0]["train.settled"]
        assert 0.05 < settled < 0.95


@pytest.mark.slow
def test_with_batchnorm_the_ranks_agree_among_themselves(tmp_path: Path) -> None:
    order = {"kind": "student", "limit": 300, "epochs": 1, "batch": 33, "recipe": NET}
    first, second = train(order, tmp_path / "many", 2)
    (alone,) = train(order, tmp_path / "one", 1)
    running = [name for name in first if name.endswith("running_var")]
    assert running
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    # On CPUs each rank normalises by its own rows, as docs/scaling.md says.
    assert any(not torch.allclose(first[name], alone[name]) for name in running)


@pytest.mark.slow
def test_a_baseline_without_batchnorm_is_one_too(tmp_path: Path) -> None:
    recipe = {"model": "vit", "baselines.vit.depth": 1, "baselines.vit.width": 16}
    recipe["baselines.vit.auto_augment"] = "cifar10"
    order = {"kind": "baseline", "limit": 300, "epochs": 1, "batch": 33, "recipe": recipe}
    assert compare(order, tmp_path) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_and_it_can_be_resumed(rank: int, tmp_path: Path) -> None:
    order = {"kind": "student", "limit": 300, "epochs": 2, "batch": 33, "recipe": NET}
    whole = train(order, tmp_path / "whole", 2)
    ended = launch({**order, "die": {"rank": rank, "step": 7}}, tmp_path / "broken", 2)
    assert ended[rank].returncode == -signal.SIGKILL
    assert ended[1 - rank].returncode == 2
    said = ended[1 - rank].stderr
    assert "lost touch" in said and "--resume" in said and "Traceback" not in said
    # torch's own words about its store are not ours; the command silences them.
    assert said.count("epdistill: ") == 1
    assert (tmp_path / "broken" / "run" / STATE).is_file()
    again = train(order, tmp_path / "broken", 2)
    for name, value in whole[0].items():
        assert torch.equal(value, again[0][name]), name
        assert torch.equal(value, again[1][name]), name
    rows = [read_metrics(tmp_path / where / "run") for where in ("whole", "broken")]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_what_fails_in_all_ranks_is_said_once(tmp_path: Path) -> None:
    order = {"kind": "teacher", "limit": 100, "epochs": 1, "batch": 1, "recipe": NET}
    ended = launch(order, tmp_path, 2)
    assert [process.returncode for process in ended] == [2, 2]
    said = "".join(process.stderr for process in ended)
    assert said.count("a batch of 1 for 2 processes") == 1
    assert "Traceback" not in said


def harness(out: Path, size: int) -> list[dict[str, Any]]:
    """What every rank knows at the end of an evaluation."""
    out.mkdir(exist_ok=True)
    for ended in start([str(HARNESS), str(out)], size):
        assert ended.returncode == 0, ended.stderr
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.slow
def test_a_team_evaluates_as_one_process(tmp_path: Path) -> None:
    (alone,) = harness(tmp_path / "one", 1)
    calls = []
    for size in (2, 3):
        found = harness(tmp_path / str(size), size)
        for rank in found:
            assert rank["folder"] == str(tmp_path / str(size) / "results")
            assert rank["csv"] == alone["csv"] and rank["summary"] == alone["summary"]
        calls.append([rank["calls"] for rank in found])
    # Every process has done a part of the work.
    assert all(0.1 * alone["calls"] < some < 0.8 * alone["calls"] for some in calls[0])
    journals = [
        sorted((tmp_path / where / "results" / NAME).read_bytes().splitlines())
        for where in ("one", "2", "3")
    ]
    assert journals[0] == journals[1] == journals[2]

    # Killed half way, it goes on with another number of processes.
    path = tmp_path / "3" / "results" / NAME
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    again = harness(tmp_path / "3", 2)
    assert all(rank["summary"] == alone["summary"] for rank in again)
    assert sum(rank["calls"] for rank in again) < 0.8 * sum(calls[0])


def test_shards_cover_a_batch() -> None:
    for size in (1, 2, 3, 8):
        shards = [Team(rank, size).shard(17) for rank in range(size)]
        rows = [row for shard in shards for row in range(17)[shard.rows]]
        assert rows == list(range(17))
        assert max(s.size for s in shards) - min(s.size for s in shards) <= 1
    with pytest.raises(RecipeError, match="a batch of 3 for 4 processes"):
        Team(0, 4).shard(3)


def test_shards_are_varied_as_the_whole_batch() -> None:
    pixels = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8, generator=generator_of(1))
    images = pixels / 255
    parts = [Shard(0, 3, 7), Shard(3, 7, 7)]

    def check(work: Callable[[Tensor, torch.Generator, Shard | None], Tensor], x: Tensor) -> None:
        generator = generator_of(2)
        whole = work(x, generator, None)
        for part in parts:
            own = generator_of(2)
            assert torch.equal(work(x[part.rows], own, part), whole[part.rows])
            assert torch.equal(own.get_state(), generator.get_state())
        assert not torch.equal(whole, x)

    check(Augmentation(2, True), pixels)
    check(lambda x, g, s: noisy(x, "mix", 0.3, g, s), images)
    check(lambda x, g, s: climb(lambda y: y.square().sum(), x, "linf", 0.1, 2, g, s), images)
    check(lambda x, g, s: climb(lambda y: y.square().sum(), x, "l2", 0.1, 2, g, s), images)


def test_gradients_are_averaged_by_count() -> None:
    values = [torch.tensor([1.0, 2.0]), torch.tensor([4.0, -1.0])]

    def work(team: Team) -> list[Tensor | None]:
        ours = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.float64))]
        nobodys, hers = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))
        ours[0].grad, ours[1].grad = values[team.rank].clone(), values[team.rank].double()
        if team.rank == 1:
            hers.grad = torch.tensor([8.0])
        team.average_gradients([*ours, nobodys, hers], [3, 1][team.rank])
        return [one.grad for one in (*ours, nobodys, hers)]

    for first, wide, nobodys, hers in threads(work):
        assert first is not None and wide is not None and hers is not None
        assert first.tolist() == [7 / 4, 5 / 4]
        assert wide.dtype == torch.float64 and wide.tolist() == [7 / 4, 5 / 4]
        assert nobodys is None
        assert hers.tolist() == [2.0]


@pytest.mark.parametrize("distance", ["mse", "bce", "cosine"])
@pytest.mark.parametrize("settled", [[1, 1, 1, 1, 1], [1, 0, 0, 1, 1], [1, 1, 0, 0, 0], [0] * 5])
def test_the_loss_of_shards_is_that_of_the_batch(distance: str, settled: list[int]) -> None:
    generator = generator_of(4)
    goals = [torch.rand(5, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    answer = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    inputs = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    keep = torch.tensor(settled, dtype=torch.bool)
    how = Matching(distance, temperature=2.0)  # type: ignore[arg-type]

    def work(team: Team) -> tuple[dict[str, float], list[Tensor]]:
        rows = team.shard(5).rows
        start = torch.linspace(-1, 1, 6 * 22, dtype=torch.float64).view(22, 6)
        weight = nn.Parameter(torch.sin(9 * start))
        out = F.linear(inputs[rows], weight)
        landed = [out[:, :18].reshape(-1, 2, 3, 3), out[:, 2:20].reshape(-1, 2, 3, 3)]
        part = [goal[rows] for goal in goals]
        loss = matching_loss(landed, out[:, 18:], part, answer[rows], keep[rows], how, team)
        loss.total.backward()
        count = int(keep[rows].sum())
        team.average_gradients([weight], count)
        assert weight.grad is not None
        parts = {"total": float(loss.total.detach()), "states": float(loss.states)}
        return team.mean(parts, count), [weight.grad]

    alone, gradient = work(ALONE)
    for found, own in threads(work):
        assert found == pytest.approx(alone, rel=1e-12, abs=1e-15)
        torch.testing.assert_close(own, gradient, rtol=1e-12, atol=1e-15)
    assert bool(gradient[0].any()) == any(settled)


@pytest.mark.parametrize("treatment", ["keep", "exclude", "clip"])
@pytest.mark.parametrize("tipped", [[0, 1, 0, 1, 1], [1, 1, 0, 0, 0], [0] * 5, [1] * 5])
def test_tipped_weights_of_shards(treatment: str, tipped: list[int]) -> None:
    span, flags = torch.tensor([1.0, 5.0, 2.0, 3.0, 9.0]), torch.tensor(tipped, dtype=torch.bool)

    def work(team: Team) -> Tensor:
        rows = team.shard(5).rows
        found = tipped_weights(flags[rows], span[rows], treatment, team)  # type: ignore[arg-type]
        return torch.ones(len(span[rows])) if found is None else found

    assert torch.equal(torch.cat(threads(work)), work(ALONE))


def test_a_team_of_one_leaves_everything_alone() -> None:
    tensor = torch.arange(3.0, requires_grad=True)
    assert torch.equal(ALONE.sum(tensor), tensor.detach())
    assert ALONE.mean({"a": 2.0}, 0) == {"a": 2.0}
    assert ALONE.share_out([1, 2], lambda x: x + 1) == [2, 3]
    assert ALONE.tell(b"x") == b"x"
    assert ALONE.any(True) and not ALONE.any(False)
    assert ALONE.first_to_fail()
