"""Extractors as files that need no oml_ray: each is read back and compared with torch before it counts as written."""
