"""Operations are counted, not guessed; a compiler that is not there is said not to be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from epdistill.export.bench import Contender
from epdistill.export.costs import (
    MATRIX_FLOPS,
    MATRIX_SIDE,
    compiled_contender,
    flops_per_image,
    matrix_contender,
)


def test_flops_of_convolutions_and_products_are_those_of_the_textbook() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))
    expected = 2 * 8 * 8 * 8 * 3 * 9 + 2 * 512 * 5
    for batch in (1, 4):
        assert flops_per_image(net, torch.rand(batch, 3, 8, 8)) == expected


def test_a_gradient_is_counted_too() -> None:
    weight = torch.rand(6, 4)

    def forwards(images: Tensor) -> Tensor:
        return images @ weight

    def both(images: Tensor) -> object:
        x = images.clone().requires_grad_()
        return torch.autograd.grad(forwards(x).sum(), x)

    assert flops_per_image(forwards, torch.rand(3, 6)) == 2 * 6 * 4
    assert flops_per_image(both, torch.rand(3, 6)) == 2 * 2 * 6 * 4


def test_the_matrix_product_is_as_large_as_it_says() -> None:
    product = matrix_contender().run(torch.empty(0))
    assert isinstance(product, Tensor)
    assert product.shape == (MATRIX_SIDE, MATRIX_SIDE)
    assert MATRIX_FLOPS == 2 * MATRIX_SIDE**3


def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = compiled_contender(nn.Flatten(), "x", torch.rand(2, 1, 2, 2), (1,))
    assert isinstance(found, str) and "no-such-compiler" in found


def test_a_compiler_that_fails_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: nn.Module, *, dynamic: bool) -> nn.Module:
        class Fails(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                raise RuntimeError("no\nback end")

        return Fails()

    monkeypatch.setenv("CXX", "sh")
    monkeypatch.setattr(torch, "compile", broken)
    found = compiled_contender(nn.Flatten(), "x", torch.rand(2, 1, 2, 2), (1,))
    assert found == "torch.compile failed (no back end)"


@pytest.mark.slow
def test_a_compiled_student_answers_the_same() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    images = torch.rand(4, 1, 8, 8)
    found = compiled_contender(net, "compiled", images, (1, 4))
    if isinstance(found, str):
        pytest.skip(found)
    assert isinstance(found, Contender)
    answer = found.run(images)
    assert isinstance(answer, Tensor)
    torch.testing.assert_close(answer, net(images), rtol=1e-4, atol=1e-5)
