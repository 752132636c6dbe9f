"""From checkpoints and stores to files that other programs read: `oml-ray export`.

Files appear whole and checked, or not at all; what is there already is replaced only where that is asked for: any file,
but of folders only an exported model's.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from oml_ray.build.learning import trained_extractor, weights_of
from oml_ray.build.retrieval import index_settings
from oml_ray.build.stores import open_store
from oml_ray.build.training import versions
from oml_ray.config import TrainConfig, apply_overrides, nodes, validate
from oml_ray.data.filesystem import is_uri
from oml_ray.errors import ConfigError, StorageError, reason_of
from oml_ray.learning import zoo
from oml_ray.learning.export import onnx_file, timm_folder
from oml_ray.learning.export.program import SUFFIX, write_program
from oml_ray.learning.extractors import Extractor
from oml_ray.retrieval.index_export import NEAREST, export_index
from oml_ray.retrieval.user_embeddings import UserEmbeddings
from oml_ray.training.run_directory import check_writable

Writer = Callable[..., float]

WRITERS: dict[str, Writer] = {
    "onnx": onnx_file.write_onnx,
    "torch": write_program,
    "timm": timm_folder.write_timm,
}
TIMM_FILES = {timm_folder.CONFIG, timm_folder.WEIGHTS, timm_folder.FACTS}
OF_GALLERIES = ("shards", "rescore_factor", "index")  # keys of a gallery that an exported index has no use for


def model(form: str, checkpoint: str, out: str, *, force: bool = False) -> str:
    """Export the extractor of a checkpoint.

    Args:
        form: a key of `WRITERS`.
        checkpoint: path or URI of a checkpoint, or of a run's `best` or `last`.
        out: local file to write; a folder for timm.
        force: replace what was exported there before.

    Returns:
        What was written, in one line.

    Raises:
        OmlRayError: all that can be wrong with either.
    """
    target = _target(out, force, is_folder=form == "timm")
    if form == "torch" and target.suffix != SUFFIX:
        raise StorageError(f"{out}: torch.export.load wants a name that ends with {SUFFIX}: choose another one.")
    if form == "onnx":
        onnx_file.check_packages()
    extractor, config = trained_extractor(checkpoint)
    write, size = WRITERS[form], config.transforms.eval.size
    if form == "timm":
        write = partial(write, preparation=in_words_of_timm(config.transforms.eval))
    with _whole(target) as staged:
        difference = write(extractor, staged, size=size, facts=_facts(form, extractor, config))
    return (
        f"{out}: images (n, 3, {size}, {size}) -> embeddings (n, {extractor.embedding_dim}), within {difference:.1e} "
        "of torch on random images"
    )


def index(store: str, out: str, backend: Mapping[str, Any], overrides: Sequence[str], *, force: bool = False) -> str:
    """Export an index of an embeddings store, and its facts as `OUT.json`.

    Args:
        store: path or URI of a whole store, or of its run.
        out: local file to write.
        backend: the keys of `evaluation.gallery` that choose a library.
        overrides: further ones, as `key=value`.
        force: replace what was exported there before.

    Returns:
        What was written, in one line.

    Raises:
        OmlRayError: all that can be wrong with either.
    """
    node = _gallery(backend, overrides)
    target = _target(out, force)
    _target(f"{out}.json", force)
    opened = open_store(store)
    manifest = opened.whole()
    embeddings = UserEmbeddings(opened.filesystem, opened.path)
    settings = index_settings(node, use_gpu=False)
    settings.check(embeddings.dimension)
    check_writable(target)
    gallery = embeddings.rows(np.sort(embeddings.ids()), name=opened.path)
    tried = export_index(
        settings,
        gallery,
        target,
        distance=node.distance,
        block_rows=node.block_rows,
        facts={
            "ids": "rows of the table, from 0",
            **{name: getattr(manifest, name) for name in ("table", "split", "weights", "transform")},
            "versions": versions(),
        },
    )
    return (
        f"{out}: {len(gallery)} rows, ids of the table, {gallery.dim} dimensions, {node.distance}; {tried.found} of "
        f"{tried.rows} rows tried are among the {NEAREST} nearest of their own embeddings"
    )


def _facts(form: str, extractor: Extractor, config: TrainConfig) -> dict[str, Any]:
    """What an exported model says of itself."""
    node, size = config.extractor, config.transforms.eval.size
    assert node is not None
    mean, std = ((buffer.flatten() / 255).tolist() for buffer in (extractor.mean, extractor.std))
    pixels, embeddings = f"(n, 3, {size}, {size})", f"(n, {extractor.embedding_dim})"
    normalised = {"mean": [round(value, 6) for value in mean], "std": [round(value, 6) for value in std]}
    if form == "timm":
        tensors = {"input": f"float32 {pixels}, RGB in [0, 1], normalised by mean and std", "output": embeddings}
        tensors["after"] = "divide each embedding by its norm" if extractor.normalize else "nothing"
    else:
        tensors = {
            "input": f"images: uint8 {pixels}, RGB; normalised by mean and std inside",
            "output": f"embeddings: float32 {embeddings}" + (" of unit norm" if extractor.normalize else ""),
        }
    return {
        "network": zoo.find(node.entry).model if isinstance(node, nodes.ZooExtractor) else node.model,
        **tensors,
        **normalised,
        "size": size,
        "transform": config.transforms.eval.model_dump(),
        "weights": weights_of(extractor),
        "versions": versions(),
    }


def in_words_of_timm(transform: nodes.EvalTransform) -> dict[str, Any]:
    """Say how images are prepared so that timm's own transforms do the same."""
    if isinstance(transform, nodes.ResizeCrop):
        # timm rounds size / crop_pct down: never to a pixel less than it should be.
        share = math.nextafter(transform.size / transform.resize, 0.0)
        return {"interpolation": transform.interpolation, "crop_pct": share, "crop_mode": "center"}
    return {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}


def _gallery(backend: Mapping[str, Any], overrides: Sequence[str]) -> nodes.FaissGallery | nodes.HnswlibGallery:
    tree = apply_overrides(backend, overrides)
    for key in OF_GALLERIES:
        if key in tree:
            raise ConfigError(f"oml-ray export index: {key} belongs to a gallery of a run; leave it out.")
    schema: type[nodes.FaissGallery | nodes.HnswlibGallery] = nodes.HnswlibGallery
    if backend["backend"] == "faiss":
        schema = nodes.FaissGallery
    return validate(schema, tree, "oml-ray export index")


def _target(out: str, force: bool, *, is_folder: bool = False) -> Path:
    """The local place to write to, where nothing is that must stay."""
    if is_uri(out):
        raise StorageError(f"{out}: exports are written to local paths; copy the file afterwards.")
    target = Path(out).expanduser().absolute()
    if not target.exists() and not target.is_symlink():
        return target
    if is_folder and target.is_dir():
        found = {path.name for path in target.iterdir()}
        if not found or (force and found == TIMM_FILES):
            return target
        more = f"{target} holds other files than an exported model: choose another place."
        raise StorageError(f"{target} is there already: --force replaces it." if found == TIMM_FILES else more)
    if is_folder or target.is_dir():
        raise StorageError(f"{target} is a {'file' if is_folder else 'folder'}: choose another place.")
    if not force:
        raise StorageError(f"{target} is there already: --force replaces it.")
    return target


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A place to write to, which becomes `target` after the body; nothing stays where it fails."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
            staged = Path(folder, target.name)
            yield staged
            old = Path(folder, "old")
            if target.is_dir():
                target.rename(old)
            try:
                staged.replace(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {reason_of(error)}.") from None
