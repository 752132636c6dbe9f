from __future__ import annotations

import torch

from oml_ray.learning.losses.pair_logs import pair_logs
from oml_ray.learning.pairs import Masks


def test_means_and_shares_of_the_memory() -> None:
    distances = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 5.0]], requires_grad=True)
    positive = torch.tensor([[False, True, True], [True, False, False]])
    negative = torch.tensor([[False, False, False], [False, False, True]])
    logs = pair_logs(distances, Masks(positive, negative))
    assert not any(value.requires_grad for value in logs.values())
    assert {name: round(float(value), 4) for name, value in logs.items()} == {
        "distance_positive": 1.3333,
        "distance_negative": 5.0,
        "positives_from_bank": 0.3333,
        "negatives_from_bank": 1.0,
    }
    assert sorted(pair_logs(distances[:, :2], Masks(positive[:, :2], negative[:, :2]))) == [
        "distance_negative",
        "distance_positive",
    ]
