"""Batches that teach nothing, for every criterion with every miner: a loss of zero on which backward works."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from oml_ray.build.criteria import PAIR_CRITERIA
from oml_ray.learning.bank import Bank, BankedCriterion
from oml_ray.learning.losses.arcface import ArcFaceLoss, CosFaceLoss
from oml_ray.learning.losses.margins import AngularMargin
from oml_ray.learning.losses.proxy_anchor import ProxyAnchorLoss
from oml_ray.learning.losses.pytorch_metric_learning import PytorchMetricLearningLoss
from oml_ray.learning.losses.triplet import TripletLoss
from oml_ray.learning.miners import (
    AllTriplets,
    DistanceWeightedTriplets,
    HardClusterTriplets,
    HardTriplets,
    Miner,
    MultiSimilarityPairs,
    NHardTriplets,
    PairsMiner,
)
from oml_ray.learning.pairs import Memory
from oml_ray.learning.row_sparse import RowSparseSGD
from oml_ray.learning.sharded_head import ShardedHead

DIM, LABELS = 4, torch.tensor([0, 1, 2])
PAIR_MINERS: dict[str, Miner] = {"all": AllTriplets(), "multi_similarity": MultiSimilarityPairs()}
MINERS: dict[str, Miner] = {
    **PAIR_MINERS,
    "hard": HardTriplets(),
    "n_hard": NHardTriplets(2, (2, 3)),
    "hard_cluster": HardClusterTriplets(),
    "distance_weighted": DistanceWeightedTriplets(),
}
OF_PAIRS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"triplet {name} {margin}": lambda miner=miner, margin=margin: TripletLoss(miner, margin=margin)
        for name, miner in MINERS.items()
        for margin in (0.2, None)
    },
    **{
        f"{loss} {name}": lambda loss=loss, miner=miner: PAIR_CRITERIA[loss](miner=miner)
        for loss in ("contrastive", "multi_similarity")
        for name, miner in PAIR_MINERS.items()
    },
    **{name: PAIR_CRITERIA[name] for name in PAIR_CRITERIA if name not in ("triplet", "contrastive")},
}
OF_PROXIES: dict[str, Callable[[], nn.Module]] = {
    "arcface": lambda: ArcFaceLoss(LABELS, DIM),
    "arcface in categories": lambda: ArcFaceLoss(LABELS, DIM, label_smoothing=0.1, categories=torch.tensor([0, 0, 1])),
    "cosface": lambda: CosFaceLoss(LABELS, DIM, sub_centers=2),
    "proxy_anchor": lambda: ProxyAnchorLoss(LABELS, DIM),
}


def value_and_gradient(criterion: nn.Module, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the embeddings, both of which are finite numbers, as are the logs."""
    embeddings = embeddings.clone().requires_grad_()
    loss, logs = criterion(embeddings, labels)
    loss.backward()
    assert loss.shape == ()
    assert loss.dtype == embeddings.dtype
    assert all(value.ndim == 0 and torch.isfinite(value) and not value.requires_grad for value in logs.values())
    assert embeddings.grad is not None
    return loss.detach(), embeddings.grad


def check_zero(criterion: nn.Module, embeddings: Tensor, labels: Tensor) -> None:
    loss, gradient = value_and_gradient(criterion, embeddings, labels)
    assert loss == 0
    assert gradient.shape == embeddings.shape
    assert (gradient == 0).all()
    # Every parameter has a gradient, as DDP expects.
    assert all(weight.grad is not None and (weight.grad == 0).all() for weight in criterion.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*OF_PAIRS, *OF_PROXIES])
def test_a_batch_without_embeddings_has_zero_loss(name: str, dtype: torch.dtype) -> None:
    criterion = (OF_PAIRS | OF_PROXIES)[name]().to(dtype)
    check_zero(criterion, torch.empty(0, DIM, dtype=dtype), torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize(
    "name", ["ArcFaceLoss", "ProxyAnchorLoss", "SoftTripleLoss", "TripletMarginLoss", "CircleLoss"]
)
def test_a_batch_without_embeddings_has_zero_loss_in_the_package(name: str) -> None:
    pytest.importorskip("pytorch_metric_learning.losses", exc_type=ImportError)
    criterion = PytorchMetricLearningLoss(name, {}, num_labels=3, embedding_dim=DIM)
    check_zero(criterion, torch.empty(0, DIM), torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_a_batch_without_embeddings_moves_no_proxy_of_a_sharded_head(sample_rate: float) -> None:
    head = ShardedHead(LABELS, DIM, AngularMargin(0.5), RowSparseSGD(lr=1.0), scale=16.0, sample_rate=sample_rate)
    before = head.weight.clone()
    head.begin_step(0)
    check_zero(head, torch.empty(0, DIM), torch.empty(0, dtype=torch.int64))
    head.step()
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_a_batch_without_embeddings_has_zero_loss_beside_a_memory(name: str) -> None:
    memory = Memory(torch.randn(5, DIM), torch.tensor([0, 0, 1, 1, 2]))
    embeddings = torch.empty(0, DIM, requires_grad=True)
    loss, _ = OF_PAIRS[name]()(embeddings, torch.empty(0, dtype=torch.int64), memory)
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("name", OF_PAIRS)
def test_one_instance_alone_has_zero_loss(name: str) -> None:
    torch.manual_seed(0)
    check_zero(OF_PAIRS[name](), torch.randn(1, DIM), torch.tensor([1]))


@pytest.mark.parametrize("name", [*OF_PAIRS, *OF_PROXIES])
@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 1, 2]])
def test_batches_of_one_label_or_of_none_twice_have_finite_losses(name: str, labels: list[int]) -> None:
    torch.manual_seed(0)
    loss, gradient = value_and_gradient((OF_PAIRS | OF_PROXIES)[name](), torch.randn(3, DIM), torch.tensor(labels))
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", MINERS)
def test_miners_pick_nothing_of_no_embeddings(name: str) -> None:
    mined = MINERS[name](torch.empty(0, DIM), torch.empty(0, dtype=torch.int64), None)
    assert all(len(part) == 0 for part in mined)


@pytest.mark.parametrize("hard_mining", [True, False])
def test_no_pairs_are_picked_of_no_embeddings(hard_mining: bool) -> None:
    pairs = PairsMiner(hard_mining)(torch.empty(0, DIM), torch.empty(0, dtype=torch.int64))
    assert all(len(part) == 0 for part in pairs)


def test_a_bank_does_not_remember_a_batch_without_embeddings() -> None:
    bank = Bank(size_in_batches=2)
    criterion = BankedCriterion(TripletLoss(HardTriplets(), margin=0.2), bank)
    nothing, some = torch.empty(0, DIM), torch.randn(3, DIM)
    check_zero(criterion, nothing, torch.empty(0, dtype=torch.int64))
    criterion(some, LABELS)
    check_zero(criterion, nothing, torch.empty(0, dtype=torch.int64))
    memory = bank.memory(some)
    assert memory is not None
    assert torch.equal(memory.embeddings, some)


@pytest.mark.parametrize("shape", [(1, DIM), (2, DIM), (3, DIM + 1)])
def test_a_bank_refuses_batches_of_another_shape(shape: tuple[int, int]) -> None:
    bank = Bank(size_in_batches=2)
    bank.push(torch.randn(3, DIM), LABELS)
    with pytest.raises(ValueError, match=r"bank holds batches of \(3, 4\) embeddings, found"):
        bank.push(torch.randn(shape), torch.zeros(shape[0], dtype=torch.int64))
