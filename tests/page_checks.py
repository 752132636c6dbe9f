"""What the pages without a script of their own share: how they are read, and what must do no harm in them."""

from __future__ import annotations

import io
from collections import Counter
from html.parser import HTMLParser

from PIL import Image

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"
VOID = {"meta", "img"}


class Seen(HTMLParser):
    """What a browser sees: every tag closed in order, attributes, and text outside of style and plots."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"] and "svg" not in self.open and data.strip():
            self.texts.append(" ".join(data.split()))

    def values(self, *names: str) -> list[str]:
        return [value for name, value in self.attributes if name in names]


def check_fetches_nothing(text: str, *, pictures: int) -> None:
    """Everything that a page shows lies in the page itself."""
    seen = Seen(text)
    assert len(seen.values("src")) == pictures
    assert all(value.startswith("data:image/") for value in seen.values("src"))
    assert seen.values("href", "srcset", "data", "action") == []
    assert any(value.startswith("default-src 'none'") and "script-src" not in value for value in seen.values("content"))


def image(kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, kind)
    return buffer.getvalue()
