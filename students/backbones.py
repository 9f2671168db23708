"""Every backbone by name, and how a user's own becomes one.

A backbone takes normalised images and returns a list of feature maps, the last one
pooled to a single pixel; `tap` makes one of any network that torch.fx can trace:

    from torch import nn

    from epdistill.students.backbones import Request, register, tap

    @register("mine")
    def mine(request: Request) -> nn.Module:
        def block(below: int, above: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(below, above, 3, 2, 1), nn.BatchNorm2d(above), nn.ReLU())
        width = request.width or 16
        net = nn.Sequential(block(request.in_channels, width), block(width, 2 * width))
        return tap(net, request)

After that `mine` is the name of a student, in this process: `student.name = "mine"`.
"""

from __future__ import annotations

from torch import nn

# Importing them registers what they hold.
from epdistill.errors import EpdistillError, RecipeError
from epdistill.students import convnets as convnets
from epdistill.students.registry import (
    TORCHVISION,
    Request,
    Stages,
    hint,
    register,
    registered,
)
from epdistill.students.tapping import Tapped, tap
from epdistill.students.torchvision_nets import torchvision_net

_HOME = __name__.rpartition(".")[0] + "."

__all__ = ["Request", "Stages", "Tapped", "build", "bundled", "names", "register", "tap"]


def names() -> list[str]:
    """The registered backbones."""
    return sorted(registered())


def bundled(name: str) -> bool:
    """Whether a known backbone is one of this package or of torchvision, not a user's own."""
    home = getattr(registered().get(name), "__module__", None) or ""  # none where it was exec-uted
    return name.startswith(TORCHVISION) or home.startswith(_HOME)


def build(name: str, request: Request) -> nn.Module:
    """Build a backbone by name.

    Args:
        name: A registered name, or `torchvision:NAME`.
        request: What it is built for.

    Raises:
        RecipeError: The name is unknown, or the backbone cannot take such images.
    """
    builders = registered()
    if not name.startswith(TORCHVISION) and name not in builders:
        raise RecipeError(
            f"unknown student {name!r}{hint(name, builders)}; expected {', '.join(names())} or "
            f"{TORCHVISION}NAME"
        )
    try:
        if name.startswith(TORCHVISION):
            return torchvision_net(name.removeprefix(TORCHVISION), request)
        return builders[name](request)
    except EpdistillError:
        raise
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise cannot_take(name, request, error) from error


def cannot_take(name: str, request: Request, error: Exception) -> RecipeError:
    """The error for images that a backbone fails on."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    size = request.image_size
    return RecipeError(
        f"student {name} cannot take {size}x{size} images with {request.in_channels} channels "
        f"({reason}); choose another student, or resize with --image-size"
    )
