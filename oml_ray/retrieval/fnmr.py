"""FNMR@FMR over all pairs of queries and gallery, exactly and without holding their distances.

With u_1 ... u_n the distances of genuine pairs (one label) and v_1 ... v_m those of impostors (two labels), excluded
pairs left out, Open Metric Learning defines

    T = Q_v(FMR),    FNMR@FMR = |{i: u_i >= T}| / n

where Q_v is the quantile that `numpy.quantile` interpolates: with v sorted and counted from 0, and h = FMR (m - 1), it
is v_floor(h) + (h - floor(h)) (v_floor(h)+1 - v_floor(h)). FMR is a share in 0 to 1, not a percentage. FNMR@FMR is the
false non-match rate of a system that accepts pairs nearer than T (ISO/IEC 19795-1). OML takes the distances from its
lists of neighbors; here they are those of *all* pairs, as they are there when the lists are the whole gallery.

**How the quantile is found.** m may be 10^12. For each wanted rank a window of distances is known to hold the distance
of that rank. Passes over all pairs make it smaller, until one float32 number is left:

1. `Census` counts the pairs; a sample of distances tells where to look, and nothing else.
2. `Bracket` bounds, at the cost of one matrix product, how many impostors are nearer than some edges. The rank's
   distance is nearer than an edge that surely has more impostors before it than the rank says, and farther than one
   that possibly has no more up to it.
3. `Pinpoint` rescores, by the definition of the distance, the impostors whose scores do not tell where they are; so
   the count of every bin of a window is exact. Pass 2 is repeated while that spares more rescoring than it costs.
4. `Genuine` visits genuine pairs label by label.

Usually these are four passes, of which the second and the third form all products.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from oml_ray.distances import Distance
from oml_ray.errors import EmbeddingError
from oml_ray.retrieval.pair_counts import (
    INFINITE,
    SAMPLE_SHIFT,
    Bracket,
    Census,
    Genuine,
    Pinpoint,
    Request,
    Window,
    count_pairs,
)
from oml_ray.retrieval.rows import Rows

Int64Array = NDArray[np.int64]

EDGES = 256  # of a bracket, over all windows
FEW_PAIRS = 2**14  # rescored without another bracket
FEW_OF_ALL = 2**-8  # rescoring this share of all pairs costs about as much as another bracket
SAMPLE_MARGIN = 0.1  # of a rank's share, for what a sample can be off beyond chance; a miss costs another bracket


@dataclass(frozen=True)
class FnmrAtFmr:
    """The false non-match rate at a false match rate.

    Arguments:
        fmr: the false match rate, a share in 0 to 1.
        fnmr: the share of genuine pairs at the threshold or farther; None without genuine pairs or without impostors.
        threshold: the quantile `fmr` of the impostors' distances, interpolated; None where `fnmr` is.
        num_genuine, num_impostors: how many pairs there are of either kind.
    """

    fmr: float
    fnmr: float | None
    threshold: float | None
    num_genuine: int
    num_impostors: int


def fnmr_at_fmr(
    queries: Rows,
    query_labels: Int64Array,
    gallery: Rows,
    gallery_labels: Int64Array,
    fmr: Sequence[float] = (0.1,),
    *,
    distance: Distance = "euclidean",
    block_rows: int = 4096,
    device: str | torch.device = "cpu",
) -> list[FnmrAtFmr]:
    """FNMR@FMR over all pairs of queries and gallery that are not excluded.

    Arguments:
        queries: Q instances. query_labels: int64 (Q,).
        gallery: G instances. gallery_labels: int64 (G,).
        fmr: false match rates, each in 0 to 1.
        distance, block_rows, device: as in `pair_counts.count_pairs`.

    Returns:
        One result per `fmr`, in its order.

    Raises:
        EmbeddingError: no fmr, or one outside 0 to 1; and as `pair_counts.count_pairs`.

    Example:
        >>> points = Rows(np.arange(4), np.array([[0.0], [1.0], [3.0], [4.0]], dtype=np.float32))
        >>> labels = np.array([5, 5, 6, 6])
        >>> found = fnmr_at_fmr(points, labels, points, labels, fmr=[0.0, 0.5])  # impostors: 2, 3, 3, 4, twice each
        >>> [(result.threshold, result.fnmr) for result in found]
        [(2.0, 0.0), (3.0, 0.0)]
    """
    search = FnmrSearch(fmr)
    while (request := search.next_request()) is not None:
        counts = count_pairs(
            request,
            queries,
            query_labels,
            gallery,
            gallery_labels,
            distance=distance,
            block_rows=block_rows,
            device=device,
        )
        search.absorb([counts])
    return search.results()


class FnmrSearch:
    """Coordinates the passes: says what to count over all pairs until the results are known.

    ::

        while (request := search.next_request()) is not None:
            search.absorb(count_pairs(request, ...) for each block of queries and each shard)
        search.results()

    Arguments:
        fmr: false match rates, each in 0 to 1.

    Raises:
        EmbeddingError: no fmr, or one outside 0 to 1.
    """

    def __init__(self, fmr: Sequence[float]) -> None:
        if not len(fmr) or not all(0 <= value <= 1 for value in fmr):
            raise EmbeddingError(f"fmr: found {list(fmr)}; give at least one share in 0 to 1, such as 0.01 for 1%.")
        self._fmr = [float(value) for value in fmr]
        self._request: Request | None = Census()
        self._num_genuine = self._num_impostors = 0
        self._places: dict[int, _Place] = {}  # of each wanted rank, from 0
        self._farther: list[int] = []  # genuine pairs at each threshold or farther

    def next_request(self) -> Request | None:
        """What to count over all pairs; None when the results are known."""
        return self._request

    def absorb(self, answers: Iterable[Int64Array]) -> None:
        """Takes the answers to the request, which together cover every pair once; they are added up one by one.

        Raises:
            EmbeddingError: no answers, or nothing was asked for.
        """
        counts = None
        for answer in answers:
            counts = answer.copy() if counts is None else np.add(counts, answer, out=counts)
        if counts is None or self._request is None:
            raise EmbeddingError("fnmr: give the answers to a request, one for each block of queries and each shard.")
        match self._request:
            case Census():
                self._num_genuine, self._num_impostors = counts[:2].tolist()
                self._begin(counts[2:])
            case Bracket(edges):
                self._places = {
                    rank: place.bracketed(rank, np.array(edges), *counts) for rank, place in self._places.items()
                }
            case Pinpoint(windows):
                self._places = {rank: place.pinpointed(rank, windows, counts) for rank, place in self._places.items()}
            case Genuine():
                self._farther = counts.tolist()
        self._request = self._next()

    def results(self) -> list[FnmrAtFmr]:
        """One result per fmr, once there are no more requests.

        Raises:
            EmbeddingError: there is another request.
        """
        if self._request is not None:
            raise EmbeddingError("fnmr: the results are not known yet; answer the next request.")
        totals = (self._num_genuine, self._num_impostors)
        if not all(totals):
            return [FnmrAtFmr(fmr, None, None, *totals) for fmr in self._fmr]
        return [
            FnmrAtFmr(fmr, farther / self._num_genuine, self._threshold(fmr), *totals)
            for fmr, farther in zip(self._fmr, self._farther, strict=True)
        ]

    def _begin(self, sample: Int64Array) -> None:
        """Windows that hold everything, and where in them to look first."""
        if self._num_genuine and self._num_impostors:
            for rank in {rank for fmr in self._fmr for rank in self._ranks(fmr)[:2]}:
                aim = _aim(sample, rank / max(1, self._num_impostors - 1))
                self._places[rank] = _Place(Window(0, INFINITE), 0, self._num_impostors, aim)

    def _next(self) -> Request | None:
        if self._farther or not self._places:
            return None
        unknown = [place for place in self._places.values() if place.window.first < place.window.last]
        if not unknown:
            return Genuine(tuple(self._threshold(fmr) for fmr in self._fmr))
        spared = sum({place.window: place.most - place.fewest for place in unknown if not place.stalled}.values())
        if spared <= max(FEW_PAIRS, FEW_OF_ALL * self._num_impostors) or isinstance(self._request, Pinpoint):
            return Pinpoint(_disjoint({place.window for place in unknown}))
        aims = _disjoint({place.aim for place in unknown})
        return Bracket(tuple(edge for aim in aims for edge in _cuts(aim, max(1, EDGES // len(aims)))))

    def _ranks(self, fmr: float) -> tuple[int, int, float]:
        """The two ranks, from 0, that numpy interpolates between, and the share of the second."""
        last = self._num_impostors - 1
        h = fmr * last
        return int(h), min(int(h) + 1, last), h - int(h)

    def _threshold(self, fmr: float) -> float:
        rank, following, share = self._ranks(fmr)
        bits = [self._places[rank].window.first, self._places[following].window.first]
        distances = np.array(bits, dtype=np.int32).view(np.float32)
        if np.isinf(distances[1]):  # numpy knows no number between infinities
            return float(distances[0 if share == 0 else 1])
        return float(np.quantile(distances, [share])[0])  # in numpy's own rounding


@dataclass(frozen=True)
class _Place:
    """What is known of the distance of a rank.

    Arguments:
        window: holds it.
        fewest: at least so many impostors are nearer than the window.
        most: at most so many are in it or nearer.
        aim: the part of the window to look at.
        stalled: the last bracket could not make the window much smaller; scores are not exact enough.
    """

    window: Window
    fewest: int
    most: int
    aim: Window
    stalled: bool = False

    def bracketed(self, rank: int, edges: Int64Array, surely: Int64Array, possibly: Int64Array) -> _Place:
        """With at least `surely` impostors nearer than each edge, and at most `possibly` at it or nearer."""
        first, last, fewest, most = self.window.first, self.window.last, self.fewest, self.most
        for edge in np.flatnonzero((surely > rank) & (edges <= last))[:1]:  # the first that is farther
            last, most = int(edges[edge]) - 1, min(most, int(possibly[edge]))
        for edge in np.flatnonzero((possibly <= rank) & (edges >= first))[-1:]:  # the last that is nearer
            first, fewest = int(edges[edge]) + 1, max(fewest, int(surely[edge]))
        window = Window(first, last)
        stalled = self.aim == self.window and last - first > (self.window.last - self.window.first) // 2
        return _Place(window, fewest, most, window, stalled)

    def pinpointed(self, rank: int, windows: tuple[Window, ...], counts: Int64Array) -> _Place:
        """With the exact number of impostors nearer than each window, and in each of its bins."""
        if self.window.first == self.window.last:
            return self
        (which,) = (i for i, window in enumerate(windows) if window.first <= self.window.first <= window.last)
        ends = counts[which].cumsum()
        place = int(np.searchsorted(ends, rank, side="right"))  # 1 for the first bin
        first = windows[which].first + ((place - 1) << windows[which].shift)
        window = Window(first, min(windows[which].last, first + (1 << windows[which].shift) - 1))
        return _Place(window, int(ends[place - 1]), int(ends[place]), window)


def _aim(sample: Int64Array, share: float) -> Window:
    """Where a sample sees the distance that has this share of all before it, with room to spare."""
    size = int(sample.sum())
    if not size:
        return Window(0, INFINITE)
    margin = SAMPLE_MARGIN * min(share, 1 - share) + 10 * np.sqrt(share * (1 - share) / size) + 10 / size
    wanted = np.clip([share - margin, share + margin], 1 / size, 1) * size
    first, last = np.searchsorted(sample.cumsum(), wanted).clip(max=len(sample) - 1).tolist()
    return Window(first << SAMPLE_SHIFT, min(INFINITE, ((last + 1) << SAMPLE_SHIFT) - 1))


def _cuts(window: Window, num: int) -> list[int]:
    """At most `num` bits inside a window, evenly."""
    places = np.linspace(window.first, window.last, num + 2)[1:-1]
    return [int(edge) for edge in np.unique(places.astype(np.int64))]


def _disjoint(windows: Iterable[Window]) -> tuple[Window, ...]:
    """The windows, those that overlap as one."""
    merged: list[Window] = []
    for window in sorted(windows, key=lambda window: window.first):
        if merged and window.first <= merged[-1].last:
            merged[-1] = Window(merged[-1].first, max(merged[-1].last, window.last))
        else:
            merged.append(window)
    return tuple(merged)
