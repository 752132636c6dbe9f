"""Icon sets of vector drawings, as npm packages have them: found in a folder, or fetched into it.

Nothing of a package is unpacked or run: two JSON files are read out of it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oml_ray.errors import StorageError, reason_of

_SCOPE = "@iconify-json"
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class IconSet:
    """The drawings of one vendor.

    Args:
        icons: the package's `icons.json`: drawings by name, other names of them, and their size.
        groups: group name -> names in it, of its `metadata.json`; not all packages have them.
    """

    icons: dict[str, Any]
    groups: dict[str, list[str]]

    def names(self) -> dict[str, str]:
        """Give all names, each with the name of its drawing; those of mirrored or turned drawings are left out."""
        names = {name: name for name, icon in self.icons["icons"].items() if not icon.get("hidden")}
        for alias, entry in self.icons.get("aliases", {}).items():
            if set(entry) <= {"parent"} and entry["parent"] in names:
                names.setdefault(alias, entry["parent"])
        return names

    def svg(self, drawing: str) -> str:
        """Give a drawing as the text of an SVG file."""
        icon = {"left": 0, "top": 0, "width": 16, "height": 16} | self.icons | self.icons["icons"][drawing]
        view = " ".join(str(icon[side]) for side in ("left", "top", "width", "height"))
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        size = f'viewBox="{view}" width="{icon["width"]}" height="{icon["height"]}"'
        return f"<svg {spaces} {size}>{icon['body'].replace('currentColor', '#000')}</svg>"


def read_icon_sets(source: Path, versions: dict[str, str]) -> dict[str, IconSet]:
    """Read icon sets from their packages; those that are not there are fetched with `npm pack`.

    Args:
        source: a folder, made if absent, of packages as `npm pack` leaves them (`iconify-json-noto-1.2.9.tgz`) or as
            `npm install` does (`node_modules/@iconify-json/noto/`, also without the first or the first two folders);
            any versions will do.
        versions: set name -> version that is fetched.

    Returns:
        Set name -> set.

    Raises:
        StorageError: packages are missing and cannot be fetched, or one is damaged.
    """
    if missing := [name for name in versions if _package(source, name) is None]:
        _fetch(source, [f"{_SCOPE}/{name}@{versions[name]}" for name in missing])
    return {name: _read(source, name) for name in versions}


def _package(source: Path, name: str) -> Path | None:
    folders = [source / place / name for place in (f"node_modules/{_SCOPE}", _SCOPE, "")]
    found = [folder for folder in folders if (folder / "icons.json").is_file()]
    found += sorted(source.glob(f"iconify-json-{name}-[0-9]*.tgz"))
    if len(found) > 1:
        raise StorageError(
            f"emoji: {source} holds the package {_SCOPE}/{name} more than once ({', '.join(map(str, found))}): leave "
            "one."
        )
    return found[0] if found else None


def _fetch(source: Path, packages: list[str]) -> None:
    advice = f"Run 'npm pack {' '.join(packages)}' where there is npm and a network, and put the files into {source}."
    npm = shutil.which("npm")
    if npm is None:
        raise StorageError(f"emoji: {len(packages)} packages are not in {source}, and npm is not on the PATH. {advice}")
    try:
        source.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=source, prefix=".npm.") as part:  # none is ever there in part
            command = [npm, "pack", "--ignore-scripts", "--loglevel=error", *packages]
            done = subprocess.run(command, cwd=part, capture_output=True, text=True, check=False)
            if done.returncode:
                said = " ".join(done.stderr.split()[-40:]) or "nothing"
                raise StorageError(f"emoji: npm could not fetch packages into {source}; it says: {said}. {advice}")
            for file in Path(part).glob("*.tgz"):
                file.replace(source / file.name)
    except OSError as error:
        raise StorageError(f"emoji: cannot write into {source}: {error}") from None


def _read(source: Path, name: str) -> IconSet:
    package = _package(source, name)
    if package is None:
        raise StorageError(f"emoji: npm has fetched no {_SCOPE}/{name} into {source}.")
    try:
        if package.is_dir():
            texts = [(package / file).read_bytes() for file in ("icons.json", "metadata.json")]
        else:
            with tarfile.open(package) as archive:
                members = [archive.extractfile(f"package/{file}") for file in ("icons.json", "metadata.json")]
                texts = [member.read() for member in members if member is not None]
        icons, metadata = (json.loads(text) for text in texts)
        names = {*icons["icons"], *icons.get("aliases", {})}
        groups = metadata.get("categories", {})
        names = names.union(*groups.values())
        if odd := sorted(name for name in names if not _NAME.fullmatch(name)):  # they become names of files
            raise ValueError(f"{odd[0]!r} is no name of an icon")
        found = IconSet(icons, groups)
        for drawing in set(found.names().values()):
            found.svg(drawing)
        return found
    except (
        *(OSError, EOFError, AttributeError, KeyError, RecursionError, TypeError, ValueError),
        *(tarfile.TarError, zlib.error),
    ) as error:
        raise StorageError(
            f"emoji: {package} is no whole package of an icon set: {reason_of(error)}. Remove it: it is fetched again."
        ) from None
