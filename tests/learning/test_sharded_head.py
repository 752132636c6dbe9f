"""The sharded head on one rank, and, in plain gloo processes that run this file, on two and three."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from oml_ray.errors import CheckpointError
from oml_ray.learning import sharded_head
from oml_ray.learning.gather import gather
from oml_ray.learning.losses.arcface import ArcFaceLoss, CosFaceLoss, MarginSoftmaxLoss
from oml_ray.learning.losses.margins import AngularMargin, CosineMargin, Margin
from oml_ray.learning.row_sparse import RowSparseAdamW, RowSparseOptimizer, RowSparseSGD
from oml_ray.learning.sharded_head import ShardedHead
from oml_ray.training.sharded_checkpoint import overlapping, read_parts, send_parts, write_parts

LABELS = torch.tensor([-4, 3, 8, 9, 21, 22, 23, 40, 41, 57, 999])
DIM, BATCH, STEPS, ROWS_PER_PART = 5, 7, 6, 4
MARGINS: dict[str, Margin] = {"arcface": AngularMargin(0.5), "cosface": CosineMargin(0.35)}
OPTIMIZERS: dict[str, RowSparseOptimizer] = {
    "adamw": RowSparseAdamW(lr=0.05, weight_decay=0.1),
    "sgd": RowSparseSGD(lr=0.05, weight_decay=0.1, momentum=0.9),
}


def head_of(
    rank: int = 0, world_size: int = 1, *, margin: str = "arcface", optimizer: str = "adamw", **options: Any
) -> ShardedHead:
    arguments = {"scale": 16.0, "seed": 5, **options}
    head = ShardedHead(
        LABELS, DIM, MARGINS[margin], OPTIMIZERS[optimizer], rank=rank, world_size=world_size, **arguments
    )
    return head.double()


def replicated(weight: Tensor, margin: str) -> MarginSoftmaxLoss:
    kind: Callable[..., MarginSoftmaxLoss] = {"arcface": ArcFaceLoss, "cosface": CosFaceLoss}[margin]
    criterion = kind(LABELS, DIM, scale=16.0).double()
    with torch.no_grad():
        criterion.proxies.copy_(weight[:, None])
    return criterion


def batch_of(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(BATCH, DIM, dtype=torch.float64, generator=generator)
    return embeddings, LABELS[torch.randint(len(LABELS), (BATCH,), generator=generator)]


# What the processes do. Each returns tensors of this rank; those of "rows" are its part of all rows.


def once(rank: int, world_size: int, margin: str) -> dict[str, Any]:
    """Loss and gradients at sample rate 1, of a loss that is scaled as a scaler of float16 does."""
    head = head_of(rank, world_size, margin=margin)
    embeddings, labels = batch_of(1)
    head.begin_step(0)
    loss, logs = head(embeddings.requires_grad_(), labels)
    (loss * 8).backward()
    head.scale_gradient_(1 / 8)
    squares = head.gradient_square_sum()
    rows = {"weight": head.weight.clone(), "gradient": head._gradient()}
    return {"loss": loss.detach(), "embeddings": embeddings.grad / 8, "squares": squares, **logs, "rows": rows}  # type: ignore[operator]


class Learner(nn.Module):
    """As that of oml_ray, with the smallest extractor."""

    def __init__(self, criterion: ShardedHead) -> None:
        super().__init__()
        self.extractor, self.criterion = nn.Linear(DIM, DIM).double(), criterion
        with torch.no_grad():
            self.extractor.weight.copy_(torch.eye(DIM) + 0.1)
            self.extractor.bias.fill_(0.05)

    def forward(self, inputs: Tensor, labels: Tensor, bounds: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.criterion(gather(self.extractor(inputs), bounds), gather(labels, bounds))  # type: ignore[no-any-return]


def train(rank: int, world_size: int, folder: Path, optimizer: str, sample_rate: float) -> dict[str, Any]:
    """Several steps on slices of global batches, clipped together; the end is written as parts.

    Two ranks average their gradients by DDP, three by hand: to import DDP takes longer than all else here.
    """
    head = head_of(rank, world_size, optimizer=optimizer, sample_rate=sample_rate)
    learner = Learner(head)
    wrapped = DistributedDataParallel(learner) if world_size == 2 else learner
    bounds = [r * BATCH // world_size for r in range(world_size + 1)]
    losses, norms = [], []
    for step in range(STEPS):
        inputs, labels = (part[bounds[rank] : bounds[rank + 1]] for part in batch_of(100 + step))
        head.begin_step(step)
        loss, _ = wrapped(inputs, labels, bounds)
        learner.zero_grad()
        loss.backward()
        if world_size == 3:
            for parameter in learner.parameters():
                dist.all_reduce(parameter.grad.div_(world_size))  # type: ignore[union-attr]
        squares = sum(parameter.grad.square().sum() for parameter in learner.parameters())  # type: ignore[union-attr]
        norm = (squares + head.gradient_square_sum()).sqrt()
        factor = (0.5 / (norm + 1e-6)).clamp(max=1)
        with torch.no_grad():
            for parameter in learner.parameters():
                parameter -= 0.1 * factor * parameter.grad  # type: ignore[operator]
        head.scale_gradient_(factor)
        head.step(1 / (step + 1))
        losses.append(loss.detach())
        norms.append(norm)
    assert min(norms) > 0.5, "clipping has to matter here"
    folder.mkdir(exist_ok=True)
    if rank == 0:
        write_parts(head, folder, rows_per_part=ROWS_PER_PART)
    else:
        send_parts(head, rows_per_part=ROWS_PER_PART)
    rows = {name: tensor.clone() for name, tensor in head.shard_state().items()}
    extractor = torch.cat([parameter.detach().flatten() for parameter in learner.extractor.parameters()])
    return {"losses": torch.stack(losses), "norms": torch.stack(norms), "extractor": extractor, "rows": rows}


def read(rank: int, world_size: int, folder: Path, optimizer: str) -> dict[str, Any]:
    """Read parts that another world size wrote."""
    head = head_of(rank, world_size, optimizer=optimizer, seed=999)
    read_parts(head, folder)
    return {"rows": {name: tensor.clone() for name, tensor in head.shard_state().items()}}


RATES = {"all": 1.0, "some": 0.3}


def everything(rank: int, world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    found = {f"once/{margin}": once(rank, world_size, margin) for margin in MARGINS}
    for optimizer in OPTIMIZERS:
        for name, rate in RATES.items():
            parts = folder / f"parts_{optimizer}_{name}_{world_size}"
            found[f"train/{optimizer}/{name}"] = train(rank, world_size, parts, optimizer, rate)
        if world_size != 2:  # the others read what two ranks have written
            found[f"read/{optimizer}"] = read(rank, world_size, folder / f"parts_{optimizer}_some_2", optimizer)
    return found


def main() -> None:
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    sharded_head.CHUNK_ELEMENTS = 2 * BATCH  # two proxies at a time
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous_{world_size}", rank=rank, world_size=world_size
    )
    torch.save(everything(rank, world_size, folder), folder / f"{world_size}_{rank}.pt")
    dist.destroy_process_group()


Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, processes: Callable[..., None]) -> dict[int, Results]:
    """What each world size has found, its ranks' rows put together, and checked to be equal elsewhere."""
    folder = tmp_path_factory.mktemp("sharded")
    found: dict[int, Results] = {}
    for world_size in (2, 3):
        processes(__file__, world_size, folder)
        ranks = [torch.load(folder / f"{world_size}_{rank}.pt") for rank in range(world_size)]
        found[world_size] = {name: joined([rank[name] for rank in ranks]) for name in ranks[0]}
    found[1] = everything(0, 1, folder)
    return found


