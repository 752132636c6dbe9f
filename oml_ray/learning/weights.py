"""Weights from files: read safely, and matched to an architecture by name or by order.

`from_moco` and the like are key maps: pure functions that give the tensors of one publisher's files timm's names. A
state that has those names already passes through them unchanged.
"""

from __future__ import annotations

import re
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


def from_moco(state: State) -> State:
    """Name the query encoder of a MoCo checkpoint as a ResNet of timm; its contrastive head `fc` is left out."""
    return {name: value for name, value in _under("encoder_q.", state).items() if not name.startswith("fc.")}


def from_oml(state: State) -> State:
    """Name the vision transformer of a checkpoint of OML's training as timm does; its criterion is left out."""
    prefix = next((name.removesuffix("norm.bias") for name in state if re.search(r"(^|\.)norm\.bias$", name)), "")
    return {name: value for name, value in _under(prefix, state).items() if not name.startswith("criterion.")}


def from_dinov2(state: State) -> State:
    """Name Meta's own files of DINOv2 as timm does, with registers or without."""
    if "mask_token" not in state:
        return dict(state)
    renamed = {name: value for name, value in state.items() if name not in ("mask_token", "register_tokens")}
    if "register_tokens" in state:  # timm adds the position of the class token to it once and for all
        renamed["reg_token"] = state["register_tokens"]
        renamed["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        renamed["pos_embed"] = state["pos_embed"][:, 1:]
    return renamed


_CLIP_NAMES = (
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def from_clip(state: State) -> State:
    """Name the image tower of a CLIP by OpenAI's code as timm does; the tower of the texts is left out."""
    visual = _under("visual.", state)
    if "class_embedding" not in visual:
        return visual
    renamed: State = {}
    for name, value in visual.items():
        for pattern, replacement in _CLIP_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    renamed["cls_token"] = renamed["cls_token"].view(1, 1, -1)
    renamed["pos_embed"] = renamed["pos_embed"][None]  # (1, tokens, features)
    renamed["head.weight"] = renamed.pop("proj").T
    renamed["head.bias"] = torch.zeros(len(renamed["head.weight"]), dtype=renamed["head.weight"].dtype)
    return renamed


def _under(prefix: str, state: State) -> State:
    """The tensors whose names have `prefix` (at their beginning or behind a dot), without it; all if none has it."""
    named = re.compile(rf"(.*?\.)?{re.escape(prefix)}(.*)")
    found = {match[2]: value for name, value in state.items() if (match := named.fullmatch(name))} if prefix else {}
    return found or dict(state)
