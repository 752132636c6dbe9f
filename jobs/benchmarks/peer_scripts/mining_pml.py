"""Miners of pytorch-metric-learning that find the hardest triplet of each anchor: `hard` of the others."""

from __future__ import annotations

from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchEasyHardMiner, BatchHardMiner
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor

from jobs.benchmarks.peer_scripts.measured import options
from jobs.benchmarks.peer_scripts.mining import MARGIN, Mined, Mining, main


def _mining(miner: BatchHardMiner | BatchEasyHardMiner) -> Mining:
    criterion = TripletMarginLoss(margin=MARGIN, reducer=MeanReducer())

    def triplets(embeddings: Tensor, labels: Tensor) -> Mined:
        found = miner(embeddings, labels)
        return embeddings[found[0]], embeddings[found[1]], embeddings[found[-1]]

    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = criterion(embeddings, labels, miner(embeddings, labels))
        return value

    return Mining(miner, triplets, loss)


if __name__ == "__main__":
    easy_hard = BatchEasyHardMiner(BatchEasyHardMiner.HARD, BatchEasyHardMiner.HARD)
    main({"hard": _mining(easy_hard if options()["easy_hard"] else BatchHardMiner())})
