"""A head whose proxies are split over the ranks by label, for more labels than one device holds (Partial FC)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from oml_ray.learning.losses.criterion import Loss
from oml_ray.learning.losses.margins import Margin, check_head, check_labels, positions, unit, with_slope
from oml_ray.learning.row_sparse import RowSparseOptimizer, State

CHUNK_ELEMENTS = 2**22  # cosines worked on at a time: 16 MiB of float32; more is not faster
HASH_BITS = 53  # of the 64: as many as a float64 holds exactly
INITIAL, SAMPLE = 0, 1  # what a hash is drawn for
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: from one state of splitmix64 to the next


class ShardedHead(nn.Module):
    """Softmax over cosines with learned proxies, with a margin; each rank holds the proxies of its range of labels.

    Rank r of W holds the rows [r * C // W, (r + 1) * C // W) of the C labels. All ranks give it the same global batch,
    and get the loss of the replicated head and the whole gradient by the embeddings. The gradient of the own proxies is
    exact as it is: they and their optimizer's state are neither parameters nor buffers of the module, so that nobody
    averages, broadcasts or saves them as if they were replicated. The head moves them itself; a step of training is
    `begin_step`, `forward` and `backward` (once), `gradient_square_sum` and `scale_gradient_` (to clip), `step`.

    At a sample rate below 1 a step uses the batch's labels and about sample_rate * C others, drawn by a hash of (seed,
    step, position of the label), and moves no other proxy. It waits for the device once, to learn how many proxies of
    the rank these are; at sample rate 1 nothing waits.

    Sources: An et al. 2021, "Partial FC"; An et al. 2022, "Killing two birds with one stone".

    Example:
        >>> from oml_ray.learning.losses.margins import AngularMargin
        >>> from oml_ray.learning.row_sparse import RowSparseSGD
        >>> labels, optimizer = torch.tensor([3, 8, 9]), RowSparseSGD(lr=0.1)
        >>> head = ShardedHead(labels, 2, AngularMargin(0.5), optimizer, scale=64.0)
        >>> head.begin_step(0)
        >>> loss, logs = head(torch.randn(4, 2, requires_grad=True), torch.tensor([8, 8, 3, 9]))
        >>> loss.backward()
        >>> head.step()
    """

    def __init__(
        self,
        labels: Tensor,
        embedding_dim: int,
        margin: Margin,
        optimizer: RowSparseOptimizer,
        *,
        scale: float,
        sample_rate: float = 1.0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Draw the own proxies, the same for a label at any world size.

        Args:
            labels: int64 (C,), all that a batch may hold, sorted, each once.
            embedding_dim: D.
            margin: lowers the cosine with the own label's proxy.
            optimizer: moves the proxies.
            scale: of the cosines, > 0.
            sample_rate: share of the labels that a step uses beside those of its batch, in (0, 1].
            seed: of the proxies and the samples.
            rank: of this process, in [0, world_size).
            world_size: processes of the default group of `torch.distributed` (not needed for 1), at most C.

        Raises:
            ValueError: an argument is out of its range.
        """
        super().__init__()
        check_head(embedding_dim, scale)
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], found {sample_rate}.")
        self.labels, self.num_labels = check_labels(labels), len(labels)
        if not 0 <= rank < world_size <= len(labels):
            allowed = f"rank must be in [0, world_size), and world_size at most {len(labels)}, the labels to split"
            raise ValueError(f"{allowed}; found rank {rank} of world_size {world_size}.")
        self.margin, self.optimizer, self.scale = margin, optimizer, scale
        self.sample_rate, self.seed, self.world_size = sample_rate, seed, world_size
        self.bounds = [r * len(labels) // world_size for r in range(world_size + 1)]
        self.start, self.stop = self.bounds[rank], self.bounds[rank + 1]
        self.weight = _initial_rows(self.start, self.stop, embedding_dim, seed)
        self.state: State = optimizer.new_state(self.weight)
        self._step: int | None = None
        self._rows: Tensor | None = None  # those that this step uses, None for all
        self._used: Tensor | None = None  # their proxies: the leaf that gets the gradient

    def begin_step(self, step: int) -> None:
        """Forget the gradient of the step before, and sample by `step`, the number of steps since training began."""
        self._step, self._rows, self._used = step, None, None

    def forward(self, embeddings: Tensor, labels: Tensor) -> Loss:
        """Compute the loss of the global batch; every rank calls it, with equal arguments.

        Args:
            embeddings: (B, D) of the proxies' dtype, of any length.
            labels: int64 (B,), among those of the constructor.

        Returns:
            The scalar loss, and the logs of `ArcFaceLoss`; `accuracy` is that among the proxies in use.

        Raises:
            RuntimeError: `begin_step` was not called, or a label is unknown.
        """
        if self._step is None or self._used is not None:
            raise RuntimeError("A sharded head computes one loss a step: call begin_step(step) before.")
        local = positions(labels, self.labels) - self.start
        is_own = (local >= 0) & (local < len(self.weight))
        self._rows = self._sample(local, is_own, self._step)
        if self._rows is None:
            self._used, columns = self.weight.detach(), local
        else:
            self._used = self.weight[self._rows]
            columns = torch.searchsorted(self._rows, local).masked_fill_(~is_own, -1)
        self._used.requires_grad_(torch.is_grad_enabled())
        loss, own_cosines, other_cosines = _MarginSoftmax.apply(
            unit(embeddings)[0], self._used, columns, self.margin, self.scale, self.world_size
        )
        logs = {
            "accuracy": _mean((own_cosines >= other_cosines).to(own_cosines.dtype)),
            "angle": _mean(own_cosines.clamp(-1, 1).acos()).rad2deg(),
        }
        return loss, logs

    def _sample(self, local: Tensor, is_own: Tensor, step: int) -> Tensor | None:
        """Rows that a step uses, rising; None for all of them. local, is_own: (batch,)."""
        if self.sample_rate == 1:
            return None
        labels = torch.arange(self.start, self.stop, device=local.device)
        used = _hash(labels, self.seed, SAMPLE, step) < int(self.sample_rate * 2**HASH_BITS)
        used = nn.functional.pad(used, (0, 1))  # the last one stands for the labels of other ranks
        return used.index_fill_(0, local.masked_fill(~is_own, len(labels)), True)[:-1].nonzero()[:, 0]

    @torch.no_grad()
    def gradient_square_sum(self) -> Tensor:
        """Sum the squares of the gradient by the proxies of all ranks, each of which has to call it, to one scalar."""
        return _all_reduce(torch.linalg.vector_norm(self._gradient()).square(), dist.ReduceOp.SUM, self.world_size)

    @torch.no_grad()
    def scale_gradient_(self, factor: float | Tensor) -> None:
        """Multiply the gradient by the own proxies, to clip it or to undo the scale of a loss."""
        self._gradient().mul_(factor)

    def step(self, factor: float = 1.0) -> None:
        """Move the own proxies that the step used, at `factor` times the learning rate of the optimizer."""
        self.optimizer.step(self.weight, self.state, self._gradient(), self._rows, factor)
        self._step = self._rows = self._used = None

    def _gradient(self) -> Tensor:
        if self._used is None or self._used.grad is None:
            raise RuntimeError("A sharded head has no gradient: call begin_step, forward and backward before.")
        return self._used.grad

    def shard_state(self) -> dict[str, Tensor]:
        """Give the proxies and their optimizer's state, whose first axis is that of the own labels; not copies."""
        return {"weight": self.weight, **self.state}

    @torch.no_grad()
    def load_rows(self, start: int, tensors: Mapping[str, Tensor]) -> None:
        """Take those rows of another `shard_state` that are this rank's.

        Args:
            start: position of the label of their first row.
            tensors: as those of `shard_state`, but for the number of rows.

        Raises:
            ValueError: they are of another embedding dimension or optimizer.
        """
        own = self.shard_state()
        expected, found = ({name: tuple(t.shape[1:]) for name, t in rows.items()} for rows in (own, tensors))
        if expected != found:
            raise ValueError(f"Rows of a sharded head must have the shapes {expected}, found {found}.")
        for name, rows in tensors.items():
            first, last = max(start, self.start), min(start + len(rows), self.stop)
            if first < last:
                own[name][first - self.start : last - self.start].copy_(rows[first - start : last - start])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and convert the proxies along with the module."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.labels, self.weight = fn(self.labels), fn(self.weight)
        self.state = {name: fn(tensor) for name, tensor in self.state.items()}
        return self


class _MarginSoftmax(torch.autograd.Function):
    """Cross-entropy over the proxies of all ranks, and its gradient along with it, as it is that of a scalar.

    So no cosines are kept for the backward pass, and no collective runs in it. The proxies are gone over twice, in
    chunks: for the sums of exponentials, and for the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, proxies: Tensor, columns: Tensor, margin: Margin, scale: float, world_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """embeddings: (B, D) of length 1; proxies: (n, D); columns: (B,), the own label's proxy, if in [0, n)."""
        size = max(1, len(embeddings))
        chunks = torch.split(proxies, max(1, CHUNK_ELEMENTS // size)) if len(proxies) else ()
        lowest = embeddings.new_full((len(embeddings),), torch.finfo(embeddings.dtype).min)
        own, others, sums = lowest, lowest, torch.zeros_like(lowest)
        start, terms = 0, lowest
        for chunk in chunks:
            terms = embeddings @ unit(chunk)[0].T  # (batch, chunk)
            own = _swap(terms, columns - start, -torch.inf, else_=own)
            before, others = others, torch.maximum(others, terms.amax(dim=1))
            terms.sub_(others[:, None]).mul_(scale).exp_()
            sums = sums * ((before - others) * scale).exp() + terms.sum(dim=1)
            start += len(chunk)
        own, largest_other = _all_reduce(torch.stack([own, others]), dist.ReduceOp.MAX, world_size)
        lowered, slope = with_slope(margin, own)
        largest = torch.maximum(lowered, largest_other)
        to_largest = ((others - largest) * scale).exp()
        negative = _all_reduce(sums * to_largest, dist.ReduceOp.SUM, world_size)
        total = negative + ((lowered - largest) * scale).exp()
        loss = _mean(total.log() + (largest - lowered) * scale)
        ctx.mark_non_differentiable(own, largest_other)
        if not any(ctx.needs_input_grad):
            return loss, own, largest_other
        # By the cosines: softmax for other labels; softmax - 1 = -negative / total, free of cancellation, for the own.
        by_other = to_largest / total * (scale / size)  # of each exponential
        by_own = -negative / total * slope * (scale / size)
        embedding_gradient, proxy_gradient = torch.zeros_like(embeddings), torch.empty_like(proxies)
        start = 0
        for chunk in chunks:
            (directions, lengths), local = unit(chunk), columns - start
            if len(chunks) > 1:  # else they are still there
                terms = embeddings @ directions.T  # (batch, chunk)
                _swap(terms, local, -torch.inf, else_=own)
                terms.sub_(others[:, None]).mul_(scale).exp_()
            _swap(terms.mul_(by_other[:, None]), local, by_own, else_=own)
            embedding_gradient.addmm_(terms, directions)
            direct = terms.T @ embeddings  # (chunk, D)
            direct -= (direct * directions).sum(dim=1, keepdim=True) * directions
            torch.div(direct, lengths, out=proxy_gradient[start : start + len(chunk)])
            start += len(chunk)
        ctx.save_for_backward(_all_reduce(embedding_gradient, dist.ReduceOp.SUM, world_size), proxy_gradient)
        return loss, own, largest_other

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        by_embeddings, by_proxies = ctx.saved_tensors
        return gradients[0] * by_embeddings, gradients[0] * by_proxies, None, None, None, None


def _swap(matrix: Tensor, columns: Tensor, values: float | Tensor, *, else_: Tensor) -> Tensor:
    """Put a value into each row of (B, n) at its column, if in [0, n); give what was there, or `else_`; all (B,)."""
    inside = (columns >= 0) & (columns < matrix.shape[1])
    index = columns.masked_fill(~inside, 0)[:, None]  # (batch, 1)
    found = matrix.gather(1, index)[:, 0]
    matrix.scatter_(1, index, torch.where(inside, values, found)[:, None])
    return torch.where(inside, found, else_)


def _mean(values: Tensor) -> Tensor:
    """Mean of (B,); zero of an empty batch."""
    return values.sum() / max(1, len(values))


def _all_reduce(tensor: Tensor, operation: Any, world_size: int) -> Tensor:
    if world_size > 1:
        dist.all_reduce(tensor, operation)
    return tensor


def _initial_rows(start: int, stop: int, embedding_dim: int, seed: int) -> Tensor:
    """Rows of length 1 or so, float32, drawn uniformly by (seed, row, column): the same bits on any rank."""
    rows, step = torch.empty(stop - start, embedding_dim), max(1, CHUNK_ELEMENTS // embedding_dim)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        hashes = _hash(torch.arange(first * embedding_dim, last * embedding_dim), seed, INITIAL)
        uniform = hashes.double().mul_(2.0 ** (1 - HASH_BITS)).sub_(1).mul_(math.sqrt(3 / embedding_dim))
        rows[first - start : last - start] = uniform.view(-1, embedding_dim)
    return rows


def _hash(index: Tensor, *keys: int) -> Tensor:
    """Hash int64 (n,) and keys to int64 (n,) in [0, 2^HASH_BITS): outputs of a splitmix64 seeded by the keys."""
    state = torch.zeros((), dtype=torch.int64)
    for key in keys:
        state = _splitmix64(state ^ _signed(key))
    return (_splitmix64(index * _signed(GOLDEN) + state) >> 64 - HASH_BITS).bitwise_and(2**HASH_BITS - 1)


def _splitmix64(x: Tensor) -> Tensor:
    """One output of splitmix64 (Steele, Lea, Flood 2014) from its states x, in wrapping 64-bit arithmetic."""
    x = x + _signed(GOLDEN)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return x


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return (value + 2**63) % 2**64 - 2**63
