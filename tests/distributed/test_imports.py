"""Imports without garbage collection."""

import gc
import importlib
import subprocess
import sys

import pytest

from oml_ray.distributed.imports import uncollected


def test_garbage_is_collected_again_after_imports_that_fail() -> None:
    with pytest.raises(ModuleNotFoundError), uncollected():
        importlib.import_module("no_such_module")
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


def test_a_process_that_imported_so_ends_in_silence() -> None:
    code = "from oml_ray.distributed.imports import uncollected\nwith uncollected(): import timm\n"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
