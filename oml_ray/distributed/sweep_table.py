"""How a sweep shows itself while it runs: a live table in a terminal, a line for each start and end elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from oml_ray.config.space import assignments, shown
from oml_ray.distributed.progress import say
from oml_ray.distributed.trials import Record, Trial
from oml_ray.distributed.tuning import Told

MOST_ROWS = 25
STYLES = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red"}


@contextmanager
def showing(record: Record, num_trials: int) -> Iterator[Told]:
    """Show the trials of a record during the body of a `with`; the body calls what it gets when one has changed."""
    console = Console(stderr=True)
    is_live = console.is_terminal
    told: dict[str, str] = {}

    def tell(trial: Trial) -> None:
        if is_live or told.get(trial.name) == trial.state:
            return
        told[trial.name] = trial.state
        say(_line(trial, record))

    # What is printed meanwhile (a warning) goes above the table.
    live = Live(get_renderable=lambda: table(record, num_trials), console=console, refresh_per_second=2)
    with live if is_live else nullcontext():
        yield tell


def _line(trial: Trial, record: Record) -> str:
    if trial.state == "running":
        return f"trial {trial.name} starts: {shown(trial.values)}"
    if trial.state == "failed":
        return f"trial {trial.name} failed: {trial.reason}"
    epochs = trial.curve[-1][0] if trial.curve else 0
    best = trial.best(record.mode)
    scored = (
        f"{record.metric} {best[1]:.4f}" + (f" after {best[0]}" if best[0] != epochs else "") if best else "no metric"
    )
    return f"trial {trial.name} {trial.state} after {epochs} epochs: {scored}"


def table(record: Record, num_trials: int) -> Group:
    """The trials as a table: those that run first, then the best ones."""
    sign = -1 if record.mode == "max" else 1

    def place(trial: Trial) -> tuple[bool, bool, float]:
        best = trial.best(record.mode)
        return trial.state != "running", best is None, sign * best[1] if best else 0.0

    trials = sorted(record.trials, key=place)
    drawn = Table(box=None, pad_edge=False)
    for head in ("trial", "state", *(assignments(trials[0].values) if trials else ())):
        drawn.add_column(head.rpartition(".")[2])
    for head in ("epochs", record.metric, "best"):
        drawn.add_column(head, justify="right")
    for trial in trials[:MOST_ROWS]:
        best = trial.best(record.mode)
        epochs, value = (str(trial.curve[-1][0]), f"{trial.curve[-1][1]:.4f}") if trial.curve else ("", "")
        values = (
            f"{each:.4g}" if isinstance(each, float) else str(each) for each in assignments(trial.values).values()
        )
        state = Text(trial.state, style=STYLES[trial.state])
        drawn.add_row(trial.name, state, *values, epochs, value, f"{best[1]:.4f}" if best else "")
    counts = {state: sum(trial.state == state for trial in record.trials) for state in STYLES}
    waiting = max(0, num_trials - len(record.trials))
    told = [f"{count} {state}" for state, count in {**counts, "to be drawn": waiting}.items() if count]
    more = [f"{len(trials) - MOST_ROWS} more are not shown"] if len(trials) > MOST_ROWS else []
    return Group(drawn, Text(", ".join([*told, *more]), style="dim"))
