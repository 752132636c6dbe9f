"""Coverage-guided fuzzing of what reads other people's files, for as long as you like:

    pip install atheris
    PYTHONPATH=tests python tests/campaign/fuzz_readers.py config -max_total_time=300

The options are libFuzzer's. The campaigns beside this file need no atheris and check more; this one finds its way into
the branches of the parsers that are written in Python (YAML, our own, Pillow's). What it finds belongs there as an
`@example`.
"""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from campaign_checks import check_message

FOLDER = Path(tempfile.mkdtemp(prefix="oml_ray-fuzz-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
Target = Callable[[Path], Any]


def targets() -> dict[str, tuple[str, Target, list[bytes]]]:
    """Name -> suffix of the file, what reads it, and files to begin with."""
    import pyarrow as pa
    import pyarrow.fs
    import torch
    from campaign import test_config, test_images, test_stores, test_table
    from safetensors.torch import save

    from oml_ray.config import TrainConfig, load
    from oml_ray.data.image_decoding import decode
    from oml_ray.data.table import read_table
    from oml_ray.learning.weights import read_weights
    from oml_ray.retrieval.user_embeddings import UserEmbeddings
    from oml_ray.training.checkpoint import META, read_meta

    def meta(path: Path) -> None:
        (path.parent / META).write_bytes(path.read_bytes())
        read_meta(path.parent)

    local = pa.fs.LocalFileSystem()
    a_meta = b'{"format": 1, "position": {"epoch": 1, "step": 2, "global_step": 3}, "best": 0.5, "files": {"a": "b"}}'
    return {
        "config": (".yaml", lambda path: load(TrainConfig, path), [text for _, text in test_config.TEXTS]),
        "csv": (".csv", read_table, [test_table.CSV]),
        "parquet": (".parquet", read_table, test_table.PARQUETS),
        "image": (
            "",
            lambda path: decode(path.read_bytes(), str(path), None, 10_000),
            list(test_images.FILES.values()),
        ),
        "weights": (".safetensors", read_weights, [save({"w": torch.ones(2, 3), "n": torch.tensor(1)})]),
        "npy": (".npy", lambda path: list(UserEmbeddings(local, str(path)).blocks()), [test_stores.NPY]),
        "meta": (".meta", meta, [a_meta]),
    }


def run(suffix: str, read: Target, data: bytes) -> None:
    """One input: read, or refused by a message; anything else is a finding."""
    from oml_ray.errors import OmlRayError

    path = FOLDER / f"input{suffix}"
    path.write_bytes(data)
    try:
        read(path)
    except OmlRayError as error:
        check_message(str(error), str(FOLDER))


def main() -> None:
    """Fuzz the target that the first argument names."""
    try:
        import atheris
    except ImportError:
        sys.exit("fuzz_readers: atheris is not installed (pip install atheris): nothing is fuzzed.")
    with atheris.instrument_imports(include=["oml_ray", "yaml", "PIL", "safetensors"]):
        suffix, read, seeds = targets()[sys.argv.pop(1)]
    warnings.simplefilter("ignore")
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([*sys.argv, str(corpus)], lambda data: run(suffix, read, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