def joined(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    for other in ranks[1:]:
        for name in ranks[0].keys() - {"rows"}:
            assert torch.equal(ranks[0][name], other[name]), f"{name} differs between ranks"
    rows = {name: torch.cat([rank["rows"][name] for rank in ranks]) for name in ranks[0]["rows"]}
    return {**ranks[0], "rows": rows}


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_close(found[name], value)
        else:
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("margin", sorted(MARGINS))
def test_at_sample_rate_1_it_is_the_replicated_head(results: dict[int, Results], margin: str, world_size: int) -> None:
    found = results[world_size][f"once/{margin}"]
    criterion = replicated(found["rows"]["weight"], margin)
    embeddings, labels = batch_of(1)
    loss, logs = criterion(embeddings.requires_grad_(), labels)
    loss.backward()
    gradient = criterion.proxies.grad[:, 0]  # type: ignore[index]
    expected = {"loss": loss.detach(), "embeddings": embeddings.grad, "squares": gradient.square().sum(), **logs}
    assert_close(found, {**expected, "rows": {"weight": criterion.proxies.detach()[:, 0], "gradient": gradient}})


@pytest.mark.parametrize("world_size", [2, 3])
def test_world_size_does_not_change_the_mathematics(results: dict[int, Results], world_size: int) -> None:
    for name, expected in results[1].items():
        if name.startswith("train"):
            assert_close(results[world_size][name], expected)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_parts_written_by_two_ranks_are_read_by_three_and_by_one(results: dict[int, Results], optimizer: str) -> None:
    written = results[2][f"train/{optimizer}/some"]["rows"]
    assert len(written) > 1
    assert not torch.equal(written["weight"], head_of(seed=999).weight)
    for world_size in (1, 3):
        found = results[world_size][f"read/{optimizer}"]["rows"]
        assert all(torch.equal(found[name], written[name]) for name in written)


def test_training_at_sample_rate_1_is_that_of_torch_optimizers(results: dict[int, Results]) -> None:
    """The replicated head in one process with one dense optimizer, clipped by torch."""
    for name, kind, options in (
        ("adamw", torch.optim.AdamW, {"weight_decay": 0.1}),
        ("sgd", torch.optim.SGD, {"weight_decay": 0.1, "momentum": 0.9}),
    ):
        learner = Learner(replicated(head_of().weight, "arcface"))  # type: ignore[arg-type]
        dense = torch.optim.SGD(learner.extractor.parameters(), lr=0.1)
        optimizer = kind(learner.criterion.parameters(), lr=0.05, **options)  # type: ignore[operator]
        for step in range(STEPS):
            loss, _ = learner(*batch_of(100 + step), [0, BATCH])
            learner.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learner.parameters(), 0.5)
            optimizer.param_groups[0]["lr"] = 0.05 / (step + 1)
            dense.step()
            optimizer.step()
        found = results[3][f"train/{name}/all"]
        torch.testing.assert_close(
            found["rows"]["weight"], learner.criterion.proxies[:, 0].detach(), rtol=0, atol=1e-11
        )
        torch.testing.assert_close(found["losses"][-1], loss.detach(), rtol=0, atol=1e-11)


