"""Pictures of an evaluation: each function draws plain data on a figure, `save` writes it.

style         the house style: fonts, colours, looks of models, panels, legends, and `save`
inputs        what is refused before anything is drawn
cells         heat maps whose numbers can be read
accuracy      accuracy over the radius or over sweeps, with Wilson's intervals
corruption    accuracy by corruption and severity
temporal      attack horizon against prediction horizon
grid          adversarial images beside their originals
transfer      adversarial images of one model tried on another
uncertainty   the uncertainty exponent of the basins

    save(accuracy_curves({"teacher": rows}, "linf"), folder / "accuracy-linf")
"""

from epdistill.robustness.pictures.accuracy import accuracy_curves, sweep_curves
from epdistill.robustness.pictures.corruption import corruption_heat_map
from epdistill.robustness.pictures.grid import adversarial_grid
from epdistill.robustness.pictures.style import save
from epdistill.robustness.pictures.temporal import temporal_heat_map
from epdistill.robustness.pictures.transfer import transfer_matrix
from epdistill.robustness.pictures.uncertainty import uncertainty_plot

__all__ = [
    "accuracy_curves",
    "adversarial_grid",
    "corruption_heat_map",
    "save",
    "sweep_curves",
    "temporal_heat_map",
    "transfer_matrix",
    "uncertainty_plot",
]
