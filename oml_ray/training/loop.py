"""The training loop: steps, epochs, validations and checkpoints, from any position, with or without Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from oml_ray.data.plan import Plan, slice_bounds
from oml_ray.errors import CheckpointError, RunError
from oml_ray.learning.extractors import Extractor
from oml_ray.learning.learner import Learner
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training import sharded_checkpoint
from oml_ray.training.checkpoint import Checkpoint, Position
from oml_ray.training.context import Context, PlannedBatch, seed_step
from oml_ray.training.optimizers import Factor
from oml_ray.training.run_directory import History, RunDirectory
from oml_ray.training.timings import Timings
from oml_ray.training.updates import Updates

Validate = Callable[[Extractor, Context], dict[str, float]]
Precision = Literal["fp32", "bf16", "fp16", "fp64"]

AUTOCAST: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
EVENTS = "tensorboard"
BAD_IMAGES_NAMED = 100


@dataclass(frozen=True)
class Settings:
    """How long to train and what to keep; the config's `training`, `checkpoint` and `validation` in plain values."""

    seed: int
    epochs: int
    precision: Precision = "fp32"
    clip_grad_norm: float | None = None
    freeze_epochs: int = 0
    ema_decay: float | None = None
    log_every: int = 10
    checkpoint_every_steps: int | None = None
    keep: int = 2
    metric: str = "cmc.1"
    mode: Literal["max", "min"] = "max"
    validate_every: int = 1
    validate_at_start: bool = True


@dataclass
class _Epoch:
    """Running sums of an epoch, kept over a resume in its middle."""

    loss: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    bad_images: dict[int, str] = field(default_factory=dict)


