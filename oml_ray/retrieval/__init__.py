"""The retrieval floor: neighbors, exact search, metrics and the report."""
