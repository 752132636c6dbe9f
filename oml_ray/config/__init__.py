"""The config floor: one schema, and loading by path with dotted overrides."""

from oml_ray.config.load import apply_overrides, differing_keys, dump, load, parse_yaml, read_yaml, validate
from oml_ray.config.schema import EmbedConfig, EvaluateConfig, SearchConfig, TrainConfig

__all__ = [
    "EmbedConfig",
    "EvaluateConfig",
    "SearchConfig",
    "TrainConfig",
    "apply_overrides",
    "differing_keys",
    "dump",
    "load",
    "parse_yaml",
    "read_yaml",
    "validate",
]
