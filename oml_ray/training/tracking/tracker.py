"""What a tracker is told of a run, and the id under which trackers know it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from oml_ray.errors import OmlRayError, StorageError, reason_of
from oml_ray.training.run_directory import RunDirectory

IDENTITY = "tracking_id"

Ending = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(Protocol):
    """Records a run elsewhere; a run that is continued continues its record.

    A place that is down does not end a training: only `finish` insists.
    """

    def points(self, values: Mapping[str, float], step: int, *, again: bool = False) -> None:
        """Take one more point of some curves; must return at once.

        Args:
            values: by name, such as train/loss; all names of a call begin alike.
            step: the global step.
            again: an earlier process may have told it.
        """

    def settle(self) -> None:
        """Have what was taken outlive this process, as far as can be done in a few seconds."""

    def close(self) -> None:
        """Record that nothing more comes from this process."""

    def end(self, how: Ending) -> None:
        """Record how the run ended, as far as that can be done."""

    def finish(self, metrics: Mapping[str, float], texts: Mapping[str, str], checkpoint: Path) -> None:
        """Record the results of a run that is finished.

        Args:
            metrics: by name, such as evaluation/cmc.1.
            texts: of files, by name.
            checkpoint: folder of the best.

        Raises:
            StorageError: they, or earlier points, cannot be recorded.
        """


def identity(run: RunDirectory) -> str:
    """The id under which trackers know the run; drawn when it is first asked for."""
    known = run.read_text(IDENTITY)
    if known is None:
        known = uuid.uuid4().hex[:16]
        run.write_text(known, IDENTITY)
    return known


@contextmanager
def asking(place: str, hint: str = "") -> Iterator[None]:
    """Turn what a tracker's library raises in the body of a `with` into the user's error.

    Args:
        place: who is asked.
        hint: what may mend it.

    Raises:
        StorageError: names the place and the reason.
    """
    try:
        yield
    except OmlRayError:
        raise
    except Exception as error:  # of the library, of requests, of SQLAlchemy, of an artifact store
        raise StorageError(
            f"tracking: {place} does not take the records of the run: {reason_of(error)}. Mend that{hint}, or "
            "go on without it (tracking: []); the same command continues the run."
        ) from None


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a config by dotted keys.

    Example:
        >>> flat({"seed": 1, "run": {"name": "a"}, "rerank": []})
        {'seed': 1, 'run.name': 'a', 'rerank': []}
    """
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        key: value for name, child in tree.items() for key, value in flat(child, f"{prefix}.{name}".lstrip(".")).items()
    }
