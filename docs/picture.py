"""Draw docs/how-blending-works.png: python docs/picture.py."""

from __future__ import annotations

import random
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

COLORS = {"prefix": "#b8b8b8", "A": "#7fb3d5", "B": "#7dcea0", "C": "#f7c873", "computed": "#e0604c"}
SIZES = {"prefix": 4, "A": 16, "B": 20, "C": 12}
GAP, QUESTION = 1.0, 7


def main() -> None:
    """Two rows: what ingestion keeps, and the prompt of one question."""
    figure, axes = plt.subplots(figsize=(9.6, 3.9), dpi=130)
    axes.set_axis_off()
    axes.set_xlim(-1, 69)
    axes.set_ylim(-4.6, 15)

    axes.text(0, 13.6, "Ingestion: each chunk's KV is computed once, behind the shared prefix", fontsize=10.5)
    middles, x = {}, 0.0
    for chunk in "ABC":
        box(axes, x, 10, SIZES["prefix"], COLORS["prefix"], "prefix", size=7)
        box(axes, x + SIZES["prefix"], 10, SIZES[chunk], COLORS[chunk], f"chunk {chunk}")
        middles[chunk] = x + SIZES["prefix"] + SIZES[chunk] / 2
        x += SIZES["prefix"] + SIZES[chunk] + 3

    axes.text(
        0,
        -0.7,
        "Question: the same KV in the order of this retrieval, keys turned to their new positions",
        fontsize=10.5,
    )
    box(axes, 0, 1, SIZES["prefix"], COLORS["prefix"], "prefix")
    rng, x = random.Random(3), float(SIZES["prefix"])
    for index, chunk in enumerate("CAB"):
        if index:
            box(axes, x, 1, GAP, COLORS["computed"])
            x += GAP
        box(axes, x, 1, SIZES[chunk], COLORS[chunk], f"chunk {chunk}")
        axes.add_patch(
            FancyArrowPatch(
                (middles[chunk], 9.9),
                (x + SIZES[chunk] / 2, 4.2),
                arrowstyle="-|>",
                mutation_scale=11,
                color="#555555",
                connectionstyle="arc3,rad=0.05",
            )
        )
        if index:  # the first chunk stands where its KV was computed: exact
            for _ in range(max(2, round(0.15 * SIZES[chunk]))):
                side = rng.choice(((0.05, 0.25), (0.75, 0.95)))  # beside the label
                place = x + rng.uniform(*side) * SIZES[chunk]
                axes.add_patch(Rectangle((place, 1), 0.4, 3, color=COLORS["computed"]))
        x += SIZES[chunk]
    box(axes, x, 1, QUESTION, COLORS["computed"], "question")
    axes.text(0, -2.2, "A chunk right behind the prefix stands where its KV was computed: it is exact.", fontsize=8)
    axes.legend(
        handles=[
            Patch(color=COLORS["prefix"], label="exact prefix"),
            Patch(color=COLORS["A"], label="reused (any chunk colour)"),
            Patch(color=COLORS["computed"], label="computed: what the question attends to, separators, question"),
        ],
        loc="lower left",
        bbox_to_anchor=(0, -0.03),
        ncol=3,
        frameon=False,
        fontsize=8,
    )
    figure.savefig(Path(__file__).with_name("how-blending-works.png"), bbox_inches="tight")


def box(axes: plt.Axes, x: float, y: float, width: float, color: str, text: str = "", *, size: float = 9) -> None:
    """One run of tokens."""
    axes.add_patch(Rectangle((x, y), width, 3, facecolor=color, edgecolor="#444444", linewidth=0.7))
    axes.text(x + width / 2, y + 1.5, text, ha="center", va="center", fontsize=size, zorder=5)


if __name__ == "__main__":
    main()
