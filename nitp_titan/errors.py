"""How every command ends: errors of users and of the machine in one line, Ctrl-C, a closed pipe. Imports no torch."""

import difflib
import errno
import json
import os
import re
import reprlib
import select
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT."""

KEPT_OF_TRAINING = "training had not begun, or was ended at once; the same command goes on from the last checkpoint."

LATER = 10
"""Seconds added to the time that torchrun is told of a rank that ends because it lost another one. torchrun takes the
earliest error for the reason, counts in whole seconds, and notices a killed rank after its neighbours have."""

_PIPE_CLOSED = 141  # 128 + SIGPIPE: as a command ends whose reader, such as `head`, has enough.

# Errors of the machine, and what they mean to a user.
_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this file system or `ulimit -f` allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "the operation is not permitted",
    errno.ENOTDIR: "a part of this path is not a folder",
    errno.EISDIR: "this is a folder",
    errno.EEXIST: "a file of this name is in the way",
    errno.ENAMETOOLONG: "the file name is too long",
    errno.ELOOP: "the links go round in a circle",
    errno.EMFILE: "too many open files; raise `ulimit -n`",
    errno.ENFILE: "too many open files on this machine",
    errno.EIO: "the disk reports an input/output error",
    errno.ESTALE: "the network file system has lost this file",
}
# They say enough where no file is named.
_WITHOUT_FILE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO}
_UNREACHABLE = {
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.ETIMEDOUT,
}
# Rust's and Python's, where a library has made text of them.
_ERRNO_IN_TEXT = re.compile(r"(?:\(os error |\[errno )(\d+)[)\]]", re.IGNORECASE)
_NETWORK_PACKAGES = {"huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "aiohttp"}
_STATUS_TEXTS = {
    401: "access denied (401): it does not exist, or needs HF_TOKEN",
    403: "access denied (403): HF_TOKEN has no access to it",
    404: "there is no such file or repository (404)",
    429: "it asks to wait (429, too many requests); try again later",
}
_NO_CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory"
# What gloo and NCCL say to a rank when another one has gone.
_LOST_RANK_TEXTS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Application timeout caused pair closure",
    "NCCL communicator was aborted",
    "remote process exited",
    "recvValue failed",
    "sendBytes failed",
)


class UserError(ValueError):
    """A mistake in a recipe, a train config or a flag: one line says all, no traceback.

    Args:
        message: the place, the value and the way out.
        table, key: the setting, if it is one, so that a reader of TOML can name the file.
    """

    def __init__(self, message: str, *, table: str | None = None, key: str | None = None):
        super().__init__(message)
        self.table, self.key = table, key


@contextmanager
def at(path: str | os.PathLike) -> Iterator[None]:
    """Give an OSError its file name where it has none: a write to an open file says only that the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


# Packages of TorchTitan, and the table whose settings they refuse.
_TABLES = {
    "torchtitan.components.checkpointer": "checkpoint",
    "torchtitan.components.loss": "loss",
    "torchtitan.components.metrics": "metrics",
    "torchtitan.components.optimizer": "optimizer",
    "torchtitan.components.optimizer.lr_scheduler": "lr_scheduler",
    "torchtitan.components.quantization": "float8",
    "torchtitan.components.validate": "validator",
    "torchtitan.distributed": "parallelism",
    "torchtitan.distributed.activation_checkpoint": "activation_checkpoint",
    "torchtitan.distributed.compile": "compile",
    "torchtitan.tools.profiler": "profiler",
}
# Tables without a package of their own.
_OTHER_TABLES = {"training", "debug", "comm", "model"}
_SETTING = re.compile(r"\b([a-z_]+)\.([a-z_]+)\b")


