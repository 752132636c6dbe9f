"""Failures injected into one function of oml_ray, in every Python process that has this folder on its PYTHONPATH.

Python imports a module of this name when it starts. `injection.py` writes the environment that is read here.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

MODULE, _, ATTRIBUTE = os.environ.get("OML_RAY_TEST_TARGET", "").partition(":")


def fail(kind: str, arguments: Sequence[Any]) -> None:
    """Fail as a defect, a lack of memory, or the end of the process does."""
    if kind == "defect":
        raise RuntimeError("an injected defect")
    if kind == "host memory":
        raise MemoryError("injected")
    if kind == "CUDA memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected).")
    if kind == "exit":
        os._exit(1)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        while True:
            signal.pause()
    if kind == "NaN":
        import torch

        with torch.no_grad():
            next(iter(arguments[0].learner.extractor.parameters())).fill_(float("nan"))


def is_due() -> bool:
    """Count a call, over all processes; return whether it is one that fails."""
    first, times = json.loads(os.environ["OML_RAY_TEST_CALLS"])
    with open(os.environ["OML_RAY_TEST_COUNT"], "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        number = int(file.read() or b"0")
        file.seek(0)
        file.write(str(number + 1).encode())
    return bool(first <= number < first + times)


def inject(module: ModuleType) -> None:
    """Have the function of a module fail at the calls of the environment."""
    owner: Any = module
    *owners, name = ATTRIBUTE.split(".")
    for each in owners:
        owner = getattr(owner, each)
    function: Callable[..., Any] = getattr(owner, name)
    kind = os.environ["OML_RAY_TEST_FAILURE"]

    @functools.wraps(function)
    def failing(*arguments: Any, **keywords: Any) -> Any:
        if not is_due():
            return function(*arguments, **keywords)
        if kind != "NaN":
            fail(kind, arguments)
        result = function(*arguments, **keywords)
        fail(kind, arguments)  # what the call has updated
        return result

    setattr(owner, name, failing)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the module as Python does, and injects after it is loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_inject(module: ModuleType) -> None:
            load(module)
            inject(module)

        spec.loader.exec_module = load_and_inject  # type: ignore[method-assign]
        return spec


if MODULE:
    sys.meta_path.insert(0, _Finder())
