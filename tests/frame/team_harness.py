"""One process of a team (or alone): evaluates the models of `test_harness_resume.py`.

python team_harness.py OUT    started once per rank, with torchrun's environment
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch

from epdistill.launch import join
from epdistill.robustness.harness import evaluate
from epdistill.robustness.results import summary
from epdistill.robustness.rows import csv_text
from epdistill.robustness.subjects import Horizons, Subject, module_subject
from epdistill.workflows.context import Context
from epdistill.workflows.request import open_together


def main(out: Path) -> None:
    torch.set_num_threads(1)
    team = join()
    where = Path(__file__).with_name("test_harness_resume.py")
    spec = importlib.util.spec_from_file_location("models", where)
    assert spec is not None and spec.loader is not None
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8, generator=generator)
    net, calls = models.linear(1), []
    clean = net(images.float() / 255).argmax(dim=1)
    settles = Horizons(models.linear, lambda n: models.linear(n + 5), lambda x: (x, x))
    teacher = Subject(
        "teacher", "teacher", models.asked(net, calls), {"implicit": net}, horizons=settles
    )
    noisy = module_subject("noisy", "control", models.Noisy(models.linear(2)), stochastic=True)
    resumed = out / "results" if (out / "results" / "journal.jsonl").is_file() else None
    folder, journal = open_together(
        models.HEADER, Context(runs=out, team=team), out / "results", resumed
    )
    with journal:
        found = evaluate(
            [teacher, noisy], images, clean, suite=models.SUITE, limit=13, batch_size=5,
            journal=journal, team=team,
        )  # fmt: skip
    told = {"csv": csv_text(found), "summary": summary(found), "calls": len(calls)}
    (out / f"rank{team.rank}.json").write_text(json.dumps({**told, "folder": str(folder)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
