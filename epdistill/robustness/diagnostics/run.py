"""`diagnose`: the 26 checks on one subject, in an order in which each can use the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks import expectation
from epdistill.robustness.diagnostics import (
    blackbox,
    controls,
    equilibrium,
    gradients,
    numerics,
    optimisation,
)
from epdistill.robustness.diagnostics.catalogue import BY_NUMBER, CATALOGUE, Check
from epdistill.robustness.diagnostics.findings import Diagnosis, Finding, Outcome
from epdistill.robustness.diagnostics.probe import Probe
from epdistill.robustness.diagnostics.settings import DiagnosticSettings
from epdistill.robustness.guards import check_images, check_logits, derive_seed, evaluation_mode
from epdistill.robustness.subjects import MeanAnswer, Predict, Subject
from epdistill.robustness.units import Progress, own_rng

Run = Callable[[Probe], Outcome]

# The answer of a subject that answers at random is the mean over so many draws.
DRAWS = 20

RUNS: dict[int, Run] = {
    1: numerics.determinism,
    2: numerics.logits_are_logits,
    3: numerics.shift_invariance,
    4: gradients.alive_gradients,
    5: gradients.fidelity,
    6: numerics.inference_loop,
    7: numerics.class_count,
    8: optimisation.one_step,
    9: blackbox.square,
    10: blackbox.hard_label,
    11: blackbox.random_noise,
    12: optimisation.unbounded,
    13: optimisation.budget_curve,
    14: optimisation.step_convergence,
    15: optimisation.complete_optimisation,
    16: optimisation.restarts_and_steps,
    17: optimisation.silent_success,
    18: gradients.smoothness,
    19: optimisation.diverse_objectives,
    20: blackbox.transfer,
    22: numerics.validity,
    24: equilibrium.attack_horizon,
    25: equilibrium.equilibrium,
    26: equilibrium.saturation,
}
# 21 puts together what the others tried, so it comes last.
ORDER = (*(number for number in range(1, 27) if number != 21), 21)


def diagnose(
    subject: Subject,
    images: Tensor,
    labels: Tensor,
    *,
    settings: DiagnosticSettings = DiagnosticSettings(),
    seed: int,
    rivals: Sequence[Subject] = (),
    control: nn.Module | None = None,
    claimed: float | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Look for signs that a subject's gradients mislead the attacks on it.

    Args:
        subject: Judged by `predict`, attacked on `views`. Without views (an exported file)
            the checks that need gradients are skipped.
        images: (N,C,H,W), uint8 or floating point in [0,1].
        labels: (N,) int64, the true classes.
        settings: Budgets and thresholds.
        seed: Fixes everything random; the global generators are left as they were.
        rivals: Other models for the same labels, whose adversarial examples are tried on the
            subject (a teacher and its students, a net trained otherwise).
        control: A plain net that must break (check 23); fitted to the images without it.
        claimed: The accuracy an evaluation quotes for these images at `settings.eps` in
            Linf, compared in check 21; give `settings.eps` with it.
        progress: Called with what is being done, the checks done, and 26.

    Returns:
        26 rows and a verdict, which is never "robust".

    Raises:
        EvaluationError: Images or labels that cannot be used, or a model that cannot be
            judged at all.
    """
    if claimed is not None and (settings.eps is None or not 0 <= claimed <= 1):
        raise EvaluationError(
            f"received claimed = {claimed} and settings.eps = {settings.eps}; expected an "
            "accuracy from 0 to 1 together with the radius it was measured at"
        )
    chosen, truth = _choose(images, labels, settings.images, seed)
    steady, draw = _steady(subject, derive_seed(seed, "diagnosis", "draws"))
    modules = [module for one in (subject, steady, *rivals) for module in one.modules]
    modules += [] if control is None else [control]
    devices = [one.device for one in (subject, *rivals)]
    own = own_rng(devices, derive_seed(seed, "diagnosis", "models"))
    with own, evaluation_mode(modules):
        device = subject.device
        probe = Probe(
            steady,
            chosen.to(device),
            truth.to(device),
            settings,
            seed,
            tuple(rivals),
            claimed,
            draw,
        )
        # A model that cannot even answer clean images is no case for a diagnosis.
        check_logits(probe.logits, probe.n, probe.labels)
        rows = {}
        for done, number in enumerate(ORDER):
            check = BY_NUMBER[number]
            if progress is not None:
                progress(f"{subject.name}: {check.name}", done, len(ORDER))
            rows[number] = _finding(check, _run(check, probe, control))
        if progress is not None:
            progress(f"{subject.name}: diagnosed", len(ORDER), len(ORDER))
    white = bool(subject.views)
    return Diagnosis(
        subject.name,
        subject.kind,
        tuple(rows[check.number] for check in CATALOGUE),
        probe.n,
        int((~probe.clean_wrong).sum()),
        probe.eps if white else None,
        int((~probe.reported[0]).sum()) if white else None,
        int((~probe.worst).sum()) if white else None,
        settings,
        seed,
    )


def _run(check: Check, probe: Probe, control: nn.Module | None) -> Outcome:
    if check.needs == "gradients" and not probe.views:
        return numerics.skipped(
            "the subject has no gradients; diagnose the model it was made from as well"
        )
    if check.needs == "teacher" and (probe.teacher is None or not probe.views):
        return numerics.skipped(equilibrium.NOT_A_TEACHER)
    try:
        if check.number == 23:
            return controls.positive_controls(probe, control or _control(probe))
        if check.number == 21:
            return blackbox.aggregation(probe)
        return RUNS[check.number](probe)
    except EvaluationError as error:
        return numerics.run_or_explain(error)


def _control(probe: Probe) -> nn.Module:
    return controls.plain_control(
        probe.images,
        probe.labels,
        probe.classes,
        seed=probe.seed,
        steps=probe.settings.control_steps,
    )


def _finding(check: Check, outcome: Outcome) -> Finding:
    return Finding(check, outcome.status, outcome.value, outcome.detail, outcome.table)


def _steady(subject: Subject, seed: int) -> tuple[Subject, Predict | None]:
    """A stochastic subject in the mean, and its single draws; others as they are."""
    if not subject.stochastic:
        return subject, None
    views = {name: expectation(view, DRAWS, seed=seed) for name, view in subject.views.items()}
    steady = replace(subject, predict=MeanAnswer(subject.predict, DRAWS), views=views)
    return steady, subject.predict


def _choose(images: Tensor, labels: Tensor, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """At most `most` images as float32 in [0,1] with their labels, in their order."""
    if images.dtype == torch.uint8:
        images = images.float() / 255
    check_images(images, labels)
    if len(images) == 0:
        raise EvaluationError("received no images; expected at least one to diagnose with")
    if len(images) > most:
        generator = torch.Generator().manual_seed(derive_seed(seed, "diagnosis", "images"))
        rows = torch.randperm(len(images), generator=generator)[:most].sort().values
        images, labels = images[rows.to(images.device)], labels[rows.to(labels.device)]
    return images.detach().float(), labels.detach()
