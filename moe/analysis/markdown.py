"""Numbers and tables as Markdown."""

from collections.abc import Sequence
from typing import Any


def number(value: Any) -> str:
    """Whole numbers with separators, others to 4 digits after the point; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, words_last: bool = False) -> str:
    """The first column to the left, and the last one if it holds words; the others to the right."""
    align = ["---", *["---:"] * (len(header) - 1)]
    align[-1] = "---" if words_last else align[-1]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, align, *rows))
