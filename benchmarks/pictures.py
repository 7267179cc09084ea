"""Plots that say what they were drawn from, so that a stale one can be told without drawing it again."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

KEY = "Source"  # one of the keywords that the PNG standard names


def digest(data: Any) -> str:
    """Of bytes, or of what JSON can hold."""
    raw = data if isinstance(data, bytes) else json.dumps(data, sort_keys=True).encode()
    return hashlib.sha256(raw).hexdigest()[:16]


def save(figure: Any, path: Path, source: str, dpi: int) -> None:
    """`source`: the digest of what is shown. With a palette: plots have few colors, and files stay small."""
    from PIL import Image, PngImagePlugin

    drawn, said = io.BytesIO(), PngImagePlugin.PngInfo()
    figure.savefig(drawn, dpi=dpi)
    said.add_text(KEY, source)
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few.save(path, "PNG", pnginfo=said, dpi=(dpi, dpi), optimize=True)


def source_of(path: Path) -> str | None:
    """The digest that a plot was saved with, None where there is no such plot."""
    if not path.exists():
        return None
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(KEY)
