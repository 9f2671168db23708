"""Does the robustness come from the model, or from gradients that mislead the attacks?

catalogue     the 26 checks: names, thresholds, remedies
settings      every budget
findings      rows, verdict, and what it does not prove
probe         one subject, its images, and attacks that are run only once
losses, climbing   what attacks climb, and an ascent that keeps its history
numerics      checks on the answers
gradients     checks on the gradients
optimisation  checks on how well the attack was optimised
blackbox      checks against attacks that need no gradient
equilibrium, softened   checks on EP-CNNs
controls      a plain net that must break, a gradient killer that must be caught
run           `diagnose`
"""

from epdistill.robustness.diagnostics.controls import GradientKiller, plain_control
from epdistill.robustness.diagnostics.findings import Diagnosis, Finding
from epdistill.robustness.diagnostics.run import diagnose
from epdistill.robustness.diagnostics.settings import DiagnosticSettings

__all__ = [
    "Diagnosis",
    "DiagnosticSettings",
    "Finding",
    "GradientKiller",
    "diagnose",
    "plain_control",
]
