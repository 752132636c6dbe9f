"""What Ray Train calls in each of its workers: light to import, so that how the rest is imported is ours."""

from __future__ import annotations

from typing import Any

from oml_ray.distributed.imports import uncollected


def work(payload: dict[str, Any]) -> None:
    """Run the loop; in a restarted worker from the run's last checkpoint on."""
    with uncollected():
        from oml_ray.distributed import worker
    worker.build_loop(payload).train()
