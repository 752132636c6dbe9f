"""The virtual environment of the peers: libraries that ours is compared with, at pinned versions.

It is apart because they do not suit ours: OML 4.0 needs an older NumPy, and the `pkg_resources` that setuptools 80
begins to take away. What both sides compute with has the versions that are installed here.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import venv
from importlib.metadata import version
from pathlib import Path

from oml_ray.errors import RunError

PEERS = (
    "open-metric-learning[pipelines]==4.0.0",
    "pytorch-metric-learning==2.9.0",
    "faiss-cpu==1.15.1",
    "torchmetrics==1.9.0",
    "setuptools<80",
)
SHARED = ("torch", "torchvision", "timm")
STAMP = "installed.txt"
SAID_LINES = 5  # of pip's message


def python() -> str:
    """Path of the peers' interpreter; its environment is made when there is none that is whole.

    Raises:
        RunError: it cannot be made.
    """
    folder = place()
    if not is_whole(folder):
        install(folder)
    return str(_interpreter(folder))


def place() -> Path:
    """Where the environment lies: in $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oml_ray" / "peers"


def requirements() -> list[str]:
    """What pip installs."""
    return [*PEERS, *(f"{name}=={version(name).partition('+')[0]}" for name in SHARED)]


def is_whole(folder: Path) -> bool:
    """Whether an environment was installed to its end, with the versions that are asked for now."""
    stamp = folder / STAMP
    return stamp.exists() and stamp.read_text() == _stamp() and _interpreter(folder).exists()


def install(folder: Path) -> None:
    """Make the environment, in place of what is left of another.

    Raises:
        RunError: it cannot be made.
    """
    print(f"installing the peers into {folder}: about 7 GB, some minutes", flush=True)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RunError(
            f"The peers' environment {folder} cannot be created: {error}. Set XDG_CACHE_HOME to a folder that can be "
            "written, and install Python's venv package."
        ) from None
    command = [str(_interpreter(folder)), "-m", "pip", "install", "--quiet", *requirements()]
    pip = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if pip.returncode:
        said = "\n".join(pip.stderr.strip().splitlines()[-SAID_LINES:])
        raise RunError(
            f"pip could not install the peers into {folder} (status {pip.returncode}):\n{said}\n"
            "The suite needs the package registry and about 7 GB in that folder; XDG_CACHE_HOME names another."
        )
    (folder / STAMP).write_text(_stamp())


def _stamp() -> str:
    return "\n".join([f"Python {platform.python_version()}", *requirements(), ""])


def _interpreter(folder: Path) -> Path:
    return folder / "bin" / "python"
