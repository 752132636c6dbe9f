"""Retrieval metrics: one value per query, their means over queries, and bootstrap intervals of the means.

Definitions. r: the relevance list of one query, sorted by distance, after exclusion. n: its number of relevant gallery
instances after exclusion, counted over the whole gallery. rank_1 < ... < rank_n: the places of those in the whole
gallery so sorted, from 1.

From the first k neighbors (`per_query`), the first three as Open Metric Learning defines them:

- ``cmc@k``              = 1 if any of r[:k], else 0 ("Recall@k" in papers);
- ``precision@k``        = sum(r[:k]) / min(n, k);
- ``map@k``              = mean over the hits i in the first k of sum(r[:i]) / i (i from 1); 0 when there is no hit;
- ``recall@k``           = sum(r[:k]) / n;
- ``strict_precision@k`` = sum(r[:k]) / k;
- ``ndcg@k``             = sum over the hits i in the first k of 1 / log2(i + 1), divided by the same sum over
  i = 1 ... min(n, k) (binary relevance; Järvelin and Kekäläinen 2002).

From the ranks of all relevant instances (`from_ranks`), which no list of k neighbors knows:

- ``r_precision`` = (number of j with rank_j <= n) / n;
- ``map_r``       = sum over the j with rank_j <= n of j / rank_j, divided by n (MAP@R);
- ``ap``          = mean over all j of j / rank_j (full average precision);
- ``mrr``         = 1 / rank_1 (reciprocal rank; its mean is the MRR).

Musgrave et al., "A Metric Learning Reality Check" (ECCV 2020), define r_precision and map_r, and discuss what cmc@1 can
and cannot tell. A query with n = 0 has no ground truth: it is NaN here and left out of every mean. A query with n > 0
that retrieved nothing scores 0.
"""

from oml_ray.retrieval.metrics.change import Changes, changes
from oml_ray.retrieval.metrics.listed import PerQuery, per_query
from oml_ray.retrieval.metrics.ranked import ALL, FAMILIES_BY_RANK, from_ranks
from oml_ray.retrieval.metrics.summary import bootstrap, means, resamples, summarise

__all__ = [
    "ALL",
    "FAMILIES_BY_RANK",
    "Changes",
    "PerQuery",
    "bootstrap",
    "changes",
    "from_ranks",
    "means",
    "per_query",
    "resamples",
    "summarise",
]
