"""The training loop: steps, epochs, validations and checkpoints, from any position, with or without Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from oml_ray.data.plan import Plan
from oml_ray.data.stream import PlannedBatch
from oml_ray.errors import CheckpointError, RunError
from oml_ray.learning.learner import Learner
from oml_ray.learning.pair_learner import PairLearner
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training import sharded_checkpoint
from oml_ray.training.checkpoint import Checkpoint, Position
from oml_ray.training.context import Context, all_objects, seed_step
from oml_ray.training.divergence import divergence_error
from oml_ray.training.elsewhere import Validations
from oml_ray.training.judging import Judging
from oml_ray.training.optimizers import RATES, Factor, keeps_state
from oml_ray.training.records import Records
from oml_ray.training.run_directory import RunDirectory
from oml_ray.training.settings import Settings
from oml_ray.training.timings import Timings
from oml_ray.training.tracking import Tracker
from oml_ray.training.updates import Updates

Validate = Callable[[Any, Context], dict[str, float]]

AUTOCAST: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
BAD_IMAGES_NAMED = 100
MOST_ELSEWHERE = 2
POLL_S = 0.5


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
        learner: Learner | PairLearner,
        optimizer: torch.optim.Optimizer,
        factor: Factor,
        validate: Validate,
        settings: Settings,
        judging: Judging,
        meta: dict[str, Any],
        trackers: Sequence[Tracker] = (),
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
            judging: when to validate, and what is best.
            meta: plain data for the checkpoints: config, table fingerprint, versions.
            trackers: record the run elsewhere too; of rank 0.

        Raises:
            CheckpointError: the last checkpoint is damaged or of another architecture.
            RunError: the table has changed since.
        """
        self.context, self.run, self.plan, self.labels = context, run, plan, labels
        self.validate, self.settings, self.judging, self.meta = validate, settings, judging, meta
        self._trackers = trackers
        dtype = torch.float64 if settings.precision == "fp64" else torch.float32
        self.learner = learner.to(context.device, dtype)
        self.bounds = plan.bounds(context.world_size)
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
        self._handed_over: set[int] = set()
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
        """Train to the end of the last epoch, or until asked to stop, validating and checkpointing on the way.

        Raises:
            RunError: the loss or the parameters are not finite.
        """
        settings, start = self.settings, self.position
        self.wrap()
        if settings.validate_elsewhere:
            if self._is_new and self.judging.is_due(0):
                self._save(is_best=False)
            self._hand_over()
        elif start.global_step == 0 and self.judging.is_due(0):
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
            if self._is_stopped():
                if planned.step + 1 < self.plan.steps_per_epoch:
                    self._save(is_best=False)
                break
            waiting = time.perf_counter()
        if self._writes:
            self.records.close()

    @property
    def _writes(self) -> bool:
        return self.context.rank == 0

    def _is_stopped(self) -> bool:
        """Whether rank 0 was asked to stop; all ranks hear of it at the same step."""
        if self.position.global_step % self.settings.log_every:
            return False
        is_stopping = torch.tensor(self._writes and self.context.is_stopping(), device=self.context.device)
        if self.context.world_size > 1:
            dist.broadcast(is_stopping, 0)
        return bool(is_stopping)

    def _restore(self) -> None:
        found = checkpoints.latest(self.run, read_more=self._restore_more)
        self._is_new = found is None
        if found is not None:
            try:
                with_optimizer = self._keeps_optimizer_state(found)
                self.updates.load_state_dict(found.training, found.extractor, with_optimizer=with_optimizer)
            except (RuntimeError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split())[:300]
                raise CheckpointError(
                    f"The last checkpoint of {self.run.uri} is of another architecture: {reason}"
                ) from None
            # The score of a checkpoint that is gone is no score to beat.
            self.position, self.best = found.position, None if checkpoints.has_lost_best(self.run) else found.best
            epoch = found.meta["epoch"]
            bad = {int(row): reason for row, reason in epoch["bad_images"].items()}
            self.epoch = _Epoch(epoch["loss"], epoch["steps"], epoch["seconds"], bad)
        if self._writes:
            step = -1 if found is None else self.position.global_step
            self.records = Records(self.run, until_step=step, trackers=self._trackers)
            self.validations = Validations(self.run, self.records.history, self.judging)
            self.validations.rewind(step)

    def _restore_more(self, folder: Path, found: Checkpoint) -> None:
        if found.meta["table"] != self.meta["table"]:
            raise RunError(
                f"The table of {self.run.uri} has changed since its last checkpoint, and the plan with it: put the "
                "old table back, choose another run.name, or start afresh with run.resume: never."
            )
        if found.meta.get("store") != self.meta.get("store"):
            raise RunError(
                f"The store of {self.run.uri} was made by another extractor since its last checkpoint, and other pairs "
                "would be mined from it: put the old store back, choose another run.name, or start afresh with "
                "run.resume: never."
            )
        head = self.updates.head
        if head is not None:
            if not self._keeps_optimizer_state(found):
                raise RunError(
                    f"The sharded head of {self.run.uri} goes on with the state of its optimizer: of optimizer, only "
                    f"{', '.join(RATES)} may change when the run is continued. Choose another run.name."
                )
            checkpoints.check(folder, sharded_checkpoint.overlapping(head, (file.name for file in folder.iterdir())))
            sharded_checkpoint.read_parts(head, folder)

    def _keeps_optimizer_state(self, found: Checkpoint) -> bool:
        old, new = ({**meta.get("config", {})}.get("optimizer", {}) for meta in (found.meta, self.meta))
        return keeps_state(old, new)

    def wrap(self) -> None:
        """(Re)build DDP for the present epoch: it counts the learning parameters once, when it is built."""
        self._frozen = self.position.epoch < self.settings.freeze_epochs
        self.learner.extractor.freeze_backbone(self._frozen)
        self._wrapped = self.learner
        # DDP refuses a module without gradients, such as a frozen backbone with a sharded head, which averages nothing.
        if self.context.world_size > 1 and self.updates.has_gradients:
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
            raise self._diverged(f"The loss became {value} at step {step} (epoch {planned.epoch})")
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
            self.records.scalars("train", {"loss": loss, "lr": self.lr, **logs}, step)
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
            self.records.history.append(row)
            self.context.progress(row)
        self.epoch = _Epoch()
        if settings.validate_elsewhere:
            with self.timings.measure("checkpoint/save"):
                self._save(is_best=False)
            with self.timings.measure("validation/wait"):
                self._hand_over()
            return
        is_best = self._validate(epoch) if self.judging.is_due(self.position.global_step) else False
        with self.timings.measure("checkpoint/save"):
            self._save(is_best=is_best or self.judging.every == 0)

    def _bad_images_of_all_ranks(self) -> dict[int, str]:
        everyone = all_objects(self.epoch.bad_images, self.context)
        return {row: reason for bad in everyone for row, reason in sorted(bad.items())}

    def _hand_over(self) -> None:
        """Hand over the checkpoints that are due, and take up what came back; wait while too many are under way."""
        while True:
            rows, waiting = all_objects(self._taken_up() if self._writes else None, self.context)[0]
            for row in rows:
                self.context.report(row)
            for step in waiting:
                if step not in self._handed_over:
                    self.context.hand_over(step)
                    self._handed_over.add(step)
            if len(waiting) <= MOST_ELSEWHERE:
                return
            time.sleep(POLL_S)

    def _taken_up(self) -> tuple[list[dict[str, Any]], list[int]]:
        rows = self.validations.take_up()
        for row in rows:
            self.records.scores(row)
        self.validations.check_progress(self.settings.validation_timeout_s)
        return rows, self.validations.waiting()

    def _check_finite(self) -> None:
        """Refuse to go on from weights that an update broke; called by every rank.

        Raises:
            RunError: some are not finite.
        """
        by_rank = all_objects(self.updates.not_finite(), self.context)  # a sharded head differs between ranks
        names = list(dict.fromkeys(name for names in by_rank for name in names))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise self._diverged(
                f"The parameters are not finite after step {self.position.global_step} ({names[0]}{more}), though the "
                "loss was: the update was too large, or a gradient overflowed"
            )

    def _diverged(self, what: str) -> RunError:
        return divergence_error(
            what,
            lr=self.updates.optimizer.defaults["lr"],
            clip_grad_norm=self.settings.clip_grad_norm,
            is_half=self.settings.precision in AUTOCAST,
            last_checkpoint=(self.run.read_text(checkpoints.FOLDER, "last") or "").strip() or None,
        )

    def _validate(self, epoch: int) -> bool:
        """Score the extractor; whether it is the best so far."""
        if epoch >= 0:
            self._check_finite()
        start = time.perf_counter()
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
            self.records.history.append({**row, "timings": self.timings.flush()})
            self.records.history.publish()
            self.records.scores(row)
        self.context.report(row)
        value = scores[self.judging.metric]
        is_best = epoch >= 0 and self.judging.is_best(value, () if self.best is None else (self.best,))
        if is_best:
            self.best = value
        return is_best

    def _save(self, *, is_best: bool) -> None:
        """Save a checkpoint.

        Raises:
            RunError: it would hold what is not finite.
        """
        self._check_finite()
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
            self.records.settle()
            checkpoints.save(
                self.run,
                found,
                is_best=is_best,
                keep=self.settings.keep,
                keep_also=self.validations.waiting() if self.settings.validate_elsewhere else (),
                write_more=write_more,
            )
            self.records.publish()
        elif head is not None:
            sharded_checkpoint.send_parts(head)
        if self.context.world_size > 1:
            dist.barrier()
