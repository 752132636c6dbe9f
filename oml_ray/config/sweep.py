"""The config of a sweep: a training config, the space over its keys, and how trials are drawn, compared and stopped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from oml_ray.config import nodes
from oml_ray.config.load import apply_overrides, read_yaml, validate
from oml_ray.config.nodes import Node, Positive, Seed
from oml_ray.config.schema import TrainConfig
from oml_ray.config.space import (
    Choice,
    Domain,
    Grid,
    Values,
    check_entries,
    combinations,
    draw,
    keys_of,
    shown,
    with_values,
)
from oml_ray.errors import ConfigError

MAX_TRIALS = 10_000
"""Trials of a sweep: each is drawn and checked before the first one starts."""

NOT_SWEPT = {
    "run": "the sweep names the runs of its trials",
    "scaling": "it does not change what is learned",
    "checkpoint.metric": "trials keep what is best by tune.metric",
    "checkpoint.mode": "trials keep what is best by tune.mode",
}


class Tune(Node):
    metric: Annotated[str, Field(pattern=r"^[a-z_]+\.[0-9]+$")] | None = None
    """Metric of the validation by which trials are compared, and by which each keeps its best checkpoint;
    null: the base's checkpoint.metric."""
    mode: Literal["max", "min"] | None = None
    """Whether larger or smaller is better; null: the base's checkpoint.mode."""
    num_samples: Positive | None = None
    """Trials; where the space has grid keys, of each of their combinations. search: grid takes every one once."""
    search: Literal["random", "grid", "optuna"] = "random"
    """random: independent draws; grid: all combinations; optuna: draws that learn from the trials before them (TPE)."""
    scheduler: Literal["none", "asha"] = "none"
    """none: every trial trains to its end; asha: those behind the others after as many epochs are stopped early."""
    grace_epochs: Positive = 1
    """asha: epochs after which a trial is first compared."""
    reduction_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 4
    """asha: one in so many trials goes on at each comparison, and so many times the epochs pass until the next one."""
    max_concurrent: Positive | Literal["auto"] = "auto"
    """Trials at a time; auto: as many as the cluster has CPUs and GPUs for."""
    seed: Seed = 0
    """Seed of the draws; the trials themselves are seeded by the config's `seed`."""


