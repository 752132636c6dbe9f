"""Search without labels: query images are embedded and searched in a store; neighbors and a page come out."""

from __future__ import annotations

import io
import json
import os
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from oml_ray import build
from oml_ray.config import SearchConfig, dump, nodes
from oml_ray.config.schema import QueryImages
from oml_ray.data.columns import named_label
from oml_ray.data.filesystem import is_uri, join, read_bytes, resolve
from oml_ray.data.image_decoding import decode
from oml_ray.data.queries import read_queries
from oml_ray.data.table import Table
from oml_ray.data.table_checks import BOX
from oml_ray.distributed import embed, gallery, runs
from oml_ray.distributed.gallery import pool_of
from oml_ray.distributed.progress import counting, say
from oml_ray.distributed.reporting import THUMBNAIL
from oml_ray.distributed.runtime import gallery_resources
from oml_ray.distributed.runtime.failures import unwrapped
from oml_ray.distributed.runtime.resources import Needs
from oml_ray.distributed.search import Embedded
from oml_ray.distributed.session import check_given, session
from oml_ray.distributed.shard import Part
from oml_ray.errors import EmbeddingError, ImageError, StorageError
from oml_ray.retrieval.neighbors_file import neighbors_writer
from oml_ray.retrieval.report.search_page import SearchItem, SearchPage, SearchRow, render_search
from oml_ray.retrieval.store import Manifest, Store
from oml_ray.retrieval.user_embeddings import UserEmbeddings
from oml_ray.storage.atomic_write import write_atomically
from oml_ray.training.run_directory import RunDirectory


