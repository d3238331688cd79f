"""One self-contained HTML page: text, tables, pictures and commands, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl_ext.files import atomic_write

Cell = str | int | float
NONE = "-"
"""Shown where there is no figure."""


@dataclass(frozen=True)
class Table:
    """A table; numbers are right-aligned, floats shown with four significant digits."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG file, embedded into the page."""

    png: Path
    caption: str = ""


@dataclass(frozen=True)
class Code:
    """Text to copy: shell commands, JSON. With a summary, it is folded away under it."""

    text: str
    summary: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with its blocks; a plain string is a paragraph."""

    title: str
    blocks: Sequence[str | Table | Picture | Code]


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write one HTML file that needs no other file and no network. All text is escaped.

    Args:
        path: written atomically.
        title: heading and window title.
        sections: shown in this order, listed in a table of contents.

    Raises:
        NnsslError: the page cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("nnssl_ext.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(kind=lambda block: type(block).__name__, png_data=_png_data, cell=_cell)
    environment.tests["numeric"] = lambda value: isinstance(value, (int, float))
    html = environment.get_template("page.html.j2").render(title=title, sections=sections)
    with atomic_write(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def signed(value: float | None) -> str:
    """A difference with its sign and four decimals."""
    return NONE if value is None else f"{value:+.4f}"


def _png_data(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def _cell(value: Cell) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