def test_sampling_changes_the_training(results: dict[int, Results]) -> None:
    """Guards the tests above: rates that were ignored would agree as well."""
    every, some = (results[2][f"train/adamw/{name}"] for name in RATES)
    assert some["losses"][0] < every["losses"][0] - 0.1  # fewer terms in the softmax
    assert some["rows"]["steps"].min() < STEPS
    assert (every["rows"]["steps"] == STEPS).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, len(LABELS) - 1), min_size=1, max_size=8),
    st.integers(1, 40),
    st.integers(0, 9999),
    st.sampled_from([0.5, 2.0, 60.0]),
)
def test_chunks_do_not_change_loss_or_gradients(own: list[int], elements: int, seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    embeddings, labels = torch.randn(len(own), DIM, dtype=torch.float64), LABELS[own]
    head, found = head_of(scale=scale), []
    whole = sharded_head.CHUNK_ELEMENTS
    try:
        for size in (whole, elements):
            sharded_head.CHUNK_ELEMENTS = size
            head.begin_step(0)
            given_embeddings = embeddings.clone().requires_grad_()
            loss, logs = head(given_embeddings, labels)
            loss.backward()
            found.append({"loss": loss.detach(), "by": given_embeddings.grad, "proxies": head._gradient(), **logs})
    finally:
        sharded_head.CHUNK_ELEMENTS = whole
    assert_close(found[1], found[0])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 10**6), st.sampled_from([0.01, 0.3, 0.9]), st.integers(1, 11))
def test_a_step_uses_its_labels_and_the_same_sample_at_any_world_size(
    seed: int, step: int, rate: float, world_size: int
) -> None:
    labels = torch.tensor([0, 5, 5, 10])
    used = []
    for rank in range(world_size):
        head = head_of(rank, world_size, seed=seed, sample_rate=rate)
        local = labels - head.start
        rows = head._sample(local, (local >= 0) & (local < len(head.weight)), step)
        assert rows is not None
        used += (rows + head.start).tolist()
    alone = head_of(seed=seed, sample_rate=rate)._sample(labels, labels >= 0, step)
    assert alone is not None
    assert used == alone.tolist()
    assert {0, 5, 10} <= set(used)


