"""What `oml-ray check` tells of the table that a config of any verb names."""

from __future__ import annotations

from oml_ray import build
from oml_ray.config import EvaluateConfig, SearchConfig, SweepConfig, nodes
from oml_ray.config.kinds import AnyConfig
from oml_ray.data.audit import audit
from oml_ray.data.queries import read_queries


def audit_of(config: AnyConfig) -> str:
    """Audit the table of a config: that of a sweep's base, the images of a search, or the columns beside embeddings.

    Raises:
        OmlRayError: everything that is wrong with it.
    """
    if isinstance(config, SearchConfig):
        return _of_queries(config)
    if isinstance(config, SweepConfig):
        return audit(build.table(config.training.data, config.run.storage))
    if isinstance(config, EvaluateConfig) and isinstance(config.source, nodes.StoreSource | nodes.EmbeddingsSource):
        # It imports Ray, which no other audit waits for.
        from oml_ray.distributed.sources import embedded_source

        return audit(embedded_source(config).table)
    assert config.data is not None
    return audit(build.table(config.data, config.run.storage))


def _of_queries(config: SearchConfig) -> str:
    table, num_others = read_queries(config.queries, config.data.root)
    lines = [f"{config.queries}: {len(table)} images to search with; they need no labels"]
    if table.boxes is not None:
        lines.append(f"  boxes: {int((table.boxes[:, 0] >= 0).sum())}")
    if num_others:
        lines.append(f"  {num_others} file(s) are passed over: their names are not those of images")
    return "\n".join(lines)
