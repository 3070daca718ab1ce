"""Errors of the machine and of the network in one line: disk, permissions, memory, servers. Imports no torch."""

import errno
import os
import re

from nitp_titan.errors import first_line, UserError

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
# Messages of gloo and NCCL on a rank when another one has gone.
_LOST_RANK_TEXTS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Application timeout caused pair closure",
    "NCCL communicator was aborted",
    "remote process exited",
    "recvValue failed",
    "sendBytes failed",
)


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


def lost_rank(error: BaseException) -> bool:
    """Whether a rank has only lost another one, whose end is the reason."""
    return any(
        isinstance(one, RuntimeError) and any(text in str(one) for text in _LOST_RANK_TEXTS) for one in chain(error)
    )


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
