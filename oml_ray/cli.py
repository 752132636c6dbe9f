"""The command line: `oml-ray VERB ...`, one function of the floors below for each verb."""

from __future__ import annotations

import argparse
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn, TextIO, TypeVar

from oml_ray import __version__
from oml_ray.distributed.imports import uncollected
from oml_ray.distributed.runtime.driver_log import driver_log
from oml_ray.errors import OmlRayError, OutOfMemoryError, ProcessDiedError
from oml_ray.redaction import redact

if TYPE_CHECKING:
    from oml_ray.config import AnyConfig, EmbedConfig, EvaluateConfig, SearchConfig, TrainConfig

Schema = TypeVar("Schema", bound="TrainConfig | EmbedConfig | EvaluateConfig | SearchConfig")

UNEXPECTED = 1
USER_ERROR = 2
INTERRUPTED = 130
READER_GONE = 141


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, redact(f"{self.prog}: {message} (see {self.prog} --help)\n"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        Exit status (docs/failure_policy.md): 0; 1 for an unexpected error; 2 for a user's; 130 when interrupted; 141
        when the reader of stdout has gone, as a shell says of a program that SIGPIPE ends.
    """
    parsed = _parser().parse_args(arguments)
    with driver_log() as log:
        try:
            parsed.run(parsed)
            sys.stdout.flush()
        except OmlRayError as error:
            if isinstance(error, ProcessDiedError | OutOfMemoryError):
                log.write_error(error)
                log.write_worker_logs()
            text = f"oml-ray: {error}"
            if log.is_temporary and log.has_text():
                text += f" (messages of libraries: {log.path})"
            print(text, file=sys.stderr)
            return USER_ERROR
        except (KeyboardInterrupt, SystemExit):  # the latter is Ray's answer to SIGTERM, by which jobs are stopped
            print(
                "oml-ray: interrupted; the same command continues an unfinished run, a sweep with --resume.",
                file=sys.stderr,
            )
            return INTERRUPTED
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _is_reader_gone(sys.stdout):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end of Python
                return READER_GONE
            log.write_error(error)
            last = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
            print(f"oml-ray: unexpected error: {last} (traceback: {log.path})", file=sys.stderr)
            return UNEXPECTED
    return 0


def _is_reader_gone(stream: TextIO) -> bool:
    """Return whether a stream is a pipe from which nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return bool(poll.poll(0))  # POLLERR, which is not asked for
    except (OSError, ValueError):
        return False


def job(verb: str) -> NoReturn:
    """Run one verb with this process's arguments: the whole of a script in jobs/."""
    sys.exit(main([verb, *sys.argv[1:]]))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="oml-ray", description="Distributed metric learning on Ray.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", parser_class=_Parser)

    def verb(name: str, text: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    for name, text, run in (
        ("train", "Train, evaluate the best checkpoint and write a report.", _train),
        ("embed", "Embed a table into a Parquet store.", _embed),
        ("evaluate", "Embed, search and measure a table, and write a report.", _evaluate),
        ("sweep", "Train side by side with drawn values of some keys, and report which are best.", _sweep),
        ("search", "Search images in an embeddings store, and write their neighbors and a page.", _search),
    ):
        added = verb(name, text, run)
        _add_config(added)
        added.add_argument("--dry-run", action="store_true", help="check all that can be checked, print the config")
        if name == "sweep":
            added.add_argument("--resume", action="store_true", help="continue a sweep that was interrupted")
    check = verb("check", "Check the table of a config.", _check)
    _add_config(check)
    check.add_argument("--images", action="store_true", help="decode every image: copies, odd sizes, boxes, damage")
    check.add_argument("--store", metavar="DIR", help="embeddings of the table: likely wrong labels, more copies")
    check.add_argument("--page", metavar="OUT.html", help="write what --images and --store find, with pictures")
    figures = verb("figures", "Write the generated data set.", _figures)
    figures.add_argument("directory", metavar="DIR", help="folder to write, as df.csv and images/")
    convert = verb("convert", "Write the table of a data set, from the files that its publisher packs.", _convert)
    convert.add_argument("data_set", metavar="NAME", help="cub, cars, sop, inshop, folder or emoji")
    convert.add_argument("source", metavar="SRC", help="its folder (emoji: where packages are or go, and images go)")
    convert.add_argument("target", metavar="OUT.csv", help="the table to write; its paths are relative to SRC")
    convert.add_argument("--protocol", help="cub, cars: disjoint (default) or oml; inshop: official (default) or boxes")
    convert.add_argument("--validation-share", type=float, metavar="X", help="folder: of the labels; 0.5 by default")
    convert.add_argument(
        "--seed", type=int, help="folder: draw the labels of validation; else they are the last by name"
    )
    verb("zoo", "List the pretrained extractors that configs can name.", _zoo)
    _add_export(verb("export", "Write a model, or an index of embeddings, for other programs.", _export_model))
    return parser


def _add_export(parser: argparse.ArgumentParser) -> None:
    forms = parser.add_subparsers(title="forms", required=True, metavar="FORM", parser_class=_Parser)

    def form(name: str, text: str, source: tuple[str, str], out: str) -> argparse.ArgumentParser:
        added = forms.add_parser(name, help=text, description=text)
        added.set_defaults(form=name)
        added.add_argument("source", metavar=source[0], help=source[1])
        added.add_argument("out", metavar=out, help="local path to write")
        added.add_argument("--force", action="store_true", help="replace the file or exported folder there")
        return added

    checkpoint = ("CHECKPOINT", "folder or URI of a checkpoint, or a run's checkpoints/best")
    form("onnx", "Write an extractor as an ONNX file, checked with onnxruntime.", checkpoint, "OUT.onnx")
    form("torch", "Write an extractor as a program of torch.export, for plain torch.", checkpoint, "OUT.pt2")
    form("timm", "Write an extractor as a folder that timm loads.", checkpoint, "OUT_DIR")
    store = ("STORE", "folder or URI of an embeddings store, or of its run")
    index = form("index", "Write an index of FAISS or hnswlib over an embeddings store.", store, "OUT")
    index.set_defaults(run=_export_index)
    library = index.add_mutually_exclusive_group(required=True)
    library.add_argument("--factory", metavar="STRING", help="FAISS, by a factory string such as HNSW32")
    library.add_argument("--hnswlib", action="store_true", help="a graph of hnswlib")
    _add_overrides(index, "keys of evaluation.gallery and their values, such as distance=cosine")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    _add_overrides(parser, "dotted keys and YAML values that replace those of the config")


def _add_overrides(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help=text,
    )


# Floors are imported where a verb needs them: `oml-ray --help` should not wait for torch and ray.


def _loaded(schema: type[Schema], parsed: argparse.Namespace) -> Schema:
    """Load the config of a verb, and warn once of given keys that the verb does not use."""
    from oml_ray.config import load

    config = load(schema, parsed.config, parsed.overrides)
    _warn_of_unused(config, parsed)
    return config


def _warn_of_unused(config: AnyConfig, parsed: argparse.Namespace) -> None:
    from oml_ray.config import unused_keys

    if unused := unused_keys(config):
        print(f"# warning: {parsed.config}: keys that this verb does not use: {', '.join(unused)}", flush=True)


def _train(parsed: argparse.Namespace) -> None:
    from oml_ray.config import TrainConfig

    config = _loaded(TrainConfig, parsed)
    with uncollected():
        from oml_ray.distributed import trainer

    if parsed.dry_run:
        trainer.dry_run(config)
    else:
        trainer.train(config)


def _embed(parsed: argparse.Namespace) -> None:
    from oml_ray.config import EmbedConfig

    config = _loaded(EmbedConfig, parsed)
    with uncollected():
        from oml_ray.distributed import embed

    if parsed.dry_run:
        embed.dry_run(config)
    else:
        embed.embed(config)


def _evaluate(parsed: argparse.Namespace) -> None:
    from oml_ray.config import EvaluateConfig

    config = _loaded(EvaluateConfig, parsed)
    with uncollected():
        from oml_ray.distributed import evaluate

    if parsed.dry_run:
        evaluate.dry_run(config)
    else:
        evaluate.evaluate(config)


def _sweep(parsed: argparse.Namespace) -> None:
    from oml_ray.config import load_sweep

    config = load_sweep(parsed.config, parsed.overrides)
    _warn_of_unused(config, parsed)
    with uncollected():
        from oml_ray.distributed import sweep

    if parsed.dry_run:
        sweep.dry_run(config)
    else:
        sweep.sweep(config, resume=parsed.resume)


def _search(parsed: argparse.Namespace) -> None:
    from oml_ray.config import SearchConfig

    config = _loaded(SearchConfig, parsed)
    with uncollected():
        from oml_ray.distributed import find

    if parsed.dry_run:
        find.dry_run(config)
    else:
        find.find(config)


def _check(parsed: argparse.Namespace) -> None:
    from oml_ray.config import EmbedConfig, SweepConfig, load_any
    from oml_ray.storage import retries

    config = load_any(parsed.config, parsed.overrides)
    if not isinstance(config, EmbedConfig):  # which may be the config of an evaluation too
        _warn_of_unused(config, parsed)
    storage = config.training.storage if isinstance(config, SweepConfig) else config.storage
    retries.configure(storage.retries, storage.first_wait_s)
    if parsed.images or parsed.store is not None or parsed.page is not None:
        with uncollected():
            from oml_ray.distributed import doctor

        doctor.check(config, images=parsed.images, store=parsed.store, page=parsed.page)
        return
    from oml_ray.distributed.audit import audit_of

    print(redact(audit_of(config)))


def _figures(parsed: argparse.Namespace) -> None:
    from oml_ray.data.figures import write_figures

    print(write_figures(parsed.directory))


def _convert(parsed: argparse.Namespace) -> None:
    from oml_ray.data.converters import convert

    options = {name: getattr(parsed, name) for name in ("protocol", "validation_share", "seed")}
    given = {name: value for name, value in options.items() if value is not None}
    print(convert(parsed.data_set, parsed.source, parsed.target, **given))


def _zoo(parsed: argparse.Namespace) -> None:
    from oml_ray.learning.zoo import zoo

    rows = [("entry", "size", "dim", "licence", "weights from")]
    for entry in zoo():
        source = " ".join([entry.source, entry.location]).strip()
        rows.append((entry.name, str(entry.size), str(entry.embedding_dim), entry.licence or "unknown", source))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _export_model(parsed: argparse.Namespace) -> None:
    from oml_ray.build import export

    print(redact(export.model(parsed.form, parsed.source, parsed.out, force=parsed.force)))


def _export_index(parsed: argparse.Namespace) -> None:
    from oml_ray.build import export

    backend = {"backend": "hnswlib"} if parsed.hnswlib else {"backend": "faiss", "factory": parsed.factory}
    print(redact(export.index(parsed.source, parsed.out, backend, parsed.overrides, force=parsed.force)))
