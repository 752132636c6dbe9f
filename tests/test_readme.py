"""The README's commands and snippets are run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from oml_ray.cli import main

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PYTHON = [code for kind, code in BLOCKS if kind == "python"]
COMMANDS = [line for kind, code in BLOCKS if kind == "bash" for line in code.splitlines() if line.startswith("oml-ray")]
TARGETS = [
    line.split()[1] for kind, code in BLOCKS if kind == "bash" for line in code.splitlines() if line[:4] == "make"
]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_snippets_run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


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
