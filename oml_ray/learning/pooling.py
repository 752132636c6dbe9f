"""Global pooling: how a network's feature map, or its tokens, become one vector."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oml_ray.errors import ConfigError, reason_of

Pooling = Literal["default", "avg", "max", "avgmax", "gem"]


class GeM(nn.Module):
    """Generalised mean pooling with a learned exponent, the same for all channels.

    pooled = (mean over positions of max(x, eps)^p)^(1/p): p = 1 is the average, p -> infinity the maximum. It is meant
    for features that are not negative, as behind a ReLU: of signed ones (a transformer's tokens) it sees the positive
    part. It is computed in float32 (float64 for float64), relative to each channel's maximum, so that no power
    overflows: half precision is safe at any p.
    Source: Radenovic et al. 2018, "Fine-tuning CNN image retrieval with no human annotation".

    Example:
        >>> features = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2)
        >>> GeM(p=1.0)(features).flatten()
        tensor([2.5000], grad_fn=<ViewBackward0>)
    """

    def __init__(
        self, p: float = 3.0, *, eps: float = 1e-6, channels_last: bool = False, num_prefix_tokens: int = 0
    ) -> None:
        """Configure the pooling.

        Args:
            p: initial exponent, above 0.
            eps: smallest feature, above 0: the exponent's gradient takes logarithms.
            channels_last: feature maps are (n, height, width, F) rather than (n, F, height, width).
            num_prefix_tokens: tokens (class token, registers) before those of the patches; they are left out.
        """
        super().__init__()
        if not 0 < p < math.inf:
            raise ValueError(f"p must be above 0 and finite, found {p}.")
        if not 0 < eps < math.inf:
            raise ValueError(f"eps must be above 0 and finite, found {eps}.")
        self.p = nn.Parameter(torch.full((1,), float(p)))
        self.eps, self.channels_last, self.num_prefix_tokens = eps, channels_last, num_prefix_tokens

    def forward(self, features: Tensor) -> Tensor:
        """Pool a feature map (n, F, height, width) or tokens (n, length, F); pooled axes stay, with length 1."""
        axes: tuple[int, ...]
        if features.ndim == 3:
            features, axes = features[:, self.num_prefix_tokens :], (1,)
        else:
            axes = (1, 2) if self.channels_last else (2, 3)
        exact = features if features.dtype == torch.float64 else features.float()
        exact, p = exact.clamp(min=self.eps), self.p.to(exact.dtype)
        # The generalised mean of c x is c times that of x: any constant may be taken out, gradients included.
        largest = exact.detach().amax(axes, keepdim=True)
        pooled = (exact / largest).pow(p).mean(axes, keepdim=True).pow(1 / p) * largest
        return pooled.to(features.dtype)


def replace_pooling(backbone: nn.Module, pooling: Pooling, *, model: str, gem_p: float = 3.0) -> GeM | None:
    """Change the global pooling of a timm network that has no classifier.

    Args:
        backbone: the network; its own pooling is set to "avg", "max" or "avgmax", or taken out for "gem".
        pooling: how to pool; "default" leaves the network as it is.
        model: how messages call the network.
        gem_p: initial exponent of "gem".

    Returns:
        What has to pool instead, or None where the network does it itself: `pooled_features` takes it.

    Raises:
        ConfigError: the network cannot pool like that.
    """
    if pooling == "default":
        return None
    # timm's networks are modules of many classes: what they share is a habit, not a type.
    network: Any = backbone
    try:
        # Done on the finished network: asked for earlier, some place their last norm elsewhere and lose its weights.
        network.reset_classifier(0, global_pool="" if pooling == "gem" else pooling)
    except Exception as error:  # assertions, mostly
        raise ConfigError(f"extractor.pooling: {model} has no {pooling} pooling ({reason_of(error)}).") from None
    if pooling != "gem":
        return None
    num_prefix_tokens = getattr(network, "num_prefix_tokens", None)
    if num_prefix_tokens is None and getattr(network, "cls_token", None) is not None:
        raise ConfigError(f"extractor.pooling: {model} does not say which of its tokens are patches: it has no gem.")
    return GeM(
        gem_p,
        channels_last=getattr(network, "output_fmt", "NCHW") == "NHWC",
        num_prefix_tokens=num_prefix_tokens or 0,
    )


def pooled_features(backbone: nn.Module, gem: GeM | None, pixels: Tensor) -> Tensor:
    """Run a network on pixels (n, 3, height, width), pooled by `gem` or by itself, to features (n, F)."""
    if gem is None:
        features: Tensor = backbone(pixels)
        return features
    network: Any = backbone
    # What the network does after its pooling (a norm, a layer) it does to a map of one position as well.
    return network.forward_head(gem(network.forward_features(pixels))).flatten(1)  # type: ignore[no-any-return]
