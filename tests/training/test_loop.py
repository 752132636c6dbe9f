"""The loop in one plain process, no Ray: precisions, freezing, the best checkpoint, history, bad losses."""

from __future__ import annotations

import copy
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import train_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.testing import CompileCounter

from oml_ray import build
from oml_ray.config import TrainConfig, validate
from oml_ray.errors import ConfigError, ResourceError, RunError
from oml_ray.learning.extractors import Extractor
from oml_ray.retrieval.metrics.spread import collapse_warning
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training.context import LocalContext
from oml_ray.training.loop import Loop
from oml_ray.training.run_directory import RunDirectory


def loop(table: Path, folder: Path, **nodes: Any) -> Loop:
    config = validate(TrainConfig, train_config(table, folder, **nodes), "test")
    found = build.table(config.data, config.run.storage)
    stream = build.local_stream(config, found)
    run = RunDirectory(config.run.storage, config.run.name)
    return build.loop(config, found, stream.plan, LocalContext(stream), run)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
def test_every_precision_learns(small_table: Path, tmp_path: Path, precision: str) -> None:
    trained = loop(small_table, tmp_path, training={"epochs": 3, "precision": precision})
    trained.train()
    losses = [row["loss"] for row in trained.records.history.rows if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    expected = torch.float64 if precision == "fp64" else torch.float32
    assert {parameter.dtype for parameter in trained.learner.parameters()} == {expected}


def test_history_and_events_tell_the_run(small_table: Path, tmp_path: Path) -> None:
    trained = loop(small_table, tmp_path, training={"epochs": 2, "log_every": 2}, validation={"every": 2})
    trained.train()
    rows = trained.records.history.rows
    assert [(row["kind"], row["epoch"], row["step"]) for row in rows] == [
        ("validation", -1, 0), ("train", 0, 4), ("train", 1, 8), ("validation", 1, 8),
    ]  # fmt: skip
    assert rows[1]["images_per_s"] == pytest.approx(4 * 15 / rows[1]["seconds"])
    assert {"train/step", "train/iter_first_batch", "train/iter_batch"} <= set(rows[1]["timings"])
    assert rows[1]["timings"]["train/step"]["count"] == 4
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8]
    assert [event.step for event in events.Scalars("validation/cmc.1")] == [0, 8]
    assert len(trained.context.rows) == 2


@pytest.mark.parametrize(("mode", "best"), [("max", 8), ("min", 4)])
def test_best_follows_the_metric(small_table: Path, tmp_path: Path, mode: str, best: int) -> None:
    trained = loop(small_table, tmp_path, training={"epochs": 3}, checkpoint={"metric": "cmc.1", "mode": mode})
    values = iter([0.9, 0.3, 0.5, 0.4])  # before training, then epochs 1 to 3
    trained.validate = lambda extractor, context: {"cmc.1": next(values)}
    trained.train()
    with checkpoints.located(str(tmp_path / "run" / "checkpoints" / "best")) as folder:
        assert checkpoints.read(folder).position.global_step == best


def test_the_score_of_a_best_that_is_gone_is_no_score_to_beat(small_table: Path, tmp_path: Path) -> None:
    values = {0: 0.1, 4: 0.9, 8: 0.3, 12: 0.5, 16: 0.4}

    def trained(epochs: int) -> None:
        built = loop(small_table, tmp_path, training={"epochs": epochs}, schedule={"name": "constant"})
        built.validate = lambda extractor, context: {"cmc.1": values[built.position.global_step]}
        built.train()

    def best() -> str:
        return (tmp_path / "run" / "checkpoints" / "best").read_text()

    trained(2)
    assert best() == "step_00000004"
    shutil.rmtree(tmp_path / "run" / "checkpoints" / best())
    trained(4)
    assert best() == "step_00000012"


def test_a_frozen_backbone_moves_only_after_its_epochs(small_table: Path, tmp_path: Path) -> None:
    moved = loop(small_table, tmp_path, training={"epochs": 2, "freeze_epochs": 1})
    before = {name: value.clone() for name, value in moved.learner.extractor.backbone.state_dict().items()}
    states = []
    moved.validate = lambda extractor, context: (
        states.append({name: value.clone() for name, value in extractor.backbone.state_dict().items()})
        or {"cmc.1": 0.5}
    )
    moved.train()
    at_start, after_first, after_second = states
    for name, value in before.items():
        assert torch.equal(at_start[name], value)
        assert torch.equal(after_first[name], value)
    assert any(not torch.equal(after_second[name], value) for name, value in before.items())


def test_a_loss_that_is_not_finite_stops_the_run(small_table: Path, tmp_path: Path) -> None:
    broken = loop(small_table, tmp_path)
    with torch.no_grad():
        broken.learner.extractor.projection[0].weight.fill_(torch.nan)
    broken.wrap()
    batch = next(iter(broken.context.stream.training(0, 0, 1)))
    with pytest.raises(RunError, match=r"The loss became nan at step 0 \(epoch 0\): lower optimizer.lr"):
        broken.learn(batch)