class Loop:
    """Trains a learner on a plan; every rank runs one."""

    def __init__(
        self,
        context: Context,
        run: RunDirectory,
        plan: Plan,
        labels: NDArray[Any],
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        factor: Factor,
        validate: Validate,
        settings: Settings,
        meta: dict[str, Any],
    ) -> None:
        """Prepare a loop, from the run's last checkpoint if it has one.

        Args:
            context: this rank.
            run: where checkpoints, history and events go; rank 0 writes.
            plan: the global batches.
            labels: int64 (rows of the table,), looked up by row id.
            learner: extractor and criterion, equal on every rank.
            optimizer: over the learner's parameters.
            factor: of the learning rate at a step.
            validate: scores the extractor.
            settings: how long, how often.
            meta: plain data for the checkpoints: config, table fingerprint, versions.

        Raises:
            CheckpointError: the last checkpoint is damaged or of another architecture.
            RunError: the table has changed since.
        """
        self.context, self.run, self.plan, self.labels = context, run, plan, labels
        self.validate, self.settings, self.meta = validate, settings, meta
        dtype = torch.float64 if settings.precision == "fp64" else torch.float32
        self.learner = learner.to(context.device, dtype)
        self.bounds = slice_bounds(plan.batch_size, context.world_size)
        self.updates = Updates(
            self.learner,
            optimizer,
            factor,
            device=context.device,
            scale_loss=settings.precision == "fp16",
            clip_grad_norm=settings.clip_grad_norm,
            ema_decay=settings.ema_decay,
        )
        self.timings = Timings()
        self.position, self.epoch = Position(0, 0, 0), _Epoch()
        self.best: float | None = None
        self._frozen = False
        self._wrapped: nn.Module = self.learner
        self._restore()

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.settings.epochs * self.plan.steps_per_epoch

    @property
    def lr(self) -> float:
        """Learning rate of the last step (of the backbone, where parts have their own)."""
        return float(self.updates.optimizer.param_groups[0]["lr"])

    def train(self) -> None:
        """Train to the end of the last epoch, validating and checkpointing on the way.

        Raises:
            RunError: the loss is not finite.
        """
        settings, start = self.settings, self.position
        self.wrap()
        if start.global_step == 0 and settings.validate_at_start:
            self._validate(epoch=-1)
        stream = self.context.stream.training(start.epoch, start.step, settings.epochs)
        waiting = time.perf_counter()
        for planned in stream:
            is_first = planned.step == 0 or self.position == start
            arrived = time.perf_counter()
            self.timings.add("train/iter_first_batch" if is_first else "train/iter_batch", arrived - waiting)
            if is_first and self._frozen != (planned.epoch < settings.freeze_epochs):
                self.wrap()
            self.learn(planned)
            done = time.perf_counter()
            self.timings.add("train/step", done - arrived)
            self.epoch.seconds += done - waiting
            if planned.step + 1 == self.plan.steps_per_epoch:
                self._end_epoch(planned.epoch)
            elif settings.checkpoint_every_steps and self.position.global_step % settings.checkpoint_every_steps == 0:
                self._save(is_best=False)
            waiting = time.perf_counter()
        if self._writes:
            self.events.close()
            self.run.publish(EVENTS)

    @property
    def _writes(self) -> bool:
        return self.context.rank == 0

    def _restore(self) -> None:
        found = checkpoints.latest(self.run, read_more=self._restore_more)
        if found is not None:
            try:
                self.updates.load_state_dict(found.training, found.extractor)
            except (RuntimeError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split())[:300]
                raise CheckpointError(
                    f"The last checkpoint of {self.run.uri} is of another architecture: {reason}"
                ) from None
            self.position, self.best = found.position, found.best
            epoch = found.meta["epoch"]
            bad = {int(row): reason for row, reason in epoch["bad_images"].items()}
            self.epoch = _Epoch(epoch["loss"], epoch["steps"], epoch["seconds"], bad)
        if self._writes:
            self.history = History(self.run)
            self.history.rewind(self.position.global_step if found else -1)
            self.events = SummaryWriter(
                str(self.run.path(EVENTS)), purge_step=self.position.global_step + 1 if found else 0
            )

    def _restore_more(self, folder: Path, found: Checkpoint) -> None:
        if found.meta["table"] != self.meta["table"]:
            raise RunError(
                f"The table of {self.run.uri} has changed since its last checkpoint, and the plan with it: put the "
                "old table back, choose another run.name, or start afresh with run.resume: never."
            )
        head = self.updates.head
        if head is not None:
            checkpoints.check(folder, sharded_checkpoint.overlapping(head, (file.name for file in folder.iterdir())))
            sharded_checkpoint.read_parts(head, folder)

    def wrap(self) -> None:
        """(Re)build DDP for the present epoch: it counts the learning parameters once, when it is built."""
        self._frozen = self.position.epoch < self.settings.freeze_epochs
        self.learner.extractor.freeze_backbone(self._frozen)
        if self.context.world_size > 1:
            devices = [self.context.device] if self.context.device.type == "cuda" else None
            self._wrapped = DistributedDataParallel(self.learner, device_ids=devices, gradient_as_bucket_view=True)

    def learn(self, planned: PlannedBatch) -> None:
        """Take one step on this rank's slice of a global batch.

        Raises:
            RunError: the loss is not finite.
        """
        settings, step = self.settings, self.position.global_step
        self.learner.train()
        seed_step(settings.seed, step, self.context.rank)
        self.updates.begin(step)
        batch = planned.batch
        images = torch.from_numpy(batch.images).to(self.context.device, non_blocking=True)
        labels = torch.from_numpy(self.labels[batch.ids]).to(self.context.device)
        loss, logs = self._wrapped(images, labels, self.bounds)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RunError(
                f"The loss became {value} at step {step} (epoch {planned.epoch}): lower optimizer.lr, set "
                "training.clip_grad_norm, or use training.precision: fp32."
            )
        logs.update(self.updates.apply(loss, step))
        self.position = Position(planned.epoch, planned.step + 1, step + 1)
        self.epoch.loss += value
        self.epoch.steps += 1
        self.epoch.bad_images.update(zip(batch.bad.tolist(), batch.reasons, strict=True))
        if self._writes:
            self._tell(value, logs)

    def _tell(self, loss: float, logs: dict[str, torch.Tensor]) -> None:
        step = self.position.global_step
        if step % self.settings.log_every == 0:
            scalars: dict[str, Any] = {"loss": loss, "lr": self.lr, **logs}
            for name, value in scalars.items():
                self.events.add_scalar(f"train/{name}", float(value), step)
        seconds = self.epoch.seconds / max(1, self.epoch.steps - 1)
        self.context.progress(
            {
                "epoch": self.position.epoch,
                "epochs": self.settings.epochs,
                "step": step,
                "steps": self.total_steps,
                "loss": loss,
                "images_per_s": self.plan.batch_size / seconds if seconds else None,
                "left_s": seconds * (self.total_steps - step),
            }
        )

    def _end_epoch(self, epoch: int) -> None:
        self.position = Position(epoch + 1, 0, self.position.global_step)
        settings, sums = self.settings, self.epoch
        bad_images = self._bad_images_of_all_ranks()
        row = {
            "kind": "train",
            "epoch": epoch,
            "step": self.position.global_step,
            "loss": sums.loss / sums.steps,
            "lr": self.lr,
            "images_per_s": self.plan.batch_size * sums.steps / sums.seconds,
            "seconds": sums.seconds,
            "bad_rows": sorted(bad_images),
            "bad_images": dict(list(bad_images.items())[:BAD_IMAGES_NAMED]),
            "timings": self.timings.flush(),
        }
        if self._writes:
            self.history.append(row)
            self.context.progress(row)
        self.epoch = _Epoch()
        is_last = epoch + 1 == settings.epochs
        due = settings.validate_every > 0 and ((epoch + 1) % settings.validate_every == 0 or is_last)
        is_best = self._validate(epoch) if due else False
        with self.timings.measure("checkpoint/save"):
            self._save(is_best=is_best or settings.validate_every == 0)

    def _bad_images_of_all_ranks(self) -> dict[int, str]:
        everyone: list[dict[int, str]] = [self.epoch.bad_images]
        if self.context.world_size > 1:
            everyone = [{}] * self.context.world_size
            dist.all_gather_object(everyone, self.epoch.bad_images)
        return {row: reason for bad in everyone for row, reason in sorted(bad.items())}

    def _validate(self, epoch: int) -> bool:
        """Score the extractor; whether it is the best so far."""
        settings, start = self.settings, time.perf_counter()
        if self.context.world_size > 1:
            # Batch statistics are each rank's own between two steps: rank 0's are the ones that are kept.
            average = self.updates.average
            for buffer in (*self.learner.buffers(), *(average.averaged.buffers() if average else ())):
                dist.broadcast(buffer, 0)
        scores = self.validate(self.updates.evaluated, self.context)
        seconds = time.perf_counter() - start
        self.timings.add("validation/epoch", seconds)
        row = {"kind": "validation", "epoch": epoch, "step": self.position.global_step, "seconds": seconds, **scores}
        if self._writes:
            self.history.append({**row, "timings": self.timings.flush()})
            self.history.publish()
            for name, value in scores.items():
                self.events.add_scalar(f"validation/{name}", value, self.position.global_step)
        self.context.report(row)
        value = scores[settings.metric]
        sign = 1 if settings.mode == "max" else -1
        is_best = epoch >= 0 and (self.best is None or sign * value > sign * self.best)
        if is_best:
            self.best = value
        return is_best

    def _save(self, *, is_best: bool) -> None:
        bad_images, head = self._bad_images_of_all_ranks(), self.updates.head
        if self._writes:
            sums = self.epoch
            epoch = {
                "loss": sums.loss, "steps": sums.steps, "seconds": sums.seconds,
                "bad_images": {str(row): reason for row, reason in bad_images.items()},
            }  # fmt: skip
            found = Checkpoint(
                dict(self.updates.evaluated.state_dict()),
                self.updates.state_dict(),
                self.position,
                self.best,
                {**self.meta, "epoch": epoch},
            )
            write_more = None if head is None else partial(sharded_checkpoint.write_parts, head)
            checkpoints.save(self.run, found, is_best=is_best, keep=self.settings.keep, write_more=write_more)
            self.events.flush()
            self.run.publish(EVENTS)
            self.history.publish()
        elif head is not None:
            sharded_checkpoint.send_parts(head)
        if self.context.world_size > 1:
            dist.barrier()
