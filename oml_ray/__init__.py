"""Distributed metric learning on Ray: train extractors, embed tables, search galleries, judge by retrieval."""

__version__ = "0.1.0"
