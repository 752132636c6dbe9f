"""Weights from files: read safely, and matched to an architecture by name or by order.

`from_moco` and the like are key maps: pure functions that give the tensors of one publisher's files timm's names. A
state that has those names already passes through them unchanged.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from oml_ray.errors import CheckpointError, OmlRayError, permission_denied, reason_of
from oml_ray.storage.retries import retried

State = dict[str, Tensor]

# Keys under which training scripts store a network's state, in the order in which they are looked for: of a network
# that learns and its moving average, the first that is there; of a student and a teacher, the teacher.
_WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "teacher", "student"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "weights", "params"),
)
_MAX_WRAPPERS = 3  # inside one another
# Layers behind the features, which other data sets and losses make of other sizes.
_HEADS = ("fc", "head", "heads", "classifier", "projector", "criterion", "last_layer")
_PICKLED = re.compile(r"GLOBAL (\S+)|[Uu]nsupported (?:global|class) (\S+)")


def read_weights(path: str | Path) -> State:
    """Read a state dict from a local `.safetensors`, `.pt`, `.pth` or `.bin` file; nothing in it is executed.

    Raises:
        CheckpointError: the file is absent, damaged, needs pickled code, or holds no tensors.
        StorageError: it may not be read. StorageUnavailableError: the storage failed at every retry.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"extractor.weights: {path} is not a file.")
    try:
        state = retried(lambda: _load(path), path)
    except OmlRayError:
        raise
    except PermissionError:
        raise permission_denied(path) from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal_of_pickled(path, error)) from None
    except Exception as error:  # both readers raise many kinds on damaged files
        raise CheckpointError(
            f"{path} cannot be read as weights: {reason_of(error)}. "
            "Only plain state dicts are read (safetensors, or torch.save of tensors): pickled code is refused."
        ) from None
    state = _unwrapped(state)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict (a mapping of names to tensors).")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    with path.open("rb") as file:  # of a path, torch would not tell what the disk said
        return torch.load(file, "cpu", weights_only=True)


def _refusal_of_pickled(path: Path, error: Exception) -> str:
    named = _PICKLED.search(str(error))
    what = f" (such as {(named[1] or named[2]).rstrip('.,')})" if named else ""
    convert = (
        "import torch, safetensors.torch as s; "
        f"c = torch.load({str(path)!r}, 'cpu', weights_only=False); "
        "s.save_file({k: v.contiguous() for k, v in c['model'].items()}, 'weights.safetensors')"
    )
    return (
        f"{path} cannot be read as weights: it holds pickled Python objects{what} beside its tensors, which can run "
        "any code when they are loaded, so oml_ray never does. Where you trust the file, load it yourself once and "
        f"save its state dict as safetensors: python -c \"{convert}\" (with its own key in place of 'model')."
    )


def _unwrapped(state: Any) -> Any:
    """State of a network inside the dictionaries that training scripts put around it."""
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(state, dict):
            break
        inner = next((state[wrapper] for wrapper in _WRAPPERS if isinstance(state.get(wrapper), dict)), None)
        if inner is None:
            break
        state = inner
    return state


def fit_names(state: State, references: Sequence[State], *, name: str) -> State:
    """Give the tensors of `state` the names that an architecture uses.

    A reference fits by name, by name behind a prefix (such as `model.`, `module._orig_mod.` or `backbone.`; layers
    behind the features may be missing or stand outside of it), or in order: as many tensors, of the same shapes, each
    with the same last part of its name (ports of one network to another code base often differ in nothing but the
    modules' names).

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
        if (found := _behind_a_prefix(state, reference)) is not None:
            return found
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


def _behind_a_prefix(state: State, reference: State) -> State | None:
    """Tensors of a reference's names, which all have one prefix in `state`; None where that is not so, or not clear."""
    names, first = reference.keys(), next(iter(reference))
    prefixes = [name.removesuffix(first) for name in state if name == first or name.endswith(f".{first}")]
    prefixes = [prefix for prefix in prefixes if all(f"{prefix}{name}" in state for name in names)]
    if len(prefixes) > 1:  # of a student and its teacher, as they are called by DINO
        prefixes = [prefix for prefix in prefixes if "teacher." in prefix]
    if len(prefixes) != 1:
        return None
    inner = {name.removeprefix(prefixes[0]): value for name, value in state.items() if name.startswith(prefixes[0])}
    if any(name.partition(".")[0] not in _HEADS for name in inner.keys() - names):
        return None
    return {name: inner[name] for name in reference}


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
