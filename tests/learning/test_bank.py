from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.learning.bank import Bank, BankedCriterion
from oml_ray.learning.losses.triplet import TripletLoss
from oml_ray.learning.miners import AllTriplets, HardTriplets, Miner
from oml_ray.learning.pairs import Memory


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(0, 12), st.integers(1, 4))
def test_it_holds_the_last_batches(size: int, pushes: int, batch: int) -> None:
    bank = Bank(size)
    batches = [(torch.randn(batch, 3), torch.full((batch,), index)) for index in range(pushes)]
    for embeddings, labels in batches:
        bank.push(embeddings, labels)
    held = bank.memory(torch.zeros(0))
    if not pushes:
        assert held is None
        return
    assert held is not None
    expected = batches[-size:]
    found = {int(labels[0]): (e, labels) for e, labels in zip(
        held.embeddings.split(batch), held.labels.split(batch), strict=True)}  # fmt: skip
    assert found.keys() == {int(labels[0]) for _, labels in expected}
    for embeddings, labels in expected:
        assert torch.equal(found[int(labels[0])][0], embeddings)
        assert torch.equal(found[int(labels[0])][1], labels)


@pytest.mark.parametrize("miner", [HardTriplets(), AllTriplets()])
def test_the_loss_is_that_of_anchors_against_batch_and_memory(miner: Miner) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(6, 4).double(), torch.randn(6, 4).double().requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    criterion = BankedCriterion(TripletLoss(miner, margin=0.5), Bank(2))
    criterion(first, labels)
    loss, logs = criterion(second, labels)
    # An oracle: the loss of one batch of both, counting the second's anchors alone.
    everything, all_labels = torch.cat([second.detach(), first]), torch.cat([labels, labels])
    losses = []
    for a in range(6):
        d = [float((everything[a] - other).norm()) for other in everything]
        positives = [d[i] for i in range(12) if i != a and all_labels[i] == labels[a]]
        negatives = [d[i] for i in range(12) if all_labels[i] != labels[a]]
        if isinstance(miner, HardTriplets):
            positives, negatives = [max(positives)], [min(negatives)]
        losses += [max(0.0, p - n + 0.5) for p in positives for n in negatives]
    assert float(loss.detach()) == pytest.approx(sum(losses) / len(losses), abs=1e-12)
    assert float(logs["bank_positives"]) == 2
    assert float(logs["bank_negatives"]) == 4
    assert 0 <= float(logs["negatives_from_bank"]) <= 1
    loss.backward()
    assert second.grad.abs().sum() > 0


def test_a_resumed_bank_goes_on_as_the_unbroken_one() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(4, 3) for _ in range(7)]
    labels = torch.tensor([0, 0, 1, 1])
    unbroken = BankedCriterion(TripletLoss(AllTriplets(), margin=0.5), Bank(3))
    losses = [float(unbroken(batch, labels)[0]) for batch in batches]
    first = BankedCriterion(TripletLoss(AllTriplets(), margin=0.5), Bank(3))
    for batch in batches[:5]:
        first(batch, labels)
    state = copy.deepcopy(first.state_dict())
    resumed = BankedCriterion(TripletLoss(AllTriplets(), margin=0.5), Bank(3))
    resumed.load_state_dict(state)
    assert [float(resumed(batch, labels)[0]) for batch in batches[5:]] == losses[5:]


def test_a_bank_of_another_size_is_refused() -> None:
    bank = Bank(2)
    bank.push(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="holds 2 batches, 3 are asked for"):
        Bank(3).load_state_dict(bank.state_dict())
    with pytest.raises(ValueError, match="at least 1, found 0"):
        Bank(0)


def test_no_gradient_reaches_the_memory() -> None:
    bank = Bank(1)
    embeddings = torch.randn(4, 3, requires_grad=True)
    bank.push(embeddings, torch.zeros(4, dtype=torch.int64))
    memory = bank.memory(embeddings)
    assert isinstance(memory, Memory)
    assert not memory.embeddings.requires_grad
