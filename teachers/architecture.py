"""The shape of an EP-CNN: layers, pools, activation, readout, and the rule that picks them.

Every layer is a convolution followed by an optional 2x2 pool; a fully connected
layer is the convolution whose kernel covers its whole input, so the dynamics
know a single kind of layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from epdistill.errors import RecipeError

Pool = Literal["max", "average", "none"]
Activation = Literal["half", "unit"]
Readout = Literal["cross-entropy", "mse"]

SMALLEST_IMAGE, LARGEST_IMAGE = 8, 224


@dataclass(frozen=True)
class LayerSpec:
    """One layer: `s_n = sigma(pool(W * s_{n-1} + b) + feedback)`.

    Attributes:
        channels: Output channels.
        kernel: Side of the square kernel, in pixels.
        stride: Stride of the convolution, in pixels.
        padding: Zero padding on each side, in pixels.
        pool: 2x2 pool of stride 2 after the convolution (`"none"` for no pool).
    """

    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: Pool = "max"

    def conv_size(self, size: int) -> int:
        """Side of the convolution's output for an input of side `size`."""
        return (size + 2 * self.padding - self.kernel) // self.stride + 1

    def out_size(self, size: int) -> int:
        """Side of the layer's state for an input of side `size`."""
        conv = self.conv_size(size)
        return conv if self.pool == "none" else conv // 2


@dataclass(frozen=True)
class Architecture:
    """Everything that fixes the shapes and the energy of an EP-CNN.

    Attributes:
        in_channels: Image channels, 1 or 3.
        image_size: Side of the square images, in pixels.
        layers: The layers from the image upwards. With the `"mse"` readout the
            last one is the settling output layer and has `classes` channels.
        classes: Number of classes.
        mean: Per-channel mean of the images in [0,1], subtracted inside the model.
        std: Per-channel divisor of the images, applied inside the model.
        activation: `"half"` is clip(h/2, 0, 1), with energy sum s^2 - Phi;
            `"unit"` is clip(h, 0, 1), with energy sum s^2/2 - Phi.
        readout: `"cross-entropy"`: a linear readout of the last state, outside
            the dynamics; `"mse"`: the last layer is itself the output and settles.
    """

    in_channels: int
    image_size: int
    layers: tuple[LayerSpec, ...]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    activation: Activation = "half"
    readout: Readout = "cross-entropy"

    def __post_init__(self) -> None:
        """Check that the layers fit the images.

        Raises:
            RecipeError: A layer's output would be empty, or the output layer is misshapen.
        """
        if not self.layers:
            raise RecipeError("an EP-CNN has no layers; expected at least one: set channels")
        for n, (_, height, _) in enumerate(self.shapes, start=1):
            if height < 1:
                raise RecipeError(
                    f"layer {n} has no pixels left for {self.image_size}x{self.image_size} images; "
                    "use fewer layers, more padding or larger images"
                )
        if self.readout == "mse" and self.shapes[-1] != (self.classes, 1, 1):
            raise RecipeError(
                f"the mse output layer has shape {self.shapes[-1]}; "
                f"expected ({self.classes}, 1, 1): one unit per class"
            )

    @property
    def curvature(self) -> float:
        """The `a` of E = a/2 ||s||^2 - Phi and of sigma(h) = clip(h/a, 0, 1)."""
        return 2.0 if self.activation == "half" else 1.0

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """The (channels, height, width) of each layer's state."""
        size, shapes = self.image_size, []
        for layer in self.layers:
            size = layer.out_size(size)
            shapes.append((layer.channels, size, size))
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `from_dict` reads it back."""
        return asdict(self)

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Architecture:
        """Read what `to_dict` wrote."""
        content = dict(content)
        content["layers"] = tuple(LayerSpec(**layer) for layer in content["layers"])
        content["mean"], content["std"] = tuple(content["mean"]), tuple(content["std"])
        return Architecture(**content)


def layers_for(
    image_size: int, *, width: int = 32, channels: Sequence[int] | None = None
) -> tuple[LayerSpec, ...]:
    """The documented rule from image size to layers.

    Every layer is a 3x3 convolution with padding 1 and a 2x2 max-pool, until
    the state is at most 4 pixels wide; one last layer without padding brings it
    to a single pixel. Images of 64 pixels and more start with stride 2. The
    channels are `width` doubled at every layer up to four times `width`.
    For 32 pixels this is the published network (states 16, 8, 4 and 1 wide).

    Args:
        image_size: Side of the images, 8 to 224 pixels.
        width: Channels of the first layer.
        channels: Channels of all layers instead of `width`; the count must fit the rule.

    Raises:
        RecipeError: The size is out of range, or `channels` has another length.
    """
    if not SMALLEST_IMAGE <= image_size <= LARGEST_IMAGE:
        raise RecipeError(
            f"image size {image_size}; expected {SMALLEST_IMAGE} to {LARGEST_IMAGE} pixels: "
            "resize with --image-size"
        )
    size = image_size
    strides: list[int] = []
    while size > 4:
        strides.append(2 if image_size >= 64 and not strides else 1)
        size = LayerSpec(1, stride=strides[-1]).out_size(size)
    depth = len(strides) + 1
    if channels is None:
        channels = [width * min(2**n, 4) for n in range(depth)]
    if len(channels) != depth:
        raise RecipeError(
            f"{len(channels)} channel counts {list(channels)} for {image_size}x{image_size} "
            f"images; expected {depth}"
        )
    body = [
        LayerSpec(count, stride=stride) for count, stride in zip(channels, strides, strict=False)
    ]
    # 4 pixels leave a 2x2 map to pool; 3 pixels already leave a single one.
    last = LayerSpec(channels[-1], padding=0, pool="max" if size == 4 else "none")
    return (*body, last)