def test_samples_are_of_the_right_size_even_and_independent() -> None:
    """Over labels and steps; a count is off by 6 deviations once in 10^9 seeds, and the seed is fixed."""
    labels, steps, rate = 2000, 200, 0.2
    head = ShardedHead(
        torch.arange(labels), 1, CosineMargin(0.3), OPTIMIZERS["sgd"], scale=1.0, sample_rate=rate, seed=3
    )
    used = torch.zeros(steps, labels)
    nothing = torch.zeros(0, dtype=torch.int64)
    for step in range(steps):
        used[step, head._sample(nothing, nothing.bool(), step)] = 1
    for counts, draws in ((used.sum(dim=1), labels), (used.sum(dim=0), steps), (used.sum()[None], labels * steps)):
        deviation = (draws * rate * (1 - rate)) ** 0.5
        assert ((counts - draws * rate).abs() < 6 * deviation).all()
    for lag in (1, 2, 7):  # of neighboring labels, and of neighboring steps
        for one, other in ((used[:, lag:], used[:, :-lag]), (used[lag:], used[:-lag])):
            draws = one.numel()
            both = float((one * other).sum())
            assert abs(both - draws * rate**2) < 6 * (draws * rate**2) ** 0.5


def test_initial_proxies_are_those_of_any_world_size_and_spread_evenly() -> None:
    labels = torch.arange(3001)

    def weights(rank: int, world_size: int, seed: int) -> Tensor:
        return ShardedHead(
            labels, 64, CosineMargin(0.3), OPTIMIZERS["sgd"], scale=1.0, seed=seed, rank=rank, world_size=world_size
        ).weight

    alone = weights(0, 1, 5)
    for world_size in (2, 7):
        assert torch.equal(torch.cat([weights(rank, world_size, 5) for rank in range(world_size)]), alone)
    assert (weights(0, 1, 6) != alone).float().mean() > 0.99
    assert float(alone.norm(dim=1).mean()) == pytest.approx(1, abs=0.01)
    assert float(alone.mean()) == pytest.approx(0, abs=1e-3)
    assert float(alone.norm(dim=1).std()) < 0.1
    cosines = nn.functional.normalize(alone) @ nn.functional.normalize(alone).T
    assert float(cosines.fill_diagonal_(0).abs().max()) < 6.5 / 8  # of 4.5 million pairs, in deviations of 1 / sqrt(64)


def test_hashes_are_those_of_splitmix64() -> None:
    """The outputs for the state 1234567 that the reference implementation prints, and a naive one for the keys."""
    states = torch.tensor([sharded_head._signed(1234567 + i * sharded_head.GOLDEN) for i in range(5)])
    assert [value % 2**64 for value in sharded_head._splitmix64(states).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    generator = random.Random(0)
    for _ in range(100):
        keys, index = [generator.getrandbits(64), generator.getrandbits(20)], generator.getrandbits(40)
        state_of_keys = 0
        for key in keys:
            state_of_keys = naive_splitmix64(state_of_keys ^ key)
        expected = naive_splitmix64(index * 0x9E3779B97F4A7C15 + state_of_keys) >> 11
        assert sharded_head._hash(torch.tensor([index]), *keys).tolist() == [expected]


def naive_splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_unused_proxies_do_not_move() -> None:
    head = head_of(sample_rate=1e-9)
    before = {name: tensor.clone() for name, tensor in head.shard_state().items()}
    head.begin_step(0)
    loss, _ = head(torch.randn(3, DIM, dtype=torch.float64), LABELS[[2, 2, 7]])
    loss.backward()
    head.step()
    for name, tensor in head.shard_state().items():
        moved = (tensor != before[name]).view(len(LABELS), -1).any(dim=1)
        assert moved.nonzero()[:, 0].tolist() == [2, 7], name


def test_one_label_alone_has_zero_loss_and_gradients() -> None:
    head, embeddings = head_of(sample_rate=1e-9), torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)
    head.begin_step(0)
    loss, _ = head(embeddings, LABELS[[2, 2, 2]])
    loss.backward()
    assert loss == 0
    assert (embeddings.grad == 0).all()  # type: ignore[union-attr]
    assert head.gradient_square_sum() == 0


def test_float32_extremes_are_finite() -> None:
    """Embeddings on the proxy, opposite to it, and without direction; a proxy without direction."""
    head = head_of(scale=64.0).float()
    head.weight[3] = 0
    embeddings = torch.stack([head.weight[0], -head.weight[0], torch.zeros(DIM)]).requires_grad_()
    head.begin_step(0)
    loss, _ = head(embeddings, LABELS[[0, 0, 3]])
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(embeddings.grad).all()  # type: ignore[arg-type]
    assert torch.isfinite(head.gradient_square_sum())


