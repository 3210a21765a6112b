"""Measurements as Markdown tables."""

import math


def as_text(value) -> str:
    """Format a cell: three significant digits; NaN did not fit into memory; None is empty."""
    if isinstance(value, float) and math.isnan(value):
        return "out of memory"
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")
    return f"{value:,}" if isinstance(value, int) else value


def as_markdown(rows: list[dict]) -> str:
    """Format a table with aligned columns; precision and execution are left out where all rows have the same."""
    names = [name for name in rows[0] if name not in ("precision", "execution") or len({row[name] for row in rows}) > 1]
    table = [names, *([as_text(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(names))]
    first, *rest = widths
    lines = [
        " | ".join([f"| {cell:<{first}}", *(f"{one:>{width}}" for one, width in zip(others, rest, strict=True))]) + " |"
        for cell, *others in table
    ]
    rule = "|".join(["|" + "-" * (first + 2), *("-" * (width + 1) + ":" for width in rest)]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
