"""The table audit: what `oml-ray check` tells of a table that has passed its checks."""

from __future__ import annotations

import numpy as np

from oml_ray.data.table import Table


def audit(table: Table) -> str:
    """Describe a table in a few lines: splits, labels, queries, gallery, groups, and its warnings."""
    lines = [f"{table.source}: {len(table)} instances"]
    for split, ids in (("train", table.train_ids), ("validation", table.validation_ids)):
        counts = np.unique(table.labels[ids], return_counts=True)[1]
        spread = f", {counts.min()} to {counts.max()} instances each" if len(counts) else ""
        lines.append(f"  {split}: {len(ids)} instances of {len(counts)} labels{spread}")
    both = int((table.is_query & table.is_gallery).sum())
    lines.append(f"  queries: {len(table.query_ids)}, gallery: {len(table.gallery_ids)}, both: {both}")
    if table.category_names:
        lines.append(f"  categories: {len(table.category_names)}")
    if (table.sequences >= 0).any():
        lines.append(f"  sequences: {len(np.unique(table.sequences[table.sequences >= 0]))}")
    if table.boxes is not None:
        lines.append(f"  boxes: {int((table.boxes[:, 0] >= 0).sum())}")
    lines += [f"  warning: {warning}" for warning in table.warnings]
    return "\n".join(lines)
