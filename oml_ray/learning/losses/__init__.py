"""Criteria: one loss a file."""
