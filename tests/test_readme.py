"""The README's commands and snippets are run as they stand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from oml_ray.cli import main
from oml_ray.data.figures import write_figures

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PYTHON = [code for kind, code in BLOCKS if kind == "python"]
COMMANDS = [line for kind, code in BLOCKS if kind == "bash" for line in code.splitlines() if line.startswith("oml-ray")]
TARGETS = [
    line.split()[1] for kind, code in BLOCKS if kind == "bash" for line in code.splitlines() if line[:4] == "make"
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands for /tmp, with the table that an earlier command of the README writes."""
    path = tmp_path_factory.mktemp("readme")
    write_figures(path / "oml_ray_figures")
    return path


def test_snippets_run_one_after_another(folder: Path) -> None:
    names: dict[str, Any] = {}
    for code in PYTHON:
        exec(compile(code.replace("/tmp/", f"{folder}/"), "README.md", "exec"), names)
    assert len(names["neighbors"].ids) == len(names["queries"])


def test_several_processes_train_the_same(folder: Path) -> None:
    """The setting and the loop, as a script that is run as the README says."""
    (loop,) = (code for code in PYTHON if "Loop(" in code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    found = []
    for processes in (1, 2):
        run = folder / f"runs_of_{processes}"
        code = (PYTHON[0] + loop).replace("oml_ray_runs", run.name).replace("/tmp/", f"{folder}/")
        if processes > 1:
            code = f'import torch\ntorch.distributed.init_process_group("gloo")\n{code}'
            code += "torch.distributed.destroy_process_group()\n"
        (folder / "train.py").write_text(code)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        subprocess.run([*torchrun, folder / "train.py"], check=True, env=environment)
        last = (run / "library" / "checkpoints" / "last").read_text()
        found.append(load_file(run / "library" / "checkpoints" / last / "extractor.safetensors"))
    one, two = found
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-3)  # Adam, in float32


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert len(COMMANDS) >= 5
    for command in COMMANDS:
        arguments = shlex.split(command.replace("/tmp/", f"{tmp_path}/"))
        assert main(arguments[1:]) == 0, command


def test_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert TARGETS
    for target in TARGETS:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_example_table_is_in_the_format(tmp_path: Path) -> None:
    from oml_ray.data.table import read_table

    (example,) = (code for kind, code in BLOCKS if kind == "csv")
    (tmp_path / "df.csv").write_text(example)
    table = read_table(str(tmp_path / "df.csv"))
    assert (len(table), len(table.query_ids), table.category_names) == (4, 1, ["shoes", "bags"])