class SweepConfig(Node):
    """`oml-ray sweep`: trainings that differ in some keys, compared by one metric."""

    base: Annotated[str, Field(min_length=1)] | dict[str, Any]
    """Path of a training config, or the config itself."""
    run: nodes.Run
    """Where the sweep lives; each trial is a run of its own in its folder `trials`."""
    space: Annotated[dict[str, Domain], Field(min_length=1)]
    """Dotted keys of the base, each with uniform, loguniform, randint, choice or grid. Keys that only make sense
    together are one entry: "[sampler.n_labels, sampler.n_instances]": {choice: [[8, 4], [16, 2]]}."""
    tune: Tune = Tune()
    """How trials are drawn, compared and stopped."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        check_entries(self.space)
        for entry in self.space:
            for key in keys_of(entry):
                for other, reason in NOT_SWEPT.items():
                    if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                        raise ValueError(f"space: {key} cannot be swept: {reason}.")
        tune, grids = self.tune, [entry for entry, domain in self.space.items() if isinstance(domain, Grid)]
        if tune.search == "grid":
            ranges = [entry for entry, domain in self.space.items() if not isinstance(domain, Grid | Choice)]
            if ranges:
                raise ValueError(
                    f"tune.search: grid takes every combination of the space, but {', '.join(ranges)} is a range: "
                    "give it grid or choice, or use search: random."
                )
            if tune.num_samples is not None:
                raise ValueError("tune.num_samples: search: grid takes every combination once: leave num_samples out.")
        elif tune.num_samples is None:
            raise ValueError(f"tune.num_samples is missing: how many trials should search: {tune.search} draw?")
        if tune.search == "optuna" and grids:
            raise ValueError(
                f"tune.search: optuna draws all keys itself: give {', '.join(grids)} choice instead of grid."
            )
        if self.num_trials > MAX_TRIALS:
            raise ValueError(
                f"tune.num_samples: the sweep would have {self.num_trials:,} trials (samples x grid values); at most "
                f"{MAX_TRIALS:,} are drawn: lower it, or shorten the grids."
            )
        return self

    @property
    def training(self) -> TrainConfig:
        """The base as a checked config."""
        assert isinstance(self.base, dict)
        return validate(TrainConfig, self.base, "base")

    @property
    def num_trials(self) -> int:
        """How many trials the sweep has."""
        grids = [len(domain.grid) for domain in self._drawn_from().values() if isinstance(domain, Grid)]
        return (self.tune.num_samples or 1) * math.prod(grids)

    def draw(self, index: int) -> Values:
        """The values of trial `index`, for the searches that need no earlier trial: random and grid."""
        return draw(self._drawn_from(), self.tune.seed, index)

    def _drawn_from(self) -> dict[str, Any]:
        if self.tune.search != "grid":
            return self.space
        return {entry: Grid(grid=domain.corners) for entry, domain in self.space.items()}

    def trial(self, values: Values, name: str, storage: str) -> TrainConfig:
        """The training config of a trial.

        Args:
            values: one for each entry of the space.
            name: of its run.
            storage: folder or URI of all trials' runs.

        Raises:
            ConfigError: the values do not fit into the base, or not together.
        """
        assert isinstance(self.base, dict)
        tree = with_values(self.base, values)
        tree["run"] = {"name": name, "storage": storage}
        tree["checkpoint"] = {**(tree.get("checkpoint") or {}), "metric": self.tune.metric, "mode": self.tune.mode}
        return validate(TrainConfig, tree, f"space ({shown(values)})")

    def checked(self) -> SweepConfig:
        """Fill what the base decides, and check the base and what can be drawn.

        Raises:
            ConfigError: the base is no training config, nothing validates the metric, or values do not fit.
        """
        training = self.training
        tune = self.tune.model_copy(
            update={
                "metric": self.tune.metric or training.checkpoint.metric,
                "mode": self.tune.mode or training.checkpoint.mode,
            }
        )
        config = self.model_copy(update={"tune": tune})
        computed = training.evaluation.metrics.names
        if tune.metric not in computed:
            raise ConfigError(
                f"tune.metric: {tune.metric!r} is not computed by the validation: use one of {', '.join(computed)}, or "
                "add its rank under the base's evaluation.metrics."
            )
        config._check_draws()
        return config

    def _check_draws(self) -> None:
        """Refuse a space of which something that can be drawn is no valid config."""
        drawn = list(combinations(self.space))
        if self.tune.search != "optuna":
            drawn += [self.draw(index) for index in range(self.num_trials)]
        wrong, first = 0, ""
        for values in drawn:
            try:
                self._check_trial(values)
            except ConfigError as error:
                wrong += 1
                first = first or str(error)
        if not wrong:
            return
        if wrong == len(drawn) or len(self.space) == 1:
            raise ConfigError(first)
        raise ConfigError(
            f"{first}\n  {wrong} of the {len(drawn)} combinations that were checked are invalid. Values that only make "
            'sense together are one entry of the space: "[a, b]": {choice: [[...], [...]]}.'
        )

    def _check_trial(self, values: Values) -> None:
        config = self.trial(values, "trial", "trials")
        if config.validation.every == 0:
            raise ConfigError(
                "validation.every is 0, but a sweep compares trials by their validations: set it to 1 or more."
            )
        if self.tune.scheduler == "asha" and config.training.epochs != self.training.training.epochs:
            raise ConfigError(
                "tune.scheduler: asha compares trials after as many epochs: training.epochs cannot be swept; use "
                "scheduler: none."
            )
        if self.tune.scheduler == "asha" and config.training.epochs <= self.tune.grace_epochs:
            raise ConfigError(
                f"tune.grace_epochs is {self.tune.grace_epochs}, but training.epochs is {config.training.epochs}: asha "
                "compares trials before their last epoch; lower grace_epochs, or use scheduler: none."
            )


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read, override and check the config of a sweep; overrides of `base.KEY` change the base that it names.

    Raises:
        ConfigError: everything that is wrong with the sweep, its base, or what can be drawn.
    """
    of_base = [override for override in overrides if override.startswith("base.")]
    tree = apply_overrides(read_yaml(path), [override for override in overrides if override not in of_base])
    base = tree.get("base")
    if isinstance(base, str):
        try:
            tree["base"] = read_yaml(base)
        except ConfigError as error:
            raise ConfigError(f"{path}: base: {error}") from None
    config = validate(SweepConfig, apply_overrides(tree, of_base), str(path))
    try:
        return config.checked()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
