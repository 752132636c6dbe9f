"""The report of a run for people: `metrics.json` and a few pictures in, one self-contained HTML page out."""

from oml_ray.retrieval.report.content import Picture, QueryRow, Report, RerankedStage
from oml_ray.retrieval.report.page import render, write_report

__all__ = ["Picture", "QueryRow", "Report", "RerankedStage", "render", "write_report"]
