"""From a torch module to an ONNX graph in memory, through torch's exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from epdistill.errors import ExportError

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
INPUT, OUTPUT, BATCH = "images", "logits", "batch"


class TakesPixels(nn.Module):
    """A classifier behind bytes: uint8 (N, H, W, C) to the logits of v / 255, channels first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (N, H, W, C) to logits (N, K)."""
        logits: Tensor = self.model(pixels.permute(0, 3, 1, 2).to(torch.float32) / 255)
        return logits


def to_pixels(images: Tensor) -> Tensor:
    """Images (N, C, H, W) in [0,1] as the nearest bytes, (N, H, W, C)."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def example(images: Tensor) -> Tensor:
    """Two images: a batch of one invites the tracer to treat the batch as constant."""
    return images.detach().cpu()[torch.tensor([0, -1])].contiguous()


def trace(module: nn.Module, images: Tensor, *, pixels: bool = False) -> ModelProto:
    """Run torch's exporter, silently.

    Args:
        module: Images (N, C, H, W) in [0,1] to logits, on the CPU, in eval mode.
        images: Some of its images.
        pixels: Give the graph a uint8 (batch, H, W, C) input.

    Raises:
        ExportError: Whatever torch raised, in one line.
    """
    given = example(images)
    if pixels:
        module, given = TakesPixels(module).eval(), to_pixels(given)
    try:
        with silence():
            program = torch.onnx.export(
                module,
                (given,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: BATCH},),
                external_data=False,
                optimize=True,
                verbose=False,
            )
            if program is None:
                raise ExportError("torch.onnx.export returned nothing; expected a program")
            return program.model_proto
    except ExportError:
        raise
    except Exception as error:  # the exporter wraps whatever the module or a pass raised
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(
            f"torch cannot export the model ({type(cause).__name__}: {one_line(cause)}); "
            "expected a module without data-dependent control flow whose batch size is free"
        ) from error


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep a converter's progress, logs and warnings off the terminal; errors still raise."""
    previous = logging.root.manager.disable
    sink = io.StringIO()
    with (
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(previous)


def one_line(error: BaseException) -> str:
    """An error's message in at most 200 characters without line breaks."""
    text = " ".join(str(error).split()) or "no message"
    return text if len(text) <= 200 else text[:197] + "..."
