"""Processes that write the shards of a `TokenJob`, and their lines of the log."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing import connection

from nitp_titan.data.tokens.folder import Shard
from nitp_titan.data.tokens.shards import load_tokenizer, TokenJob
from nitp_titan.errors import UserError
from nitp_titan.progress import Progress

SECONDS_BETWEEN_LINES = 10.0


def write_shards(job: TokenJob, num_workers: int, log: Callable[[str], None]) -> None:
    """Write the shards that are not done yet.

    Args:
        job: which shards.
        num_workers: processes, as far as there are shards for them.
        log: takes lines of the log.

    Raises:
        UserError: with the reason of the first worker that failed; the others are ended.
    """
    job.clear()
    progress = _Progress(job)
    if progress.done:
        log(f"resumes: {len(progress.done)} of {job.num_shards} shards are there")
    pending = [shard for shard in range(job.num_shards) if shard not in progress.done]
    if job.num_documents is None and job.num_shards < num_workers:
        files = "1 file" if job.num_shards == 1 else f"{job.num_shards} files"
        log(f"'{job.entry.name}' is streamed, {files} for {num_workers} workers: only so many of them read")
    # Not forked from here: this process has threads, and perhaps connections.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    taken, errors = context.Value("q", 0), context.SimpleQueue()
    workers = [
        context.Process(target=_work, args=(job, pending, taken, errors), daemon=True)
        for _ in range(min(num_workers, len(pending)))
    ]
    try:
        for worker in workers:
            worker.start()
        while running := _running(workers, errors):
            connection.wait(running, timeout=progress.seconds_to_line())
            progress.log(log)
    finally:
        for worker in workers:
            # Not those that an interruption kept from starting.
            if worker.pid is not None:
                worker.terminate()
                worker.join()


def _running(workers: list, errors) -> list[int]:
    """Sentinels of the workers that are not at their end; UserError if one has failed."""
    codes = [worker.exitcode for worker in workers]
    for code in codes:
        if code:
            raise UserError(_failure(code, errors))
    return [worker.sentinel for worker, code in zip(workers, codes) if code is None]


def _failure(exitcode: int, errors) -> str:
    if not errors.empty():
        return errors.get()
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"a worker was ended by {name}, as where memory is full; the same command resumes."
    return "a worker failed; its message is above, and the same command resumes."


def _work(job: TokenJob, pending: list[int], taken, errors) -> None:
    """Write one shard after the other, each the next that no worker has taken, until none is left."""
    # A key's interrupt reaches all processes; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.disable(logging.WARNING)
    try:
        tokenizer = load_tokenizer(job.tokenizer)
        while (shard := _next(pending, taken)) is not None:
            job.write(shard, tokenizer)
    except UserError as error:
        errors.put(str(error))
        sys.exit(1)
    except OSError as error:
        errors.put(f"--out {job.folder} cannot be written: {error.strerror}; the same command resumes.")
        sys.exit(1)


def _next(pending: list[int], taken) -> int | None:
    with taken.get_lock():
        index = taken.value
        taken.value += 1
    return pending[index] if index < len(pending) else None


def _end_with_parent() -> None:
    """A killed command leaves no worker behind, which would write beside those of the next."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are started by another process"
    connection.wait([parent.sentinel])
    os._exit(1)


class _Progress:
    """Documents and tokens on the disk, and the speed since the start."""

    def __init__(self, job: TokenJob):
        self._job = job
        self.done: dict[int, Shard] = {}
        self._look()
        self._first = self._counts()
        # The documents of a stream are known at its end only; its shards are.
        self._unit, total = (0, job.num_shards) if job.num_documents is None else (1, job.num_documents)
        self._progress = Progress(total, done=self._first[self._unit], seconds_between_lines=SECONDS_BETWEEN_LINES)

    def _look(self) -> None:
        for shard in range(self._job.num_shards):
            if shard not in self.done and (found := self._job.done(shard)):
                self.done[shard] = found

    def _counts(self) -> tuple[int, int, int]:
        """Shards, documents and tokens."""
        begun = [self._job.begun(shard) for shard in range(self._job.num_shards) if shard not in self.done]
        documents = sum(found.documents for found in self.done.values()) + sum(found[0] for found in begun)
        tokens = sum(found.tokens for found in self.done.values()) + sum(found[1] for found in begun)
        return len(self.done), documents, tokens

    def seconds_to_line(self) -> float:
        return self._progress.seconds_to_line()

    def log(self, log: Callable[[str], None]) -> None:
        """A line, if it is time for one."""
        if not self._progress.line_is_due():
            return
        self._look()
        shards, documents, tokens = now = self._counts()
        self._progress.done = now[self._unit]
        if now == self._first:
            # The workers are still starting.
            return
        parts = [
            f"shard {shards}/{self._job.num_shards}",
            f"documents {documents:,}",
            f"tokens {tokens:,}",
            f"{(tokens - self._first[2]) / self._progress.seconds:,.0f} tok/s",
            self._progress.left(),
        ]
        log("  ".join(part for part in parts if part))
