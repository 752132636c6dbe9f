"""Miners of oml_ray."""

from __future__ import annotations

from torch import Tensor

from jobs.benchmarks.peer_scripts.mining import MARGIN, N_HARD, Mined, Mining, main
from oml_ray.learning.losses.triplet import TripletLoss
from oml_ray.learning.miners import HardTriplets, NHardTriplets

_HARD, _N_HARD = HardTriplets(), NHardTriplets(*N_HARD)


def _hard(embeddings: Tensor, labels: Tensor) -> Mined:
    mined = _HARD(embeddings, labels)
    anchors, positives, negatives = (embeddings[ids[mined.valid]] for ids in mined[:3])
    return anchors, positives, negatives


def _n_hard(embeddings: Tensor, labels: Tensor) -> Mined:
    mined = _N_HARD(embeddings, labels)
    rows, p, n = (mined.positives_valid[:, :, None] & mined.negatives_valid[:, None, :]).nonzero(as_tuple=True)
    return embeddings[rows], embeddings[mined.positives[rows, p]], embeddings[mined.negatives[rows, n]]


def _loss(miner: HardTriplets | NHardTriplets, embeddings: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = TripletLoss(miner, margin=MARGIN)(embeddings, labels)[0]
    return loss


if __name__ == "__main__":
    main(
        {
            "hard": Mining(_HARD, _hard, lambda embeddings, labels: _loss(_HARD, embeddings, labels)),
            "n_hard": Mining(_N_HARD, _n_hard, lambda embeddings, labels: _loss(_N_HARD, embeddings, labels)),
        }
    )