@contextmanager
def upstream_refusals() -> Iterator[None]:
    """Turn what TorchTitan refuses or asserts of the settings into a `UserError` with their table.

    Errors that are raised outside of TorchTitan, and assertions without a message, stay as they are.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, AssertionError, NotImplementedError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        module = frame.f_globals.get("__name__", "")
        if not module.startswith("torchtitan.") or not str(error):
            raise
        # A message may name the setting as flags do.
        named = _SETTING.search(str(error))
        table, key = named.groups() if named else (None, None)
        place = ""
        if table not in {*_TABLES.values(), *_OTHER_TABLES}:
            names = [name for name in _TABLES if module == name or module.startswith(f"{name}.")]
            table, key = (_TABLES[max(names, key=len)], None) if names else (None, None)
            place = f"[{table}] " if table else ""
        raise UserError(f"{place}{error}", table=table, key=key) from error


def surroundings(error: BaseException, place: str = "", *, network: bool = True) -> UserError | None:
    """The cause of an error in one line, if it is the machine or the network; None for every other error.

    Looks at the error, what caused it and what it was raised from: libraries wrap the reason ("An error occurred while
    generating the dataset").

    Args:
        error: any exception; disk, permissions, caches, memory and network are known.
        place: what was read or written, where the error names no file.
        network: whether what a server answers counts, for example that it has nothing of this name.
    """
    causes = chain(error)
    for cause in causes:
        number = cause.errno if isinstance(cause, OSError) else None
        if line := _line(cause, number, place, network):
            return UserError(line)
    # Some libraries hand on the text alone.
    for cause in causes:
        if (written := _ERRNO_IN_TEXT.search(str(cause))) and (line := _line(cause, int(written[1]), place, network)):
            return UserError(line)
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message; libraries add long help, or have no message."""
    return next(iter(str(error).strip().splitlines()), "")


def explained(error: BaseException, place: str, message: str) -> UserError:
    """An error of a library in one line: `surroundings`, or else ``message`` with the error's type and first line."""
    return surroundings(error, place) or UserError(f"{message}: {type(error).__name__}: {first_line(error)}")


class Away(UserError):
    """A server that does not answer now, and may answer later."""


def away(error: BaseException, place: str) -> Away | None:
    """Why a server does not answer for a while: no connection, too many requests, an error of its own.

    Args:
        error: any exception; the result is None for one that waiting does not mend.
        place: what was asked for.
    """
    for cause in chain(error):
        names = {kind.__name__ for kind in type(cause).__mro__}
        if "OfflineModeIsEnabled" in names:
            return None
        status = getattr(getattr(cause, "response", None), "status_code", None)
        line = _network_line(cause, names, getattr(cause, "errno", None), str(cause), place)
        if line is None and isinstance(cause, (ConnectionError, TimeoutError)):
            # Of `datasets`, which has tried again and again by then.
            line = f"{place}: it does not answer ({type(cause).__name__}: {first_line(cause)})."
        if line is not None and (status is None or status in (408, 429) or status >= 500):
            return Away(line)
    return None


def chain(error: BaseException) -> list[BaseException]:
    """The error, then what it was raised from or was met while handling, each once, outermost first."""
    found, waiting = [], [error]
    while waiting:
        one = waiting.pop(0)
        if any(one is other for other in found):
            continue
        found.append(one)
        # torch's CheckpointException holds a pair of error and traceback for every rank that failed.
        failures = getattr(one, "failures", None)
        failed = [value[0] for value in failures.values()] if isinstance(failures, dict) else []
        linked = [one.__cause__, None if one.__suppress_context__ else one.__context__]
        members = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        waiting += [other for other in (*failed, *members, *linked) if isinstance(other, BaseException)]
    return found


def _line(error: BaseException, number: int | None, place: str, network: bool) -> str | None:
    names, text = {kind.__name__ for kind in type(error).__mro__}, str(error)
    if number == errno.ENOMEM or names & {"MemoryError", "OutOfMemoryError"} or _NO_CPU_MEMORY in text:
        device = "the GPU" if "CUDA" in text else "this machine"
        return f"{place + ': ' if place else ''}the memory of {device} does not suffice; use smaller batches or models."
    # Of a file that is renamed, what is in its way.
    file = str(getattr(error, "filename2", None) or getattr(error, "filename", None) or place)
    if number in _CAUSES and (file or number in _WITHOUT_FILE):
        if file and _in_cache(file):
            return f"the cache {file} cannot be used: {_CAUSES[number]}. HF_HOME names another folder for it."
        return f"{file} cannot be used: {_CAUSES[number]}." if file else f"{_CAUSES[number]}."
    if isinstance(error, RuntimeError) and text.startswith("Could not determine home directory"):
        return "there is no home folder for caches; set HF_HOME to a folder."
    return _network_line(error, names, number, text, place) if network else None


def _in_cache(file: str) -> bool:
    variables = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")
    folders = [os.environ[name] for name in variables if os.environ.get(name)]
    folders.append(os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"))
    path = os.path.abspath(file)
    return any(os.path.commonpath([path, folder]) == folder for folder in map(os.path.abspath, folders))


def _network_line(error: BaseException, names: set[str], number: int | None, text: str, place: str) -> str | None:
    package = type(error).__module__.partition(".")[0]
    if "OfflineModeIsEnabled" in names:
        return f"{place or 'the Hugging Face hub'} is needed, and HF_HUB_OFFLINE forbids to ask for it."
    if package not in _NETWORK_PACKAGES and number not in _UNREACHABLE and "gaierror" not in names:
        return None
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        # Of a name that the hub's library does not take.
        return None
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = _STATUS_TEXTS.get(status) or (f"it answers with an error ({status})" if status else "it does not answer")
    first = first_line(error)
    detail = f" ({type(error).__name__}: {first[:200]})" if first and status is None else ""
    return f"{place or 'the network or the Hugging Face hub'}: {reason}{detail}."


def lost_rank(error: BaseException) -> bool:
    """Whether a rank has only lost another one, whose end is the reason."""
    return any(
        isinstance(one, RuntimeError) and any(text in str(one) for text in _LOST_RANK_TEXTS) for one in chain(error)
    )


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
    # It imports this module.
    from nitp_titan.credentials import redact

    # What TorchTitan and libraries say may have several lines.
    message = redact(" ".join(f"error: {error}".splitlines()))
    tell_torchrun(message)
    sys.exit(message if _first_of_node() else 1)


def exit_lost() -> NoReturn:
    """End a rank with status 1 and one line, since another rank of its run has ended."""
    message = lost_message()
    tell_torchrun(message, delay=LATER)
    sys.exit(message)


def lost_message() -> str:
    """What a rank says that ends because another one has."""
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


class _Shown(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write out an integer of thousands of digits.
        return repr(value) if value.bit_length() <= 64 else f"an integer of {value.bit_length()} bits"


_shown = _Shown()
_shown.maxstring = _shown.maxother = 100


def shown(value: object) -> str:
    """``repr`` of a setting, cut where it is long: an error is one line."""
    return _shown.repr(value)


def nearest(word: str, choices: list[str]) -> str:
    """``" Did you mean 'x'?"`` for the choice closest to ``word``, or the list of choices."""
    # A mistyped letter scores above 0.6; so does a key with its words in another order.
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Choose from: {', '.join(sorted(choices))}." if choices else ""
