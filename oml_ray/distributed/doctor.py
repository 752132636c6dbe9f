"""The data set doctor: a table is audited with its images and its embeddings; lines and a page come out.

Nothing of it needs Ray: images are decoded by processes of this machine, embeddings are searched in this one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from oml_ray import build
from oml_ray.config import AnyConfig, EmbedConfig, EvaluateConfig, SearchConfig, SweepConfig, TrainConfig, dump
from oml_ray.data.audit import audit
from oml_ray.data.columns import Mask
from oml_ray.data.doctor import Diagnosis, decoding_notes, diagnose, examine, label_overlap, told
from oml_ray.data.doctor.diagnosis import named
from oml_ray.data.doctor.measures import QUANTILES
from oml_ray.data.filesystem import is_uri
from oml_ray.data.images import ImageReader
from oml_ray.data.table import Table
from oml_ray.distributed import doctor_findings
from oml_ray.distributed.progress import counting, say
from oml_ray.errors import ConfigError, EmbeddingError, StorageError
from oml_ray.redaction import redact
from oml_ray.retrieval.report.doctor_page import DoctorPage, render_doctor
from oml_ray.retrieval.rows import Rows
from oml_ray.retrieval.store import Store
from oml_ray.retrieval.suspects import NUM_VOTES, Suspects, near_copies, wrong_labels
from oml_ray.retrieval.user_embeddings import UserEmbeddings
from oml_ray.storage.atomic_write import write_atomically
from oml_ray.training.run_directory import check_writable

NEAR_DISTANCE = 0.05  # cosine: of most extractors, other pictures are farther; what copies are depends on them


@dataclass(frozen=True, eq=False)
class Embedded:
    """What the embeddings of a table tell.

    Attributes:
        source: where they lie.
        num_rows: how many rows have one.
        copies: validation rows with a near copy in train; None where a split is not embedded.
        wrong: rows whose label their neighbors contradict.
    """

    source: str
    num_rows: int
    copies: Suspects | None
    wrong: Suspects


def check(config: AnyConfig, *, images: bool, store: str | None, page: str | None) -> None:
    """Audit the table of a config; what is found is told, and is no error.

    Args:
        config: names the table.
        images: whether every image is decoded and judged.
        store: embeddings of the same table; None: none.
        page: local path of an HTML page to write; None: none.

    Raises:
        OmlRayError: the table, the store or the path cannot be used.
    """
    if isinstance(config, SweepConfig):
        config = config.training
    if isinstance(config, SearchConfig) or config.data is None:
        raise ConfigError("--images, --store and --page need a table with labels: this config has no data.table.")
    if page is not None and not images and store is None:
        raise ConfigError("--page: there are no pictures to show without --images or --store: give one of them.")
    target = None if page is None else _target(page)
    table = build.table(config.data, config.run.storage)
    opened = None if store is None else _opened(store, table)
    reader = build.image_reader(config.data, table)
    say(audit(table))
    diagnosis = embedded = None
    if images:
        with counting("decoding", len(table), "images") as done:
            diagnosis = diagnose(table, examine(reader, processes=_num_cpus(), advance=done))
        say(told(diagnosis))
    if opened is not None:
        embedded = _embedded(opened, table)
        say(_told(embedded))
    if target is not None:
        write_atomically(target, redact(render_doctor(_page(config, reader, diagnosis, embedded))).encode())
        say(f"page: {target}")


def _target(page: str) -> Path:
    """Where the page goes: found to be wrong before an hour of decoding, not after it."""
    if is_uri(page):
        raise ConfigError(f"--page: found {page!r}; the page is written to a local path: give one.")
    target = Path(page).expanduser().absolute()
    if target.is_dir():
        raise ConfigError(f"--page: {target} is a folder: name a file in it, such as {target / 'doctor.html'}.")
    try:
        check_writable(target)
    except StorageError as error:
        raise StorageError(f"--page: {error}") from None
    return target


def _opened(uri: str, table: Table) -> Store:
    """A whole store of this table.

    Raises:
        EmbeddingError: it is not whole. ConfigError: it was made from another table.
    """
    store = build.open_store(uri)
    if store.whole().table != table.fingerprint:
        raise ConfigError(
            f"--store: {store.path} was not made from the table {table.source} as it is now: give a store that was, or "
            "run `oml-ray embed` again."
        )
    return store


def _embedded(store: Store, table: Table) -> Embedded:
    """Search what a store holds."""
    embeddings = UserEmbeddings(store.filesystem, store.path)
    ids = np.sort(embeddings.ids())
    if ids[-1] >= len(table):
        raise EmbeddingError(
            f"--store: {store.path} holds row {ids[-1]}, but the table {table.source} has {len(table)} rows: the store "
            "is damaged. Run `oml-ray embed` again under another run.name."
        )
    rows = embeddings.rows(ids, table.sequences[ids] if (table.sequences >= 0).any() else None, "store")
    is_train, copies = table.is_train[ids], None
    if is_train.any() and not is_train.all():
        validation, train = _some(rows, ~is_train), _some(rows, is_train)
        with counting("searching copies", len(validation), "rows") as done:
            copies = near_copies(validation, train, NEAR_DISTANCE, advance=done)
    with counting("searching neighbors", len(rows), "rows") as done:
        wrong = wrong_labels(rows, table.labels[ids], advance=done)
    return Embedded(store.path, len(rows), copies, wrong)


def _some(rows: Rows, mask: Mask) -> Rows:
    """Some of the rows, without their sequences: shots of one session are copies too."""
    places = np.flatnonzero(mask) if rows.places is None else rows.places[mask]
    return replace(rows, ids=rows.ids[mask], sequences=None, places=places)


def _told(embedded: Embedded) -> str:
    lines = [f"embeddings: {embedded.num_rows} rows of {embedded.source}"]
    if embedded.copies is None:
        lines.append(f"  {doctor_findings.ONE_SPLIT}")
    elif len(embedded.copies.ids):
        what = f"validation rows have a near copy (cosine distance at most {NEAR_DISTANCE}) in train"
        lines.append(f"  warning: {named(embedded.copies.ids, what)}")
    if len(embedded.wrong.ids):
        what = f"rows have {NUM_VOTES} nearest neighbors of one other label"
        lines.append(f"  warning: {named(embedded.wrong.ids, what)}")
    return "\n".join(lines)


def _page(
    config: TrainConfig | EmbedConfig | EvaluateConfig,
    reader: ImageReader,
    diagnosis: Diagnosis | None,
    embedded: Embedded | None,
) -> DoctorPage:
    table, findings, notes = reader.table, [], list[str]()
    if diagnosis is None:
        notes.append("Images were not decoded: --images looks for copies, odd sizes and boxes too.")
    else:
        findings += doctor_findings.of_images(reader, diagnosis)
        notes += decoding_notes(diagnosis)
    if embedded is None:
        notes.append("There were no embeddings: --store looks for wrong labels and for more copies too.")
    else:
        findings += doctor_findings.of_embeddings(reader, embedded.copies, embedded.wrong, NEAR_DISTANCE)
        if embedded.copies is None:
            notes.append(doctor_findings.ONE_SPLIT)
    overlap = label_overlap(table)
    findings.append(doctor_findings.of_labels(overlap))
    return DoctorPage(
        title=f"Check of {table.source}",
        table=audit(table).splitlines(),
        findings=findings,
        notes=notes,
        bad_images=[] if diagnosis is None else [(table.uri(row), why) for row, why in diagnosis.reasons.items()],
        num_bad_images=0 if diagnosis is None else len(diagnosis.unreadable),
        labels=[(label, train, validation) for label, train, validation in overlap.tolist()],
        measures=[] if diagnosis is None else doctor_findings.measured(diagnosis),
        quantiles=QUANTILES,
        versions=build.versions(),
        config=dump(config),
    )


def _num_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
