"""The arithmetic of benchmarks, on clocks that do not depend on the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from epdistill.errors import DataError
from epdistill.export.bench import (
    BenchRow,
    Contender,
    Timing,
    _cpu_name,
    bench,
    hardware,
    measure,
    ratios,
    timing,
    to_json,
    torch_contender,
)


class World:
    """A clock that only moves while somebody works; remembers who worked, on how many images."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[tuple[str, int]] = []

    def clock(self) -> float:
        return self.now

    def worker(self, name: str, base: float, per_image: float = 0.0) -> Contender:
        def run(images: Tensor) -> None:
            self.log.append((name, len(images)))
            self.now += base + per_image * len(images)

        return Contender(name, run)


def test_quantiles_are_interpolated() -> None:
    found = timing([4.0, 1.0, 3.0, 2.0, 5.0])
    assert found == Timing(median=3.0, q25=2.0, q75=4.0, p99=pytest.approx(4.96), repeats=5)
    assert timing([2.0]) == Timing(2.0, 2.0, 2.0, 2.0, 1)


def test_measure_drops_the_warmup_and_fills_the_time() -> None:
    world = World()
    durations = iter([9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])

    def work() -> None:
        world.now += next(durations)

    found = measure(work, warmup=2, repeats=2, min_seconds=10.0, clock=world.clock)
    assert found.repeats == 4  # 1 + 2 + 3 + 4 seconds
    assert found.median == 2.5
    found = measure(work, warmup=0, repeats=2, min_seconds=0.0, clock=world.clock)
    assert (found.repeats, found.median) == (2, 5.5)


def test_rows_hold_seconds_per_batch_and_per_image() -> None:
    world = World()
    contenders = [world.worker("a", 1.0, 0.5), world.worker("b", 0.0, 0.25)]
    rows = bench(
        contenders,
        torch.rand(3, 1, 2, 2),
        batch_sizes=(1, 8),
        rounds=5,
        max_seconds=100.0,
        clock=world.clock,
    )
    assert [(row.name, row.batch_size) for row in rows] == [("a", 1), ("b", 1), ("a", 8), ("b", 8)]
    assert [row.timing.median for row in rows] == pytest.approx([1.5, 0.25, 5.0, 2.0])
    assert [row.timing.repeats for row in rows] == [5, 5, 5, 5]
    assert rows[2].seconds_per_image == pytest.approx(5.0 / 8)
    assert rows[2].images_per_second == pytest.approx(8 / 5.0)


def test_contenders_take_turns_and_nobody_always_goes_first() -> None:
    world = World()
    contenders = [world.worker(name, 1.0) for name in "abc"]
    bench(
        contenders, torch.rand(1, 1, 2, 2), batch_sizes=(1,), warmup=1, rounds=4, clock=world.clock
    )
    order = "".join(name for name, _ in world.log)
    assert order == "abc" + "abc" + "bca" + "cab" + "abc"


def test_slow_contenders_are_measured_less_often_but_three_times() -> None:
    world = World()
    contenders = [
        world.worker("quick", 0.01),
        world.worker("slow", 1.0),
        world.worker("endless", 60.0),
    ]
    rows = bench(
        contenders,
        torch.rand(1, 1, 2, 2),
        batch_sizes=(1,),
        warmup=1,
        rounds=20,
        max_seconds=5.5,
        clock=world.clock,
    )
    assert [row.timing.repeats for row in rows] == [20, 5, 3]
    measured = [name for name, _ in world.log[3:]]
    places = [index for index, name in enumerate(measured) if name == "endless"]
    assert places[1] - places[0] > 5 and places[2] - places[1] > 5  # spread over the rounds


def test_a_disturbance_hits_everybody() -> None:
    """The machine is twice as slow for the second half: the ratio does not notice."""
    world = World()

    def worker(name: str, cost: float) -> Contender:
        def run(images: Tensor) -> None:
            world.log.append((name, len(images)))
            world.now += cost * (2.0 if len(world.log) > 22 else 1.0)

        return Contender(name, run)

    rows = bench(
        [worker("a", 1.0), worker("b", 4.0)],
        torch.rand(1, 1, 2, 2),
        batch_sizes=(1,),
        warmup=1,
        rounds=20,
        max_seconds=1e9,
        clock=world.clock,
    )
    assert ratios(rows, "b")[0].speedup == pytest.approx(4.0)


