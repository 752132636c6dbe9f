"""The vision transformers of Unicom, built of timm's parts: timm itself has none of the kind.

They have no class token: the features are a small network of all tokens side by side, so that weights fit one input
size only. Source: An et al. 2023, "Unicom: universal and compact representation learning for image retrieval".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from timm.models import VisionTransformer
from torch import nn

from oml_ray.errors import CheckpointError, ConfigError, reason_of
from oml_ray.learning.extractors import Extractor, projection
from oml_ray.learning.weights import State, fit_names

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Architecture:
    """Measures of one of the networks."""

    patch: int
    """Side of a patch in pixels."""
    width: int
    """Length of a token."""
    depth: int
    """Number of blocks."""
    heads: int
    """Number of attention heads."""
    num_features: int
    """F, length of the features."""
    size: int
    """Side of the images that the published weights are for."""


ARCHITECTURES = {
    "unicom_vit_b32": Architecture(patch=32, width=768, depth=12, heads=12, num_features=512, size=224),
    "unicom_vit_b16": Architecture(patch=16, width=768, depth=12, heads=12, num_features=768, size=224),
    "unicom_vit_l14": Architecture(patch=14, width=1024, depth=24, heads=16, num_features=768, size=224),
    "unicom_vit_l14_336": Architecture(patch=14, width=1024, depth=24, heads=16, num_features=768, size=336),
}


def unicom_backbone(architecture: Architecture, *, size: int) -> VisionTransformer:
    """Build one of the networks for images of `size` x `size` pixels: (n, 3, size, size) -> (n, F).

    Raises:
        ConfigError: `size` is not a multiple of the patch.
    """
    if size % architecture.patch:
        raise ConfigError(f"Unicom: images of {size} pixels are not whole patches of {architecture.patch} pixels.")
    width, features = architecture.width, architecture.num_features
    backbone = VisionTransformer(
        img_size=size,
        patch_size=architecture.patch,
        embed_dim=width,
        depth=architecture.depth,
        num_heads=architecture.heads,
        num_classes=0,
        class_token=False,
        global_pool="",
        qkv_bias=False,
        act_layer="relu6",
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )
    backbone.head = nn.Sequential(  # type: ignore[assignment]  # timm calls it and asks for nothing else
        nn.Flatten(),
        nn.Linear(width * (size // architecture.patch) ** 2, width, bias=False),
        nn.BatchNorm1d(width, eps=2e-5),
        nn.Linear(width, features, bias=False),
        nn.BatchNorm1d(features, eps=2e-5),
    )
    return backbone


def from_unicom(state: State) -> State:
    """Name the tensors of a file of Unicom as `unicom_backbone` does: its `feature` layers are the head."""
    renamed = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part == "feature":  # the head begins with a layer without weights, which flattens the tokens
            index, _, rest = rest.partition(".")
            name = f"head.{int(index) + 1}.{rest}"
        renamed[name] = value
    return renamed


def unicom_extractor(
    model: str,
    *,
    size: int,
    weights: State | None = None,
    embedding_dim: int | None = None,
    hidden_dims: Sequence[int] = (),
    normalize: bool = True,
) -> Extractor:
    """Build an extractor on a network of Unicom.

    Args:
        model: key of `ARCHITECTURES`.
        size: side of the input images in pixels; with weights, the one they are for.
        weights: state of the backbone, under the names of Unicom's files or of `unicom_backbone`.
        embedding_dim: D of a linear projection; None for the backbone's features as they are.
        hidden_dims: widths of hidden layers (with ReLU) before that projection.
        normalize: whether embeddings get unit L2 norm.

    Raises:
        ConfigError: a size that the network or its weights cannot take.
        CheckpointError: `weights` are of another architecture.
    """
    architecture = ARCHITECTURES[model]
    backbone = unicom_backbone(architecture, size=size)
    if weights is not None:
        if size != architecture.size:
            raise ConfigError(
                f"extractor: the weights of {model} are for images of {architecture.size} pixels, not of {size}: set "
                f"the transforms' size to {architecture.size}."
            )
        state = fit_names(from_unicom(weights), [backbone.state_dict()], name=model)
        try:
            backbone.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"extractor.weights do not fit {model}: {reason_of(error)}") from None
    return Extractor(
        backbone,
        projection(architecture.num_features, hidden_dims, embedding_dim),
        embedding_dim=embedding_dim or architecture.num_features,
        mean=MEAN,
        std=STD,
        normalize=normalize,
    )
