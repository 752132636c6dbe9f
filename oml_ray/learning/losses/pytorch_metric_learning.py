"""The losses of the package pytorch-metric-learning as criteria; the only file that imports it."""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
from typing import Any

from torch import Tensor, nn

from oml_ray.errors import ConfigError, reason_of
from oml_ray.learning.losses.criterion import Loss, zero_loss

UNFIT = ("BaseMetricLossFunction", "GenericPairLoss", "VICRegLoss")
"""Two abstract losses, and one that compares two views of an image and takes no labels."""


class PytorchMetricLearningLoss(nn.Module):
    """Any loss of pytorch-metric-learning that learns from embeddings and labels, by the name it has there.

    It sees the global batch as every criterion does, without a memory. Losses that need to know how many labels or
    dimensions there are (parameters `num_classes`, `embedding_size` or `descriptors_dim` without a default) are told,
    and take labels from 0 to num_labels - 1. A loss that draws at random (`triplets_per_anchor` given as a number)
    draws differently on every rank.
    """

    def __init__(
        self, name: str, arguments: dict[str, Any], num_labels: int | None = None, embedding_dim: int | None = None
    ) -> None:
        """Make the loss called `name`.

        Args:
            name: of a class of `pytorch_metric_learning.losses`, such as "TupletMarginLoss".
            arguments: of its constructor, by name.
            num_labels: labels of the training data, for the losses that need to know.
            embedding_dim: dimension D of the embeddings, for the losses that need to know.

        Raises:
            ConfigError: the package is missing, or has no such loss, or the loss refuses its arguments.
        """
        super().__init__()
        losses = _losses()
        if name not in losses:
            folded = {known.casefold(): known for known in losses}
            near = [folded[match] for match in difflib.get_close_matches(name.casefold(), folded, n=5)]
            hint = f"near: {', '.join(near)}" if near else f"there are: {', '.join(losses)}"
            raise ConfigError(f"pytorch-metric-learning has no loss {name!r} of embeddings and labels; {hint}.")
        self.loss = _make(losses[name], arguments, num_labels, embedding_dim)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Loss:
        """Compute the loss of embeddings (B, D) with int64 labels (B,); there is nothing more to log."""
        if not len(labels):  # of which some losses of the package make NaN
            return zero_loss(embeddings, self.parameters()), {}
        return self.loss(embeddings, labels), {}


def _losses() -> dict[str, type[nn.Module]]:
    """The package's losses of embeddings and labels, by name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages that it imports: nothing that a user could mend
            losses = importlib.import_module("pytorch_metric_learning.losses")
    except ImportError as error:
        raise ConfigError(
            "Losses of pytorch-metric-learning need the package, which cannot be imported "
            f"({reason_of(error)}): pip install 'oml_ray[pml]'."
        ) from error
    base = losses.BaseMetricLossFunction
    return {
        name: value
        for name, value in sorted(vars(losses).items())
        if isinstance(value, type) and issubclass(value, base) and name not in UNFIT
    }


def _make(
    loss: type[nn.Module], arguments: dict[str, Any], num_labels: int | None, embedding_dim: int | None
) -> nn.Module:
    parameters = _parameters(loss)
    unknown = [name for name in arguments if name not in parameters]
    if unknown:
        raise ConfigError(f"{loss.__name__} takes no {', '.join(unknown)}; it takes {', '.join(sorted(parameters))}.")
    sizes = {"num_classes": num_labels, "embedding_size": embedding_dim, "descriptors_dim": embedding_dim}
    needed = [name for name in sizes if name in parameters and parameters[name].default is inspect.Parameter.empty]
    given = {**{name: sizes[name] for name in needed}, **arguments}
    missing = [name for name in needed if given[name] is None]
    if missing:
        raise ConfigError(f"{loss.__name__} needs {', '.join(missing)}: give num_labels and embedding_dim.")
    try:
        return loss(**given)
    except Exception as error:  # whatever the package checks its arguments with
        found = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ConfigError(f"{loss.__name__}({found}) is refused: {reason_of(error)}.") from error


def _parameters(loss: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """Constructor parameters by name; those of the base classes too, which are handed on as keywords."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in loss.__mro__[: loss.__mro__.index(nn.Module)]:
        if base.__name__ not in UNFIT and "__init__" in vars(base):
            for name, parameter in inspect.signature(vars(base)["__init__"]).parameters.items():
                if name != "self" and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                    parameters.setdefault(name, parameter)
    return parameters
