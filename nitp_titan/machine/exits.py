"""How every command ends: errors in one line, Ctrl-C, a closed pipe, a lost rank. Imports no torch."""

import json
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from nitp_titan.errors import UserError
from nitp_titan.machine.credentials import redact
from nitp_titan.machine.failures import chain, lost_rank, surroundings

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT."""
KEPT_OF_TRAINING = "training had not begun, or was ended at once; the same command resumes from the last checkpoint."
LATER = 10
"""Seconds added to the time that torchrun is told of a rank that ends because it lost another one. torchrun takes the
earliest error for the reason, counts in whole seconds, and notices a killed rank after its neighbours have."""
_PIPE_CLOSED = 141  # 128 + SIGPIPE: as a command ends whose reader, such as `head`, has enough.


def run(main: Callable[[], None], *, kept: str, place: str = "") -> None:
    """Run the ``main`` of a command and end the process as a command should: see `end`.

    Args:
        kept: what there is after an interruption, and how to go on.
        place: what `surroundings` names where an error names no file.
    """
    try:
        main()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        end(error, kept=kept, place=place)
        raise


def end(error: BaseException, *, kept: str, place: str = "") -> None:
    """End the process after an error that says all in one line; return after any other.

    ==================================  ======  ============================
    error                               status  stderr
    ==================================  ======  ============================
    `UserError`, `surroundings`         1       one line: the reason
    another rank has gone               1       one line
    KeyboardInterrupt                   130     one line: what is kept
    nobody reads stdout any more        141     nothing
    ==================================  ======  ============================
    """
    reader_has_gone = isinstance(error, BrokenPipeError) and _reader_has_gone()
    _drop_stdout()
    if reader_has_gone:
        sys.exit(_PIPE_CLOSED)
    if any(isinstance(one, KeyboardInterrupt) for one in chain(error)):
        # torch's checkpoints hand it on as a failure, and a clean-up may fail after it.
        interrupted(kept)
    if isinstance(error, UserError):
        exit_with(error)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and lost_rank(error):
        exit_lost()
    if line := surroundings(error, place):
        exit_with(line)


def interrupted(kept: str) -> NoReturn:
    """End the process after Ctrl-C with one line."""
    print(f"interrupted: {kept}", file=sys.stderr)
    sys.exit(INTERRUPTED)


def _reader_has_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more; any other broken pipe is the network's."""
    state = select.poll()
    state.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in state.poll(0))


def _drop_stdout() -> None:
    """Drop what could not be written to stdout: Python would try again when it ends, and print a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_with(error: UserError) -> NoReturn:
    """End the process with status 1 and the error in one line.

    Ranks meet the same mistake together: the first one of a node says it, the others end without a word.
    """
    # Messages of TorchTitan and of libraries may have several lines.
    message = redact(" ".join(f"error: {error}".splitlines()))
    tell_torchrun(message)
    sys.exit(message if _first_of_node() else 1)


def exit_lost() -> NoReturn:
    """End a rank with status 1 and one line, since another rank of its run has ended."""
    message = lost_message()
    tell_torchrun(message, delay=LATER)
    sys.exit(message)


def lost_message() -> str:
    """Message of a rank that ends because another one has ended."""
    return f"rank {os.environ.get('RANK', '0')} ends, because another rank of this run has ended."


def tell_torchrun(message: str, delay: int = 0) -> None:
    """Put the line in place of the traceback that TorchTitan's ``@record`` left for torchrun's summary.

    Args:
        delay: seconds to add to its time, so that the error of another rank comes first.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None:
        Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time()) + delay}))


def _first_of_node() -> bool:
    """Whether this rank is the first of its torchrun that ends with an error."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return True
    try:
        # Next to the folders of the ranks: <attempt>/<local rank>/error.json.
        (Path(file).parent.parent / "said").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True
