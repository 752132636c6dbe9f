"""Elastic training: Ray Train takes every CPU that it finds for workers, so what decodes is set aside first."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import ray
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

RENEWED_S, EXPIRES_S = 60.0, 180.0


@contextmanager
def set_aside(name: str, bundles: Sequence[Mapping[str, float]]) -> Iterator[None]:
    """Have Ray's coordinator of resources keep some for others than training workers, during the body of a `with`.

    Ray Train (2.60) counts as room for elastic workers what this coordinator reserves for it; of those that ask with
    the same priority, the coordinator serves the first. On clusters that grow, this also asks for the nodes.

    Args:
        name: of the request.
        bundles: resources that are each on one node; Ray 2.60 does not heed labels here.
    """
    coordinator = get_or_create_autoscaling_coordinator()  # type: ignore[no-untyped-call]
    stopped = threading.Event()

    def ask() -> None:
        ray.get(
            coordinator.request_resources.remote(
                requester_id=name,
                resources=[dict(bundle) for bundle in bundles],
                expire_after_s=EXPIRES_S,
                priority=ResourceRequestPriority.HIGH,
            )
        )

    def renew() -> None:
        while not stopped.wait(RENEWED_S):
            ask()

    ask()
    thread = threading.Thread(target=renew, daemon=True, name="oml_ray-set-aside")
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        coordinator.cancel_request.remote(name)
