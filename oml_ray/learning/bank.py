"""The memory bank: embeddings of the last global batches, compared with the present one."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from oml_ray.learning.losses.criterion import Loss, PairCriterion
from oml_ray.learning.pairs import Memory


class Bank:
    """The last `size_in_batches` global batches, first in first out; equal on every rank, as the batches are.

    Source: Wang et al. 2020, "Cross-batch memory for embedding learning".

    Example:
        >>> bank = Bank(size_in_batches=2)
        >>> for label in range(3):
        ...     bank.push(torch.zeros(4, 8), torch.full((4,), label))
        >>> bank.memory(torch.zeros(1, 8)).labels.tolist()
        [2, 2, 2, 2, 1, 1, 1, 1]
    """

    def __init__(self, size_in_batches: int) -> None:
        """Hold `size_in_batches` (at least 1) batches; memory is taken at the first push."""
        if size_in_batches < 1:
            raise ValueError(f"size_in_batches must be at least 1, found {size_in_batches}.")
        self.size_in_batches = size_in_batches
        self._pointer = self._fill = 0  # in batches
        self._embeddings: Tensor | None = None  # (batches, batch, D)
        self._labels: Tensor | None = None  # (batches, batch)

    def memory(self, like: Tensor) -> Memory | None:
        """Give what is held, on the device and in the dtype of `like`; None while it is empty."""
        if self._embeddings is None or self._labels is None or not self._fill:
            return None
        # After a resume it comes from the checkpoint, in host memory.
        self._embeddings, self._labels = self._embeddings.to(like), self._labels.to(like.device)
        held = slice(0, self._fill)
        # A copy: the next push writes into what is held, while a backward pass may still need it.
        return Memory(self._embeddings[held].flatten(0, 1).clone(), self._labels[held].flatten().clone())

    @torch.no_grad()
    def push(self, embeddings: Tensor, labels: Tensor) -> None:
        """Put in a global batch, in place of the oldest when full.

        Args:
            embeddings: (B, D), as many as in the first batch; a batch without any is not remembered.
            labels: int64 (B,).

        Raises:
            ValueError: another number or dimension of embeddings than in the batches before.
        """
        if not len(labels):
            return
        if self._embeddings is None or self._labels is None:
            self._embeddings = embeddings.new_zeros((self.size_in_batches, *embeddings.shape))
            self._labels = labels.new_zeros((self.size_in_batches, *labels.shape))
        if embeddings.shape != self._embeddings.shape[1:]:  # torch would repeat a single embedding
            raise ValueError(
                f"the bank holds batches of {tuple(self._embeddings.shape[1:])} embeddings, found "
                f"{tuple(embeddings.shape)}: give batches of one size."
            )
        self._embeddings[self._pointer], self._labels[self._pointer] = embeddings, labels
        self._pointer = (self._pointer + 1) % self.size_in_batches
        self._fill = min(self._fill + 1, self.size_in_batches)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed bank needs."""
        return {
            "embeddings": self._embeddings, "labels": self._labels, "pointer": self._pointer, "fill": self._fill,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of `state_dict`.

        Raises:
            ValueError: it is of a bank of another size.
        """
        embeddings = state["embeddings"]
        if embeddings is not None and len(embeddings) != self.size_in_batches:
            raise ValueError(f"the bank holds {len(embeddings)} batches, {self.size_in_batches} are asked for")
        self._embeddings, self._labels = embeddings, state["labels"]
        self._pointer, self._fill = state["pointer"], state["fill"]


class BankedCriterion(nn.Module):
    """A criterion of pairs whose anchors also meet positives and negatives of earlier batches."""

    def __init__(self, criterion: nn.Module, bank: Bank) -> None:
        """Compute `criterion` (a `PairCriterion`) with the memory of `bank`."""
        super().__init__()
        self.criterion, self.bank = criterion, bank

    def forward(self, embeddings: Tensor, labels: Tensor) -> Loss:
        """Compute the loss of embeddings (B, D) with int64 labels (B,), and remember them."""
        memory = self.bank.memory(embeddings)
        loss, logs = cast(PairCriterion, self.criterion)(embeddings, labels, memory)
        if memory is not None:
            same = (labels[:, None] == memory.labels[None, :]).sum() / max(1, len(labels))  # of (batch, memory)
            logs = {**logs, "bank_positives": same, "bank_negatives": len(memory.labels) - same}
        self.bank.push(embeddings, labels)
        return loss, logs

    # Not buffers: DDP would send them from rank to rank at every step, though they are equal.
    def get_extra_state(self) -> dict[str, Any]:
        """Keep the bank in checkpoints."""
        return self.bank.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the bank from a checkpoint."""
        self.bank.load_state_dict(state)
