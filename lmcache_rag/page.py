"""HTML pages of bench quality and plan, with their pictures in them: they need no network, and may be sent by mail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH: Final = 800  # of a picture, in pixels


def write_page(path: Path, package: str, template: str, **values: Any) -> None:
    """Write a page from a template of a package; `style` in it is the style sheet of all pages.

    Args:
        path: The file.
        package: Name of the package that has the template.
        template: Its file's name.
        values: What it shows; texts are escaped.
    """
    import jinja2
    from markupsafe import Markup

    text = resources.files(package).joinpath(template).read_text("utf-8")
    style = Markup(resources.files("lmcache_rag").joinpath("page.css").read_text("utf-8"))  # noqa: S704 - our own
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text)
    path.write_text(page.render(style=style, **values), encoding="utf-8")


def escape(text: str) -> str:
    """A text for a picture."""
    from markupsafe import escape as escaped

    return str(escaped(text))


def scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    """A line from values between `low` and `high` to pixels between `first` and `last`."""
    span = (high - low) or 1.0
    return lambda value: first + (value - low) / span * (last - first)


def svg(lines: Sequence[str], height: int) -> Markup:
    """A picture of these elements, whose texts are escaped; as wide as the page, WIDTH units."""
    from markupsafe import Markup

    size = f'viewBox="0 0 {WIDTH} {height}"'
    return Markup(f'<svg {size} role="img">{"".join(lines)}</svg>')  # noqa: S704 - texts in it are escaped
