"""Suites of jobs/benchmark.py: each returns figures, every one a ratio of two things alternated in one run."""
