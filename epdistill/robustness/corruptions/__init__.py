"""CIFAR-10-C's corruptions: 15 types and 4 extras, seeded, for any size, grey and colour.

The family is called `cifar10c-style`: the constants are those of Hendrycks and
Dietterich's `make_cifar_c.py` (ICLR 2019), but the published arrays cannot be
reproduced from it (it never seeds, and its results depend on third-party
builds), so numbers from here are comparable among themselves only. The published
arrays themselves are read by `cifar10c`, a family of its own.

Differences from the script: results are rounded to 8 bits where it truncates;
what it rounds on the way (glass blur, snow, spatter) stays in floating point;
motion blur follows ImageMagick's algorithm without ImageMagick; frost is grown,
not photographed; spatter's outlines are not Canny's.

Sizes. The constants hold at 32x32. At any other size, lengths that the script
writes in pixels stay in pixels (the blurs, snow's streaks, spatter's drops, frost's
ferns), so a larger picture is disturbed on a finer scale; what it writes as a
share follows the image (zoom, elastic, pixelate, fog's clouds).

Grey. Types that treat the channels alike act on the one channel. Types that have a
colour (frost, spatter, saturate) act on three equal channels, and the result is
their luma; saturate therefore changes a grey image at severities 4 and 5 only.

Severity. The constants were chosen by the harm they do, not by a distance: the
root-mean-square change grows with the severity for 13 types, and not throughout for
glass_blur, motion_blur, frost, elastic_transform, spatter and saturate.

Cost. The 95 variants of 10,000 colour images of 32x32 take less than a minute of one
core's time (jpeg_compression, spatter, shot_noise and zoom_blur most, about a second
each); `variants(images, seed=0, workers=2)` makes them on two.

The sheet of the documentation, docs/corruptions.png:

    test = load("cifar10", download=True).test
    contact_sheet(test.images[10], Path("docs/corruptions.png"), seed=0)

registry      names, constants, `@corruption`
blocks        `corrupt`
variants      `corrupt` for all types and severities, on several cores
noise, blur, weather, colour, geometry, liquid    the types
operators     separable operations and motion blur, shared by them
frost_plates  the textures of frost
sheet         all of them in one picture
cifar10c      the published arrays
"""

from __future__ import annotations

from epdistill.robustness.corruptions.blocks import block_length, corrupt
from epdistill.robustness.corruptions.blur import (
    defocus_blur,
    gaussian_blur,
    glass_blur,
    motion_blur,
    zoom_blur,
)
from epdistill.robustness.corruptions.colour import brightness, contrast, saturate
from epdistill.robustness.corruptions.geometry import (
    elastic_transform,
    jpeg_compression,
    pixelate,
)
from epdistill.robustness.corruptions.liquid import spatter
from epdistill.robustness.corruptions.noise import (
    gaussian_noise,
    impulse_noise,
    shot_noise,
    speckle_noise,
)
from epdistill.robustness.corruptions.registry import (
    CORRUPTIONS,
    EXTRA,
    FAMILY,
    MAIN,
    SEVERITIES,
    SMALLEST,
    Corrupt,
    Corruption,
    check_corruption,
    corruption,
)
from epdistill.robustness.corruptions.sheet import contact_sheet
from epdistill.robustness.corruptions.variants import variants
from epdistill.robustness.corruptions.weather import fog, frost, snow

__all__ = [
    "CORRUPTIONS",
    "EXTRA",
    "FAMILY",
    "MAIN",
    "SEVERITIES",
    "SMALLEST",
    "Corrupt",
    "Corruption",
    "block_length",
    "brightness",
    "check_corruption",
    "contact_sheet",
    "contrast",
    "corrupt",
    "corruption",
    "defocus_blur",
    "elastic_transform",
    "fog",
    "frost",
    "gaussian_blur",
    "gaussian_noise",
    "glass_blur",
    "impulse_noise",
    "jpeg_compression",
    "motion_blur",
    "pixelate",
    "saturate",
    "shot_noise",
    "snow",
    "spatter",
    "speckle_noise",
    "variants",
    "zoom_blur",
]

# In the published order, whatever the order of the imports above.
for _name in (*MAIN, *EXTRA):
    CORRUPTIONS[_name] = CORRUPTIONS.pop(_name)
