"""Extractors: images -> embeddings, by any timm model with an optional projection."""

from __future__ import annotations

import difflib
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from torch import Tensor, nn

from oml_ray.errors import CheckpointError, ConfigError, reason_of
from oml_ray.learning.pooling import GeM, Pooling, pooled_features, replace_pooling
from oml_ray.learning.weights import State, fit_names

logger = logging.getLogger("oml_ray")

Size = int | tuple[int, int]
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # of weights in the cache of the hub, as timm looks for them


class Extractor(nn.Module):
    """Pixels -> normalised input -> backbone, pooling -> projection -> L2 normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        projection: nn.Module,
        *,
        embedding_dim: int,
        mean: Sequence[float],
        std: Sequence[float],
        normalize: bool,
        pooling: GeM | None = None,
    ) -> None:
        """Combine the parts.

        Args:
            backbone: normalised images (n, 3, height, width) -> features (n, F).
            projection: features (n, F) -> embeddings (n, embedding_dim).
            embedding_dim: D.
            mean: of the backbone's input, per channel, in [0, 1].
            std: of the backbone's input, per channel, in [0, 1].
            normalize: whether embeddings get unit L2 norm.
            pooling: what pools instead of a backbone whose own pooling was taken out.
        """
        super().__init__()
        self.backbone, self.pooling, self.projection = backbone, pooling, projection
        self.embedding_dim, self.normalize = embedding_dim, normalize
        # A network may hold parameters that never learn, such as fixed position embeddings.
        self._learnable = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        self._backbone_frozen = self._statistics_frozen = False
        self.memory_format = torch.contiguous_format
        # Not part of the state: they follow from the config, and integers in pixels stay exact in any precision.
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images uint8 (n, 3, height, width) as (n, D)."""
        pixels = ((images.to(self.mean.dtype) - self.mean) / self.std).contiguous(memory_format=self.memory_format)
        embeddings: Tensor = self.projection(pooled_features(self.backbone, self.pooling, pixels))
        return nn.functional.normalize(embeddings, dim=1) if self.normalize else embeddings

    def freeze_backbone(self, frozen: bool) -> None:
        """Stop (or resume) the backbone's learning, its batch statistics included."""
        for parameter in self._learnable:
            parameter.requires_grad_(not frozen)
        self._backbone_frozen = frozen
        self.train(self.training)

    def use_channels_last(self) -> None:
        """Lay images and weights out with their channels last, which convolutions on GPUs are faster with."""
        self.memory_format = torch.channels_last
        self.to(memory_format=torch.channels_last)

    def freeze_statistics(self) -> None:
        """Keep the backbone's batch statistics as they are while its parameters learn.

        Small batches then see what an evaluation sees, and a network with batch statistics does not depend on the
        number of ranks.
        """
        self._statistics_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Extractor:
        """Switch to training mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        if self._backbone_frozen:
            self.backbone.eval()
        if self._statistics_frozen:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def timm_extractor(
    model: str,
    *,
    size: Size,
    pretrained: bool = False,
    weights: State | None = None,
    embedding_dim: int | None = None,
    hidden_dims: Sequence[int] = (),
    normalize: bool = True,
    pooling: Pooling = "default",
    gem_p: float = 3.0,
    keep_head: bool = False,
) -> Extractor:
    """Build an extractor on a timm backbone, at the input size it will see.

    Args:
        model: timm's name of the network.
        size: side of the input images in pixels, or their height and width; position embeddings are resampled to it
            in float32.
        pretrained: load timm's own weights from the model hub.
        weights: state of the backbone; by name, or in order where only the names differ.
        embedding_dim: D of a linear projection; None for the backbone's features as they are.
        hidden_dims: widths of hidden layers (with ReLU) before that projection.
        normalize: whether embeddings get unit L2 norm.
        pooling: global pooling; "default" is the network's own, "gem" is `oml_ray.learning.pooling.GeM`.
        gem_p: initial exponent of "gem".
        keep_head: keep the network's last layer (CLIP's projection into the space of its texts), with its own pooling.

    Returns:
        The extractor, in training mode.

    Raises:
        ConfigError: unknown model, a size or a pooling it cannot take, or weights that the hub does not give.
        CheckpointError: `weights` are of another architecture.

    Example:
        >>> extractor = timm_extractor("test_vit", size=64, embedding_dim=32)
        >>> extractor(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape
        torch.Size([2, 32])
    """
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=5)
        hint = f" Near: {', '.join(near)}." if near else ""
        raise ConfigError(f"extractor.model: timm has no model {model!r}.{hint} timm.list_models() lists all.")
    if keep_head and pooling != "default":
        raise ConfigError(f"extractor.pooling: {model} keeps its last layer only with its own pooling (default).")
    backbone, num_features = _timm_backbone(model, size, pretrained, weights, keep_head)
    gem = replace_pooling(backbone, pooling, model=model, gem_p=gem_p)
    if pooling != "default":
        try:
            found = _probe(backbone, gem, size)
        except Exception as error:  # networks of another build than most, e.g. with several maps
            raise ConfigError(f"extractor.pooling: {model} cannot pool by {pooling}: {reason_of(error)}") from None
        if found != (1, num_features):
            raise ConfigError(f"extractor.pooling: {model} cannot pool by {pooling}: features of shape {found}.")
    data: Any = backbone.pretrained_cfg
    return Extractor(
        backbone,
        projection(num_features, hidden_dims, embedding_dim),
        embedding_dim=embedding_dim or num_features,
        mean=data["mean"],
        std=data["std"],
        normalize=normalize,
        pooling=gem,
    )


def _timm_backbone(
    model: str, size: Size, pretrained: bool, weights: State | None, keep_head: bool
) -> tuple[nn.Module, int]:
    """Build a network of timm in training mode, and tell the width of its features."""
    options: dict[str, Any] = {"pretrained": pretrained or weights is not None}
    if not keep_head:
        options["num_classes"] = 0
    cfg = timm.get_pretrained_cfg(model)
    if cfg is not None and cfg.fixed_input_size:
        options["img_size"] = sides(size)
    if weights is not None:
        with torch.device("meta"):
            whole, bare = timm.create_model(model), timm.create_model(model, num_classes=0)
        state = fit_names(weights, [whole.state_dict(), bare.state_dict()], name=model)
        options["pretrained_cfg_overlay"] = {"state_dict": state}
    place = _hub_of(cfg)
    if pretrained and weights is None and not _is_cached(cfg):
        logger.warning("downloading the weights of %s from %s to its local cache (HF_HOME)", model, place)
    try:
        backbone: Any = timm.create_model(model, **options)
        backbone.pretrained_cfg.pop("state_dict", None)  # timm keeps the overlay: a second copy of all weights
        # Shows a size that the network cannot take, and the width of its features.
        shape = _probe(backbone, None, size)
    except Exception as error:  # timm and the hub's client raise many kinds
        reason = reason_of(error)
        if weights is not None:
            raise CheckpointError(f"extractor.weights do not fit {model}: {reason}") from None
        if pretrained:
            raise ConfigError(
                f"extractor.pretrained: the weights of {model} cannot be downloaded from {place} ({reason}): give a "
                "local file by extractor.weights, or download them where there is a connection, copy the cache, name "
                "it by HF_HOME, and set HF_HUB_OFFLINE=1."
            ) from None
        height, width = sides(size)
        raise ConfigError(
            f"extractor.model: timm cannot build {model} for {height} x {width} images: {reason}"
        ) from None
    if len(shape) != 2:
        raise ConfigError(f"extractor.model: {model} gives features of shape {shape}, not one vector an image.")
    return backbone, shape[1]


def _hub_of(cfg: Any) -> str:
    """Return the place that timm gets the weights of a network from."""
    if cfg is None or (cfg.hf_hub_id is None and not cfg.url):
        return "the model hub"
    return f"https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else str(cfg.url)


def _is_cached(cfg: Any) -> bool:
    """Return whether timm finds the weights of a network on this machine."""
    if cfg is None:
        return False
    if cfg.hf_hub_id:
        names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else HUB_FILES
        return any(isinstance(huggingface_hub.try_to_load_from_cache(cfg.hf_hub_id, name), str) for name in names)
    return bool(cfg.url) and Path(torch.hub.get_dir(), "checkpoints", Path(cfg.url).name).exists()


def sides(size: Size) -> tuple[int, int]:
    """Height and width in pixels."""
    return (size, size) if isinstance(size, int) else size


def _probe(backbone: nn.Module, gem: GeM | None, size: Size) -> tuple[int, ...]:
    """Shape of the features of one image; leaves the backbone in training mode."""
    backbone.eval()
    with torch.no_grad():
        shape = tuple(pooled_features(backbone, gem, torch.zeros(1, 3, *sides(size))).shape)
    backbone.train()
    return shape


def projection(num_features: int, hidden_dims: Sequence[int], embedding_dim: int | None) -> nn.Module:
    """Build the layers from a backbone's features (n, num_features) to embeddings (n, embedding_dim).

    Raises:
        ConfigError: hidden layers without a last width.
        ValueError: a width below 1.
    """
    if embedding_dim is not None and embedding_dim < 1:
        raise ValueError(f"embedding_dim must be at least 1 or None, found {embedding_dim}.")
    if any(width < 1 for width in hidden_dims):
        raise ValueError(f"hidden_dims must be at least 1, found {list(hidden_dims)}.")
    if embedding_dim is None:
        if hidden_dims:
            raise ConfigError("extractor.hidden_dims need extractor.embedding_dim, the width of the last layer.")
        return nn.Identity()
    widths = [num_features, *hidden_dims, embedding_dim]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
