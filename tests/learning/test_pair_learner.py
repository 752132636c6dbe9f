"""The learner of pairs on one rank, and, in plain gloo processes that run this file, on two and three."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from oml_ray.data.plan import slice_bounds
from oml_ray.learning.extractors import Extractor, timm_extractor
from oml_ray.learning.losses.pairs_bce import PairsBCELoss
from oml_ray.learning.pair_learner import PairLearner
from oml_ray.learning.siamese import ConcatSiamese, LinearSiamese, PairModel

NUM_ITEMS, DIM, STEPS = 14, 6, 5  # 7 pairs: neither two nor three ranks share them evenly


def model_of(name: str) -> PairModel:
    torch.manual_seed(5)
    if name == "linear":
        return LinearSiamese(DIM, identity=False).double()
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    extractor = Extractor(
        backbone, nn.Linear(16, DIM), embedding_dim=DIM, mean=[0.5] * 3, std=[0.2] * 3, normalize=True
    )
    return ConcatSiamese(extractor, [8]).double()


def batch_of(name: str, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (NUM_ITEMS,), generator=generator)
    if name == "linear":
        return torch.randn(NUM_ITEMS, DIM, generator=generator), labels
    return torch.randint(0, 256, (NUM_ITEMS, 3, 8, 8), dtype=torch.uint8, generator=generator), labels


def train(rank: int, world_size: int, name: str, micro_batch: int | None = None) -> dict[str, Tensor]:
    """Several steps of momentum on slices of global batches: losses, logs and parameters."""
    learner = PairLearner(model_of(name), PairsBCELoss(2.0), micro_batch=micro_batch)
    wrapped = DistributedDataParallel(learner) if world_size > 1 else learner
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.3, momentum=0.9)
    bounds = slice_bounds(NUM_ITEMS, world_size, group=2)
    found: dict[str, list[Tensor]] = {"loss": [], "pair_accuracy": []}
    for step in range(STEPS):
        items, labels = (part[bounds[rank] : bounds[rank + 1]] for part in batch_of(name, step))
        loss, logs = wrapped(items, labels, bounds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found["loss"].append(loss.detach())
        found["pair_accuracy"].append(logs["pair_accuracy"].double())
    state = {f"model.{key}": value.clone() for key, value in learner.extractor.state_dict().items()}
    return {**{key: torch.stack(values) for key, values in found.items()}, **state}


def everything(rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    return {
        "linear": train(rank, world_size, "linear"),
        "concat": train(rank, world_size, "concat"),
        "concat_micro": train(rank, world_size, "concat", micro_batch=3),
    }


def main() -> None:
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous_{world_size}", rank=rank, world_size=world_size
    )
    torch.save(everything(rank, world_size), folder / f"{world_size}_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_world_size_does_not_matter(tmp_path: Path, processes: Callable[..., None], world_size: int) -> None:
    processes(__file__, world_size, tmp_path)
    alone = everything(0, 1)
    before = {name: model_of(name).state_dict() for name in ("linear", "concat")}
    for rank in range(world_size):
        found = torch.load(tmp_path / f"{world_size}_{rank}.pt")
        for case, expected in alone.items():
            assert found[case].keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[case][key], value, rtol=0, atol=1e-10, msg=f"{case}: {key}")
    for name, state in before.items():
        assert all((alone[name][f"model.{key}"] - value).abs().max() > 1e-4 for key, value in state.items())


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 13, 14, 100])
@pytest.mark.parametrize("name", ["linear", "concat"])
def test_micro_batches_have_the_gradients_of_the_whole(name: str, micro_batch: int) -> None:
    whole = PairLearner(model_of(name), PairsBCELoss())
    chunked = PairLearner(copy.deepcopy(whole.extractor), PairsBCELoss(), micro_batch=micro_batch)
    for learner in (whole, chunked):
        learner(*batch_of(name, 0), [0, NUM_ITEMS])[0].backward()
    for one, other in zip(whole.parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("micro_batch", "sizes"), [(1, [2] * 7), (3, [2] * 7), (5, [4, 4, 4, 2]), (None, [14])])
def test_no_chunk_cuts_a_pair(micro_batch: int | None, sizes: list[int]) -> None:
    learner = PairLearner(model_of("linear"), PairsBCELoss(), micro_batch=micro_batch)
    seen: list[int] = []
    learner.extractor.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    learner(*batch_of("linear", 0), [0, NUM_ITEMS])
    assert seen == sizes


class Told(nn.Module):
    """A criterion that keeps what it is told."""

    def forward(self, logits: Tensor, is_different: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.logits, self.is_different = logits, is_different
        return logits.sum(), {}


def test_the_criterion_is_told_logits_and_differences() -> None:
    items, _ = batch_of("linear", 0)
    told = Told()
    learner = PairLearner(model_of("linear"), told)
    learner(items[:6], torch.tensor([4, 4, 4, 7, 9, 9]), [0, 6])
    assert told.is_different.tolist() == [False, True, False]
    assert torch.equal(told.logits, learner.extractor(items[:6]))


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_autocast_ends_before_the_criterion(micro_batch: int | None) -> None:
    told = Told()
    model = ConcatSiamese(timm_extractor("test_resnet", size=32), [8])
    learner = PairLearner(model, told, autocast=torch.bfloat16, micro_batch=micro_batch)
    items = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    learner(items, torch.arange(6), [0, 6])[0].backward()
    assert told.logits.dtype == torch.float32
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_micro_batch_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch must be at least 1 or None, found 0"):
        PairLearner(model_of("linear"), PairsBCELoss(), micro_batch=0)


if __name__ == "__main__":
    main()
