"""The gate lets rounding pass and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from epdistill.errors import DataError, ParityError
from epdistill.export.parity import ATOL, BATCH_SIZES, K, check_parity

Array = npt.NDArray[np.float32]


def small_net() -> nn.Module:
    """A conv+BN net whose running statistics differ from what any batch would give."""
    generator = torch.Generator().manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 4 * 4, 5),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        net[1].running_mean.copy_(torch.randn(6, generator=generator))
        net[1].running_var.copy_(torch.rand(6, generator=generator) + 0.5)
    return net


def images(n: int = 20) -> Tensor:
    return torch.rand((n, 3, 8, 8), generator=torch.Generator().manual_seed(4))


def runner(net: nn.Module) -> Callable[[Array], Array]:
    """The module itself in the place of a graph."""

    def run(batch: Array) -> Array:
        with torch.no_grad():
            answer: Array = net(torch.from_numpy(batch)).numpy()
        return answer

    return run


def test_the_module_itself_passes_and_the_report_is_complete() -> None:
    net = small_net().eval()
    report = check_parity(net, runner(net), images(), seed=0)
    cases = {(row.case, row.batch_size) for row in report.rows}
    assert cases == {(c, b) for c in ("real", "noise", "extremes") for b in BATCH_SIZES}
    assert report.agreement == 1.0
    assert 0 < report.max_abs_error <= report.tolerance
    assert report.n == sum(row.n for row in report.rows)
    largest = {row.case: row.n for row in report.rows if row.batch_size == 64}
    assert largest == {"real": 20, "noise": 64, "extremes": 4}
    assert report.to_json()["rows"][0]["case"] == "real"


def test_the_bound_is_the_documented_one() -> None:
    net = small_net().eval()
    row = check_parity(net, runner(net), images(), seed=0).rows[0]
    double = small_net().eval().double()
    with torch.no_grad():
        exact = double(images().double())
    spread = float((exact.amax(1) - exact.amin(1)).max())
    assert row.tolerance == pytest.approx(K * row.float32_error + ATOL * spread)
    assert row.tolerance < 1e-3 * spread


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda a: a + np.float32(0.05) * np.abs(a).max(), "error"),
        (lambda a: a[:, ::-1].copy(), "error"),
        (lambda a: np.where(np.arange(a.shape[1]) == 1, np.float32(np.nan), a), "non-finite"),
        (lambda a: a[:, :-1], "shape"),
        (lambda a: a[:1], "shape"),
    ],
    ids=["shifted", "permuted", "nan", "class lost", "batch lost"],
)
def test_another_function_fails(wrong: Callable[[Array], Array], message: str) -> None:
    net = small_net().eval()
    run = runner(net)
    with pytest.raises(ParityError, match=message) as caught:
        check_parity(net, lambda batch: wrong(run(batch)), images(), seed=0)
    assert "images in batches of" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_train_mode_batch_norm_in_the_graph_fails() -> None:
    net, wrong = small_net().eval(), small_net().train()
    with pytest.raises(ParityError, match="real images in batches of"):
        check_parity(net, runner(wrong), images(), seed=0)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_an_answer_that_depends_on_the_batch_fails(batch_size: int) -> None:
    net = small_net().eval()
    run = runner(net)

    def moody(batch: Array) -> Array:
        return run(batch) * np.float32(1.01 if len(batch) == batch_size else 1.0)

    with pytest.raises(ParityError, match=f"real images in batches of {batch_size}:"):
        check_parity(net, moody, images(), seed=0)


def test_batches_must_agree_with_each_other_and_not_only_with_float64() -> None:
    net = small_net().eval()
    run = runner(net)
    bound = min(row.tolerance for row in check_parity(net, run, images(), seed=0).rows)

    def leaning(batch: Array) -> Array:
        return run(batch) + np.float32(0.7 * bound * (1 if len(batch) == 64 else -1))

    with pytest.raises(ParityError, match="difference to larger batches"):
        check_parity(net, leaning, images(), seed=0)


def test_a_fault_seen_only_on_extremes_is_found() -> None:
    net = small_net().eval()
    run = runner(net)

    def brittle(batch: Array) -> Array:
        black = (batch.max(axis=(1, 2, 3)) == 0)[:, None]
        return run(batch) + black.astype(np.float32)

    with pytest.raises(ParityError, match="extremes images"):
        check_parity(net, brittle, images(), seed=0)


def test_every_real_image_counts() -> None:
    net = small_net().eval()
    run = runner(net)
    pool = images(70)
    last = pool[-1].numpy()

    def wrong_on_the_last(batch: Array) -> Array:
        hit = np.array([np.array_equal(image, last) for image in batch])[:, None]
        return run(batch) + hit.astype(np.float32)

    with pytest.raises(ParityError, match="real images"):
        check_parity(net, wrong_on_the_last, pool, seed=0)


def test_ties_are_left_out_of_agreement() -> None:
    class Tied(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mean = x.mean((1, 2, 3))
            return torch.stack([mean, mean, mean - 1], dim=1)

    net = Tied()

    def run(batch: Array) -> Array:
        # The other of the two tied classes, by less than the bound.
        return runner(net)(batch) + np.array([0, 1e-6, 0], dtype=np.float32)

    report = check_parity(net, run, images(), seed=0)
    assert all(row.ties == row.n for row in report.rows)
    assert report.agreement == 1.0


def test_module_and_random_state_stay_as_they_were() -> None:
    net, run = small_net().train(), runner(small_net().eval())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = torch.get_rng_state()
    check_parity(net, run, images(), seed=0)
    assert net.training and all(module.training for module in net.modules())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_broken_model_is_named_as_the_culprit() -> None:
    net = small_net().eval()
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(ParityError, match="the model itself"):
        check_parity(net, runner(net), images(), seed=0)


@pytest.mark.parametrize(
    "bad",
    [
        torch.rand(2, 3, 8, 8).double(),
        torch.rand(3, 8, 8),
        torch.rand(0, 3, 8, 8),
        torch.rand(2, 3, 8, 8) * 255,
        torch.full((2, 3, 8, 8), torch.nan),
    ],
    ids=["float64", "3-D", "none", "0..255", "nan"],
)
def test_images_must_be_float32_in_the_unit_interval(bad: Tensor) -> None:
    net = small_net().eval()
    with pytest.raises(DataError, match="expected"):
        check_parity(net, runner(net), bad, seed=0)
