"""The learning floor: extractors, miners and criteria over the global batch."""