def test_ratios_and_their_spread() -> None:
    def row(name: str, size: int, q25: float, median: float, q75: float) -> BenchRow:
        return BenchRow(name, size, Timing(median, q25, q75, q75, 9))

    rows = [
        row("teacher", 1, 9.0, 10.0, 12.0),
        row("student", 1, 1.0, 2.0, 4.0),
        row("teacher", 64, 100.0, 100.0, 100.0),
        row("student", 64, 50.0, 50.0, 50.0),
    ]
    small, large = ratios(rows, "teacher")
    assert (small.name, small.batch_size) == ("student", 1)
    assert (small.speedup, small.low, small.high) == (5.0, 9.0 / 4.0, 12.0)
    assert (large.batch_size, large.speedup, large.low, large.high) == (64, 2.0, 2.0, 2.0)
    assert ratios(rows, "student")[0].speedup == pytest.approx(0.2)
    with pytest.raises(DataError, match="'nobody'"):
        ratios(rows, "nobody")
    with pytest.raises(DataError, match=r"\[64\]"):
        ratios(rows[:2] + rows[3:], "teacher")


def test_bad_requests_are_refused() -> None:
    world, images = World(), torch.rand(1, 1, 2, 2)
    twin = [world.worker("a", 1.0), world.worker("a", 1.0)]
    for contenders, pool, sizes in (
        ([], images, (1,)),
        (twin, images, (1,)),
        (twin[:1], images[:0], (1,)),
        (twin[:1], images, (0,)),
        (twin[:1], images, ()),
    ):
        with pytest.raises(DataError, match="expected"):
            bench(contenders, pool, batch_sizes=sizes, clock=world.clock)


def test_batches_repeat_the_images() -> None:
    images = torch.arange(3.0).reshape(3, 1, 1, 1)
    seen: list[Tensor] = []
    bench([Contender("a", seen.append)], images, batch_sizes=(5,), warmup=1, rounds=3)
    assert seen[0].flatten().tolist() == [0, 1, 2, 0, 1]
    assert seen[0].shape == (5, 1, 1, 1)


def test_a_torch_contender_is_a_copy_in_eval_and_inference_mode() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    contender = torch_contender(model, "net")
    images = torch.rand(3, 1, 2, 2)
    answer = contender.run(images)
    assert isinstance(answer, Tensor) and answer.is_inference()
    assert torch.equal(answer, model.eval()(images))
    assert contender.name == "net"
    assert model.train() and model[1].num_batches_tracked.item() == 0


def test_hardware_and_json(tmp_path: Path) -> None:
    facts = hardware()
    assert facts["cpu"] and facts["cores"] >= 1
    assert facts["torch_threads"] == torch.get_num_threads()
    assert facts["torch"] == str(torch.__version__) and facts["onnxruntime"]
    rows = [
        BenchRow("a", 2, Timing(4.0, 3.0, 5.0, 6.0, 7)),
        BenchRow("b", 2, Timing(1, 1, 1, 1, 3)),
    ]
    content = json.loads(json.dumps(to_json(rows, "a"), allow_nan=False))
    assert content["hardware"] == facts
    assert content["rows"][0]["seconds_per_image"] == 2.0
    assert content["rows"][0]["seconds_per_batch"]["q75"] == 5.0
    assert content["reference"] == "a"
    assert content["ratios"] == [
        {"name": "b", "batch_size": 2, "speedup": 4.0, "low": 3.0, "high": 5.0}
    ]
    assert "ratios" not in to_json(rows)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name\t: A CPU @ 2: fast\nmodel name : other\n")
    assert _cpu_name(cpuinfo) == "A CPU @ 2: fast"
    assert _cpu_name(tmp_path / "none")
