"""What tests share: a small trained net and digits it gets right; a recipe to ablate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from epdistill.recipes import Recipe, load_recipe

# The smallest recipe that an ablation can be made of.
ABLATION = """
[data]
name = "digits"
[teacher]
channels = [4, 6]
init_scale = 2.0
batch_size = 256
epochs = 1
[baselines.adv_cnn]
steps = 1
batch_size = 256
epochs = 1
[student]
name = "cnn"
batch_size = 256
epochs = 1
[evaluate]
steps = 1
queries = 1
[ablate]
deciding = ["ce"]
seeds = 2
limit = 5
linf = [0.02, 0.1]
l2 = [0.3]
"""


@pytest.fixture(scope="session")
def all_digits() -> tuple[Tensor, Tensor]:
    """1797 images (N,1,8,8) in [0,1] and their labels; the net is trained on the first 500."""
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    return images, torch.tensor(data.target, dtype=torch.int64)


@pytest.fixture(scope="session")
def trained(all_digits: tuple[Tensor, Tensor]) -> nn.Module:
    """A small convnet with BatchNorm and Dropout, over 85 % on digits it has not seen."""
    images, labels = all_digits
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(256, 10),
        )
        optimiser = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(40):
            optimiser.zero_grad()
            F.cross_entropy(net(images[:500]), labels[:500]).backward()
            optimiser.step()
        optimiser.zero_grad()
    return net.eval()


@pytest.fixture(scope="session")
def unseen(trained: nn.Module, all_digits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """500 unseen digits that the net gets right."""
    images, labels = (part[1000:] for part in all_digits)
    right = trained(images).argmax(1) == labels
    return images[right][:500], labels[right][:500]


@pytest.fixture(scope="session")
def batch(unseen: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The first 64 of them."""
    return unseen[0][:64], unseen[1][:64]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with it."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(ABLATION)
    return path


@pytest.fixture(scope="session")
def base(tiny: Path) -> Recipe:
    """The recipe itself."""
    return load_recipe(str(tiny), environment={})
