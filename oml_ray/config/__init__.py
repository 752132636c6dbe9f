"""The config floor: one schema, and loading by path with dotted overrides."""

from oml_ray.config.kinds import AnyConfig, load_any, unused_keys
from oml_ray.config.load import apply_overrides, differing_keys, dump, load, read_yaml, stored, validate
from oml_ray.config.plain_yaml import parse_yaml
from oml_ray.config.schema import EmbedConfig, EvaluateConfig, SearchConfig, TrainConfig
from oml_ray.config.sweep import SweepConfig, load_sweep

__all__ = [
    "AnyConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "SearchConfig",
    "SweepConfig",
    "TrainConfig",
    "apply_overrides",
    "differing_keys",
    "dump",
    "load",
    "load_any",
    "load_sweep",
    "parse_yaml",
    "read_yaml",
    "stored",
    "unused_keys",
    "validate",
]
