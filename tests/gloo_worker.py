"""One plain process of a gloo group (or alone): trains each config of a file with the local context.

Run as: gloo_worker.py RANK WORLD_SIZE RENDEZVOUS CASES. A case is {"config": ..., "stop_after": steps or null,
"result": path, "broken_shard_of_rank": rank or absent}; rank 0 writes the final extractor and the history's validation
rows there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from oml_ray import build
from oml_ray.config import TrainConfig, validate
from oml_ray.data.stream import PlannedBatch
from oml_ray.errors import RunError
from oml_ray.training.context import LocalContext, LocalStream
from oml_ray.training.run_directory import RunDirectory


class KilledError(Exception):
    """Stands for a process that dies."""


class Mortal(LocalStream):
    """A stream that dies after some steps."""

    def training(self, epoch: int, step: int, epochs: int) -> Iterator[PlannedBatch]:
        """Yield `steps_to_live` batches, then die."""
        for index, planned in enumerate(super().training(epoch, step, epochs)):
            if index == self.steps_to_live:  # type: ignore[attr-defined]
                raise KilledError
            yield planned


def run(case: dict) -> None:  # type: ignore[type-arg]
    """Train one case."""
    config = validate(TrainConfig, case["config"], "case")
    table = build.table(config.data, config.run.storage)
    local = build.local_stream(config, table)
    stream = Mortal(local.plan, local.training_loader, local.evaluation_loader)
    stream.steps_to_live = case.get("stop_after")  # type: ignore[attr-defined]
    context = LocalContext(stream)
    run_directory = RunDirectory(config.run.storage, config.run.name)
    loop = build.loop(config, table, stream.plan, context, run_directory)
    if case.get("broken_shard_of_rank") == context.rank:
        steps = iter(range(stream.plan.steps_per_epoch - 1, -1, -1))  # that are left of the first epoch

        def break_last(*_: object) -> None:
            if next(steps) == 0:
                loop.updates.head.weight.fill_(torch.nan)

        loop.updates.optimizer.register_step_post_hook(break_last)
    try:
        loop.train()
    except KilledError:
        return
    except RunError as error:
        if "broken_shard_of_rank" not in case:
            raise
        Path(case["result"] + ".error.json").write_text(json.dumps(str(error)))
        return
    if context.rank == 0 and case.get("result"):
        state = {name: value for name, value in loop.learner.state_dict().items() if isinstance(value, torch.Tensor)}
        save_file({name: value.clone() for name, value in state.items()}, case["result"])
        rows = [{key: value for key, value in row.items() if key in ("kind", "epoch", "step", "loss") or "." in key}
                for row in loop.records.history.rows]  # fmt: skip
        Path(case["result"] + ".json").write_text(json.dumps(rows))


if __name__ == "__main__":
    rank, world_size, rendezvous, cases = sys.argv[1:]
    torch.set_num_threads(1)
    if world_size != "1":
        dist.init_process_group("gloo", init_method=rendezvous, rank=int(rank), world_size=int(world_size))
    for case in json.loads(Path(cases).read_text()):
        run(case)
    if world_size != "1":
        dist.destroy_process_group()
