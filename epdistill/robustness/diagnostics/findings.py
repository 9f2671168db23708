"""What the checks found, and what may be concluded from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from epdistill.robustness.diagnostics.catalogue import FAIL, PASS, SKIP, WARN, Check, Status
from epdistill.robustness.diagnostics.settings import DiagnosticSettings
from epdistill.robustness.shares import accuracy

CLEAN_VERDICT = "no masking evidence found"
CAUTION = (
    "A passed list is not proof of robustness (Carlini et al. 2019): it only says that these "
    "attacks, with these budgets, found no sign that the gradients mislead."
)
# Below this share a difference between attacks is not reported (Carlini et al. 2019: 0.5 pp).
NEGLIGIBLE = 0.005

# Images that are right, of how many, under a name.
Table = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Outcome:
    """What one check measured: a status, a number or a text, one line about it, and figures."""

    status: Status
    value: float | str | None
    detail: str = ""
    table: Table = ()


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        check: Its number, name, threshold and remedy.
        status: `"PASS"`, `"WARN"`, `"FAIL"` or `"not applicable"`.
        value: What was measured; None where nothing was.
        detail: One line: the figures behind the value, or why it does not apply.
        table: For check 24: per gradient, and for the worst case over all, how many images are
            right, and of how many.
    """

    check: Check
    status: Status
    value: float | str | None
    detail: str
    table: Table = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; `todo` is None where nothing was flagged."""
        flagged = self.status in (WARN, FAIL)
        return {
            "number": self.check.number,
            "name": self.check.name,
            "value": self.value,
            "threshold": self.check.threshold,
            "status": self.status,
            "detail": self.detail,
            "todo": self.check.remedy if flagged else None,
            "table": [{"name": name, **accuracy(right, n)} for name, right, n in self.table],
        }


@dataclass(frozen=True)
class Diagnosis:
    """The 26 rows and the verdict on one subject.

    Attributes:
        subject: Its name.
        kind: Its kind.
        findings: One per check, in order.
        n: Images used.
        clean_correct: How many of them are right when clean.
        eps: Linf radius at which attacks were compared; None without gradients.
        reported_correct: Right under PGD, worst case per image over the views, at `eps`.
        worst_correct: Right under everything the diagnosis tried at `eps`.
        settings: Every budget.
        seed: Fixes everything random.
    """

    subject: str
    kind: str
    findings: tuple[Finding, ...]
    n: int
    clean_correct: int
    eps: float | None
    reported_correct: int | None
    worst_correct: int | None
    settings: DiagnosticSettings
    seed: int

    def with_status(self, status: Status) -> tuple[Finding, ...]:
        """The rows of one status."""
        return tuple(row for row in self.findings if row.status == status)

    @property
    def masking(self) -> bool:
        """Whether at least one check failed."""
        return bool(self.with_status(FAIL))

    @property
    def verdict(self) -> str:
        """One line; it never says "robust"."""
        failed = self.with_status(FAIL)
        if not failed:
            return CLEAN_VERDICT
        return "masking evidence: " + ", ".join(row.check.name for row in failed)

    @property
    def text(self) -> str:
        """The verdict, how much of the list was run, and what it does not prove."""
        count = {status: len(self.with_status(status)) for status in (PASS, WARN, FAIL, SKIP)}
        told = ", ".join(f"{number} {status}" for status, number in count.items())
        warned = ", ".join(row.check.name for row in self.with_status(WARN))
        parts = [f"{self.subject}: {self.verdict} ({told}; n = {self.n} images)."]
        if warned:
            parts.append(f"To look at: {warned}.")
        if count[SKIP]:
            parts.append("A check that does not apply says nothing either way.")
        return " ".join((*parts, CAUTION))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: verdict, text, rows, accuracies with Wilson intervals, every budget."""
        return {
            "subject": self.subject,
            "kind": self.kind,
            "verdict": self.verdict,
            "masking_evidence": self.masking,
            "text": self.text,
            "n": self.n,
            "seed": self.seed,
            "norm": "linf",
            "eps": self.eps,
            "clean": accuracy(self.clean_correct, self.n),
            "reported": self._attacked(self.reported_correct),
            "worst": self._attacked(self.worst_correct),
            "checks": [row.as_dict() for row in self.findings],
            "settings": self.settings.as_dict(),
        }

    def _attacked(self, correct: int | None) -> dict[str, Any] | None:
        return None if correct is None else accuracy(correct, self.n)


def grade(count: int, n: int, slack: float) -> Status:
    """The status of `count` of `n` images on which something beat the reported attack.

    A single image may be the optimiser's bad luck, so it warns and never fails.

    Args:
        count: Images, 0..n.
        n: All images of the comparison.
        slack: Share of `n` up to which it is a WARN.
    """
    if count == 0 or count / n <= NEGLIGIBLE:
        return PASS
    return WARN if count <= max(1.0, slack * n) else FAIL


def worst_status(*statuses: Status) -> Status:
    """The gravest of several."""
    order: tuple[Status, ...] = (SKIP, PASS, WARN, FAIL)
    return max(statuses, key=order.index)
