"""Documents that tests write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pypdf import PdfReader, PdfWriter

PDF = Path(__file__).parents[2] / "examples" / "data" / "documents" / "oceans.pdf"


def write_pdf(pdf: Path, change: Callable[[PdfWriter], object]) -> Path:
    writer = PdfWriter(clone_from=PdfReader(PDF))
    change(writer)
    writer.write(pdf)
    return pdf
