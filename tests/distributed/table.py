"""Write the tables of parallelism in tests/README.md from the tests that pytest collects.

    python tests/distributed/table.py [--check]

Rows and columns are the `technique` marks of tests; every entry links to its test. With --check nothing is
written, and the exit status says whether that is up to date.
"""

import contextlib
import io
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent.parent
README = PROJECT / "tests/README.md"
START, END = "<!-- parallelism: python tests/distributed/table.py -->", "<!-- end of parallelism -->"
COLUMNS = ["dense", "MoE"]


class _Collector:
    """Pytest plugin that keeps where the marked tests stand."""

    def __init__(self):
        # Row -> column -> file of the tests -> labels.
        self.rows: dict[str, dict[str, dict[str, list[str]]]] = {}

    def pytest_collection_finish(self, session):
        for item in session.items:
            for mark in item.iter_markers("technique"):
                row, column, label = mark.args
                file = str(Path(item.path).relative_to(README.parent))
                labels = self.rows.setdefault(row, {}).setdefault(column, {}).setdefault(file, [])
                if label not in labels:
                    labels.append(label)


def collect() -> dict[str, dict[str, dict[str, list[str]]]]:
    """Marked tests of the whole suite, by row and column."""
    collector, output = _Collector(), io.StringIO()
    # To import the others takes a quarter of a minute.
    marking = [path for path in (PROJECT / "tests").rglob("test_*.py") if "mark.technique(" in path.read_text()]
    with contextlib.redirect_stdout(output):
        status = pytest.main(["--collect-only", "-q", *map(str, sorted(marking))], plugins=[collector])
    if status != pytest.ExitCode.OK:
        sys.exit(f"error: pytest cannot collect the tests:\n{output.getvalue()[-2000:]}")
    return collector.rows


def tables(rows: dict[str, dict[str, dict[str, list[str]]]]) -> str:
    """Two Markdown tables: techniques by dense and MoE, layouts by the other families."""
    families = sorted({column for columns in rows.values() for column in columns} - set(COLUMNS))
    both = [row for row in rows if set(rows[row]) & set(COLUMNS)]
    others = [row for row in rows if set(rows[row]) & set(families)]
    return "\n".join([*_table("technique", both, COLUMNS, rows), "", *_table("layout", others, families, rows)])


def _table(head: str, names: list[str], columns: list[str], rows) -> list[str]:
    lines = [f"| {head} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name in names:
        cells = [_cell(rows[name].get(column, {})) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(files: dict[str, list[str]]) -> str:
    return " ".join(f"[{', '.join(labels)}]({file})" for file, labels in files.items())


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    updated = f"{before}{START}\n{tables(collect())}\n{END}{after}"
    if "--check" in sys.argv[1:]:
        sys.exit(0 if updated == text else "tests/README.md is out of date: python tests/distributed/table.py")
    README.write_text(updated, encoding="utf-8")
    print(f"wrote {README}")


if __name__ == "__main__":
    main()
