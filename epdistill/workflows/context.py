"""What every command shares: where runs lie, where tensors live, who is told."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from epdistill import __version__
from epdistill.console import Reporter
from epdistill.data import DataSet, describe, load
from epdistill.distributed import ALONE, Team
from epdistill.errors import RecipeError, RunError
from epdistill.memory import keep_freed_memory
from epdistill.recipes import DataRecipe
from epdistill.runs import CONFIG, Run, open_run
from epdistill.tracking import Track
from epdistill.tracking import check as check_trackers

DEFAULT_RUNS = Path("runs")


@dataclass(frozen=True)
class Context:
    """Settings that mean the same for every command.

    Attributes:
        runs: Folder of all runs.
        data_root: Where downloaded data sets lie; None for the library's default.
        download: Whether a missing data set may be fetched.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        reporter: Where progress goes.
        team: The processes that do the work together; rank 0 writes.
        track: Who else is told the figures of a training: `"tensorboard"` or trackers.
    """

    runs: Path = DEFAULT_RUNS
    data_root: Path | None = None
    download: bool = False
    device: str = "auto"
    reporter: Reporter = field(default_factory=Reporter)
    team: Team = ALONE
    track: tuple[Track, ...] = ()

    def __post_init__(self) -> None:
        check_trackers(self.track)
        keep_freed_memory()

    def torch_device(self) -> torch.device:
        """The device asked for.

        Raises:
            RecipeError: It is unknown or absent.
        """
        if self.device == "auto":
            return _ready(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise RecipeError(f"device {self.device!r}; expected auto, cpu or cuda") from error
        if device.type not in ("cpu", "cuda"):
            raise RecipeError(f"device {self.device!r}; expected auto, cpu or cuda")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RecipeError(f"device {self.device!r}, but torch sees no GPU; use --device cpu")
        return _ready(device)

    def load_data(self, recipe: DataRecipe, seed: int) -> DataSet:
        """The data set of a recipe."""
        return load(
            recipe.name,
            root=self.data_root,
            download=self.download,
            image_size=recipe.image_size,
            validation_fraction=recipe.validation_fraction,
            seed=seed,
            stream=recipe.stream,
            workers=recipe.workers,
        )

    def data_of(self, run: Run, how: DataRecipe | None = None) -> DataSet:
        """The data set a run was trained on, checked to be the same test images.

        Args:
            run: The run.
            how: Says how it is read, streamed or not; the run's own recipe without it.

        Raises:
            RunError: The files hold other images than those the run was trained with.
        """
        note = run.config["data"]
        streamed = how or DataRecipe(**run.config.get("recipe", {}).get("data", {}))
        root = self.data_root or (Path(note["root"]) if note["root"] else None)
        data = load(
            note["name"],
            root=root,
            download=self.download,
            image_size=note["image_size"],
            validation_fraction=note["validation_fraction"],
            seed=note["seed"],
            limit=note["limit"],
            stream=streamed.stream,
            workers=streamed.workers,
        )
        if describe(data)["test_sha256"] != note["test_sha256"]:
            raise RunError(
                f"{note['name']} now holds other test images than {run.path} was trained beside; "
                "expected the same files: restore them, or train again"
            )
        return data


def _ready(device: torch.device) -> torch.device:
    """A device on which the same seed gives the same result again, as far as torch can.

    An operation of which torch has no repeatable version warns and goes on.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        # To fill what is overwritten anyway would cost a pass over memory each time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return device


def now() -> str:
    """The present time, ISO 8601 with microseconds, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def gpu_name(device: torch.device | None) -> str | None:
    """What the GPU is called; None on a processor."""
    on_gpu = device is not None and device.type == "cuda"
    return torch.cuda.get_device_name(device) if on_gpu else None


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions and hardware facts that belong to a result.

    Args:
        device: Where it was computed; the processor without it.
    """
    from epdistill.export.bench import hardware

    return {
        "epdistill": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **hardware(),
        "gpu": gpu_name(device),
    }


def require_finished(run: Run) -> Run:
    """The run itself, if its training ended.

    Raises:
        RunError: It did not.
    """
    if not run.config.get("finished"):
        raise RunError(
            f"{run.path} is not finished; expected a finished run: "
            f"continue it with --resume --out {run.path}"
        )
    return run


def unfinished_run(context: Context, out: Path | None, kind: str) -> Run:
    """The run that `--resume` continues: `out`, or the newest unfinished one of a kind.

    Raises:
        RunError: There is none.
    """
    if out is not None:
        run = open_run(out, kind)
        if run.config.get("finished"):
            raise RunError(f"{out} is finished; expected an unfinished run to --resume")
        return run
    found = []
    if context.runs.is_dir():
        for entry in context.runs.iterdir():
            if (entry / CONFIG).is_file():
                try:
                    run = open_run(entry, kind)
                except RunError:
                    continue
                if not run.config.get("finished"):
                    found.append(run)
    if not found:
        raise RunError(f"no unfinished {kind} run under {context.runs}; expected one to --resume")
    return max(found, key=lambda run: (run.config["created"], run.name))
