"""Miners of OML 4.0."""

from __future__ import annotations

from typing import Any

from oml.interfaces.miners import labels2list
from oml.losses import TripletLossWithMiner
from oml.miners import HardTripletsMiner, NHardTripletsMiner
from torch import Tensor

from jobs.benchmarks.peer_scripts.mining import MARGIN, N_HARD, Mining, main


def mining(miner: Any) -> Mining:
    """Its positions, as the miners of the others give, without the embeddings that `sample` copies at them."""

    def mine(embeddings: Tensor, labels: Tensor) -> object:
        return miner._sample(embeddings, labels2list(labels))

    return Mining(mine, miner.sample, TripletLossWithMiner(MARGIN, miner))


if __name__ == "__main__":
    main({"hard": mining(HardTripletsMiner()), "n_hard": mining(NHardTripletsMiner(*N_HARD))})