def test_clipping_bounds_the_step(small_table: Path, tmp_path: Path) -> None:
    """Under plain SGD a step is lr times the gradient: clipped to norm c, parameters move by lr * c."""
    clipped = loop(
        small_table,
        tmp_path,
        optimizer={"name": "sgd", "lr": 0.5, "weight_decay": 0.0},
        schedule={"name": "constant"},
        training={"epochs": 1, "precision": "fp64", "clip_grad_norm": 1e-3},
    )
    before = torch.cat([parameter.detach().ravel().clone() for parameter in clipped.learner.parameters()])
    clipped.wrap()
    clipped.learn(next(iter(clipped.context.stream.training(0, 0, 1))))
    after = torch.cat([parameter.detach().ravel() for parameter in clipped.learner.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.5e-3, rel=1e-3)


def test_a_changed_table_is_refused(small_table: Path, tmp_path: Path) -> None:
    first = loop(small_table, tmp_path, training={"epochs": 1})
    first.train()
    text = small_table.read_text()
    (tmp_path / "df.csv").write_text(text.replace("0,images/0_0.png,train", "1,images/0_0.png,train"))
    with pytest.raises(RunError, match=r"The table of .* has changed since its last checkpoint"):
        loop(tmp_path / "df.csv", tmp_path, data={"root": str(small_table.parent)}, training={"epochs": 1})


SHARDED: dict[str, Any] = {
    "extractor": {"embedding_dim": None},
    "criterion": {"name": "arcface", "head": {"sharded": True}},
}


@pytest.mark.parametrize(
    ("precision", "clip_grad_norm"), [("fp32", None), ("bf16", None), ("fp16", None), ("fp16", 1.0)]
)
def test_a_sharded_head_learns_alone_while_the_backbone_is_frozen(
    small_table: Path, tmp_path: Path, precision: str, clip_grad_norm: float | None
) -> None:
    # At first GradScaler skips steps: it halves the scale until no gradient overflows.
    training = {"epochs": 4, "freeze_epochs": 1, "precision": precision, "clip_grad_norm": clip_grad_norm}
    trained = loop(small_table, tmp_path, training=training, **SHARDED)
    states: list[dict[str, torch.Tensor]] = []

    def keep_state(extractor: Extractor, context: LocalContext) -> dict[str, float]:
        states.append({"head": trained.updates.head.weight.clone(), **copy.deepcopy(extractor.state_dict())})
        return {"cmc.1": 0.5}

    trained.validate = keep_state
    trained.train()
    at_start, frozen, *_, unfrozen = states
    assert [name for name in at_start if not torch.equal(at_start[name], frozen[name])] == ["head"]
    moved = [name for name in at_start if not torch.equal(frozen[name], unfrozen[name])]
    assert "head" in moved
    assert len(moved) > 1


def test_freezing_all_that_learns_is_refused(small_table: Path, tmp_path: Path) -> None:
    """A loss of pytorch-metric-learning without parameters: only the built criterion tells."""
    with pytest.raises(ConfigError, match=r"training.freeze_epochs freezes the backbone, and nothing else has param"):
        loop(
            small_table,
            tmp_path,
            extractor={"embedding_dim": None},
            criterion={"name": "pytorch_metric_learning", "loss": "NTXentLoss"},
            training={"freeze_epochs": 1},
        )


@pytest.mark.parametrize("pooling", ["default", "gem"])
def test_compile_compiles_the_whole_extractor(
    small_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooling: str
) -> None:
    """One graph holds all that an extractor computes, from its pixels to unit vectors, whatever pools."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    training = {"epochs": 1, "precision": "fp32"}
    extractor = {"model": "test_resnet", "embedding_dim": None, "pooling": pooling}
    plain = loop(small_table, tmp_path / "plain", training=training, extractor=extractor)
    built = loop(small_table, tmp_path / "compiled", training={**training, "compile": True}, extractor=extractor)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    embeddings = built.learner.extractor(images)
    torch.testing.assert_close(embeddings, plain.learner.extractor(images))
    assert counter.frame_count == 1
    convolutions = sum(isinstance(part, torch.nn.Conv2d) for part in built.learner.extractor.modules())
    assert counter.op_count > convolutions


def test_compile_without_a_compiler_is_refused(
    small_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ResourceError, match=r"training.compile: true needs a C\+\+ compiler, but .* has no g\+\+"):
        loop(small_table, tmp_path, training={"compile": True})
    monkeypatch.setenv("CXX", sys.executable)  # any program: torch asks it for its version
    loop(small_table, tmp_path, training={"compile": True})


def without(**nodes: Any) -> dict[str, Any]:
    return {"validation": {"every": 0, "at_start": False}, "schedule": {"name": "constant"}, **nodes}


def test_a_changed_learning_rate_is_that_of_the_continued_run(small_table: Path, tmp_path: Path) -> None:
    """Plain SGD moves by the learning rate times the gradient: a tenth of the rate moves a tenth as far."""
    moved = []
    for number, lr in enumerate((0.1, 0.01)):
        folder = tmp_path / str(number)
        sgd = {"name": "sgd", "weight_decay": 0.0}
        training = {"epochs": 1, "precision": "fp64"}
        loop(small_table, folder, **without(training=training, optimizer={**sgd, "lr": 0.1})).train()
        training = {"epochs": 2, "precision": "fp64"}
        continued = loop(small_table, folder, **without(training=training, optimizer={**sgd, "lr": lr}))
        before = [parameter.detach().clone() for parameter in continued.learner.parameters()]
        continued.wrap()
        continued.learn(next(iter(continued.context.stream.training(1, 0, 2))))
        moved.append(
            torch.cat(
                [
                    (after.detach() - old).ravel()
                    for after, old in zip(continued.learner.parameters(), before, strict=True)
                ]
            )
        )
    torch.testing.assert_close(moved[1], moved[0] / 10)


def test_the_state_of_an_optimizer_continues_at_another_rate_alone(small_table: Path, tmp_path: Path) -> None:
    loop(small_table, tmp_path, **without(training={"epochs": 1})).train()
    training = {"epochs": 2}
    rate = loop(small_table, tmp_path, **without(training=training, optimizer={"lr": 0.5, "weight_decay": 0.25}))
    steps = {int(state["step"]) for state in rate.updates.optimizer.state.values()}
    assert steps == {4}
    assert {group["weight_decay"] for group in rate.updates.optimizer.param_groups} == {0.25}
    for optimizer in ({"name": "sgd", "lr": 1e-3}, {"options": {"amsgrad": True}}):
        other = loop(small_table, tmp_path, **without(training=training, optimizer=optimizer))
        assert not other.updates.optimizer.state
    other.train()
    assert other.position.epoch == 2


def test_a_sharded_head_refuses_another_optimizer(small_table: Path, tmp_path: Path) -> None:
    head = {"criterion": {"name": "arcface", "head": {"sharded": True}}}
    loop(small_table, tmp_path, **without(training={"epochs": 1}, **head)).train()
    loop(small_table, tmp_path, **without(training={"epochs": 2}, optimizer={"lr": 0.5}, **head))
    with pytest.raises(RunError, match=r"of optimizer, only lr, criterion_lr, projection_lr, weight_decay may change"):
        loop(small_table, tmp_path, **without(training={"epochs": 2}, optimizer={"name": "sgd"}, **head))


@pytest.mark.parametrize(("before", "after"), [("fp16", "fp32"), ("fp32", "fp16")])
def test_the_precision_of_a_continued_run_may_change(
    small_table: Path, tmp_path: Path, before: str, after: str
) -> None:
    loop(small_table, tmp_path, **without(training={"epochs": 1, "precision": before})).train()
    continued = loop(small_table, tmp_path, **without(training={"epochs": 2, "precision": after}))
    assert continued.position.epoch == 1
    continued.train()
    assert continued.position.epoch == 2


def test_more_epochs_end_where_one_longer_run_does(small_table: Path, tmp_path: Path) -> None:
    """With a schedule that does not depend on its end, one epoch and then two are the same as two at once."""
    for epochs in (1, 2):
        continued = loop(small_table, tmp_path / "continued", **without(training={"epochs": epochs}))
        continued.train()
    at_once = loop(small_table, tmp_path / "at_once", **without(training={"epochs": 2}))
    at_once.train()
    for one, other in zip(continued.learner.parameters(), at_once.learner.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    kinds = [[(row["kind"], row["epoch"]) for row in each.records.history.rows] for each in (continued, at_once)]
    assert kinds[0] == kinds[1] == [("train", 0), ("train", 1)]


@pytest.mark.parametrize(("lr", "is_collapsed"), [(1e-3, False), (0.1, True)])
def test_the_spread_of_a_validation_tells_a_collapse(
    small_table: Path, tmp_path: Path, lr: float, is_collapsed: bool
) -> None:
    """At a far too high learning rate all embeddings become alike (and the loss of triplets stays at its margin)."""
    trained = loop(small_table, tmp_path, optimizer={"lr": lr}, training={"epochs": 3})
    trained.train()
    rows = trained.records.history.rows
    spreads = [row["spread"] for row in rows if row["kind"] == "validation"]
    assert collapse_warning(spreads[0]) is None
    assert (collapse_warning(spreads[-1]) is not None) == is_collapsed
