r"""Principal components fraction: how many directions embeddings really use, of those they have.

That of Open Metric Learning 4.0 (`calc_pcf`). With l_1 >= l_2 >= ... the eigenvalues of the covariance of N embeddings
of d dimensions, as many as a singular value decomposition of the (N, d) matrix has, min(N, d):

    pcf@v = m / d,    m the largest integer with  (l_1 + ... + l_(m-1)) / (l_1 + l_2 + ...) <= v

So m counts one component more than a share of exactly v needs: pcf@1 = (min(N, d) + 1) / d, which exceeds 1 for N >= d.

**The mean** is subtracted, as OML does: that of the very embeddings that are measured, so each category has its own.
What all embeddings have in common is no direction; a collapsed model is measured by the little that is left.

OML decomposes all embeddings at once in their own dtype. Here means and covariances of blocks are merged in float64
(Chan, Golub and LeVeque 1983); shares that equal v up to ROUNDING count as equal, where OML's float32 may err to either
side (always at v = 1). For a single embedding, or equal ones, the shares are 0 / 0: NaN here, while OML gives
as much as for v = 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from oml_ray.errors import EmbeddingError

Float64Array = NDArray[np.float64]

ROUNDING = 1e-12  # of a share of variance


class PrincipalComponents:
    """Accumulates mean and covariance of embeddings block by block; O(num_categories d^2) memory.

    Arguments:
        num_categories: categories to measure by themselves.

    Example:
        >>> components = PrincipalComponents()
        >>> components.add(np.eye(4, 10, dtype=np.float32))
        >>> components.result([0.5, 1])[0]
        array([0.2, 0.5])
    """

    def __init__(self, num_categories: int = 0) -> None:
        self.num_categories = num_categories
        self._moments: dict[int, _Moments] = {}  # by code, -1 among them

    def add(self, block: NDArray[np.float32], codes: NDArray[np.int64] | None = None) -> None:
        """Takes some embeddings, each once.

        Arguments:
            block: float32 (n, d).
            codes: int64 (n,), category of each, -1 = none; or None when there are none at all.

        Raises:
            EmbeddingError: shapes that do not fit each other or earlier blocks; a code out of range; NaN or infinity.
        """
        codes = np.full(len(block), -1, dtype=np.int64) if codes is None else codes
        dimension = next((len(moments.mean) for moments in self._moments.values()), None)
        fits = block.ndim == 2 and codes.shape == block.shape[:1] and dimension in (None, block.shape[1])
        if not fits or (len(codes) and not -1 <= codes.min() <= codes.max() < self.num_categories):
            raise EmbeddingError(
                f"pcf: found embeddings {block.shape} and category codes {codes.shape} from {codes.min(initial=0)} to "
                f"{codes.max(initial=-1)}; allowed are (n, {dimension or 'd'}), and (n,) from -1 to "
                f"{self.num_categories - 1}."
            )
        if not np.isfinite(block).all():
            raise EmbeddingError("pcf: embeddings contain NaN or infinity; look at the model's outputs.")
        for code in np.unique(codes).tolist():
            self._take(code, _Moments.of(block[codes == code]))

    def merge(self, other: PrincipalComponents) -> None:
        """Takes what another has accumulated of other embeddings, as in another process.

        Arguments:
            other: for the same categories.

        Raises:
            EmbeddingError: another number of categories, or of dimensions.
        """
        found = {len(moments.mean) for held in (self, other) for moments in held._moments.values()}
        if self.num_categories != other.num_categories or len(found) > 1:
            raise EmbeddingError(
                f"pcf: found {self.num_categories} and {other.num_categories} categories of {sorted(found)} "
                "dimensions; only those of the same embeddings can be merged."
            )
        for code, moments in other._moments.items():
            self._take(code, moments)

    def result(self, variances: Sequence[float]) -> tuple[Float64Array, Float64Array]:
        """The fractions of what was added so far.

        Arguments:
            variances: V shares of the variance, each in [0, 1].

        Returns:
            float64 (V,) of all embeddings, and float64 (num_categories, V); NaN where no two embeddings differ.

        Raises:
            EmbeddingError: a share outside [0, 1].
        """
        wrong = [share for share in variances if not 0 <= share <= 1]
        if wrong:
            raise EmbeddingError(f"pcf: found variances {wrong}; each is a share of the variance, from 0 to 1.")
        overall: _Moments | None = None
        by_category = np.full((self.num_categories, len(variances)), np.nan)
        for code in sorted(self._moments):
            moments = self._moments[code]
            overall = moments if overall is None else overall.merged(moments)
            if code >= 0:
                by_category[code] = moments.fractions(variances)
        return np.full(len(variances), np.nan) if overall is None else overall.fractions(variances), by_category

    def _take(self, code: int, moments: _Moments) -> None:
        self._moments[code] = self._moments[code].merged(moments) if code in self._moments else moments


class _Moments:
    """Number of rows, mean (d,) and scatter (d, d): the sum of (x - mean)(x - mean)'; all float64."""

    def __init__(self, num_rows: int, mean: Float64Array, scatter: Float64Array) -> None:
        self.num_rows, self.mean, self.scatter = num_rows, mean, scatter

    @classmethod
    def of(cls, rows: NDArray[np.float32]) -> _Moments:
        """Those of at least one row; around the first, so that equal rows have no scatter at all."""
        first = rows[0].astype(np.float64)
        centred = rows - first  # (rows, d)
        shift = centred.mean(axis=0)
        centred -= shift
        return cls(len(rows), first + shift, centred.T @ centred)

    def merged(self, other: _Moments) -> _Moments:
        """Those of both sets of rows; neither is changed."""
        num_rows = self.num_rows + other.num_rows
        apart = other.mean - self.mean
        scatter = np.outer(apart, apart)
        scatter *= self.num_rows / num_rows * other.num_rows
        scatter += self.scatter
        scatter += other.scatter
        return _Moments(num_rows, self.mean + apart * (other.num_rows / num_rows), scatter)

    def fractions(self, variances: Sequence[float]) -> Float64Array:
        """float64 (V,)"""
        dimension = len(self.mean)
        values = np.linalg.eigvalsh(self.scatter)[::-1][: self.num_rows].clip(min=0)  # descending
        total = values.sum()
        if not total > 0:
            return np.full(len(variances), np.nan)
        shares = np.cumsum(values / total)
        limits = np.asarray(variances, dtype=np.float64) + ROUNDING
        return np.asarray((np.searchsorted(shares, limits, side="right") + 1) / dimension)
