"""results.json as rows of text."""

from __future__ import annotations

from epdistill.robustness.tables import diagnosis_rows, horizon_rows

CHECK = {"number": 4, "name": "gradients", "threshold": "no gradient", "table": []}
FOUND = {
    "checks": [
        {**CHECK, "status": "PASS", "value": 0.0, "detail": "none of 9", "todo": "smoothe"},
        {**CHECK, "status": "FAIL", "value": 0.515625, "detail": "2 of 9", "todo": "smoothe"},
        {
            **CHECK,
            "status": "not applicable",
            "value": None,
            "detail": "nothing relaxes",
            "todo": "smoothe",
            "table": [{"name": "implicit", "accuracy": 0.5, "ci95": [0.25, 0.75], "n": 9}],
        },
    ]
}


def test_what_to_do_is_said_only_where_something_is_wrong() -> None:
    """One row per check; values are rounded, and a missing one is a dash."""
    assert diagnosis_rows(FOUND) == [
        ["4 gradients", "PASS", "0", "no gradient", ""],
        ["4 gradients", "FAIL", "0.516", "no gradient", "2 of 9: smoothe"],
        ["4 gradients", "not applicable", "-", "no gradient", ""],
    ]


def test_gradients_side_by_side_with_their_interval() -> None:
    """The table of the check that has one; no rows for a model that does not relax."""
    assert horizon_rows(FOUND) == [["implicit", "50.0 (25.0-75.0)"]]
    assert horizon_rows({"checks": FOUND["checks"][:2]}) == []
