"""The same embeddings give the same numbers as Open Metric Learning 4.0.0, which were noted down once.

They came from its `RetrievalResults` of `batched_knn`, `calc_retrieval_metrics_rr`, `calc_fnmr_at_fmr_rr` (of lists as
long as the gallery) and `calc_topological_metrics`, on `instances()`. OML was not given the 4 queries without ground
truth, of which it has no sensible value; of FNMR@FMR they are a part. To OML, an instance without a sequence is one of
its own.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from oml_ray.retrieval.exact import search
from oml_ray.retrieval.exclusion import ground_truth_counts
from oml_ray.retrieval.fnmr import fnmr_at_fmr
from oml_ray.retrieval.metrics import per_query, summarise
from oml_ray.retrieval.pcf import PrincipalComponents
from oml_ray.retrieval.rows import Rows

RANKS = [1, 3, 5, 10]
OML = {
    "overall": {
        "cmc": [0.246963561, 0.481781363, 0.607287467, 0.765182197],
        "precision": [0.246963561, 0.264507473, 0.330971658, 0.474426419],
        "map": [0.246963561, 0.344466954, 0.365170926, 0.366938978],
    },
    "shoes": {
        "cmc": [0.240963861, 0.457831323, 0.602409661, 0.843373477],
        "precision": [0.240963861, 0.234939754, 0.312650621, 0.500200868],
        "map": [0.240963861, 0.341365486, 0.362801224, 0.368148804],
    },
    "bags": {
        "cmc": [0.285714298, 0.476190478, 0.583333313, 0.702380955],
        "precision": [0.285714298, 0.269841284, 0.324007928, 0.451388896],
        "map": [0.285714298, 0.347222209, 0.368171275, 0.366711557],
    },
    "hats": {
        "cmc": [0.212500006, 0.512499988, 0.637499988, 0.75],
        "precision": [0.212500006, 0.289583355, 0.357291669, 0.471875012],
        "map": [0.212500006, 0.34479171, 0.364479154, 0.36592263],
    },
}
OML_FNMR = {0.01: 0.8274336457252502, 0.1: 0.364306777715683, 0.25: 0.15191739797592163, 0.5: 0.02064896747469902}
SHARES = [0.1, 0.5, 0.9]
OML_PCF = {
    "overall": [0.0625, 0.375, 0.875],
    "shoes": [0.0625, 0.3125, 0.75],
    "bags": [0.0625, 0.3125, 0.75],
    "hats": [0.0625, 0.3125, 0.75],
}
CATEGORIES = ["shoes", "bags", "hats"]


@dataclass(frozen=True)
class Instances:
    queries: Rows
    query_labels: np.ndarray
    gallery: Rows
    gallery_labels: np.ndarray


@pytest.fixture(scope="module")
def instances() -> Instances:
    """360 instances of 60 labels, two thirds of them queries, two thirds in the gallery, and many in sequences."""
    random = np.random.RandomState(0)  # its numbers are the same in every numpy
    labels = np.arange(360) // 6
    embeddings = (random.normal(size=(60, 16))[labels] + 1.1 * random.normal(size=(360, 16))).astype(np.float32)
    role = random.randint(0, 3, 360)
    sequences = np.where(random.uniform(size=360) < 0.6, labels * 2 + random.randint(0, 2, 360), -1)
    queries, gallery = np.flatnonzero(role != 1), np.flatnonzero(role != 0)
    assert (len(queries), len(gallery)) == (251, 238)
    return Instances(
        Rows(queries, embeddings[queries], sequences[queries]),
        labels[queries],
        Rows(gallery, embeddings[gallery], sequences[gallery]),
        labels[gallery],
    )


def test_retrieval_metrics(instances: Instances) -> None:
    queries, gallery = instances.queries, instances.gallery
    neighbors = search(queries, gallery, max(RANKS), precision="certified", block_rows=100)
    counts = ground_truth_counts(
        queries.ids, instances.query_labels, queries.sequences, gallery.ids, instances.gallery_labels, gallery.sequences
    )
    relevant = (neighbors.ids // 6 == instances.query_labels[:, None]) & (neighbors.ids >= 0)  # (queries, k)
    values = per_query(relevant, neighbors.counts, counts, cmc=RANKS, precision=RANKS, map=RANKS)
    assert (counts == 0).sum() == 4
    found = summarise(values, instances.query_labels % 3, CATEGORIES, samples=0)
    for name, families in {"overall": found["overall"], **found["categories"]}.items():
        for family, expected in OML[name].items():
            means = [families[family][str(k)]["value"] for k in RANKS]
            np.testing.assert_allclose(means, expected, rtol=0, atol=1e-6, err_msg=f"{name} {family}")


def test_fnmr_at_fmr(instances: Instances) -> None:
    found = fnmr_at_fmr(
        instances.queries, instances.query_labels, instances.gallery, instances.gallery_labels, list(OML_FNMR)
    )
    assert [result.fnmr for result in found] == pytest.approx(list(OML_FNMR.values()), abs=1e-6)


def test_pcf(instances: Instances) -> None:
    components = PrincipalComponents(len(CATEGORIES))
    components.add(instances.gallery.take(slice(None)), instances.gallery_labels % 3)
    overall, by_category = components.result(SHARES)
    for name, values in {"overall": overall, **dict(zip(CATEGORIES, by_category, strict=True))}.items():
        np.testing.assert_allclose(values, OML_PCF[name], rtol=0, atol=1e-6, err_msg=name)
