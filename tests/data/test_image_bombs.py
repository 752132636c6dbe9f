"""Small files that would take much memory or time, or run a program, if they were decoded as they ask for."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

from oml_ray.data.image_decoding import decode
from oml_ray.errors import ImageError

LIMIT = 1_000_000
ALLOWED = 96  # MiB; each of the bombs would take several times as much


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, after: bytes = b"") -> bytes:
    """A black PNG with further chunks before its pixels, and after them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes((3 * width + 1) * height)) if width < 999 else b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + after + chunk(b"IEND", b"")


def animated(kind: str, frames: int, side: int) -> bytes:
    buffer = io.BytesIO()
    # Frames that differ, or they would be merged into one.
    images = [Image.new("L", (side, side), number % 2 * 255) for number in range(frames)]
    packed = {"compression": "tiff_adobe_deflate"} if kind == "TIFF" else {"duration": 10}
    images[0].save(buffer, kind, save_all=True, append_images=images[1:], **packed)
    return buffer.getvalue()


def tiled_tiff(size: int, side: int) -> bytes:
    """A small TIFF made of one tile that is a large square."""
    packer = zlib.compressobj()
    tile = b"".join([packer.compress(bytes(side)) for _ in range(side)]) + packer.flush()
    fields = {256: size, 257: size, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(tile)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    return b"II*\0" + struct.pack("<I", 8 + len(tile)) + tile + struct.pack("<H", len(fields)) + entries + bytes(4)


def many_scans(count: int) -> bytes:
    """A progressive JPEG that goes over its pixels again and again."""
    buffer = io.BytesIO()
    Image.new("L", (64, 64)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * count + data[-2:]


TEXT = zlib.compress(bytes(2 * 10**8))  # 200 kB for 200 MB
BOMBS = {
    "pixels": png(60_000, 60_000),
    "text before the pixels": png(9, 9, chunk(b"zTXt", b"Comment\0\0" + TEXT)),
    "text after the pixels": png(9, 9, after=chunk(b"zTXt", b"Comment\0\0" + TEXT)),
    "international text": png(9, 9, chunk(b"iTXt", b"Comment\0\1\0\0\0" + TEXT)),
    "colour profile": png(9, 9, chunk(b"iCCP", b"p\0\0" + TEXT)),
    "frames of a GIF": animated("GIF", 300, 900),
    "frames of a TIFF": animated("TIFF", 300, 900),
    "frames of a WebP": animated("WEBP", 100, 900),
    "tile of a TIFF": tiled_tiff(9, 15_000),
    "scans of a JPEG": many_scans(100_000),
}

DECODE = """
import json, resource, sys, warnings
from oml_ray.data.image_decoding import decode
from oml_ray.errors import ImageError
warnings.simplefilter("ignore")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
found = {}
for name, path in json.loads(sys.argv[1]).items():
    data, before = open(path, "rb").read(), peak()
    try:
        end = decode(data, name, None, int(sys.argv[2])).size
    except ImageError as error:
        end = str(error)
    found[name] = end, peak() - before
print(json.dumps(found))
"""


def test_bombs_take_little_memory(tmp_path: Path) -> None:
    paths = {}
    for number, (name, data) in enumerate(BOMBS.items()):
        assert len(data) < 12_000_000
        paths[name] = str(tmp_path / str(number))
        (tmp_path / str(number)).write_bytes(data)
    call = [sys.executable, "-c", DECODE, json.dumps(paths), str(LIMIT)]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert {name: mib for name, (_, mib) in found.items() if mib > ALLOWED} == {}
    ends = {name: end for name, (end, _) in found.items()}
    assert {name for name, end in ends.items() if isinstance(end, list)} == {
        *("frames of a GIF", "frames of a TIFF", "frames of a WebP")  # of which the first one is the image
    }
    assert "60000 x 60000 pixels are more than data.max_pixels" in ends["pixels"]
    assert "15000 x 15000 pixels are more than data.max_pixels" in ends["tile of a TIFF"]
    assert "a JPEG of more than 200 scans" in ends["scans of a JPEG"]


def test_no_image_runs_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands EPS files, which are programs, to Ghostscript."""
    proof = tmp_path / "executed"
    (tmp_path / "gs").write_text(f"#!/bin/sh\n/bin/mkdir -p {proof}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    with pytest.raises(ImageError, match=r"none of JPEG, PNG"):
        decode(eps, "a.png", None, LIMIT)
    assert not proof.exists()
    with suppress(OSError):  # our program gives no image
        Image.open(io.BytesIO(eps)).load()
    assert proof.exists(), "without our list of formats it would have run"
