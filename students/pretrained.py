"""Starting from weights that the user has."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from epdistill.errors import RecipeError

# What a file may put in front of every name: data-parallel training, a student's run.
PREFIXES = ("module.", "backbone.")
SHOWN = 3


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file; nothing but tensors is ever unpickled.

    Raises:
        RecipeError: The file is missing or unreadable, or holds no weights by name.
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RecipeError(
            f"pretrained file {path} cannot be read ({error.strerror or error})"
        ) from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(
            f"pretrained file {path} is neither safetensors nor plain torch weights ({reason})"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise RecipeError(
            f"pretrained file {path} holds a {type(content).__name__}; expected weights by name"
        )
    weights = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for prefix in PREFIXES:
        inner = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
        weights = inner or weights
    return weights


def start_from(backbone: nn.Module, path: Path) -> list[str]:
    """Give a backbone the weights of a file, by their names in either.

    Args:
        backbone: Its `rename`, if it has one, says what a name of the original network
            is called in it.
        path: A safetensors or torch file.

    Returns:
        Names in the file that the backbone has no place for, as a classifier's.

    Raises:
        RecipeError: The file cannot be read, or lacks a weight or has one of another shape.
    """
    weights = read_weights(path)
    own = backbone.state_dict()
    rename = getattr(backbone, "rename", lambda key: key)
    given = {name if name in own else rename(name): value for name, value in weights.items()}
    left = [name for name in weights if name not in own and rename(name) not in own]
    wrong = []
    for name, value in own.items():
        if name not in given:
            # Counters of BatchNorm, which old files lack, decide nothing.
            if not name.endswith("num_batches_tracked"):
                wrong.append(f"{name} is missing")
        elif given[name].shape != value.shape:
            found, expected = tuple(given[name].shape), tuple(value.shape)
            wrong.append(f"{name} is {found} in the file and {expected} in the student")
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise RecipeError(
            f"pretrained file {path} does not fit the student: {'; '.join(wrong[:SHOWN])}{more}"
        )
    backbone.load_state_dict({**own, **{n: v for n, v in given.items() if n in own}})
    return left
