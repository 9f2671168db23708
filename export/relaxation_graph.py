"""A teacher's relaxation as an ONNX graph: a Loop of a fixed number of sweeps.

Written node by node, since what is wanted is the algorithm and not a trace of its
250 repetitions. As in `epdistill.teachers.phase`, P(u_1) is computed once before the
loop, and each u_n once per update of the layer below it. Carried from sweep to sweep
are the states s_1..s_L and P(u_2)..P(u_L) with their argmax; the weights stand outside
the loop's body, which refers to them by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from epdistill import __version__
from epdistill.export.tracing import BATCH, INPUT, OPSET, OUTPUT

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

    from epdistill.teachers.model import EPCNN

IR_VERSION = 10


@dataclass(frozen=True)
class _Look:
    """Names of P(u_n) and of its argmax; no argmax unless the pool is a max-pool."""

    value: str
    index: str | None

    @property
    def names(self) -> list[str]:
        return [self.value] if self.index is None else [self.value, self.index]


class _Constants:
    """The tensors that all graphs share, by name; each name is written once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}

    def put(self, name: str, values: Any, dtype: type = np.float32) -> str:
        from onnx import numpy_helper

        if name not in self.tensors:
            self.tensors[name] = numpy_helper.from_array(np.array(values, dtype=dtype), name)
        return name


class _Nodes:
    """The nodes of one graph, and the parts of a relaxation as sequences of them.

    Args:
        teacher: Whose network it is.
        constants: Where the tensors are put.
        prefix: Before the names of this graph's values: names are unique in the whole file.
    """

    def __init__(self, teacher: EPCNN, constants: _Constants, prefix: str) -> None:
        self.teacher, self.constants, self.prefix = teacher, constants, prefix
        self.network = teacher.network()
        self.depth, self.shapes = self.network.depth, teacher.shapes
        self.nodes: list[NodeProto] = []

    def add(
        self, op: str, inputs: Sequence[str], outputs: int = 1, name: str = "", **given: Any
    ) -> str:
        """Append a node; the name of its first output (the others count up after a dot)."""
        from onnx import helper

        stem = name or f"{self.prefix}{len(self.nodes)}"
        names = [stem, *(f"{stem}.{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(op, list(inputs), names, **given))
        return stem

    def look(self, n: int, below: str) -> _Look:
        """P(u_n) at s_{n-1}."""
        layer = self.network.architecture.layers[n - 1]
        weight = self.constants.put(f"W{n}", self.network.weights[n - 1].numpy())
        bias = self.constants.put(f"b{n}", self.network.biases[n - 1].numpy())
        u = self.add(
            "Conv",
            [below, weight, bias],
            strides=[layer.stride] * 2,
            pads=[layer.padding] * 4,
            kernel_shape=[layer.kernel] * 2,
        )
        if layer.pool == "max":
            value = self.add("MaxPool", [u], 2, kernel_shape=[2, 2], strides=[2, 2])
            return _Look(value, f"{value}.1")
        if layer.pool == "average":
            return _Look(self.add("AveragePool", [u], kernel_shape=[2, 2], strides=[2, 2]), None)
        return _Look(u, None)

    def unpool(self, n: int, value: str, look: _Look) -> str:
        """The transpose of the pool of layer n, shaped like u_n."""
        layer = self.network.architecture.layers[n - 1]
        channels, size, _ = self.shapes[n - 1]
        below = self.shapes[n - 2][1]
        side = layer.conv_size(below)
        if layer.pool == "max":
            assert look.index is not None
            shape = self.sized((channels, side, side))
            return self.add(
                "MaxUnpool", [value, look.index, shape], kernel_shape=[2, 2], strides=[2, 2]
            )
        if layer.pool == "average":
            quarter = self.constants.put(f"quarter{n}", np.full((channels, 1, 2, 2), 0.25))
            return self.add(
                "ConvTranspose",
                [value, quarter],
                group=channels,
                strides=[2, 2],
                kernel_shape=[2, 2],
                output_padding=[side - 2 * size] * 2,
            )
        return value

    def sized(self, shape: tuple[int, int, int]) -> str:
        """The int64 shape (batch, *shape); the batch is that of the images."""
        name = self.constants.put("x".join(map(str, shape)), shape, np.int64)
        return self.add("Concat", [BATCH, name], axis=0)

    def force(self, n: int, states: Sequence[str], looks: Sequence[_Look]) -> str:
        """dPhi/ds_n: P(u_n) and the feedback W_{n+1}^T U(s_{n+1})."""
        drive = looks[n - 1].value
        if n == self.depth:
            return drive
        layer = self.network.architecture.layers[n]
        top = self.unpool(n + 1, states[n], looks[n])
        size = self.shapes[n - 1][1]
        back = self.add(
            "ConvTranspose",
            [top, f"W{n + 1}"],
            strides=[layer.stride] * 2,
            pads=[layer.padding] * 4,
            kernel_shape=[layer.kernel] * 2,
            output_padding=[(size + 2 * layer.padding - layer.kernel) % layer.stride] * 2,
        )
        return self.add("Add", [back, drive])

    def clip(self, value: str) -> str:
        """The nearest value in [0,1]."""
        low, high = self.constants.put("zero", 0.0), self.constants.put("one", 1.0)
        return self.add("Clip", [value, low, high])

    def moved(self, n: int, force: str, states: Sequence[str]) -> str:
        """The new s_n: sigma(force), over-relaxed where the schedule is."""
        schedule = self.teacher.schedule
        curvature = self.constants.put("a", self.network.architecture.curvature)
        new = self.clip(self.add("Div", [force, curvature]))
        if schedule.kind == "synchronous" or schedule.omega == 1.0:
            return new
        omega = self.constants.put("omega", schedule.omega)
        step = self.add("Mul", [self.add("Sub", [new, states[n - 1]]), omega])
        return self.clip(self.add("Add", [states[n - 1], step]))

    def sweep(self, states: list[str], looks: list[_Look]) -> None:
        """One sweep; both lists are brought up to date."""
        layers = range(1, self.depth + 1)
        halves: Iterable[range] = (layers[::2], layers[1::2])
        if self.teacher.schedule.kind == "synchronous":
            halves = (layers,)
        for half in halves:
            forces = [self.force(n, states, looks) for n in half]
            for n, force in zip(half, forces, strict=True):
                states[n - 1] = self.moved(n, force, states)
            for n in half:
                if n < self.depth:
                    looks[n] = self.look(n + 1, states[n - 1])


def relaxation_graph(teacher: EPCNN, *, pixels: bool = False) -> ModelProto:
    """The teacher's answer after exactly `teacher.schedule.sweeps` sweeps from zero.

    Args:
        teacher: On the CPU, in float32; kind, omega and sweeps of its schedule are read.
        pixels: Take uint8 (batch, H, W, C) instead of float32 (batch, C, H, W) in [0,1].

    Returns:
        Images to logits (batch, K), not yet checked.
    """
    from onnx import TensorProto, helper

    constants = _Constants()
    outer = _Nodes(teacher, constants, "v")
    channels, size = teacher.in_channels, teacher.image_size
    dims: list[str | int | None] = [BATCH, channels, size, size]
    kind = TensorProto.FLOAT
    x = INPUT
    if pixels:
        dims, kind = [BATCH, size, size, channels], TensorProto.UINT8
        first = outer.add("Transpose", [x], perm=[0, 3, 1, 2])
        floats = outer.add("Cast", [first], to=TensorProto.FLOAT)
        x = outer.add("Div", [floats, constants.put("white", 255.0)])
    outer.add("Shape", [INPUT], name=BATCH, start=0, end=1)
    mean = constants.put("mean", teacher.mean.numpy())
    std = constants.put("std", teacher.std.numpy())
    x = outer.add("Div", [outer.add("Sub", [x, mean]), std])
    states = [outer.add("ConstantOfShape", [outer.sized(shape)]) for shape in teacher.shapes]
    looks = [outer.look(n, below) for n, below in enumerate([x, *states[:-1]], start=1)]

    trips = constants.put("sweeps", teacher.schedule.sweeps, np.int64)
    carried = [*states, *(name for look in looks[1:] for name in look.names)]
    body = _body(teacher, constants, looks)
    last = outer.add("Loop", [trips, "", *carried], len(carried), body=body)
    settled = [last, *(f"{last}.{i}" for i in range(1, len(carried)))][: len(states)]

    if teacher.readout is None:
        below = settled[-2] if len(settled) > 1 else x
        outer.add("Flatten", [outer.look(outer.depth, below).value], name=OUTPUT, axis=1)
    else:
        weight = constants.put("V", teacher.readout.weight.detach().numpy())
        bias = constants.put("c", teacher.readout.bias.detach().numpy())
        flat = outer.add("Flatten", [settled[-1]], axis=1)
        outer.add("Gemm", [flat, weight, bias], name=OUTPUT, transB=1)
    graph = helper.make_graph(
        outer.nodes,
        "relaxation",
        [helper.make_tensor_value_info(INPUT, kind, dims)],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [BATCH, teacher.classes])],
        list(constants.tensors.values()),
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="epdistill",
        producer_version=__version__,
    )


