"""The report of a run for people: `metrics.json` and a few pictures in, one self-contained HTML page out."""

from oml_ray.retrieval.report.content import Picture, QueryRow, Report
from oml_ray.retrieval.report.page import render, write_report

__all__ = ["Picture", "QueryRow", "Report", "render", "write_report"]
