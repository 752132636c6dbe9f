"""What a sweep needs of a cluster: trials side by side, none of which can keep another from its workers."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import ray
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from oml_ray.config import SweepConfig, TrainConfig, nodes
from oml_ray.distributed import evaluate, trainer, validation
from oml_ray.distributed.runtime.resources import Needs
from oml_ray.distributed.tuning import DRIVER_CPUS
from oml_ray.errors import ResourceError, reason_of

DASHBOARD_TIMEOUT_S = 60


def needs(config: SweepConfig) -> Needs:
    """Logical resources of the trials that must run at one time, and of the evaluation at the end."""
    training, most = config.training, config.tune.max_concurrent
    trial, count = trainer.needs(training), 1 if most == "auto" else min(most, config.num_trials)
    cpus = trial.cpus + DRIVER_CPUS
    formula = f"a trial: {trial.formula}, and {DRIVER_CPUS} for its driver"
    if count > 1:
        formula += f"; tune.max_concurrent: {count} trials of {cpus:g}"
    at_one_time = replace(trial, cpus=count * cpus, gpus=count * trial.gpus, formula=formula)
    return at_one_time | evaluate.needs(training.evaluation, training.scaling)


def at_once(config: SweepConfig, ray_nodes: list[dict[str, Any]]) -> int:
    """How many trials run side by side, so that all of them have their workers, wherever Ray puts their drivers.

    Args:
        config: the sweep.
        ray_nodes: what `ray.nodes()` says.

    Raises:
        ResourceError: the cluster has no room for one trial, or for `tune.max_concurrent`.
    """
    free = [
        (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)) for node in ray_nodes if node["Alive"]
    ]
    scaling, wanted = config.training.scaling, config.tune.max_concurrent
    most = config.num_trials if wanted == "auto" else min(wanted, config.num_trials)
    found = 0
    validation_cpus, validation_gpus = _of_validation(config.training)
    beside, gpus_beside = scaling.data_cpus + validation_cpus, validation_gpus
    while found < most and _fit(found + 1, scaling, beside, free, gpus_beside):
        found += 1
    if found and (wanted == "auto" or found == most):
        return found
    use_gpu = scaling.uses_gpu("workers")
    have = ", ".join(f"{cpus:g}" + f" (and {gpus:g} GPUs)" * (use_gpu or gpus_beside > 0) for cpus, gpus in free)
    what = f"tune.max_concurrent: {most} trials do" if found else "A trial does"
    raise ResourceError(
        f"{what} not fit into the Ray cluster, whose nodes have {have} CPUs: a trial needs {scaling.most_workers} "
        f"workers of {scaling.cpus_per_worker} CPUs{' and a GPU' * use_gpu}, each on one node, "
        f"{beside} CPUs for data{' and validation' * (beside > scaling.data_cpus)}"
        f"{f', {gpus_beside:g} GPUs for validation' * (gpus_beside > 0)}, and {DRIVER_CPUS} for its driver, "
        "which may be on any node. "
        + (f"Set tune.max_concurrent to at most {found}, or auto." if found
           else "Lower scaling.num_workers or scaling.cpus_per_worker, or add CPUs.")
    )  # fmt: skip


def _of_validation(training: TrainConfig) -> tuple[int, float]:
    """CPUs and GPUs of a trial's validations while it trains."""
    if training.validation.mode != "async":
        return 0, 0.0
    needed = validation.needs(training)
    return math.ceil(needed.cpus), needed.gpus


def _fit(
    num_trials: int, scaling: nodes.Scaling, beside: float, free: list[tuple[float, float]], gpus_beside: float = 0
) -> bool:
    """Whether trials fit even when their drivers sit where they are most in the way of workers.

    Args:
        num_trials: how many.
        scaling: of each.
        beside: CPUs of each, on any nodes, beside workers and driver.
        free: CPUs and GPUs of the nodes.
        gpus_beside: GPUs of each, on any nodes, beside workers.
    """
    drivers, workers = num_trials * DRIVER_CPUS, num_trials * scaling.most_workers
    use_gpu = scaling.uses_gpu("workers")

    def slots(cpus: float, gpus: float) -> float:
        """Workers that a node has room for."""
        return min(cpus // scaling.cpus_per_worker, gpus if use_gpu else math.inf)

    # lost[j]: most workers that find no room when j drivers sit on the nodes so far; none where j do not fit on them.
    lost = [0.0] + [-math.inf] * drivers
    for cpus, gpus in free:
        of_node = [slots(cpus, gpus) - slots(cpus - j, gpus) for j in range(min(drivers, int(cpus)) + 1)]
        lost = [max(lost[j - i] + of_node[i] for i in range(min(j + 1, len(of_node)))) for j in range(drivers + 1)]
    all_gpus = num_trials * gpus_beside + (workers if use_gpu else 0)
    all_cpus = drivers + workers * scaling.cpus_per_worker + num_trials * beside
    return (
        lost[drivers] > -math.inf
        and sum(slots(*node) for node in free) - lost[drivers] >= workers
        and sum(cpus for cpus, _ in free) >= all_cpus
        and sum(gpus for _, gpus in free) >= all_gpus
    )


def check_state_api(config: SweepConfig) -> None:
    """Refuse to stop trials early where what they held would not be given back.

    Raises:
        ResourceError: the cluster has no dashboard, or it does not answer.
    """
    deadline = time.monotonic() + DASHBOARD_TIMEOUT_S
    while config.tune.scheduler != "none":
        try:
            list_actors(address=ray.get_runtime_context().gcs_address, limit=1)
            return
        except (RayStateApiException, ConnectionError) as error:  # one that has just been started takes a while
            if time.monotonic() > deadline:
                raise ResourceError(
                    "tune.scheduler: asha needs the dashboard of the Ray cluster, which does not answer: through it "
                    "Ray frees the CPUs of a stopped trial. Start the head with --include-dashboard=true (package "
                    f"ray[default]), or use scheduler: none. ({reason_of(error)})"
                ) from None
            time.sleep(1)
