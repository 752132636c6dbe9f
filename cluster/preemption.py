"""Tells Ray that this node is about to be taken away, so that nothing new starts on it and training restarts elsewhere.

`python preemption.py aws` (or gcp) waits for the cloud's notice, in the background of a spot machine; `now` is for a
Kubernetes preStop hook: the pod is being deleted, and is kept until its work is done or the time is up. Ray Train
counts a drained node apart from failures: `scaling.max_failures` is not used up.
"""

from __future__ import annotations

import argparse
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

LOOK_EVERY_S = 5.0
TIMEOUT_S = 5.0
NOTICE_S = {"aws": 120, "gcp": 30, "now": 90}
"""Seconds from the notice to the end."""
AWS, GCP = "http://169.254.169.254/latest", "http://metadata.google.internal/computeMetadata/v1"
WORK = b"ray::"
NO_WORK = (b"ray::IDLE", b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")


def aws(base: str = AWS) -> bool:
    """Whether EC2 has announced the end of this spot instance."""
    token = _answer(f"{base}/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    return token is not None and bool(
        _answer(f"{base}/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    )


def gcp(base: str = GCP) -> bool:
    """Whether Compute Engine has announced the end of this spot VM."""
    return _answer(f"{base}/instance/preempted", {"Metadata-Flavor": "Google"}) == "TRUE"


def _answer(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """Text that the machine's metadata service answers; None where it has none, or there is no such service."""
    request = urllib.request.Request(url, headers=headers, method=method)
    # Without the proxies of the environment: the address is this machine's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, OSError):
        return None


def command(seconds: int) -> list[str]:
    """The command that drains this node."""
    return ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message", "the machine is being taken away",
            "--deadline-remaining-seconds", str(seconds)]  # fmt: skip


def is_working(processes: Path = Path("/proc")) -> bool:
    """Whether a task or actor of Ray is in this container: Ray names their processes after them."""
    for line in processes.glob("[0-9]*/cmdline"):
        try:
            name = line.read_bytes()
        except OSError:  # it has ended
            continue
        if name.startswith(WORK) and not name.startswith(NO_WORK):
            return True
    return False


def wait_until(happens: Callable[[], bool], deadline: float = float("inf"), every_s: float = LOOK_EVERY_S) -> None:
    """Look again and again, until it happens or `time.monotonic()` has reached the deadline."""
    while not happens() and time.monotonic() < deadline:
        time.sleep(every_s)


def main(arguments: list[str] | None = None) -> int:
    """Wait for the notice, drain, and return ray's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notice", choices=NOTICE_S, help="where it comes from")
    parser.add_argument("--seconds", type=int, help="from the notice to the end of the node")
    parsed = parser.parse_args(arguments)
    seconds = NOTICE_S[parsed.notice] if parsed.seconds is None else parsed.seconds
    if parsed.notice != "now":
        wait_until({"aws": aws, "gcp": gcp}[parsed.notice])
    deadline = time.monotonic() + seconds
    status = subprocess.run(command(seconds), check=False).returncode
    if parsed.notice == "now":
        wait_until(lambda: not is_working(), deadline, 1.0)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
