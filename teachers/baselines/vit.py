"""A vision transformer for small images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epdistill.errors import RecipeError
from epdistill.teachers.baselines.base import Baseline, ImageSpec

STAGES = 3
FEWEST_TOKENS = 4


def patch_for(image_size: int, patch: int) -> int:
    """The side of a patch, at most `patch`, that leaves at least 4x4 tokens.

    Raises:
        RecipeError: The image is no whole number of such patches wide.
    """
    side = min(patch, image_size // FEWEST_TOKENS)
    if side < 1 or image_size % side:
        raise RecipeError(
            f"image size {image_size} for the vit's patches of {max(side, 1)} pixels; expected a "
            f"multiple of {max(side, 1)} that leaves at least {FEWEST_TOKENS} patches a side: set "
            "another --image-size or baselines.vit.patch"
        )
    return side


class _Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a LayerNorm and beside a skip."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, width) -> the same shape."""
        count, tokens, width = x.shape
        parts = self.qkv(self.attention_norm(x)).view(count, tokens, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.mix(mixed.transpose(1, 2).reshape(count, tokens, width))
        x = x + self.perceptron(x)
        return x


class ViT(Baseline):
    """Patches, learnt positions, pre-norm blocks, and the mean over all tokens (no class token).

    Dosovitskiy et al., ICLR 2021, at the size that is customary for 32 pixels. Its stages
    are the tokens after each third of the blocks, as maps, and the normalised mean.

    Args:
        images: What it is built for.
        patch: Side of a patch, in pixels, at most; see `patch_for`.
        width: Length of a token.
        depth: Number of blocks.
        heads: Of the attention; divides `width`.
        hidden: Width of the perceptrons.

    Raises:
        RecipeError: The sizes do not fit one another.
    """

    def __init__(
        self, images: ImageSpec, patch: int, width: int, depth: int, heads: int, hidden: int
    ) -> None:
        patch = patch_for(images.image_size, patch)
        super().__init__(
            images,
            {"patch": patch, "width": width, "depth": depth, "heads": heads, "hidden": hidden},
        )
        if width % heads:
            raise RecipeError(
                f"baselines.vit: {heads} heads for tokens of length {width}; expected a divisor"
            )
        self.side = images.image_size // patch
        self.embed = nn.Conv2d(images.in_channels, width, patch, patch)
        self.position = nn.Parameter(torch.empty(1, self.side**2, width))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.ModuleList(_Block(width, heads, hidden) for _ in range(depth))
        # The number of blocks after which each stage ends.
        self.ends = [-(-depth * part // STAGES) for part in range(1, STAGES + 1)]
        self.norm = nn.LayerNorm(width)
        self.finish()

    def stages(self, x: Tensor) -> list[Tensor]:
        """Normalised images (N, C, H, W) -> three maps of tokens, and their mean (N, width, 1, 1).

        A map is (N, width, h, w), with one pixel per patch.
        """
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        states = []
        for done, block in enumerate(self.blocks, start=1):
            x = block(x)
            if done in self.ends:
                states.append(x.transpose(1, 2).reshape(len(x), -1, self.side, self.side))
        return [*states, self.norm(x).mean(1)[:, :, None, None]]
