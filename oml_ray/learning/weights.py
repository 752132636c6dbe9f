"""Weights from files: read safely, and matched to an architecture by name or by order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from oml_ray.errors import CheckpointError, reason_of

State = dict[str, Tensor]

_WRAPPERS = ("state_dict", "model")  # keys under which training scripts commonly store a network's state


def read_weights(path: str | Path) -> State:
    """Read a state dict from a local `.safetensors`, `.pt`, `.pth` or `.bin` file; nothing in it is executed.

    Raises:
        CheckpointError: the file is absent, damaged, needs pickled code, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"extractor.weights: {path} is not a file.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds on damaged files
        raise CheckpointError(
            f"{path} cannot be read as weights: {reason_of(error)}. "
            "Only plain state dicts are read (safetensors, or torch.save of tensors): pickled code is refused."
        ) from None
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict (a mapping of names to tensors).")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def fit_names(state: State, references: Sequence[State], *, name: str) -> State:
    """Give the tensors of `state` the names that an architecture uses.

    A reference fits by name, or in order: as many tensors, of the same shapes, each with the same last part of
    its name (ports of one network to another code base often differ in nothing but the modules' names).

    Args:
        state: the tensors at hand.
        references: states of the architecture (shapes count, values do not), e.g. with and without its classifier.
        name: how messages call the architecture.

    Raises:
        CheckpointError: no reference fits; the message names the first differences.
    """
    for reference in references:
        if state.keys() == reference.keys():
            return dict(state)
    for reference in references:
        pairs = list(zip(reference.items(), state.items(), strict=False))
        if len(reference) == len(state) and all(
            want.shape == have.shape and key.rpartition(".")[2] == other.rpartition(".")[2]
            for (key, want), (other, have) in pairs
        ):
            return {key: have for (key, _), (_, have) in pairs}
    reference = references[0]
    missing = [key for key in reference if key not in state]
    unexpected = [key for key in state if key not in reference]
    raise CheckpointError(
        f"The weights are of another architecture than {name}: {len(state)} tensors against {len(reference)}; "
        f"{len(missing)} missing (first: {', '.join(missing[:3]) or 'none'}), "
        f"{len(unexpected)} unexpected (first: {', '.join(unexpected[:3]) or 'none'})."
    )
