"""The compiler that torch.compile needs: checked before it is first called, minutes into a training."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys

from oml_ray.errors import ResourceError


def check_compiler(device_type: str) -> None:
    """Check that this machine has the compiler that torch.compile calls: C++ for CPUs, C for GPUs (Triton).

    Args:
        device_type: "cpu" or "cuda".

    Raises:
        ResourceError: it has none.
    """
    if device_type == "cpu":
        variable, language, commands = "CXX", "C++", ["clang++" if sys.platform == "darwin" else "g++"]
    else:
        variable, language, commands = "CC", "C", ["gcc", "clang"]
    if os.environ.get(variable):
        commands = shlex.split(os.environ[variable])[:1]  # torch runs it with the options that follow
    if not any(map(shutil.which, commands)):
        raise ResourceError(
            f"training.compile: true needs a {language} compiler, but {platform.node()} has no "
            f"{' or '.join(commands)}: install g++ (Debian, Ubuntu: apt-get install g++), name another compiler by "
            f"the environment variable {variable}, or set training.compile: false."
        )
