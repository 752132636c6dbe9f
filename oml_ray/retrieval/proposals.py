r"""Which pairs of two blocks can be among the k nearest: told by one float32 product, with proven slack.

**Points.** Rows become points: for euclidean x -> s(x - c), for cosine x -> x/|x| - c. The power of two s brings norms
to at most 1 (no overflow at 1e30, nothing lost at 1e-30). The centre c is the mean of some queries: embeddings that lie
close together, as those of a collapsed model, then have short points. For points q, g of a pair

    h = |q - g|^2 / 2 = |q|^2/2 + S,    S = |g|^2/2 - q.g

so one product with a bias yields the scores S. h is s^2 distance^2 / 2 for euclidean and the distance itself for
cosine, where a zero row, whose distances are 1 by definition, has h = 1/2 and so adds 1/2 to its |.|^2/2.

**Slack.** Let u = 2^-24, a = |q|, b = the longest |g| of the block. The computed S is off from the true one by at most

- the product: |fl(x.y) - x.y| <= gamma_d |x||y|, gamma_n = nu/(1 - nu), for any order of summation, with or without
  fused multiply-add (Higham 2002, section 3.1); with the bias as one more term, gamma_(d+1) (ab + b^2/2). This needs
  true float32: TF32 and bfloat16 are switched off (`true_float32`);
- the rounding of s(x - c), relative u in each coordinate, also in |q|^2/2: 2.1u (a + b)^2/2;
  that of |g|^2/2 to float32: u b^2/2;
- for cosine the rounding of x/|x| before centring, a vector no longer than 3u on either side: 6.1u (a + b) + 18.1u^2;
- underflow, flushed or gradual: at most 2^-126 * 2^12 in each of the d + 1 coordinates, products and sums.

    slack = (gamma_(d+1) + 8u) (a + b)^2/2  [+ 8u (a + b) + 64u^2 for cosine]  + (d + 1) 2^-100

covers their sum; what is left of 8u pays for the float64 arithmetic on norms and limits.

**Limit.** If D is the k-th smallest float32 distance found so far, a pair can enter only if its distance rounds to at
most D (at equality the ids decide), so it lies below the next float32 after D, so S < limit(D): the value of S there
plus slack. Before k neighbors are known, the k-th smallest score of a block plus slack bounds D; so do the smallest
scores of k disjoint tiles.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oml_ray.distances import Distance

UNIT_ROUNDOFF = 2.0**-24
EXACT_ARITHMETIC = 2.0**-40  # far above the error of float64 arithmetic, far below that of float32
TILE = 64  # columns looked at together: one pass over the scores leaves their minima
PAIRS_AT_ONCE = 2**18


@dataclass(frozen=True, eq=False)
class Piece:
    """A gallery block as points (g, d), their bias (g,) in the scores, the longest of them, and the scale of all."""

    points: Tensor
    bias: Tensor
    longest: float
    scale: float


class Proposals:
    """Proposes pairs of query blocks and gallery pieces.

    Arguments:
        rows: float32 (Q, d), the queries.
        norms: float64 (Q,), their norms.
        blocks: slices of the queries, the blocks they are visited in.
        distance: "euclidean" or "cosine".
    """

    def __init__(self, rows: Tensor, norms: Tensor, blocks: list[slice], distance: Distance) -> None:
        self.rows, self.norms, self.distance = rows, norms, distance
        self.centre = rows.new_zeros(rows.shape[1])
        scale = self._scale(norms)
        if blocks:
            first = blocks[0]
            self.centre = self._points(rows[first], norms[first], scale).double().mean(dim=0).float() / scale
        self.lengths = torch.zeros_like(norms)  # |q| at scale 1
        for b in blocks:
            self.lengths[b] = _norms(self._points(rows[b], norms[b], scale)) / scale
        self.buffer = rows.new_empty(0)

    def piece(self, rows: Tensor, norms: Tensor) -> Piece:
        """Prepares gallery rows float32 (g, d), g >= 1, with norms float64 (g,)."""
        scale = self._scale(torch.cat([self.norms, norms]))
        points = self._points(rows, norms, scale)
        lengths = _norms(points)
        return Piece(points, self._halved(lengths, norms).float(), float(lengths.max()), scale)

    def propose(
        self, b: slice, piece: Piece, excluded: tuple[Tensor, Tensor], kth: Tensor, k: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Every pair that can be among the k nearest of its query, and few others.

        Arguments:
            b: the block of queries. piece: the gallery block.
            excluded: positions (rows, columns) of pairs that may not be proposed.
            kth: float32 (queries,), the k-th smallest distance found so far, inf before there are k.
            k: number of neighbors.

        Returns:
            Iterator of int64 positions (rows, columns), sorted by row; a bounded number of pairs at a time.
        """
        queries = self._points(self.rows[b], self.norms[b], piece.scale)
        height, width = len(queries), len(piece.points)
        tiles = -(-width // TILE)
        if self.buffer.numel() < height * tiles * TILE:
            self.buffer = self.rows.new_empty(height * tiles * TILE)
        scores = self.buffer[: height * tiles * TILE].view(height, tiles * TILE)
        scores[:, width:] = torch.inf
        torch.addmm(piece.bias, queries, piece.points.T, alpha=-1, out=scores[:, :width])
        scores[excluded] = torch.inf
        minima = scores.view(height, tiles, TILE).amin(dim=2)  # (queries, tiles)
        lengths = self.lengths[b] * piece.scale
        slack = self._slack(lengths, piece.longest)
        offsets = self._halved(lengths, self.norms[b])
        (unknown,) = torch.isinf(kth).nonzero(as_tuple=True)
        if len(unknown) and width >= k:
            some = minima if tiles >= 4 * k else scores
            some = some if len(unknown) == height else some[unknown]
            nearest = some.topk(k, dim=1, largest=False, sorted=False).values.amax(dim=1).double()
            kth = kth.index_copy(0, unknown, self._bound(nearest + slack[unknown] + offsets[unknown], piece.scale))
        yield from _below(scores, minima, self._limits(kth, offsets, slack, piece.scale))

    def _scale(self, norms: Tensor) -> float:
        """The power of two s; its exponent is clamped so that s and 1/s are normal float32."""
        largest = float(norms.max()) if len(norms) else 0.0
        if self.distance == "cosine" or largest == 0:
            return 1.0
        return 2.0 ** min(126, max(-126, -math.frexp(largest)[1]))

    def _points(self, rows: Tensor, norms: Tensor, scale: float) -> Tensor:
        """Points (n, d) of rows (n, d): scaled (euclidean) or of unit length (cosine), then centred."""
        if self.distance == "euclidean":
            return torch.add(self.centre * -scale, rows, alpha=scale)
        # 1 / norm may exceed float32: first an exact power of two, then what is left of it
        powers = torch.exp2(-torch.frexp(norms).exponent.double().clamp_(-126, 126)).float()
        remainders = 1 / (norms * powers).masked_fill(norms == 0, 1)
        return (rows * powers[:, None]).mul_(remainders.float()[:, None]).sub_(self.centre)

    def _halved(self, lengths: Tensor, norms: Tensor) -> Tensor:
        """|point|^2 / 2, and the 1/2 that a zero row adds for cosine; float64 (n,)."""
        halves = lengths.square() / 2
        return halves + (norms == 0) / 2 if self.distance == "cosine" else halves

    def _slack(self, a: Tensor, b: float) -> Tensor:
        """Bound on the error of the scores, float64 (queries,): see the head of this file."""
        n, u = self.rows.shape[1] + 1, UNIT_ROUNDOFF
        slack = (n * u / (1 - n * u) + 8 * u) * (a + b).square() / 2 + n * 2.0**-100
        return slack if self.distance == "euclidean" else slack + 8 * u * (a + b) + 64 * u**2

    def _bound(self, halves: Tensor, scale: float) -> Tensor:
        """A float32 distance that no distance with at most this h rounds above."""
        halves = halves.clamp(min=0)
        if self.distance == "cosine":
            return _next_float32(halves + EXACT_ARITHMETIC)
        return _next_float32((2 * halves).sqrt() / scale * (1 + EXACT_ARITHMETIC))

    def _limits(self, kth: Tensor, offsets: Tensor, slack: Tensor, scale: float) -> Tensor:
        """float32 (queries,): a pair whose score is not below it has a distance that rounds above `kth`."""
        above = _next_float32(kth).double()
        if self.distance == "cosine":
            return _next_float32(above + EXACT_ARITHMETIC - offsets + slack)
        return _next_float32((above * scale).square() / 2 * (1 + EXACT_ARITHMETIC) - offsets + slack)


@contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """No TF32, no bfloat16 and no autocast inside float32 products, whatever the process has allowed."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    allowed = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision


def _below(scores: Tensor, minima: Tensor, limits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions (rows, columns) of scores below their row's limit, sorted by row, at most PAIRS_AT_ONCE at a time."""
    tiles = minima.shape[1]
    near = _nonzero(minima < limits[:, None])  # (near,) tiles that hold at least one
    tiled = scores.view(-1, TILE)
    for start in range(0, len(near), PAIRS_AT_ONCE // TILE):
        some = near[start : start + PAIRS_AT_ONCE // TILE]
        rows = some // tiles
        flat = _nonzero(tiled.index_select(0, some) < limits[rows][:, None])
        which = flat // TILE
        yield rows[which], (some % tiles * TILE)[which] + flat % TILE


def _nonzero(mask: Tensor) -> Tensor:
    """Flat positions of true values; numpy finds the few among many ten times as fast as torch."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero()[:, 0]


def _next_float32(x: Tensor) -> Tensor:
    """A float32 strictly above x (inf stays inf)."""
    x = x.float()
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def _norms(points: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(points, dim=1, dtype=torch.float64)
    return norms
