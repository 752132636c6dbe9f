"""Trackers: where the records of a run go beside its own directory, so that runs can be compared."""

from oml_ray.training.tracking.tracker import Ending, Tracker

__all__ = ["Ending", "Tracker"]
