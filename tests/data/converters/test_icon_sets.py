"""Packages of icon sets: where they are found, what is fetched, and that nothing of them gets out."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from oml_ray.data.converters.icon_sets import IconSet, read_icon_sets
from oml_ray.errors import StorageError

ICONS = {"prefix": "x", "icons": {"cat": {"body": "<path/>"}}}
VERSIONS = {"noto": "1.2.9", "noto-v1": "1.2.5"}


def write_archive(file: Path, **texts: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    files = {"package/icons.json": json.dumps(ICONS), "package/metadata.json": '{"categories": {"Animals": ["cat"]}}'}
    with tarfile.open(file, "w:gz") as archive:
        for name, text in {**files, **{f"package/{key}.json": text for key, text in texts.items()}}.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


def write_folder(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "icons.json").write_text(json.dumps(ICONS))
    (folder / "metadata.json").write_text("{}")


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only command: an npm that writes what it is asked into `calls`, and copies what is in `registry`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "registry").mkdir()
    script = tmp_path / "bin" / "npm"
    said = 'case "$*" in *--silent*) ;; *) echo "no network" >&2;; esac'  # as npm, which then tells nothing
    copy = f"/bin/cp {tmp_path}/registry/* . || {{ {said}; exit 1; }}"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{copy}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


@pytest.mark.parametrize("place", ["node_modules/@iconify-json/noto", "@iconify-json/noto", "noto"])
def test_unpacked_and_packed_packages_are_found(npm: Path, place: str) -> None:
    write_folder(npm / "src" / place)
    write_archive(npm / "src" / "iconify-json-noto-v1-3.0.0.tgz")
    sets = read_icon_sets(npm / "src", VERSIONS)
    assert sets == {"noto": IconSet(ICONS, {}), "noto-v1": IconSet(ICONS, {"Animals": ["cat"]})}
    assert not (npm / "calls").exists()


def test_missing_packages_alone_are_fetched(npm: Path) -> None:
    write_archive(npm / "registry" / "iconify-json-noto-v1-1.2.5.tgz")
    write_folder(npm / "src" / "noto")
    assert set(read_icon_sets(npm / "src", VERSIONS)) == set(VERSIONS)
    assert (npm / "calls").read_text() == "pack --ignore-scripts --loglevel=error @iconify-json/noto-v1@1.2.5\n"
    assert sorted(os.listdir(npm / "src")) == ["iconify-json-noto-v1-1.2.5.tgz", "noto"]
    read_icon_sets(npm / "src", VERSIONS)
    assert (npm / "calls").read_text().count("\n") == 1


def test_no_folder_is_made_and_filled(npm: Path) -> None:
    for name, version in VERSIONS.items():
        write_archive(npm / "registry" / f"iconify-json-{name}-{version}.tgz")
    assert set(read_icon_sets(npm / "new" / "src", VERSIONS)) == set(VERSIONS)
    assert len(os.listdir(npm / "new" / "src")) == 2


def test_what_npm_cannot_fetch_is_told(npm: Path) -> None:
    with pytest.raises(
        StorageError, match=r"npm could not .*no network\. Run 'npm pack @iconify-json/noto@1.2.9 @icon"
    ):
        read_icon_sets(npm / "src", VERSIONS)
    assert os.listdir(npm / "src") == []
    (npm / "registry" / "other.tgz").touch()
    with pytest.raises(StorageError, match="npm has fetched no @iconify-json/noto into"):
        read_icon_sets(npm / "src", VERSIONS)


def test_without_npm_the_packages_are_named(npm: Path) -> None:
    (npm / "bin" / "npm").unlink()
    write_folder(npm / "src" / "noto")
    with pytest.raises(
        StorageError, match=r"1 packages are not in .*npm is not on the PATH\. Run 'npm pack @iconify-json"
    ):
        read_icon_sets(npm / "src", VERSIONS)


def test_a_package_that_is_there_twice_is_told(npm: Path) -> None:
    for version in ("1.2.8", "1.2.9"):
        write_archive(npm / "src" / f"iconify-json-noto-{version}.tgz")
    with pytest.raises(StorageError, match=r"more than once \(.*1.2.8.tgz, .*1.2.9.tgz\): leave one"):
        read_icon_sets(npm / "src", VERSIONS)


DAMAGES = {
    "cut": {},
    "no archive": {},
    "no json": {"icons": "{"},
    "a list": {"icons": "[]"},
    "no icons": {"icons": "{}"},
    "a list of icons": {"icons": '{"icons": ["cat"]}'},
    "an icon without a body": {"icons": '{"icons": {"cat": {}}}'},
    "an icon that is a number": {"icons": '{"icons": {"cat": 3}}'},
    "an alias of nothing": {"icons": json.dumps({**ICONS, "aliases": {"dog": {}}})},
    "too deep": {"icons": "[" * 100_000},
    "odd groups": {"metadata": '{"categories": {"Animals": 3}}'},
    "a list of groups": {"metadata": '{"categories": []}'},
    "groups in a list": {"metadata": "[]"},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_package_is_told(npm: Path, damage: str) -> None:
    texts = DAMAGES
    file = npm / "src" / "iconify-json-noto-1.2.9.tgz"
    write_archive(file, **texts.get(damage, {}))
    if damage in ("cut", "no archive"):
        file.write_bytes(file.read_bytes()[: {"cut": 100, "no archive": 0}[damage]])
    with pytest.raises(StorageError, match=r"noto-1.2.9.tgz is no whole package of an icon set: .*Remove it"):
        read_icon_sets(npm / "src", {"noto": "1.2.9"})


@pytest.mark.parametrize("name", ["../../evil", "a/b", "", "..", "A", "a--b", "cat\n"])
def test_names_that_lead_elsewhere_are_refused(npm: Path, name: str) -> None:
    icons, groups = {**ICONS, "icons": {name: {"body": ""}}}, {"categories": {"Animals": [name]}}
    for texts in ({"icons": json.dumps(icons)}, {"metadata": json.dumps(groups)}):
        write_archive(npm / "src" / "iconify-json-noto-1.2.9.tgz", **texts)
        with pytest.raises(StorageError, match="is no name of an icon"):
            read_icon_sets(npm / "src", {"noto": "1.2.9"})


def test_members_that_lead_elsewhere_stay_where_they_are(npm: Path) -> None:
    file = npm / "src" / "iconify-json-noto-1.2.9.tgz"
    write_archive(file)
    with tarfile.open(file) as archive:
        kept = [(member, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    with tarfile.open(file, "w:gz") as archive:
        for name in ("../evil", "/tmp/oml_ray_evil", "package/../../evil"):
            archive.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("package/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for member, data in kept:
            archive.addfile(member, io.BytesIO(data))
    before = sorted(npm.rglob("*"))
    assert read_icon_sets(npm / "src", {"noto": "1.2.9"})["noto"].names() == {"cat": "cat"}
    assert sorted(npm.rglob("*")) == before
    assert not Path("/tmp/oml_ray_evil").exists()
