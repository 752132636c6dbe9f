"""An extractor as a folder that timm loads: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

::

    FOLDER/
      config.json         the architecture with its arguments, and how images are prepared, as timm writes them
      model.safetensors   weights: tensors alone, nothing that is executed
      oml_ray.json        facts of the extractor

timm's networks take pixels that are normalised already (its own transforms do it), and know of no normalisation of
embeddings: the network gives what the extractor has before that. A linear projection is the network's classifier.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from oml_ray.errors import ExportError, reason_of
from oml_ray.learning.export.sameness import evaluating, largest_difference, writing
from oml_ray.learning.extractors import Extractor, Size, sides

CONFIG, WEIGHTS, FACTS = "config.json", "model.safetensors", "oml_ray.json"


def write_timm(
    extractor: Extractor, folder: Path, *, size: Size, facts: Mapping[str, Any], preparation: Mapping[str, Any]
) -> float:
    """Write the folder of an extractor, and compare what timm loads from it with the extractor.

    Args:
        extractor: what is written, as in evaluation mode.
        folder: local folder to write into, made if need be.
        size: side of the images in pixels, or their height and width.
        facts: JSON-able, for `oml_ray.json`.
        preparation: of the images, in timm's words: interpolation, crop_pct, crop_mode.

    Returns:
        The largest difference found, see `largest_difference`; embeddings are normalised for it where the extractor
        does so.

    Raises:
        ExportError: timm has no such network, or cannot have its pooling or projection, or builds another one; the
            folder is not to be used then. StorageError: the folder cannot be written.
    """
    network = _network(extractor)
    with writing(folder):
        save_for_hf(
            network,
            str(folder),
            safe_serialization=True,
            data_config={"input_size": (3, *sides(size)), **preparation},
        )
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors lets nobody but the owner read it
        (folder / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    try:
        loaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # timm raises many kinds
        raise ExportError(
            f"timm cannot build this network again from what it wrote: {reason_of(error)}. Export the form torch "
            "instead."
        ) from None
    mean, std = (torch.tensor(loaded.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))

    def embed(images: Tensor) -> Tensor:
        embeddings: Tensor = loaded((images / 255 - mean) / std)
        return nn.functional.normalize(embeddings, dim=1) if extractor.normalize else embeddings

    with evaluating(extractor):
        return largest_difference(extractor, embed, size, what="The network that timm loads from the folder")


def _network(extractor: Extractor) -> nn.Module:
    """The backbone with the projection as its classifier."""
    network: Any = deepcopy(extractor.backbone)
    instead = "export the form torch, which holds all of it."
    if not hasattr(network, "pretrained_cfg"):
        raise ExportError(f"timm has no network of this kind: {instead}")
    if extractor.pooling is not None:
        raise ExportError(f"timm's networks have no pooling gem: {instead}")
    if isinstance(extractor.projection, nn.Identity):
        return network  # type: ignore[no-any-return]
    layers = list(extractor.projection.children())
    if len(layers) > 1 or network.num_classes:
        found = f"hidden layers and a projection ({len(layers)} parts)" if len(layers) > 1 else "a projection behind it"
        raise ExportError(f"timm's networks end with one linear layer, and this one has {found}: {instead}")
    try:
        network.reset_classifier(extractor.embedding_dim)
        network.get_classifier().load_state_dict(layers[0].state_dict())
    except Exception as error:  # networks of another build than most, e.g. with two classifiers
        raise ExportError(f"timm cannot have the projection as its classifier: {reason_of(error)}; {instead}") from None
    return network  # type: ignore[no-any-return]
