"""Private parts of Ray that have no public way, each with the version that it was seen in."""

from __future__ import annotations

from contextlib import suppress

from oml_ray.distributed.runtime.failures import TRIES, actor_options


def bound_data_actors() -> None:
    """Have Ray Data's actor that knows where others are die for good, as ours do.

    Ray 2.60 waits for its answer in the loop that schedules a dataset, and starts it again without end: where memory is
    short and Ray's memory monitor ends it each time, the dataset never ends.
    """
    with suppress(ImportError, AttributeError):
        from ray.data._internal.execution.node_trackers.actor_location import ActorLocationTracker

        ActorLocationTracker._default_options.update(actor_options(TRIES))  # type: ignore[attr-defined]
