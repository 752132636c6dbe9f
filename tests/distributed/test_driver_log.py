"""The driver's log: native messages and tracebacks are kept, on the terminal there is one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from helpers import train_config

from oml_ray import cli
from oml_ray.errors import ProcessDiedError, RunError

PROGRAM = """
import os, sys
from oml_ray import cli
from oml_ray.distributed import runs, trainer
from oml_ray.errors import RunError

def train(config):
    run = runs.open_run(config)
    os.write(2, b"a native message\\n")
    {body}

trainer.train = train
sys.exit(cli.main(["train", {config!r}]))
"""


def run_train(folder: Path, small_table: Path, body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command `train` as a process, which writes a native message once its run is open, and then does `body`."""
    (folder / "config.yaml").write_text(yaml.safe_dump(train_config(small_table, folder)))
    program = textwrap.dedent(PROGRAM).format(body=body, config=str(folder / "config.yaml"))
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_an_unexpected_error_is_one_line_and_its_traceback_is_in_the_run(small_table: Path, tmp_path: Path) -> None:
    done = run_train(tmp_path, small_table, "raise ValueError('first line\\nlast line')")
    log = tmp_path / "run" / "logs" / "driver.log"
    assert done.returncode == 1
    assert done.stderr == f"oml-ray: unexpected error: last line (traceback: {log})\n"
    text = log.read_text()
    assert "a native message\n" in text
    assert "Traceback (most recent call last)" in text
    assert text.endswith("ValueError: first line\nlast line\n")


def test_an_error_of_the_users_is_one_line_and_native_messages_are_in_the_run(
    small_table: Path, tmp_path: Path
) -> None:
    done = run_train(tmp_path, small_table, "raise RunError('no room')")
    assert (done.returncode, done.stderr) == (2, "oml-ray: no room\n")
    assert "a native message\n" in (tmp_path / "run" / "logs" / "driver.log").read_text()


def test_native_messages_outlive_an_abort(small_table: Path, tmp_path: Path) -> None:
    done = run_train(tmp_path, small_table, "os.abort()")
    assert done.returncode == -6
    assert "Fatal Python error: Aborted" in done.stderr
    assert "a native message\n" in (tmp_path / "run" / "logs" / "driver.log").read_text()


def test_each_process_appends_and_a_log_without_text_is_left_out(small_table: Path, tmp_path: Path) -> None:
    log = tmp_path / "run" / "logs" / "driver.log"
    for count in (1, 2):
        assert run_train(tmp_path, small_table, "pass").returncode == 0
        assert log.read_text().count("a native message\n") == count
        assert (
            len(re.findall(r"^# \d{4}-\d\d-\d\d \d\d:\d\d:\d\d, process \d+$", log.read_text(), re.MULTILINE)) == count
        )
    log.write_bytes(b"x" * (10 * 2**20 + 1))
    assert run_train(tmp_path, small_table, "pass").returncode == 0
    assert log.with_suffix(".1.log").stat().st_size == 10 * 2**20 + 1
    assert log.stat().st_size < 200


def test_before_a_run_is_open_the_message_names_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(parsed: object) -> None:
        os.write(2, b"a native message\n")
        raise RunError("no room")

    monkeypatch.setattr(cli, "_zoo", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.main(["zoo"]) == 2
    (log,) = tmp_path.iterdir()
    assert capfd.readouterr().err == f"oml-ray: no room (messages of libraries: {log})\n"
    assert log.read_text() == "a native message\n"
    assert log.stat().st_mode & 0o777 == 0o600


def test_how_a_process_died_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error with what Ray said, and the newest stderr of Ray's workers."""
    logs = tmp_path / "ray" / "session_latest" / "logs"
    logs.mkdir(parents=True)
    for number in range(7):
        (logs / f"worker-{number}.err").write_text("x" * 9000 + f"Fatal Python error {number}\n")
        os.utime(logs / f"worker-{number}.err", (number, number))
    (logs / "worker-8.err").touch()

    def fail(parsed: object) -> None:
        raise ProcessDiedError("a process died each time") from ValueError("what Ray said")

    monkeypatch.setattr(cli, "_zoo", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert cli.main(["zoo"]) == 2
    (log,) = tmp_path.glob("*.log")
    text = log.read_text()
    assert "ValueError: what Ray said" in text
    assert re.findall(r"Fatal Python error (\d)", text) == ["2", "3", "4", "5", "6"]
    assert len(text) < 50_000


def test_a_command_without_messages_leaves_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.main(["train", "nowhere.yaml"]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", ["few", "many"])
def test_a_reader_of_stdout_that_goes_is_no_error(rows: str, tmp_path: Path) -> None:
    """As `oml-ray zoo | head -1`: the output may fit the pipe, or not."""
    read, write = os.pipe()
    os.close(read)
    program = f"""
        import sys
        from oml_ray import cli
        from oml_ray.learning.zoo import zoo
        import oml_ray.learning.zoo as module
        entries = list(zoo())
        module.zoo = lambda: entries * {1 if rows == "few" else 5000}
        sys.exit(cli.main(["zoo"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_that_is_not_stdout_is_an_unexpected_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(parsed: object) -> None:
        raise BrokenPipeError("a server has gone")

    monkeypatch.setattr(cli, "_zoo", fail)
    assert cli.main(["zoo"]) == 1
    assert "unexpected error: BrokenPipeError: a server has gone" in capfd.readouterr().err
