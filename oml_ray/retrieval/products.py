r"""Half squared distances of two blocks of embeddings by one matrix product, with proven bounds of its error.

**Points.** Rows become points: for euclidean x -> s(x - c), for cosine x -> x/|x| - c. The power of two s brings norms
to at most 1 (no overflow at 1e30, nothing lost at 1e-30). The centre c is the mean of some queries: embeddings that lie
close together, as those of a collapsed model, then have short points. With precision bf16 points are rounded to
bfloat16, x -> x + e; |e| is known for every row. For points q, g of a pair

    h = |q - g|^2 / 2 = |q|^2/2 + |g|^2/2 - q.g  =  [-q, |q|^2/2, 1] . [g, 1, |g|^2/2]

so one product of slightly longer vectors yields the scores h: of one query for all items, and of one item for all
queries, on the same scale. (In bfloat16 a half is the sum of three coordinates of 8 bits.) h is s^2 distance^2 / 2 for
euclidean and the distance itself for cosine, where a zero row, whose distances are 1 by definition, has h = 1/2 and so
adds 1/2 to its |.|^2/2.

**Slack.** Let u = 2^-24, a = |q|, b = the longest |g| of the block. The computed h is off from that of the points by

- the product: |fl(x.y) - x.y| <= gamma_n sum |x_i y_i|, gamma_n = nu/(1 - nu), for any order of summation, with or
  without fused multiply-add (Higham 2002, section 3.1), n the number of coordinates; in bfloat16 products are exact in
  float32, which sums: gamma_2n covers instructions that round twice. sum |x_i y_i| <= (a + b)^2 / 2. This needs true
  float32: TF32 is switched off (`true_float32`);
- the rounding of s(x - c), relative u in each coordinate, also in |q|^2/2: 2.1u (a + b)^2/2; that of the halves u of
  them;
- for cosine the rounding of x/|x| before centring, a vector no longer than 3u on either side: 6.1u (a + b) + 18.1u^2;
- underflow, flushed or gradual: at most 2^-126 * 2^12 in each coordinate, products and sums.

    slack = (gamma + 8u) (a + b)^2/2  [+ 8u (a + b) + 64u^2 for cosine]  + n 2^-100

covers their sum; what is left of 8u pays for the float64 arithmetic on norms and limits. Rounding points to bfloat16
moves |q - g| by at most r = |e_q| + |e_g|, so h by at most r sqrt(2h) + r^2/2, and rounding the product's output to
bfloat16 moves it by a share of 2^-9.

**Limits.** A distance that rounds to at most D lies below the next float32 after D, so its score lies below the h of
that distance plus slack (`above`); one that rounds to at least D has a score of at least the h of the float32 before D
less the slack (`below`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from oml_ray.distances import Distance

Precision = Literal["fp32", "bf16"]

UNIT_ROUNDOFF = 2.0**-24
EXACT_ARITHMETIC = 2.0**-40  # far above the error of float64 arithmetic, far below that of float32
OUTPUT_ROUNDING = {"fp32": 0.0, "bf16": 2.0**-8}  # of a score, with room to spare


@dataclass(frozen=True, eq=False)
class Points:
    """Rows as points.

    Arguments:
        vectors: float32 or bfloat16 (n, d).
        halves: float64 (n,), |point|^2 / 2, and the 1/2 that a zero row adds for cosine.
        lengths: float64 (n,), |point|. errors: float64 (n,), |e| of rounding to bfloat16.
        scale: s.
    """

    vectors: Tensor
    halves: Tensor
    lengths: Tensor
    errors: Tensor
    scale: float

    def left(self) -> Tensor:
        """The vectors [-q, |q|^2/2, 1], (n, d + 2) or, in bfloat16, (n, d + 6)."""
        halves = _terms(self.halves, self.vectors.dtype)
        return torch.cat([-self.vectors, halves, torch.ones_like(halves)], dim=1)

    def right(self) -> Tensor:
        """The vectors [g, 1, |g|^2/2], as many coordinates."""
        halves = _terms(self.halves, self.vectors.dtype)
        return torch.cat([self.vectors, torch.ones_like(halves), halves], dim=1)


@dataclass(frozen=True, eq=False)
class Piece:
    """A gallery block: its points, and the right side of the product."""

    points: Points
    right: Tensor


class Products:
    """The scores of blocks of queries with pieces of a gallery.

    Arguments:
        rows: float32 (Q, d), the queries.
        norms: float64 (Q,), their norms.
        blocks: slices of the queries, the blocks they are visited in.
        distance: "euclidean" or "cosine".
        precision: of the product, "fp32" or "bf16"; the bounds hold for either.
        largest_norm: of the gallery, where it is known beforehand; then `scale` never changes.

    Attributes:
        scale: s of the latest piece; it only becomes smaller, when a piece has longer rows than all before.
    """

    def __init__(
        self,
        rows: Tensor,
        norms: Tensor,
        blocks: list[slice],
        distance: Distance,
        precision: Precision = "fp32",
        largest_norm: float = 0.0,
    ) -> None:
        self.rows, self.norms, self.blocks, self.distance, self.precision = rows, norms, blocks, distance, precision
        self._largest_norm = max([largest_norm, *norms.amax(dim=0, keepdim=True).tolist()] if len(norms) else [0.0])
        self.scale = self._scale()
        self.centre = rows.new_zeros(rows.shape[1])
        if blocks:
            first = blocks[0]
            self.centre = self._vectors(rows[first], norms[first]).double().mean(dim=0).float() / self.scale
        self._known: dict[int, tuple[Points, Tensor]] = {}
        self._buffer = rows.new_empty(0, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)

    def piece(self, rows: Tensor, norms: Tensor) -> Piece:
        """Prepares gallery rows float32 (g, d), g >= 1, with norms float64 (g,)."""
        self._largest_norm = max(self._largest_norm, float(norms.max()))
        self.scale = self._scale()
        points = self.points(rows, norms)
        return Piece(points, points.right())

    def points(self, rows: Tensor, norms: Tensor) -> Points:
        """Rows float32 (n, d) with norms float64 (n,) as points at the present scale."""
        vectors = self._vectors(rows, norms)
        errors = torch.zeros_like(norms)
        if self.precision == "bf16":
            exact, vectors = vectors, vectors.bfloat16()
            errors = _norms(exact - vectors.float()) * (1 + 2.0**-20)
        lengths = _norms(vectors.float())
        halves = lengths.square() / 2
        halves = halves + (norms == 0) / 2 if self.distance == "cosine" else halves
        return Points(vectors, halves, lengths, errors, self.scale)

    def reach(self) -> "Reach":
        """The bounds of all queries' points, at the present scale."""
        reach = Reach()
        for b in self.blocks:
            reach |= Reach.of(self._left(b)[0])
        return reach

    def product(self, b: slice, piece: Piece, multiple: tuple[int, int] = (1, 1)) -> Tensor:
        """The scores of a block of queries with a piece, valid until the next call.

        Arguments:
            b: the block of queries. piece: the latest piece.
            multiple: the result is padded with inf to multiples of so many rows and columns.

        Returns:
            (queries, g) and the padding; float32, or bfloat16 by precision bf16.
        """
        left = self._left(b)[1]
        height, width = len(left), len(piece.right)
        rows, columns = (-(-size // step) * step for size, step in zip((height, width), multiple, strict=True))
        if self._buffer.numel() < rows * columns:
            self._buffer = self._buffer.new_empty(rows * columns)
        scores = self._buffer[: rows * columns].view(rows, columns)
        torch.mm(left, piece.right.T, out=scores[:height, :width])
        scores[height:] = torch.inf
        scores[:, width:] = torch.inf
        return scores

    def above(self, b: slice, piece: Piece, distances: Tensor) -> Tensor:
        """Scores from which on a distance surely rounds above another.

        Arguments:
            b: the block of queries. piece: the latest piece.
            distances: float32 (queries,) or (queries, m), inf allowed.

        Returns:
            float32 of the shape of `distances`: a pair whose score is not below it has a distance above `distances`.
        """
        return self.limits(self._left(b)[0], Reach.of(piece.points), distances)

    def above_back(self, b: slice, piece: Piece, distances: Tensor) -> Tensor:
        """As `above`, for the other direction: `distances` float32 (g,) are those of the gallery rows of the piece."""
        return self.limits(piece.points, Reach.of(self._left(b)[0]), distances)

    def below(self, b: slice, piece: Piece, distances: Tensor) -> Tensor:
        """Scores below which a distance surely rounds below another.

        Arguments:
            b: the block of queries. piece: the latest piece.
            distances: float32 (queries,) or (queries, m), >= 0.

        Returns:
            float32 of the shape of `distances`: a pair whose score is below it has a distance below `distances`.
        """
        points, reach = self._left(b)[0], Reach.of(piece.points)
        before = torch.nextafter(distances, torch.full_like(distances, -torch.inf)).double().clamp_(min=0)
        h = self._h(before) * (1 - EXACT_ARITHMETIC) - EXACT_ARITHMETIC * (self.distance == "cosine")
        errors, slack = (_like(column, distances) for column in self._uncertainty(points, reach))
        limits = (h - errors * (2 * h.clamp(min=0)).sqrt() - slack) * (1 - OUTPUT_ROUNDING[self.precision])
        return torch.nextafter(limits.float(), torch.full_like(distances, -torch.inf))

    def limits(self, points: Points, reach: "Reach", distances: Tensor) -> Tensor:
        """As `above`, of any points with any others in reach, at the present scale."""
        after = _next_float32(distances)
        h = self._h(after.double()) * (1 + EXACT_ARITHMETIC)
        h = h + EXACT_ARITHMETIC if self.distance == "cosine" else h
        errors, slack = (_like(column, distances) for column in self._uncertainty(points, reach))
        limits = h + errors * (2 * h).sqrt() + errors.square() / 2 + slack
        limits = _next_float32(limits * (1 + OUTPUT_ROUNDING[self.precision]))
        return limits.masked_fill_(torch.isinf(after), torch.inf)  # hardly anything is farther

    def _left(self, b: slice) -> tuple[Points, Tensor]:
        known = self._known.get(b.start)
        if known is None or known[0].scale != self.scale:
            points = self.points(self.rows[b], self.norms[b])
            known = self._known[b.start] = (points, points.left())
        return known

    def _scale(self) -> float:
        """The power of two s; its exponent is clamped so that s and 1/s are normal float32."""
        if self.distance == "cosine" or self._largest_norm == 0:
            return 1.0
        return 2.0 ** min(126, max(-126, -math.frexp(self._largest_norm)[1]))

    def _vectors(self, rows: Tensor, norms: Tensor) -> Tensor:
        """Points float32 (n, d) of rows (n, d): scaled (euclidean) or of unit length (cosine), then centred."""
        if self.distance == "euclidean":
            return torch.add(self.centre * -self.scale, rows, alpha=self.scale)
        # 1 / norm may exceed float32: first an exact power of two, then what is left of it
        powers = torch.exp2(-torch.frexp(norms).exponent.double().clamp_(-126, 126)).float()
        remainders = 1 / (norms * powers).masked_fill(norms == 0, 1)
        return (rows * powers[:, None]).mul_(remainders.float()[:, None]).sub_(self.centre)

    def _h(self, distances: Tensor) -> Tensor:
        """Score float64 of exact distances float64."""
        return distances if self.distance == "cosine" else (distances * self.scale).square() / 2

    def _uncertainty(self, points: Points, others: "Reach") -> tuple[Tensor, Tensor]:
        """Bounds float64 (n,) on how far points were moved by rounding, r, and on the error of scores, the slack."""
        n, u = self.rows.shape[1] + (2 if self.precision == "fp32" else 6), UNIT_ROUNDOFF
        terms = n if self.precision == "fp32" else 2 * n
        sums = points.lengths + others.longest
        slack = (terms * u / (1 - terms * u) + 8 * u) * sums.square() / 2 + n * 2.0**-100
        if self.distance == "cosine":
            slack = slack + 8 * u * (sums + points.errors + others.worst) + 64 * u**2
        else:
            slack = slack + 4 * u * (points.errors + others.worst) * sums
        return points.errors + others.worst, slack


@dataclass(frozen=True)
class Reach:
    """Bounds over many points: the longest, and the worst error of rounding."""

    longest: float = 0.0
    worst: float = 0.0

    @staticmethod
    def of(points: Points) -> "Reach":
        """The bounds of some points."""
        return Reach(float(points.lengths.max()), float(points.errors.max())) if len(points.lengths) else Reach()

    def rescaled(self, factor: float) -> "Reach":
        """The bounds of the points at another scale."""
        return Reach(self.longest * factor, self.worst * factor)

    def __or__(self, other: "Reach") -> "Reach":
        """The bounds of both."""
        return Reach(max(self.longest, other.longest), max(self.worst, other.worst))


@cache
def fast_precision(device: torch.device) -> Precision:
    """The fastest precision whose products the hardware speeds up: bf16, or fp32 where it has none."""
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if is_fast and _sums_in_float32(device) else "fp32"


def _sums_in_float32(device: torch.device) -> bool:
    """Whether products of bfloat16 are summed in float32, as the bounds need: 1 + 511 * 2^-9 stays 1 in bfloat16."""
    terms = torch.full((256, 512), 2.0**-9, dtype=torch.bfloat16, device=device)
    terms[:, 0] = 1
    with true_float32(device):
        sums = terms @ torch.ones(512, 256, dtype=torch.bfloat16, device=device)
    return bool((sums == 2).all())  # 1.998, rounded once


@contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """No TF32, no bfloat16 and no autocast inside float32 products or sums, whatever the process has allowed."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    allowed = [backend.fp32_precision for backend in backends]
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced


def _terms(halves: Tensor, dtype: torch.dtype) -> Tensor:
    """Halves (n,) as coordinates (n, 1), or (n, 3) whose sum has 24 bits where a coordinate has 8."""
    if dtype == torch.float32:
        return halves.float()[:, None]
    terms = []
    for _ in range(3):
        terms.append(halves.to(dtype))
        halves = halves - terms[-1].double()
    return torch.stack(terms, dim=1)


def _like(column: Tensor, distances: Tensor) -> Tensor:
    """(n,) beside (n,) or (n, m)."""
    return column if distances.ndim == 1 else column[:, None]


def _next_float32(x: Tensor) -> Tensor:
    """A float32 strictly above x (inf stays inf)."""
    x = x.float()
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def _norms(points: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(points, dim=1, dtype=torch.float64)
    return norms
