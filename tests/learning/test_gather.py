"""The gather's gradients on a single rank; over several ranks they are proved by tests/training/test_world_size.py."""

from __future__ import annotations

import torch

from oml_ray.learning.gather import gather


def test_one_rank_is_the_identity() -> None:
    own = torch.randn(3, 2, requires_grad=True)
    assert gather(own, [0, 3]) is own