def test_a_gradient_that_is_not_finite_shows_in_the_square_sum() -> None:
    head = head_of()
    head.begin_step(0)
    loss, _ = head(*batch_of(0))
    (loss * torch.inf).backward()
    assert not torch.isfinite(head.gradient_square_sum())


def test_nothing_of_it_is_a_parameter_or_buffer_but_it_moves_with_the_module() -> None:
    """DDP would average and broadcast what is one."""
    head = head_of()
    assert not [*head.parameters(), *head.buffers(), *head.state_dict()]
    outer = nn.Sequential(head).float()
    assert {name: tensor.dtype for name, tensor in head.shard_state().items()} == {
        "weight": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32, "steps": torch.int64,
    }  # fmt: skip
    outer.to("meta")
    assert {tensor.device.type for tensor in (head.labels, *head.shard_state().values())} == {"meta"}


def test_steps_out_of_order_are_refused() -> None:
    head, (embeddings, labels) = head_of(), batch_of(0)
    with pytest.raises(RuntimeError, match="begin_step"):
        head(embeddings, labels)
    head.begin_step(0)
    with pytest.raises(RuntimeError, match="no gradient"):
        head.step()
    loss, _ = head(embeddings, labels)
    with pytest.raises(RuntimeError, match="begin_step"):
        head(embeddings, labels)
    loss.backward()
    head.step()
    with pytest.raises(RuntimeError, match="no gradient"):
        head.step()
    head.begin_step(1)
    with torch.no_grad():
        without, _ = head(embeddings, labels)
    assert without < loss


def test_unknown_labels_are_refused() -> None:
    head = head_of()
    head.begin_step(0)
    with pytest.raises(RuntimeError, match="not built with"):
        head(torch.randn(1, DIM, dtype=torch.float64), torch.tensor([4]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 11), st.integers(0, 11), st.integers(1, 11))
def test_each_rank_takes_its_own_of_any_rows(one: int, other: int, world_size: int) -> None:
    start, stop = sorted([one, other])
    source, target = head_of(seed=6), head_of()
    source.state["steps"] += torch.arange(1, 12)
    heads = [head_of(rank, world_size) for rank in range(world_size)]
    for head in heads:
        head.load_rows(start, {name: tensor[start:stop] for name, tensor in source.shard_state().items()})
    for name, tensor in target.shard_state().items():
        tensor[start:stop] = source.shard_state()[name][start:stop]
        assert torch.equal(torch.cat([head.shard_state()[name] for head in heads]), tensor), name


def test_rows_of_another_head_are_refused() -> None:
    with pytest.raises(ValueError, match="must have the shapes"):
        head_of().load_rows(0, head_of(optimizer="sgd").shard_state())


def test_parts_that_are_absent_damaged_or_of_another_head_are_refused(tmp_path: Path) -> None:
    head = head_of()
    names = write_parts(head, tmp_path, rows_per_part=4)
    assert names == [f"head_{a:010d}_{b:010d}.safetensors" for a, b in ((0, 4), (4, 8), (8, 11))]
    last = head_of(2, 3)  # [7, 11)
    assert overlapping(last, ["meta.json", *reversed(names)]) == names[1:]
    (tmp_path / names[0]).unlink()
    read_parts(last, tmp_path)
    assert torch.equal(last.weight, head.weight[7:])
    with pytest.raises(CheckpointError, match="no part with the label at position 0 of 11"):
        read_parts(head, tmp_path)
    with pytest.raises(CheckpointError, match="another architecture"):
        read_parts(head_of(2, 3, optimizer="sgd"), tmp_path)
    (tmp_path / names[2]).write_bytes((tmp_path / names[2]).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        read_parts(last, tmp_path)
    (tmp_path / names[2]).unlink()
    with pytest.raises(CheckpointError, match="no part with the label at position 8 of 11"):
        read_parts(last, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": -1.0}, "scale must be above 0"),
        ({"sample_rate": 0.0}, "sample_rate must be in"),
        ({"sample_rate": 1.1}, "sample_rate must be in"),
        ({"rank": 2, "world_size": 2}, "rank must be in"),
        ({"rank": -1, "world_size": 2}, "rank must be in"),
        ({"world_size": 12}, "rank must be in"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_of(**arguments)


if __name__ == "__main__":
    main()
