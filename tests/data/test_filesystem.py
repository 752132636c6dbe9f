"""Paths and URIs."""

import os
from pathlib import Path

import pyarrow.fs as fs
import pytest

from oml_ray.data.filesystem import exists, is_uri, join, linked_out, list_files, parent, read_bytes, resolve
from oml_ray.errors import StorageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/key", True),
        ("file:///a", True),
        ("abfss+x://a", True),
        ("/a/b", False),
        ("a/b.csv", False),
        ("~/a", False),
        ("file:/a", False),
        ("dir/s3://a", False),
        ("", False),
    ],
)
def test_is_uri(text: str, expected: bool) -> None:
    assert is_uri(text) is expected


def test_resolve_makes_local_paths_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve("a/../b.csv") == (fs.LocalFileSystem(), str(tmp_path / "b.csv"))
    assert resolve("~/b.csv")[1] == "/home/someone/b.csv"
    assert resolve(Path("/a b/c%20d?e"))[1] == "/a b/c%20d?e"


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///data/df.csv", "/data/df.csv"),
        ("file:///data/a%20b.csv", "/data/a b.csv"),
        ("file:///data/a b#1.csv", "/data/a b#1.csv"),
        ("file:///data/", "/data"),
        ("file:///", "/"),
        ("FILE:///data", "/data"),
        ("s3://bucket/data/df.csv?region=eu-west-1", "bucket/data/df.csv"),
        ("gs://bucket", "bucket"),
        ("mock://host/dir/file", "dir/file"),
    ],
)
def test_resolve_uri(uri: str, path: str) -> None:
    assert resolve(uri)[1] == path


def test_one_filesystem_per_place() -> None:
    a, b, c = (resolve(f"s3://{place}?region=eu-west-1")[0] for place in ("one/a", "one/b/c", "two/a"))
    assert a is b
    assert a is not c


def test_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(StorageError, match=r"'ftp://host/x'.*unknown scheme 'ftp://'.*s3://.*gs://.*hdfs://"):
        resolve("ftp://host/x")


@pytest.mark.parametrize("uri", ["file://otherhost/x", "s3://bucket/x?colour=red"])
def test_unusable_uri(uri: str) -> None:
    with pytest.raises(StorageError, match="cannot use"):
        resolve(uri)


@pytest.mark.parametrize(
    ("base", "parts", "expected"),
    [
        ("/data", ["images", "a b.png"], "/data/images/a b.png"),
        ("data", ["a.png"], "data/a.png"),
        ("s3://bucket", ["a.png"], "s3://bucket/a.png"),
        ("s3://bucket/x/", ["a", "b.png"], "s3://bucket/x/a/b.png"),
        ("s3://bucket/x?region=r", ["a b%.png"], "s3://bucket/x/a%20b%25.png?region=r"),
        ("s3://bucket/x", ["./a/../b.png"], "s3://bucket/x/b.png"),
        ("file:///x", ["what?.png"], "file:///x/what%3F.png"),
    ],
)
def test_join(base: str, parts: list[str], expected: str) -> None:
    assert join(base, *parts) == expected


@pytest.mark.parametrize("name", ["plain.png", "a b.png", "50%.png", "%20.png", "what?.png", "a#b.png", "ü.png"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_any_name_can_be_joined_and_read(tmp_path: Path, scheme: str, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    uri = join(f"{scheme}{tmp_path}", name)
    assert exists(uri)
    assert read_bytes(uri) == b"x"


def test_parent() -> None:
    assert parent("/data/df.csv") == "/data"
    assert parent("s3://bucket/data/df.csv?region=r") == "s3://bucket/data?region=r"
    assert resolve(parent("gs://bucket/df.csv"))[1] == "bucket"


def test_read_bytes_through_any_filesystem() -> None:
    filesystem, path = resolve("mock://host/some/file")
    filesystem.create_dir("some")
    with filesystem.open_output_stream(path) as file:
        file.write(b"hello")
    assert read_bytes("mock://host/some/file") == b"hello"
    assert exists("mock://host/some")
    assert not exists("mock://host/other")
    assert list_files("mock://host/some") == ["file"]


def test_read_bytes_refuses_what_is_too_large(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_bytes(file, max_bytes=5) == b"12345"
    with pytest.raises(StorageError, match="it has 5 bytes, at most 4 are allowed"):
        read_bytes(file, max_bytes=4)


def test_read_bytes_of_nothing_and_of_a_directory(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no such file") as error:
        read_bytes(tmp_path / "absent")
    assert str(tmp_path / "absent") in str(error.value)
    with pytest.raises(StorageError, match="cannot read"):
        read_bytes(tmp_path)


def test_list_files(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "deep").write_text("")
    (tmp_path / "a").write_text("")
    assert list_files(tmp_path) == ["a"]
    assert list_files(tmp_path / "absent") == []
    with pytest.raises(StorageError, match="cannot list"):
        list_files(tmp_path / "a")


def test_names_that_are_no_texts_are_in_nobodys_way(tmp_path: Path) -> None:
    """A table cannot hold them, but they may lie beside what it holds."""
    folder = os.fsencode(tmp_path)
    Path(os.fsdecode(folder + b"/bad\xff.png")).touch()
    os.symlink(b"/etc/passwd", folder + b"/link\xff.png")
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").symlink_to("/etc/passwd")
    assert sorted(list_files(tmp_path)) == ["a.png", "b.png"]
    assert linked_out(tmp_path, tmp_path) == {"b.png"}


@pytest.mark.parametrize("uri", ["nowhere://[/a.png", "s3://a\u2100b/c", "file://[::1/a"])
def test_what_is_no_uri_is_refused(uri: str, tmp_path: Path) -> None:
    for call in (resolve, parent, list_files, read_bytes, lambda uri: join(uri, "a"), lambda uri: linked_out(uri, "/")):
        with pytest.raises(StorageError, match="cannot use"):
            call(uri)


def test_a_path_with_a_null_byte_is_refused() -> None:
    for path in ("/a\0b.png", "file:///a\0b.png"):
        with pytest.raises(StorageError, match="cannot read"):
            read_bytes(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0)
    with pytest.raises(StorageError, match="cannot read"):
        read_bytes(tmp_path / "file")