@dataclass(frozen=True, eq=False)
class Gallery:
    """A whole store that is searched."""

    store: Store
    manifest: Manifest
    embeddings: UserEmbeddings

    def part(self) -> Part:
        """All its instances."""
        ids = np.sort(self.embeddings.ids())
        return Part(self.embeddings, ids, np.zeros_like(ids), None)

    def images(self, ids: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Path, box and label of some instances, by id."""
        wanted = np.unique(np.fromiter(ids, np.int64))
        columns = [name for name in ("id", "path", "label", "label_name", *BOX) if name in self.embeddings.columns]
        parts = self.store.parts(self.manifest, columns, wanted)
        rows = (row for part in parts for row in part.filter(np.isin(part["id"], wanted)).to_pylist())
        return {row["id"]: row for row in rows}


@dataclass(frozen=True, eq=False)
class Shown:
    """A query of the page: its position, its nearest neighbors, and their distances."""

    query: int
    ids: list[int]
    distances: list[float]


def find(config: SearchConfig) -> None:
    """Search images in a store; write neighbors and a page into the run.

    Raises:
        OmlRayError: the user's error, wherever it came up.
    """
    config, images, searched, notes = _prepare(config)
    if runs.is_finished(config):
        return
    run = runs.open_run(config)
    timings: dict[str, float] = {}
    for note in notes:
        say(note)
    with session(_needs(config)), unwrapped():
        start = time.perf_counter()
        store, manifest = embed.fill_store(run, images, config.evaluation.embed, config.scaling)
        bad = store.bad_images(manifest)
        if len(bad) == len(images.rows):
            raise ImageError(f"None of the {len(bad)} images of {images.table.source} can be read; first: {bad[0]}")
        queries = Embedded(images.table, UserEmbeddings(store.filesystem, store.path), bad)
        timings["search/embed"] = time.perf_counter() - start
        start = time.perf_counter()
        counts, shown = _search(run, config, queries, searched.part())
        timings["search/search"] = time.perf_counter() - start
    start = time.perf_counter()
    _write_queries(run, images.table)
    rows = _rows(config, images.table, searched, shown)
    if any(item.image is None and not item.problem for row in rows for item in row.neighbors):
        notes.append("The store's image paths are relative: set gallery_root, where they start, to see its pictures.")
    timings["search/pictures"] = time.perf_counter() - start
    document = {
        "counts": {**counts, "bad_images": len(bad)},
        "timings": {name: round(value, 3) for name, value in timings.items()},
        "versions": build.versions(),
    }
    page = SearchPage(
        title=run.name,
        rows=rows,
        num_queries=counts["queries"],
        k=min(config.k, counts["gallery"]),
        num_shown=config.evaluation.pictures.neighbors,
        metrics=document,
        config=dump(config),
        notes=notes,
        bad_images=[(images.table.uri(row), reason) for row, reason in bad.items()],
    )
    run.write_text(render_search(page), runs.REPORT)
    # Last: its presence says that the run is finished.
    run.write_text(json.dumps(document, indent=1), runs.METRICS)
    say(f"{counts['queries']} queries, {counts['gallery']} gallery items"
        + (f", {len(bad)} bad images left out" if bad else ""))  # fmt: skip
    say(f"neighbors: {join(run.uri, runs.NEIGHBORS)}; the queries' paths: {join(run.uri, runs.QUERIES)}")
    say(f"report: {join(run.uri, runs.REPORT)}")


def dry_run(config: SearchConfig) -> None:
    """Check everything that can be checked without computing, and print the resolved config."""
    config, *_ = _prepare(config)
    check_given(_needs(config))
    runs.say_checked(config)


def _needs(config: SearchConfig) -> Needs:
    evaluation, scaling = config.evaluation, config.scaling
    return embed.needs(evaluation.embed, scaling) | gallery_resources.needs(evaluation.gallery, scaling)


def _prepare(config: SearchConfig) -> tuple[SearchConfig, embed.Images, Gallery, list[str]]:
    """Check all that can be checked before anything starts; return what that made, and what is to be said."""
    config = runs.resolved(config)
    runs.check_apart(config)
    runs.check_name(config)
    table, num_others = read_queries(config.queries, config.data.root)
    extractor, transform = embed.extractor_of(config.source, config.seed)
    data = nodes.SplitData(table=config.queries, split="all", **config.data.model_dump())
    images = embed.Images(data, table, np.arange(len(table)), extractor, transform)
    searched = _gallery(config, images)
    gallery.check(config.evaluation.gallery, searched.manifest.embedding_dim)
    gallery_resources.say_indexes_on_cpu(config.evaluation, config.scaling)
    notes = []
    if num_others:
        notes.append(f"{num_others} file(s) in {config.queries} are passed over: their names are not those of images.")
    if searched.manifest.decoding is None:
        notes.append(
            f"The store {searched.store.path} was made by a version that ignored EXIF orientation and transparency: if "
            "images of the gallery have either, or more than 8 bits, embed it again."
        )
    if config.k > searched.embeddings.num_rows:
        found = searched.embeddings.num_rows
        notes.append(f"The gallery has {found} items: each query has {found} neighbors at most, not k = {config.k}.")
    return config, images, searched, notes


def _gallery(config: SearchConfig, images: embed.Images) -> Gallery:
    """Open the store that is searched.

    Raises:
        EmbeddingError: it is not whole, or was made by something else than what embeds the queries.
    """
    store = build.open_store(config.gallery)
    manifest = store.whole()
    here = {"weights": build.weights_of(images.extractor), "transform": images.transform.model_dump()}
    there = {"weights": manifest.weights, "transform": manifest.transform}
    if differing := [f"{key} ({there[key]} there, {here[key]} in source)" for key in here if here[key] != there[key]]:
        raise EmbeddingError(
            f"gallery: the store {store.path} was made by something else than source: {'; '.join(differing)}. Give the "
            "source that it was made by, or embed the gallery with this one."
        )
    decoding = embed.decoding_of(images.data)
    if manifest.decoding not in (None, decoding):
        raise EmbeddingError(
            f"gallery: the images of the store {store.path} were decoded by {manifest.decoding}, the queries would be "
            f"by {decoding}: set data.exif and data.background as the store has them, or embed the gallery again."
        )
    return Gallery(store, manifest, UserEmbeddings(store.filesystem, store.path))


def _search(
    run: RunDirectory, config: SearchConfig, queries: Embedded, part: Part
) -> tuple[dict[str, int], list[Shown]]:
    """Write the neighbors of all queries; return counts, and what the page shows."""
    node, pictures = config.evaluation.gallery, config.evaluation.pictures
    k, ids = min(config.k, len(part.ids)), queries.queries()
    # Queries and gallery are numbered apart: with an id of its own, no query excludes a gallery item.
    offset = int(part.ids[-1]) + 1
    blocks = (replace(block, ids=block.ids + offset) for block in queries.blocks(ids, node.block_rows))
    num_neighbors, shown = 0, list[Shown]()
    pool = pool_of(part, node, config.scaling)
    try:
        with (
            neighbors_writer(*resolve(str(run.path(runs.NEIGHBORS))), k) as write,
            counting("searching", len(ids), "queries") as done,
        ):
            for block, found in pool.search(blocks, k):
                write(block.ids - offset, found)
                num_neighbors += int(found.counts.sum())
                for row in range(min(len(found), pictures.queries - len(shown))):
                    places = slice(0, min(int(found.counts[row]), pictures.neighbors))
                    nearest, distances = found.ids[row, places].tolist(), found.distances[row, places].tolist()
                    shown.append(Shown(int(block.ids[row]) - offset, nearest, distances))
                done(len(found))
    finally:
        pool.close()
    run.publish(runs.NEIGHBORS)
    counts = {"queries": len(ids), "gallery": len(part.ids), "neighbors": num_neighbors}
    return {**counts, "second_searches": pool.second_searches}, shown


def _write_queries(run: RunDirectory, table: Table) -> None:
    """Write the path of each query, under the ids that the neighbors' file has."""
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"query_id": np.arange(len(table)), "path": table.paths}), sink)
    write_atomically(run.path(runs.QUERIES), sink.getvalue().to_pybytes())
    run.publish(runs.QUERIES)


