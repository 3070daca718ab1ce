"""The folder that a script writes its page into."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nitp_titan.errors import UserError
from nitp_titan.report.drawing import Drawing, write_files, write_overview


def write_page(out: Path, name: str, *, text: str, data: str, drawings: Sequence[Drawing]) -> list[Path]:
    """Write ``<name>.md``, ``<name>.json``, every plot as PNG and SVG, and all in one ``<name>.png``.

    Returns:
        The files. They appear once all of them are complete.

    Raises:
        UserError: if they cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            draft = Path(scratch)
            for one in drawings:
                write_files(one, draft)
            if drawings:
                write_overview(drawings, draft / f"{name}.png")
            (draft / f"{name}.md").write_text(text, encoding="utf-8")
            (draft / f"{name}.json").write_text(data + "\n", encoding="utf-8")
            names = sorted(path.name for path in draft.iterdir())
            for file in names:
                os.replace(draft / file, out / file)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}.") from None
    return [out / file for file in names]
