"""Embedding with the job of oml_ray: through Ray, into a store."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmarks.peer_scripts.embedding import run
from jobs.benchmarks.peer_scripts.measured import Checked, options
from oml_ray.config import EmbedConfig, validate
from oml_ray.distributed import embed as job
from oml_ray.distributed import runs
from oml_ray.distributed.runtime.failures import unwrapped
from oml_ray.distributed.session import session
from oml_ray.retrieval.store import embeddings_of
from oml_ray.training.run_directory import RunDirectory

ROWS_PER_PART = 256


def main() -> None:
    """Embed in a session that is there, with one actor of all threads."""
    given = options()
    with tempfile.TemporaryDirectory(prefix="oml_ray-benchmark-") as folder:
        config = _config(given, folder)
        images = job.images_of(config.source, config.data, folder, config.seed)
        node = config.evaluation.embed

        def embed(num_images: int) -> Checked:
            some = replace(images, rows=np.resize(images.rows, num_images))
            store, manifest = job.fill_store(RunDirectory(folder, "benchmark"), some, node, config.scaling)
            embeddings = np.concatenate([embeddings_of(part) for part in store.parts(manifest, ["embedding"])])
            shutil.rmtree(Path(folder) / "benchmark")
            return {"mean": float(embeddings.mean()), "spread": float(embeddings.std(axis=0).mean())}

        with session(job.needs(node, config.scaling)), unwrapped():
            run(embed)


def _config(given: dict[str, Any], folder: str) -> EmbedConfig:
    actor = {
        "actors": 1,
        "cpus_per_actor": int(os.environ["OMP_NUM_THREADS"]),
        "batch_size": given["batch_size"],
        "rows_per_part": ROWS_PER_PART,
    }
    tree = {
        "seed": given["seed"],
        "run": {"name": "benchmark", "storage": folder},
        "data": {"table": given["table"], "root": given["root"], "split": "all"},
        "source": {"extractor": {"name": "timm", "model": given["model"]}, "size": given["size"]},
        "evaluation": {"embed": actor},
    }
    return runs.resolved(validate(EmbedConfig, tree, "benchmark"))


if __name__ == "__main__":
    main()
