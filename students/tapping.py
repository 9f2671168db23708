"""Stages of any network that torch.fx can trace, found from the shapes that flow through it."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from epdistill.errors import RecipeError
from epdistill.students.registry import Request, hint

# How many stages a network is cut into that keeps one resolution throughout.
ISOTROPIC_STAGES = 4
# What torchvision calls its classifiers: no part of the features.
CLASSIFIERS = ("classifier", "fc", "head", "heads")


def as_map(value: object) -> Tensor | None:
    """A node's output as feature maps (N, C, h, w), or None if it is nothing of the kind.

    Square maps are taken as they are, channels-last ones turned round; tokens (N, T, D) are
    laid out on their grid, after a class token in front is left away.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    if value.ndim == 4:
        if value.shape[2] == value.shape[3]:
            return value
        return value.permute(0, 3, 1, 2) if value.shape[1] == value.shape[2] else None
    if value.ndim == 3:
        side = isqrt(value.shape[1])
        if side > 1:
            grid = value[:, value.shape[1] - side * side :]
            return grid.transpose(1, 2).reshape(value.shape[0], value.shape[2], side, side)
    return None


def find_stages(net: nn.Module, request: Request) -> list[str]:
    """The nodes after which a network's stages end, in the order they are run.

    A stage ends with the last feature map of its resolution that all further computation
    passes through. A network that keeps one resolution is cut into equal parts.

    Args:
        net: Images to anything.
        request: Gives the images' shape.
    """
    training = net.training
    net.eval()
    train, names = get_graph_node_names(net, suppress_diff_warning=True)
    everything = create_feature_extractor(
        net, train_return_nodes=train[:1], eval_return_nodes=names, suppress_diff_warning=True
    ).eval()
    image = torch.zeros(1, request.in_channels, request.image_size, request.image_size)
    with torch.no_grad():
        values = everything(image)
    net.train(training)
    maps = {name: as_map(value) for name, value in values.items()}
    sizes = {name: found.shape[2] for name, found in maps.items() if found is not None}
    (output,) = (node for node in everything.graph.nodes if node.op == "output")
    returned = output.args[0]
    tensors = {returned[name]: name for name, value in values.items() if isinstance(value, Tensor)}
    trunk = [
        name
        for name in _waists(everything.graph, tensors)
        if name in sizes
        and returned[name].op != "placeholder"
        and name.partition(".")[0] not in CLASSIFIERS
    ]
    ends: dict[int, str] = {}
    for name in trunk:
        # A resolution, once lost, does not come back as a stage.
        if not ends or sizes[name] <= min(ends):
            ends[sizes[name]] = name
    if len(ends) == 1:
        count = min(ISOTROPIC_STAGES, len(trunk))
        return [trunk[(k + 1) * len(trunk) // count - 1] for k in range(count)]
    return list(ends.values())


def _waists(graph: fx.Graph, tensors: dict[fx.Node, str]) -> list[str]:
    """Names of the tensors that everything computed later depends on through them alone."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    found, reach = [], -1
    for node, i in place.items():
        if node in tensors and reach <= i:
            found.append(tensors[node])
        if node.op != "get_attr" and (node in tensors or node.op == "placeholder"):
            uses = [place[user] for user in node.users if user.op != "output"]
            reach = max([reach, *uses])
    return found


class Tapped(nn.Module):
    """A network of which some nodes are read as stages; what lies beyond them is left away.

    Args:
        net: Images to anything.
        nodes: Full names of nodes, in the order they are run; the last one is pooled too.
        names: What the stages are called; their nodes' names without it.
    """

    def __init__(
        self, net: nn.Module, nodes: Sequence[str], names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        for module in net.modules():
            # A stage must not be overwritten by what follows it.
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        wanted = {node: node for node in nodes}
        self.net = create_feature_extractor(net, wanted, suppress_diff_warning=True)
        self.nodes = tuple(nodes)
        self.names = tuple(names or nodes)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (N, C, H, W) to every stage's map and the pooled last one, (N, C', 1, 1)."""
        values = self.net(images)
        maps = []
        for node in self.nodes:
            found = as_map(values[node])
            if found is None:
                raise RecipeError(
                    f"stage {node!r} gives {tuple(values[node].shape)}; expected feature maps or "
                    "a square grid of tokens"
                )
            maps.append(found)
        maps.append(self.pool(maps[-1]))
        return maps

    def rename(self, key: str) -> str:
        """The name that a weight of the network has here."""
        return f"net.{key}"


def tap(net: nn.Module, request: Request) -> Tapped:
    """A network as a backbone, with the requested stages or those found in it.

    Args:
        net: Images (N, C, H, W) to anything; torch.fx must be able to trace it.
        request: The images and, if any, the names of the stages: nodes as
            `torchvision.models.feature_extraction.get_graph_node_names` gives them, or
            modules, whose last node counts.

    Raises:
        RecipeError: A stage does not exist.
        ValueError: There is no stage at all.
    """
    found = find_stages(net, request)
    if not found:
        raise ValueError("no feature maps were found in it")
    if request.stages is None:
        return Tapped(net, found)
    known = get_graph_node_names(net, suppress_diff_warning=True)[1]
    nodes = []
    for stage in request.stages:
        inside = [name for name in known if name == stage or name.startswith(f"{stage}.")]
        if not inside:
            raise RecipeError(
                f"unknown stage {stage!r}{hint(stage, known)}; expected nodes such as "
                f"{', '.join(found)}"
            )
        nodes.append(inside[-1])
    names = list(request.stages)
    if nodes[-1] != found[-1]:
        nodes.append(found[-1])
        names.append(found[-1])
    return Tapped(net, nodes, names)