def _rows(config: SearchConfig, table: Table, searched: Gallery, shown: list[Shown]) -> list[SearchRow]:
    """Queries and neighbors with their pictures, where these can be found."""
    images = searched.images(row for query in shown for row in query.ids)
    rows = []
    for query in shown:
        box = None if table.boxes is None else table.boxes[query.query].tolist()
        picture, problem = _picture(table.uri(query.query), box, config.data)
        path = table.paths[query.query].as_py()
        neighbors = []
        for row, distance in zip(query.ids, query.distances, strict=True):
            image = images[row]
            uri = _gallery_uri(image["path"], config.gallery_root)
            box = [image[side] for side in BOX] if image.get(BOX[0]) is not None else None
            title = f"id {row}, label {named_label(image['label'], image.get('label_name'))}"
            neighbors.append(SearchItem(title, image["path"], *_picture(uri, box, config.data), distance))
        rows.append(SearchRow(SearchItem(f"query {query.query}", path, picture, problem), neighbors))
    return rows


def _gallery_uri(path: str, root: str | None) -> str | None:
    if is_uri(path) or os.path.isabs(path):
        return path
    return None if root is None else join(root, path)


def _picture(uri: str | None, box: list[int] | None, data: QueryImages) -> tuple[bytes | None, str]:
    """A small JPEG of an image that can be found, and what is wrong with it."""
    if uri is None:
        return None, ""
    buffer = io.BytesIO()
    cut = None if box is None or box[0] < 0 else (box[0], box[1], box[2], box[3])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata in files that decode nevertheless
            image = decode(read_bytes(uri), uri, cut, data.max_pixels, exif=data.exif, background=data.background)
    except (ImageError, StorageError) as error:
        return None, str(error)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue(), ""
