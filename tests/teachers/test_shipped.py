"""The teacher that comes with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from epdistill.errors import RunError
from epdistill.teachers import pretrained


def test_it_settles_and_says_what_it_is() -> None:
    teacher, config = pretrained.shipped_teacher()
    channels = [layer.channels for layer in teacher.architecture.layers]
    assert channels == [32, 64, 128, 128]
    assert config["recipe"]["data"]["name"] == "cifar10"
    assert 0.4 < config["results"]["accuracy"] < 1
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    certificate = teacher.relax(images).certificate
    assert bool(certificate.converged.all())
    assert teacher(images).shape == (4, 10)


def test_it_is_a_run_like_any_other() -> None:
    """Whoever evaluates it gets its card."""
    from epdistill.runs import open_run
    from epdistill.workflows.cards import card

    folder = Path(pretrained.__file__).parent / pretrained.FOLDER
    words = card(open_run(folder, "teacher"))
    assert "242,122" in words and "published test accuracy on cifar10, full size | 0.88" in words


def test_a_damaged_copy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Digest:
        def hexdigest(self) -> str:
            return "0" * 64

    monkeypatch.setattr(pretrained.hashlib, "sha256", lambda _: Digest())
    with pytest.raises(RunError, match="install epdistill again"):
        pretrained.shipped_teacher()


def test_its_name_means_it_unless_there_is_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from epdistill.recipes import load_recipe
    from epdistill.workflows.ablation_plan import plan_for
    from epdistill.workflows.ablation_work import adopt

    monkeypatch.chdir(tmp_path)
    folder = Path(pretrained.__file__).parent / pretrained.FOLDER
    assert pretrained.named(Path("shipped")) == folder
    assert pretrained.named(Path("other")) == Path("other")
    # It stands for the teacher that cifar10-small teaches.
    plan = plan_for(load_recipe("cifar10-small", environment={}), ["ce"], 1)
    assert list(adopt([Path("shipped")], plan).values()) == [folder.absolute()]
    (tmp_path / "shipped").mkdir()
    assert pretrained.named(Path("shipped")) == Path("shipped")