def _body(teacher: EPCNN, constants: _Constants, begun: Sequence[_Look]) -> GraphProto:
    """One sweep as the body of the Loop; `begun` are the looks before the first one."""
    from onnx import TensorProto, helper

    body = _Nodes(teacher, constants, "in_")
    states = [f"s{n}" for n in range(1, body.depth + 1)]
    # P(u_1) depends on the image alone: it is read from outside and not carried.
    looks = [begun[0]]
    for n, look in enumerate(begun[1:], start=2):
        looks.append(_Look(f"p{n}", None if look.index is None else f"i{n}"))
    inputs = _declared(teacher, states, looks)
    body.sweep(states, looks)
    go_on = helper.make_tensor_value_info("go_on", TensorProto.BOOL, [])
    body.nodes.append(helper.make_node("Identity", ["go_on"], ["still"]))
    still = helper.make_tensor_value_info("still", TensorProto.BOOL, [])
    return helper.make_graph(
        body.nodes,
        "sweep",
        [helper.make_tensor_value_info("number", TensorProto.INT64, []), go_on, *inputs],
        [still, *_declared(teacher, states, looks)],
    )


def _declared(
    teacher: EPCNN, states: Sequence[str], looks: Sequence[_Look]
) -> list[ValueInfoProto]:
    """What is carried from sweep to sweep, under these names."""
    from onnx import TensorProto, helper

    values = [(name, TensorProto.FLOAT, shape)
              for name, shape in zip(states, teacher.shapes, strict=True)]  # fmt: skip
    for look, shape in zip(looks[1:], teacher.shapes[1:], strict=True):
        values.append((look.value, TensorProto.FLOAT, shape))
        if look.index is not None:
            values.append((look.index, TensorProto.INT64, shape))
    return [
        helper.make_tensor_value_info(name, kind, [None, *shape]) for name, kind, shape in values
    ]
