"""Documents that tests write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pypdf import PdfReader, PdfWriter

DATA = Path(__file__).parents[2] / "examples" / "data"
PDF = DATA / "documents" / "oceans.pdf"


def write_pdf(pdf: Path, change: Callable[[PdfWriter], object]) -> Path:
    writer = PdfWriter(clone_from=PdfReader(PDF))
    change(writer)
    writer.write(pdf)
    return pdf


def write(path: Path, content: str | bytes = "Some text.") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
