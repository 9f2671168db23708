"""Who falls to images crafted on whom."""

from __future__ import annotations

from typing import Any

from epdistill.robustness.outcomes import TRANSFER, Evaluation, SubjectOutcome, broken_by
from epdistill.robustness.shares import share


def transfer_matrix(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Accuracy of each target under the images crafted on each source, per norm and radius.

    On the diagonal stand a subject's own white box attacks at that radius or a smaller one.
    Subjects without gradients are targets only.

    Args:
        evaluation: What `evaluate` returned.

    Returns:
        Rows of `source`, `target`, `norm`, `eps`, `accuracy`, `ci95`, `n`, in the order of
        radii, targets and sources; none for a single subject.
    """
    rows: list[dict[str, Any]] = []
    for target in evaluation.subjects:
        sent = [row for row in target.attacks if row.attack == TRANSFER]
        for row in sent:
            case = {"source": row.view, "target": target.name, "norm": row.norm, "eps": row.eps}
            rows.append({**case, **share(row.success)})
        for norm, eps in dict.fromkeys((row.norm, row.eps) for row in sent):
            own = _white(target, norm, eps)
            if own is not None:
                case = {"source": target.name, "target": target.name, "norm": norm, "eps": eps}
                rows.append({**case, **own})
    order = {subject.name: number for number, subject in enumerate(evaluation.subjects)}
    return sorted(
        rows,
        key=lambda row: (
            row["norm"] != "linf",
            row["eps"],
            order[row["target"]],
            order[row["source"]],
        ),
    )


def _white(subject: SubjectOutcome, norm: str, eps: float) -> dict[str, Any] | None:
    rows = [row for row in subject.attacks if row.view and row.attack != TRANSFER]
    if not any((row.norm, row.eps) == (norm, eps) for row in rows):
        return None
    n = len(subject.clean_wrong)
    return share(subject.clean_wrong | broken_by(rows, norm, eps, n))
