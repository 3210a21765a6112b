"""Measurements as Markdown tables."""

from __future__ import annotations

import math


def as_text(value) -> str:
    """A cell: three significant digits, NaN for what did not fit into memory, None for what there is not."""
    if isinstance(value, float) and math.isnan(value):
        return "out of memory"
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")
    return f"{value:,}" if isinstance(value, int) else value


def as_markdown(rows: list[dict]) -> str:
    """A table with aligned columns; precision and execution are left out where all rows have the same."""
    names = [name for name in rows[0] if name not in ("precision", "execution") or len({row[name] for row in rows}) > 1]
    table = [names, *([as_text(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(names))]
    lines = []
    for line in table:
        cells = (
            f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(
        1,
        "|" + "|".join(("-" * (width + 1) + ":") if column else "-" * (width + 2) for column, width in enumerate(widths)) + "|",
    )
    return "\n".join(lines)
