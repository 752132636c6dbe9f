"""Draws that learn from earlier trials, by Optuna's TPE sampler (Bergstra et al. 2011, "Algorithms for Hyper-Parameter
Optimization").

The study is made anew for every draw, from the record of the trials: no state is kept, so none is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from oml_ray.config.space import Choice, LogUniform, RandInt, Space, Uniform, Values
from oml_ray.distributed.trials import Trial
from oml_ray.errors import ConfigError


def check_installed() -> None:
    """Refuse a search by Optuna where it is not installed.

    Raises:
        ConfigError: it is not.
    """
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ConfigError(
            "tune.search: optuna needs the package optuna, which is not installed: pip install 'oml_ray[optuna]', or "
            "use search: random."
        ) from None


def suggest(space: Space, trials: Sequence[Trial], mode: str, seed: int) -> Values:
    """The values of the next trial: a function of the arguments alone.

    Args:
        space: without grid entries.
        trials: all earlier ones; those still running count as poor, so that their neighborhood is not drawn again.
        mode: whether the largest ("max") or the smallest ("min") value is best.
        seed: of all draws.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {entry: _distribution(domain) for entry, domain in space.items()}
    drawn_seed = int(np.random.SeedSequence([seed, len(trials)]).generate_state(1)[0])
    sampler = optuna.samplers.TPESampler(seed=drawn_seed, constant_liar=True)
    study = optuna.create_study(direction="maximize" if mode == "max" else "minimize", sampler=sampler)
    for trial in trials:
        best = trial.best(mode)
        state = {
            "running": TrialState.RUNNING,
            "finished": TrialState.COMPLETE if best else TrialState.FAIL,
            "stopped": TrialState.PRUNED,
            "failed": TrialState.FAIL,
        }[trial.state]
        params = {entry: _param(domain, trial.values[entry]) for entry, domain in space.items()}
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=best[1] if best and state == TrialState.COMPLETE else None,
                params=params,
                distributions=distributions,
                intermediate_values=dict(trial.curve),
            )
        )
    params = study.ask(distributions).params
    return {
        entry: domain.choice[params[entry]] if isinstance(domain, Choice) else params[entry]
        for entry, domain in space.items()
    }


def _distribution(domain: Any) -> Any:
    from optuna import distributions

    if isinstance(domain, Choice):  # by position: Optuna's own choices are plain values
        return distributions.CategoricalDistribution(list(range(len(domain.choice))))
    low, high = domain.ends
    if isinstance(domain, RandInt):
        return distributions.IntDistribution(low, high - 1)
    assert isinstance(domain, Uniform | LogUniform)
    return distributions.FloatDistribution(low, high, log=isinstance(domain, LogUniform))


def _param(domain: Any, value: Any) -> Any:
    return domain.choice.index(value) if isinstance(domain, Choice) else value
