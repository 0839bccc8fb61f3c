"""LMCache's command, each of whose counters and histograms is on /metrics from the start; others appear when they move.

python every_metric.py server --http-port PORT ...
python every_metric.py coordinator --port PORT ...
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any


def names(text: str) -> dict[str, list[str]]:
    """The metrics in the text of /metrics with their labels; histograms by their parts, `le` is left out."""
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? \S+$", text, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return {name: sorted(labels - {"le"}) for name, labels in sorted(found.items()) if not name.endswith("_created")}


def _shown(make: Callable[..., Any]) -> Callable[..., Any]:
    def create(*arguments: Any, **options: Any) -> Any:
        made = make(*arguments, **options)
        (made.add if hasattr(made, "add") else made.record)(0)
        return made

    return create


def main() -> None:
    from opentelemetry.sdk.metrics import Meter

    for kind in ("counter", "up_down_counter", "histogram"):
        setattr(Meter, f"create_{kind}", _shown(getattr(Meter, f"create_{kind}")))
    from lmcache.cli.main import main as lmcache

    sys.argv[0] = "lmcache"
    lmcache(sys.argv[1:])


if __name__ == "__main__":
    main()
