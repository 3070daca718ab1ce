"""Tables in Markdown."""

from collections.abc import Sequence

_RULES = {"l": "---", "r": "---:"}


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str | None = None) -> str:
    """A table, without a line break at its end.

    Args:
        align: ``l`` or ``r`` for every column; by default all but the first are right-aligned.
    """
    rules = [_RULES[side] for side in align or "l" + "r" * (len(header) - 1)]
    cells = ([cell.replace("|", "\\|") for cell in row] for row in (header, *rows))
    head, *body = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([head, f"| {' | '.join(rules)} |", *body])
