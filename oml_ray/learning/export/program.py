"""An extractor as a program of torch.export: plain torch runs it, without oml_ray and without timm.

Reading one runs pickled code: `torch.export.load` is for files of people you trust. The format is torch's own, which
promises to read it in the same version of torch.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from oml_ray.errors import ExportError, reason_of
from oml_ray.learning.export.sameness import evaluating, largest_difference, quiet, writing
from oml_ray.learning.extractors import Extractor, Size, sides

FACTS, SUFFIX = "oml_ray.json", ".pt2"


def traced(extractor: Extractor, size: Size) -> ExportedProgram:
    """Trace an extractor in evaluation mode: images uint8 (n, 3, height, width) -> embeddings (n, D), for any n >= 1.

    Raises:
        ExportError: torch cannot trace the network.
    """
    images = torch.zeros(2, 3, *sides(size), dtype=torch.uint8)
    try:
        with quiet():
            program = torch.export.export(extractor, (images,), dynamic_shapes=({0: Dim("n", min=1)},))
    except Exception as error:  # torch raises many kinds
        raise ExportError(
            f"torch.export cannot trace this network: {reason_of(error)}. Its code may depend on the values of the "
            "images or on their number: train another network, or export the form timm."
        ) from None
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # places in the files of this machine, which are nobody's business
    return program


def write_program(extractor: Extractor, path: Path, *, size: Size, facts: Mapping[str, Any]) -> float:
    """Write the file `.pt2` of an extractor, on the CPU, and compare what it gives with the extractor.

    Args:
        extractor: what is written, as in evaluation mode.
        path: local file to write; `torch.export.load` wants its name to end with `SUFFIX`.
        size: side of the images in pixels, or their height and width.
        facts: JSON-able; the file keeps them under the name `FACTS`.

    Returns:
        The largest difference found, see `largest_difference`.

    Raises:
        ExportError: torch cannot trace the network, or the file gives other embeddings, and is not to be used.
            StorageError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from oml_ray.learning.extractors import timm_extractor
        >>> path = Path(tempfile.mkdtemp(), "model.pt2")
        >>> write_program(timm_extractor("test_vit", size=32), path, size=32, facts={}) < 1e-4
        True
        >>> torch.export.load(path).module()(torch.zeros(4, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([4, 64])
    """
    with evaluating(extractor):
        program = traced(extractor, size)
        held = io.BytesIO()  # a disk that is full while torch itself writes ends the process
        torch.export.save(program, held, extra_files={FACTS: json.dumps(facts, indent=1)})
        with writing(path):
            path.write_bytes(held.getbuffer())
        with path.open("rb") as file:
            loaded = torch.export.load(file).module()
        return largest_difference(extractor, loaded, size, what="The program of torch.export")
