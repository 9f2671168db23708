"""A student: a feedforward backbone whose stages land on a teacher's states."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epdistill.data import channels_inside
from epdistill.errors import RecipeError, RunError
from epdistill.students.backbones import Request, build, bundled, cannot_take
from epdistill.students.registry import hint
from epdistill.students.spec import StudentSpec
from epdistill.teachers.targets import Shape


def pair_stages(stages: Sequence[Shape], targets: Sequence[Shape]) -> list[int]:
    """Which stage is matched to which teacher layer.

    The last stage (pooled) goes to the last layer. Each other layer takes the
    deepest stage that is at least as wide as it, so that a map is only ever
    shrunk to fit, and failing that the deepest of the widest. Where all stages are
    equally wide, they are spread over the layers by depth.

    Args:
        stages: (channels, height, width) of the student's maps, the pooled one last.
        targets: (channels, height, width) of the teacher's states.

    Returns:
        One index into `stages` per target.
    """
    sizes = [stage[1] for stage in stages[:-1]]
    count, depth, chosen = len(sizes), len(targets), []
    for n, (_, height, _) in enumerate(targets[:-1], start=1):
        if count > 1 and len(set(sizes)) == 1:
            chosen.append(max(n * count // depth, 1) - 1)
            continue
        wide = [i for i, size in enumerate(sizes) if size >= min(height, max(sizes))]
        chosen.append(wide[-1])
    return [*chosen, count]


def shrunk(feature: Tensor, height: int, width: int) -> Tensor:
    """A map (N, C, H, W) averaged over windows to (N, C, height, width)."""
    sides = (feature.shape[2], feature.shape[3])
    if sides == (height, width):
        return feature
    if sides[0] % height == 0 and sides[1] % width == 0:
        # The adaptive pool's gradient adds in any order on a GPU, and no two runs were alike.
        return F.avg_pool2d(feature, (sides[0] // height, sides[1] // width))
    return F.adaptive_avg_pool2d(feature, (height, width))


class Student(nn.Module):
    """Images in [0,1] to logits in one pass, matched to a teacher's states.

    The answer is V (A z + b) + c: z is the backbone's last feature, A z + b the
    linear adaptor that lands on s_L, and V, c a readout: the teacher's, copied and
    frozen, or one that is learned. No clamp stands in this path. The other adaptors
    serve the matching only and are dropped by `folded`.

    Args:
        spec: Backbone, teacher's shapes, and what is matched.

    Raises:
        RecipeError: The backbone or a stage is unknown, or the images do not suit it.
    """

    mean: Tensor
    std: Tensor
    readout_weight: Tensor
    readout_bias: Tensor

    def __init__(self, spec: StudentSpec) -> None:
        super().__init__()
        goal = spec.goal
        self.spec = spec
        self._request = Request(
            goal.in_channels, goal.image_size, spec.width, goal.shapes, goal.layers, spec.stages
        )
        self.backbone = build(spec.name, self._request)
        self._reorders = bundled(spec.name)
        stages = self._stage_shapes()
        self.targets = goal.shapes[len(goal.shapes) - spec.matched :]
        self.pairs = self._pairs(stages)
        self.adaptors = nn.ModuleList()
        for index, target in zip(self.pairs[:-1], self.targets[:-1], strict=True):
            # A bounded state is matched through a sigmoid, and a stage's own map may be
            # unfit for that: ReLUs are never negative.
            same = stages[index] == target and not spec.bounded
            self.adaptors.append(
                nn.Identity() if same else nn.Conv2d(stages[index][0], target[0], 1)
            )
        channels, height, width = goal.shapes[-1]
        size = channels * height * width
        self.head = nn.Linear(stages[-1][0], size)
        shape = (1, goal.in_channels, 1, 1)
        self.register_buffer("mean", torch.tensor(goal.mean).view(shape))
        self.register_buffer("std", torch.tensor(goal.std).view(shape))
        if spec.readout == "frozen":
            self.register_buffer("readout_weight", torch.zeros(goal.classes, size))
            self.register_buffer("readout_bias", torch.zeros(goal.classes))
        else:
            fresh = nn.Linear(size, goal.classes)
            self.readout_weight, self.readout_bias = fresh.weight, fresh.bias

    def _stage_shapes(self) -> list[Shape]:
        goal = self.spec.goal
        image = torch.zeros(1, goal.in_channels, goal.image_size, goal.image_size)
        training = self.backbone.training
        self.backbone.eval()
        try:
            with torch.no_grad():
                maps = self.backbone(image)
            if not all(isinstance(m, Tensor) and m.ndim == 4 for m in maps):
                raise ValueError("its stages are no feature maps (N, C, h, w)")
        except (RuntimeError, ValueError, AssertionError) as error:
            raise cannot_take(self.spec.name, self._request, error) from error
        self.backbone.train(training)
        return [(m.shape[1], m.shape[2], m.shape[3]) for m in maps]

    def _pairs(self, stages: Sequence[Shape]) -> list[int]:
        wanted, below = self.spec.stages, max(len(self.targets) - 1, 0)
        if wanted is None or below == 0:
            paired = pair_stages(stages, self.spec.goal.shapes)
            return paired[len(paired) - len(self.targets) :]
        default = [f"stage{n}" for n in range(1, len(stages))]
        known = list(getattr(self.backbone, "names", default))
        for stage in wanted:
            if stage not in known:
                raise RecipeError(
                    f"unknown stage {stage!r}{hint(stage, known)} of {self.spec.name}; expected "
                    f"{', '.join(known)}"
                )
        if len(wanted) != below:
            raise RecipeError(
                f"{len(wanted)} stages {', '.join(wanted)}; expected {below}, one per layer of "
                "the teacher below its last"
            )
        return [*(known.index(stage) for stage in wanted), len(stages) - 1]

    def take_readout(self, weight: Tensor, bias: Tensor) -> None:
        """Copy a teacher's readout V (classes, d) and c (classes,)."""
        with torch.no_grad():
            self.readout_weight.copy_(weight)
            self.readout_bias.copy_(bias)

    def _maps(self, images: Tensor) -> list[Tensor]:
        """The backbone's stages."""
        normal = (images - self.mean) / self.std
        # One image gains nothing by it. A user's backbone may use `view`, which refuses the order.
        if self._reorders and len(normal) > 1:
            normal = channels_inside(normal)
        maps: list[Tensor] = self.backbone(normal)
        return maps

    def match(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """What is compared with the teacher.

        Args:
            images: (N, C, H, W), float in [0,1].

        Returns:
            One map per matched layer of the teacher, shaped like its state, and the logits
            (N, classes). Of a bounded student the maps but the last are those of a
            sigmoid's argument.
        """
        maps = self._maps(images)
        landed = []
        for index, adaptor, target in zip(
            self.pairs[:-1], self.adaptors, self.targets[:-1], strict=True
        ):
            feature = adaptor(maps[index])
            _, height, width = target
            landed.append(shrunk(feature, height, width))
        top = self.head(maps[-1].flatten(1))
        if self.targets:
            landed.append(top.view(-1, *self.targets[-1]))
        return landed, F.linear(top, self.readout_weight, self.readout_bias)

    def states(self, landed: Sequence[Tensor]) -> list[Tensor]:
        """The maps of `match` as states of the teacher."""
        if not self.spec.bounded or not landed:
            return list(landed)
        return [*(one.sigmoid() for one in landed[:-1]), landed[-1]]

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), float in [0,1] -> logits (N, classes)."""
        top = self.head(self._maps(images)[-1].flatten(1))
        return F.linear(top, self.readout_weight, self.readout_bias)

    def folded(self) -> nn.Module:
        """The deployable network: adaptors dropped, V (A z + b) + c folded into one layer.

        The product is formed in float64, so that folding costs one rounding only.
        """
        weight = self.readout_weight
        head = nn.Linear(self.head.in_features, weight.shape[0], device=weight.device)
        v = weight.double()
        with torch.no_grad():
            head.weight.copy_(v @ self.head.weight.double())
            head.bias.copy_(v @ self.head.bias.double() + self.readout_bias.double())
        return Deployed(copy.deepcopy(self.backbone), head, self.mean, self.std).train(
            self.training
        )


class Deployed(nn.Module):
    """Normalisation, backbone and one linear layer: what is exported."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, head: nn.Linear, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), float in [0,1] -> logits (N, classes)."""
        logits: Tensor = self.head(self.backbone((images - self.mean) / self.std)[-1].flatten(1))
        return logits


def student_from(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Student:
    """Rebuild a student from its run's configuration and weights.

    Raises:
        RunError: The weights do not fit the configuration.
    """
    student = Student(StudentSpec.from_dict(config["model"]))
    try:
        student.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise RunError(
            f"the weights do not fit config.json: {str(error).splitlines()[0]}"
        ) from error
    return student.eval()
