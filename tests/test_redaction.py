"""Credentials inside URIs: hidden in texts, errors and stored configs, and kept where they are used."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from helpers import train_config, write_images
from hypothesis import given
from hypothesis import strategies as st

from oml_ray import build
from oml_ray.cli import main
from oml_ray.config import TrainConfig, dump, parse_yaml, validate
from oml_ray.data.filesystem import join, resolve
from oml_ray.distributed import runs
from oml_ray.errors import OmlRayError, RunError, StorageError, reason_of
from oml_ray.redaction import HIDDEN, is_redacted, redact, redacted
from oml_ray.training.run_directory import RunDirectory

SECRET = "S3cr3t"
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/=@:%-_.~!"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"s3://KEY:{SECRET}@bucket/df.csv", "s3://***@bucket/df.csv"),
        (f"s3://KEY:a/{SECRET}@bucket/df.csv", "s3://***@bucket/df.csv"),
        (f"s3://KEY:{SECRET}@bucket/a@b.png", "s3://***@bucket/a@b.png"),
        (f"gs://b/x?access_key=A&secret_key={SECRET}&region=r", "gs://b/x?access_key=***&secret_key=***&region=r"),
        (f"https://h/x.png?sv=1&sig={SECRET}%2F&se=2", "https://h/x.png?sv=1&sig=***&se=2"),
        (f"https://h/x?X-Amz-Security-Token={SECRET}", "https://h/x?X-Amz-Security-Token=***"),
        (f"https://me:{SECRET}@host:5000/api", "https://***@host:5000/api"),
        (f"https://{SECRET}@host/api", "https://***@host/api"),
        (f"abfs://container:{SECRET}@account/x", "abfs://container:***@account/x"),
        (f"s3://b/x?endpoint_override=http://u:{SECRET}@h", "s3://b/x?endpoint_override=http://***@h"),
        (f"s3://b/x?endpoint_override=http%3A%2F%2Fu%3A{SECRET}%40h", "s3://b/x?endpoint_override=***"),
        (f"'s3://K:{SECRET}@b/x', \"http://K:{SECRET}@h\"", "'s3://***@b/x', \"http://***@h\""),
        (f"<a href='s3://b/x?a=1&amp;token={SECRET}'>", "<a href='s3://b/x?a=1&amp;token=***'>"),
    ],
)
def test_credentials_are_hidden(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected
    assert redacted({"a": [text], "b": 1, "c": None}) == {"a": [expected], "b": 1, "c": None}
    assert is_redacted(expected)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b.png",
        "s3://bucket/keys/token?region=eu-west-1&scheme=http&endpoint_override=localhost:9000",
        "abfs://container@account.dfs.core.windows.net/df.csv",
        "hdfs://me@namenode:9000/df.csv",
        "http://host:5000/a@b",
        "s3://bucket/***.csv",
        "data:image/jpeg;base64,abc;key==",
        "key=value; secret=no URI",
        "/data/df.csv",
    ],
)
def test_what_holds_no_credentials_stays(text: str) -> None:
    assert redact(text) == text
    assert not is_redacted(text)


@given(user=st.text(ALPHABET, min_size=1), secret=st.text(ALPHABET, min_size=6), path=st.text("abc/@.", max_size=9))
def test_no_encoded_credentials_are_left(user: str, secret: str, path: str) -> None:
    user, secret = quote(user, safe=""), quote(f"{secret}~{SECRET}", safe="")
    uris = (f"s3://{user}:{secret}@bucket/{path}", f"s3://bucket/{path}?region=r&secret_key={secret}")
    for uri in uris:
        assert secret not in redact(f"cannot read '{uri}': no such bucket")


def test_errors_hide_credentials() -> None:
    uri = f"s3://KEY:{SECRET}@bucket/x"
    error = StorageError(f"cannot read {uri!r}")
    assert str(error) == "cannot read 's3://***@bucket/x'"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert SECRET not in reason_of(OSError(f"{'x' * 280} {uri}")), "not even where the line is cut"


def test_hidden_credentials_cannot_be_used() -> None:
    with pytest.raises(StorageError, match=r"credentials were hidden .* AWS_ACCESS_KEY_ID"):
        resolve(f"s3://{HIDDEN}@bucket/df.csv")


def with_secrets(table: Path, storage: Path, secret: str = SECRET) -> dict[str, Any]:
    """A training config with credentials in every URI."""
    config = train_config(table, storage)
    config["run"]["storage"] = f"{storage.as_uri()}?secret_key={secret}"
    config["data"] |= {
        "table": f"{table.as_uri()}?secret_key={secret}",
        "root": f"{table.parent.as_uri()}?access_key={secret}",
    }
    return config


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("t"), labels=8, instances=3, validation=2)


def test_a_stored_config_has_none_and_the_one_in_memory_has_them(table: Path, tmp_path: Path) -> None:
    config = validate(TrainConfig, with_secrets(table, tmp_path), "config")
    assert SECRET in config.run.storage
    assert SECRET not in dump(config)
    assert SECRET not in str(build.checkpoint_meta(config, build.table(config.data, config.run.storage)))


def test_a_run_is_continued_with_other_credentials(table: Path, tmp_path: Path) -> None:
    config = validate(TrainConfig, with_secrets(table, tmp_path), "config")
    runs.open_run(config)
    assert SECRET not in (tmp_path / "run" / "config.yaml").read_text()
    assert runs.check_name(config)
    assert runs.check_name(validate(TrainConfig, with_secrets(table, tmp_path, "rotated"), "config"))
    other = config.model_copy(update={"data": config.data.model_copy(update={"root": None})})
    with pytest.raises(RunError, match=r"data\.root"):
        runs.check_name(other)


def test_a_run_without_credentials_hidden_is_continued(table: Path, tmp_path: Path) -> None:
    """Configs that were stored before credentials were hidden."""
    config = validate(TrainConfig, with_secrets(table, tmp_path), "config")
    RunDirectory(config.run.storage, config.run.name)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert runs.check_name(config)


def test_texts_of_a_run_have_none(tmp_path: Path) -> None:
    run = RunDirectory(f"{tmp_path.as_uri()}?secret_key={SECRET}", "run")
    assert SECRET in run.uri
    run.write_text(f'{{"checkpoint": "{join(run.uri, "checkpoints")}"}}', "results.json")
    assert SECRET not in (tmp_path / "run" / "results.json").read_text()


def test_a_dry_run_and_messages_show_none(table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(with_secrets(table, tmp_path)))
    assert main(["train", str(path), "--dry-run"]) == 0
    shown = capfd.readouterr()
    assert HIDDEN in shown.out
    assert SECRET not in shown.out + shown.err
    assert parse_yaml(shown.out, "dry run")["run"]["name"] == "run"
    absent = f"s3://KEY:{SECRET}@/{'x' * 100}.csv"
    for key in ("data.table", "run.storage", "extractor.weights", "run.resume", "nonsense"):
        assert main(["train", str(path), "--dry-run", "--set", f"{key}={absent}"]) == 2
        shown = capfd.readouterr()
        assert SECRET not in shown.out + shown.err, key


def test_every_error_of_the_tree_hides_them() -> None:
    kinds = [OmlRayError]
    while kinds:
        kind = kinds.pop()
        assert str(kind(f"s3://K:{SECRET}@bucket")) == "s3://***@bucket"
        kinds += kind.__subclasses__()
