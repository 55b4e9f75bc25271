#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["click>=8.1"]
# ///
"""queuectl: a background job queue for commands, in one file, over one SQLite database.

    queuectl enqueue -- make report      # the job is on disk once its id is printed
    queuectl worker start --count 4      # start four processes that outlive the terminal
    queuectl status                      # show whether the queue works, and the command that helps

Guarantees:

1. The table `jobs` is the truth. States change only inside transactions of the store. A change
   that ends an attempt names its worker and its start, so a late one changes nothing.
2. A worker is alive while its process holds the lock on `bells/<worker>.life` (on Windows: a
   named event). The system drops it with the process. Neither a process id alone nor elapsed
   time proves life or death.
3. The job of a dead worker is retried only after all processes of the lost attempt have ended.
   They are known by the run number (RLIMIT_LOCKS) and the run tag (environment) that they
   inherit, by the command on record, and by their open log (device and inode); on Windows by
   their job object. While one cannot be ended, the job waits.
4. A worker that cannot record a result keeps it and tries again. It does not run the command
   again for that reason.

The file, from top to bottom; a section uses only those above it:

    errors          the exceptions and their exit codes
    text            values to words, and words to values
    model           states, jobs, attempts, and the rows that sections exchange
    fields          valid input, and the command line options for it
    templates       many jobs from one line: items, placeholders, quoting for a shell; pure
    settings        typed configuration, and the retry policy
    views           jobs and counts to text or JSON; pure
    schema          migrations, append-only
    database        connection, transactions, busy waiting, durability; all of sqlite3
    store           one class a noun (jobs, workers, queues, ...); all SQL
    platform        every difference between systems: spawn, end a tree, wait, wake
    home            the home on disk, the environment, the terminal
    attempts        one attempt, from command to outcome; logs and hooks
    worker          claim, run, record; recovery of dead workers
    control         starting and stopping workers, cancelling, waiting, following
    commands        the command line; all of click
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import enum
import errno
import functools
import itertools
import json
import math
import operator
import os
import re
import signal
import sqlite3
import stat
import sys
import time
from array import array as Array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, BinaryIO, Literal, NamedTuple, TextIO, TypeVar, cast

try:
    import click
except ModuleNotFoundError:
    sys.exit("Error: queuectl needs click, which this Python does not have; install it: python3 -m pip install click")

__version__ = "1.1.0"

WAIT_REPORT_S = 1.0  # report interval of a command that waits for workers
END_POLL_S = 1.0  # pause between two tries to end processes that survived the first
POLL_S = 0.25  # poll interval of a worker while its job runs
DUTY_S = 1.0  # interval of the duties of a worker; with n workers an idle one polls every n intervals,
MAX_IDLE_POLL_S = 10.0  # but at least this often
MAX_RECOVERY_PAUSE_S = 10.0  # longest pause between two tries to recover a dead worker
HOOK_TIMEOUT_S = 30.0  # longest run of a hook
BUSY_TIMEOUT_S = 30.0  # busy timeout of a command: another program holds the lock on the database
WORKER_BUSY_TIMEOUT_S = 5.0  # busy timeout of a worker, which then tries again
BUSY_PAUSES_S = (0.0002, 0.004)  # first and longest pause between two tries for a busy lock; it doubles
WRITE_GATE_S = 0.25  # longest wait of a worker at the write gate; then it writes without it
PAGE_JOBS = 1000  # jobs that a command on many changes in one transaction
CASCADE_JOBS = 200  # jobs below one that ended badly that fail in one transaction
PAGE_PAUSE_S = 0.01  # pause between two such transactions, for other writers
MOST_PROMOTED = 50  # jobs that came due and become ready in one claim; of more only the best
FLOOD_PROMOTED = 2  # jobs of each queue that become ready in one claim where more have come due
RESTORE_TRIES = 5  # tries of a restore while others enqueue
WAIT_SHARE = 10  # pause of a command that waits for many jobs, in times of what counting them took
WAIT_POLL_S = 0.02  # poll interval of a command that waits
LIMITED_POLL_S = 0.02  # poll interval of an attempt whose output is limited
LOG_BLOCK = 1 << 20  # bytes of a log that are read at a time; the longest line that is folded
MIN_CUT_BYTES = 4096  # least bytes of a cut while the command writes; more than the note about it takes
CUT_TRIES = 20  # most passes that move appended output while a log is cut
SEAL_BYTES = 64  # bytes of a log that show, compared later, whether its command has emptied it
WATCHED_SLOTS = 16  # workers that watch their spool; Linux allows a user 128 watchers (inotify instances) in all
FOLLOW_POLL_S = 0.1  # poll interval of `logs --follow`
PAGE_BYTES = 2048  # page size; one step of a job changes six or seven pages, and the WAL stores whole pages
CHECKPOINT_CHANCE = 1 / 1500  # checkpoint probability of a worker's step: about 20 MB of WAL with any number of workers
WORKER_CHECKPOINT_PAGES = 32_000  # WAL pages at which SQLite runs a checkpoint itself, inside a step
BUCKETS_S = (0.01, 0.1, 1, 10, 60, 600, 3600, 86400)  # upper bounds of the histograms of wait and run time
WORKER_CACHE_KIB = 512  # page cache of a worker; it reads few pages, in a long queue too
LIST_ROWS = 100  # default row limit of a table
LOW_DISK_BYTES = 100 << 20  # free space below which `doctor` warns
MAX_COMMAND_BYTES = 128 * 1024
MAX_ARRAY = 10_000_000  # most numbers of one `enqueue --array`
MAX_DELAY_S = 100 * 366 * 86_400  # longest delay of a job; the moment that results must have a date
MAX_INTEGER = 2**63 - 1  # the largest integer of the database
MAX_SECONDS = 253_402_300_799  # 9999-12-31, the last day of datetime
EX_NOT_FOUND, EX_NOT_EXECUTABLE, EX_TEMPFAIL, EX_TIMED_OUT, EX_INTERRUPTED = 127, 126, 75, 124, 130


# ======================================================================== errors


class QueueError(Exception):
    """Something could not be done: said in one line on stderr. Nothing has changed unless the line says so."""

    exit_code = 1
    effect = ""  # what is known about changes: set by the transaction that failed, or by who made one before

    @property
    def reason(self) -> str:
        """What went wrong, without what is known about changes."""
        return super().__str__()

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.reason, self.effect)))


class BadInput(QueueError):
    """The input is not valid."""

    exit_code = 2


class NotFound(QueueError):
    """No job, worker or key has that name."""


class StoreError(QueueError):
    """The database cannot be used."""


class StoreBusy(StoreError):
    """Another program held the lock on the database for longer than the busy timeout."""


class Damaged(StoreError):
    """The database holds what queuectl would never have stored."""


class StoreUncertain(StoreError):
    """A commit failed, and it cannot be told whether it holds."""

    effect = "whether it was stored is not known"


class Conflict(StoreError):
    """A row violates a constraint of the schema: another job has that key or id."""


# ======================================================================== text

_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:ms|[smhdw])?")
_UNIT_S = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def printable(text: str) -> str:
    """Text with its control characters escaped, so that it cannot drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def cut(text: str, most: int) -> str:
    """The text, cut to `most` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def gist(text: str, most: int = 60) -> str:
    """The first clause of an error or a reason, cut to the room that a table has."""
    return cut(text.partition("; ")[0], most)


def number_of(count: int, what: str) -> str:
    """`1 job`, `2 jobs`."""
    return f"{count} {what}{'s' * (count != 1)}"


def plain(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of an error about an unknown word: the known word that is most like it."""
    import difflib  # most commands never need it, and importing it takes time

    close = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def command_line(command: str | list[str]) -> str:
    """A command as one would type it."""
    import shlex

    return command if isinstance(command, str) else shlex.join(command)


def iso_time(ms: int | None) -> str | None:
    """A time in ISO 8601, UTC, with milliseconds, as JSON shows it."""
    if ms is None:
        return None
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
    within = min(max(0, ms), MAX_SECONDS * 1000)  # a damaged row may hold any number
    moment = epoch + datetime.timedelta(milliseconds=within)  # fromtimestamp fails on Windows from the year 3001 on
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def duration(seconds: float) -> str:
    """A duration in its two largest units."""
    if seconds < 10 or seconds == math.inf:
        return f"{seconds:.3g} s"
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    parts: list[str] = []
    rest = round(seconds)
    for name, size in units:
        if rest >= size and len(parts) < 2:
            parts.append(f"{rest // size} {name}")
            rest %= size
    return " ".join(parts)


def ago(ms: int | None, now: int) -> str:
    """A time relative to now: `5 m ago`, `in 5 m`."""
    if ms is None:
        return "-"
    away = abs(now - ms) / 1000
    size, name = next((s, n) for s, n in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")) if away >= s or s == 1)
    return f"{int(away / size)} {name} ago" if ms <= now else f"in {math.ceil(away / size)} {name}"


def parse_number(text: str) -> int | float:
    """The number in a word of the command line."""
    try:
        return int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else float(text)
    except ValueError:
        raise BadInput(f"must be a number, not {text!r}") from None


def parse_duration(text: str) -> int | float:
    """Seconds, from `90`, `90s`, `10m`, `1h30m` or `7d`."""
    parts = _DURATION.findall(text.strip().lower())
    if not parts or "".join(parts) != text.strip().lower() or (len(parts) > 1 and not parts[-1][-1].isalpha()):
        raise BadInput(f"must be a duration like 90, 90s, 10m, 1h30m or 7d, not {text!r}")
    units = [(part, part.lstrip("0123456789.")) for part in parts]
    total = sum((float(part.removesuffix(unit)) * _UNIT_S[unit or "s"] for part, unit in units), 0.0)
    return int(total) if total.is_integer() else total


def parse_moment(text: str) -> int | float | str:
    return parse_number(text) if re.fullmatch(r"\d+(\.\d*)?", text) else text


_CLOCK = re.compile(r"(?:(today|tomorrow|(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*)\s+)?(\d\d?):(\d\d)(?::(\d\d))?", re.I)
_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


def clock_time(text: str, now: int) -> int | None:
    """The moment (ms) that a clock time means at `now`, by local time: `23:00`, `tomorrow 6:30`, `mon 8:00`.

    It is the next one, so later than `now`, but for `today`. None where the text is no clock time.
    """
    found = _CLOCK.fullmatch(text.strip())
    if not found:
        return None
    day, hour, minute, second = found.groups()
    today = datetime.datetime.fromtimestamp(now // 1000)
    try:
        at = datetime.time(int(hour), int(minute), int(second or 0))
        offsets = _days_ahead(day.lower() if day else None, today.weekday())
        moments = [_local_ms(datetime.datetime.combine(today.date() + datetime.timedelta(n), at), now) for n in offsets]
    except (ValueError, OverflowError, OSError):
        return None
    return next((moment for moment in moments if moment > now), moments[-1])


def _days_ahead(day: str | None, weekday: int) -> Sequence[int]:
    """The days, counted from today, on which a clock time may lie; ValueError for a word that is no weekday."""
    if day is None:
        return (0, 1)
    if day in ("today", "tomorrow"):
        return (0,) if day == "today" else (1,)
    ahead = next((n for n in range(7) if day in (_WEEKDAYS[(weekday + n) % 7], _WEEKDAYS[(weekday + n) % 7][:3])), None)
    if ahead is None:
        raise ValueError(day)
    return (ahead, ahead + 7)


def _local_ms(local: datetime.datetime, now: int) -> int:
    """The moment of a local time. Of one that a change of clocks repeats, the second where the first has passed.

    One that the change skips lies as far behind it as it would have been without the change.
    """
    first, second = (round(local.replace(fold=fold).timestamp() * 1000) for fold in (0, 1))
    return second if first <= now < second else first


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise BadInput("a field is named twice")
    return fields


def _no_constant(word: str) -> Any:
    raise BadInput(f"{word} is not a JSON number")


_decode_json = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant).decode


def parse_job(text: str) -> Any:
    """The value of a JSON text. BadInput names the position of a syntax error."""
    try:
        return _decode_json(text)
    except json.JSONDecodeError as error:
        eaten = "{" in text and ":" in text and '"' not in text
        hint = "; the shell has eaten its quotes: use `enqueue -- COMMAND`" if eaten else ""
        near = printable(text[max(0, error.pos - 10) : error.pos + 20])
        what = error.msg.removesuffix(" at")
        raise BadInput(f"not valid JSON, {what} at character {error.pos + 1} (near {near!r}){hint}") from None
    except (RecursionError, ValueError):
        raise BadInput("not valid JSON: nested too deep, or a number too long") from None


# ======================================================================== model


class State(str, enum.Enum):
    """The state of a job; design.md has the diagram."""

    PENDING = "pending"  # it waits for a worker, a time, a parent or its release
    PROCESSING = "processing"  # an attempt is running
    COMPLETED = "completed"  # an attempt succeeded
    FAILED = "failed"  # an attempt failed and a retry is due
    DEAD = "dead"  # no retry is left, or none is allowed: it is in the dead letter queue
    CANCELLED = "cancelled"  # a user cancelled it


WAITING = (State.PENDING, State.FAILED)
OPEN = (State.PENDING, State.PROCESSING, State.FAILED)  # in the order of the index of keys, which SQLite uses only so
HOPELESS = (State.DEAD, State.CANCELLED)  # a job that depends on such a one can never run
ENDED = (State.COMPLETED, *HOPELESS)
EDITABLE = (*WAITING, State.DEAD)


class EndReason(enum.Enum):
    """Why an attempt ended."""

    EXITED = "exited"  # its command exited, or was killed by a signal that we did not send
    NOT_STARTED = "not started"  # its command could not be started
    TIMED_OUT = "timed out"
    LOST = "lost"  # its worker died
    GIVEN_BACK = "given back"  # its worker was told to stop at once
    CANCELLED = "cancelled"


# The results of an attempt that `metrics` counts: where its command exited, whether that completed the job.
RESULTS = ("completed", "failed", *(reason.value.replace(" ", "_") for reason in EndReason
                                    if reason is not EndReason.EXITED))  # fmt: skip


class Job(NamedTuple):
    """One row of `jobs`, in the order of its columns. Times are in milliseconds since 1970, UTC."""

    seq: int  # order of enqueueing; never reused
    id: str
    command: str | list[str]  # a line for the shell, or a program and its arguments
    priority: int
    max_retries: int | None  # None here and in the next two: the setting holds (job_timeout for timeout)
    timeout: float | None  # seconds
    backoff_base: float | None
    run_at: int | None
    queue: str
    tag: str | None
    key: str | None
    cwd: str
    env: dict[str, str] | None
    after: list[str] | None
    hold: bool
    on_lost: str
    ok_codes: list[int] | None
    no_retry_codes: list[int] | None
    snooze: bool
    state: State
    attempts: int  # attempts that count, with the one that is running
    blockers: int  # parents that have not completed
    due_at: int | None  # it does not start before; None once that has passed
    failed_parent: int | None  # seq of the parent whose end made it dead
    cancelling: bool  # its worker is to end the running attempt and cancel the job
    created_at: int
    updated_at: int
    started_at: int | None  # of the newest attempt
    finished_at: int | None  # when the job ended
    exit_code: int | None  # of the newest attempt
    error: str | None
    worker: int | None  # of the newest attempt

    @property
    def run_tag(self) -> str:
        """The mark of this attempt in the environment of its processes; unique in this home."""
        return f"{self.seq}.{self.started_at}"


COLUMNS = Job._fields
JSON_COLUMNS = ("command", "env", "after", "ok_codes", "no_retry_codes")
_JSON_PLACES = tuple(COLUMNS.index(name) for name in JSON_COLUMNS)
_FLAG_PLACES = tuple(COLUMNS.index(name) for name in ("hold", "snooze", "cancelling"))
_STATE_PLACE = COLUMNS.index("state")
_from_json = json.JSONDecoder().raw_decode  # faster than json.loads, which also skips blanks at both ends

_LAST_MS = MAX_SECONDS * 1000
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?")  # of a job, a queue, a tag

# The types that each kind of column may hold, and what stands in for any other.
_INTEGER: tuple[frozenset[type], Any] = (frozenset({int}), 0)
_INTEGER_OR_NULL: tuple[frozenset[type], Any] = (frozenset({int, type(None)}), None)
_REAL_OR_NULL: tuple[frozenset[type], Any] = (frozenset({float, int, type(None)}), None)  # RETURNING has 0 for 0.0
_WORDS: tuple[frozenset[type], Any] = (frozenset({str}), "?")
_WORDS_OR_NULL: tuple[frozenset[type], Any] = (frozenset({str, type(None)}), None)

_KINDS = (
    dict.fromkeys(COLUMNS, _INTEGER)
    | dict.fromkeys(("id", "command", "queue", "cwd", "on_lost", "state"), _WORDS)
    | dict.fromkeys(("tag", "key", "env", "after", "ok_codes", "no_retry_codes", "error"), _WORDS_OR_NULL)
    | dict.fromkeys(("timeout", "backoff_base"), _REAL_OR_NULL)
    | dict.fromkeys(
        ("max_retries", "run_at", "due_at", "failed_parent", "started_at", "finished_at", "exit_code", "worker"),
        _INTEGER_OR_NULL,
    )
)


def job_from_row(row: Sequence[Any]) -> Job:
    """The job in a row of COLUMNS. Damaged where the row holds none."""
    if misfit := _misfit(tuple(map(type, row))):
        raise Damaged(f"its row is damaged: {misfit} has a value of the wrong type")
    values = list(row)
    try:
        for place in _JSON_PLACES:
            if values[place] is not None:
                values[place], _ = _from_json(values[place])
        values[_STATE_PLACE] = State(values[_STATE_PLACE])
    except (ValueError, RecursionError) as error:
        raise Damaged(f"its row is damaged: {printable(str(error))}") from None
    for place in _FLAG_PLACES:
        values[place] = bool(values[place])
    job = Job._make(values)
    if not _is_plain(job) and (wrong := _wrong_value(job)):
        raise Damaged(f"its row is damaged: {wrong} has a value that it cannot have")
    return job


@functools.lru_cache(256)  # rows are of few shapes, and a worker looks at one for each job
def _misfit(types: tuple[type, ...]) -> str | None:
    """The first column whose value is of a type that it cannot have."""
    return next((name for name, kind in zip(COLUMNS, types, strict=True) if kind not in _KINDS[name][0]), None)


def _is_words(value: Any) -> bool:
    """Is it a list of texts, one at least?"""
    return isinstance(value, list) and bool(value) and all(type(word) is str and _is_unicode(word) for word in value)


def _is_unicode(text: str) -> bool:
    """Is it text, and not bytes that were taken for it?"""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _is_plain(job: Job) -> bool:
    """Is it as most jobs are, which need no closer look?"""
    return (
        job.env is None and job.after is None and job.ok_codes is None and job.no_retry_codes is None
        and job.timeout is None and job.backoff_base is None
        and type(job.command) is str and f"{job.command}{job.cwd}{job.key}".isascii()
        and 0 <= job.created_at <= job.updated_at <= _LAST_MS and 0 <= (job.started_at or 0) <= job.updated_at
        and job.run_at is None and job.due_at is None and job.finished_at is None
        and f"{job.queue}{job.tag}".isprintable() and NAME.fullmatch(job.id) is not None
    )  # fmt: skip


def _wrong_value(job: Job) -> str | None:
    """The first field whose value no job can have, of those that could harm a worker or a terminal."""
    if not NAME.fullmatch(job.id):  # it names the log
        return "id"
    if not job.queue.isprintable() or not (job.tag is None or job.tag.isprintable()):
        return "queue or tag"
    if not _is_words([job.command] if type(job.command) is str else job.command):
        return "command"
    if job.timeout is not None and not 0 <= job.timeout < math.inf:
        return "timeout"
    if job.backoff_base is not None and not 0 < job.backoff_base < math.inf:
        return "backoff_base"
    if job.env is not None and not (type(job.env) is dict and _is_words(["", *job.env.values()])):
        return "env"
    if not _is_words([job.cwd, job.key or "", *(job.env or ())]):
        return "cwd, key or env"
    if any(codes is not None and type(codes) is not list for codes in (job.after, job.ok_codes, job.no_retry_codes)):
        return "after, ok_codes or no_retry_codes"
    moments = (job.created_at, job.updated_at, job.run_at, job.due_at, job.started_at, job.finished_at)
    return None if all(0 <= (moment or 0) <= _LAST_MS for moment in moments) else "a moment"


def readable_job(row: Sequence[Any]) -> Job:
    """The same for those who show it: what is damaged is left out, and the job's error says so."""
    try:
        return job_from_row(row)
    except Damaged as error:
        values = dict(zip(COLUMNS, fitting(row, [_KINDS[name] for name in COLUMNS]), strict=True))
        for name in ("env", "after", "ok_codes", "no_retry_codes", "timeout", "backoff_base"):
            values[name] = None
        for name in ("id", "queue", "command", "tag"):
            values[name] = values[name] and printable(values[name])
        for name in (name for name in COLUMNS if name.endswith("_at")):
            values[name] = values[name] and min(max(0, values[name]), MAX_SECONDS * 1000)
        known = values["state"] in [state.value for state in State]
        return Job(**values | {"state": State(values["state"]) if known else State.DEAD, "error": str(error)})


def fitting(row: Sequence[Any], kinds: Sequence[tuple[frozenset[type], Any]]) -> list[Any]:
    """The values of a row, each that is of another type than its column's replaced."""
    return [value if type(value) in legal else blank for value, (legal, blank) in zip(row, kinds, strict=True)]


class Attempt(NamedTuple):
    """The record of an attempt that has ended."""

    number: int  # the job's `attempts` while it ran
    worker: int
    started_at: int
    ended_at: int
    exit_code: int | None
    signal: int | None
    ended_by: str  # the value of an EndReason
    error: str | None
    max_rss: int | None  # bytes, of its largest process
    cpu_s: float | None
    log_start: int | None  # where its output begins and ends in the log, bytes
    log_end: int | None


_ATTEMPT_KINDS = (
    *[_INTEGER] * 4, *[_INTEGER_OR_NULL] * 2, _WORDS, _WORDS_OR_NULL, _INTEGER_OR_NULL, _REAL_OR_NULL,
    *[_INTEGER_OR_NULL] * 2,
)  # fmt: skip


def attempt_from_row(row: Sequence[Any]) -> Attempt:
    """The attempt that a row holds; what is damaged is left out."""
    return Attempt._make(fitting(row, _ATTEMPT_KINDS))


class Outcome(NamedTuple):
    """How an attempt ended."""

    end: EndReason
    exit_code: int | None = None
    signal: int | None = None
    error: str | None = None
    max_rss: int | None = None  # bytes
    cpu_s: float | None = None
    log_start: int | None = None
    log_end: int | None = None


class Selection(NamedTuple):
    """The jobs that a command selects: by id, by tag, queue and state, or all."""

    ids: Sequence[str] = ()
    tag: str | None = None
    queue: str | None = None
    every: bool = False
    states: Sequence[State] | None = None  # None for any

    @property
    def is_filter(self) -> bool:
        """Does it choose jobs by anything but their ids?"""
        return self.every or any(value is not None for value in (self.tag, self.queue, self.states))


NOTHING = Selection()
EVERY_JOB = Selection(every=True)


WORKER_STATES = ("idle", "busy", "stopping")


class WorkerRow(NamedTuple):
    """One row of `workers`, and the id of the job that it runs."""

    id: int
    pid: int
    host: str
    slot: int
    queues: list[str] | None
    drain: bool
    stop: str | None
    started_at: int
    job: str | None  # its id
    process: str | None = None  # what tells its process from every other, in the platform's words
    leftovers: str | None = None  # processes of its job that cannot be ended

    @property
    def state(self) -> str:
        """One of WORKER_STATES."""
        return "stopping" if self.stop else "busy" if self.job else "idle"

    def takes(self, queue: str) -> bool:
        """Would it run a job of this queue?"""
        return not self.stop and (self.queues is None or queue in self.queues)

    def is_for(self, queues: Sequence[str]) -> bool:
        """Does it take just these queues, none named: all?"""
        return set(self.queues or ()) == set(queues)


_WORKER_KINDS = (
    _INTEGER, _INTEGER, _WORDS, _INTEGER, _WORDS_OR_NULL, _INTEGER, _WORDS_OR_NULL, _INTEGER,
    *[_WORDS_OR_NULL] * 3,
)  # fmt: skip


def worker_from_row(row: Sequence[Any]) -> WorkerRow:
    """The worker that a row holds; what is damaged is left out, and one whose queues are takes none."""
    values = fitting(row, _WORKER_KINDS)
    if values[4] is not None:
        try:
            found, _ = _from_json(values[4])
        except (ValueError, RecursionError):
            found = None
        values[4] = found if _is_words(found) else []
    values[5], values[8] = bool(values[5]), values[8] and printable(values[8])
    return WorkerRow._make(values)


class QueueRow(NamedTuple):
    """A queue, its settings, and how many of its jobs are in each state."""

    name: str
    paused: bool
    max_running: int | None
    counts: dict[State, int]

    @property
    def is_full(self) -> bool:
        """Do as many of its jobs run as may at once?"""
        return self.max_running is not None and self.counts[State.PROCESSING] >= self.max_running


class Revival(NamedTuple):
    """What brings a dead job back, besides itself: the jobs above it that ended first."""

    ids: Sequence[str] = ()  # those that nothing hopeless stands above: itself, where that is so of it
    is_any_cancelled: bool = False
    orphan: str | None = None  # one of them that waits for a job that was removed


class WaitReasons(NamedTuple):
    """The facts outside its own row that may keep a job from running."""

    parents: list[str]  # ids of those that have not completed
    paused: bool
    max_running: int | None
    running: int  # how many jobs of its queue run
    workers: list[WorkerRow]
    revival: Revival = Revival()  # of a dead job that waited for others
    key_holder: str | None = None  # the job that has taken the key of a dead one
    timed_out_after_s: float | None = None  # the last attempt was ended by the time-out that still holds


class StopRequest(NamedTuple):
    """What others ask of a worker while it runs or waits."""

    registered: bool  # False: a peer removed its row
    stop: str | None = None
    cancelling: bool = False


# ======================================================================== fields

Spec = dict[str, Any]  # the checked fields of a new job; `_as_columns` turns them into columns
_Check = Callable[[Any], Any]
_DEVICE = re.compile(r"(?i)(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?")


def _text(value: Any) -> str:
    """Return a string that a command line, a file name and the database can hold, or raise BadInput."""
    if not isinstance(value, str):
        raise BadInput("must be a string")
    if "\0" in value:
        raise BadInput("must not contain a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadInput("is not valid Unicode") from None
    return value


def _name(value: Any) -> str:
    if not NAME.fullmatch(_text(value)):
        raise BadInput(
            "must be 1 to 128 of letters, digits, '.', '_' and '-', start with a letter or digit and not end in '.'"
        )
    return str(value)


def _id(value: Any) -> str:
    """Return a name that is also a file name on every system. Windows reserves device names, with any extension."""
    if _DEVICE.fullmatch(_name(value)):
        raise BadInput("is a device name on Windows; choose another")
    return str(value)


def _command(value: Any) -> str | list[str]:
    words = value if isinstance(value, list) else [value]
    if not words or not all(isinstance(word, str) for word in words):
        raise BadInput("must be a string, or a list of strings")
    if not words[0].strip():
        raise BadInput("must not be empty")
    if sum(len(_text(word).encode()) for word in words) > MAX_COMMAND_BYTES:
        raise BadInput(f"must not be longer than {MAX_COMMAND_BYTES} bytes; put it in a script")
    return words if isinstance(value, list) else words[0]


def _integer(low: int, high: int) -> _Check:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise BadInput(f"must be an integer from {low} to {high}")
        return int(value)

    return check


def _number(low: float, *, above: bool = False, high: float = MAX_SECONDS) -> _Check:
    def check(value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high or (above and value == low):
            most = f" and at most {high:g}" if type(value) in (int, float) and value > high else ""
            raise BadInput(f"must be a number {'above' if above else 'of at least'} {low:g}{most}")
        return float(value)

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadInput("must be true or false")
    return value


def _choice(*words: str) -> _Check:
    def check(value: Any) -> str:
        if value not in words:
            raise BadInput("must be " + " or ".join(repr(word) for word in words))
        return str(value)

    return check


def _list_of(check: _Check, what: str) -> _Check:
    def check_all(value: Any) -> list[Any] | None:
        if not isinstance(value, list):
            raise BadInput(f"must be a list of {what}")
        return [check(item) for item in value] or None

    return check_all


def _environment(value: Any) -> dict[str, str] | None:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise BadInput("must be an object of strings")
    for key, item in value.items():
        if not key or "=" in _text(key):
            raise BadInput(f"has a name that no variable can have: {key!r}")
        _text(item)
    return value or None


def _moment(value: Any) -> int:
    """Convert Unix seconds or ISO 8601 (without a zone: local time) to milliseconds since 1970."""
    if isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d", value):
        with contextlib.suppress(ValueError, OverflowError, OSError):
            value = datetime.datetime.fromisoformat(re.sub("[Zz]$", "+00:00", value)).timestamp()
    if type(value) not in (int, float) or not 0 <= value <= MAX_SECONDS:
        raise BadInput("must be Unix seconds, or a time like 2030-01-31T18:00, 23:00, tomorrow 6:30 or mon 8:00")
    return round(float(value) * 1000)


def _nonempty(value: Any) -> str:
    if not _text(value):
        raise BadInput("must not be empty")
    return str(value)


def option_duration(option: str, text: str | None) -> float:
    """Return the seconds that an option of a command gives, or infinity without the option."""
    try:
        return math.inf if text is None else float(_number(0)(parse_duration(text)))
    except BadInput as error:
        raise BadInput(f"{option} {error}") from None


def _parse_environment(words: Sequence[str]) -> dict[str, str]:
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def _parse_codes(words: Sequence[str]) -> list[int | float]:
    return [parse_number(word) for word in ",".join(words).split(",")]


ON_LOST = ("retry", "dead")
_codes = _list_of(_integer(0, 2**32 - 1), "integers")


class Field(NamedTuple):
    """A field of `enqueue`: the check of its value, and the parser of its option."""

    check: _Check
    help: str
    parse: Callable[[Any], Any] = str
    kind: str = "one"  # kind of option: "one", "many" or "flag"
    metavar: str = "TEXT"


FIELDS = {
    "id": Field(_id, "Its name; made up if not given.", metavar="ID"),
    "command": Field(_command, "A line for the shell, or a program and its arguments."),
    "priority": Field(_integer(-(2**31), 2**31 - 1), "Higher runs first; default 0.", parse_number, metavar="N"),
    "max_retries": Field(
        _integer(0, 2**31 - 1), "Retries after the first attempt; default by config.", parse_number, metavar="N"
    ),
    "timeout": Field(_number(0), "Limit of an attempt, 0: none; default by config.", parse_duration, metavar="TIME"),
    "run_at": Field(
        _moment, "Not before: ISO 8601, 23:00, tomorrow 6:30, mon 8:00, or Unix seconds.", parse_moment, metavar="WHEN"
    ),
    "delay": Field(_number(0, high=MAX_DELAY_S), "Not before this long from now.", parse_duration, metavar="TIME"),
    "backoff_base": Field(_number(0, above=True), "Wait this ** n after failed attempt n.", parse_number, metavar="N"),
    "queue": Field(_name, "The queue that it waits in; default `default`.", metavar="Q"),
    "tag": Field(_name, "A label to choose jobs by.", metavar="T"),
    "key": Field(_nonempty, "Store nothing while a job of this key waits or runs.", metavar="K"),
    "cwd": Field(_nonempty, "The directory that it runs in.", metavar="DIR"),
    "env": Field(
        _environment, "A variable for it; K alone: its value here; may be repeated.", _parse_environment, "many", "K=V"
    ),
    "after": Field(_list_of(_id, "ids"), "Start once this job has completed; may be repeated.", list, "many", "ID"),
    "hold": Field(_flag, "Wait until `release`.", bool, "flag"),
    "on_lost": Field(_choice(*ON_LOST), "If its worker dies: retry (default) or dead.", metavar="WHAT"),
    "ok_codes": Field(_codes, "Exit codes that complete it, like 3,4.", _parse_codes, "many", "CODES"),
    "no_retry_codes": Field(_codes, "Exit codes that make it dead at once.", _parse_codes, "many", "CODES"),
    "snooze": Field(_flag, "Exit code 75: try again after its backoff, attempt not counted.", bool, "flag"),
}


BLANK: dict[str, Any] = dict.fromkeys(FIELDS) | {  # defaults
    "priority": 0, "queue": "default", "hold": False, "on_lost": "retry", "snooze": False,
}  # fmt: skip
STORED = [name for name in FIELDS if name != "delay"]  # the columns of `jobs` that hold fields
CLEARABLE = [name for name in STORED if name not in ("id", "command", "cwd")]


def check_field(name: str, value: Any) -> Any:
    """Return the value of a field, from its JSON value. Raise BadInput if it is not valid."""
    if name not in FIELDS:
        raise BadInput(f"unknown field {printable(name)!r}{nearest(name, FIELDS)}")
    try:
        return FIELDS[name].check(value)
    except BadInput as error:
        raise BadInput(f"field {name!r} {error}") from None


def check_selection(which: Selection) -> Selection:
    """Return the selection. Raise BadInput for ids beside a filter, and for a tag or a queue that no job can have."""
    if which.ids and which.is_filter:
        raise BadInput("name jobs by id, or choose them with --tag, --queue, --state or --all: not both")
    for name, value in (("tag", which.tag), ("queue", which.queue)):
        if value is not None:
            check_field(name, value)
    return which


def limited_to(which: Selection, states: Sequence[State]) -> Selection:
    """Restrict a selection without ids to these states. NOTHING stays NOTHING."""
    if which == NOTHING:
        return which
    return which._replace(states=[state for state in states if which.states is None or state in which.states])


def check_fields(fields: Mapping[str, Any], now: int) -> Spec:
    """Return the spec of these fields. `delay` becomes a `run_at` that many seconds after `now` (ms).

    A clock time in `run_at` is the next one after `now`. BadInput names the invalid field.
    """
    if isinstance(text := fields.get("run_at"), str) and (moment := clock_time(text, now)) is not None:
        fields = {**fields, "run_at": moment / 1000}
    spec = {name: check_field(name, value) for name, value in fields.items()}
    if "delay" in spec:
        if "run_at" in spec:
            raise BadInput("fields 'delay' and 'run_at' exclude each other")
        spec["run_at"] = now + round(spec.pop("delay") * 1000)
    return spec


def check_job(given: Any, now: int, defaults: Mapping[str, Any] | None = None) -> Spec:
    """Return the spec of a complete job, from a JSON object and defaults for the fields that it omits."""
    if not isinstance(given, dict):
        raise BadInput('a job must be a JSON object like {"command": "echo hello"}')
    spec = check_fields({**(defaults or {}), **given}, now)
    if "command" not in spec:
        raise BadInput("field 'command' is missing")
    return spec


def parse_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the options of a command line give, with JSON values."""
    fields = {}
    for name, given in options.items():
        if given in (None, (), False):
            continue
        try:
            fields[name] = FIELDS[name].parse(given)
        except BadInput as error:
            raise BadInput(f"--{name.replace('_', '-')} {error}") from None
    return fields


def read_batch(lines: Iterable[bytes], now: int, defaults: Mapping[str, Any]) -> Iterator[tuple[str, Spec]]:
    """Yield the specs of JSON Lines, each with a prefix for errors that names its line. Skip blank lines."""
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield f"line {number}: ", check_job(parse_job(text), now, defaults)
        except UnicodeDecodeError:
            raise BadInput(f"line {number}: is not UTF-8") from None
        except BadInput as error:
            raise BadInput(f"line {number}: {error}") from None


_READ_ONLY_FIELDS = (
    "state", "attempts", "created_at", "updated_at", "started_at", "finished_at", "exit_code", "error", "worker",
)  # fmt: skip
JSON_FIELDS = (*FIELDS, *_READ_ONLY_FIELDS)  # keys of a job in JSON


def job_json(job: Job) -> dict[str, Any]:
    """Return a job as a JSON object."""
    shown = {name: getattr(job, name, None) for name in JSON_FIELDS}  # `delay` is None: it was stored as `run_at`
    for name in ("run_at", "created_at", "updated_at", "started_at", "finished_at"):
        shown[name] = iso_time(shown[name])
    return shown | {"state": job.state.value}


def parse_columns(text: str) -> list[str]:
    """Return the field names in a list like `id,state`. Raise BadInput for a word that is not in JSON_FIELDS."""
    names = [word.strip().replace("-", "_") for word in text.split(",")]
    for name in names:
        if name not in JSON_FIELDS:
            raise BadInput(f"--columns knows no field {printable(name)!r}{nearest(name, JSON_FIELDS)}")
    return names


# ======================================================================== templates

Shell = Literal["sh", "cmd"]  # which shell runs a command line; both are supported on every system
ITEM_FIELDS = ("id", "tag", "cwd", "key", "queue")  # fields with placeholders, besides `env` and the command
_ITEM, _INDEX = "QUEUECTL_ITEM", "QUEUECTL_INDEX"
_PLACEHOLDER = "\0"  # replaces a placeholder while a line is parsed; no command line can contain it


class Item(NamedTuple):
    """One item of a call of `enqueue` that makes a job of each item."""

    value: str
    number: int  # from 1
    cells: Sequence[str] = ()  # cells of its row, if it comes from a CSV file


_Get = Callable[[Item], str]
_Quote = Callable[[str], str]


def _paths(shell: Shell) -> Any:
    """Return the path module for the system of a shell."""
    import ntpath
    import posixpath

    return posixpath if shell == "sh" else ntpath


def _base_name(path: str, paths: Any) -> str:
    return str(paths.basename(path.rstrip(f"/{paths.sep}")) or path)


def _directory(path: str, paths: Any) -> str:
    return str(paths.dirname(path.rstrip(f"/{paths.sep}") or path) or ".")


def _getter(name: str, columns: Sequence[str], shell: Shell) -> _Get:
    """Return a function from an item to the value of the placeholder `{name}`."""
    paths = _paths(shell)
    known: dict[str, _Get] = {
        "": lambda item: item.value,
        ".": lambda item: str(paths.splitext(item.value)[0]),
        "/": lambda item: _base_name(item.value, paths),
        "//": lambda item: _directory(item.value, paths),
        "/.": lambda item: str(paths.splitext(_base_name(item.value, paths))[0]),
        "#": lambda item: str(item.number),
    }
    if name in known:
        return known[name]
    column = columns.index(name)
    return lambda item: item.cells[column]


def _placeholder_pattern(columns: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that matches placeholders and doubled braces."""
    names = "|".join(re.escape(name) for name in columns if name)
    return re.compile(r"\{\{|\}\}|\{(|\.|//?|/\.|#" + (f"|{names}" if names else "") + r")\}")


class Template:
    """A text with placeholders for an item: compiled once, filled for each item.

    With `line` the text is a line for the shell, and each value is quoted for the context of its placeholder. Raise
    BadInput if a placeholder stands in a context where no quoting is safe.
    """

    def __init__(self, text: str, columns: Sequence[str], shell: Shell, *, line: bool = False) -> None:
        if _PLACEHOLDER in text:
            raise BadInput("must not contain a NUL character")
        self._gets: list[_Get] = []

        def keep(match: re.Match[str]) -> str:
            if match[1] is None:
                return match[0][0]
            self._gets.append(_getter(match[1], columns, shell))
            return _PLACEHOLDER

        text = _placeholder_pattern(columns).sub(keep, text)
        if line:
            self._gets = [
                functools.partial(_quoted, quote, get)
                for quote, get in zip(_quotes_of(text, shell), self._gets, strict=True)
            ]
        self._format = text.replace("%", "%%").replace(_PLACEHOLDER, "%s")

        self.has_placeholders = bool(self._gets)
        self.text = text  # with _PLACEHOLDER for each placeholder

    def fill(self, item: Item) -> str:
        """Return the text for an item."""
        return self._format % tuple([get(item) for get in self._gets])


def _quoted(quote: _Quote, get: _Get, item: Item) -> str:
    return quote(get(item))


# ---- quoting for a shell

_SH_BARE = re.compile(r"[A-Za-z0-9_@%+:./-]+")
_SH_RESERVED = re.compile("if|then|else|elif|fi|do|done|case|esac|while|until|for|in|function|select|time|coproc")
_CMD_BARE = re.compile(r"[A-Za-z0-9_@+:.\\/~-]+")
_CMD_SPECIAL = re.compile(r'[%!^"&|<>\x00-\x1f]')


def _quote_sh_always(value: str) -> str:
    return "'" + value.replace("'", "'\"'\"'") + "'"


def quote_sh(value: str) -> str:
    """Quote a value as one word of a line for /bin/sh."""
    is_plain = _SH_BARE.fullmatch(value) and not _SH_RESERVED.fullmatch(value)
    return value if is_plain else _quote_sh_always(value)


def _in_double_quotes(value: str) -> str:
    return re.sub(r'([\\"$`])', r"\\\1", value)


def _in_single_quotes(value: str) -> str:
    return value.replace("'", "'\\''")


def _refuse_special(value: str) -> str:
    """Return the value. Raise BadInput if cmd.exe would change or split it, even in quotes."""
    if found := _CMD_SPECIAL.search(value):
        raise BadInput(f"{printable(value)!r} holds {printable(found[0])!r}, which cannot be quoted in a line for "
                       "cmd.exe; give the command as several words")  # fmt: skip
    return value


def quote_cmd(value: str) -> str:
    """Quote a value as one word of a line for cmd.exe."""
    if _CMD_BARE.fullmatch(_refuse_special(value)) and not value.endswith("\\"):
        return value
    ending = len(value) - len(value.rstrip("\\"))  # a backslash before a quote is an escape for programs, so double it
    return f'"{value}{ending * chr(92)}"'


def _in_cmd_quotes(value: str) -> str:
    if value.endswith("\\"):
        raise BadInput(f"{printable(value)!r} ends in a backslash; take the quotes round its place away")
    return _refuse_special(value)


class _Grammar(NamedTuple):
    """The part of the syntax of a shell in which the quoting context of a placeholder is certain."""

    token: re.Pattern[str]  # the group name is the quoting context; text that matches no token is refused
    quotes: Mapping[str, _Quote]
    evaluates: re.Pattern[str]  # matches a text whose next word is evaluated as a command line


_EVALUATES_SH = r"sh(?:\.exe)?['\"]?\s+(?:-\S+\s+)*-\w*c\s+(?:\$\S*\s+)*\S*$"
_EVALUATES_POWERSHELL = r"(?i:(?:^|[\s\\/])(?:powershell|pwsh)(?:\.exe)?['\"]?\s+(?!.*-f(?:ile)?\s)[^&|\0]*$)"
# Quotes around a placeholder may contain only characters of file names. Other text in quotes may be a line for another
# shell (`sh -c "cat {}"`, `ssh host "cat {}"`), which would parse the value a second time.
_SH_TOKEN = r"""
    (?P<single> ' [\w@%+=:,./\0-]* \0 [\w@%+=:,./\0-]* ' )
  | (?P<double> " [\w@%+=:,./\0-]* \0 [\w@%+=:,./\0-]* " )
  | ' [^'\0]* '
  | " (?: [^"\\`$\0] | \\ [^\0\n] | \$ (?![(\[{\0]) | \$ \{ [\w@*\#?:+=%/., -]* \} )* "
  | \\ [^\0\n] (?!\#)                              # an escaped blank before # begins no comment
  | (?<= [ \t] ) \\ \n
  | (?<! [^\s;&|()<>] ) \# [^\n\0]* (?= \n | \Z )  # a comment
  | (?<= [^\s;&|()<>] ) \#
  | \$ [A-Za-z_]\w* (?![\w\0])
  | \$ [\d@*\#?$!-]
  | \$ \{ [\w@*\#?:+=%/., -]* \}
  | \$? \( (?!\()                                  # (( begins arithmetic, which may run what a value holds
  | \$ (?= [\s;&|)] | \Z )
  | (?<! \w ) \[ (?! \[ [\s;&|()<>] ) | (?<= \w ) \[ (?! [^\]\s]* \0 )  # so does a subscript, and a test in [[
  | < (?!<)                                        # a here-document
  | (?P<forced> \0 (?= [<>] ) )                    # digits there would name a descriptor
  | (?P<bare> \0 )
  | [^\\'"`$\#(<\[\0]
"""
_CMD_TOKEN = r"""
    (?P<inside> (?<! ["\0] ) " [\w@+=:,./\\-]* \0 [\w@+=:,./\\\0-]* " (?! ["\0] ) )
  | (?<! ["\0] ) " [^"\0]* (?<! \\ ) " (?! ["\0] )
  | (?P<bare> (?<! [%!^"\0] ) \0 (?! ["\0] ) )
  | \^ [^\0]
  | \\ (?! " )
  | [^\^"\\\0]
"""
_GRAMMARS: Mapping[Shell, _Grammar] = {
    "sh": _Grammar(
        re.compile(_SH_TOKEN, re.X | re.A | re.S),
        {"single": _in_single_quotes, "double": _in_double_quotes, "forced": _quote_sh_always, "bare": quote_sh},
        re.compile(rf"{_EVALUATES_SH}|(?<![\w./-])(?:eval|trap|let|alias|declare|typeset|unset|read|test\s.*-v|"
                   rf"\[\s.*-v)\s(?:[^;&|\n<>\\]|\\[\s\S])*$|{_EVALUATES_POWERSHELL}"),
    ),
    "cmd": _Grammar(
        re.compile(_CMD_TOKEN, re.X | re.A | re.S), {"inside": _in_cmd_quotes, "bare": quote_cmd},
        re.compile(f"{_EVALUATES_SH}|{_EVALUATES_POWERSHELL}"),
    ),
}  # fmt: skip


def _excerpt(text: str) -> str:
    return printable(text[-30:].replace(_PLACEHOLDER, "{}") + "{}")


def _refuse_if_evaluated(before: str, evaluates: re.Pattern[str]) -> None:
    """Raise BadInput if the word after this text is evaluated as a command line."""
    if evaluates.search(before):
        raise BadInput(f"what stands for the braces in {_excerpt(before)!r} would be run as a command line; "
                       """pass it as an argument, like: sh -c 'cat "$1"' sh {}""")  # fmt: skip


def _quotes_of(line: str, shell: Shell) -> list[_Quote]:
    """Return the quoting function for each placeholder in a line for the shell."""
    grammar = _GRAMMARS[shell]
    found: list[_Quote] = []
    at = 0
    while _PLACEHOLDER in line[at:]:
        token = grammar.token.match(line, at)
        if token is None:
            raise BadInput(f"a value cannot be quoted safely in {_excerpt(line[: line.index(_PLACEHOLDER, at)])!r}; "
                           "write its braces as a word or a part of one, outside of quotes, comments, `...`, ${...}, "
                           "$((...)) and here-documents, or give the command as several words")  # fmt: skip
        if _PLACEHOLDER in token[0]:
            _refuse_if_evaluated(line[: at + token[0].index(_PLACEHOLDER)], grammar.evaluates)
            found += [grammar.quotes[token.lastgroup or ""]] * token[0].count(_PLACEHOLDER)
        at = token.end()
    return found


# ---- the command and the fields

_OPEN_END = re.compile(r"[;&|({`\\^!]$")  # an appended word would be a command, or no word at all


def _line_template(line: str, columns: Sequence[str], shell: Shell) -> Template:
    """Return the template of a line for the shell. Without a placeholder the item becomes its last word."""
    template = Template(line, columns, shell, line=True)
    if template.has_placeholders:
        return template
    line = line.rstrip()
    if not line or _OPEN_END.search(line):
        raise BadInput("say where the item stands in this line: {}")
    return Template(f"{line} {{}}", columns, shell, line=True)


def _word_templates(words: Sequence[str], columns: Sequence[str], shell: Shell) -> list[Template]:
    """Return the templates of a command without a shell. Without a placeholder the item becomes its last word."""
    templates = [Template(word, columns, shell) for word in words]
    if not any(template.has_placeholders for template in templates):
        return [*templates, Template("{}", columns, shell)]
    for at, template in enumerate(templates):
        if template.has_placeholders and at:
            _refuse_if_evaluated(" ".join(words[:at]) + " ", re.compile(f"{_EVALUATES_SH}|{_EVALUATES_POWERSHELL}"))
    return templates


def _command_filler(
    command: str | list[str] | None, columns: Sequence[str], shell: Shell
) -> Callable[[Item], str | list[str]]:
    """Return a function from an item to its command. Without a command the item is the command."""
    if command is None:
        return lambda item: item.value
    if isinstance(command, str):
        return _line_template(command, columns, shell).fill
    check: _Quote = str
    if shell == "cmd" and command[0].lower().endswith((".bat", ".cmd")):
        check = _refuse_special  # cmd.exe parses the arguments of batch files
    words = [word.fill if word.has_placeholders else word.text for word in _word_templates(command, columns, shell)]
    return lambda item: [word if isinstance(word, str) else check(word(item)) for word in words]


def specs_of_items(
    items: Iterable[Item], columns: Sequence[str], command: str | list[str] | None, fields: Mapping[str, Any],
    shell: Shell, now: int,
) -> Iterator[tuple[str, Spec]]:  # fmt: skip
    """Return the spec of a job for each item, with a prefix for errors that names the item.

    Fields that all jobs share are checked before the first item is read.
    """
    templates = {name: Template(fields[name], columns, shell) for name in ITEM_FIELDS if name in fields}
    texts = {name: template for name, template in templates.items() if template.has_placeholders}
    same = {**fields, **{name: template.text for name, template in templates.items()}}
    fixed = check_fields({name: value for name, value in same.items() if name not in texts}, now)
    command_for = _command_filler(command, columns, shell)
    env_for = _env_filler(fields.get("env", {}), columns, shell)

    def spec_of(item: Item) -> Spec:
        spec = {**fixed, "command": check_field("command", command_for(item)), "env": env_for(item)}
        for name, text in texts.items():
            spec[name] = check_field(name, text.fill(item))
        return spec

    return _with_origins(items, spec_of)


def _env_filler(env: Mapping[str, str], columns: Sequence[str], shell: Shell) -> Callable[[Item], dict[str, str]]:
    """Return a function from an item to its environment. The names of the variables must be checked already."""
    texts = {name: Template(value, columns, shell) for name, value in env.items()}
    if not texts:
        return lambda item: {_ITEM: _text(item.value), _INDEX: str(item.number)}

    def env_for(item: Item) -> dict[str, str]:
        own = {name: text.fill(item) for name, text in texts.items()}
        return dict(check_field("env", {_ITEM: item.value, _INDEX: str(item.number), **own}))

    return env_for


def _with_origins(items: Iterable[Item], spec_of: Callable[[Item], Spec]) -> Iterator[tuple[str, Spec]]:
    for item in items:
        origin = f"item {item.number}: "
        try:
            spec = spec_of(item)
        except BadInput as error:
            raise BadInput(f"{origin}{error}") from None
        yield origin, spec


# ---- where items come from


def _split_items(file: BinaryIO, end: bytes) -> Iterator[bytes]:
    """Yield the items of a file, split at `end`, in bounded memory. Raise BadInput for an item that does not end."""
    rest = b""
    while block := file.read(1 << 16):
        *whole, rest = (rest + block).split(end)
        yield from whole
        if len(rest) > 1 << 20:
            raise BadInput("a line of more than 1 MiB is no item; is this the right file?")
    if rest:
        yield rest


def _decoded_items(file: BinaryIO, end: bytes, what: str) -> Iterator[str]:
    """Yield the items of a file as text. Raise BadInput, with the number of the item, if one is not UTF-8."""
    for number, piece in enumerate(_split_items(file, end), 1):
        try:
            yield piece.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise BadInput(f"{what} {number}: is not valid UTF-8") from None


def read_items(file: BinaryIO, *, null: bool = False) -> Iterator[Item]:
    """Return an item for each line that is not blank, or with `null` for each text that ends in NUL."""
    if null:
        values: Iterable[str] = filter(None, _decoded_items(file, b"\0", "item"))
    else:
        values = (line for text in _decoded_items(file, b"\n", "line") if (line := text.removesuffix("\r")).strip())
    return (Item(value, number) for number, value in enumerate(values, 1))


def read_rows(file: BinaryIO) -> tuple[list[str], Iterator[Item]]:
    """Return the column names of a CSV file, and an item for each further row: its cells, joined by commas."""
    import csv

    reader = csv.reader((f"{text}\n" for text in _decoded_items(file, b"\n", "line")), strict=True)

    def rows() -> Iterator[list[str]]:
        try:
            yield from filter(any, reader)
        except csv.Error as error:
            raise BadInput(f"line {reader.line_num}: is not CSV ({error})") from None

    found = rows()
    columns = [name.strip() for name in next(found, [])]
    if not columns:
        raise BadInput("the CSV file is empty; its first line must name the columns")
    duplicate = next((name for name in columns if name and columns.count(name) > 1), None)
    if duplicate:
        raise BadInput(f"line 1: names the column {printable(duplicate)!r} twice")
    return columns, (
        Item(",".join(cells), number, cells)
        for number, cells in enumerate((_checked_row(cells, len(columns), reader.line_num) for cells in found), 1)
    )


def _checked_row(cells: list[str], columns: int, line: int) -> list[str]:
    if len(cells) != columns:
        cells_here, named = number_of(len(cells), "cell"), number_of(columns, "column")
        raise BadInput(f"line {line}: has {cells_here}, but line 1 names {named}")
    return cells


def number_items(text: str) -> Iterator[Item]:
    """Return an item for each number of an array such as `1-100`, `1-10:2` or `1,3,7-9`; else raise BadInput."""
    ranges = [_parse_range(part.strip()) for part in text.split(",")]
    if sum(map(len, ranges)) > MAX_ARRAY:
        raise BadInput(f"--array has {sum(map(len, ranges))} numbers; at most {MAX_ARRAY} at once")
    numbers = (str(number) for numbers in ranges for number in numbers)
    return (Item(value, n) for n, value in enumerate(numbers, 1))


def _parse_range(text: str) -> range:
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9})(?::(\d{1,9}))?)?", text, re.ASCII)
    if not found:
        limit = "; a limit on how many run at once is `queuectl queue limit`" if "%" in text else ""
        raise BadInput(f"--array takes numbers like 1-100, 1-10:2 or 1,3,7-9, not {printable(text)!r}{limit}")
    first, last, step = int(found[1]), int(found[2] or found[1]), int(found[3] or 1)
    if last < first or not step:
        raise BadInput(f"--array {text}: {'its step is 0' if not step else 'it descends'}; say for example 1-10:2")
    return range(first, last + 1, step)


# ======================================================================== settings


class Settings(NamedTuple):
    """The configuration of a home; the values here are the defaults."""

    backoff_base: float = 2.0
    backoff_max: float = 0.0
    backoff_jitter: float = 0.0
    max_retries: int = 3
    job_timeout: float = 30.0
    kill_grace: float = 5.0
    log_max_bytes: int = 0
    on_complete: str = ""
    on_dead: str = ""


class Setting(NamedTuple):
    """A config key: how to parse and check its value."""

    parse: Callable[[str], Any]
    check: _Check
    help: str


SETTINGS = {
    "backoff_base": Setting(parse_number, _number(0, above=True), "wait this ** n seconds after failed attempt n"),
    "backoff_max": Setting(parse_duration, _number(0), "longest backoff in seconds, 0 for no limit"),
    "backoff_jitter": Setting(parse_number, _number(0, high=1), "fraction of the backoff that chance adds"),
    "max_retries": Setting(parse_number, _integer(0, 2**31 - 1), "retries after the first attempt"),
    "job_timeout": Setting(parse_duration, _number(0), "seconds that an attempt may run, 0 for no limit"),
    "kill_grace": Setting(parse_duration, _number(0, high=3600), "seconds between SIGTERM and SIGKILL"),
    "log_max_bytes": Setting(parse_number, _integer(0, 2**62), "bytes kept of an attempt's output, 0 for all"),
    "on_complete": Setting(str, _text, "shell command to run after a job has completed"),
    "on_dead": Setting(str, _text, "shell command to run after a job has died; not for those that it takes along"),
}


def setting_key(name: str) -> str:
    """The key of a name: `max-retries` is `max_retries`. NotFound suggests the nearest key."""
    key = name.replace("-", "_")
    if key not in SETTINGS:
        raise NotFound(f"no config key {printable(name)!r}{nearest(key, SETTINGS)}")
    return key


def parse_setting(name: str, text: str) -> Any:
    """The value of a key from a text. BadInput where the text is not valid."""
    key = setting_key(name)
    try:
        return SETTINGS[key].check(SETTINGS[key].parse(text))
    except BadInput as error:
        raise BadInput(f"{key} {error}") from None


class Transition(NamedTuple):
    """The change of a job's state after an attempt."""

    state: State
    attempts: int
    due_at: int | None = None


def settings_for(job: Job, settings: Settings) -> Settings:
    """The settings in force for a job: its own values replace those of the home."""
    if job.max_retries is None and job.timeout is None and job.backoff_base is None:
        return settings  # the usual case
    own: dict[str, Any]
    own = {"max_retries": job.max_retries, "job_timeout": job.timeout, "backoff_base": job.backoff_base}
    return settings._replace(**{key: value for key, value in own.items() if value is not None})


def backoff_s(job: Job, settings: Settings, chance: float) -> float:
    """Seconds to wait after failed attempt n: base ** n and a random share, capped. `chance` is from 0 to 1."""
    try:
        delay = settings.backoff_base**job.attempts
    except OverflowError:
        delay = math.inf
    delay = min(delay, MAX_DELAY_S) * (1 + settings.backoff_jitter * chance)
    return min(delay, settings.backoff_max or math.inf, MAX_DELAY_S)


def decide(job: Job, outcome: Outcome, settings: Settings, now: int, chance: float) -> Transition:
    """The transition of a job after an attempt. Pure: the caller gives the time and the random number."""
    code = outcome.exit_code
    if outcome.end is EndReason.EXITED and (code == 0 or code in (job.ok_codes or ())):
        return Transition(State.COMPLETED, job.attempts)
    settings = settings_for(job, settings)
    later = now + round(backoff_s(job, settings, chance) * 1000)
    if job.cancelling:
        return Transition(State.CANCELLED, job.attempts)
    if outcome.end is EndReason.GIVEN_BACK:
        return Transition(State.PENDING, job.attempts - 1)
    if outcome.end is EndReason.EXITED and code == EX_TEMPFAIL and job.snooze:
        return Transition(State.PENDING, job.attempts - 1, later)
    final = code in (job.no_retry_codes or ()) or (outcome.end is EndReason.LOST and job.on_lost == "dead")
    if final or job.attempts > settings.max_retries:
        return Transition(State.DEAD, job.attempts)
    return Transition(State.FAILED, job.attempts, None if outcome.end is EndReason.LOST else later)


# ======================================================================== views

_COLOURS = {"completed": 32, "processing": 36, "failed": 33, "dead": 31, "cancelled": 90, "busy": 36, "stopping": 33}


def coloured(word: str, text: str | None = None) -> str:
    """A text in the colour of a state. `echo` removes the colour where the output is no terminal."""
    shown = word if text is None else text
    return f"\x1b[{_COLOURS[word]}m{shown}\x1b[0m" if word in _COLOURS else shown


def table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """The lines of a table. A column takes at most a quarter of the width; the last takes the rest."""
    most = max(12, width // 4)
    sizes = [min(most, max(len(row[i]) for row in [head, *rows])) for i in range(len(head) - 1)]
    room = max(10, width - sum(sizes) - 2 * len(sizes))
    for row in [head, *rows]:
        cells = [cut(cell, size).ljust(size) for cell, size in zip(row[:-1], sizes, strict=True)]
        cells = [coloured(row[i], cells[i]) if head[i] == "STATE" else cells[i] for i in range(len(cells))]
        yield "  ".join([*cells, cut(row[-1], room)]).rstrip()


def attempt_json(attempt: Attempt) -> dict[str, Any]:
    """An attempt as JSON shows it."""
    return {
        "number": attempt.number,
        "started_at": iso_time(attempt.started_at),
        "finished_at": iso_time(attempt.ended_at),
        "worker": attempt.worker,
        "exit_code": attempt.exit_code,
        "signal": attempt.signal,
        "ended_by": attempt.ended_by,
        "error": attempt.error,
        "max_rss_bytes": attempt.max_rss,
        "cpu_seconds": attempt.cpu_s,
    }


class Reason(NamedTuple):
    """Why a job is not running, and the command that would change that."""

    why: str | None = None
    remedy: str | None = None


def why_not_running(job: Job, reasons: WaitReasons, now: int) -> Reason:
    """Why a waiting job does not run, or that the worker of a running one is gone. A dead job has only a remedy."""
    if job.state is State.DEAD:
        return Reason(None, remedy_of_dead(job, reasons))
    if job.state is State.PROCESSING and all(row.id != job.worker for row in reasons.workers):
        return Reason("its worker is gone", None if reasons.workers else "queuectl worker start")
    if job.state not in WAITING:
        return Reason()
    if job.hold:
        return Reason("on hold", f"queuectl release {job.id}")
    if reasons.parents:
        return Reason("after " + ", ".join(reasons.parents), f"queuectl show {reasons.parents[0]}")
    if job.due_at is not None and job.due_at > now:
        what = "retry due" if job.state is State.FAILED else "due"
        cut_s = reasons.timed_out_after_s
        more_time = f"queuectl edit {job.id} --timeout {longer(cut_s)}" if cut_s else None
        return Reason(f"{what} in {duration(math.ceil((job.due_at - now) / 1000))}", more_time)
    if reasons.paused:
        return Reason(f"queue {job.queue} paused", f"queuectl queue resume {job.queue}")
    if reasons.max_running is not None and reasons.running >= reasons.max_running:
        return Reason(
            f"queue {job.queue} at its limit of {reasons.max_running}", f"queuectl queue limit {job.queue} none"
        )
    if all(row.stop for row in reasons.workers):
        return Reason(nobody_works(reasons.workers), "queuectl worker start")
    if not any(row.takes(job.queue) for row in reasons.workers):
        return Reason(f"no worker takes queue {job.queue}", f"queuectl worker start --queue {job.queue}")
    return Reason("waiting for a free worker")


OUT_OF_SIGHT = "what it started in another PID namespace, which cannot be seen from here"


def leftovers_reason(leftovers: str) -> Reason:
    """Why an attempt cannot end, and what its owner can do."""
    if leftovers == OUT_OF_SIGHT:
        remedy = "start a worker there, or once that namespace (a container) is gone: queuectl doctor --repair"
        return Reason(f"nobody has ended {leftovers}", remedy)
    pids = " ".join(re.findall(r"(?:^|, )(\d+)", leftovers))
    if not pids:
        return Reason(f"{printable(leftovers)} are still there and cannot be ended")
    return Reason(f"process {printable(leftovers)} is still there and cannot be ended", f"sudo kill -9 {pids}")


def leftovers_text(leftovers: str) -> str:
    """The same on one line, with the remedy where there is one."""
    return "; ".join(filter(None, leftovers_reason(leftovers)))


MOST_NAMED = 10  # jobs that one remedy names


def remedy_of_dead(job: Job, reasons: WaitReasons) -> str | None:
    """The command that brings a dead job back: of what it waited for, the first that ended is to be tried again."""
    if reasons.key_holder:
        return f"queuectl wait {reasons.key_holder}"
    ids, is_any_cancelled, orphan = reasons.revival if job.blockers else Revival([job.id])
    if orphan:
        return f"queuectl dlq retry {orphan} --clear after"
    if len(ids) > MOST_NAMED and not is_any_cancelled:
        return "queuectl dlq retry --all"
    more_time = f" --timeout {longer(reasons.timed_out_after_s)}" if reasons.timed_out_after_s else ""
    return f"queuectl {'rerun' if is_any_cancelled else 'dlq retry'} {' '.join(ids)}{more_time}" if ids else None


def longer(timeout_s: float) -> str:
    """A time-out to propose where this one was too short."""
    rounded = (name for name, seconds in (("10m", 600), ("1h", 3600), ("10h", 36_000)) if seconds >= 2 * timeout_s)
    return next(rounded, str(math.ceil(2 * timeout_s)))


def nobody_works(workers: Sequence[WorkerRow]) -> str:
    """Why no worker takes jobs."""
    return "every worker is leaving" if workers else "no worker is running"


def job_error(job: Job) -> str:
    """The error of a job with control characters escaped; empty where it has none."""
    return printable(job.error or "")


def job_rows(jobs: Sequence[Job], found: Sequence[WaitReasons], now: int) -> list[list[str]]:
    """The cells of `list`, a row for each job."""
    return [
        [
            job.id, job.state.value, job.queue, str(job.priority), str(job.attempts), ago(job.updated_at, now),
            gist(why_not_running(job, reasons, now).why or (job.state is State.DEAD and job_error(job)) or "-"),
            printable(command_line(job.command)),
        ]
        for job, reasons in zip(jobs, found, strict=True)
    ]  # fmt: skip


JOB_HEAD = ("ID", "STATE", "QUEUE", "PRIO", "TRIES", "CHANGED", "WHY", "COMMAND")
# On a narrow terminal a column that holds only this is not shown.
_SILENT = {"QUEUE": BLANK["queue"], "PRIO": "0", "WHY": "-"}


def job_lines(jobs: Sequence[Job], found: Sequence[WaitReasons], more: int, now: int, width: int) -> Iterator[str]:
    """What `list` prints."""
    if not jobs and not more:
        yield "no jobs"
        return
    if more:
        yield f"({more} older jobs are not shown; --limit shows more)"
    rows = job_rows(jobs, found, now)
    said = [i for i, name in enumerate(JOB_HEAD) if width >= 100 or any(row[i] != _SILENT.get(name) for row in rows)]
    yield from table([JOB_HEAD[i] for i in said], [[row[i] for i in said] for row in rows], width)


def column_line(job: Job, names: Sequence[str]) -> str:
    """Some fields of a job for a script: uncut, with tabs between them."""
    shown = job_json(job)
    return "\t".join(column_text(name, shown[name]) for name in names)


def column_text(name: str, value: Any) -> str:
    """The value of a JSON field on a line of its own: empty for null, JSON for a list, only names of variables."""
    if value is None:
        return ""
    if name == "env":
        value = dict.fromkeys(value, "***")
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def resting_lines(queues: Sequence[QueueRow]) -> Iterator[str]:
    """The queues in which jobs wait and none may start now."""
    for row in queues:
        if (row.paused or row.is_full) and any(row.counts[state] for state in WAITING):
            why = "paused" if row.paused else f"at its limit of {row.max_running}"
            yield f"(queue {row.name} is {why}: its jobs are not shown)"


def show_lines(job: Job, history: Sequence[Attempt], reason: Reason, log: str, pid: int | None,
               settings: Settings, now: int, width: int) -> Iterator[str]:  # fmt: skip
    """What `show` prints."""
    yield f"job        {job.id}"
    yield f"command    {printable(command_line(job.command))}"
    yield f"state      {coloured(job.state.value)}" + (f": {reason.why}" if reason.why else "")
    if reason.remedy:
        yield f"try        {reason.remedy}"
    if job.error:
        yield f"error      {printable(job.error)}"
    yield f"attempts   {job.attempts} of at most {settings_for(job, settings).max_retries + 1}"
    for name in FIELDS:
        if name not in ("id", "command", "max_retries", "run_at", "env") and getattr(job, name, None):
            yield f"{name:10} {printable(plain(getattr(job, name)))}"
    if job.env:
        yield f"env        {', '.join(printable(name) for name in job.env)} (values only with --json)"
    moments = {"not before": job.run_at, "created": job.created_at, "started": job.started_at, "ended": job.finished_at}
    for what, moment in moments.items():
        if moment is not None:
            yield f"{what:10} {iso_time(moment)} ({ago(moment, now)})"
    if pid:
        yield f"process    {pid}"
    yield f"log        {printable(log)}"
    if history:
        yield ""
        yield from table(("TRY", "WORKER", "STARTED", "TOOK", "CPU", "MEMORY", "RESULT"), attempt_rows(history), width)


def attempt_rows(history: Sequence[Attempt]) -> list[list[str]]:
    """The cells of the attempts in `show`, a row for each."""
    return [
        [
            str(a.number), str(a.worker), iso_time(a.started_at) or "", duration((a.ended_at - a.started_at) / 1000),
            "-" if a.cpu_s is None else duration(a.cpu_s), "-" if a.max_rss is None else f"{a.max_rss >> 20} MiB",
            gist(printable(a.error or "completed")),
        ]
        for a in history
    ]  # fmt: skip


def worker_counts(workers: Sequence[WorkerRow]) -> dict[str, int]:
    """The number of workers in each state."""
    states = [row.state for row in workers]
    return {state: states.count(state) for state in WORKER_STATES}


class Overview(NamedTuple):
    """The state of a queue at one moment: the input of `status`, its JSON and Prometheus."""

    counts: dict[State, int]
    workers: list[WorkerRow]  # those that are alive
    queues: list[QueueRow]
    lost: int  # dead workers whose jobs no peer has recovered yet
    recent_timeouts: int  # of the newest failed and dead jobs, those ended by the default time-out that still holds
    stuck: Sequence[str] = ()  # jobs that cannot be ended, why, and what helps
    job_timeout: float = Settings().job_timeout
    own_timeouts: Sequence[Job] = ()  # the same of those that have a time-out of their own
    can_retry: bool = True  # is one of the dead jobs fit to be retried?


def status_lines(seen: Overview) -> Iterator[str]:
    """What `status` prints: jobs by state, workers, and hints."""
    for state, n in seen.counts.items():
        yield f"{coloured(state.value, f'{state.value:11}')} {n}"
    yield f"{'total':11} {sum(seen.counts.values())}"
    shown = ", ".join(f"{n} {state}" for state, n in worker_counts(seen.workers).items() if n)
    yield f"{'workers':11} {len(seen.workers)}" + (f" ({shown})" if shown else "")
    yield from hints(seen)


def status_json(seen: Overview) -> dict[str, Any]:
    """`status` as JSON."""
    return {
        "jobs": {state.value: n for state, n in seen.counts.items()},
        "total": sum(seen.counts.values()),
        "workers": {"total": len(seen.workers), **worker_counts(seen.workers)},
        "paused": [row.name for row in seen.queues if row.paused],
    }


def hints(seen: Overview) -> Iterator[str]:
    """What keeps the queue from progress, each with the command that helps."""
    yield from (f"! {line}" for line in seen.stuck)
    if seen.lost:
        yield f"! {seen.lost} dead worker(s) left jobs behind; a running worker recovers them: queuectl worker start"
    staying = [row for row in seen.workers if not row.stop]
    if not staying and any(seen.counts[state] for state in OPEN):
        yield f"! {nobody_works(seen.workers)}; start one: queuectl worker start"
    for queue in seen.queues:
        if queue.paused:
            yield f"! queue {queue.name} is paused; go on: queuectl queue resume {queue.name}"
        elif staying and any(queue.counts[s] for s in WAITING) and not any(row.takes(queue.name) for row in staying):
            yield f"! no worker takes queue {queue.name}: queuectl worker start --queue {queue.name}"
    if seen.recent_timeouts:
        more = f"queuectl config set job_timeout {longer(seen.job_timeout)}"
        yield f"! {seen.recent_timeouts} cut off by the default time-out; raise it: {more}"
    if seen.own_timeouts:
        named = seen.own_timeouts[:MOST_NAMED]
        more = f"{' '.join(job.id for job in named)} --timeout {longer(max(job.timeout or 0 for job in named))}"
        yield f"! {len(seen.own_timeouts)} cut off by their own time-out; raise it: queuectl edit {more}"
    if seen.counts[State.DEAD]:
        again = ", try again: queuectl dlq retry --all" if seen.can_retry else ""
        yield f"! {seen.counts[State.DEAD]} dead; look: queuectl dlq list{again}"


def queue_json(row: QueueRow) -> dict[str, Any]:
    """A queue as JSON shows it."""
    counts = {state.value: n for state, n in row.counts.items()}
    return {"queue": row.name, "paused": row.paused, "limit": row.max_running, "jobs": counts}


def queue_lines(rows: Sequence[QueueRow], width: int) -> Iterator[str]:
    """What `queue list` prints."""
    cells = [
        [row.name, *(str(n) for n in row.counts.values()), str(row.max_running or "-"), "paused" if row.paused else "-"]
        for row in rows
    ]
    yield from table(("QUEUE", *(state.value.upper() for state in State), "LIMIT", "PAUSED"), cells, width)


def export_line(job: Job) -> str:
    """A job as a line that `enqueue -` reads back.

    The key of a job that has ended is left out: several may share one, and all but the first would not be stored.
    """
    shown = {name: value for name, value in job_json(job).items() if name in FIELDS}
    if job.state in ENDED:
        shown["key"] = None
    return json.dumps({name: value for name, value in shown.items() if value is not None})


def spec_line(spec: Spec) -> str:
    """The same of a job that is not stored yet."""
    shown = {**spec, "run_at": iso_time(spec.get("run_at"))}
    return json.dumps({name: value for name, value in shown.items() if value is not None})


def batch_line(count: int, tag: str) -> str:
    """Return what a user reads after an `enqueue` of many jobs."""
    return f"{number_of(count, 'job')}, tag {tag}; follow them: queuectl wait --tag {tag}"


def worker_json(row: WorkerRow) -> dict[str, Any]:
    """A worker as JSON shows it."""
    return {
        "id": row.id, "pid": row.pid, "host": row.host, "slot": row.slot, "state": row.state, "job": row.job,
        "queues": row.queues, "since": iso_time(row.started_at),
    }  # fmt: skip


def worker_lines(workers: Sequence[WorkerRow], now: int, width: int) -> Iterator[str]:
    """What `worker list` prints."""
    if not workers:
        yield "no workers; start one: queuectl worker start"
        return
    rows = [
        [
            str(row.id), str(row.pid), printable(row.host), str(row.slot), row.state, ago(row.started_at, now),
            row.job or "-", ", ".join(row.queues or ["all"]),
        ]
        for row in workers
    ]  # fmt: skip
    yield from table(("ID", "PID", "HOST", "SLOT", "STATE", "SINCE", "JOB", "QUEUES"), rows, width)


def scaled_lines(started: Sequence[int], leaving: Sequence[WorkerRow]) -> Iterator[str]:
    """What `worker scale` prints."""
    yield from (f"worker {worker} started" for worker in started)
    for row in leaving:
        yield f"worker {row.id} leaves" + (f" after job {row.job}" if row.job else "")


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p95 and p99 of some values: the smallest value that so many per cent do not exceed."""
    ordered = sorted(values)
    return {
        f"p{p}": round(ordered[math.ceil(p / 100 * len(ordered)) - 1], 3) if ordered else None for p in (50, 95, 99)
    }


def metrics_json(
    counts: Mapping[State, int], times: Sequence[tuple[int, int, int]], tallies: Mapping[str, float]
) -> dict[str, Any]:
    """`metrics` as JSON. `times` are of completed jobs: when each could run, started and ended."""
    completed, dead = counts[State.COMPLETED], counts[State.DEAD]
    ended = sorted(end for _, _, end in times)
    span_s = max(1.0, (ended[-1] - ended[0]) / 1000) if ended else None
    return {
        "total": sum(counts.values()),
        "completed": completed,
        "dead": dead,
        "success_rate": round(100 * completed / (completed + dead), 1) if completed + dead else None,
        "wait_seconds": percentiles([max(0, start - since) / 1000 for since, start, _ in times]),
        "run_seconds": percentiles([(end - start) / 1000 for _, start, end in times]),
        "jobs_per_second": round(len(ended) / span_s, 3) if span_s else None,
        "attempts": int(tallies["run count"]),
        "attempts_by_result": {result: int(tallies[f"result {result}"]) for result in RESULTS},
        "retries": int(tallies["retries"]),
        "cpu_seconds": round(tallies["run cpu"], 3),
    }


def metrics_lines(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What `metrics` prints."""
    rate = metrics["success_rate"]
    yield f"📊 Total jobs: {metrics['total']}"
    yield f"✅ Completed: {metrics['completed']}"
    yield f"☠️ Dead: {metrics['dead']}"
    yield f"Success rate: {'-' if rate is None else f'{rate:.1f}%'}"
    for name, label in (("wait_seconds", "Wait"), ("run_seconds", "Run")):
        shown = (f"{p} {'-' if v is None else duration(v)}" for p, v in metrics[name].items())
        yield f"{label} time: {', '.join(shown)}"
    speed = metrics["jobs_per_second"]
    yield f"Attempts: {metrics['attempts']}, CPU time: {duration(metrics['cpu_seconds'])}"
    yield f"Throughput: {'-' if speed is None else f'{speed:g} jobs/s'} over the newest completed jobs"


def prometheus_lines(
    seen: Overview, tallies: Mapping[str, float], oldest: Mapping[str, int], now: int, versions: Mapping[str, str]
) -> Iterator[str]:
    """`metrics` in Prometheus' text format. `oldest` holds for each queue since when its first job waits."""
    yield from family("queuectl_build_info", "gauge", "Always 1; the labels name versions.", [(versions, 1)])
    jobs = [({"queue": row.name, "state": state.value}, n) for row in seen.queues for state, n in row.counts.items()]
    yield from family("queuectl_jobs", "gauge", "Jobs in each state.", jobs)
    workers = [({"state": state}, n) for state, n in worker_counts(seen.workers).items()]
    yield from family("queuectl_workers", "gauge", "Workers in each state.", workers)
    yield from queue_families(seen.queues, oldest, now)
    results = [({"result": result}, tallies[f"result {result}"]) for result in RESULTS]
    yield from family("queuectl_attempts_total", "counter", "Attempts that have ended, by how.", results)
    for name, text, tally in (
        ("timeouts", "Attempts that their time-out ended.", "result timed_out"),
        ("retries", "Attempts that came after a failed one of the same job.", "retries"),
        ("cpu_seconds", "CPU time of all attempts.", "run cpu"),
    ):
        yield from family(f"queuectl_{name}_total", "counter", text, [({}, tallies[tally])])
    yield from histogram("queuectl_wait_seconds", _WAIT_TEXT, tallies, "wait {}", [{}])
    yield from histogram("queuectl_run_seconds", "Time of an attempt.", tallies, "run {}", [{}])
    by_queue = [{"queue": row.name} for row in seen.queues]
    yield from histogram("queuectl_queue_wait_seconds", _WAIT_TEXT, tallies, "wait {} {queue}", by_queue)


_WAIT_TEXT = "From when a job could first run to its first start."


def queue_families(queues: Sequence[QueueRow], oldest: Mapping[str, int], now: int) -> Iterator[str]:
    """The metrics of each queue besides its jobs."""
    ages = [({"queue": row.name}, max(0, now - oldest.get(row.name, now)) / 1000) for row in queues]
    text = "How long the first of the jobs that only wait for a worker has waited; 0 where there is none."
    yield from family("queuectl_queue_oldest_waiting_seconds", "gauge", text, ages)
    paused = [({"queue": row.name}, int(row.paused)) for row in queues]
    yield from family("queuectl_queue_paused", "gauge", "1 where a queue is paused.", paused)
    limits = [({"queue": row.name}, row.max_running) for row in queues if row.max_running is not None]
    yield from family("queuectl_queue_limit", "gauge", "How many jobs of a limited queue may run at once.", limits)


def family(name: str, kind: str, text: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> Iterator[str]:
    """The lines of a counter or a gauge: a sample for each set of labels."""
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    yield from (sample(name, labels, value) for labels, value in samples)


def histogram(
    name: str, text: str, tallies: Mapping[str, float], tally: str, several: Iterable[Mapping[str, str]]
) -> Iterator[str]:
    """The lines of a histogram: buckets, sum and count for each set of labels. `tally` is the pattern of a name."""
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} histogram"
    for labels in several:

        def of(what: object, labels: Mapping[str, str] = labels) -> float:
            return tallies.get(tally.format(what, **labels), 0)

        yield from (sample(f"{name}_bucket", {**labels, "le": str(bucket)}, of(bucket)) for bucket in BUCKETS_S)
        yield sample(f"{name}_bucket", {**labels, "le": "+Inf"}, of("count"))
        yield sample(f"{name}_sum", labels, of("sum"))
        yield sample(f"{name}_count", labels, of("count"))


def sample(name: str, labels: Mapping[str, str], value: float) -> str:
    """The line of one value. No label needs escapes: the values are names of queues and states, and versions."""
    shown = ",".join(f'{label}="{text}"' for label, text in labels.items())
    return f"{name}{{{shown}}} {plain(value)}" if shown else f"{name} {plain(value)}"


def service_unit(python: str, program: str, home: str) -> str:
    """A systemd user unit that runs one worker."""
    return f"""[Unit]
Description=queuectl worker %i

[Service]
Environment={_unit_word(f"QUEUECTL_HOME={home}")}
ExecStart={_unit_word(python)} {_unit_word(program).replace("$", "$$")} worker start --foreground
# A stop sends SIGTERM to the worker alone, which finishes its job and leaves; what is left then is killed.
KillMode=mixed
TimeoutStopSec=infinity
# A job that is killed for want of memory fails; its worker goes on.
OOMPolicy=continue
Restart=on-failure

[Install]
WantedBy=default.target
"""


def _unit_word(text: str) -> str:
    """A word in quotes for a unit file, escaped: see systemd.syntax(7), and of `%` systemd.unit(5)."""
    escaped = printable(text.replace("\\", "\\\\")).replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


class ManEntry(NamedTuple):
    """A command for the manual page; `options` are pairs of usage and meaning."""

    usage: str
    help: str
    options: Sequence[tuple[str, str]]


_ROFF = str.maketrans({"\\": r"\e", "-": r"\-", "'": r"\(aq", "^": r"\(ha", "~": r"\(ti"})
_MAN_FORMS = (
    "queuectl enqueue [OPTIONS] -- COMMAND [ARG]...",
    "queuectl enqueue [OPTIONS] JSON",
    "queuectl enqueue [OPTIONS] -",
    "queuectl enqueue --each FILE [OPTIONS] -- COMMAND [ARG]...",
    "queuectl COMMAND [OPTIONS] [ARG]...",
)
_MAN_DESCRIPTION = (
    "queuectl stores commands as jobs in a database and runs them in the background. Workers run the jobs: several "
    "at a time, by priority, not before their time, and again when they fail.",
    "An id that `enqueue` has printed is on disk. A job never runs twice at once, also where its worker is killed.",
    "The option -h or --help after a command shows its options; --version shows the version. Where a command takes "
    "the option --json, it prints one JSON document. A TIME is a number of seconds, or has units: 90s, 10m, 1h30m, 7d.",
)
_MAN_EXIT_CODES = (
    ("0", "Done. For `wait`: all jobs completed."),
    ("1", "It could not be done. For `wait`: some jobs did not complete. For `doctor`: something is wrong."),
    ("2", "Wrong usage or bad input."),
    (f"{EX_TIMED_OUT}", "`wait`: the jobs did not end in time. `enqueue --wait`: the job timed out."),
    (f"{EX_INTERRUPTED}", "Interrupted by Ctrl-C."),
    ("other", "`enqueue --wait`: the exit code of the job, or 128 + the signal that ended it."),
)
_MAN_VARIABLES = (
    ("QUEUECTL_HOME", "The directory of the queue; default ~/.queuectl. A job sees that of its queue."),
    ("NO_COLOR", "Where it is set, output has no colour."),
    ("QUEUECTL_JOB_ID", "For a job: its id."),
    ("QUEUECTL_ATTEMPT", "For a job: 1 at the first attempt, 2 at the first retry, and so on."),
    ("QUEUECTL_QUEUE", "For a job: its queue."),
    ("QUEUECTL_SLOT", "For a job: the number of its worker, the lowest that no other living worker of this home has."),
    ("QUEUECTL_ITEM", "For one of many jobs of a call: its item."),
    ("QUEUECTL_INDEX", "For one of many jobs of a call: the number of its item, from 1."),
    ("QUEUECTL_RUN", "For a job: the run tag of this attempt, by which its processes are found. Leave it alone."),
)
_MAN_FILES = (
    ("~/.queuectl", "The home, where QUEUECTL_HOME names no other directory. It holds:"),
    ("queue.db", "The queue, an SQLite database in WAL mode."),
    ("job_logs/ID.log", "What a job wrote to its standard output and standard error."),
    ("worker.log", "What workers report, and the output of hooks."),
    ("bells", "The files through which workers are woken."),
)


def roff(text: str) -> str:
    """Text that roff prints as it stands; words in backquotes become bold."""
    literal = " ".join(text.split()).translate(_ROFF)
    literal = re.sub("`([^`]+)`", r"\\fB\1\\fR", literal).replace("`", r"\(ga")
    literal = "".join(c if c.isascii() else rf"\[u{ord(c):04X}]" for c in literal)
    return rf"\&{literal}" if literal.startswith(".") else literal  # or the line would be a request


def man_items(items: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Terms in bold, each with its meaning indented below."""
    for term, meaning in items:
        yield from (".TP", rf"\fB{roff(term)}\fR", roff(meaning))


def man_paragraphs(paragraphs: Iterable[str]) -> Iterator[str]:
    """Paragraphs of text."""
    for paragraph in paragraphs:
        yield from (".PP", roff(paragraph))


def man_commands(commands: Iterable[ManEntry]) -> Iterator[str]:
    """A subsection for each command."""
    for command in commands:
        yield f".SS {roff(command.usage)}"
        yield from man_paragraphs(command.help.split("\n\n"))
        yield from man_items(command.options)


def man_page(version: str, commands: Iterable[ManEntry]) -> Iterator[str]:
    """The manual page `queuectl(1)`, in roff with the macros of man(7)."""
    fields = ((name, field.help) for name, field in FIELDS.items())
    defaults = Settings()._asdict()
    settings = ((key, f"{setting.help}; default {plain(defaults[key]) or 'none'}") for key, setting in SETTINGS.items())
    sections: dict[str, Iterable[str]] = {
        "NAME": [r"queuectl \- a background job queue for commands"],
        "SYNOPSIS": (line for form in _MAN_FORMS for line in (rf"\fB{roff(form)}\fR", ".br")),
        "DESCRIPTION": man_paragraphs(_MAN_DESCRIPTION),
        "COMMANDS": man_commands(commands),
        "FIELDS": [*man_paragraphs(["The fields of a job in JSON, where a TIME is a number of seconds."]),
                   *man_items(fields)],
        "CONFIG": [*man_paragraphs(["What `config set` takes; max-retries is the same key as max_retries."]),
                   *man_items(settings)],
        "EXIT STATUS": man_items(_MAN_EXIT_CODES),
        "ENVIRONMENT": man_items(_MAN_VARIABLES),
        "FILES": man_items(_MAN_FILES),
    }  # fmt: skip
    yield from (f'.TH QUEUECTL 1 "" "queuectl {version}" "User Commands"', ".nh", ".ad l")
    for title, lines in sections.items():
        yield f".SH {title}"
        yield from lines


def install_lines(path: str, instance: str) -> Iterator[str]:
    """What `service --install` prints: where the unit is, and what starts it."""
    yield f"{printable(path)} is there; start it:"
    yield "  systemctl --user daemon-reload"
    yield f"  systemctl --user enable --now {instance}"


def passed_over_line(jobs: Sequence[Job], total: int) -> str | None:
    """A line that names some jobs of a call that were left as they are because they have ended."""
    if not jobs:
        return None
    named = [f"{job.id} is {job.state.value}" for job in jobs[:3]]
    more = [f"{len(jobs) - len(named)} more"] if len(jobs) > len(named) else []
    return f"passed over {len(jobs)} of {number_of(total, 'job')}, which had ended: {', '.join(named + more)}"


def changed_fields(before: Job, after: Job) -> list[str]:
    """The fields in which a job differs from what it was."""
    return [name for name in STORED if getattr(before, name) != getattr(after, name)]


def edit_line(before: Job, after: Job) -> str:
    """What an `edit` has changed about a job; of its variables only that they did."""
    words = [
        name if name == "env" else f"{name} {field_text(before, name)} -> {field_text(after, name)}"
        for name in changed_fields(before, after)
    ]
    return f"{after.id} edited: {', '.join(words)}" if words else f"{after.id} is so already"


def field_text(job: Job, name: str) -> str:
    """The value of a field in a line for a person; `-` where nothing is said."""
    value = getattr(job, name)
    if name in ("command", "run_at"):
        value = command_line(value) if name == "command" else iso_time(value)
    return "-" if value is None else printable(plain(str(value).lower() if isinstance(value, bool) else value))


def how_ended(job: Job) -> str:
    """A line about a job that did not complete, with its error."""
    return f"{job.id} is {job.state.value}" + (f": {job.error}" if job.error else "")


def error_line(job: Job, history: Sequence[Attempt], number: int | None) -> str | None:
    """What went wrong with a job, or with one of its attempts, for who finds no output; None where nothing did."""
    if number is None:
        return f"job {how_ended(job)}" if job.error else None
    errors = [attempt.error for attempt in history if attempt.number == number and attempt.error]
    return f"attempt {number} of job {job.id}: {errors[-1]}" if errors else None


def exit_code_of(job: Job, last: Attempt | None) -> int:
    """The exit code that a shell gives for such an end: the job's own, 128 + signal, 124 after a time-out."""
    if job.state is State.COMPLETED:
        return 0
    if job.state is State.CANCELLED and not (last and last.ended_by == EndReason.CANCELLED.value):
        return 1  # it was cancelled while it did not run
    if last and last.ended_by == EndReason.TIMED_OUT.value:
        return EX_TIMED_OUT
    if job.exit_code is None and last and last.signal:
        return 128 + last.signal
    return job.exit_code or 1


def exit_code_of_all(counts: Mapping[State, int] | None) -> int:
    """The exit code for several jobs: 0 where all completed. `counts` is None where the wait timed out."""
    if counts is None:
        return EX_TIMED_OUT
    return int(any(counts[state] for state in HOPELESS))


# ======================================================================== schema

APPLICATION_ID = 0x71637431  # "qct1", so that a stranger's database is told from ours

# Append-only; a database's position in this list is its `PRAGMA user_version`.
MIGRATIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "1: the queue",
        (
            f"PRAGMA application_id = {APPLICATION_ID}",
            # The class Job describes the columns; FIELDS describes those that `enqueue` takes.
            """CREATE TABLE jobs (
                seq INTEGER PRIMARY KEY AUTOINCREMENT,
                id TEXT NOT NULL UNIQUE COLLATE NOCASE,
                command TEXT NOT NULL,
                priority INTEGER NOT NULL DEFAULT 0,
                max_retries INTEGER,
                timeout REAL,
                backoff_base REAL,
                run_at INTEGER,
                queue TEXT NOT NULL DEFAULT 'default',
                tag TEXT,
                key TEXT,
                cwd TEXT NOT NULL,
                env TEXT,
                after TEXT,
                hold INTEGER NOT NULL DEFAULT 0,
                on_lost TEXT NOT NULL DEFAULT 'retry',
                ok_codes TEXT,
                no_retry_codes TEXT,
                snooze INTEGER NOT NULL DEFAULT 0,
                state TEXT NOT NULL DEFAULT 'pending' CHECK (
                    state IN ('pending', 'processing', 'completed', 'failed', 'dead', 'cancelled')),
                attempts INTEGER NOT NULL DEFAULT 0,
                blockers INTEGER NOT NULL DEFAULT 0,
                due_at INTEGER,
                doomed_by INTEGER,
                cancelling INTEGER NOT NULL DEFAULT 0,
                created_at INTEGER NOT NULL,
                updated_at INTEGER NOT NULL,
                started_at INTEGER,
                finished_at INTEGER,
                exit_code INTEGER,
                error TEXT,
                worker INTEGER,
                -- May it be claimed? Derived, so that it cannot be wrong.
                ready INTEGER GENERATED ALWAYS AS (
                    state IN ('pending', 'failed') AND hold = 0 AND blockers = 0 AND due_at IS NULL) VIRTUAL
            )""",
            # The claim reads the first entry of each queue, promotion the first that came due.
            "CREATE INDEX jobs_ready ON jobs (queue, priority DESC, seq) WHERE ready",
            "CREATE INDEX jobs_due ON jobs (due_at) WHERE due_at IS NOT NULL AND hold = 0 AND blockers = 0",
            "CREATE INDEX jobs_state ON jobs (state, seq)",
            "CREATE INDEX jobs_tag ON jobs (tag) WHERE tag IS NOT NULL",
            # The row itself is the lock on its key, so the lock cannot go stale.
            """CREATE UNIQUE INDEX jobs_key ON jobs (key)
                WHERE key IS NOT NULL AND state IN ('pending', 'processing', 'failed')""",
            # The class Attempt describes the columns; n numbers the rows of a job.
            """CREATE TABLE attempts (
                job INTEGER NOT NULL, n INTEGER NOT NULL, number INTEGER NOT NULL, worker INTEGER NOT NULL,
                started_at INTEGER NOT NULL, ended_at INTEGER NOT NULL, exit_code INTEGER, signal INTEGER,
                ended_by TEXT NOT NULL, error TEXT, max_rss INTEGER, cpu_s REAL, log_start INTEGER, log_end INTEGER,
                PRIMARY KEY (job, n)) WITHOUT ROWID""",
            # The child waits until the parent has completed.
            """CREATE TABLE dependencies (
                parent INTEGER NOT NULL, child INTEGER NOT NULL, PRIMARY KEY (parent, child)) WITHOUT ROWID""",
            "CREATE INDEX dependencies_child ON dependencies (child)",
            # Only paused or limited queues have a row.
            """CREATE TABLE queues (
                name TEXT PRIMARY KEY,
                paused INTEGER NOT NULL DEFAULT 0,  -- nothing new is started
                max_running INTEGER  -- at most so many at once
                ) WITHOUT ROWID""",
            """CREATE TABLE workers (
                id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice: it names the bell
                pid INTEGER NOT NULL,  -- to be read by people; nothing is ever signalled by it
                host TEXT NOT NULL,
                slot INTEGER NOT NULL,  -- the lowest number that no other live worker holds
                queues TEXT,  -- JSON array of those that it takes, null for all
                drain INTEGER NOT NULL DEFAULT 0,  -- leaves when nothing is left that could run
                stop TEXT CHECK (stop IN ('finish', 'now')),  -- it is to leave, after its job or at once
                started_at INTEGER NOT NULL)""",
            # The contribution of removed jobs to the counters of `metrics --prometheus`.
            "CREATE TABLE past (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID",
            "CREATE TABLE config (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
            # The number of jobs in each state, by queue. Only the triggers write to it.
            """CREATE TABLE counts (
                state TEXT NOT NULL, queue TEXT NOT NULL, n INTEGER NOT NULL,
                PRIMARY KEY (state, queue)) WITHOUT ROWID""",
            # The best ready job of each queue that is neither paused nor full: few rows, however many jobs.
            """CREATE VIEW heads AS
                SELECT head.seq, head.priority, head.queue FROM counts AS waiting
                JOIN jobs AS head ON head.seq = (
                    SELECT seq FROM jobs WHERE ready AND queue = waiting.queue ORDER BY priority DESC, seq LIMIT 1)
                LEFT JOIN queues ON queues.name = waiting.queue
                WHERE waiting.state IN ('pending', 'failed') AND waiting.n > 0
                AND NOT coalesce(queues.paused, 0)
                AND (queues.max_running IS NULL OR queues.max_running > coalesce((
                    SELECT n FROM counts WHERE state = 'processing' AND queue = waiting.queue), 0))""",
            """CREATE TRIGGER jobs_inserted AFTER INSERT ON jobs BEGIN
                INSERT INTO counts VALUES (NEW.state, NEW.queue, 1) ON CONFLICT DO UPDATE SET n = n + 1;
            END""",
            """CREATE TRIGGER jobs_moved AFTER UPDATE OF state, queue ON jobs
                WHEN OLD.state <> NEW.state OR OLD.queue <> NEW.queue BEGIN
                UPDATE counts SET n = n - 1 WHERE state = OLD.state AND queue = OLD.queue;
                INSERT INTO counts VALUES (NEW.state, NEW.queue, 1) ON CONFLICT DO UPDATE SET n = n + 1;
            END""",
            # It runs before the delete, because dependencies_deleted must still see the state of the parent.
            """CREATE TRIGGER jobs_before_delete BEFORE DELETE ON jobs WHEN OLD.state = 'completed' BEGIN
                DELETE FROM dependencies WHERE parent = OLD.seq;
            END""",
            """CREATE TRIGGER jobs_deleted AFTER DELETE ON jobs BEGIN
                UPDATE counts SET n = n - 1 WHERE state = OLD.state AND queue = OLD.queue;
                DELETE FROM attempts WHERE job = OLD.seq;
                DELETE FROM dependencies WHERE child = OLD.seq;
            END""",
            # The next three keep `blockers`: the parents of a job that have not completed, those
            # that were removed before they had among them.
            """CREATE TRIGGER jobs_completed AFTER UPDATE OF state ON jobs WHEN NEW.state = 'completed' BEGIN
                UPDATE jobs SET blockers = blockers - 1
                    WHERE seq IN (SELECT child FROM dependencies WHERE parent = NEW.seq);
            END""",
            """CREATE TRIGGER dependencies_inserted AFTER INSERT ON dependencies BEGIN
                UPDATE jobs SET blockers = blockers + 1 WHERE seq = NEW.child
                    AND (SELECT state FROM jobs WHERE seq = NEW.parent) <> 'completed';
            END""",
            """CREATE TRIGGER dependencies_deleted AFTER DELETE ON dependencies BEGIN
                UPDATE jobs SET blockers = blockers - 1 WHERE seq = OLD.child
                    AND (SELECT state FROM jobs WHERE seq = OLD.parent) IS NOT 'completed';
            END""",
        ),
    ),
    (
        "2: the words of the field",
        (
            "ALTER TABLE past RENAME TO removed_tallies",
            "DROP VIEW heads",
            "ALTER TABLE jobs RENAME COLUMN doomed_by TO failed_parent",
            # The best ready job of each queue that is neither paused nor full: few rows, however many jobs.
            """CREATE VIEW claimable AS
                SELECT best.seq, best.priority, best.queue FROM counts AS waiting
                JOIN jobs AS best ON best.seq = (
                    SELECT seq FROM jobs WHERE ready AND queue = waiting.queue ORDER BY priority DESC, seq LIMIT 1)
                LEFT JOIN queues ON queues.name = waiting.queue
                WHERE waiting.state IN ('pending', 'failed') AND waiting.n > 0
                AND NOT coalesce(queues.paused, 0)
                AND (queues.max_running IS NULL OR queues.max_running > coalesce((
                    SELECT n FROM counts WHERE state = 'processing' AND queue = waiting.queue), 0))""",
        ),
    ),
    (
        "3: who a worker is, and what it cannot end",
        (
            "ALTER TABLE workers ADD COLUMN process TEXT",  # null in a row of release 1.0
            "ALTER TABLE workers ADD COLUMN leftovers TEXT",
        ),
    ),
    (
        "4: a completed job may run again, and the newest attempts are found at once",
        (
            """CREATE TRIGGER jobs_reopened AFTER UPDATE OF state ON jobs
                WHEN OLD.state = 'completed' AND NEW.state <> 'completed' BEGIN
                UPDATE jobs SET blockers = blockers + 1
                    WHERE seq IN (SELECT child FROM dependencies WHERE parent = NEW.seq);
            END""",
            "CREATE INDEX jobs_started ON jobs (started_at) WHERE started_at IS NOT NULL",
            # Small: it holds the attempts that failed, and no claim touches it.
            """CREATE INDEX attempts_failed ON attempts (ended_at)
                WHERE error IS NOT NULL AND ended_by NOT IN ('given back', 'cancelled')""",
        ),
    ),
    (
        "5: many jobs at once, in short transactions",
        (
            # Dead and cancelled jobs whose waiting children are still to be failed: those above `child`.
            """CREATE TABLE failing (
                parent INTEGER PRIMARY KEY, child INTEGER NOT NULL DEFAULT 0)""",
            """CREATE TRIGGER jobs_failed AFTER UPDATE OF state ON jobs WHEN NEW.state IN ('dead', 'cancelled')
                AND EXISTS (SELECT 1 FROM dependencies WHERE parent = NEW.seq) BEGIN
                INSERT INTO failing (parent) VALUES (NEW.seq) ON CONFLICT DO UPDATE SET child = 0;
            END""",
            """CREATE TRIGGER dependencies_failed AFTER INSERT ON dependencies
                WHEN (SELECT state FROM jobs WHERE seq = NEW.parent) IN ('dead', 'cancelled') BEGIN
                INSERT INTO failing VALUES (NEW.parent, NEW.child - 1)
                    ON CONFLICT DO UPDATE SET child = min(child, NEW.child - 1);
            END""",
            # Counted once for each child, where a trigger would rewrite its row once for each of its parents.
            "DROP TRIGGER dependencies_inserted",
            "DROP TRIGGER dependencies_deleted",
            # What has ended is not due, so promotion meets only what can run.
            """UPDATE jobs SET due_at = NULL
                WHERE due_at IS NOT NULL AND state IN ('completed', 'dead', 'cancelled')""",
            # Where very many jobs are due, promotion reads the best of each queue.
            """CREATE INDEX jobs_due_best ON jobs (queue, priority DESC, due_at)
                WHERE due_at IS NOT NULL AND hold = 0 AND blockers = 0""",
        ),
    ),
)


# ======================================================================== database

_Result = TypeVar("_Result")


def _is_busy(error: Exception) -> bool:
    return isinstance(error, sqlite3.OperationalError) and ("locked" in str(error) or "busy" in str(error))


def _domain_error(path: str, error: Exception) -> QueueError:
    """Translate an error of sqlite3 into one of ours, in one line that says what to do."""
    text = printable(str(error))
    if isinstance(error, UnicodeEncodeError):
        return BadInput("what was given is not valid Unicode")
    path = printable(path)
    if "json_array" in text:
        return StoreError(f"needs an SQLite with its JSON functions; this Python's {sqlite3.sqlite_version} has none")
    if _is_busy(error):
        return StoreBusy(f"another program holds {path}; try again when it is done")
    if "full" in text or "disk I/O" in text:  # SQLite reports a shared memory file that cannot grow as an I/O error
        return StoreError(f"cannot use {path}, its disk is full or failing ({text})")
    if "decode to" in text:
        return Damaged(f"{path} holds bytes that are no text, as damage leaves them; look: queuectl doctor")
    is_damage = ("not a database", "malformed", "no such", "too big")
    if isinstance(error, UnicodeDecodeError) or any(words in text for words in is_damage):
        return Damaged(f"{path} is damaged ({text}); move it away, or put a backup in its place")
    return StoreError(f"cannot use {path}: {text}")


def _any_text(value: bytes) -> str:
    """Decode a text of the database, also where its bytes are not valid UTF-8."""
    return value.decode(errors="surrogateescape")


def sqlite_version() -> str:
    """Return the version of the SQLite library that this Python uses."""
    return sqlite3.sqlite_version


class Transaction:
    """A transaction as a context manager. Entered again while it is open, it joins the outer one."""

    def __init__(
        self, begin: Callable[[], object], commit: Callable[[], object], roll_back: Callable[[], object],
        has_failed: Callable[[StoreError], None],
    ) -> None:  # fmt: skip
        self._begin, self._commit, self._roll_back, self._has_failed = begin, commit, roll_back, has_failed
        self._depth = 0

    def __enter__(self) -> None:
        if not self._depth:
            try:
                self._begin()
            except StoreError as error:
                self._has_failed(error)
                raise
        self._depth += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        try:
            if kind is None:
                self._commit()
        except StoreError as failed:
            self._has_failed(failed)
            raise
        finally:
            self._roll_back()
        if isinstance(error, StoreError):
            self._has_failed(error)


class Connection:
    """A connection to a database: transactions, waiting for others, and the driver's errors made ours."""

    def __init__(self, path: str, busy_timeout_s: float) -> None:
        if sqlite3.sqlite_version_info < (3, 35):
            raise QueueError(f"needs SQLite 3.35 or later; this Python has {sqlite3.sqlite_version}")
        self.path, self.busy_timeout_s = path, busy_timeout_s
        self.commits = 0  # of this connection, without those that migrate the schema
        self._tables = itertools.count(1)  # numbers its temporary tables
        try:
            self._connection = sqlite3.connect(path, timeout=0, isolation_level=None)
        except (sqlite3.Error, UnicodeError) as error:
            raise _domain_error(path, error) from error
        self._writing = self._transaction("BEGIN IMMEDIATE", self._commit)
        self._staging = self._transaction("BEGIN", functools.partial(self.run, "COMMIT"))

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def writing(self) -> Transaction:
        """Return the write transaction. Entered inside another `writing`, it joins that one."""
        return self._writing

    def staging(self) -> Transaction:
        """Return a transaction on temporary tables, which takes no lock on the database."""
        return self._staging

    def _transaction(self, begin: str, commit: Callable[[], object]) -> Transaction:
        return Transaction(functools.partial(self.run, begin), commit, self._roll_back, self._note_unchanged)

    def _note_unchanged(self, error: StoreError) -> None:
        """Let an error say that nothing was stored, unless this connection has committed something before."""
        if not self.commits:
            error.effect = error.effect or "nothing was stored"

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            self.run("ROLLBACK")

    def _commit(self) -> None:
        """Commit. A commit that fails is undone for certain, or StoreUncertain says that it may come back."""
        try:
            self.run("COMMIT")
        except StoreBusy:
            raise
        except StoreError as error:
            self._roll_back()
            if not self._overwrite_wal():
                raise StoreUncertain(error.reason) from error
            raise
        self.commits += 1

    def _overwrite_wal(self) -> bool:
        """Overwrite what a failed commit has left in the WAL; False where that fails too.

        SQLite appends a transaction to the WAL and then waits for the disk. Where that wait fails, the transaction
        stays behind the end of the WAL that the others see. The next writer overwrites it, but if every process
        dies before that, the next one reads the WAL anew and takes the transaction for committed.
        """
        for level in ("FULL", "OFF"):  # OFF does not wait for the disk, which may be what fails
            with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(self.path)) as other:
                other.isolation_level = None
                other.execute(f"PRAGMA busy_timeout = {round(self.busy_timeout_s * 1000)}")
                other.execute(f"PRAGMA synchronous = {level}")
                other.execute("BEGIN IMMEDIATE")
                version = other.execute("PRAGMA user_version").fetchone()[0]
                other.execute(f"PRAGMA user_version = {version}")  # writes a page, and changes nothing
                other.execute("COMMIT")
                return True
        return False

    def all(self, sql: str, **values: Any) -> list[Any]:
        """Return all rows of a statement."""
        changes = "RETURNING" in sql
        return self._until_free(lambda: self._connection.execute(sql, values).fetchall(), changes)

    def rows(self, sql: str, **values: Any) -> Iterator[Any]:
        """Yield the rows of a statement one by one, for large results."""
        self._connection.text_factory = _any_text  # a generator cannot start over as `_until_free` does
        try:
            for row in self._connection.execute(sql, values):  # noqa: UP028 (that would close it, after the database perhaps)
                yield row
        except (sqlite3.Error, UnicodeError) as error:
            raise _domain_error(self.path, error) from error

    def one(self, sql: str, **values: Any) -> Any:
        rows = self.all(sql, **values)
        return rows[0] if rows else None

    def run(self, sql: str, **values: Any) -> int:
        """Run a statement, and return the number of rows that it changed."""
        return self._until_free(lambda: self._connection.execute(sql, values).rowcount)

    def insert_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run a statement for each row."""
        try:
            self._connection.executemany(sql, rows)
        except (sqlite3.Error, UnicodeError) as error:
            raise _domain_error(self.path, error) from error

    def _until_free(self, action: Callable[[], _Result], changes: bool = True) -> _Result:
        """What an action gives, tried again until nobody else holds the database or the busy timeout is over.

        SQLite itself would sleep for 1 ms at least, where a worker holds the lock for a tenth of that, and then
        ever longer, up to 100 ms, while others come and go. A switch to WAL it does not wait for at all. Only
        the pauses count as waiting: a process that was stopped meanwhile has not tried.
        """
        left_s = self.busy_timeout_s
        pause_s, most_s = BUSY_PAUSES_S
        while True:
            try:
                return action()
            except sqlite3.IntegrityError as error:
                raise Conflict(str(error)) from error
            except (sqlite3.Error, UnicodeError) as error:
                if self._learns_to_decode(error) and not changes:
                    continue
                if not _is_busy(error) or left_s <= 0:
                    raise _domain_error(self.path, error) from error
            time.sleep(pause_s)
            left_s -= pause_s
            pause_s = min(2 * pause_s, most_s)

    def _learns_to_decode(self, error: Exception) -> bool:
        """Take any bytes for text from now on, where some were none: is it worth another try?

        sqlite3's own decoding is faster, and bytes that are no text are rare. A statement that has changed
        something already must not be run again; a worker runs its whole transaction again.
        """
        if "decode to UTF-8" not in str(error) or self._connection.text_factory is not str:
            return False
        self._connection.text_factory = _any_text
        return True

    def make_table(self, columns: str) -> str:
        """Make a temporary table, which lasts as long as the connection, and return its name."""
        name = f"temp.t{next(self._tables)}"
        self.run(f"CREATE TABLE {name} ({columns})")
        return name

    def set_savepoint(self) -> None:
        """Remember what the open transaction has done so far."""
        self.run("SAVEPOINT here")

    def undo_to_savepoint(self) -> None:
        """Undo what the open transaction has done since its savepoint, which stays."""
        self.run("ROLLBACK TO here")

    def wait_for_disk(self, on: bool) -> None:
        """Choose whether a commit waits for the disk."""
        self.run(f"PRAGMA synchronous = {'FULL' if on else 'NORMAL'}")


class Database(Connection):
    """A connection to the database of a queue: its schema, durability, change notice and copies.

    What a command commits is on disk before it returns (`synchronous=FULL`). With `durable=False`, for workers,
    a power cut may take back the newest steps but leaves none half done.
    """

    def __init__(self, path: str, busy_timeout_s: float = BUSY_TIMEOUT_S, *, durable: bool = True) -> None:
        super().__init__(path, busy_timeout_s)
        try:
            self._bring_up()
            self.commits = 0
            self.wait_for_disk(durable)
            if not durable:
                self.run(f"PRAGMA wal_autocheckpoint = {WORKER_CHECKPOINT_PAGES}")
                self.run(f"PRAGMA cache_size = -{WORKER_CACHE_KIB}")
        except StoreError:
            self.close()
            raise

    # ---- schema

    def _bring_up(self) -> None:
        """Create or migrate the schema. Refuse a newer schema and the database of another program."""
        if self._schema_version() == len(MIGRATIONS):
            return
        self.run(f"PRAGMA page_size = {PAGE_BYTES}")
        if self.one("PRAGMA journal_mode = WAL")[0] != "wal":
            raise StoreError(f"{self.path} lies on a file system that cannot hold a WAL database; use a local one")
        with self.writing():  # two processes may be here at once, so read the version again inside
            version = self._schema_version()
            for _, statements in MIGRATIONS[version:]:
                for statement in statements:
                    self.run(statement)
            if version:  # workers of the older queuectl claim nothing from this moment on
                self.run("UPDATE workers SET stop = 'finish' WHERE stop IS NULL")
            self.run(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _schema_version(self) -> int:
        """Return the version of the schema. Raise StoreError if it is newer than this file, or not ours."""
        version, application, has_tables, _ = (
            self.one(  # in one statement, because another process may be creating the schema
                """SELECT user_version, application_id, EXISTS (SELECT 1 FROM sqlite_master),
                json_array()  -- an SQLite before 3.38 may have been built without it
            FROM pragma_user_version, pragma_application_id"""
            )
        )
        if application != APPLICATION_ID and (version or has_tables):
            raise StoreError(f"{self.path} is the database of another program; set QUEUECTL_HOME to another directory")
        if version > len(MIGRATIONS):
            raise StoreError(f"{self.path} was made by a newer queuectl (schema {version}); upgrade queuectl")
        return int(version)

    def is_newer(self) -> bool:
        """Has a newer queuectl brought the schema up since this database was opened?"""
        return bool(self.one("PRAGMA user_version")[0] > len(MIGRATIONS))

    # ---- statements

    # ---- change notice and durability

    def commits_seen(self) -> int:
        """Return a number that changes whenever another connection commits."""
        return int(self.one("PRAGMA data_version")[0])

    def checkpoint(self) -> None:
        """Copy committed pages from the WAL into the database. This waits for the disk, and blocks nobody."""
        self.run("PRAGMA wal_checkpoint(PASSIVE)")

    def sync(self) -> None:
        """Flush all commits to disk, whatever `durable` says. Only a commit that writes a page flushes the WAL."""
        self.wait_for_disk(True)
        with self.writing():
            self.run("UPDATE sqlite_sequence SET seq = seq WHERE name = 'workers'")
        self.wait_for_disk(False)

    # ---- copies

    def damage(self) -> list[str]:
        """Return what `PRAGMA integrity_check` finds; nothing if the file is sound."""
        return [row[0] for row in self.all("PRAGMA integrity_check") if row[0] != "ok"]

    def back_up(self, path: str) -> None:
        """Write a consistent copy of the database to a file, while workers go on."""
        try:
            with contextlib.closing(sqlite3.connect(path)) as copy:
                self._connection.backup(copy)
        except (sqlite3.Error, UnicodeError) as error:
            raise _domain_error(path, error) from error

    def restore(self, copy: Database, inspect: Callable[[Database], None]) -> None:
        """Replace this database by another, in one step.

        `inspect` is given a second connection to the queue as it is once nobody else can change it; it raises
        where the queue is to stay as it is.
        """
        seen: list[bool] = []

        def inspect_once(*_: object) -> None:
            if not seen:
                seen.append(True)
                with contextlib.closing(Database(self.path)) as before:
                    inspect(before)

        with self.writing():
            pass  # waits for the lock with our busy timeout; the copy itself would wait for ever
        try:
            # The first progress call comes after the lock is taken and before the last page is copied.
            copy._connection.backup(self._connection, pages=10, progress=inspect_once)
        except (sqlite3.Error, UnicodeError) as error:
            raise _domain_error(self.path, error) from error


def copy_backup(path: str, to: str) -> None:
    """Copy a backup to a new file; StoreError where it is none, or damaged, or newer than this file."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as backup, contextlib.closing(sqlite3.connect(to)) as copy:
            _refuse_copy(path, backup)
            backup.backup(copy)
    except (sqlite3.Error, UnicodeError) as error:
        raise _domain_error(path, error) from error


def _refuse_copy(path: str, copy: sqlite3.Connection) -> None:
    """Raise StoreError if a copy cannot replace a queue."""
    if copy.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise StoreError(f"{path} is no backup of a queue")
    if copy.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
        raise StoreError(f"{path} is damaged; nothing was restored")
    if copy.execute("PRAGMA user_version").fetchone()[0] > len(MIGRATIONS):
        raise StoreError(f"{path} was made by a newer queuectl; upgrade queuectl")


# ======================================================================== store

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_COLUMNS = ", ".join(COLUMNS)
_SELECT = f"SELECT {_COLUMNS} FROM jobs "
SORTS = {  # the sort keys of `list`, and their columns
    "seq": "seq", "id": "id", "state": "state", "queue": "queue", "priority": "priority", "attempts": "attempts",
    "created": "created_at", "changed": "updated_at",
}  # fmt: skip
_STAGED = (*STORED, "created_at")
_ANSWERED = "SELECT id, is_new FROM staged"
_staged_row = operator.itemgetter(*_STAGED, "origin")


def _states_in(states: Sequence[State]) -> str:
    """Return an SQL condition on the column `state`."""
    return f"state IN ({', '.join(repr(state.value) for state in states)})"


IS_WAITING, IS_OPEN, IS_HOPELESS, IS_ENDED = map(_states_in, (WAITING, OPEN, HOPELESS, ENDED))
_COUNT_BLOCKERS = """UPDATE jobs SET blockers = (SELECT count(*) FROM dependencies LEFT JOIN jobs AS parent
    ON parent.seq = dependencies.parent WHERE child = jobs.seq AND parent.state IS NOT 'completed')"""
_IS_PARENT_REMOVED = "parent NOT IN (SELECT seq FROM jobs)"
_IS_TIMED = "due_at IS NOT NULL AND hold = 0 AND blockers = 0"  # the condition of the indexes of due jobs
_TALLIES = {  # what `metrics` sums over all attempts, each by its name; those of waits are also kept for each queue
    "run count": "count(run)",
    "run sum": "total(run)",
    "run cpu": "total(cpu_s)",
    **{f"run {bucket}": f"total(run <= {bucket})" for bucket in BUCKETS_S},
    "wait count": "count(wait)",
    "wait sum": "total(wait)",
    **{f"wait {bucket}": f"total(wait <= {bucket})" for bucket in BUCKETS_S},
    "retries": "total(is_retry)",
    **{f"result {result}": f"total(result = '{result}')" for result in RESULTS},
}


# Of each queue the due jobs of the highest priority that has any: from one priority to the next, whatever each holds.
_BEST_DUE = f"""WITH RECURSIVE firsts(queue, priority, due_at) AS (
        SELECT * FROM (SELECT queue, priority, due_at FROM jobs WHERE {_IS_TIMED}
            ORDER BY queue, priority DESC, due_at LIMIT 1)
        UNION ALL SELECT next.queue, next.priority, next.due_at FROM firsts JOIN jobs AS next ON next.seq = coalesce(
            (SELECT seq FROM jobs WHERE {_IS_TIMED} AND firsts.due_at > :now
                AND queue = firsts.queue AND priority < firsts.priority ORDER BY priority DESC, due_at LIMIT 1),
            (SELECT seq FROM jobs WHERE {_IS_TIMED} AND queue > firsts.queue
                ORDER BY queue, priority DESC, due_at LIMIT 1)))
    SELECT best.seq FROM firsts JOIN jobs AS best ON best.seq IN (SELECT seq FROM jobs WHERE {_IS_TIMED}
        AND queue = firsts.queue AND priority = firsts.priority AND due_at <= :now
        ORDER BY due_at, seq LIMIT {FLOOD_PROMOTED})"""


@contextlib.contextmanager
def _about(origin: str) -> Iterator[None]:
    """Let an error begin with what it is about."""
    try:
        yield
    except QueueError as error:
        raise type(error)(f"{origin}{error}") from None


def _waits_for_it(child: str, parent: str) -> BadInput:
    return BadInput(f"job {printable(child)} cannot wait for {printable(parent)}, which waits for it")


def link_in_circle(links: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """Return a parent and its child that lie on a circle. The links are small numbers, in the order of parents.

    Whoever waits for nobody is taken away again and again, with its links: circles are left. Arrays of integers
    hold it all, so a million links take 20 MB.
    """
    children, starts, waiting = Array("i"), Array("i", [0]), Array("i", [0])
    for parent, child in links:
        starts.extend([len(children)] * (parent + 1 - len(starts)))
        waiting.extend([0] * (max(parent, child) + 1 - len(waiting)))
        children.append(child)
        waiting[child] += 1
    starts.extend([len(children)] * (len(waiting) + 1 - len(starts)))
    free = Array("i", (job for job, parents in enumerate(waiting) if not parents))
    while free:
        job = free.pop()
        for child in children[starts[job] : starts[job + 1]]:
            waiting[child] -= 1
            if not waiting[child]:
                free.append(child)
    return _link_among(children, starts, waiting)


def _link_among(children: Array[int], starts: Array[int], waiting: Array[int]) -> (
    tuple[int, int] | None
):  # fmt: skip
    """Return a link on a circle of the jobs that still wait: up from parent to parent leads into one."""
    parents = {child: job for job, parents in enumerate(waiting) if parents
               for child in children[starts[job] : starts[job + 1]]}  # fmt: skip
    seen: set[int] = set()
    job = next(iter(parents), None)
    while job is not None and job not in seen:
        seen.add(job)
        job = parents[job]
    return None if job is None else (parents[job], job)


def _json_or_null(value: Sequence[Any] | None) -> str | None:
    return None if value is None else _to_json(value)


def _as_columns(spec: Spec) -> dict[str, Any]:
    """Return the column values of a spec."""
    values = dict(spec)
    for name in JSON_COLUMNS:
        if values.get(name) is not None:
            values[name] = _to_json(values[name])
    return values


def _condition(where: Selection) -> str:
    """Return the SQL condition of a selection without ids; its values are `tag` and `queue`."""
    parts = [f"{name} = :{name}" for name in ("tag", "queue") if getattr(where, name) is not None]
    return " AND ".join(parts + ([] if where.states is None else [_states_in(where.states)])) or "1"


class Snapshot:
    """The jobs that were chosen at one moment, in the order in which they were named.

    Their numbers stand in a temporary table, so it takes little memory and no lock however many they are.
    """

    def __init__(self, db: Database, select: str, **values: Any) -> None:
        self._db, self.table = db, db.make_table("n INTEGER PRIMARY KEY, seq INTEGER NOT NULL UNIQUE")
        self.sql = f"(SELECT seq FROM {self.table})"
        self.add(select, **values)

    def add(self, select: str, **values: Any) -> None:
        """Add jobs behind those that are there."""
        self._db.run(f"INSERT OR IGNORE INTO {self.table} (seq) {select}", **values)

    def remove(self, select: str, **values: Any) -> None:
        """Remove jobs."""
        self._db.run(f"DELETE FROM {self.table} WHERE seq IN ({select})", **values)

    def size(self) -> int:
        """Return how many they are."""
        return int(self._db.one(f"SELECT count(*) FROM {self.table}")[0])

    def outside(self, other: Snapshot) -> list[int]:
        """Return the jobs that another snapshot does not hold."""
        rows = self._db.all(f"SELECT seq FROM {self.table} WHERE seq NOT IN {other.sql} ORDER BY n")
        return [row[0] for row in rows]

    def pages(self) -> Iterator[list[int]]:
        """Yield their numbers, so many at a time as are changed in one transaction."""
        page = f"SELECT n, seq FROM {self.table} WHERE n > :last ORDER BY n LIMIT {PAGE_JOBS}"
        last = 0
        while rows := self._db.all(page, last=last):
            yield [seq for _, seq in rows]
            last = rows[-1][0]


class Queries:
    """Read-only queries about jobs."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # ---- choosing jobs

    def get(self, id: str) -> Job:
        """Return the job of that id. NotFound suggests the nearest of the newest thousand ids."""
        row = self._db.one(_SELECT + "WHERE id = :id", id=id)
        if not row:
            raise NotFound(f"no job {printable(id)!r}{nearest(id, self.newest_ids())}")
        return readable_job(row)

    def last_started(self) -> Job:
        """The job whose newest attempt started last."""
        row = self._db.one(_SELECT + "WHERE started_at IS NOT NULL ORDER BY started_at DESC, seq DESC LIMIT 1")
        if not row:
            raise NotFound("no job has started yet")
        return readable_job(row)

    def last_failed(self) -> Job:
        """The job of the attempt that failed last, of those that are kept."""
        row = self._db.one(
            _SELECT
            + """WHERE seq = (SELECT attempts.job FROM attempts JOIN jobs AS its ON its.seq = attempts.job
                WHERE attempts.error IS NOT NULL AND attempts.ended_by NOT IN ('given back', 'cancelled')
                AND attempts.exit_code IS NOT 0 AND NOT (its.snooze AND attempts.exit_code IS 75)
                AND NOT EXISTS (SELECT 1 FROM json_each(its.ok_codes) WHERE value = attempts.exit_code)
                ORDER BY attempts.ended_at DESC LIMIT 1)"""
        )
        if not row:
            raise NotFound("no attempt of a job has failed")
        return readable_job(row)

    def next_to_run(self, queues: Sequence[str], limit: int, now: int) -> list[Job]:
        """The waiting jobs of these queues that start first: by priority those that may now, then by due time.

        A job whose time has come may not be marked as ready yet: the next claim does that.
        """
        is_due = f"{IS_WAITING} AND hold = 0 AND blockers = 0 AND queue IN (SELECT value FROM json_each(:queues))"
        rows = self._db.all(
            f"""{_SELECT} WHERE seq IN (
                SELECT best.seq FROM json_each(:queues) AS asked JOIN jobs AS best ON best.seq IN (
                    SELECT seq FROM jobs WHERE ready AND queue = asked.value
                    ORDER BY priority DESC, seq LIMIT :limit)
                UNION ALL SELECT * FROM (SELECT seq FROM jobs WHERE due_at <= :now AND {is_due}
                    ORDER BY priority DESC, seq LIMIT :limit)
                UNION ALL SELECT * FROM (SELECT seq FROM jobs WHERE due_at > :now AND {is_due}
                    ORDER BY due_at, priority DESC, seq LIMIT :limit))
            ORDER BY max(coalesce(due_at, 0), :now), priority DESC, seq LIMIT :limit""",
            queues=_to_json(queues), limit=limit, now=now,
        )  # fmt: skip
        return [readable_job(row) for row in rows]

    def newest_ids(self) -> list[str]:
        """Return the ids of the newest thousand jobs."""
        return [str(row[0]) for row in self._db.all("SELECT id FROM jobs ORDER BY seq DESC LIMIT 1000")]

    def ids_beginning(self, prefix: str, states: Sequence[State], hold: bool | None, most: int = 1000) -> list[str]:
        """Ids that begin so of jobs in these states, on hold or not, newest first.

        It looks at the newest jobs of each state and at the first ids that begin so, `most` each: completing a word
        costs the same however many jobs there are.
        """
        newest = (
            f"SELECT * FROM (SELECT seq FROM jobs WHERE state = '{state.value}' ORDER BY seq DESC LIMIT :most)"
            for state in states
        )
        rows = self._db.all(
            f"""SELECT id FROM jobs WHERE seq IN ({" UNION ALL ".join(newest)}
                UNION ALL SELECT * FROM (SELECT seq FROM jobs WHERE id >= :prefix AND id < :prefix || '~' LIMIT :most))
            AND id >= :prefix AND id < :prefix || '~' AND {_states_in(states)} AND hold = coalesce(:hold, hold)
            ORDER BY seq DESC LIMIT :most""",
            prefix=prefix, hold=hold, most=most,
        )  # fmt: skip
        return [row[0] for row in rows]

    def tags_beginning(self, prefix: str, most: int = 1000) -> list[str]:
        """Tags that begin so: from one to the next in the index, however many jobs bear each."""
        rows = self._db.all(
            """WITH RECURSIVE found(tag) AS (SELECT min(tag) FROM jobs WHERE tag >= :prefix
                UNION ALL SELECT (SELECT min(tag) FROM jobs WHERE tag > found.tag) FROM found
                WHERE found.tag < :prefix || '~')
            SELECT tag FROM found WHERE tag < :prefix || '~' LIMIT :most""",
            prefix=prefix, most=most,
        )  # fmt: skip
        return [row[0] for row in rows]

    def exists(self, id: str) -> bool:
        """Tell whether there is a job of that id."""
        return self._db.one("SELECT 1 FROM jobs WHERE id = :id", id=id) is not None

    def key_holder(self, key: str | None) -> str | None:
        """Return the id of the open job that has this key, or None."""
        row = self._db.one(f"SELECT id FROM jobs WHERE key = :key AND {IS_OPEN}", key=key)
        return row and str(row[0])

    def jobs(self, where: Selection = EVERY_JOB, limit: int | None = None, sort: str = "seq") -> list[Job]:
        """Return the newest jobs of a selection without ids, sorted by the order of enqueueing or by a column."""
        return list(self.each(where, limit, sort))

    def each(self, where: Selection = EVERY_JOB, limit: int | None = None, sort: str = "seq") -> Iterator[Job]:
        """Yield the same one by one: memory stays the same however many they are."""
        chosen = f"{_SELECT} WHERE {_condition(where)}"
        if limit is not None:
            chosen = f"SELECT * FROM ({chosen} ORDER BY seq DESC LIMIT :limit)"
        order = f"{SORTS[sort.removeprefix('-')]} {'DESC' if sort.startswith('-') else ''}, seq"
        rows = self._db.rows(f"{chosen} ORDER BY {order}", tag=where.tag, queue=where.queue, limit=limit)
        return map(readable_job, rows)

    def of(self, seqs: Sequence[int]) -> list[Job]:
        """Return the jobs of these numbers in their order, without jobs that were removed."""
        rows = self._db.all(f"{_SELECT} WHERE seq IN (SELECT value FROM json_each(:seqs))", seqs=_to_json(seqs))
        found = {row[0]: row for row in rows}
        return [readable_job(found[seq]) for seq in seqs if seq in found]

    def ids_of(self, seqs: Sequence[int]) -> list[str]:
        """Return the ids of the jobs of these numbers, in their order."""
        rows = self._db.all(
            "SELECT jobs.id FROM json_each(:seqs) AS asked JOIN jobs ON seq = asked.value ORDER BY asked.key",
            seqs=_to_json(seqs),
        )
        return [str(row[0]) for row in rows]

    def not_completed(self, among: Snapshot | None, limit: int) -> list[Job]:
        """Return the first dead or cancelled jobs among these; None means all jobs."""
        these = f"seq IN {among.sql}" if among else "1"
        rows = self._db.all(f"{_SELECT} WHERE {these} AND {IS_HOPELESS} ORDER BY seq LIMIT :limit", limit=limit)
        return [readable_job(row) for row in rows]

    def next_of(self, among: Snapshot | None) -> Job | None:
        """Return the job that these (None: all) wait for first: a running one, or the oldest that is not blocked.

        Where all of them are blocked, it is the same of the jobs above the first of them.
        """
        running, oldest = (
            f"{_SELECT} WHERE {f'seq IN {among.sql}' if among else '1'} AND {condition} ORDER BY seq LIMIT 1"
            for condition in ("state = 'processing'", f"+{IS_WAITING}")
        )
        row = self._db.one(running) or self._db.one(oldest.replace("ORDER", "AND blockers = 0 ORDER"))
        if row or not (blocked := self._db.one(oldest)):
            return readable_job(row) if row else None
        row = self._db.one(
            f"""WITH RECURSIVE needed(seq) AS (SELECT :seq
                UNION SELECT parent FROM dependencies JOIN needed ON child = needed.seq)
            {_SELECT} WHERE seq IN needed AND {IS_OPEN} AND blockers = 0
            ORDER BY state = 'processing' DESC, seq LIMIT 1""",
            seq=blocked[0],
        )
        return readable_job(row) if row else None

    def named(self, ids: Sequence[str]) -> list[Job | None]:
        """The jobs of these ids, in the order of the ids; None where there is none."""
        rows = self._db.all(
            f"""SELECT {_COLUMNS} FROM (SELECT key AS place, value AS asked FROM json_each(:ids))
                LEFT JOIN jobs ON jobs.id = asked ORDER BY place""",
            ids=_to_json(ids),
        )
        return [None if row[0] is None else readable_job(row) for row in rows]

    def chosen(self, which: Selection) -> Iterable[Job]:
        """Return the selected jobs in any state. Raise NotFound for an id that no job has."""
        if which == NOTHING:
            raise BadInput("name jobs by id, or choose them with --tag, --queue, --state or --all")
        if not check_selection(which).ids:
            return self.each(which)
        found = (job or self.get(id) for id, job in zip(which.ids, self.named(which.ids), strict=True))
        return list({job.seq: job for job in found}.values())

    def snapshot(self, which: Selection) -> Snapshot:
        """Return the same as they are now, for what takes some time."""
        if which == NOTHING or which.ids:
            return self.snapshot_of(job.seq for job in self.chosen(which))
        select = f"SELECT seq FROM jobs WHERE {_condition(check_selection(which))} ORDER BY seq"
        return Snapshot(self._db, select, tag=which.tag, queue=which.queue)

    def snapshot_of(self, seqs: Iterable[int]) -> Snapshot:
        """Return the jobs of these numbers."""
        return Snapshot(self._db, "SELECT value FROM json_each(:seqs) ORDER BY key", seqs=_to_json(list(seqs)))

    def choose(self, which: Selection, states: Sequence[State], verb: str) -> Snapshot:
        """Return the selected jobs that are in one of the states. Raise QueueError if a named job is not."""
        if not which.ids:
            return self.snapshot(limited_to(which, states))
        chosen = list(self.chosen(which))
        for job in chosen:
            if job.state not in states:
                raise QueueError(f"job {job.id} is {job.state.value}: it cannot be {verb}")
        return self.snapshot_of(job.seq for job in chosen)

    def how_many(self, where: Selection = EVERY_JOB) -> int:
        """Return the number of jobs of a selection without ids, from the table of counts unless a tag is given."""
        source = "(SELECT queue, state, tag, 1 AS n FROM jobs WHERE tag = :tag)" if where.tag else "counts"
        row = self._db.one(
            f"""SELECT coalesce(sum(n), 0) FROM {source} WHERE (:queue IS NULL OR queue = :queue)
                AND (:states IS NULL OR state IN (SELECT value FROM json_each(:states)))""",
            tag=where.tag, queue=where.queue, states=_json_or_null(where.states),
        )  # fmt: skip
        return int(row[0])

    # ---- counts and facts

    def counts(self, among: Snapshot | None = None) -> dict[State, int]:
        """Count these jobs by state. None means all jobs, which takes constant time."""
        source = f"(SELECT state, 1 AS n FROM jobs WHERE seq IN {among.sql})" if among else "counts"
        rows = self._db.all(f"SELECT state, sum(n) FROM {source} GROUP BY state")
        sums = {state: n for state, n in rows if type(n) is int}
        return {state: sums.get(state.value, 0) for state in State}

    def states(self, seqs: Sequence[int]) -> dict[int, State]:
        """Return the states of these jobs by seq, without jobs that were removed."""
        rows = self._db.all(
            "SELECT seq, state FROM jobs WHERE seq IN (SELECT value FROM json_each(:seqs))", seqs=_to_json(seqs)
        )
        return {seq: State(state) for seq, state in rows}

    def history(self, job: Job) -> list[Attempt]:
        """Return the ended attempts of a job, oldest first."""
        columns = ", ".join(Attempt._fields)
        rows = self._db.all(f"SELECT {columns} FROM attempts WHERE job = :seq ORDER BY n", seq=job.seq)
        return [attempt_from_row(row) for row in rows]


class Reasons:
    """Why jobs are not running, and what would bring dead ones back."""

    def __init__(self, db: Database, queries: Queries) -> None:
        self._db, self._queries = db, queries

    def wait_reasons(
        self, jobs: Sequence[Job], workers: list[WorkerRow], queues: Sequence[QueueRow], settings: Settings
    ) -> list[WaitReasons]:
        """Return what keeps each of these jobs from running. `workers` are those that live."""
        rows_of = {row.name: row for row in queues}
        nothing = QueueRow("", False, None, dict.fromkeys(State, 0))  # its last job was removed a moment ago
        rows = [rows_of.get(job.queue, nothing) for job in jobs]
        return [
            WaitReasons(
                self._missing_parents(job) if job.blockers and job.state in WAITING else [],
                row.paused, row.max_running, row.counts[State.PROCESSING], workers,
                self.revival(job) if job.blockers and job.state is State.DEAD else Revival(),
                self._queries.key_holder(job.key) if job.state is State.DEAD else None,
                self._timed_out_after_s(job, settings_for(job, settings).job_timeout),
            )
            for job, row in zip(jobs, rows, strict=True)
        ]  # fmt: skip

    def _missing_parents(self, job: Job) -> list[str]:
        """Return the ids of the parents that a waiting job waits for."""
        rows = self._db.all(
            """SELECT id FROM jobs WHERE state <> 'completed'
                AND seq IN (SELECT parent FROM dependencies WHERE child = :seq) ORDER BY seq""",
            seq=job.seq,
        )
        return [printable(str(row[0])) for row in rows]

    def revival(self, job: Job) -> Revival:
        """Return the roots of a dead job: itself and the hopeless jobs above it, without those below another of them.

        Tried again, they bring back what died with them. Of very many jobs above it the nearest are read, and the
        one by which it died.
        """
        rows = self._db.all(
            f"""WITH RECURSIVE above(seq) AS (SELECT :seq UNION
                SELECT seq FROM jobs WHERE seq = :failed_parent AND {IS_HOPELESS} UNION
                SELECT parent FROM dependencies JOIN above ON child = above.seq
                    JOIN jobs ON jobs.seq = parent WHERE {IS_HOPELESS} LIMIT {LIST_ROWS * 10}),
            links AS (SELECT child, jobs.seq IS NULL AS is_removed FROM dependencies
                LEFT JOIN jobs ON jobs.seq = parent WHERE child IN above AND (jobs.seq IS NULL OR {IS_HOPELESS}))
            SELECT id, state, seq IN (SELECT child FROM links WHERE is_removed) FROM jobs
                WHERE seq IN above AND seq NOT IN (SELECT child FROM links WHERE NOT is_removed) ORDER BY seq""",
            seq=job.seq, failed_parent=job.failed_parent,
        )  # fmt: skip
        orphans = [printable(str(id)) for id, state, is_orphan in rows if is_orphan and state == State.DEAD.value]
        is_any_cancelled = any(state == State.CANCELLED.value for _, state, _ in rows)
        return Revival([printable(str(row[0])) for row in rows], is_any_cancelled, next(iter(orphans), None))

    def can_retry(self) -> bool:
        """Tell whether a dead job has a free key and no removed, dead or cancelled parent."""
        row = self._db.one(
            f"""SELECT 1 FROM jobs AS dead WHERE state = 'dead'
                AND NOT EXISTS (SELECT 1 FROM dependencies LEFT JOIN jobs AS parent ON parent.seq = dependencies.parent
                    WHERE child = dead.seq AND (parent.seq IS NULL OR parent.{IS_HOPELESS}))
                AND (key IS NULL OR NOT EXISTS (SELECT 1 FROM jobs AS other WHERE other.key = dead.key
                    AND other.{IS_OPEN})) LIMIT 1"""
        )
        return row is not None

    def _timed_out_after_s(self, job: Job, timeout_s: float) -> float | None:
        """Return how long the last attempt ran if a time-out ended it and would do so again, or else None."""
        if not timeout_s or job.exit_code is not None or job.state not in (State.FAILED, State.DEAD):
            return None
        row = self._db.one(
            """SELECT ended_by, (ended_at - started_at) / 1000.0 FROM attempts
                WHERE job = :seq ORDER BY n DESC LIMIT 1""",
            seq=job.seq,
        )
        is_cut = row and row[0] == EndReason.TIMED_OUT.value and row[1] >= timeout_s
        return max(row[1], timeout_s) if is_cut else None


class Statistics:
    """How the queue has done: times, tallies of attempts, what has waited longest."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def times(self, newest: int = 10_000) -> list[tuple[int, int, int]]:
        """Return, for the newest completed jobs, when each could first have run, its last start and its end."""
        return self._db.all(
            """SELECT max(created_at, coalesce(run_at, 0)), started_at, finished_at FROM jobs
                WHERE state = 'completed' AND typeof(created_at) = 'integer' AND typeof(started_at) = 'integer'
                AND typeof(finished_at) = 'integer' ORDER BY seq DESC LIMIT :newest""",
            newest=newest,
        )

    def tallies(self) -> dict[str, float]:
        """Return sums over all ended attempts, also those of removed jobs, by name (see `_TALLIES`)."""
        tallies = self.tallies_of(None)
        for name, value in self._db.all("SELECT name, value FROM removed_tallies"):
            tallies[name] = tallies.get(name, 0) + value
        return tallies

    def tallies_of(self, seqs: Sequence[int] | None) -> dict[str, float]:
        """Return the same sums over the attempts of these jobs, or of all jobs that are stored (None)."""
        # With LIMIT, SQLite computes the inner columns once a row and not once for each sum: that takes half the time.
        which = "1" if seqs is None else "job IN (SELECT value FROM json_each(:seqs))"
        rows = self._db.all(
            f"""SELECT queue, {", ".join(_TALLIES.values())} FROM (
                SELECT jobs.queue, max(0, ended_at - attempts.started_at) / 1000.0 AS run, cpu_s,
                    CASE WHEN n = 1 THEN
                        max(0, attempts.started_at - max(created_at, coalesce(run_at, 0))) / 1000.0 END AS wait,
                    CASE WHEN ended_by <> 'exited' THEN replace(ended_by, ' ', '_')
                        WHEN attempts.exit_code = 0 OR attempts.error IS NULL THEN 'completed'
                        ELSE 'failed' END AS result,
                    number > 1 AND ended_by <> 'given back' AS is_retry
                FROM attempts JOIN jobs ON jobs.seq = attempts.job WHERE {which} LIMIT -1) GROUP BY queue""",
            seqs=_json_or_null(seqs),
        )
        tallies: dict[str, float] = dict.fromkeys(_TALLIES, 0)
        for queue, *values in rows:
            for name, value in zip(_TALLIES, values, strict=True):
                tallies[name] += value
                if name.startswith("wait"):
                    tallies[f"{name} {queue}"] = value
        return tallies

    def oldest_waiting(self, now: int) -> dict[str, int]:
        """By queue: since when the first of its jobs that only wait for a worker could have run.

        Read are the first job of each priority in the index of ready jobs and, of the jobs whose time has come and
        which no claim has seen yet, the thousand that came due first: so the cost is that of the priorities in use.
        """
        rows = self._db.all(
            f"""WITH RECURSIVE firsts(queue, priority, seq) AS (
                SELECT best.queue, best.priority, best.seq FROM (SELECT DISTINCT queue FROM counts WHERE {IS_WAITING})
                    AS waiting JOIN jobs AS best ON best.seq = (SELECT seq FROM jobs
                        WHERE ready AND queue = waiting.queue ORDER BY priority DESC, seq LIMIT 1)
                UNION ALL SELECT next.queue, next.priority, next.seq FROM firsts JOIN jobs AS next ON next.seq = (
                    SELECT seq FROM jobs WHERE ready AND queue = firsts.queue AND priority < firsts.priority
                    ORDER BY priority DESC, seq LIMIT 1))
            SELECT queue, min(since) FROM (
                SELECT jobs.queue, max(created_at, coalesce(run_at, 0)) AS since FROM firsts JOIN jobs USING (seq)
                UNION ALL SELECT * FROM (SELECT queue, due_at FROM jobs
                    WHERE due_at IS NOT NULL AND hold = 0 AND blockers = 0 AND due_at <= :now
                    ORDER BY due_at LIMIT 1000)) GROUP BY queue""",
            now=now,
        )
        return dict(rows)

    def recent_timeouts(self, job_timeout: float, most: int = 1000) -> tuple[int, list[Job]]:
        """Of the newest failed and of the newest dead jobs, those that a time-out ended that still holds.

        How many had the default time-out, and those that have their own. One that has been raised since is over.
        """
        rows = self._db.all(
            f"""{_SELECT} WHERE seq IN (
                SELECT seq FROM (
                    SELECT * FROM (SELECT seq FROM jobs WHERE state = 'failed' ORDER BY seq DESC LIMIT :most) UNION ALL
                    SELECT * FROM (SELECT seq FROM jobs WHERE state = 'dead' ORDER BY seq DESC LIMIT :most)) AS newest
                WHERE (SELECT ended_by FROM attempts WHERE job = newest.seq ORDER BY n DESC LIMIT 1) = :timed_out)
            AND coalesce(nullif(coalesce(timeout, :job_timeout), 0), 1e99) * 1000 <= (
                SELECT ended_at - started_at FROM attempts WHERE job = jobs.seq ORDER BY n DESC LIMIT 1)
            ORDER BY seq DESC""",
            most=most, timed_out=EndReason.TIMED_OUT.value, job_timeout=job_timeout,
        )  # fmt: skip
        jobs = [job_from_row(row) for row in rows]
        return sum(job.timeout is None for job in jobs), [job for job in jobs if job.timeout is not None]


class Enqueued:
    """What an `enqueue` has stored; yields the id of each job, and whether it is new."""

    def __init__(self, jobs: Iterator[tuple[str, bool]], made: int, tag: str | None) -> None:
        self._jobs = jobs
        self.made, self.tag = made, tag  # how many are new, and the tag that they got; only where one was asked for

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        return self._jobs


class Jobs:
    """The life of a job: enqueued, claimed, finished. The methods share one transaction and one guard."""

    def __init__(self, db: Database, queries: Queries) -> None:
        self._db, self._queries = db, queries

    # ---- in

    def fail_some_dependents(self, limit: int = CASCADE_JOBS) -> bool:
        """Make waiting children of dead and cancelled jobs dead, because those will never complete.

        At most so many, at whatever depth, so that one transaction is short: tell whether more are left. Triggers
        note in `failing` whose children are still to be failed, so anybody can go on. None of them can start
        meanwhile, because it is blocked.
        """
        if not self._db.one("SELECT 1 FROM failing LIMIT 1"):
            return False
        with self._db.writing():
            while limit > 0 and (links := self._take_failing(limit)):
                self._fail_children(links)
                limit -= len(links)
            return self._db.one("SELECT 1 FROM failing LIMIT 1") is not None

    def fail_all_dependents(self) -> None:
        """Go on until none is left, with pauses in which others write."""
        while self.fail_some_dependents():
            time.sleep(PAGE_PAUSE_S)

    def _take_failing(self, limit: int) -> list[tuple[int, int]]:
        """Take the first parents and children of `failing` off it."""
        links = self._db.all(
            """SELECT failing.parent, dependencies.child FROM failing CROSS JOIN dependencies
                ON dependencies.parent = failing.parent AND dependencies.child > failing.child
                ORDER BY failing.parent, dependencies.child LIMIT :limit""",
            limit=limit,
        )
        parent, child = links[-1] if len(links) == limit else (MAX_INTEGER, 0)
        self._db.run("DELETE FROM failing WHERE parent < :parent", parent=parent)
        self._db.run("UPDATE failing SET child = :child WHERE parent = :parent", parent=parent, child=child)
        return links

    def _fail_children(self, links: Sequence[tuple[int, int]]) -> None:
        """Make those of these children dead that wait, by the first of their parents that is hopeless.

        The error names the job at the top, and the moment is that of the parent's end.
        """
        self._db.run(
            f"""UPDATE jobs SET state = 'dead', failed_parent = cause.top, error = cause.error, due_at = NULL,
                updated_at = max(jobs.updated_at, cause.ended_at), finished_at = max(jobs.updated_at, cause.ended_at)
            FROM (SELECT json_extract(link.value, '$[1]') AS child, min(parent.seq),
                    coalesce(parent.failed_parent, parent.seq) AS top, coalesce(parent.finished_at, 0) AS ended_at,
                    CASE WHEN parent.failed_parent IS NULL
                        THEN 'waited for ' || parent.id || ', which is ' || parent.state ELSE parent.error END AS error
                FROM json_each(:links) AS link JOIN jobs AS parent ON parent.seq = json_extract(link.value, '$[0]')
                WHERE parent.{IS_HOPELESS} GROUP BY 1) AS cause
            WHERE jobs.seq = cause.child AND jobs.{IS_WAITING}""",
            links=_to_json(links),
        )

    # ---- its way

    def claim(self, worker: int, queues: Sequence[str] | None, now: int) -> Job | None:
        """Claim the best job that may run: the highest priority, then the first enqueued.

        Its cost depends on the number of queues that hold waiting jobs, not on the number of jobs.
        None where nothing may run, and for a worker that is to stop or was taken for dead. A job whose row is
        damaged is dead in place of being claimed.
        """
        with self._db.writing():
            while row := self._claim_row(worker, queues, now):
                try:
                    return job_from_row(row)
                except Damaged as error:
                    self.fail_damaged(row[0], str(error), now)
        return None

    def _claim_row(self, worker: int, queues: Sequence[str] | None, now: int) -> Any:
        with self._db.writing():
            self._promote_due(now)
            damaged = self._db.one(_SELECT + f"WHERE {_IS_TIMED} AND due_at >= ''")  # a time is a number
            return damaged or self._db.one(
                f"""UPDATE jobs SET state = 'processing', attempts = attempts + 1, worker = :worker,
                    started_at = :now, updated_at = :now, exit_code = NULL, error = NULL
                WHERE seq = (SELECT seq FROM claimable
                    WHERE :queues IS NULL OR queue IN (SELECT value FROM json_each(:queues))
                    ORDER BY priority DESC, seq LIMIT 1)
                AND EXISTS (SELECT 1 FROM workers WHERE id = :worker AND stop IS NULL)
                RETURNING {_COLUMNS}""",
                worker=worker, now=now, queues=_json_or_null(queues),
            )  # fmt: skip

    def _promote_due(self, now: int) -> None:
        """Make jobs ready whose time has come. Where very many came due at one moment, the best of each queue are.

        Those are the first to have come due of the highest priority that has any. It is more than one claim takes.
        """
        due = f"SELECT 1 FROM jobs WHERE {_IS_TIMED} AND due_at <= :now LIMIT {MOST_PROMOTED + 1}"
        [many] = self._db.one(f"SELECT count(*) FROM ({due})", now=now)
        if many:
            which = f"seq IN ({_BEST_DUE})" if many > MOST_PROMOTED else "due_at <= :now"
            self._db.run(f"UPDATE jobs SET due_at = NULL WHERE {_IS_TIMED} AND {which}", now=now)

    def fail_damaged(self, seq: int, error: str, now: int) -> None:
        """Make a job dead whose row cannot be read: it can never run, and would stand in the way of others."""
        self._db.run(
            """UPDATE jobs SET state = 'dead', attempts = max(0, attempts - (state = 'processing')), cancelling = 0,
                due_at = NULL, updated_at = :now, finished_at = :now, error = :error
            WHERE seq = :seq""",
            seq=seq, now=now, error=error,
        )  # fmt: skip
        self.fail_some_dependents()

    def finish(self, job: Job, outcome: Outcome, settings: Settings, now: int, chance: float = 0.0) -> State | None:
        """End an attempt by the retry policy, and return the new state of the job.

        None, and nothing changed, where that attempt of that worker is no longer under way.
        """
        if outcome.error and not outcome.error.isascii():  # it may name a file in bytes that are no text
            outcome = outcome._replace(error=outcome.error.encode(errors="backslashreplace").decode())
        with self._db.writing():
            after = decide(job, outcome, settings, now, chance)
            ended = self._db.run(
                """UPDATE jobs SET state = :state, attempts = :attempts, due_at = :due_at, cancelling = 0,
                    updated_at = :now, finished_at = :finished_at, exit_code = :exit_code, error = :error
                WHERE seq = :seq AND state = 'processing' AND worker = :worker AND started_at = :started_at
                AND cancelling = :cancelling""",
                seq=job.seq, worker=job.worker, started_at=job.started_at, cancelling=job.cancelling, now=now,
                state=after.state.value, attempts=after.attempts, due_at=after.due_at,
                finished_at=now if after.state in ENDED else None, exit_code=outcome.exit_code, error=outcome.error,
            )  # fmt: skip
            if not ended:  # it was cancelled meanwhile, or another worker has it
                asked = not job.cancelling and self.is_cancelling(job)
                return self.finish(job._replace(cancelling=True), outcome, settings, now, chance) if asked else None
            self._keep_attempt(job, outcome, now)
            if after.state in HOPELESS:
                self.fail_some_dependents()
        return after.state

    def is_cancelling(self, job: Job) -> bool:
        """Tell whether the current attempt is to be cancelled."""
        row = self._db.one("SELECT cancelling FROM jobs WHERE seq = :seq", seq=job.seq)
        return bool(row and row[0])

    def _keep_attempt(self, job: Job, outcome: Outcome, now: int) -> None:
        self._db.run(
            """INSERT INTO attempts VALUES (:job, (SELECT count(*) FROM attempts WHERE job = :job) + 1,
                :number, :worker, :started_at, :now, :exit_code, :signal, :ended_by, :error, :max_rss, :cpu_s,
                :log_start, :log_end)""",
            job=job.seq, number=job.attempts, worker=job.worker, started_at=job.started_at, now=now,
            exit_code=outcome.exit_code, signal=outcome.signal, ended_by=outcome.end.value, error=outcome.error,
            max_rss=outcome.max_rss, cpu_s=outcome.cpu_s, log_start=outcome.log_start, log_end=outcome.log_end,
        )  # fmt: skip

    def next_due(self, after: int = 0) -> int | None:
        """Return when the next job comes due after a moment, both in milliseconds since 1970."""
        condition = f"{_IS_TIMED} AND due_at > :after AND due_at < ''"  # what is damaged may be no number
        row = self._db.one(f"SELECT min(due_at) FROM jobs WHERE {condition}", after=after)
        return cast("int | None", row[0])

    def restart_backoffs(self, now: int) -> None:
        """Restart the backoffs of failed jobs that began at a time which is now in the future."""
        ahead = "state = 'failed' AND updated_at > :now AND due_at > updated_at"
        page = f"SELECT seq FROM jobs WHERE {ahead} LIMIT {PAGE_JOBS}"
        while self._db.one(page, now=now):
            with self._db.writing():
                self._db.run(
                    f"UPDATE jobs SET due_at = :now + due_at - updated_at, updated_at = :now WHERE seq IN ({page})",
                    now=now,
                )

    def running_jobs(self, worker: int) -> list[Job]:
        """Return the jobs that a worker is running: one at most."""
        rows = self._db.all(_SELECT + "WHERE state = 'processing' AND worker = :worker", worker=worker)
        return [readable_job(row) for row in rows]


class Intake:
    """The way of jobs into the queue: staged, checked and linked as one batch, and inserted whole or not at all."""

    def __init__(self, db: Database, queries: Queries, jobs: Jobs) -> None:
        self._db, self._queries, self._jobs = db, queries, jobs

    def enqueue(
        self, specs: Iterable[tuple[str, Spec]], now: int, *, skip_existing: bool = False, tag_them: bool = False
    ) -> Enqueued:
        """Store all jobs or none. Return the id of each, and whether it is new.

        Each spec comes with what an error about it begins with. A job whose key is taken is
        not stored: the id of the one that bears it is returned. QueueError for an id that exists.
        However many there are, they are collected in a temporary table first, which holds up
        nobody, and take little memory. With `tag_them` those without a tag get one that is made up.
        """
        self._stage(specs, now)
        with self._db.writing():
            row = self._db.one("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'")
            last = row[0] if row else 0
            tag = self._make_up_tag(last) if tag_them else None
            self._insert_staged(last, now, skip_existing, tag)
            made = self._db.one("SELECT count(*) FROM staged WHERE is_new")[0] if tag_them else 0
            # Read before the commit, so that no error can follow it.
            first = self._db.all(f"{_ANSWERED} ORDER BY n LIMIT {LIST_ROWS}")
            self._jobs.fail_some_dependents()
        with contextlib.suppress(StoreError):  # they are stored; a worker goes on with what is left
            self._jobs.fail_all_dependents()
        rest = self._db.rows(f"{_ANSWERED} ORDER BY n LIMIT -1 OFFSET {LIST_ROWS}")
        return Enqueued(((id, bool(is_new)) for rows in (first, rest) for id, is_new in rows), made, tag)

    def _stage(self, specs: Iterable[tuple[str, Spec]], now: int) -> None:
        self._db.run(
            f"""CREATE TEMP TABLE IF NOT EXISTS staged (n INTEGER PRIMARY KEY, id COLLATE NOCASE,
                {", ".join(_STAGED[1:])}, origin, is_new DEFAULT 1, is_named DEFAULT 1)"""
        )
        self._db.run("DELETE FROM staged")
        rows = (
            _staged_row({**BLANK, **_as_columns(spec), "created_at": now, "origin": origin}) for origin, spec in specs
        )
        columns = (*_STAGED, "origin")
        with self._db.staging():
            self._db.insert_many(
                f"INSERT INTO staged ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})", rows
            )

    def _insert_staged(self, last: int, now: int, skip_existing: bool, tag: str | None) -> None:
        """Insert the staged jobs, numbered from `last` + 1; `tag` is for those that have none."""
        self._skip_existing(skip_existing)
        self._make_up_ids(last)
        self._skip_taken_keys()
        columns = ", ".join(name for name in _STAGED if name != "tag")
        self._db.run(
            f"""INSERT INTO jobs (seq, due_at, updated_at, tag, {columns})
                SELECT :last + n, CASE WHEN run_at > :now THEN run_at END, :now, coalesce(tag, :tag), {columns}
                FROM staged WHERE is_new ORDER BY n""",
            last=last, now=now, tag=tag,
        )  # fmt: skip
        if self._db.one("SELECT 1 FROM staged WHERE after IS NOT NULL LIMIT 1"):
            self._link_staged(last)

    def _skip_taken_keys(self) -> None:
        """Give staged jobs whose key is taken the id of the job that bears it, which may be one of them."""
        if not self._db.one("SELECT 1 FROM staged WHERE key IS NOT NULL LIMIT 1"):
            return
        self._db.run("CREATE INDEX IF NOT EXISTS temp.staged_key ON staged (key, is_new) WHERE key IS NOT NULL")
        holder = f"(SELECT id FROM jobs WHERE jobs.key = staged.key AND jobs.{IS_OPEN})"
        is_taken = f"is_new AND key IS NOT NULL AND {holder} IS NOT NULL"
        self._db.run(f"UPDATE staged SET is_new = 0, id = {holder} WHERE {is_taken}")
        self._db.run(
            """UPDATE staged SET is_new = 0, id = first.id
                FROM (SELECT key, min(n) AS n, id FROM staged WHERE is_new AND key IS NOT NULL GROUP BY key) AS first
                WHERE staged.key = first.key AND staged.n > first.n AND staged.is_new"""
        )

    def _link_staged(self, last: int) -> None:
        """Add the dependencies of the staged jobs, which may be on each other in any order."""
        links = "FROM staged CROSS JOIN json_each(staged.after) AS asked"
        is_linked = "staged.is_new AND staged.after IS NOT NULL"
        unknown = self._db.one(
            f"""SELECT origin, asked.value {links} WHERE {is_linked}
                AND NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.id = asked.value) LIMIT 1"""
        )
        with _about(unknown[0] if unknown else ""):
            if unknown:
                self._queries.get(unknown[1])
        self._db.run(
            f"""INSERT OR IGNORE INTO dependencies SELECT parent.seq, :last + staged.n {links}
                CROSS JOIN jobs AS parent ON parent.id = asked.value WHERE {is_linked}""",
            last=last,
        )
        self._db.run(f"{_COUNT_BLOCKERS} WHERE seq > :last AND after IS NOT NULL", last=last)
        # Only jobs of the batch can wait for each other in a circle: nothing else waits for them yet.
        if self._db.one("SELECT 1 FROM dependencies WHERE parent > :last AND parent >= child LIMIT 1", last=last):
            self._refuse_circle(last)

    def _refuse_circle(self, last: int) -> None:
        """Raise BadInput if new jobs wait for each other in a circle."""
        links = self._db.rows(
            "SELECT parent - :last, child - :last FROM dependencies WHERE parent > :last ORDER BY parent", last=last
        )
        if link := link_in_circle(links):
            ids = (self._db.one("SELECT origin, id FROM staged WHERE n = :n", n=n) for n in link)
            (_, parent), (origin, child) = ids
            with _about(origin):
                raise _waits_for_it(child, parent)

    def _make_up_ids(self, last: int) -> None:
        """Generate ids that are short, never reused, and sort by creation, for up to 268 million jobs."""
        self._db.run("UPDATE staged SET id = printf('j%07x', :last + n), is_named = 0 WHERE id IS NULL", last=last)
        while self._db.run(
            """UPDATE staged SET id = id || 'x' WHERE NOT is_named AND (id IN (SELECT id FROM jobs)
                OR id IN (SELECT id FROM staged AS named WHERE is_named))"""
        ):
            pass  # a user chose an id that we generated

    def _make_up_tag(self, last: int) -> str:
        """A tag from the number of a batch's first job, which is never used twice, and that nobody has chosen."""
        tag = f"t{last + 1:07x}"
        while self._db.one("SELECT 1 FROM jobs WHERE tag = :tag LIMIT 1", tag=tag):
            tag += "x"
        return tag

    def _skip_existing(self, skip_existing: bool) -> None:
        """Skip staged ids that exist in the queue or occur above. Raise QueueError unless `skip_existing`."""
        if not self._db.one("SELECT 1 FROM staged WHERE id IS NOT NULL LIMIT 1"):
            return
        self._db.run("CREATE INDEX IF NOT EXISTS temp.staged_id ON staged (id)")
        self._db.run(
            """UPDATE staged SET is_new = 0 WHERE id IN (SELECT id FROM jobs) OR EXISTS (
                SELECT 1 FROM staged AS above WHERE above.id = staged.id AND above.n < staged.n)"""
        )
        taken = self._db.one("SELECT id, origin FROM staged WHERE NOT is_new ORDER BY n LIMIT 1")
        if taken and not skip_existing:
            raise QueueError(f"{taken[1]}job {taken[0]} exists already; choose another id, or --skip-existing")

    def set_parents(self, children: Sequence[Job], parents: Sequence[str]) -> None:
        """Let jobs wait for others, and for nothing else. What waits for a hopeless one is still to be failed."""
        found, seqs = [self._queries.get(parent).seq for parent in parents], _to_json([job.seq for job in children])
        these = "(SELECT value FROM json_each(:children))"
        self._db.run(f"DELETE FROM dependencies WHERE child IN {these}", children=seqs)
        row = self._db.one(
            f"""WITH RECURSIVE above(seq, parent) AS (SELECT value, value FROM json_each(:parents)
                UNION SELECT dependencies.parent, above.parent FROM dependencies JOIN above ON child = above.seq)
            SELECT child.id, parent.id FROM above JOIN jobs AS child ON child.seq = above.seq
                JOIN jobs AS parent ON parent.seq = above.parent WHERE above.seq IN {these} LIMIT 1""",
            parents=_to_json(found), children=seqs,
        )  # fmt: skip
        if row:
            raise _waits_for_it(*row)
        self._db.run(
            """INSERT OR IGNORE INTO dependencies SELECT parent.value, child.value
                FROM json_each(:parents) AS parent, json_each(:children) AS child""",
            parents=_to_json(found), children=seqs,
        )  # fmt: skip
        self._db.run(f"{_COUNT_BLOCKERS} WHERE seq IN {these}", children=seqs)


class Config:
    """The configuration of a home."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._rows: list[Any] = []  # the rows that `_settings` was built from
        self._settings = Settings()

    def settings(self) -> Settings:
        """Return the current configuration."""
        rows = self._db.all("SELECT key, value FROM config")
        if rows != self._rows:
            self._settings = Settings(**dict(self._legal(rows)))
            self._rows = rows
        return self._settings

    def damaged_keys(self) -> list[str]:
        """The keys whose values cannot be read, so that their defaults hold."""
        rows = [row for row in self._db.all("SELECT key, value FROM config") if row[0] in SETTINGS]
        legal = dict(self._legal(rows))
        return [key for key, _ in rows if key not in legal]

    @staticmethod
    def _legal(rows: Iterable[tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
        for key, value in rows:
            with contextlib.suppress(ValueError, TypeError, RecursionError, BadInput):
                if key in SETTINGS:
                    yield key, SETTINGS[key].check(json.loads(value))

    def set(self, key: str, value: Any) -> None:
        """Set a key. None restores its default."""
        with self._db.writing():
            self._db.run("DELETE FROM config WHERE key = :key", key=key)
            if value is not None:
                self._db.run("INSERT INTO config VALUES (:key, :value)", key=key, value=_to_json(value))


class PagedChanges:
    """The mechanism of changes to stored jobs: page by page, each page in a transaction of its own."""

    def __init__(self, store: Store) -> None:
        self._db, self._jobs, self._intake, self._queries = store.db, store.jobs, store.intake, store.queries
        self._config, self._reasons, self._statistics = store.config, store.reasons, store.statistics

    def _change(
        self, which: Selection, states: Sequence[State], verb: str, change: Callable[[Sequence[int]], list[_Result]],
        check: Callable[[Sequence[int]], object] | None = None,
    ) -> Iterator[_Result]:  # fmt: skip
        """Change the selected jobs, and yield what came of each.

        Those that are named change together. Of a selection each page is a transaction of its own: the first before
        this returns, the others as what came of them is asked for. `check` sees all of them first.
        """
        if which.ids:
            with self._db.writing():
                chosen = self._queries.choose(which, states, verb)
                done = [one for seqs in chosen.pages() for one in change(seqs)]
            return itertools.chain(done, self._change_rest((), change))
        chosen = self._queries.choose(which, states, verb)
        if check:
            collections.deque(map(check, chosen.pages()), maxlen=0)
        return self._by_page(chosen, change)

    def _by_page(self, chosen: Snapshot, change: Callable[[Sequence[int]], list[_Result]]) -> Iterator[_Result]:
        pages = chosen.pages()
        return itertools.chain(self._change_page(next(pages, []), change), self._change_rest(pages, change))

    def _change_page(self, seqs: Sequence[int], change: Callable[[Sequence[int]], list[_Result]]) -> list[_Result]:
        with self._db.writing():
            return change(seqs) if seqs else []

    def _change_rest(
        self, pages: Iterable[list[int]], change: Callable[[Sequence[int]], list[_Result]]
    ) -> Iterator[_Result]:
        for seqs in pages:
            time.sleep(PAGE_PAUSE_S)
            yield from self._change_page(seqs, change)
        with contextlib.suppress(StoreError):  # all that was asked for is done; a worker goes on with what is left
            self._jobs.fail_all_dependents()

    def _update(self, seqs: Sequence[int], condition: str, changes: str, **values: Any) -> list[int]:
        """Change columns of these jobs where they fit a condition, and return the numbers of those that do."""
        rows = self._db.all(
            f"""UPDATE jobs SET {changes} WHERE seq IN (SELECT value FROM json_each(:seqs)) AND {condition}
                RETURNING seq""",
            **values, seqs=_to_json(seqs),
        )  # fmt: skip
        changed = {row[0] for row in rows}
        return [seq for seq in seqs if seq in changed]

    @staticmethod
    def _as_chosen(job: Job, which: Selection) -> Job:
        """Return a job as it was selected: open, though it has failed with a job of an earlier page meanwhile."""
        has_failed = which.is_filter and job.state is State.DEAD and job.failed_parent is not None
        return job._replace(state=State.PENDING) if has_failed else job

    def _set_fields(self, jobs: Sequence[Job], spec: Spec, now: int) -> list[tuple[Job, Job]]:
        """Change fields of jobs that do not run. Return each job before and after the change."""
        seqs, values = [job.seq for job in jobs], _as_columns(spec)
        columns = "".join(f"{name} = :{name}, " for name in values)
        if "run_at" in values:  # clearing it keeps a backoff that is running
            values["due"] = values["run_at"] if (values["run_at"] or 0) > now else None
            columns += f"""due_at = CASE WHEN NOT {IS_WAITING} OR (state = 'failed' AND :run_at IS NULL)
                THEN due_at ELSE :due END, """
        ran = [job.seq for job in jobs if job.started_at] if {"queue", "run_at"} & spec.keys() else []
        with self._keeping_tallies(ran):
            self._update(seqs, "1", f"{columns}updated_at = :now", **values, now=now)
        if "after" in spec:
            self._intake.set_parents(jobs, spec["after"] or ())
        return list(zip(jobs, self._queries.of(seqs), strict=True))

    def _refuse_fields(self, jobs: Sequence[Job], spec: Spec) -> None:
        """Raise QueueError if one of these jobs cannot have these fields."""
        key = spec.get("key")
        holder = self._queries.key_holder(key)
        for job in jobs:
            if job.state in WAITING and "max_retries" in spec:
                self._refuse_overdrawn(job._replace(max_retries=spec["max_retries"]))
            if holder not in (None, job.id):
                raise QueueError(f"job {job.id} cannot take key {key!r}: another bears it")
            holder = job.id if key is not None and job.state in WAITING else holder

    def _refuse_overdrawn(self, job: Job) -> None:
        """Raise QueueError for a job that has already used more attempts than it would be allowed."""
        if job.attempts > settings_for(job, self._config.settings()).max_retries:
            raise QueueError(f"job {job.id} has no retry left with that: cancel it, or allow {job.attempts} at least")

    @contextlib.contextmanager
    def _keeping_tallies(self, seqs: Sequence[int]) -> Iterator[None]:
        """Whatever happens to these jobs inside the block, the tallies stay as they are: a counter never goes down."""
        before = self._statistics.tallies_of(seqs)
        yield
        after = self._statistics.tallies_of(seqs)
        for name in before | after:
            if value := before.get(name, 0) - after.get(name, 0):
                self._db.run(
                    """INSERT INTO removed_tallies VALUES (:name, :value)
                        ON CONFLICT DO UPDATE SET value = value + :value""",
                    name=name, value=value,
                )  # fmt: skip

    def _among(self, seqs: Sequence[int], chosen: Snapshot) -> list[int]:
        """Return those of these jobs that were chosen."""
        rows = self._db.all(
            f"SELECT value FROM json_each(:seqs) WHERE value IN {chosen.sql} ORDER BY key", seqs=_to_json(seqs)
        )
        return [row[0] for row in rows]


class Changes(PagedChanges):
    """The changes that commands make to stored jobs."""

    # ---- page by page

    def set_hold(self, which: Selection, hold: bool, now: int) -> Iterator[str]:
        """Hold or release waiting jobs, and yield their ids."""

        def change(seqs: Sequence[int]) -> list[str]:
            changed = self._update(seqs, IS_WAITING, "hold = :hold, updated_at = :now", hold=hold, now=now)
            return self._queries.ids_of(changed)

        return self._change(which, WAITING, "held" if hold else "released", change)

    def cancel(self, which: Selection, now: int) -> Iterator[Job]:
        """Cancel waiting jobs, and mark running ones for their workers to end. Yield the jobs as they were before.

        A named job that has ended is among them. It does not change.
        """

        def change(seqs: Sequence[int]) -> list[Job]:
            jobs = [self._as_chosen(job, which) for job in self._queries.of(seqs)]
            self._update(seqs, "state = 'processing'", "cancelling = 1")
            self._update(
                [job.seq for job in jobs if job.state in WAITING], "state <> 'processing'",
                """state = 'cancelled', updated_at = :now, finished_at = :now, due_at = NULL,
                    error = CASE WHEN failed_parent IS NULL THEN error END, failed_parent = NULL""",
                now=now,
            )  # fmt: skip
            self._jobs.fail_some_dependents()  # last: a selected job that waits for another is cancelled and not dead
            return [job for job in jobs if which.ids or job.state in OPEN]

        return self._change(which, OPEN if which.is_filter else list(State), "cancelled", change)

    def edit(self, which: Selection, spec: Spec, now: int) -> Iterator[tuple[Job, Job]]:
        """Change fields of waiting and of dead jobs. Dead jobs stay dead. Yield each job before and after it."""

        def check(seqs: Sequence[int]) -> list[Job]:
            jobs = [job for job in self._queries.of(seqs) if job.state in EDITABLE]
            self._refuse_fields(jobs, spec)
            return jobs

        def change(seqs: Sequence[int]) -> list[tuple[Job, Job]]:
            changed = self._set_fields(check(seqs), spec, now)
            self._jobs.fail_some_dependents()
            return changed

        return self._change(which, EDITABLE, "edited", change, check)

    def prune(self, states: Sequence[State], before: int, *, dry_run: bool, batch: int = 100) -> Iterator[list[str]]:
        """Remove jobs that ended before a moment, and yield the ids of each batch.

        The transactions are so small, and so far apart, that no worker waits for long, nor for the disk: a power
        cut may bring the newest of them back.
        """
        self._db.wait_for_disk(False)
        for state in states:
            seq = 0
            while rows := self._prune_batch(state, seq, before, batch, dry_run):
                yield [row[1] for row in rows]
                seq = rows[-1][0]
                time.sleep(0 if dry_run else PAGE_PAUSE_S)
        self._db.wait_for_disk(True)
        if not dry_run:
            with contextlib.suppress(StoreError), self._db.writing():  # rows that count 0 are harmless
                self._db.run("DELETE FROM counts WHERE n = 0")

    def _prune_batch(self, state: State, seq: int, before: int, batch: int, dry_run: bool) -> list[Any]:
        with contextlib.nullcontext() if dry_run else self._db.writing():
            rows = self._db.all(
                """SELECT seq, id FROM jobs WHERE state = :state AND seq > :seq AND finished_at < :before
                    ORDER BY seq LIMIT :batch""",
                state=state.value, seq=seq, before=before, batch=batch,
            )  # fmt: skip
            if not dry_run:
                self._remove([row[0] for row in rows])
        return rows

    def purge_dead(self, which: Selection) -> Iterator[str]:
        """Remove dead jobs, and yield their ids. The caller removes their logs."""

        def change(seqs: Sequence[int]) -> list[str]:
            dead = [job for job in self._queries.of(seqs) if job.state is State.DEAD]
            self._remove([job.seq for job in dead])
            return [job.id for job in dead]

        return self._change(which, [State.DEAD], "purged", change)

    def _remove(self, seqs: Sequence[int]) -> None:
        """Remove jobs, and keep their contribution to the tallies, which never decrease."""
        while self._jobs.fail_some_dependents():
            pass  # what waits for them would never be failed once they are gone
        with self._keeping_tallies(seqs):
            self._db.run("DELETE FROM jobs WHERE seq IN (SELECT value FROM json_each(:seqs))", seqs=_to_json(seqs))


class Reruns(PagedChanges):
    """The return of ended jobs to `pending`."""

    def retry_dead(self, which: Selection, now: int, spec: Spec | None = None) -> Iterator[str]:
        """Dead jobs back to `pending`, as `rerun` does it."""
        return self._run_again(which, [State.DEAD], "retried", spec or {}, now)

    def rerun(self, which: Selection, now: int, spec: Spec | None = None) -> Iterator[str]:
        """Jobs that have ended back to `pending` with no attempts made; their ids.

        What died because of them comes back with them. What waits for a completed one, or waits to be retried,
        waits for it again; what runs or has ended stays as it is. The fields of a spec are set first. One whose
        parent can still not complete, or whose key is taken, stays as it was; QueueError where it was named.
        """
        return self._run_again(which, ENDED, "rerun", spec or {}, now)

    def _run_again(self, which: Selection, states: Sequence[State], verb: str, spec: Spec, now: int) -> Iterator[str]:
        if which.ids or {"key", "after"} & spec.keys():  # these fields decide which jobs can run, so they are set first
            with self._db.writing():
                chosen, able = self._set_all_fields(which, states, verb, spec, now)
                return self._reopen_chosen(chosen, able, now)
        chosen = self._queries.choose(which, states, verb)
        able = self._able_to_run(chosen)
        return self._by_page(able, lambda seqs: self._reopen(seqs, chosen, able, spec, now))

    def _set_all_fields(
        self, which: Selection, states: Sequence[State], verb: str, spec: Spec, now: int
    ) -> tuple[Snapshot, Snapshot]:
        """Change fields of the selected jobs, of those that can run then; these, and what comes back with them."""
        left: list[int] = []
        self._db.set_savepoint()
        while True:
            chosen = self._queries.choose(which, states, verb)
            chosen.remove("SELECT value FROM json_each(:left)", left=_to_json(left))
            for seqs in chosen.pages() if spec else ():
                self._set_fields(self._queries.of(seqs), spec, now)
            able = self._able_to_run(chosen)
            more = chosen.outside(able)
            if not more:
                return chosen, able
            if which.ids:
                raise QueueError(self._why_still_ended(self._queries.of(more)[0], verb))
            self._db.undo_to_savepoint()
            left += more

    def _reopen_chosen(self, chosen: Snapshot, able: Snapshot, now: int) -> Iterator[str]:
        """Return selected jobs to `pending` at once, and what died because of them page by page."""
        pages, ids, many = able.pages(), list[str](), chosen.size()
        while len(ids) < many:
            ids += self._reopen(next(pages), chosen, able, {}, now)
        return itertools.chain(ids, self._change_rest(pages, lambda seqs: self._reopen(seqs, chosen, able, {}, now)))

    def _able_to_run(self, chosen: Snapshot) -> Snapshot:
        """Return those of ended jobs, and of what died because of them, that can come back together.

        Their keys are free, the first of a key before the others, and none of their parents is removed or stays
        dead or cancelled.
        """
        able = Snapshot(self._db, f"SELECT seq FROM {chosen.table} ORDER BY n")
        able.add(
            f"""WITH RECURSIVE below(seq) AS (SELECT seq FROM jobs WHERE seq IN {chosen.sql} AND {IS_HOPELESS}
                UNION SELECT child FROM dependencies JOIN below ON parent = below.seq JOIN jobs ON jobs.seq = child
                    WHERE state = 'dead' AND failed_parent IS NOT NULL)
            SELECT seq FROM below ORDER BY seq"""
        )
        self._remove_with_children(
            able, f"""SELECT child FROM dependencies LEFT JOIN jobs AS parent ON parent.seq = dependencies.parent
                WHERE child IN {able.sql} AND (parent.seq IS NULL
                    OR (parent.{IS_HOPELESS} AND parent.seq NOT IN {able.sql}))"""
        )  # fmt: skip
        keyed = f"FROM {able.table} AS able JOIN jobs USING (seq) WHERE key IS NOT NULL"
        self._remove_with_children(
            able, f"""SELECT seq {keyed} AND (EXISTS (SELECT 1 FROM jobs AS other WHERE other.key = jobs.key
                    AND other.{IS_OPEN}) OR n > (SELECT first FROM firsts WHERE firsts.key = jobs.key))""",
            f"firsts(key, first) AS (SELECT key, min(n) {keyed} GROUP BY key),"
        )  # fmt: skip
        return able

    @staticmethod
    def _remove_with_children(able: Snapshot, unable: str, tables: str = "") -> None:
        """Remove jobs from those that can run, and what waits for them."""
        able.remove(
            f"""WITH RECURSIVE {tables} unable(seq) AS ({unable}
                UNION SELECT child FROM unable JOIN jobs ON jobs.seq = unable.seq
                    JOIN dependencies ON parent = unable.seq WHERE {IS_HOPELESS} AND child IN {able.sql})
            SELECT seq FROM unable"""
        )

    def _why_still_ended(self, job: Job, verb: str) -> str:
        """Say why a named job could not come back, with its new fields set."""
        revival = self._reasons.revival(job)
        if tops := [self._queries.get(id) for id in revival.ids if id != job.id]:
            remedy = remedy_of_dead(job, WaitReasons([], False, None, 0, [], revival))
            why = f"waited for {tops[0].id}, which is {tops[0].state.value}"
            return f"job {job.id} {why}: it cannot be {verb} before that; first: {remedy}"
        if self._db.one(f"SELECT 1 FROM dependencies WHERE child = :seq AND {_IS_PARENT_REMOVED}", seq=job.seq):
            return f"job {job.id} waits for a job that was removed: it can be {verb} with --clear after"
        return f"job {job.id} cannot be {verb}: another of key {job.key!r} has not ended"

    def _reopen(self, seqs: Sequence[int], chosen: Snapshot, able: Snapshot, spec: Spec, now: int) -> list[str]:
        """Return ended jobs to `pending`, and return the ids of those that were chosen themselves.

        Their keys and parents are looked at once more, because others may have changed them since.
        """
        if spec:
            these = [job for job in self._queries.of(self._among(seqs, chosen)) if job.state in ENDED]
            self._set_fields(these, spec, now)
        back = self._update(
            seqs, f"""{IS_ENDED}
                AND NOT EXISTS (SELECT 1 FROM jobs AS other WHERE other.key = jobs.key AND other.{IS_OPEN})
                AND NOT EXISTS (SELECT 1 FROM dependencies WHERE child = jobs.seq AND {_IS_PARENT_REMOVED})""",
            """state = 'pending', attempts = 0, failed_parent = NULL, finished_at = NULL,
                due_at = CASE WHEN run_at > :now THEN run_at END, updated_at = :now,
                error = CASE WHEN failed_parent IS NULL THEN error END""",
            now=now,
        )  # fmt: skip
        self._fail_again(seqs, back, able)
        return self._queries.ids_of(self._among(back, chosen))

    def _fail_again(self, seqs: Sequence[int], back: Sequence[int], able: Snapshot) -> None:
        """Let jobs that came back fail again if a parent is hopeless by now that was not, or could not come back."""
        able.remove(
            "SELECT value FROM json_each(:seqs) WHERE value NOT IN (SELECT value FROM json_each(:back))",
            seqs=_to_json(seqs), back=_to_json(back),
        )  # fmt: skip
        self._db.run(
            f"""INSERT OR REPLACE INTO failing (parent) SELECT seq FROM jobs
                WHERE seq IN (SELECT value FROM json_each(:seqs) UNION ALL
                    SELECT parent FROM dependencies WHERE child IN (SELECT value FROM json_each(:back)))
                AND +{IS_HOPELESS} AND seq NOT IN {able.sql}""",
            seqs=_to_json(seqs), back=_to_json(back),
        )  # fmt: skip
        self._jobs.fail_some_dependents()


class Workers:
    """The registered workers, and the requests to them."""

    def __init__(self, db: Database, jobs: Jobs) -> None:
        self._db, self._jobs = db, jobs

    def register(
        self, pid: int, host: str, queues: Sequence[str] | None, drain: bool, now: int,
        open_signs: Callable[[int], _Result], is_alive: Callable[[WorkerRow], bool], process: str | None = None,
    ) -> tuple[WorkerRow, _Result]:  # fmt: skip
        """Register a worker with the lowest free slot. Its signs of life are there before its row can be seen."""
        with self._db.writing():
            taken = {row.slot for row in self.all() if is_alive(row)}
            slot = next(n for n in range(1, len(taken) + 2) if n not in taken)
            row = self._db.one(
                """INSERT INTO workers (pid, host, process, slot, queues, drain, started_at)
                VALUES (:pid, :host, :process, :slot, :queues, :drain, :now) RETURNING id""",
                pid=pid, host=host, process=process, slot=slot, queues=_json_or_null(queues or None), drain=drain,
                now=now,
            )  # fmt: skip
            signs = open_signs(row[0])
            return next(worker for worker in self.all() if worker.id == row[0]), signs

    def unregister(self, worker: int) -> None:
        """Remove the row of a worker that has left, or that was recovered."""
        with self._db.writing():
            self._db.run("DELETE FROM workers WHERE id = :worker", worker=worker)

    def all(self) -> list[WorkerRow]:
        """Return all registered workers. Only the platform can tell which of them live."""
        rows = self._db.all(
            """SELECT workers.id, pid, host, slot, queues, drain, stop, workers.started_at, busy.id, process, leftovers
                FROM workers
                LEFT JOIN (SELECT worker, id FROM jobs WHERE state = 'processing') AS busy ON busy.worker = workers.id
                ORDER BY slot"""
        )
        return [worker_from_row(row) for row in rows]

    def ids(self) -> list[int]:
        """Return the ids of all workers."""
        return [row[0] for row in self._db.all("SELECT id FROM workers")]

    def ring_below(self, worker: int) -> list[tuple[int, str | None]]:
        """The other workers and their processes, from the next lower id downwards and round."""
        return self._db.all(
            """SELECT id, CASE typeof(process) WHEN 'text' THEN process END FROM workers
                WHERE id <> :worker ORDER BY id > :worker, id DESC""",
            worker=worker,
        )

    def forget_process(self, worker: int) -> None:
        """What a dead worker left is gone for certain: any other may recover its job."""
        with self._db.writing():
            self._db.run("UPDATE workers SET process = NULL, leftovers = NULL WHERE id = :worker", worker=worker)

    def set_leftovers(self, worker: int, leftovers: str | None) -> None:
        """Note which processes of a worker's job cannot be ended."""
        with self._db.writing():
            self._db.run(
                "UPDATE workers SET leftovers = :leftovers WHERE id = :worker AND leftovers IS NOT :leftovers",
                leftovers=leftovers, worker=worker,
            )  # fmt: skip

    def request_stop(self, workers: Sequence[int], how: str) -> None:
        """Ask workers to leave: `finish` means after the job, `now` means at once."""
        with self._db.writing():
            for worker in workers:
                self._db.run("UPDATE workers SET stop = :how WHERE id = :worker", how=how, worker=worker)

    def stop_request(self, worker: int, job: Job | None) -> StopRequest:
        """Return the current requests to a worker."""
        row = self._db.one("SELECT stop FROM workers WHERE id = :worker", worker=worker)
        if not row:
            return StopRequest(registered=False)
        return StopRequest(True, row[0], job is not None and self._jobs.is_cancelling(job))


class Queues:
    """Queues, their pauses and their limits."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def all(self) -> list[QueueRow]:
        """Return the default queue, and all that hold a job, are paused or have a limit."""
        rows = self._db.all(
            """SELECT names.queue, coalesce(paused, 0), max_running FROM
                (SELECT 'default' AS queue UNION SELECT queue FROM counts WHERE n > 0 UNION SELECT name FROM queues)
                AS names
                LEFT JOIN queues ON queues.name = names.queue ORDER BY names.queue"""
        )
        counts: dict[str, dict[str, int]] = {}
        for state, queue, n in self._db.all("SELECT state, queue, n FROM counts WHERE typeof(n) = 'integer'"):
            counts.setdefault(queue, {})[state] = n
        return [
            QueueRow(
                printable(str(name)), bool(paused), limit if type(limit) is int else None,
                {s: counts.get(name, {}).get(s.value, 0) for s in State},
            )
            for name, paused, limit in rows
        ]  # fmt: skip

    def ready(self) -> list[str]:
        """Return the queues that have a claimable job."""
        return [row[0] for row in self._db.all("SELECT queue FROM claimable")]

    def could_run(self, queues: Sequence[str] | None) -> bool:
        """Tell whether a job runs, or waits and is neither held, blocked nor in a paused queue."""
        row = self._db.one(
            f"""SELECT 1 FROM jobs WHERE (state = 'processing'
                OR ({IS_WAITING} AND hold = 0 AND blockers = 0
                    AND queue NOT IN (SELECT name FROM queues WHERE paused)))
                AND (:queues IS NULL OR queue IN (SELECT value FROM json_each(:queues))) LIMIT 1""",
            queues=_json_or_null(queues),
        )
        return row is not None

    def set_paused(self, names: Sequence[str], paused: bool) -> None:
        """Pause or resume queues."""
        self._set("paused", names, int(paused))

    def set_limit(self, name: str, max_running: int | None) -> None:
        """Limit how many jobs of a queue run at once. None removes the limit."""
        self._set("max_running", [name], max_running)

    def _set(self, column: str, names: Sequence[str], value: int | None) -> None:
        with self._db.writing():
            for name in names:
                self._db.run("INSERT OR IGNORE INTO queues (name) VALUES (:name)", name=name)
                self._db.run(f"UPDATE queues SET {column} = :value WHERE name = :name", name=name, value=value)
            self._db.run("DELETE FROM queues WHERE NOT paused AND max_running IS NULL")


def damage_remedy(id: str, state: State) -> str:
    """Return what helps with a job whose row is damaged."""
    if state in OPEN:
        return "make it dead: queuectl doctor --repair"
    command = f"dlq purge {id}" if state is State.DEAD else f"prune --state {state.value}"
    return f"remove it: queuectl {command}"


class Upkeep:
    """The health of a queue: integrity, repair, backup, restore."""

    def __init__(self, db: Database, jobs: Jobs, config: Config) -> None:
        self._db, self._jobs, self._config = db, jobs, config

    def damage(self) -> list[str]:
        """Return what is wrong with the database file; nothing if it is sound."""
        return self._db.damage()

    def miscounts(self) -> list[str]:
        """Return where counters and links disagree with the rows that they describe."""
        counts = self._db.all(
            """SELECT queue, state, sum(n) FROM (
                SELECT queue, state, count(*) AS n FROM jobs GROUP BY queue, state
                UNION ALL SELECT queue, state, -n FROM counts) GROUP BY queue, state HAVING sum(n) <> 0"""
        )
        blocked = self._db.all(
            """SELECT id FROM jobs WHERE blockers <> (SELECT count(*) FROM dependencies LEFT JOIN jobs AS parent
                ON parent.seq = dependencies.parent WHERE child = jobs.seq AND parent.state IS NOT 'completed')"""
        )
        unfailed = self._db.all(
            f"""SELECT child.id FROM jobs AS parent JOIN dependencies ON dependencies.parent = parent.seq
                JOIN jobs AS child ON child.seq = dependencies.child
                WHERE parent.{IS_HOPELESS} AND child.{IS_WAITING} AND parent.seq NOT IN (SELECT parent FROM failing)"""
        )
        ownerless = self._db.all(
            "SELECT id FROM jobs WHERE state = 'processing' AND worker NOT IN (SELECT id FROM workers)"
        )
        mend = "mend it: queuectl doctor --repair"
        return (
            [f"the count of {state} jobs in queue {queue} is off by {n}; {mend}" for queue, state, n in counts]
            + [f"job {id} waits for a wrong number of parents; {mend}" for (id,) in blocked]
            + [f"job {id} waits for one that will never complete; {mend}" for (id,) in unfailed]
            + [f"job {id} is processing with a worker that does not exist; {mend}" for (id,) in ownerless]
            + [f"job {id}: {error}; {damage_remedy(id, state)}" for _, id, state, error in self.damaged_rows()]
            + [f"config {key} is damaged, its default holds: queuectl config unset {key}"
               for key in self._config.damaged_keys()]
        )  # fmt: skip

    def damaged_rows(self) -> Iterator[tuple[int, str, State, str]]:
        """The jobs whose rows cannot be read: number, id, state, and what is wrong."""
        for row in self._db.rows(_SELECT):
            try:
                job_from_row(row)
            except Damaged as error:
                yield row[0], readable_job(row).id, readable_job(row).state, str(error)

    def repair(self, now: int) -> None:
        """Rebuild counters and links from the rows, and indexes from the tables. Damaged jobs become dead."""
        with self._db.writing():
            self._db.run("REINDEX")
            for seq, _, state, error in list(self.damaged_rows()):
                if state in OPEN:
                    self._jobs.fail_damaged(seq, error, now)
            self._db.run("DELETE FROM counts")
            self._db.run("INSERT INTO counts SELECT state, queue, count(*) FROM jobs GROUP BY state, queue")
            self._db.run(_COUNT_BLOCKERS)
            self._db.run(
                f"""INSERT OR IGNORE INTO failing (parent) SELECT seq FROM jobs
                    WHERE {IS_HOPELESS} AND seq IN (SELECT parent FROM dependencies)"""
            )
            self._jobs.fail_some_dependents()
            self._db.run(  # the row of a dead worker, which the next live one recovers
                """INSERT INTO workers (id, pid, host, slot, started_at)
                    SELECT DISTINCT worker, 0, '', 0, :now FROM jobs
                    WHERE state = 'processing' AND worker NOT IN (SELECT id FROM workers)""",
                now=now,
            )

    def back_up(self, path: str, now: int) -> None:
        """A consistent copy of the database, while workers go on; it holds no workers."""
        self._db.back_up(path)
        with contextlib.closing(Database(path)) as copy:
            Store(copy).upkeep.leave_workers_behind(now)

    def leave_workers_behind(self, now: int) -> None:
        """Take the workers out of a copy: none of them knows of it. The attempts that ran are lost to it."""
        with self._db.writing():
            for row in self._db.all(_SELECT + "WHERE state = 'processing'"):
                job = readable_job(row)
                lost = Outcome(EndReason.LOST, error="the queue was copied while it ran")
                if self._jobs.finish(job, lost, self._config.settings(), now) is None:
                    self._jobs.fail_damaged(job.seq, "its row is damaged: it belongs to no attempt", now)
            self._db.run("DELETE FROM workers")

    def restore(self, path: str, workspace: str, now: int, refuse: Callable[[list[WorkerRow]], None]) -> None:
        """Replace the queue by a backup; numbers used since, workers' too, are not used again.

        All that has to be changed in the backup is changed in a copy of it in `workspace`: the queue goes over to
        it in one step. `refuse` is given the workers of the queue once nobody can change it any more, and raises
        where it is to stay.
        """
        for n in range(RESTORE_TRIES):
            if self._restore_once(path, f"{workspace}/{n}.db", now, refuse):
                return
        raise StoreBusy("others keep adding to the queue; nothing was restored, try again when they are done")

    def _restore_once(self, path: str, made: str, now: int, refuse: Callable[[list[WorkerRow]], None]) -> bool:
        """False where numbers were used after the copy was made that stands ready."""
        used = self._numbers()
        copy_backup(path, made)
        with contextlib.closing(Database(made)) as copy:
            upkeep = Store(copy).upkeep
            upkeep.leave_workers_behind(now)
            upkeep._use_numbers(used)

            def inspect(before: Database) -> None:
                refuse(Store(before).workers.all())
                if Store(before).upkeep._numbers() != used:
                    raise _NumbersUsed

            try:
                self._db.restore(copy, inspect)
            except _NumbersUsed:
                return False
        return True

    def _numbers(self) -> list[Any]:
        """The last number that was given to a row, by table."""
        return self._db.all("SELECT name, seq FROM sqlite_sequence ORDER BY name")

    def _use_numbers(self, numbers: Iterable[tuple[str, int]]) -> None:
        """Let the next row of each table have a number above these."""
        with self._db.writing():
            for table, seq in numbers:
                values = {"table": table, "seq": seq}
                if not self._db.run("UPDATE sqlite_sequence SET seq = max(seq, :seq) WHERE name = :table", **values):
                    self._db.run("INSERT INTO sqlite_sequence VALUES (:table, :seq)", **values)


class _NumbersUsed(Exception):
    """A restore begins again: somebody has enqueued meanwhile."""


class Store:
    """The queue in its database, by noun.

    A change is one transaction, or part of the one that is open; a change of many jobs that were not named by id is
    one transaction a page.
    """

    def __init__(self, db: Database) -> None:
        self.db = db
        self.queries, self.config, self.queues = Queries(db), Config(db), Queues(db)
        self.reasons, self.statistics = Reasons(db, self.queries), Statistics(db)
        self.jobs = Jobs(db, self.queries)
        self.intake = Intake(db, self.queries, self.jobs)
        self.upkeep = Upkeep(db, self.jobs, self.config)
        self.changes, self.reruns = Changes(self), Reruns(self)
        self.workers = Workers(db, self.jobs)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self.db.close()


def open_store(path: str, busy_timeout_s: float = BUSY_TIMEOUT_S, *, durable: bool = True) -> Store:
    """Open the store of the database at a path, and create or migrate the database if necessary."""
    return Store(Database(path, busy_timeout_s, durable=durable))


# ======================================================================== platform

RUN_TAG = "QUEUECTL_RUN"  # the environment variable with the run tag: it names the attempt of a process
NO_ATTEMPT = "worker"  # the run tag of a worker that a job has started


class Exit(NamedTuple):
    """How a process ended: its exit code or signal, and its resource usage where the system reports it."""

    exit_code: int | None
    signal: int | None
    max_rss: int | None  # bytes
    cpu_s: float | None


def file_identity(path: str) -> tuple[int, int]:
    """Return the device and inode of a file; no write to it changes them."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


class Command(NamedTuple):
    """A started command: its process id, and the times just before and after its start in the system's unit."""

    pid: int
    since: int
    until: int


class Home(NamedTuple):
    """The directory that holds one queue."""

    path: str

    @property
    def database(self) -> str:
        """Return the path of the database, which alone holds the state of the queue."""
        return os.path.join(self.path, "queue.db")

    @property
    def worker_log(self) -> str:
        """Return the path of the workers' own log."""
        return os.path.join(self.path, "worker.log")

    @property
    def logs(self) -> str:
        """Return the directory of the job logs."""
        return os.path.join(self.path, "job_logs")

    @property
    def bells(self) -> str:
        """Return the directory of the running workers' bells and life files."""
        return os.path.join(self.path, "bells")

    def log(self, job: str) -> str:
        """Return the path of a job's log."""
        return f"{self.logs}{os.sep}{job}.log"

    def spool(self, worker: int) -> str:
        """Return the path of a worker's spool: it takes the output of a job until the job has a log.

        No job log can have this name. It contains the inode of the database, so a worker of a queue that replaces
        this one has another spool.
        """
        return os.path.join(self.logs, f".{worker}-{file_identity(self.database)[1]}")

    def bell(self, worker: int) -> str:
        """Return the path of a worker's bell, where the system has it as a file."""
        return os.path.join(self.bells, str(worker))

    def life(self, worker: int) -> str:
        """Return the path of a worker's life file: it names the running command, and its lock proves that it lives."""
        return os.path.join(self.bells, f"{worker}.life")

    def is_there(self, database: tuple[int, int]) -> bool:
        """Tell whether the database is still the given file, that is, nobody has removed or replaced the home."""
        try:
            return file_identity(self.database) == database
        except OSError:
            return False


def run_tag_in(database: tuple[int, int], what: str) -> str:
    """Return the run tag of an attempt or a hook; the database identity makes it unique among queues."""
    return f"{what}@{database[0]:x}.{database[1]:x}"  # no space: in the output of `ps` it would end the tag


def read_command(home: Home, worker: int, run_tag: str) -> Command | None:
    """Return the command of a run; None if its worker has not started it, or has started another since."""
    with contextlib.suppress(OSError, ValueError), open(home.life(worker), encoding="utf-8") as file:
        tag, *numbers = file.read().split()
        if tag == run_tag:
            return Command(*map(int, numbers))
    return None


def remove_file(path: str) -> None:
    """Remove a file; ignore that it is missing, or that Windows keeps it because another process has it open."""
    with contextlib.suppress(OSError):
        os.unlink(path)


NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # open(2) of a FIFO does not block with it


def require_regular(fd: int, path: str) -> int:
    """Return a descriptor; close it and raise OSError unless it is a regular file, since all else may block."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file", path)
    return fd


def earlier_output(path: str) -> str:
    """Return the path of the copy of a log from before a retry; no log and no spool can have this name."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}")


def remove_log(path: str) -> None:
    """Remove a job's log and the copy of its earlier output."""
    remove_file(path)
    remove_file(earlier_output(path))


OWN_DIRECTORY = "set QUEUECTL_HOME to a directory of your own"


def is_for_a_queue(directory: str) -> bool:
    """Tell whether a directory is empty or holds a queue; only of such a directory is a change of mode proposed."""
    names = os.listdir(directory)
    return not names or os.path.basename(Home(directory).database) in names


# What follows exists twice, for Windows and for POSIX, with the same names and parameters in the same order:
#
#   files
#     refuse_if_shared     refuse a directory that other users can write to
#     is_open_to_others    tell whether other users can read or write a file
#     is_remote            tell whether a path is on a network file system
#     open_log             open a file for appending
#     CAN_TELL_WHO_OPENS   whether `is_open_elsewhere` has an answer; workers use a spool only where it has
#     OpenWatch            detects that a file was opened after a write to it; works on Linux only
#     is_open_elsewhere    tell whether another process may have a file open; always true on Windows
#   wake-up
#     Bell                 the wake-up of a worker: by `ring`, a signal, the end of its command or of its neighbour;
#                          also the sign of life on Windows, and on POSIX in release 1.0
#     ring                 wake a worker
#   life
#     own_process          return the identity of this process, which no other process ever has
#     can_see              tell whether the processes of another worker are visible (PID namespaces)
#     Life                 a worker's sign of life and the record of its command; no job inherits it
#     is_alive             tell whether a worker's process lives
#   write gate
#     WriteGate            admits one writing worker after another; does nothing on Windows
#   processes
#     SHELL                the shell of a command that is a line
#     exit_status          convert an exit code to the range of this system
#     Process              a command with all processes that it starts
#     refuse_too_long      refuse a command or an environment that is too long for this system
#     program_problem      return why an existing file cannot be run
#     is_shell_word        tell whether a word is a builtin or a keyword of the shell
#     in_one_word          quote words as one argument of a shell
#     Leftovers            the processes that remain of a dead worker's attempt
#     memory_kills         return the number of out-of-memory kills of the system; 0 on Windows
#   worker processes
#     become_worker        set up this process as a worker: signals, descriptors, orphans
#     start_detached       start a worker process that outlives its parent
#     leave_job            detach a worker from the attempt of the job that starts it
#     HAS_SYSTEMD          whether systemd may start workers, which `service` is for

if sys.platform == "win32":
    import ctypes
    import msvcrt
    import subprocess
    from ctypes import wintypes

    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    _ntdll = ctypes.WinDLL("ntdll")
    _kernel32.CreateEventW.restype = _kernel32.OpenEventW.restype = wintypes.HANDLE
    _kernel32.CreateJobObjectW.restype = _kernel32.OpenJobObjectW.restype = wintypes.HANDLE
    _kernel32.CreateFileW.restype = _kernel32.OpenProcess.restype = wintypes.HANDLE
    _NO_SUCH_FILE = 2

    def _checked(result: Any) -> Any:
        """Return the result of a system call; raise OSError if it is a failure."""
        if result in (None, 0, wintypes.HANDLE(-1).value):
            raise ctypes.WinError(ctypes.get_last_error())
        return result

    def _object_name(kind: str, of: str) -> str:
        """Return the name of a kernel object, which all sessions of the machine share."""
        import hashlib

        return f"Global\\queuectl-{kind}-{hashlib.sha256(os.path.normcase(of).encode()).hexdigest()[:32]}"

    # ---- files

    # SDDL: access control entries that allow a group of all users something, and the rights to write.
    _ALLOW_ALL_USERS = re.compile(r"\(A;[^;]*;([^;]*);[^;]*;[^;]*;(?:WD|AU|BU|BG|IU|AN)\)")
    _WRITE_RIGHTS = re.compile(r"(?:..)*(?:DC|LC|DT|SD|WD|WO|GA|GW|FA|FW)")
    _WRITE_MASK = 0x500D0046

    def refuse_if_shared(directory: str) -> None:
        """Raise QueueError if other users can write to a directory, as ssh does; restrict a new directory first."""
        grant = f"{os.environ.get('USERDOMAIN', '.')}\\{os.environ.get('USERNAME', '')}:(OI)(CI)F"
        if not os.listdir(directory):
            _restrict_to(grant, directory)
        for rights in _ALLOW_ALL_USERS.findall(_access_list(directory)):
            bits = int(rights, 16) if rights.startswith("0x") else 0
            if bits & _WRITE_MASK or _WRITE_RIGHTS.match(rights):
                fix = f'run: icacls "{directory}" /inheritance:r /grant:r "{grant}"'
                hint = fix if is_for_a_queue(directory) else OWN_DIRECTORY
                raise QueueError(f"{directory} can be written to by others; {hint}")

    def _restrict_to(grant: str, directory: str) -> None:
        """Try to restrict a directory to its owner and the system account (S-1-5-18)."""
        icacls = os.path.join(os.environ.get("SYSTEMROOT", "C:\\Windows"), "System32", "icacls.exe")
        close = [icacls, directory, "/inheritance:r", "/grant:r", grant, "*S-1-5-18:(OI)(CI)F"]
        with contextlib.suppress(OSError):
            subprocess.run(close, capture_output=True, creationflags=subprocess.CREATE_NO_WINDOW)

    def _access_list(path: str) -> str:
        """Return the access list of a file in SDDL; an empty string if the system does not give it."""
        advapi32, dacl = ctypes.WinDLL("advapi32"), 0x4
        size, text = wintypes.DWORD(), wintypes.LPWSTR()
        advapi32.GetFileSecurityW(path, dacl, None, 0, ctypes.byref(size))
        descriptor = ctypes.create_string_buffer(size.value)
        if not advapi32.GetFileSecurityW(path, dacl, descriptor, size, ctypes.byref(size)):
            return ""
        advapi32.ConvertSecurityDescriptorToStringSecurityDescriptorW(descriptor, 1, dacl, ctypes.byref(text), None)
        try:
            return text.value or ""
        finally:
            _kernel32.LocalFree(text)

    def is_open_to_others(path: str) -> bool:
        """Return False: Windows restricts the files of a profile to their owner."""
        return False

    def is_remote(path: str) -> bool:
        """Tell whether a path is on a network drive or share."""
        drive_remote = 4
        drive = os.path.splitdrive(path)[0] + "\\"
        return path.startswith("\\\\") or bool(_kernel32.GetDriveTypeW(drive) == drive_remote)

    def open_log(path: str) -> int:
        """Return a descriptor that appends, also in the processes that inherit it."""
        append, share_all, open_always = 0x4, 0x7, 4
        handle = _checked(_kernel32.CreateFileW(path, append, share_all, None, open_always, 0x80, None))
        return msvcrt.open_osfhandle(handle, os.O_APPEND | os.O_WRONLY)

    CAN_TELL_WHO_OPENS = False

    class OpenWatch:
        """Does nothing: Windows does not report who opens a file."""

        def __init__(self) -> None:
            pass

        def follow(self, path: str) -> None:
            """Watch this file instead of the previous one."""

        def stop(self) -> None:
            """Stop watching."""

        def was_opened_again(self) -> bool:
            """Tell whether the file was opened after a write to it."""
            return False

    def is_open_elsewhere(fd: int) -> bool:
        """Return True: any process may have the file open, and Windows does not report it."""
        return True

    # ---- wake-up

    class Bell:
        """A named event; the system removes it with the worker's process, so it is also the worker's sign of life."""

        def __init__(self, home: Home, worker: int) -> None:
            self.has_news = False  # there was a ring, or the neighbour has ended, since the worker reset this
            self._event = _checked(_kernel32.CreateEventW(None, False, False, _event_name(home, worker)))
            self._neighbour: int | None = None

        def wait(self, timeout_s: float, process: Process | None = None) -> bool:
            """Sleep until a ring, an end or the timeout; return True for a ring or the end of the neighbour."""
            news = [self._event] + [self._neighbour] * (self._neighbour is not None)
            handles = news + ([process.handle] if process else [])
            array = (wintypes.HANDLE * len(handles))(*handles)
            ms = max(0, math.ceil(timeout_s * 1000))
            is_news = bool(_kernel32.WaitForMultipleObjects(len(handles), array, False, ms) < len(news))
            self.has_news = self.has_news or is_news
            return is_news

        def watch(self, process: str | None) -> bool:
            """Wake up also at the end of another worker's process; return False if the system cannot report it."""
            if self._neighbour is not None:
                _kernel32.CloseHandle(wintypes.HANDLE(self._neighbour))
                self._neighbour = None
            pid, _, start = (process or "").partition(":")
            if pid.isdigit():
                synchronize, query = 0x100000, 0x1000
                handle = _kernel32.OpenProcess(synchronize | query, False, int(pid))
                if handle and str(_start_of(handle)) == start:
                    self._neighbour = int(handle)
                elif handle:
                    _kernel32.CloseHandle(wintypes.HANDLE(handle))
            return self._neighbour is not None

        def look_after(self) -> None:
            """Do nothing: no other process can remove an event."""

        def close(self) -> None:
            """Remove the bell."""
            self.watch(None)
            _kernel32.CloseHandle(self._event)

    def ring(home: Home, worker: int) -> bool:
        """Wake a worker; return False if no worker has this bell."""
        return _with_event(home, worker, True)

    def _with_event(home: Home, worker: int, ring: bool) -> bool:
        event_modify_state = 0x2
        event = _kernel32.OpenEventW(event_modify_state, False, _event_name(home, worker))
        if not event:
            return ctypes.get_last_error() != _NO_SUCH_FILE  # any other error does not prove that the worker is dead
        if ring:
            _kernel32.SetEvent(event)
        _kernel32.CloseHandle(event)
        return True

    def _event_name(home: Home, worker: int) -> str:
        return _object_name("bell", run_tag_in(file_identity(home.database), str(worker)))

    # ---- life

    def own_process() -> str:
        """Return the identity of this process: its id and its start time."""
        return f"{os.getpid()}:{_start_of(-1)}"

    def _start_of(handle: int) -> int:
        """Return the start time of the process of a handle; -1 is the handle of this process."""
        times = [ctypes.c_uint64() for _ in range(4)]
        _kernel32.GetProcessTimes(wintypes.HANDLE(handle), *map(ctypes.byref, times))
        return times[0].value

    def can_see(process: str | None) -> bool:
        """Return True: a job object can be opened by its name anywhere on the machine."""
        return True

    class Life:
        """The file that records the command that a worker runs; the sign of life is the event of its bell."""

        def __init__(self, home: Home, worker: int) -> None:
            self._path = home.life(worker)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_BINARY, 0o600)

        def note(self, run_tag: str, command: Command) -> None:
            """Record a started command; fsync is not needed, since no process outlives the machine."""
            with contextlib.suppress(OSError):  # the disk is full
                os.lseek(self._fd, 0, os.SEEK_SET)
                os.write(self._fd, f"{run_tag} {command.pid} {command.since} {command.until}".ljust(120).encode())

        def look_after(self) -> None:
            """Do nothing: Windows lets nobody remove an open file."""

        def close(self) -> None:
            """Remove the file: nothing remains to be recovered."""
            os.close(self._fd)
            remove_file(self._path)

    def is_alive(home: Home, worker: int, process: str | None) -> bool:
        """Tell whether a worker's process lives: the event of its bell exists as long."""
        return _with_event(home, worker, False)

    # ---- write gate

    class WriteGate:
        """Does nothing: on Windows each worker retries until the database is free."""

        def __init__(self, home: Home) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

        def close(self) -> None:
            """Do nothing."""

    # ---- processes

    SHELL: Shell = "cmd"

    def exit_status(code: int) -> int:
        """Convert an exit code to 32 bits, signed for Python."""
        return (code + 2**31) % 2**32 - 2**31

    _CREATE_SUSPENDED, _BREAKAWAY = 0x4, 0x01000000
    # The command has a hidden console of its own: it shows no window and gets no Ctrl-C of other processes.
    _HIDDEN = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP
    _KILL_ON_JOB_CLOSE, _BREAKAWAY_OK = 0x2000, 0x800
    _JOB_SET, _JOB_QUERY, _JOB_TERMINATE = 0x2, 0x4, 0x8  # rights to a job object
    _EXTENDED_LIMITS, _ACCOUNTING, _PROCESS_IDS = 9, 1, 3  # information classes of a job object

    class _Limits(ctypes.Structure):
        """JOBOBJECT_EXTENDED_LIMIT_INFORMATION."""

        _fields_ = [
            ("times", ctypes.c_int64 * 2),
            ("flags", wintypes.DWORD),
            ("working_set", ctypes.c_size_t * 2),
            ("active", wintypes.DWORD),
            ("affinity", ctypes.c_size_t),
            ("priority", wintypes.DWORD * 2),
            ("io", ctypes.c_uint64 * 6),
            ("memory", ctypes.c_size_t * 2),
            ("peak_process_memory", ctypes.c_size_t),
            ("peak_job_memory", ctypes.c_size_t),
        ]

    class _Accounting(ctypes.Structure):
        """JOBOBJECT_BASIC_ACCOUNTING_INFORMATION; times in units of 100 ns."""

        _fields_ = [
            ("user", ctypes.c_int64),
            ("kernel", ctypes.c_int64),
            ("this_period", ctypes.c_int64 * 2),
            ("page_faults", wintypes.DWORD),
            ("total", wintypes.DWORD),
            ("active", wintypes.DWORD),
            ("terminated", wintypes.DWORD),
        ]

    class _ProcessIds(ctypes.Structure):
        """JOBOBJECT_BASIC_PROCESS_ID_LIST."""

        _fields_ = [("assigned", wintypes.DWORD), ("listed", wintypes.DWORD), ("ids", ctypes.c_size_t * 100)]

    def _limit(job: int, flags: int) -> None:
        """Set the limit flags of a job object."""
        limits = _Limits(flags=flags)
        size = ctypes.sizeof(limits)
        _checked(_kernel32.SetInformationJobObject(wintypes.HANDLE(job), _EXTENDED_LIMITS, ctypes.byref(limits), size))

    def _query(job: int, kind: int, into: ctypes.Structure) -> None:
        size = ctypes.sizeof(into)
        _kernel32.QueryInformationJobObject(wintypes.HANDLE(job), kind, ctypes.byref(into), size, None)

    def _new_job(run_tag: str) -> int:
        """Create a job object named by a run tag; it has no name if another program has taken the name."""
        already_exists = 183
        job = _checked(_kernel32.CreateJobObjectW(None, _object_name("job", run_tag)))
        if ctypes.get_last_error() == already_exists:
            _kernel32.CloseHandle(wintypes.HANDLE(job))
            job = _checked(_kernel32.CreateJobObjectW(None, None))
        return int(job)

    def _open_job(run_tag: str, rights: int) -> int | None:
        """Open the job object of an attempt, which exists as long as its worker lives; return None if it is gone."""
        handle = _kernel32.OpenJobObjectW(rights, False, _object_name("job", run_tag))
        return int(handle) if handle else None

    def _end_job(job: int, timeout_s: float) -> list[str]:
        """End all processes of a job object; return those that remain after the timeout."""
        deadline = time.monotonic() + timeout_s
        used = _Accounting(active=1)
        while used.active and time.monotonic() < deadline:
            _kernel32.TerminateJobObject(wintypes.HANDLE(job), 1)
            _query(job, _ACCOUNTING, used)  # processes end asynchronously; wait, lest the next attempt overlap them
            time.sleep(0.005 if used.active else 0)
        return _processes_of(job) if used.active else []

    def _processes_of(job: int) -> list[str]:
        """Return the ids of the processes in a job object, at most a hundred of them."""
        found = _ProcessIds()
        _query(job, _PROCESS_IDS, found)
        return [str(pid) for pid in found.ids[: found.listed]] or ["processes that the system does not name"]

    class Process:
        """A command in a job object of its own; the system ends the job object with this process."""

        def __init__(
            self, command: str | list[str], cwd: str, env: dict[str, str], log: str, run_tag: str,
            stdin: int | None = None,
        ) -> None:  # fmt: skip
            line = _shell_line(command) if isinstance(command, str) else [_program(command[0], cwd, env), *command[1:]]
            self._job = _new_job(run_tag)
            try:
                _limit(self._job, _KILL_ON_JOB_CLOSE)
                with os.fdopen(open_log(log), "ab") as output:
                    self._popen = _start_suspended(line, cwd, {**env, RUN_TAG: run_tag}, stdin, output)
                self.handle = int(self._popen._handle)  # type: ignore[attr-defined]
                self.command = Command(self._popen.pid, 0, 0)
                self._resume()
            except BaseException:
                self.close()
                raise

        def _resume(self) -> None:
            """Assign the process to the job object, then resume it, so that all that it starts belongs to the job."""
            process = wintypes.HANDLE(self.handle)
            try:
                _checked(_kernel32.AssignProcessToJobObject(wintypes.HANDLE(self._job), process))
            except OSError:
                self._popen.kill()
                raise
            _ntdll.NtResumeProcess(process)

        def poll(self) -> Exit | None:
            """Return how the command ended; None while it runs."""
            code = self._popen.poll()
            if code is None:
                return None
            limits, used = _Limits(), _Accounting()
            _query(self._job, _EXTENDED_LIMITS, limits)
            _query(self._job, _ACCOUNTING, used)
            return Exit(code, None, limits.peak_process_memory or None, (used.user + used.kernel) / 1e7 or None)

        def end(self, grace_s: float, meanwhile: Callable[[], None] = lambda: None) -> list[str]:
            """End the command and all that it started, at once: no Ctrl-Break reaches its console."""
            return _end_job(self._job, timeout_s=1.0)

        def close(self) -> None:
            """Release the command; processes that still run go on."""
            with contextlib.suppress(OSError):
                _limit(self._job, 0)
            _kernel32.CloseHandle(wintypes.HANDLE(self._job))

    def _start_with_retries(start: Callable[[], _Result]) -> _Result:
        """Return the process that `start` creates, after at most two retries.

        ERROR_INTERNAL_ERROR means that the new process ended before it ran any of its own code (Wine reports this at
        times). A retry is safe.
        """
        error_internal_error = 1359
        for _ in range(2):
            try:
                return start()
            except OSError as error:
                if error.winerror != error_internal_error:
                    raise
            time.sleep(0.1)
        return start()

    def _start_suspended(
        line: str | list[str], cwd: str, env: Mapping[str, str], stdin: int | None, output: BinaryIO
    ) -> subprocess.Popen[bytes]:
        """Start a suspended process; of variables that differ only in case, the last one counts."""
        spelled = {name.upper(): (name, value) for name, value in env.items()}
        return _start_with_retries(lambda: subprocess.Popen(
            line, cwd=cwd, env=dict(spelled.values()),
            stdin=subprocess.DEVNULL if stdin is None else stdin, stdout=output, stderr=output,
            creationflags=_HIDDEN | _CREATE_SUSPENDED,
        ))  # fmt: skip

    def _shell_line(command: str) -> str:
        """Return the command line with which cmd.exe runs a line unchanged: /s removes only the outer quotes."""
        if "\n" in command.strip():
            raise ValueError("cmd.exe would run the first line alone; put several in a script")
        return f'"{os.environ.get("COMSPEC", "cmd.exe")}" /d /s /c "{command.strip()}"'

    def _program(word: str, cwd: str, env: Mapping[str, str]) -> str:
        """Return the file that a word means, by the PATH and the PATHEXT of the command."""
        here = {name.upper(): value for name, value in env.items()}
        endings = here.get("PATHEXT", ".COM;.EXE;.BAT;.CMD").lower().split(";")
        place, name = os.path.split(word)
        folders = [os.path.join(cwd, place)] if place else here.get("PATH", "").split(";")
        for folder in folders:
            for ending in [""] if name.lower().endswith(tuple(endings)) else endings:
                if os.path.isfile(path := os.path.join(cwd, folder, name + ending)):
                    return path
        return word

    _MAX_CHARS, _MAX_CMD_CHARS = 32_766, 8_191  # of a command line or a variable; of a line for cmd.exe
    _SHELL_WORDS = re.compile(
        "assoc|break|call|cd|chdir|cls|copy|date|del|dir|echo|endlocal|erase|for|ftype|goto|if|md|mkdir|mklink|move|"
        "path|pause|popd|prompt|pushd|rd|rem|ren|rename|rmdir|set|setlocal|shift|start|time|title|type|ver|verify|vol"
    )

    def refuse_too_long(command: str | list[str], env: Mapping[str, str]) -> None:
        """Raise BadInput if a command or a variable is too long for Windows."""
        line = command if isinstance(command, str) else subprocess.list2cmdline(command)
        most = _MAX_CMD_CHARS if isinstance(command, str) else _MAX_CHARS
        if len(line) > most:
            raise BadInput(f"field 'command' is {len(line)} characters long, and Windows takes {most}; use a script")
        for name, value in env.items():
            if len(name) + 1 + len(value) > _MAX_CHARS:
                raise BadInput(f"field 'env': {name} has more than the {_MAX_CHARS} characters that Windows takes")

    def program_problem(word: str, cwd: str, path: str) -> str | None:
        """Return why an existing file cannot be run; None if there is no file, or no problem with it."""
        file = _program(word, cwd, {"PATH": path, "PATHEXT": os.environ.get("PATHEXT", "")})
        file = os.path.join(cwd, file)
        if os.path.isdir(file):
            return "it is a directory"
        if not os.path.isfile(file) or file.lower().endswith((".com", ".exe", ".bat", ".cmd")):
            return None
        return f"Windows cannot run such a file; name first what can, as in: python {word}"

    def is_shell_word(word: str) -> bool:
        """Tell whether a word is a builtin command of cmd.exe."""
        return bool(_SHELL_WORDS.fullmatch(word.lower()))

    def in_one_word(words: Sequence[str]) -> str:
        """Quote words as one argument, as one types it in cmd.exe."""
        return subprocess.list2cmdline([subprocess.list2cmdline(words)])

    class Leftovers:
        """The processes that remain of a dead worker's attempt; Windows ends them with the worker, after some time."""

        def __init__(self, run_tag: str, command: Command | None, log: str, is_running: Callable[[], bool]) -> None:
            self._run_tag = run_tag

        def end(self, timeout_s: float) -> list[str]:
            """End the processes; return those that remain after the timeout."""
            job = _open_job(self._run_tag, _JOB_QUERY | _JOB_TERMINATE)
            if job is None:
                is_gone = ctypes.get_last_error() == _NO_SUCH_FILE
                return [] if is_gone else ["processes that the system does not let us look at"]
            try:
                return _end_job(job, timeout_s)
            finally:
                _kernel32.CloseHandle(wintypes.HANDLE(job))

    def memory_kills() -> int:
        """Return 0: Windows refuses memory and ends no process for it."""
        return 0

    # ---- worker processes

    def become_worker(on_stop: Callable[[], None]) -> None:
        """Call `on_stop` at Ctrl-C and Ctrl-Break: the worker finishes its job and exits."""
        for number in (signal.SIGINT, signal.SIGBREAK, signal.SIGTERM):
            signal.signal(number, lambda *_: on_stop())

    def start_detached(home: Home, arguments: Sequence[str], serve: Callable[[], None]) -> TextIO:
        """Start a worker process; return the stream of its output, which ends when it is up.

        Its working directory is the root of the drive: Windows neither moves nor removes the working directory of a
        process.
        """
        try:
            process = _start_worker(home, arguments, _HIDDEN | _BREAKAWAY)
        except PermissionError:  # the job object of this process allows no breakaway
            process = _start_worker(home, arguments, _HIDDEN)
        process.returncode = 0  # it outlives this process; with a code, `Popen` does not warn that it still runs
        return cast(TextIO, process.stdout)

    def _start_worker(home: Home, arguments: Sequence[str], flags: int) -> subprocess.Popen[str]:
        return _start_with_retries(lambda: subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), *arguments], cwd=os.path.splitdrive(home.path)[0] + "\\",
            env={**os.environ, "QUEUECTL_HOME": home.path}, text=True, errors="replace", creationflags=flags,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ))  # fmt: skip

    def leave_job(arguments: Sequence[str]) -> None:
        """Let the workers that a job starts break away from the job object of its attempt."""
        job = _open_job(os.environ.get(RUN_TAG, NO_ATTEMPT), _JOB_SET)
        if job is not None:
            _limit(job, _KILL_ON_JOB_CLOSE | _BREAKAWAY_OK)
            _kernel32.CloseHandle(wintypes.HANDLE(job))
        os.environ[RUN_TAG] = NO_ATTEMPT

    HAS_SYSTEMD = False

else:
    import fcntl
    import select
    import stat

    # ---- files

    def refuse_if_shared(directory: str) -> None:
        """Raise QueueError if other users can write to a directory, as ssh does."""
        found = os.stat(directory)
        if found.st_uid not in (0, os.geteuid()):
            raise QueueError(f"{directory} belongs to another user; {OWN_DIRECTORY}")
        if found.st_mode & 0o022:
            is_ours = found.st_uid == os.geteuid() and not found.st_mode & stat.S_ISVTX and is_for_a_queue(directory)
            hint = f"run: {command_line(['chmod', 'go-w', directory])}" if is_ours else OWN_DIRECTORY
            raise QueueError(f"{directory} can be written to by others; {hint}")

    def is_open_to_others(path: str) -> bool:
        """Tell whether other users can read or write a file."""
        return bool(os.stat(path).st_mode & 0o077)

    def is_remote(path: str) -> bool:
        """Tell whether a path is on a network file system; only Linux reports it (proc(5): mounts)."""
        try:
            with open("/proc/mounts", encoding="utf-8", errors="surrogateescape") as file:
                mounts = [line.split()[1:3] for line in file]
        except OSError:
            return False
        holding = [(point, kind) for point, kind in mounts if os.path.commonpath([point, path]) == point]
        kind = max(holding, default=("", ""))[1]
        return kind.startswith(("nfs", "cifs", "smb", "ceph", "fuse.sshfs", "lustre", "afs"))

    _APPENDING = os.O_WRONLY | os.O_CREAT | os.O_APPEND

    def open_log(path: str) -> int:
        """Return a descriptor that appends to a regular file; raise OSError for all else, since a FIFO would block."""
        try:
            fd = os.open(path, _APPENDING | NONBLOCK, 0o600)
        except OSError as error:
            if error.errno != errno.ENXIO:  # open(2): a FIFO without a reader, or a socket
                raise
            raise OSError(errno.EINVAL, "it is no regular file", path) from None
        return require_regular(fd, path)

    CAN_TELL_WHO_OPENS = hasattr(fcntl, "F_SETLEASE")  # Linux

    class OpenWatch:
        """Detects with inotify(7) that a file was opened after a write to it; it never does so outside Linux."""

        _OPENED, _MODIFIED = 0x20, 0x2  # IN_OPEN and IN_MODIFY; an open that truncates reports IN_MODIFY first

        def __init__(self) -> None:
            self._fd, self._watch = -1, -1
            with contextlib.suppress(AttributeError):
                self._fd = int(_libc().inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

        def follow(self, path: str) -> None:
            """Watch this file instead of the previous one."""
            self.stop()
            if self._fd >= 0:
                wanted = self._OPENED | self._MODIFIED
                self._watch = int(_libc().inotify_add_watch(self._fd, os.fsencode(path), wanted))

        def stop(self) -> None:
            """Stop watching."""
            if self._watch >= 0:
                _libc().inotify_rm_watch(self._fd, self._watch)
                self._watch = -1
                self.was_opened_again()  # discard the pending events

        def was_opened_again(self) -> bool:
            """Tell whether the file was opened again after a write since the last call; its command opens it once."""
            if self._fd < 0:
                return False
            try:
                # An event has four words. The kernel merges equal successive events: a second open implies a write.
                events = memoryview(os.read(self._fd, 1 << 16)).cast("I")
            except BlockingIOError:
                return False
            return events[1::4].tolist().count(self._OPENED) > 1

    def is_open_elsewhere(fd: int) -> bool:
        """Tell whether another open file description of the file may exist.

        The kernel grants a write lease only on a file that is open nowhere else (fcntl(2), F_SETLEASE). If the file
        system supports no leases, the answer is unknown, and so True.
        """
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            return True
        return False

    # ---- wake-up

    _RING = b"\0"  # no signal has this number, which `set_wakeup_fd` would write

    class Bell:
        """A FIFO that other processes write to, and signals too (`set_wakeup_fd`), SIGCHLD among them.

        So one poll(2) waits for all events on every POSIX system. On Linux it also waits for the end of a neighbour
        (pidfd_open(2)).
        """

        def __init__(self, home: Home, worker: int) -> None:
            self.has_news = False  # there was a ring, or the neighbour has ended, since the worker reset this
            self._path = home.bell(worker)
            self._watched: str | None = None  # the identity of the neighbour's process
            self._neighbour = -1  # its pidfd
            self._poll = select.poll()
            self._make()

        def _make(self) -> None:
            remove_file(self._path)
            os.mkfifo(self._path, 0o600)
            self._fd = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)
            self._poll.register(self._fd, select.POLLIN)
            signal.set_wakeup_fd(self._fd, warn_on_full_buffer=False)

        def wait(self, timeout_s: float, process: Process | None = None) -> bool:
            """Sleep until a ring, an end or the timeout; return True for a ring or the end of the neighbour."""
            ready = self._poll.poll(max(0, math.ceil(timeout_s * 1000)))
            rung = b""
            with contextlib.suppress(BlockingIOError):
                rung = os.read(self._fd, 4096)
            if process is None and rung:
                _reap()  # orphans of earlier jobs are children of this process
            is_news = _RING in rung or any(fd == self._neighbour for fd, _ in ready)
            self.has_news = self.has_news or is_news
            return is_news

        def watch(self, process: str | None) -> bool:
            """Wake up also at the end of another worker's process; return False if the system cannot report it."""
            if process == self._watched and self._neighbour >= 0:
                return True
            if self._neighbour >= 0:
                self._poll.unregister(self._neighbour)
                os.close(self._neighbour)
                self._neighbour = -1
            self._watched = process
            if process and process.rsplit(":", 2)[0] == _own_namespace() and hasattr(os, "pidfd_open"):  # Linux
                with contextlib.suppress(OSError):
                    self._neighbour = os.pidfd_open(int(_split_identity(process)[2] or 0))
                    self._poll.register(self._neighbour, select.POLLIN)
            return self._neighbour >= 0

        def look_after(self) -> None:
            """Make the FIFO again if somebody has removed or replaced it."""
            if not _is_same(self._path, self._fd):
                before = self._fd
                self._make()
                self._poll.unregister(before)
                os.close(before)

        def close(self) -> None:
            """Remove the bell."""
            signal.set_wakeup_fd(-1)
            self.watch(None)
            if _is_same(self._path, self._fd):  # in a replaced home, the FIFO belongs to another worker
                remove_file(self._path)
            os.close(self._fd)

    def _is_same(path: str, fd: int) -> bool:
        """Tell whether a path still leads to the file of a descriptor."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(fd))
        except OSError:
            return False

    def _reap() -> None:
        with contextlib.suppress(ChildProcessError):  # no child is left
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def ring(home: Home, worker: int) -> bool:
        """Wake a worker; return False if no worker has this bell."""
        return _with_fifo(home, worker, _RING)

    def _with_fifo(home: Home, worker: int, message: bytes) -> bool:
        try:
            fd = os.open(home.bell(worker), os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # ENXIO, for one: no process reads the FIFO
            return False
        with contextlib.suppress(OSError):  # the FIFO is full of earlier rings
            os.write(fd, message)
        os.close(fd)
        return True

    # ---- life

    @functools.cache
    def _own_namespace() -> str:
        """Return the boot id and the PID namespace of this process, within which a process id is unique."""
        if not _HAS_PROC:
            return ":"
        return f"{_read('/proc/sys/kernel/random/boot_id').decode().strip()}:{os.stat('/proc/self/ns/pid').st_ino}"

    _INITIAL_NAMESPACE = "4026531836"  # PROC_PID_INIT_INO of Linux; the processes of all namespaces are visible in it

    def own_process() -> str:
        """Return the identity of this process: boot id, PID namespace, process id and start time."""
        if _HAS_PROC and os.readlink("/proc/self") != str(os.getpid()):
            raise QueueError("/proc shows the processes of another PID namespace; use unshare with --mount-proc")
        return f"{_own_namespace()}:{os.getpid()}:{_start_of(os.getpid())}"

    def _start_of(pid: int) -> int | None:
        """Return the start time of a process; None if it does not exist or has ended."""
        if _HAS_PROC:
            with contextlib.suppress(OSError):
                state, _, _, start, _ = _stat(pid)
                return None if state in "ZX" else start
            return None
        return next((found.start for found in _processes() if found.pid == pid), None)

    def _split_identity(process: str) -> list[str]:
        """Split what `own_process` returned; a damaged value counts as a process of another boot."""
        parts = process.split(":")
        return parts if len(parts) == 4 and parts[2].isdigit() else ["?", "", "", ""]

    def can_see(process: str | None) -> bool:
        """Tell whether processes in that one's PID namespace are visible here; else their absence proves nothing."""
        if process is None or process.rsplit(":", 2)[0] == _own_namespace():
            return True
        boot, namespace, pid, _ = _split_identity(process)
        own_boot, own_namespace = _own_namespace().split(":")
        if boot != own_boot or pid == "1":
            return True  # all processes end with the machine, and with the first process of their namespace
        return own_namespace == _INITIAL_NAMESPACE or _is_namespace_visible(namespace)

    def _is_namespace_visible(namespace: str) -> bool:
        """Tell whether any process of a PID namespace is visible here."""
        for pid in _pids():
            with contextlib.suppress(OSError):
                if str(os.stat(f"/proc/{pid}/ns/pid").st_ino) == namespace:
                    return True
        return False

    def _is_process_alive(process: str) -> bool | None:
        """Tell whether exactly that process lives; None if its PID namespace is not visible."""
        boot, namespace, pid, start = _split_identity(process)
        own_boot, own_namespace = _own_namespace().split(":")
        if boot != own_boot:
            return False
        if namespace != own_namespace:
            return None if own_namespace != _INITIAL_NAMESPACE or _is_namespace_visible(namespace) else False
        return str(_start_of(int(pid))) == start

    class Life:
        """A worker's sign of life: a file that its process keeps locked, and that records the command that it runs.

        The lock is a POSIX record lock (fcntl(2)). The kernel releases it when the process ends, no child inherits
        it, and to open the file does not acquire it. To close any other descriptor of the file would release it too,
        so a worker never opens its own file again.
        """

        def __init__(self, home: Home, worker: int) -> None:
            self._path = home.life(worker)
            self._note = b""
            self._fd = self._make()

        def _make(self) -> int:
            made = self._path + ".new"
            remove_file(made)
            fd = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, self._note)
            os.rename(made, self._path)  # the file is locked before it becomes visible
            return fd

        def note(self, run_tag: str, command: Command) -> None:
            """Record a started command; fsync is not needed, since no process outlives the machine."""
            self._note = f"{run_tag} {command.pid} {command.since} {command.until}".ljust(120).encode()
            with contextlib.suppress(OSError):  # the disk is full
                os.pwrite(self._fd, self._note, 0)

        def look_after(self) -> None:
            """Make the file again if somebody has removed or replaced it."""
            if not _is_same(self._path, self._fd):
                before, self._fd = self._fd, self._make()
                os.close(before)

        def close(self) -> None:
            """Remove the file: nothing remains to be recovered."""
            if _is_same(self._path, self._fd):
                remove_file(self._path)
            os.close(self._fd)

    def is_alive(home: Home, worker: int, process: str | None) -> bool:
        """Tell whether a worker's process lives; a missing or unreadable file does not prove that it is dead."""
        if process is None:  # a worker of release 1.0: its bell has a reader as long as it lives
            return _with_fifo(home, worker, b"")
        try:
            fd = os.open(home.life(worker), os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return _is_process_alive(process) is not False
        except OSError:
            return True
        try:
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
        return _is_process_alive(process) is True  # if so, somebody has replaced the file that it locks

    # ---- write gate

    class WriteGate:
        """A queue of the workers that want to write: the kernel admits one after the other (flock(2)).

        The gate spares them the retries at a busy database. It protects nothing, since the database has its own
        lock. So a worker goes ahead after WRITE_GATE_S: the one inside may be stopped, or wait for the database.
        """

        def __init__(self, home: Home) -> None:
            self._fd = os.open(home.bells, os.O_RDONLY)
            self._is_waiting = False
            signal.signal(signal.SIGALRM, self._stop_waiting)

        def __enter__(self) -> None:
            with contextlib.suppress(OSError):  # TimeoutError, or the file system supports no such locks
                try:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._wait()

        def _wait(self) -> None:
            self._is_waiting = True
            try:
                # The timer repeats, since the first signal may come before flock blocks.
                signal.setitimer(signal.ITIMER_REAL, WRITE_GATE_S, WRITE_GATE_S)
                fcntl.flock(self._fd, fcntl.LOCK_EX)
            finally:
                self._is_waiting = False
                signal.setitimer(signal.ITIMER_REAL, 0)

        def _stop_waiting(self, *_: object) -> None:
            if self._is_waiting:
                self._is_waiting = False
                raise TimeoutError

        def __exit__(self, *_: object) -> None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)

        def close(self) -> None:
            """Close the gate's descriptor."""
            os.close(self._fd)

    # ---- processes

    SHELL: Shell = "sh"

    def exit_status(code: int) -> int:
        """Convert an exit code to 8 bits; a larger one, which Windows has, never becomes 0."""
        return code if 0 <= code < 256 else code % 256 or 1

    _HAS_PROC = os.uname().sysname == "Linux" and os.path.isdir("/proc/self/fd")  # without /proc, `ps` is used
    _RSS_BYTES = 1 if os.uname().sysname == "Darwin" else 1024  # the unit of ru_maxrss (getrusage(2))
    _RLIMIT_LOCKS = 10  # Linux has not enforced this limit since 2.4, and every child inherits it (getrlimit(2))
    _MIN_RUN_NUMBER = 1 << 61  # the smallest run number; no administrator sets a limit that large
    _Identity = tuple[int, int]  # a process id and the start time of its process

    class _ProcessInfo(NamedTuple):
        """A process that has not ended."""

        pid: int
        start: int  # in clock ticks since boot; without /proc in seconds since 1970
        parent: int
        session: int  # without /proc the process group
        name: str
        run: int | None  # its run number, if it has one

    def _run_number(run_tag: str) -> int:
        """Return a run tag as a value of a limit, which remains when the environment is cleared and is public."""
        return _MIN_RUN_NUMBER + int.from_bytes(run_tag.encode(), "big") % (_MIN_RUN_NUMBER - 1)  # 2**61 - 1 is prime

    def _set_run_number(run_tag: str) -> None:
        """Set the run number that all processes started from here on inherit."""
        if _HAS_PROC:
            with contextlib.suppress(ImportError, ValueError, OSError):  # the hard limit was lowered
                import resource

                resource.setrlimit(_RLIMIT_LOCKS, (_run_number(run_tag), resource.RLIM_INFINITY))

    def _run_of(pid: int) -> int | None:
        """Return the run number of a process from its limit or its environment; None if neither holds one."""
        with contextlib.suppress(OSError, IndexError):
            limit = _read(f"/proc/{pid}/limits").partition(b"file locks")[2].split(None, 1)[0]
            if limit.isdigit() and int(limit) >= _MIN_RUN_NUMBER:
                return int(limit)
        with contextlib.suppress(OSError):
            _, found, rest = (b"\0" + _read(f"/proc/{pid}/environ")).partition(f"\0{RUN_TAG}=".encode())
            return _run_number(os.fsdecode(rest.partition(b"\0")[0])) if found else None
        return None

    def _read(path: str) -> bytes:
        with open(path, "rb", buffering=0) as file:
            return file.read()

    def _ticks() -> int:
        """Return the current time in the unit of process start times."""
        return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK") if _HAS_PROC else time.time())

    def _stat(pid: int) -> tuple[str, int, int, int, str]:
        """Return state, parent, session, start and name of a process (proc(5): the name may contain any character)."""
        head, _, tail = _read(f"/proc/{pid}/stat").rpartition(b")")
        state, parent, _, session, *rest = tail.split(None, 20)
        return state.decode(), int(parent), int(session), int(rest[15]), os.fsdecode(head.partition(b"(")[2])

    def _find(pid: int, since: int) -> _ProcessInfo | None:
        """Return a process; None if it has ended or started before `since`."""
        with contextlib.suppress(OSError):
            state, parent, session, start, name = _stat(pid)
            if state not in "ZX" and start >= since:
                return _ProcessInfo(pid, start, parent, session, name, _run_of(pid))
        return None

    def _newest_pid() -> int:
        """Return the process id that was assigned last (proc(5): loadavg)."""
        return int(_read("/proc/loadavg").rsplit(None, 1)[1])

    def _processes(since: int = 0) -> Iterator[_ProcessInfo]:
        """Yield every process that started since `since`, then those created during the scan, until none is new.

        Raise TimeoutError if new ones still appear 50 ms after the first pass, in CPU time of this thread. Wall time
        would not do: on a busy machine, other processes run and fork between any two steps of the scan. The first
        pass does not count, because it takes longer the more processes there are.
        """
        if not _HAS_PROC:
            yield from _ps(since)
            return
        newest = _newest_pid()
        pids: Sequence[int] = _pids()
        deadline = math.inf
        while pids:
            yield from filter(None, (_find(pid, since) for pid in pids))
            deadline = min(deadline, time.thread_time() + 0.05)
            before, newest = newest, _newest_pid()
            if newest >= before:
                pids = range(before + 1, newest + 1)
            else:  # process ids have wrapped around
                pids = [pid for pid in _pids() if pid > before or pid <= newest]
            deadline = min(deadline, time.thread_time() + 0.05)
            if pids and time.thread_time() > deadline:
                raise TimeoutError

    def _pids() -> list[int]:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]

    def _ps(since: int) -> Iterator[_ProcessInfo]:
        """Yield the same processes from `ps`, which prints the environment after the command."""
        import subprocess

        options = ["ps", "-axEww", "-o", "pid=,ppid=,pgid=,stat=,lstart=,command="]
        with subprocess.Popen(options, stdout=subprocess.PIPE, env={**os.environ, "LC_ALL": "C"}) as ps:
            lines = cast(IO[bytes], ps.stdout).read().decode(errors="replace").splitlines()
        for line in lines:
            pid, parent, group, state, *when, command = line.split(None, 9)
            start = int(time.mktime(time.strptime(" ".join(when), "%a %b %d %H:%M:%S %Y")))
            tags = re.findall(rf" {RUN_TAG}=(\S+)", command)
            if state[0] != "Z" and start >= since and int(pid) != ps.pid:
                name = os.path.basename(command.split()[0])
                yield _ProcessInfo(
                    int(pid), start, int(parent), int(group), name, _run_number(tags[0]) if tags else None
                )

    def _writes_to(pid: int, file: tuple[int, int]) -> bool:
        """Tell whether a process has a file open for writing, by device and inode, since its path may have changed."""
        folder = f"/proc/{pid}/fd"
        with contextlib.suppress(OSError):
            for fd in os.listdir(folder):
                with contextlib.suppress(OSError):
                    if file_identity(f"{folder}/{fd}") == file and os.lstat(f"{folder}/{fd}").st_mode & 0o200:
                        return True
        return False

    def _send(process: _Identity, number: int) -> None:
        """Signal a process unless another has its id now; raise PermissionError if the user may not signal it."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            if not hasattr(os, "pidfd_open"):  # macOS, and a Python built on an old Linux
                if any((found.pid, found.start) == process for found in _processes()):
                    os.kill(process[0], number)
                return
            fd = os.pidfd_open(process[0])  # the descriptor stays with this process, even if its id is reused
            try:
                if _stat(process[0])[3] == process[1]:
                    signal.pidfd_send_signal(fd, number)
            finally:
                os.close(fd)

    def _is_hidden(pid: int) -> bool:
        """Tell whether a process of another user exists that /proc does not show (proc(5): hidepid)."""
        try:
            os.kill(pid, 0)
        except PermissionError:
            return not os.path.exists(f"/proc/{pid}")
        except OSError:
            pass
        return False

    class _Family:
        """The processes of one attempt: all with its run number, and those without one that are related to them."""

        def __init__(
            self, run_tag: str, command: Command | None, reaper: int = -1,
            writes: Callable[[int], bool] = lambda pid: False, is_empty: Callable[[], bool] = lambda: False,
        ) -> None:  # fmt: skip
            self._run, self._command, self._reaper = _run_number(run_tag), command, reaper
            # `writes` tells whether a process has the log open for writing; `is_empty` is true only if no process
            # of the attempt can be left.
            self._writes, self._is_empty = writes, is_empty
            self._members: set[_Identity] = set()  # all processes that any scan has found
            self._not_permitted: set[_Identity] = set()  # those that this user may not signal

        def terminate(self, grace_s: float, meanwhile: Callable[[], None]) -> None:
            """Send SIGTERM, and wait until all processes have ended or the grace is over."""
            deadline = time.monotonic() + grace_s
            # The order is by process id, so parents come before their children: a shell gets the signal before
            # the end of its command, and can clean up. A stopped process handles SIGTERM only after SIGCONT.
            self._signal(signal.SIGTERM, signal.SIGCONT)
            while time.monotonic() < deadline and self._signal().keys() - self._not_permitted:
                meanwhile()
                time.sleep(0.03)

        def end(self, timeout_s: float) -> list[str]:
            """Kill all processes, and those that they start meanwhile; return those that remain after the timeout.

            SIGSTOP comes first, until a scan finds no new process: so none that forks quickly escapes SIGKILL. Each
            gets SIGKILL at least once, because one scan of a large and busy machine may outlast the timeout.
            """
            deadline = time.monotonic() + timeout_s
            known: set[_Identity] = set()
            number, is_last = signal.SIGSTOP, False
            while found := self._signal(number):
                if is_last or found.keys() <= self._not_permitted:
                    break
                is_late = time.monotonic() > deadline
                is_last = is_late and number == signal.SIGKILL  # one more scan shows what that SIGKILL did
                number = signal.SIGKILL if is_late or found.keys() <= known else signal.SIGSTOP
                known |= found.keys()
                time.sleep(0.005 if number == signal.SIGKILL else 0)
            return [f"{pid} ({name})" if pid else name for (pid, _), name in found.items()]

        def _signal(self, *numbers: int) -> dict[_Identity, str]:
            """Send signals to each process; return their names.

            The result is empty only if the scan has covered all processes that were created while it ran, or if no
            scan is needed: a stranger that forks quickly must not keep the attempt from its end.
            """
            if self._is_empty():
                return {}
            found: dict[_Identity, str] = {}
            pids: set[int] = set()
            try:
                for process in _processes(self._command.since if self._command else 0):
                    if self._has(process, pids):
                        pids.add(process.pid)
                        found[process.pid, process.start] = process.name
                        self._send((process.pid, process.start), numbers)
            except TimeoutError:
                found = found or {(0, 0): "processes that are made faster than they can be looked at"}
            if self._command and self._command.pid not in pids and _is_hidden(self._command.pid):
                found[self._command.pid, 0] = "hidden"
            self._members |= found.keys()
            return found

        def _has(self, process: _ProcessInfo, pids: set[int]) -> bool:
            """Tell whether a process belongs to the attempt: by run number, or if it has none, by its relatives."""
            if (process.pid, process.start) in self._members:
                return True
            if process.run is not None or process.pid == os.getpid():
                return process.run == self._run
            command = self._command
            return (
                (command is not None and process.pid == command.pid and process.start <= command.until)
                or process.parent in {self._reaper} | pids
                or process.session in pids
                or self._writes(process.pid)
            )

        def _send(self, process: _Identity, numbers: Iterable[int]) -> None:
            try:
                for number in numbers:
                    _send(process, number)
            except PermissionError:
                self._not_permitted.add(process)
            except OSError:
                pass  # the process has ended

    class Process:
        """A command in a session of its own; this process adopts its orphans."""

        def __init__(
            self, command: str | list[str], cwd: str, env: dict[str, str], log: str, run_tag: str,
            stdin: int | None = None,
        ) -> None:  # fmt: skip
            self._exit: Exit | None = None
            words = ["/bin/sh", "-c", command] if isinstance(command, str) else command
            since = _ticks()
            os.chdir(cwd)  # the child inherits it: posix_spawn(3) has no portable option for it
            _set_run_number(run_tag)
            try:
                pid = _spawn(words, {**env, RUN_TAG: run_tag}, log, stdin)
            finally:
                _set_run_number(NO_ATTEMPT)
                os.chdir("/")  # so that the file system of `cwd` can be unmounted
            self.command = Command(pid, since, _ticks())
            self._family = _Family(run_tag, self.command, os.getpid(), is_empty=self._is_childless)

        def poll(self) -> Exit | None:
            """Return how the command ended, None while it runs; reap ended orphans too."""
            with contextlib.suppress(ChildProcessError):  # no child is left
                while (ended := os.wait4(-1, os.WNOHANG))[0]:
                    if ended[0] == self.command.pid:
                        self._exit = _exit_of(*ended[1:])
            return self._exit

        def _is_childless(self) -> bool:
            """Reap what has ended, and tell whether this process has no descendant that could be of the attempt.

            On Linux it adopts every orphan among its descendants: without a child it has no descendant.
            """
            self.poll()
            if not _HAS_PROC:  # macOS has no waitid(2) before Python 3.13
                return False
            try:
                os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return _adopts_orphans()
            return False

        def end(self, grace_s: float, meanwhile: Callable[[], None] = lambda: None) -> list[str]:
            """End the command and all that it started: SIGTERM, after the grace SIGKILL; return what remains.

            `meanwhile` is called repeatedly during the grace.
            """
            if grace_s:
                self._family.terminate(grace_s, meanwhile)
            return self._family.end(timeout_s=1.0)

        def close(self) -> None:
            """Do nothing: processes that still run go on."""

    _SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}  # the signals that a process can ignore

    def _spawn(words: list[str], env: Mapping[str, str], log: str, stdin: int | None) -> int:
        """Start a program in a session of its own; return its process id."""
        return os.posix_spawn(
            _program(words[0], env.get("PATH", os.defpath)), words, env,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
                if stdin is None else (os.POSIX_SPAWN_DUP2, stdin, 0),
                (os.POSIX_SPAWN_OPEN, 1, log, _APPENDING, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True, setsigmask=(), setsigdef=_SIGNALS,  # the parent of the worker may have ignored some
        )  # fmt: skip

    def _exit_of(status: int, usage: Any) -> Exit:
        code = os.waitstatus_to_exitcode(status)
        rss, cpu_s = usage.ru_maxrss * _RSS_BYTES, usage.ru_utime + usage.ru_stime
        return Exit(code, None, rss, cpu_s) if code >= 0 else Exit(None, -code, rss, cpu_s)

    def _program(word: str, path: str) -> str:
        """Return the file that a word means, by the PATH of the command."""
        if "/" in word:
            return word
        import shutil

        return shutil.which(word, path=path) or word

    # execve(2): MAX_ARG_STRLEN, which only Linux has; then the null byte and the pointer that each string takes;
    # then the size up to which no system refuses.
    _MAX_STRING_BYTES = 32 * os.sysconf("SC_PAGE_SIZE") - 1 if _HAS_PROC else sys.maxsize
    _STRING_OVERHEAD, _SAFE_BYTES = 9, 100_000
    _SHELL_WORDS = re.compile(
        r"[.:{!(]|alias|bg|break|case|cd|command|continue|eval|exec|exit|export|fg|for|getopts|hash|if|jobs|local|read|"
        "readonly|return|set|shift|times|trap|type|ulimit|umask|unalias|unset|until|wait|while"
    )

    def refuse_too_long(command: str | list[str], env: Mapping[str, str]) -> None:
        """Raise BadInput if a command and its environment are too long for this system."""
        words = ["/bin/sh", "-c", command] if isinstance(command, str) else command
        variables = [f"{name}={value}" for name, value in env.items()]
        strings = words + variables
        if 4 * sum(map(len, strings)) + _STRING_OVERHEAD * len(strings) < _SAFE_BYTES:  # UTF-8: at most 4 bytes each
            return
        for field, given in (("command", words), ("env", variables)):
            longest = max((len(string.encode()) for string in given), default=0)
            if longest > _MAX_STRING_BYTES:
                more = f"{longest} bytes in one string, and this system takes {_MAX_STRING_BYTES}; put it in a file"
                raise BadInput(f"field {field!r} has {more}")
        here = [f"{name}={value}" for name, value in os.environ.items() if name not in env]
        total, most = sum(len(os.fsencode(s)) + _STRING_OVERHEAD for s in strings + here), os.sysconf("SC_ARG_MAX")
        if 0 < most < total:
            more = f"{total} bytes with the environment, and this system takes {most}; put them in a file"
            raise BadInput(f"fields 'command' and 'env' have {more}")

    def program_problem(word: str, cwd: str, path: str) -> str | None:
        """Return why an existing file cannot be run; None if there is no file, or no problem with it."""
        file = os.path.join(cwd, _program(word, path))
        if os.path.isdir(file):
            return "it is a directory"
        if not os.path.exists(file):
            return "it is a link that leads nowhere" if os.path.islink(file) else None
        if not os.access(file, os.X_OK):
            return f"it is not executable; run: {command_line(['chmod', '+x', file])}"
        try:
            with open(file, "rb") as opened:
                return _header_problem(opened.read(256), file)
        except OSError:
            return None  # an executable file may be unreadable

    def _header_problem(head: bytes, file: str) -> str | None:
        """Return why a program does not start, as far as its first bytes show it."""
        if head.startswith((b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe", b"MZ")):
            return "it is built for another system, or its loader is missing"
        if not head.startswith(b"#!"):
            return f"it has no #! line that says what runs it; name that first: {command_line(['sh', file])}"
        line = os.fsdecode(head[2:].split(b"\n")[0]).strip(" \t")
        if line.endswith("\r"):
            fix = f"sed -i.bak 's/\\r$//' {command_line([file])}"
            return f"its lines end in CR LF, as on Windows, so the system looks for {line!r}; run: {fix}"
        interpreter = line.split(None, 1)[0] if line else ""
        if not os.path.exists(interpreter):
            return f"its interpreter {interpreter!r} does not exist"
        return None if os.access(interpreter, os.X_OK) else f"its interpreter {interpreter!r} is not executable"

    def is_shell_word(word: str) -> bool:
        """Tell whether a word is a builtin or a keyword of the shell."""
        return bool(_SHELL_WORDS.fullmatch(word))

    def in_one_word(words: Sequence[str]) -> str:
        """Quote words as one argument, as one types it in a shell."""
        quoted = [name + command_line([value]) if name else command_line([value]) for name, value in map(_split, words)]
        if "=" not in words[0]:
            quoted[0] = words[0]  # quoted, a keyword or an operator would be the name of a program
        return command_line([" ".join(quoted)])

    def _split(word: str) -> tuple[str, str]:
        """Split a word at the end of the `NAME=` at its beginning: quoted, a shell would not see that it sets one."""
        name = re.match(r"([A-Za-z_]\w*=)?", word)
        return word[: name.end()] if name else "", word[name.end() :] if name else word

    class Leftovers:
        """The processes that remain of a dead worker's attempt.

        They are found by their run number. Those that have dropped it are found as the recorded command, by parent
        and session, or by the log that they have open. A later attempt writes to the same log. So the open log counts
        only while the database still has the attempt as running, since no later one can begin before that ends.
        """

        def __init__(self, run_tag: str, command: Command | None, log: str, is_running: Callable[[], bool]) -> None:
            self._log, self._is_running = log, is_running
            self._file: tuple[int, int] | None = None
            self._family = _Family(run_tag, command, writes=self._writes)

        def _writes(self, pid: int) -> bool:
            return self._file is not None and _writes_to(pid, self._file) and self._is_running()

        def end(self, timeout_s: float) -> list[str]:
            """End the processes; return those that remain after the timeout."""
            with contextlib.suppress(OSError):  # there is no log
                self._file = file_identity(self._log)
            return self._family.end(timeout_s)

    def memory_kills() -> int:
        """Return the number of out-of-memory kills of the system; only Linux reports it (proc(5): vmstat)."""
        try:
            with open("/proc/vmstat", "rb") as file:
                return int(file.read().partition(b"oom_kill ")[2].split()[0])
        except (OSError, IndexError):
            return 0

    # ---- worker processes

    def become_worker(on_stop: Callable[[], None]) -> None:
        """Set up this process as a worker.

        SIGTERM and SIGINT call `on_stop`: the worker finishes its job and exits. Jobs inherit no descriptors. The
        worker adopts their orphans.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: on_stop())
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGCHLD, signal.SIGIO):  # child ended: wakes `Bell`; lease broken (fcntl(2))
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the parent may have blocked some
        for fd in _open_descriptors():
            with contextlib.suppress(OSError):
                os.set_inheritable(fd, False)
        pr_set_child_subreaper, m_trim_threshold = 36, -1
        with contextlib.suppress(AttributeError, OSError):  # only Linux and glibc have these
            _libc().prctl(pr_set_child_subreaper, 1, 0, 0, 0)
            _libc().mallopt(m_trim_threshold, 64 << 20)  # else glibc returns memory after each statement

    def _adopts_orphans() -> bool:
        """Tell whether this process adopts its orphans (prctl(2))."""
        import ctypes

        pr_get_child_subreaper, answer = 37, ctypes.c_int()
        with contextlib.suppress(AttributeError, OSError):  # only Linux has it
            _libc().prctl(pr_get_child_subreaper, ctypes.byref(answer), 0, 0, 0)
        return bool(answer.value)

    def _open_descriptors() -> list[int]:
        """Return the descriptors of this process, and that of the listing, which is closed again."""
        return [int(name) for name in os.listdir("/dev/fd")]

    def _libc() -> Any:
        import ctypes

        return ctypes.CDLL(None)

    def start_detached(home: Home, arguments: Sequence[str], serve: Callable[[], None]) -> TextIO:
        """Start a worker process; return the stream of its output, which ends when it is up.

        The process is forked, so that workers share the memory of all modules that are imported before.
        """
        _share_memory()
        reader, writer = os.pipe()
        if os.fork():
            os.close(writer)
            return os.fdopen(reader)
        try:
            _detach(writer)
            serve()
        finally:
            os._exit(0)

    def _share_memory() -> None:
        """Import what workers need before the fork, and exempt it from garbage collection, which would copy pages."""
        import ctypes  # noqa: F401
        import gc
        import logging  # noqa: F401
        import resource  # noqa: F401
        import shutil  # noqa: F401
        import socket  # noqa: F401

        gc.freeze()

    def _detach(output: int) -> None:
        """Leave the session, the working directory and the open files of the parent."""
        os.setsid()
        os.chdir("/")  # so that the file system of the parent's directory can be unmounted
        for fd, target in ((os.open(os.devnull, os.O_RDWR), 0), (output, 1), (output, 2)):
            os.dup2(fd, target)
        for fd in filter(lambda fd: fd > 2, _open_descriptors()):
            with contextlib.suppress(OSError):  # an inherited descriptor may hold a script's flock(2)
                os.close(fd)

    def leave_job(arguments: Sequence[str]) -> None:
        """Execute this program again without the run tag of the job that starts this worker, if a job does."""
        _set_run_number(NO_ATTEMPT)
        if os.environ.get(RUN_TAG, NO_ATTEMPT) != NO_ATTEMPT:
            command = [sys.executable, os.path.abspath(__file__), *arguments]
            os.execve(sys.executable, command, {**os.environ, RUN_TAG: NO_ATTEMPT})

    HAS_SYSTEMD = os.uname().sysname == "Linux"


# ======================================================================== home


def open_home() -> Home:
    """Return the home that QUEUECTL_HOME names; create it for its owner alone if it is missing."""
    given = expanded(os.environ.get("QUEUECTL_HOME") or "~/.queuectl", "set QUEUECTL_HOME to a whole path")
    try:
        home = Home(os.path.realpath(given))
        if not os.path.isdir(home.path):
            os.makedirs(home.path, 0o700, exist_ok=True)
        refuse_if_shared(home.path)
        for folder in (home.logs, home.bells):
            os.makedirs(folder, 0o700, exist_ok=True)
        make_private_file(home.database)
    except OSError as error:
        raise QueueError(f"cannot use {given} as home: {error.strerror}; set QUEUECTL_HOME to another") from error
    return home


def expanded(path: str, otherwise: str) -> str:
    """Expand a leading `~` as a shell does; raise BadInput if no home directory is known."""
    user = path.partition("/")[0].partition(os.sep)[0]
    if not user.startswith("~"):
        return path
    found = os.path.expanduser(path)
    if not os.path.isabs(found) or (user == "~" and os.environ.get("HOME") == ""):
        raise BadInput(f"no home directory is known for {user} in {path!r}; {otherwise}")
    return found


def directory_problem(path: str) -> str | None:
    """Return why no command can start in a directory; None if one can."""
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return "is not a directory" if error.errno == errno.ENOTDIR else f"cannot be entered: {error.strerror}"
    if not is_directory:
        return "is not a directory"
    return None if os.access(path, os.X_OK) else f"cannot be entered: {os.strerror(errno.EACCES)}"


def home_problems(home: Home, has_job: Callable[[str], bool], workers: Callable[[], Iterable[int]]) -> Iterator[str]:
    """Yield the problems of a home outside its database; `has_job` and `workers` ask the database."""
    for path in (home.path, home.database, home.worker_log):
        shown = printable(path)
        if os.path.exists(path) and not os.access(path, os.R_OK | os.W_OK):
            yield f"{shown} cannot be read and written"
        elif os.path.exists(path) and is_open_to_others(path):
            yield f"{shown} can be read by others; run: {command_line(['chmod', 'go=', shown])}"
    if is_remote(home.path):
        yield f"{printable(home.path)} is on a network file system, which cannot hold a WAL database; use a local one"
    stray = stray_logs(home, has_job, workers)
    if stray:
        yield f"{len(stray)} logs belong to no job, {printable(stray[0])} among them; mend it: queuectl doctor --repair"


def stray_logs(home: Home, has_job: Callable[[str], bool], workers: Callable[[], Iterable[int]]) -> list[str]:
    """Return the names of the files among the logs that belong to no job and no worker."""
    names = set(os.listdir(home.logs))  # before the rows are read: a worker has its row before its spool
    names -= {os.path.basename(home.spool(worker)) for worker in workers()}
    jobs = {name: name.removeprefix(".").removesuffix(".log") for name in names if name.endswith(".log")}
    return sorted(name for name in names if not (name in jobs and has_job(jobs[name])))


def remove_stray_logs(home: Home, has_job: Callable[[str], bool], workers: Callable[[], Iterable[int]]) -> None:
    """Remove the files that `stray_logs` returns."""
    for name in stray_logs(home, has_job, workers):
        remove_file(os.path.join(home.logs, name))


def free_bytes(path: str) -> int:
    """Return the free space of the disk that holds a path."""
    import shutil

    return shutil.disk_usage(path).free


def make_private(home: Home) -> None:
    """Restrict the home, its database and its worker log to their owner."""
    os.chmod(home.path, 0o700)
    for file in (home.database, home.worker_log):
        with contextlib.suppress(OSError):
            if not os.path.islink(file):
                os.chmod(file, 0o600)


def require_file(path: str) -> str:
    """Return a path; raise NotFound if there is no file."""
    if not os.path.isfile(path):
        raise NotFound(f"there is no file {printable(path)}")
    return path


def refuse_own(home: Home, path: str) -> None:
    """Raise BadInput if a path for a backup is a file of the database itself, or exists and is no file."""
    if os.path.realpath(path) in (home.database + end for end in ("", "-wal", "-shm")):
        raise BadInput("that is the queue itself; name another file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadInput(f"{printable(path)} is no file that could be replaced; name another")


@contextlib.contextmanager
def new_file_for(path: str) -> Iterator[str]:
    """Give a private temporary file in the directory of a path; rename it to the path when the block succeeds."""
    import tempfile

    folder, name = os.path.split(path)
    fd, made = tempfile.mkstemp(".part", f".{name}.", folder or os.curdir)  # never an existing file
    os.close(fd)
    try:
        yield made
        os.replace(made, path)
    finally:
        remove_file(made)


@contextlib.contextmanager
def workspace(home: Home) -> Iterator[str]:
    """Give a temporary directory in the home; remove it after the block."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix=".restore-", dir=home.path) as path:
        yield path


def is_regular(path: str) -> bool:
    """Tell whether a path is a regular file, and no FIFO, directory or link."""
    try:
        return os.access(path, os.F_OK) and stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def install_unit(name: str, text: str, force: bool) -> str:
    """Write a systemd unit to the directory of the user's units; return its path.

    Raise QueueError if a different unit of that name exists and `force` is false.
    """
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    path = os.path.join(config, "systemd", "user", name)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.exists(path) and not force and not _has_text(path, text):
            raise QueueError(f"{path} is there already and differs; to replace it: --force")
        with open(f"{path}.part", "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
        os.replace(f"{path}.part", path)
    except OSError as error:
        raise QueueError(f"cannot write {path}: {error.strerror}") from error
    return path


def _has_text(path: str, text: str) -> bool:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read() == text


def size_of(path: str) -> int:
    """Return the size of a file in bytes; 0 if there is no file."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def make_private_file(path: str) -> None:
    """Create a file for its owner alone; leave an existing one unchanged. Raise OSError if it is no regular file."""
    os.close(require_regular(os.open(path, os.O_CREAT | os.O_RDWR | NONBLOCK, 0o600), path))


def now_ms() -> int:
    """Return the wall-clock time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class Clock:
    """The time source and random source of a worker; a test passes its own."""

    def now_ms(self) -> int:
        """Return the wall-clock time in milliseconds since 1970."""
        return now_ms()

    def monotonic_s(self) -> float:
        """Return monotonic time in seconds, which a change of the clock does not affect."""
        return time.monotonic()

    def chance(self) -> float:
        """Return a number from 0 to 1, random enough to spread retries and checkpoints."""
        return time.perf_counter_ns() % 999_983 / 999_983


def own_pid() -> int:
    """Return the id of this process."""
    return os.getpid()


def host_name() -> str:
    """Return the name of this machine."""
    import socket

    return socket.gethostname()


def python_version() -> str:
    """Return the version of the running interpreter."""
    return sys.version.split()[0]


def wants_colour() -> bool | None:
    """Return False if NO_COLOR is set, else None, which leaves the decision to click."""
    return False if os.environ.get("NO_COLOR") else None


def terminal_columns() -> int:
    """Return the width of the terminal; 80 if it reports none."""
    import shutil

    return shutil.get_terminal_size().columns or 80  # Python 3.10 may return a reported width of 0


def terminal_rows() -> int:
    """Return the height of the terminal."""
    import shutil

    return shutil.get_terminal_size().lines or 24  # Python 3.10 returns the 0 of a terminal without a size


def has_screen() -> bool:
    """Tell whether standard output is a terminal that can move its cursor."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def silence_output() -> None:
    """Discard further output, since the reader of standard output has closed it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def is_reader_gone(error: OSError) -> bool:
    """Tell whether an error means that the reader has closed our output; Windows reports EINVAL for that."""
    return error.errno in (errno.EPIPE, errno.EINVAL)


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Exit without the interpreter's shutdown, which is a tenth of the run time of a short command."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # open(2) returns the lowest free number, which is `fd`
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # Python sets a closed stream to None
    sys.stderr = sys.stderr or open(2, "w", closefd=False)
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError as error:  # a reader that has closed our output is no failure
            code = code or int(not is_reader_gone(error))
        os._exit(exit_status(code))


def here(directory: str = "", otherwise: str = "give --cwd with a whole path") -> str:
    """Return the absolute path of a path, with `~` expanded; raise QueueError if the current directory is gone."""
    try:
        return os.path.abspath(expanded(directory, "give the whole path") or os.curdir)
    except FileNotFoundError:
        raise QueueError(f"the current directory is gone; go elsewhere, or {otherwise}") from None


def with_values(words: Sequence[str]) -> tuple[str, ...]:
    """Complete each `K` with its value in this environment, leave `K=V`; raise BadInput if `K` is not set."""
    for word in words:
        if "=" not in word and word not in os.environ:
            raise BadInput(f"--env names {word}, which is not set here; say {word}=VALUE")
    return tuple(word if "=" in word else f"{word}={os.environ[word]}" for word in words)


def inherited_environment() -> dict[str, str]:
    """Return the environment that every job of this worker inherits.

    It lacks OLDPWD, which names a directory of the process that started the worker. PWD is set for each job.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("QUEUECTL_") and name != "OLDPWD"}


# ======================================================================== attempts


def open_regular(path: str, mode: str = "rb") -> BinaryIO:
    """Open a regular file, unbuffered. Raise OSError for a FIFO or a device, whose open or read could block."""
    flags = (os.O_RDWR if "+" in mode else os.O_RDONLY) | NONBLOCK | getattr(os, "O_BINARY", 0)
    return cast(BinaryIO, os.fdopen(require_regular(os.open(path, flags), path), mode, buffering=0))


def block_at(file: BinaryIO, at: int, size: int) -> bytes:
    """Return up to `size` bytes of a file from an offset."""
    file.seek(at)
    return file.read(size)


def blocks_of(file: BinaryIO, at: int) -> Iterator[bytes]:
    """Yield the rest of a file from an offset, in blocks."""
    while block := block_at(file, at, LOG_BLOCK):
        at += len(block)
        yield block


def _seal(file: BinaryIO, size: int) -> tuple[int, bytes]:
    """Return the last bytes among the first `size` of a file, with their offset; they show later if it was emptied."""
    at = max(0, size - SEAL_BYTES)
    return at, block_at(file, at, min(size, SEAL_BYTES))


class LogReader:
    """The output of a job, at offsets that stay valid if its command empties the log.

    A retry that opens /dev/stderr by name empties the log, and with it the output of earlier attempts. While a retry
    runs, a copy of that output exists. It is read in place of the first part of the log.
    """

    def __init__(self, path: str) -> None:
        self._log: BinaryIO | None = None
        self._earlier: BinaryIO | None = None
        self.own = 0  # offset of the output of the running attempt, if it is a retry
        self._base = 0  # the same offset in the log file
        self._log = self._open(path)
        self._earlier = self._open(earlier_output(path))
        if self._earlier:
            self.own = self._earlier.seek(0, os.SEEK_END)
            at, wanted = _seal(self._earlier, self.own)
            if self._log and block_at(self._log, at, len(wanted)) == wanted:
                self._base = self.own

    def _open(self, path: str) -> BinaryIO | None:
        try:
            return open_regular(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.close()
            raise QueueError(f"cannot read {printable(path)}: {error.strerror}") from error

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in (self._log, self._earlier):
            if file:
                file.close()

    @property
    def is_whole(self) -> bool:
        """Tell whether the log still holds the start and the end of the earlier output."""
        first = self.read(0, min(SEAL_BYTES, self.own))
        begins = not first or (self._log is not None and block_at(self._log, 0, len(first)) == first)
        return begins and self._base == self.own

    def size(self) -> int:
        """Return the end offset of the output."""
        return self.own + (max(0, self._log.seek(0, os.SEEK_END) - self._base) if self._log else 0)

    def read(self, at: int, size: int) -> bytes:
        """Return bytes from an offset: fewer than `size` at times, none only at the end."""
        if self._earlier and at < self.own:
            return block_at(self._earlier, at, min(size, self.own - at))
        return block_at(self._log, self._base + at - self.own, size) if self._log else b""


def read_log(path: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yield a log in blocks, from one offset to another; nothing if it does not exist yet."""
    with LogReader(path) as log:
        left = sys.maxsize if end is None else end - start
        while left > 0 and (block := log.read(start, min(left, LOG_BLOCK))):
            start += len(block)
            left -= len(block)
            yield block


def tail_start(path: str, lines: int, start: int = 0, end: int | None = None) -> int:
    """Return the offset of the last lines of a log, or of a range of it. It is read from the end, in blocks."""
    with LogReader(path) as log:
        at = log.size() if end is None else min(end, log.size())
        if lines and at > start and log.read(at - 1, 1) == b"\n":
            lines += 1  # this newline ends the last line
        while at > start:
            size = min(LOG_BLOCK, at - start)
            block = log.read(at - size, size)
            found = len(block)
            while lines and (found := block.rfind(b"\n", 0, found)) >= 0:
                lines -= 1
                if not lines:
                    return at - size + found + 1
            if not lines:
                break
            at -= size
    return at


def log_range(path: str, job: Job, history: Sequence[Attempt], number: int | None) -> tuple[int, int | None]:
    """Return the start and the end of the output of an attempt in the log; for None those of the whole log."""
    if number is None:
        return 0, None
    if job.state is State.PROCESSING and job.attempts == number:
        return running_start(path, job, history), None
    for attempt in reversed(history):
        if attempt.number == number:
            return attempt.log_start or 0, attempt.log_end or 0
    raise NotFound(f"job {job.id} has no attempt {number}")


def running_start(path: str, job: Job, history: Sequence[Attempt]) -> int:
    """Return the offset of the output of the running attempt: after its separator, if it has one."""
    before = max((attempt.log_end or 0 for attempt in history), default=0)
    with LogReader(path) as log:
        if log.own:
            return log.own
        found = log.read(before, LOG_BLOCK).find(separator(job).encode())
    return before + found + len(separator(job)) if found >= 0 else before


def separator(job: Job) -> str:
    """Return the line that separates the output of an attempt from earlier output."""
    return f"--- attempt {job.attempts}, {iso_time(job.started_at)} ---\n"


def fold_returns(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield output as a terminal would show it: of a line that carriage returns overwrite, only its last state.

    A state that is longer than a block passes unchanged, with the rest of its line: no terminal shows it whole.
    """
    rest, is_long = b"", False
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line + b"\n" if is_long else _last_state(line) + (b"\r\n" if line.endswith(b"\r") else b"\n")
            is_long = False
        if not is_long:
            rest = rest[max(0, rest.rfind(b"\r", 0, len(rest.rstrip(b"\r")))) :]  # drop the overwritten states
        if is_long or len(rest) > LOG_BLOCK:
            yield rest
            rest, is_long = b"", True
    if rest:
        yield _last_state(rest)


def _last_state(line: bytes) -> bytes:
    return line.rstrip(b"\r").rpartition(b"\r")[2]


class Spool:
    """The file that takes the output of a worker's jobs until one of them writes something.

    Creating a file may cost half as much as starting a program, and many commands write nothing. The worker keeps the
    file open, and each command opens it again: so the system can tell whether a command still holds it.
    """

    def __init__(self, path: str, is_watched: bool = True) -> None:
        self.path = path
        self.watch = OpenWatch() if is_watched else None
        self._fd: int | None = None
        self._as_made: tuple[int, ...] = ()

    def take(self) -> int:
        """Return a descriptor of an unchanged or new file, so that nothing of one job reaches the log of the next."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with contextlib.suppress(OSError):
                if self._fingerprint() == self._as_made:
                    return fd
            os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        fd = os.open(self.path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._as_made = self._fingerprint()
        if self.watch:
            self.watch.follow(self.path)
        return fd

    def _fingerprint(self) -> tuple[int, ...]:
        """Return the identity and the state of the file at the path, where a command will open it."""
        found = os.lstat(self.path)
        return found.st_dev, found.st_ino, found.st_nlink, found.st_mode, found.st_uid, found.st_size

    def give_back(self, fd: int) -> bool:
        """Keep the file for the next job if it is empty and no other process holds it; tell whether it is kept."""
        if is_open_elsewhere(fd) or os.fstat(fd).st_size:  # in this order: a holder may write, then close
            return False
        self._fd = fd
        return True


class JobLog:
    """The log of a job, open for one attempt.

    If the job has no log yet, the attempt writes to the spool of its worker. The spool becomes the log at the first
    call of `maintain`, or at the end if it cannot serve the next job.
    """

    def __init__(self, path: str, job: Job, spool: Spool | None, limit: int) -> None:
        is_first = not os.access(path, os.F_OK)
        if not is_first:
            restore_earlier_output(path)
        self._path, self._spool = path, spool if is_first else None
        self._limit = limit  # bytes, 0 for none
        self.target = self._spool.path if self._spool else path  # the file that the command writes to
        self._is_emptied = False
        self._loss = ""
        self._cut = Cut()
        self._fd = self._spool.take() if self._spool else open_log(path)
        self.start = self._size()
        self._seal: tuple[int, bytes] | None = None  # it changes if the command empties the log
        if self.start:
            self._begin_retry(job)

    def _begin_retry(self, job: Job) -> None:
        try:
            file = open_regular(self._path)
        except OSError:
            os.close(self._fd)
            raise
        with file:
            newline = "" if block_at(file, self.start - 1, 1) == b"\n" else "\n"
            self._append(f"{newline}{separator(job)}")
            self.start = self._size()
            self._seal = _seal(file, self.start)
        keep_earlier_output(self._path, self.start)

    def _size(self) -> int:
        return os.fstat(self._fd).st_size

    def _append(self, text: str) -> None:
        with contextlib.suppress(OSError), os.fdopen(open_log(self._path), "ab") as file:
            file.write(text.encode())

    @property
    def loss_reason(self) -> str | None:
        """Return why some output is lost, or may be; None if all is kept."""
        emptied = "its command changed its own log, as who opens /dev/stderr by name: what was there may be lost"
        return "; ".join(filter(None, (self._loss, emptied if self._is_emptied else ""))) or None

    def maintain(self, is_over: bool = False) -> None:
        """Make the spool the log, detect whether the command emptied it, and enforce the limit."""
        if self.target != self._path:
            self._move_spool()
        with contextlib.suppress(OSError), open_regular(self.target) as file:
            self._detect_emptying(file)
        if self._limit and self._size() - self._output_start() > self._limit + self._cut.note:
            with contextlib.suppress(OSError):
                self._cut = shorten(self.target, self._output_start(), self._limit, self._cut, is_over)

    def _move_spool(self) -> None:
        if self._spool and self._spool.watch:
            self._is_emptied |= self._spool.watch.was_opened_again()
            self._spool.watch.stop()
        try:
            os.rename(self.target, self._path)
            self.target, self._loss = self._path, ""
        except OSError as error:
            self._loss = f"its output is lost: {error.strerror}"

    def _output_start(self) -> int:
        """Return the offset of the attempt's output in the file: 0 if the command has removed earlier output."""
        return 0 if self._is_emptied else self.start

    def _detect_emptying(self, file: BinaryIO) -> None:
        if self._seal and block_at(file, self._seal[0], len(self._seal[1])) != self._seal[1]:
            self._is_emptied, self._cut = True, Cut()
            self._seal = None
        if not self._seal and not self.start:  # a first attempt: its own first bytes, which no limit cuts
            first = block_at(file, 0, min(SEAL_BYTES, self._limit // 2 if self._limit else SEAL_BYTES))
            self._seal = (0, first) if first else None

    def close(self) -> int:
        """Enforce the limit, close the log, and return its end offset."""
        if self._spool and self.target != self._path and self._give_back_spool(self._spool):
            return 0
        self.maintain(is_over=True)
        end = self._size()
        os.close(self._fd)
        if self.start:
            self._is_emptied |= restore_earlier_output(self._path)
            end = size_of(self._path)
        if self._loss:  # processes that it left may still write there, so the next job gets a new file
            remove_file(self.target)
        return end

    def _give_back_spool(self, spool: Spool) -> bool:
        """Try to keep an empty spool for the next job; tell whether that succeeded."""
        if not spool.give_back(self._fd):
            return False
        self._is_emptied |= bool(spool.watch and spool.watch.was_opened_again())
        self._loss = ""  # there was no output to lose
        return True


class Cut(NamedTuple):
    """The part of an attempt's output that was cut."""

    left_out: int = 0  # bytes that were cut
    note: int = 0  # bytes of the note about it in the log


def shorten(path: str, start: int, limit: int, before: Cut, is_over: bool = True) -> Cut:
    """Cut a log after an offset to the limit: keep the first and the last half, with a note about the cut between them.

    While the command writes, the log may exceed the limit by half, so that bytes are moved seldom. Output that the
    command writes meanwhile is kept, except between the last check of the size and the truncation.
    """
    head, tail = limit // 2, limit - limit // 2
    with open_regular(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        beyond = size - start - before.note - limit
        if beyond <= (0 if is_over else max(tail, MIN_CUT_BYTES)):
            return before
        left_out = before.left_out + beyond
        about = "" if is_over and not before.note else "about "
        note = f"\n--- {about}{left_out} bytes are left out here (config log_max_bytes) ---\n".encode()
        to = start + head + len(note)
        move(file, size - tail, to, tail)
        file.seek(start + head)
        file.write(note)
        file.truncate(to + tail + (0 if is_over else _move_rest(file, size, to + tail)))
    return Cut(left_out, len(note))


def _move_rest(file: BinaryIO, source: int, to: int) -> int:
    """Move appended bytes, in at most CUT_TRIES passes, until no more come; return how many bytes were moved."""
    moved = 0
    for _ in range(CUT_TRIES):
        grown = file.seek(0, os.SEEK_END) - source - moved
        if not grown:
            break
        move(file, source + moved, to + moved, grown)
        moved += grown
    return moved


def move(file: BinaryIO, source: int, to: int, size: int) -> None:
    """Move bytes within a file. The two ranges may overlap."""
    steps: Iterable[int] = range(0, size, LOG_BLOCK)
    for step in steps if to <= source else reversed(list(steps)):
        block = block_at(file, source + step, min(LOG_BLOCK, size - step))
        file.seek(to + step)
        file.write(block)


def keep_earlier_output(path: str, size: int) -> None:
    """Copy the first `size` bytes of a log before a retry can empty it."""
    copy = earlier_output(path)
    remove_file(copy)
    try:
        with open_regular(path) as log, os.fdopen(os.open(copy, _NEW_FILE, 0o600), "wb") as file:
            for block in blocks_of(log, 0):
                file.write(block[: size - file.tell()])
                if file.tell() >= size:
                    break
    except OSError:  # without room for a copy nothing protects the log from its command
        remove_file(copy)


_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


def restore_earlier_output(path: str) -> bool:
    """Restore the output of earlier attempts if a retry has emptied or overwritten the log; tell whether it had."""
    copy, made = earlier_output(path), earlier_output(f"{path}.new")
    if not os.access(copy, os.F_OK):
        return False
    is_changed = False
    with contextlib.suppress(OSError, QueueError):
        with LogReader(path) as log:
            is_changed = not log.is_whole
            if is_changed:
                remove_file(made)
                with os.fdopen(os.open(made, _NEW_FILE, 0o600), "wb") as new:
                    new.writelines(read_log(path))
        if is_changed:
            os.replace(made, path)  # atomic: a reader finds the complete log before and after
        remove_file(copy)
    return is_changed


def keep_spooled(spool: str, path: str) -> None:
    """Rename the spool of a dead worker to the log of its job, unless that log exists."""
    if not os.path.exists(path):
        with contextlib.suppress(OSError):  # without a spool there is no output to keep
            os.rename(spool, path)


def end_lost_log(path: str, job: Job, history: Sequence[Attempt], limit: int) -> int:
    """Restore and limit the log of an attempt whose worker died; return the start of its output."""
    with contextlib.suppress(QueueError, OSError):
        start = running_start(path, job, history)
        restore_earlier_output(path)
        if limit and size_of(path) - start > 2 * limit:  # an enforced limit leaves less
            shorten(path, start, limit, Cut())
        return start
    return 0


def signal_name(number: int) -> str:
    """Return the name of a signal: `SIGKILL` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def describe(exit: Exit) -> str | None:
    """Return the error of a command that ended by itself, or None for exit code 0."""
    if exit.signal is not None:
        return f"ended by {signal_name(exit.signal)}"
    return f"exit code {exit.exit_code}" if exit.exit_code else None


def start_failure(error: OSError | ValueError, job: Job, path: str) -> Outcome:
    """Return the outcome of a command that did not start with that PATH; its exit code is that of a shell."""
    if problem := directory_problem(job.cwd):
        return Outcome(EndReason.NOT_STARTED, None, error=f"its directory {job.cwd} {problem}")
    is_missing = isinstance(error, FileNotFoundError)
    code = EX_NOT_FOUND if is_missing else EX_NOT_EXECUTABLE
    reason: str | None = getattr(error, "strerror", None) or str(error)
    if isinstance(job.command, str):
        return Outcome(EndReason.NOT_STARTED, code, error=f"cannot start the shell: {reason}")
    program = job.command[0]
    if getattr(error, "errno", None) == errno.E2BIG:
        reason = "its arguments and its environment are longer than this system takes"
    elif problem := program_problem(program, job.cwd, path):
        reason = problem
    elif is_missing:
        reason = why_not_found(job.command)
    return Outcome(EndReason.NOT_STARTED, code, error=f"cannot start {program}: {reason}")


def why_not_found(words: Sequence[str]) -> str:
    """Return the error for a program that was not found; it may be a word that only a shell knows."""
    one_word = f"queuectl enqueue -- {in_one_word(words)}"
    if re.match(r"[A-Za-z_]\w*=", words[0]):
        return f"only a shell sets variables so; for the shell give the line as one word: {one_word}"
    if is_shell_word(words[0]):
        return f"only a shell knows it; for the shell give the line as one word: {one_word}"
    if "/" in words[0] or os.sep in words[0]:
        return "no such file"
    if len(words) == 1:
        return "no such program in its PATH"
    return f"no such program in its PATH; if it is for the shell (aliases are not known), in one word: {one_word}"


def shell_hint(job: Job, end: EndReason, exit: Exit, env: Mapping[str, str]) -> str | None:
    """Return what the error of a shell omits: the line is the path of a program with blanks, or a script cannot run.

    Return None for any other failure.
    """
    line = job.command
    if end is not EndReason.EXITED or not exit.exit_code or not isinstance(line, str):
        return None
    path = os.path.join(job.cwd, line.strip())
    if " " not in line.strip() or not (os.path.isfile(path) and os.access(path, os.X_OK)):
        has_begun = exit.exit_code not in (EX_NOT_FOUND, EX_NOT_EXECUTABLE)
        word = next(iter(line.split()), "")
        problem = None if has_begun else program_problem(word, job.cwd, env.get("PATH", os.defpath))
        return problem and f"cannot start {word}: {problem}"
    as_list = json.dumps({"command": [line.strip()]}, ensure_ascii=False)
    return f"the shell took the path of a program apart at its blanks: quote it once more, or enqueue {as_list}"


class Supervision(NamedTuple):
    """The callbacks through which a worker supervises an attempt."""

    bell: Bell
    started: Callable[[Command], object]
    interrupted: Callable[[bool], EndReason | None]  # why it must end early; takes whether the bell has rung
    report_leftovers: Callable[[list[str]], object]  # takes those that cannot be ended; in the end none
    clock: Clock


def run_attempt(
    job: Job, log_path: str, spool: Spool | None, env: dict[str, str], run_tag: str, settings: Settings,
    supervision: Supervision,
) -> Outcome:  # fmt: skip
    """Run a job's command once, from start to outcome."""
    settings = settings_for(job, settings)
    try:
        log = JobLog(log_path, job, spool, settings.log_max_bytes)
    except OSError as error:
        return Outcome(EndReason.NOT_STARTED, error=f"cannot open its log {log_path}: {error.strerror}")
    try:
        process = Process(job.command, job.cwd, env, log.target, run_tag)
    except (OSError, ValueError) as error:
        log.close()
        return start_failure(error, job, env.get("PATH", os.defpath))
    try:
        supervision.started(process.command)
        end, exit = _watch(process, log, settings, supervision)
    finally:
        process.close()
        log_end = log.close()
    why = _error_of(end, exit, job.ok_codes, settings)
    wrong = "; ".join(filter(None, (why, why and shell_hint(job, end, exit, env), log.loss_reason)))
    return Outcome(end, exit.exit_code if end is EndReason.EXITED else None, exit.signal, wrong or None,
                   exit.max_rss, exit.cpu_s, log.start, log_end)  # fmt: skip


def _error_of(end: EndReason, exit: Exit, ok_codes: Sequence[int] | None, settings: Settings) -> str | None:
    if end is EndReason.EXITED:
        return None if exit.exit_code in (ok_codes or ()) else describe(exit)
    if end is EndReason.TIMED_OUT:
        return f"timed out after {settings.job_timeout:g} s"  # `show` and `status` tell how to raise the limit
    return "cancelled" if end is EndReason.CANCELLED else "given back: its worker was told to leave"


def _watch(process: Process, log: JobLog, settings: Settings, supervision: Supervision) -> tuple[EndReason, Exit]:
    """Wait until a command ends; end it on a time-out or on request."""
    left_s = settings.job_timeout or math.inf
    poll_s = LIMITED_POLL_S if settings.log_max_bytes else POLL_S
    deadline = supervision.clock.monotonic_s() + left_s
    while True:
        rung = supervision.bell.wait(min(poll_s, left_s), process)
        if exit := process.poll():
            return EndReason.EXITED, exit
        log.maintain()
        left_s = deadline - supervision.clock.monotonic_s()
        if why := EndReason.TIMED_OUT if left_s <= 0 else supervision.interrupted(rung):
            return why, _end_tree(process, log, settings, supervision)


def _end_tree(process: Process, log: JobLog, settings: Settings, supervision: Supervision) -> Exit:
    """End the process tree of a command. The attempt has not ended while one of its processes lives."""
    left = process.end(settings.kill_grace, log.maintain)
    while left or not process.poll():
        supervision.report_leftovers(left)
        supervision.bell.wait(END_POLL_S, process)
        supervision.interrupted(False)  # for the duties of the worker; the attempt ends in any case
        log.maintain()
        left = process.end(0)
    supervision.report_leftovers([])
    return cast(Exit, process.poll())


def hook_for(state: State | None, settings: Settings) -> str:
    """Return the hook for a job that has reached a state, or an empty string."""
    if state is State.COMPLETED:
        return settings.on_complete
    return settings.on_dead if state is State.DEAD else ""


def run_hook(line: str, home: Home, env: dict[str, str], document: str, run_tag: str, bell: Bell) -> str | None:
    """Run a hook with a job as JSON on its standard input; return its error, or None."""
    import tempfile

    process = None
    deadline = time.monotonic() + HOOK_TIMEOUT_S
    try:
        with tempfile.TemporaryFile() as stdin:
            stdin.write(document.encode())
            stdin.seek(0)
            os.close(open_log(home.worker_log))  # OSError for a FIFO, which would block the hook
            process = Process(line, home.path, env, home.worker_log, run_tag, stdin.fileno())
        while not (exit := process.poll()) and time.monotonic() < deadline:
            bell.wait(min(POLL_S, deadline - time.monotonic()), process)
        if not exit:
            process.end(1.0)
        return describe(exit) if exit else f"timed out after {HOOK_TIMEOUT_S:g} s"
    except (OSError, ValueError) as error:
        return f"cannot start: {error}"
    finally:
        if process:
            process.close()


# ======================================================================== worker


class Signs(NamedTuple):
    """The bell of a worker, which wakes it, and its sign of life."""

    bell: Bell
    life: Life


class Recovery:
    """The recovery of a dead worker: end the processes of its job, then record the attempt as lost.

    Processes are ended outside of any transaction. No other attempt can begin meanwhile, because no worker claims a
    job that is `processing`. Several peers may recover the same worker; `finish` is guarded, so only one records it.
    """

    def __init__(self, home: Home, store: Store, dead: int) -> None:
        self._home, self._store, self._dead = home, store, dead
        self._leftovers: dict[int, Leftovers] = {}  # by the seq of the job; they keep every process found so far
        self.next_s, self._pause_s = 0.0, 0.1  # time of the next try; the pause doubles, because a try takes time
        self.left = ""  # names of the processes that cannot be ended

    def attempt(self, process: str | None, settings: Settings, clock: Clock) -> list[tuple[Job, State | None]] | None:
        """End the processes of the worker's jobs, unless the next try is not due; return the jobs and their new states.

        Return None if one of the processes still lives, or may live.
        """
        if clock.monotonic_s() < self.next_s:
            return None
        jobs = self._store.jobs.running_jobs(self._dead)
        left = ", ".join(left for job in jobs for left in (self._end(job) if can_see(process) else [OUT_OF_SIGHT]))
        if left != self.left:
            self._store.workers.set_leftovers(self._dead, left or None)
            self.left = left
        if left:
            self.next_s = clock.monotonic_s() + self._pause_s
            self._pause_s = min(2 * self._pause_s, MAX_RECOVERY_PAUSE_S)
            return None
        with self._store.db.writing():
            ended = [(job, self._finish(job, settings, clock.now_ms())) for job in jobs]
            self._store.workers.unregister(self._dead)
        for path in (self._home.bell(self._dead), self._home.life(self._dead), self._home.spool(self._dead)):
            remove_file(path)
        return ended

    def _end(self, job: Job) -> list[str]:
        """End the processes of a job; return the names of those that still live."""
        if job.seq not in self._leftovers:
            log = self._home.log(job.id)
            keep_spooled(self._home.spool(self._dead), log)
            run_tag = run_tag_in(file_identity(self._home.database), job.run_tag)
            command = read_command(self._home, self._dead, run_tag)
            self._leftovers[job.seq] = Leftovers(run_tag, command, log, functools.partial(self._is_running, job))
        return self._leftovers[job.seq].end(timeout_s=0.5)

    def _is_running(self, job: Job) -> bool:
        return any(running.run_tag == job.run_tag for running in self._store.jobs.running_jobs(self._dead))

    def _finish(self, job: Job, settings: Settings, now: int) -> State | None:
        log = self._home.log(job.id)
        start = end_lost_log(log, job, self._store.queries.history(job), settings.log_max_bytes)
        error = f"worker {self._dead} died while it ran"
        lost = Outcome(EndReason.LOST, error=error, log_start=start, log_end=size_of(log))
        return self._store.jobs.finish(job, lost, settings, now)


def wake_one(home: Home, store: Store) -> None:
    """Wake the first idle worker that has a job to claim; it wakes the next one."""
    queues = store.queues.ready()
    for row in store.workers.all() if queues else ():
        if row.job is None and any(map(row.takes, queues)) and ring(home, row.id):
            return


class Conditions:
    """What a worker depends on and must check itself: its home, the schema, its signs of life, the clock."""

    def __init__(
        self, home: Home, store: Store, signs: Signs, log_problem: Callable[[str], None], clock: Clock
    ) -> None:  # fmt: skip
        self._home, self._store, self._signs, self._log_problem, self._clock = home, store, signs, log_problem, clock
        self._database = file_identity(home.database)
        self._clock_offset_ms = math.inf  # infinite, so that the first check restarts backoffs that a wrong clock began
        self.is_homeless = False  # the home was removed or replaced
        self.is_outdated = False  # a newer queuectl has changed the schema
        self.memory_kills = 0  # processes that the system had killed for want of memory at the last check

    @property
    def forbid_work(self) -> bool:
        """Tell whether this worker may no longer claim: its home is gone, or its schema is outdated."""
        return self.is_homeless or self.is_outdated

    def check_home(self) -> None:
        """Detect that the home was removed or replaced."""
        self.is_homeless = not self._home.is_there(self._database)

    def check_schema(self) -> None:
        """Detect that a newer queuectl has migrated the database, whose schema this version does not know."""
        if not self.is_outdated and self._store.db.is_newer():
            self.is_outdated = True
            self._log_problem("the queue was brought up by a newer queuectl: leaves; start a new worker")

    def restore_signs(self) -> None:
        """Recreate the bell and the sign of life if they were removed."""
        try:
            self._signs.bell.look_after()
            self._signs.life.look_after()
        except OSError as error:
            self._log_problem(f"cannot make its signs of life anew: {error.strerror}")

    def was_clock_set_back(self) -> bool:
        """Tell whether the wall clock was set back since the last call. The first call always tells so."""
        before, self._clock_offset_ms = (
            self._clock_offset_ms,
            self._clock.now_ms() - self._clock.monotonic_s() * 1000,  # offset of the wall clock from the monotonic one
        )
        return self._clock_offset_ms < before - 1000

    def note_memory_kills(self) -> None:
        """Store the system's count of memory kills, so that a kill during a job can be detected."""
        self.memory_kills = memory_kills()


class Ring:
    """The other workers, as one worker sees them. Workers form a ring by id, and each watches the next lower one.

    So a peer notices each death at once, at a cost that does not depend on the number of workers.
    """

    def __init__(
        self, home: Home, store: Store, worker: int, bell: Bell, log: Callable[[str], None], clock: Clock
    ) -> None:  # fmt: skip
        self._home, self._store, self._worker, self._bell, self._log = home, store, worker, bell, log
        self._clock = clock
        self._others: list[tuple[int, str | None]] = []  # ids and processes, from the next lower id downwards
        self._commits_seen = -1  # `commits_seen` when they were read
        self._recoveries: dict[int, Recovery] = {}  # of dead workers, by their ids
        self.idle_poll_s = DUTY_S  # fallback poll interval of an idle worker
        self.next_try_s = math.inf  # time of the next try of a recovery, by the monotonic clock

    def watch(self, settings: Settings) -> list[tuple[Job, State | None]]:
        """Watch the process of the next living worker, and recover the dead ones; return the recovered jobs and states.

        Check two more living workers and the dead ones between them: the worker that watches there may be stopped.
        """
        version = self._store.db.commits_seen()
        if version != self._commits_seen:
            self._others, self._commits_seen = self._store.workers.ring_below(self._worker), version
        self._recoveries = {id: self._recoveries[id] for id, _ in self._others if id in self._recoveries}
        ended: list[tuple[Job, State | None]] = []
        living, is_watching = 0, False
        for id, process in self._others:
            if living == 3:
                break
            if is_alive(self._home, id, process):
                living += 1
                is_watching = is_watching or self._bell.watch(process)
            else:
                ended += self._recover(id, process, settings)
        if not is_watching:
            self._bell.watch(None)
        self._plan_next_poll()
        return ended

    def _plan_next_poll(self) -> None:
        """Set the fallback poll interval. Each recovery has its own next try."""
        self.next_try_s = min((recovery.next_s for recovery in self._recoveries.values()), default=math.inf)
        until_try_s = max(0.0, self.next_try_s - self._clock.monotonic_s())
        self.idle_poll_s = min(MAX_IDLE_POLL_S, DUTY_S * (1 + len(self._others)), until_try_s)

    def _recover(self, dead: int, process: str | None, settings: Settings) -> list[tuple[Job, State | None]]:
        recovery = self._recoveries.setdefault(dead, Recovery(self._home, self._store, dead))
        before = recovery.left
        ended = recovery.attempt(process, settings, self._clock)
        self.log_leftovers(dead, before, recovery.left)
        if ended is None:
            return []
        for job, state in ended:
            self._log(f"recovered job {job.id} of dead worker {dead}: {state.value if state else 'ended'}")
        del self._recoveries[dead]
        self._commits_seen = -1  # `commits_seen` does not count the commits of this connection
        return ended

    def log_leftovers(self, worker: int, before: str, after: str) -> None:
        """Log the processes of a worker's job that cannot be ended, if they have changed."""
        if after and after != before:
            self._log(f"the job of worker {worker} cannot end: {leftovers_text(after)}")


class Hooks:
    """The hooks that a worker runs for ended jobs, after it has recorded their results."""

    def __init__(
        self, home: Home, store: Store, worker: int, env: Mapping[str, str], bell: Bell, log: Callable[[str], None]
    ) -> None:  # fmt: skip
        self._home, self._store, self._worker, self._env, self._bell, self._log = home, store, worker, env, bell, log
        self.waiting: list[tuple[str, str]] = []  # ids of jobs, each with its hook

    def run(self) -> None:
        """Run the waiting hooks."""
        while self.waiting:
            self._run_one(*self.waiting.pop(0))

    def _run_one(self, id: str, line: str) -> None:
        """Run a hook. Its failure is logged, and has no other effect."""
        with contextlib.suppress(QueueError):  # the job may have been pruned meanwhile
            job = self._store.queries.get(id)
            variables = {
                "PWD": self._home.path,
                "QUEUECTL_JOB_ID": job.id, "QUEUECTL_STATE": job.state.value, "QUEUECTL_QUEUE": job.queue,
                "QUEUECTL_ATTEMPT": str(job.attempts), "QUEUECTL_ERROR": printable(job.error or ""),
                "QUEUECTL_EXIT_CODE": "" if job.exit_code is None else str(job.exit_code),
            }  # fmt: skip
            run_tag = run_tag_in(file_identity(self._home.database), f"hook.{self._worker}.{time.time_ns()}")
            document = json.dumps(job_json(job))
            failure = run_hook(line, self._home, {**self._env, **variables}, document, run_tag, self._bell)
            if failure:
                self._log(f"hook of job {job.id}: {failure}")


def remove_stale_log(home: Home, store: Store, job: Job) -> None:
    """Remove the log of an earlier job with this id that was removed, if its log was not removed yet."""
    log = home.log(job.id)
    with contextlib.suppress(StoreError):
        if is_regular(log) and not store.queries.history(job):
            remove_log(log)


class Duty:
    """A periodic duty of a worker, done while it is idle and while its job runs."""

    def __init__(self, every_s: float, do: Callable[[], None]) -> None:
        self.every_s, self.do = every_s, do
        self.due_s = 0.0  # by the monotonic clock; 0 is due at once


class Worker:
    """One worker: it claims a job, runs it, records its result, and starts again.

    Workers are equal peers. Each recovers the jobs of dead peers.
    """

    def __init__(self, home: Home, store: Store, row: WorkerRow, signs: Signs, log: Callable[[str], None],
                 clock: Clock) -> None:  # fmt: skip
        self._home, self._store, self._row, self._log, self._clock = home, store, row, log, clock
        self._bell, self._life = signs
        self._settings = Settings()
        self._signals = 0  # number of stop signals received
        self._env = {
            **inherited_environment(),
            "QUEUECTL_HOME": home.path,
            "QUEUECTL_SLOT": str(row.slot),
        }
        self._hooks = Hooks(home, store, row.id, self._env, self._bell, log)
        self._spool = Spool(home.spool(row.id), row.slot <= WATCHED_SLOTS) if CAN_TELL_WHO_OPENS else None
        self._write_gate = WriteGate(home)
        self._database = file_identity(home.database)
        self._conditions = Conditions(home, store, signs, self._log_problem, clock)
        self._ring = Ring(home, store, row.id, self._bell, log, clock)
        self._commits_seen = -1  # `commits_seen` before the last claim without a report
        self._claimed_at = 0  # moment of that claim
        self._next_poll_s = self._next_duty_s = 0.0  # by the monotonic clock
        self._leftovers = ""  # processes of the current job that cannot be ended
        self._last_problem = ""
        self._ring_duty = Duty(DUTY_S, self._watch_ring)
        self._failing_duty = Duty(DUTY_S, self._fail_dependents)
        self._duties = [
            Duty(DUTY_S, self._conditions.check_home),
            Duty(DUTY_S, self._conditions.check_schema),
            Duty(DUTY_S, self._conditions.restore_signs),
            Duty(DUTY_S, self._check_clock),
            Duty(DUTY_S, self._conditions.note_memory_kills),
            self._failing_duty,
            self._ring_duty,
        ]

    def leave(self) -> None:
        """Count a stop signal: the first lets the worker finish its job, the second lets it give the job back."""
        self._signals += 1

    def run(self) -> None:
        """Claim and run jobs until the worker is told to leave, or is drained."""
        report: tuple[Job, Outcome] | None = None
        while True:
            self._do_due_duties()
            self._hooks.run()
            was_idle = report is None
            job = self._keep_trying(functools.partial(self._exchange, report), matters=not was_idle)
            report = None
            if job:
                if job.on_lost == "dead":  # it must not run again, not even after a power cut
                    self._keep_trying(self._store.db.sync, matters=True)
                if was_idle or job.after:  # more than one job may have become ready
                    self._wake_next()
                report = job, self._attempt(job)
            elif self._hooks.waiting:
                continue
            elif self._is_leaving() or (was_idle and self._is_drained()):
                break
            elif was_idle:  # only a claim without a report notes `commits_seen`, so a busy worker claims once more
                self._wait()
        self._write_gate.close()
        if self._spool:
            remove_file(self._spool.path)
        self._keep_trying(functools.partial(self._store.workers.unregister, self._row.id), matters=True)

    # ---- claim and record

    def _exchange(self, report: tuple[Job, Outcome] | None) -> Job | None:
        """Record the result of one job and claim the next, in one transaction."""
        now, store = self._clock.now_ms(), self._store
        ended: State | None = None
        if not report:
            self._commits_seen = store.db.commits_seen()
            self._claimed_at = now
        with self._write_gate, store.db.writing():
            if report:
                ended = store.jobs.finish(*report, self._settings, now, chance=self._clock.chance())
            hook = hook_for(ended, self._settings)
            self._settings = store.config.settings()
            skips_claim = self._signals or self._conditions.forbid_work or hook
            job = None if skips_claim else store.jobs.claim(self._row.id, self._row.queues, now)
        if report and hook:
            self._hooks.waiting.append((report[0].id, hook))
        if report and not ended:
            self._log(f"the result of job {report[0].id} came too late: refused")
        if self._clock.chance() < CHECKPOINT_CHANCE:
            self._checkpoint()
        return job

    def _checkpoint(self) -> None:
        with contextlib.suppress(StoreError):  # a later step tries again
            self._store.db.checkpoint()

    def _keep_trying(self, action: Callable[[], _Result], matters: bool) -> _Result:
        """Retry an action of the store until it succeeds, since a store error must not count against the job.

        A worker that is told to leave gives up: at once, or if a result would be lost (`matters`) when told twice.
        """
        while True:
            try:
                result = action()
            except StoreError as error:
                self._log_problem(str(error))
                self._do_due_duties()
                if self._signals >= (2 if matters else 1) or self._conditions.is_homeless:
                    raise
                self._bell.wait(1.0)
            else:
                self._last_problem = ""
                return result

    def _log_problem(self, text: str) -> None:
        if text != self._last_problem:
            self._log(text)
        self._last_problem = text

    def _attempt(self, job: Job) -> Outcome:
        """Run a job once."""
        variables = {
            "PWD": job.cwd, "QUEUECTL_JOB_ID": job.id, "QUEUECTL_ATTEMPT": str(job.attempts),
            "QUEUECTL_QUEUE": job.queue,
        }  # fmt: skip
        if job.attempts == 1:
            remove_stale_log(self._home, self._store, job)
        self._next_poll_s = self._clock.monotonic_s() + POLL_S
        run_tag = run_tag_in(self._database, job.run_tag)
        supervision = Supervision(
            self._bell, functools.partial(self._life.note, run_tag), functools.partial(self._interrupted, job),
            self._report_leftovers, self._clock,
        )  # fmt: skip
        outcome = run_attempt(
            job, self._home.log(job.id), self._spool, {**self._env, **variables, **(job.env or {})}, run_tag,
            self._settings, supervision,
        )  # fmt: skip
        if outcome.end is EndReason.EXITED and outcome.signal == 9 and memory_kills() > self._conditions.memory_kills:
            return outcome._replace(error=f"{outcome.error}; probably out of memory")
        return outcome

    def _report_leftovers(self, left: Sequence[str]) -> None:
        """Store and log the processes of the current job that cannot be ended."""
        before, after = self._leftovers, ", ".join(left)
        if after != before:
            with contextlib.suppress(StoreError):  # the next call, within END_POLL_S, tries again
                self._store.workers.set_leftovers(self._row.id, after or None)
                self._leftovers = after
                self._ring.log_leftovers(self._row.id, before, after)

    # ---- waiting

    def _is_leaving(self) -> bool:
        request = self._stop_request(None)
        if not request.registered:
            self._log(
                "its home is gone, leaves" if self._conditions.is_homeless else "its row was removed by a peer, leaves"
            )
        return bool(self._signals or request.stop or not request.registered or self._conditions.is_outdated)

    def _is_drained(self) -> bool:
        with contextlib.suppress(StoreError):
            return self._row.drain and not self._store.queues.could_run(self._row.queues)
        return False

    def _stop_request(self, job: Job | None) -> StopRequest:
        if self._conditions.is_homeless:
            return StopRequest(registered=False)
        try:
            return self._store.workers.stop_request(self._row.id, job)
        except StoreError as error:
            self._log_problem(str(error))
            return StopRequest(registered=True)

    def _interrupted(self, job: Job, rung: bool) -> EndReason | None:
        """Return why the running job must end early, or None."""
        if self._signals > 1:
            return EndReason.GIVEN_BACK
        if self._signals:
            self._log_problem(f"told to leave: finishes job {job.id} first; told again, gives it back")
        if not rung and self._clock.monotonic_s() < self._next_poll_s:
            return None
        self._next_poll_s = self._clock.monotonic_s() + POLL_S
        self._do_due_duties()
        request = self._stop_request(job)
        if request.cancelling:
            return EndReason.CANCELLED
        return EndReason.GIVEN_BACK if request.stop == "now" or not request.registered else None

    def _wait(self) -> None:
        """Sleep until a job may be claimable or a stop request may have come."""
        try:
            due = self._store.jobs.next_due(self._claimed_at)
            while not (self._signals or self._conditions.forbid_work):
                left_s = math.inf if due is None else (due - self._clock.now_ms()) / 1000
                left_s = min(left_s, self._ring.idle_poll_s)
                if left_s <= 0 or self._bell.wait(left_s) or self._store.db.commits_seen() != self._commits_seen:
                    return
                self._do_due_duties()
        except StoreError as error:
            self._log_problem(str(error))
            self._bell.wait(1.0)

    def _wake_next(self) -> None:
        """Wake one more idle worker if jobs remain."""
        with contextlib.suppress(StoreError):
            wake_one(self._home, self._store)

    # ---- duties

    def _do_due_duties(self) -> None:
        """Do each duty that is due. After a store error a duty is tried again when it is next due."""
        now_s = self._clock.monotonic_s()
        if self._bell.has_news:
            self._bell.has_news = False
            self._ring_duty.due_s = self._next_duty_s = now_s
        if now_s < self._next_duty_s:
            return
        for duty in self._duties:
            if now_s >= duty.due_s and not self._conditions.is_homeless:  # without `bells` all peers would seem dead
                duty.due_s = now_s + duty.every_s
                try:
                    duty.do()
                except StoreError as error:
                    self._log_problem(str(error))
        self._next_duty_s = min(duty.due_s for duty in self._duties)

    def _check_clock(self) -> None:
        if self._conditions.was_clock_set_back():
            self._store.jobs.restart_backoffs(self._clock.now_ms())
            self._commits_seen = -1  # what this worker commits itself is no news to its connection

    def _fail_dependents(self) -> None:
        """Fail more of what waits for jobs that ended dead or cancelled, where that is too much for one step."""
        if self._store.jobs.fail_some_dependents():
            self._failing_duty.due_s = self._clock.monotonic_s() + PAGE_PAUSE_S

    def _watch_ring(self) -> None:
        ended = self._ring.watch(self._settings)
        self._ring_duty.due_s = min(self._ring_duty.due_s, self._ring.next_try_s)
        for job, state in ended:
            if hook := hook_for(state, self._settings):
                self._hooks.waiting.append((job.id, hook))
        if ended:
            self._commits_seen = -1  # what this worker commits itself is no news to its connection
            self._wake_next()  # this worker may be running a job


# ======================================================================== control


EchoErr = Callable[[str], object]  # prints a line on standard error


def serve(home: Home, queues: Sequence[str], drain: bool, echo: bool = False) -> None:
    """Be a worker until told to leave; says one line when it is up."""
    # The bell is the last to go: who waits for a worker to leave may then remove its home.
    with contextlib.ExitStack() as last, open_store(home.database, durable=False) as store:
        row, signs = store.workers.register(
            own_pid(), host_name(), list(queues) or None, drain, now_ms(),
            open_signs=functools.partial(open_signs, home, last), is_alive=functools.partial(has_living_process, home),
            process=own_process(),
        )  # fmt: skip
        others = reversed(store.workers.ring_below(row.id))
        any(ring(home, worker) for worker, _ in others)  # the first that hears it watches this one from now on
        remove_file(home.spool(row.id))  # that of a worker of this id in an earlier queue: something may write to it
        store.db.busy_timeout_s = WORKER_BUSY_TIMEOUT_S  # from here on there is more to do than to wait
        log = open_worker_log(home, row, echo)
        worker = Worker(home, store, row, signs, log, Clock())
        become_worker(worker.leave)
        print(f"worker {row.id} is up (pid {row.pid}, slot {row.slot})", flush=True)  # first: somebody waits for it
        log(f"started, pid {row.pid}, slot {row.slot}")
        try:
            worker.run()
            log("left")
        except BaseException as error:
            log(f"ended: {error!r}")
            raise


def open_signs(home: Home, last: contextlib.ExitStack, worker_id: int) -> Signs:
    """The signs of life of a worker, closed at the end of what it does."""
    bell = last.enter_context(contextlib.closing(Bell(home, worker_id)))
    return Signs(bell, last.enter_context(contextlib.closing(Life(home, worker_id))))


def has_living_process(home: Home, row: WorkerRow) -> bool:
    """Does the worker of a row live?"""
    return is_alive(home, row.id, row.process)


def serve_or_echo(home: Home, queues: Sequence[str], drain: bool) -> None:
    """The same for a worker that nobody can see: what goes wrong is said on standard output."""
    try:
        serve(home, queues, drain)
    except (QueueError, OSError) as error:
        print(f"Error: {error}", flush=True)


def open_worker_log(home: Home, row: WorkerRow, echo: bool) -> Callable[[str], None]:
    """How a worker says something: a line in worker.log, and on stderr where `echo`."""
    import logging

    make_private_file(home.worker_log)
    handlers: list[logging.Handler] = [logging.FileHandler(home.worker_log, encoding="utf-8")]
    if echo:
        handlers.append(logging.StreamHandler())
    logging.raiseExceptions = False  # a full disk or a closed terminal is no reason to stop
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=logging.INFO, handlers=handlers, datefmt="%Y-%m-%dT%H:%M:%SZ",
        format=f"%(asctime)s worker {row.id}: %(message)s", force=True,
    )  # fmt: skip
    write = logging.getLogger("queuectl").info
    return lambda text: write(printable(text))


def start_workers(home: Home, count: int, queues: Sequence[str], drain: bool) -> tuple[list[int], QueueError | None]:
    """Start detached workers; the ids of those that are up, and what is wrong where some are not."""
    arguments = ["worker", "start", "--foreground"] + [w for q in queues for w in ("--queue", q)]
    arguments += ["--drain"] * drain
    voices: list[TextIO] = []
    refusal = ""
    try:
        for _ in range(count):
            voices.append(start_detached(home, arguments, lambda: serve_or_echo(home, queues, drain)))
    except OSError as error:  # the others would fail likewise
        refusal = f"the system refuses a process: {error.strerror}"
    lines = [voice.readline().strip() for voice in voices]
    started = sorted(int(line.split()[1]) for line in lines if line.startswith("worker "))
    reasons = {line.removeprefix("Error: ") or "see worker.log" for line in lines if not line.startswith("worker ")}
    left = count - len(started)
    why = "; ".join(sorted(reasons) + [refusal] * bool(refusal))
    return started, QueueError(f"{left} of {number_of(count, 'worker')} did not start: {why}") if left else None


def living_workers(home: Home, store: Store) -> list[WorkerRow]:
    """The workers that run now."""
    return [row for row in store.workers.all() if has_living_process(home, row)]


class WaitReporter:
    """Tells who waits for workers, from a second on, which jobs and processes they wait for: each time that changes."""

    def __init__(self, store: Store, home: Home, echo_err: EchoErr) -> None:
        self._store, self._home, self._echo_err = store, home, echo_err
        self._next_poll_s = time.monotonic() + WAIT_REPORT_S
        self._told: dict[int, str] = {}  # by worker

    def __call__(self, workers: set[int]) -> None:
        """Tell what is new of these workers."""
        if time.monotonic() < self._next_poll_s:
            return
        self._next_poll_s = time.monotonic() + WAIT_REPORT_S
        for row in self._store.workers.all():
            if row.job and row.id in workers:
                [line] = stuck_lines([row]) or [f"waiting for job {row.job}{self._process(row.job)}"]
                if line != self._told.get(row.id):
                    self._echo_err(line)
                self._told[row.id] = line

    def _process(self, id: str) -> str:
        pid = pid_of(self._home, self._store.queries.get(id))
        return f", process {pid}" if pid else ""


def prune_jobs(
    home: Home, store: Store, states: Sequence[State], before: int, dry_run: bool, echo_err: EchoErr
) -> tuple[int, QueueError | None]:
    """Remove jobs that ended before a moment, and their logs; how many, and what stopped that before its end."""
    removed = 0

    def remove() -> Iterator[str]:
        for ids in store.changes.prune(states, before, dry_run=dry_run):
            yield from ids
            remove_logs(home, store, () if dry_run else ids)

    try:
        for _ in until_broken_off(remove(), "removed", echo_err):
            removed += 1
    except QueueError as error:
        return removed, error
    return removed, None


def until_broken_off(done: Iterable[_Result], what: str, echo_err: EchoErr) -> Iterator[_Result]:
    """Hand on what is done in several transactions; where that is broken off, say how much has been done."""
    many = 0
    try:
        for one in done:
            many += 1
            yield one
    except KeyboardInterrupt:
        echo_err(f"{number_of(many, 'job')} {what} before it was interrupted")
        raise
    except StoreError as error:
        raise QueueError(f"broken off after {number_of(many, 'job')} {what}: {error.reason}") from error
    except QueueError as error:
        raise QueueError(f"broken off after {number_of(many, 'job')} {what}: {error}") from error


def batches(items: Iterable[_Result], size: int = LIST_ROWS) -> Iterator[list[_Result]]:
    """Hand on items so many at a time, also those that came before an error."""
    batch: list[_Result] = []
    try:
        for item in items:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    except QueueError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def purge_jobs(home: Home, store: Store, which: Selection, echo_err: EchoErr) -> Iterator[str]:
    """Remove dead jobs and their logs; their ids as they are removed."""
    return purge_logs(home, store, store.changes.purge_dead(which), echo_err)


def purge_logs(home: Home, store: Store, removed: Iterable[str], echo_err: EchoErr) -> Iterator[str]:
    """Remove the logs of jobs that are being removed, and hand their ids on."""
    for ids in batches(removed):
        with noting(echo_err, "done, but logs are left; remove them: queuectl doctor --repair"):
            remove_logs(home, store, ids)
        yield from ids


@contextlib.contextmanager
def noting(echo_err: EchoErr, what: str, about: Sequence[Job] = ()) -> Iterator[None]:
    """What follows a commit cannot undo it: where it fails, that is noted on stderr and fails nothing."""
    try:
        yield
    except (QueueError, OSError) as error:
        jobs = ", ".join(job.id for job in about)
        echo_err(f"note: {what}{f' ({jobs})' if jobs else ''}: {error}")


def wake_worker(home: Home, store: Store, echo_err: EchoErr) -> None:
    """Wake a worker after a command has committed; without that, workers find the change at their next poll."""
    with noting(echo_err, "done, but no worker could be told of it; workers look for themselves"):
        wake_one(home, store)


class Cancelled(NamedTuple):
    """What a `cancel` comes to."""

    ids: Iterable[str]  # as they are cancelled
    passed_over: Sequence[Job] = ()  # of those named, what had ended before


def cancel_jobs(home: Home, store: Store, which: Selection, echo_err: EchoErr) -> Cancelled:
    """Cancel jobs, and wait until the processes of those under way are ended.

    A running job that came to another end is named on stderr, and so is one whose end cannot be waited for.
    """
    chosen = store.changes.cancel(which, now_ms())
    if which.is_filter:
        return Cancelled(cancelled_ids(home, store, chosen, echo_err))
    named = list(chosen)
    gone = set(cancelled_ids(home, store, named, echo_err))
    return Cancelled([job.id for job in named if job.id in gone], [job for job in named if job.state in ENDED])


def cancelled_ids(home: Home, store: Store, chosen: Iterable[Job], echo_err: EchoErr) -> Iterator[str]:
    """The ids of jobs that are cancelled: first of those that waited, then of those that ran."""
    running = []
    for job in chosen:
        if job.state in WAITING:
            yield job.id
        if job.state is State.PROCESSING:
            running.append(job)
    ends: dict[int, State] | None = None
    with noting(echo_err, "their end is not known yet, look at them with `queuectl list`", running):
        ends = wait_for_cancelled(home, store, running, echo_err)
    for job in running if ends is not None else ():
        state = ends.get(job.seq) if ends else None
        if state is State.CANCELLED:
            yield job.id
        else:
            now = state.value if state else "removed"
            echo_err(f"job {job.id} is not cancelled but {now}: it had come to its end")


def wait_for_cancelled(home: Home, store: Store, running: Sequence[Job], echo_err: EchoErr) -> dict[int, State]:
    """Wait until the attempts of these jobs have been ended; the states of those that are there then, by seq."""
    holders = {job.worker: Recovery(home, store, job.worker or 0) for job in running}
    for worker in holders:
        ring(home, worker or 0)
    report = WaitReporter(store, home, echo_err)
    seqs = [job.seq for job in running]
    while State.PROCESSING in store.queries.states(seqs).values():
        rows = [row for row in store.workers.all() if row.id in holders]
        if not rows:
            break  # a job whose worker has no row: `doctor` tells of it
        for row in rows:
            if not has_living_process(home, row):
                holders[row.id].attempt(row.process, store.config.settings(), Clock())
        report({row.id for row in rows})
        time.sleep(WAIT_POLL_S)
    return store.queries.states(seqs)


class Preparation:
    """Makes the specs that a command line gives fit for the database, and remembers what will not work."""

    def __init__(self, now: int) -> None:
        self._now = now
        self._past = 0  # how many specs name a moment that has passed
        self._checked: dict[str, str | None] = {}  # directories, and what is wrong with each

    def __call__(self, spec: Spec) -> Spec:
        """A spec whose directory is seen from here; BadInput where the system could not run its command."""
        self._past += spec.get("run_at") is not None and spec["run_at"] < self._now
        refuse_too_long(spec.get("command") or [], spec.get("env") or {})
        if "cwd" not in spec:
            return spec
        cwd = check_field("cwd", here(spec["cwd"]))
        if cwd not in self._checked and len(self._checked) < LIST_ROWS:  # a batch may name any number
            self._checked[cwd] = directory_problem(cwd)
        return {**spec, "cwd": cwd}

    def tell(self, echo_err: EchoErr) -> None:
        """Say what will not work of what is now stored, and what does not wait for its time."""
        if self._past:
            many = f" for {number_of(self._past, 'job')}" if self._past > 1 else ""
            echo_err(f"note: run_at has passed{many}: it is not waited for")
        for cwd, problem in self._checked.items():
            if problem:
                echo_err(f"note: directory {cwd} {problem}: a job that starts there fails")


def count_jobs(store: Store, echo_err: EchoErr) -> int | None:
    """How many jobs there are; None, and a note, where that cannot be read after something was done."""
    with noting(echo_err, "done, but the jobs could not be counted"):
        return sum(store.queries.counts().values())
    return None


def hint_at_workers(home: Home, store: Store, echo_err: EchoErr) -> None:
    """Say that nobody works, where that is so."""
    with noting(echo_err, "stored, but it cannot be seen whether a worker is running"):
        if not living_workers(home, store):
            echo_err("no worker is running; start one: queuectl worker start")


def wait_for_jobs(
    store: Store, among: Snapshot | None, timeout_s: float, progress: Callable[[int], object],
    look: Callable[[], object],
) -> dict[State, int] | None:  # fmt: skip
    """Wait until these jobs, or with None all of the queue, have ended; how they did. None at the time-out.

    `progress` hears how many have, `look` is called all the while. Where counting them takes long, it is done the
    more rarely.
    """
    deadline = time.monotonic() + timeout_s
    seen, before, next_count_s = None, None, 0.0
    removed = 0  # of the dead and cancelled: that they are gone does not make them good
    while True:
        version = store.db.commits_seen()
        if version != seen and (began_s := time.monotonic()) >= next_count_s:
            counts, seen = store.queries.counts(among), version
            next_count_s = time.monotonic() + WAIT_SHARE * (time.monotonic() - began_s)
            removed += removed_failures(before or counts, counts)
            before = counts
            progress(sum(counts[state] for state in ENDED))
            if not any(counts[state] for state in OPEN):
                return counts | {State.DEAD: counts[State.DEAD] + removed}
        if time.monotonic() >= deadline:
            return None
        look()
        time.sleep(WAIT_POLL_S)


def removed_failures(before: Mapping[State, int], counts: Mapping[State, int]) -> int:
    """How many dead or cancelled jobs went between two looks without coming back to life."""
    fewer = {state: before[state] - counts[state] for state in State}
    return max(0, min(sum(fewer.values()), sum(fewer[state] for state in HOPELESS)))


class LogFollower:
    """Hands on a log as it grows, also where its command empties it or the limit shortens it."""

    def __init__(self, path: str, start: int, at: int, write: Callable[[bytes], object]) -> None:
        self._path, self._start, self._at, self._write = path, start, at, write
        self._begin, self._first = -1, b""  # of the attempt that runs: its output may begin anew

    def hand_on(self, end: int | None = None) -> None:
        """What has come since the last time, up to a place."""
        with LogReader(self._path) as log:
            size = log.size()
            begin = max(self._start, log.own)
            first = log.read(begin, SEAL_BYTES) if size > begin else b""
            if begin == self._begin and not first.startswith(self._first):
                self._at = begin
            elif self._at > size:  # it was shortened
                self._at = size
            self._begin, self._first = begin, first
        for block in read_log(self._path, self._at, end):
            self._at += len(block)
            self._write(block)


def follow_log(
    store: Store, path: str, job: Job, write: Callable[[bytes], object], look: Callable[[], object],
    attempt: int | None = None, at: int = 0,
) -> Job:  # fmt: skip
    """Hand on a job's output as it comes, until the job or one attempt of it has ended; the job then."""
    history = store.queries.history(job)
    start, _ = log_range(path, job, history, attempt)
    follower = LogFollower(path, start, max(start, at), write)
    began = job.started_at
    while True:
        job = store.queries.get(job.id)  # first, so that what was written before its end is read after
        ended = [a for a in store.queries.history(job) if a.started_at == began] if attempt else []
        follower.hand_on(ended[0].log_end if ended else None)
        if ended or job.state in ENDED:
            return job
        look()
        time.sleep(FOLLOW_POLL_S)


def stop_workers(
    home: Home, store: Store, how: str, timeout_s: float, echo_err: EchoErr, ids: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """Tell workers, none named: all, to leave and wait; the ids of those told, and of those still there."""
    left = workers_named(home, store, ids)
    told = [row.id for row in left]
    store.workers.request_stop(told, how)
    for worker in told:
        ring(home, worker)
    report = WaitReporter(store, home, echo_err)
    deadline = time.monotonic() + timeout_s
    while left and time.monotonic() < deadline:
        time.sleep(WAIT_POLL_S)
        left = [row for row in left if has_living_process(home, row)]
        report({row.id for row in left})
    return told, [row.id for row in left]


def workers_named(home: Home, store: Store, ids: Sequence[int]) -> list[WorkerRow]:
    """The running workers of these ids, none named: all of them; NotFound for an id that none has."""
    rows = living_workers(home, store)
    for id in ids:
        if all(row.id != id for row in rows):
            raise NotFound(f"no worker {id} is running; see: queuectl worker list")
    return [row for row in rows if not ids or row.id in ids]


class Scaled(NamedTuple):
    """What a `worker scale` came to."""

    started: list[int]
    leaving: list[WorkerRow]
    failure: QueueError | None = None  # why some did not start


def scale_workers(home: Home, count: int, queues: Sequence[str]) -> Scaled:
    """Bring the workers for just these queues to a number; those that leave are not waited for.

    Two calls at once may start too many. Each dismisses the surplus again once its own workers are up, so the last
    of them leaves the right number.
    """
    staying, leaving = dismiss_surplus(home, count, queues)
    if staying >= count:
        return Scaled([], leaving)
    started, failure = start_workers(home, count - staying, queues, drain=False)
    return Scaled(started, leaving + dismiss_surplus(home, count, queues)[1], failure)


def dismiss_surplus(home: Home, count: int, queues: Sequence[str]) -> tuple[int, list[WorkerRow]]:
    """Let workers for just these queues leave that are too many: idle ones first, of them the newest first.

    How many stay, and those that leave. The store is closed again: no worker may be started while it is open.
    """
    with open_store(home.database) as store:
        with store.db.writing():
            kind = [row for row in living_workers(home, store) if not row.stop and row.is_for(queues)]
            surplus = sorted(kind, key=lambda row: (row.job is not None, -row.id))[: max(0, len(kind) - count)]
            store.workers.request_stop([row.id for row in surplus], "finish")
        for row in surplus:
            ring(home, row.id)
    return len(kind) - len(surplus), surplus


def overview(home: Home, store: Store) -> Overview:
    """The state of the queue now."""
    rows = store.workers.all()
    alive = [row for row in rows if has_living_process(home, row)]
    lost = sum(row.job is not None for row in rows if row not in alive)
    default = store.config.settings().job_timeout
    by_default, own = store.statistics.recent_timeouts(default)
    counts = store.queries.counts()
    can_retry = counts[State.DEAD] > 0 and store.reasons.can_retry()
    return Overview(counts, alive, store.queues.all(), lost, by_default, stuck_lines(rows), default, own, can_retry)


def reason_of(home: Home, store: Store, job: Job) -> Reason:
    """Why a job is not running now, or why what runs cannot be ended."""
    for row in store.workers.all():
        if row.leftovers and row.job == job.id:
            return leftovers_reason(row.leftovers)
    living, queues = living_workers(home, store), store.queues.all()
    [reasons] = store.reasons.wait_reasons([job], living, queues, store.config.settings())
    return why_not_running(job, reasons, now_ms())


def pid_of(home: Home, job: Job) -> int | None:
    """The process id of a job's command, while it runs."""
    if job.state is not State.PROCESSING or job.worker is None:
        return None
    command = read_command(home, job.worker, run_tag_in(file_identity(home.database), job.run_tag))
    return command.pid if command else None


def stuck_lines(rows: Iterable[WorkerRow]) -> list[str]:
    """The jobs that cannot be ended, why, and what helps."""
    return [f"job {row.job} cannot end: {leftovers_text(row.leftovers)}" for row in rows if row.leftovers and row.job]


class StallReporter:
    """Tells who waits for jobs what keeps them from ending, with the command that helps: once for each such thing."""

    def __init__(self, home: Home, store: Store, among: Snapshot | None, echo_err: EchoErr) -> None:
        self._home, self._store, self._among, self._echo_err = home, store, among, echo_err
        self._next_poll_s = 0.0  # on the monotonic scale
        self._told: str | None = None

    def __call__(self) -> None:
        """Tell what is new, at most once a second."""
        if (began_s := time.monotonic()) >= self._next_poll_s:
            found = self._obstacle()
            self._next_poll_s = max(began_s + DUTY_S, time.monotonic() + WAIT_SHARE * (time.monotonic() - began_s))
            if found and found != self._told:
                self._echo_err(found)
            self._told = found

    def _obstacle(self) -> str | None:
        job = self._store.queries.next_of(self._among)
        if not job:
            return None
        reason = reason_of(self._home, self._store, job)
        return f"job {job.id}: {reason.why}; {reason.remedy}" if reason.why and reason.remedy else None


def failures_line(store: Store, among: Snapshot | None, counts: Mapping[State, int] | None) -> str | None:
    """A line that names some of these jobs, with None of all, that have ended and not completed."""
    failed = sum(counts[state] for state in HOPELESS) if counts else 0
    if not counts or not failed:
        return None
    named = [how_ended(job) for job in store.queries.not_completed(among, 3)]
    more = [f"{failed - len(named)} more"] if failed > len(named) > 0 else []
    what = ": ".join(filter(None, ("did not complete", ", ".join(named + more))))
    return f"{failed} of {sum(counts.values())} {what}"


def stream_until_done(
    home: Home, store: Store, ids: Sequence[str], write: Callable[[bytes], object], echo_err: EchoErr
) -> int:
    """Wait for jobs, handing on the output of one alone; what to exit with."""
    jobs = [store.queries.get(id) for id in ids]
    among = store.queries.snapshot_of(job.seq for job in jobs)
    report_stall = StallReporter(home, store, among, echo_err)
    if len(jobs) != 1:
        found = wait_for_jobs(store, among, math.inf, lambda _: None, report_stall)
        echo_some(echo_err, failures_line(store, among, found))
        return exit_code_of_all(found)
    job = follow_log(store, home.log(jobs[0].id), jobs[0], write, report_stall)
    last = next(reversed(store.queries.history(job)), None)
    if job.error and (last is None or last.ended_by != EndReason.EXITED.value or last.signal):
        echo_err(f"job {how_ended(job)}")  # its output does not say that
    return exit_code_of(job, last)


def stream_stored(
    home: Home, store: Store, ids: Sequence[str], write: Callable[[bytes], object], echo_err: EchoErr
) -> int:
    """The same for jobs that have just been stored; an error says that they are."""
    try:
        return stream_until_done(home, store, ids, write, echo_err)
    except StoreError as error:
        them = " ".join(ids[:MOST_NAMED])
        raise QueueError(f"{error}; what was asked for is stored, wait for it: queuectl wait {them}") from error


def echo_some(echo_err: EchoErr, line: str | None) -> None:
    """Print a line where there is one."""
    if line:
        echo_err(line)


def findings(home: Home, store: Store) -> Iterator[str]:
    """Each thing that is wrong, with what to do."""
    damage = store.upkeep.damage()
    yield from (f"damaged: {printable(problem)}" for problem in damage)
    if damage:
        return
    yield from map(printable, store.upkeep.miscounts())
    rows = store.workers.all()
    yield from stuck_lines(rows)
    dead = [row for row in rows if not has_living_process(home, row) and not row.leftovers]
    yield from (f"worker {row.id} died" + (f" with job {row.job}" if row.job else "") +
                "; a running worker puts it in order: queuectl worker start" for row in dead)  # fmt: skip
    yield from home_problems(home, store.queries.exists, store.workers.ids)
    if free_bytes(home.path) < LOW_DISK_BYTES:
        yield f"the disk of {printable(home.path)} is nearly full"


def repair_home(home: Home, store: Store) -> None:
    """Repair what the findings are about, as far as it can be."""
    store.upkeep.repair(now_ms())
    for row in store.workers.all():
        if not can_see(row.process) and not has_living_process(home, row):  # whoever repairs knows that it is gone
            store.workers.forget_process(row.id)
    make_private(home)
    remove_stray_logs(home, store.queries.exists, store.workers.ids)


def save_copy(store: Store, file: str) -> None:
    """A copy of the queue in a file, there only once it is whole."""
    with new_file_for(file) as made:
        store.upkeep.back_up(made, now_ms())


def restore_copy(home: Home, store: Store, file: str) -> None:
    """Put a backup in the place of the queue. What dead workers left running is ended first."""
    rows = store.workers.all()
    refuse_while_working(home, rows)
    for row in rows:
        with contextlib.suppress(Damaged):
            if Recovery(home, store, row.id).attempt(row.process, store.config.settings(), Clock()) is None:
                raise QueueError(f"the job of dead worker {row.id} cannot be ended yet; nothing was restored")
    with workspace(home) as directory:
        store.upkeep.restore(file, directory, now_ms(), functools.partial(refuse_while_working, home))


def remove_logs(home: Home, store: Store, ids: Sequence[str], batch: int = 100) -> None:
    """Remove the logs of jobs that have been removed, unless there is a new job of that id by now."""
    for at in range(0, len(ids), batch):
        with store.db.writing():  # so that none can come between the look and the removal
            for id in ids[at : at + batch]:
                if not store.queries.exists(id):
                    remove_log(home.log(id))


def refuse_while_working(home: Home, rows: Sequence[WorkerRow]) -> None:
    """A queue is not replaced under its workers."""
    if any(has_living_process(home, row) for row in rows):
        raise QueueError("workers are running; stop them first: queuectl worker stop")


# ======================================================================== commands


class Program(click.Group):
    """The command group that turns what goes wrong into one line and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command line, and exit."""
        for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show must not stop us
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            # On Windows click would expand `*` and `%` in the words of a command, which are not ours.
            code = super().main(*args, **{**kwargs, "standalone_mode": False, "windows_expand_args": False})
        except QueueError as error:
            code = _fail(str(error), error.exit_code)
        except click.ClickException as error:
            code = _fail(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            code = EX_INTERRUPTED
        except OSError as error:
            about = [str(name) for name in (error.filename, error.filename2) if name]
            code = _fail(f"{' and '.join(about) or 'the system'}: {error.strerror or error}", 1)
        except Exception as error:  # what no decoder has caught: most likely something in the database
            code = _fail(f"unexpected {type(error).__name__}: {error}; is the queue well? look: queuectl doctor", 1)
        sys.exit(code or 0)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Show the help where no command is named."""
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; that whoever reads its output has seen enough is no error."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            silence_output()
            return 0
        except StoreUncertain as error:
            if not ctx.parent:
                error.effect += f"; look: queuectl {_SHOWN_BY.get(ctx.invoked_subcommand or '', 'list')}"
            raise


_SHOWN_BY = {"queue": "queue list", "config": "config list", "worker": "worker list"}


def _fail(text: str, code: int) -> int:
    line = " ".join(text.split())
    with contextlib.suppress(OSError):  # the exit code says it too
        click.echo(f"Error: {printable(line)}", err=True)
    return code


Program.group_class = Program


def hint_at_dashes(ctx: click.Context, args: list[str], error: click.NoSuchOption) -> str:
    """The end of an error about an option that most likely belongs to the command that a job is to run."""
    is_command = ctx.info_name == "enqueue" and not args[0].startswith("-")
    if error.possibilities and not is_command:
        return ""
    command = command_line(args) if is_command else f"COMMAND {error.option_name}"
    path = ctx.command_path if ctx.info_name == "enqueue" else f"{ctx.command_path} ID"
    stop = "" if error.format_message().endswith((".", "?", ")")) else "."  # click 8.1 ends without one
    return f"{stop} The options of a command go behind --: {path} -- {command}"


class TypedCommand(click.Command):
    """A command after whose `--` everything is left as it was typed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Set the words behind `--` apart."""
        if "--" in args:
            at = args.index("--")
            ctx.meta["typed"] = args[at + 1 :]
            return super().parse_args(ctx, args[:at])
        try:
            return super().parse_args(ctx, list(args))
        except click.NoSuchOption as error:
            raise BadInput(error.format_message() + hint_at_dashes(ctx, args, error)) from None


def with_store(command: Callable[..., Any]) -> Callable[..., Any]:
    """Open the home and its store for a command."""

    @functools.wraps(command)
    def run(**options: Any) -> Any:
        with opened() as (home, store):
            return command(home, store, **options)

    return run


@contextlib.contextmanager
def opened() -> Iterator[tuple[Home, Store]]:
    """The home and its store. An error of the output says what was stored before."""
    home = open_home()
    with open_store(home.database) as store:
        try:
            yield home, store
        except OutputFailed as error:
            error.effect = "what was asked for is done all the same" if store.db.commits else ""
            raise


class OutputFailed(QueueError):
    """Standard output takes no more, and not because its reader has seen enough."""


NO_JOBS = ("no such jobs",)


def put_out(write: Callable[[], object]) -> bool:
    """Write to standard output; False, and silent from then on, once nobody reads it any more."""
    try:
        write()
    except OSError as error:
        if not is_reader_gone(error):
            raise OutputFailed(f"cannot write the output: {error.strerror}") from error
        silence_output()
        return False
    return True


def echo(lines: Iterable[str]) -> bool:
    """Print lines, coloured where a person looks and has not said NO_COLOR; False once nobody reads them."""
    texts = ("\n".join(batch) for batch in batches(lines))
    return all(put_out(functools.partial(click.echo, text, color=wants_colour())) for text in texts)


def echo_json(document: Any) -> bool:
    """Print one JSON document."""
    return put_out(functools.partial(click.echo, json.dumps(document)))


def echo_array(documents: Iterable[Any]) -> bool:
    """Print one JSON array piece by piece. It is whole though what makes it fails; False once nobody reads it."""
    before, is_read = "[", True
    try:
        for batch in batches(documents):
            text = before + ", ".join(map(json.dumps, batch))
            before = ", "
            is_read = put_out(functools.partial(click.echo, text, nl=False))
            if not is_read:
                break
    finally:
        if before != "[":
            put_out(functools.partial(click.echo, "]"))
    return is_read and (before != "[" or echo_json([]))


def answer_each(as_json: bool, done: Iterable[tuple[Any, str]], none: Sequence[str] = NO_JOBS) -> None:
    """Print what is done as it comes, as an array or in lines. It is done to the end though nobody reads that."""
    left = iter(done)
    try:
        if as_json:
            echo_array(document for document, _ in left)
        else:
            first = list(itertools.islice(left, 1))
            echo(line for _, line in itertools.chain(first, left)) if first else echo(none)
    except OutputFailed:
        do_to_the_end(left)
        raise
    do_to_the_end(left)


def do_to_the_end(left: Iterable[Any]) -> None:
    """Go on with what is done as it is asked for."""
    collections.deque(left, maxlen=0)


def answer(as_json: bool, document: Any, lines: Iterable[str]) -> bool:
    """Print the document for a program, or the lines for a person; False once nobody reads them."""
    return echo_json(document) if as_json else echo(lines)


def refuse_both(one: str | bool, other: str | bool) -> None:
    """BadInput where two options were given that exclude each other."""
    if one and other:
        raise BadInput(f"{one} and {other} exclude each other")


def refuse_without(other: str, has_other: bool, one: str | bool) -> None:
    """BadInput where an option was given that means something only with another, which was not."""
    if one and not has_other:
        raise BadInput(f"{one} goes only with {other}")


def width() -> int:
    """Columns of the terminal; wide enough for everything where it is not one."""
    return terminal_columns() if sys.stdout.isatty() else 10_000


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def complete_files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """Files as the shell completes them; for --cwd directories."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir" if param.name == "cwd" else "file")]


def complete_ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """The ids that begin so of jobs that the command can be about, without those given already; behind `--` files."""
    if "typed" in ctx.meta:
        return complete_files(ctx, param, incomplete)
    states, hold = _FITTING.get(ctx.command_path.partition(" ")[2], (tuple(State), None))
    given = ctx.params.get("ids") or ()
    return [id for id in ask_store(lambda store: store.queries.ids_beginning(incomplete, states, hold))
            if id not in given]  # fmt: skip


_FITTING: dict[str, tuple[tuple[State, ...], bool | None]] = {  # the states of the jobs that a command is about, and
    "cancel": (OPEN, None),  # whether they are on hold, None for either; any other command can be about every job
    "edit": (EDITABLE, None),
    "rerun": (ENDED, None),
    "hold": (WAITING, False),
    "release": (WAITING, True),
    "wait": (OPEN, None),
    "dlq retry": ((State.DEAD,), None),
    "dlq purge": ((State.DEAD,), None),
}


def ask_store(question: Callable[[Store], Iterable[str]]) -> list[str]:
    """What the store answers while a line is being completed; nothing where it cannot."""
    with contextlib.suppress(QueueError), open_store(open_home().database, busy_timeout_s=1.0) as store:
        return list(question(store))
    return []


def complete_tags(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The tags that begin so."""
    return ask_store(lambda store: store.queries.tags_beginning(incomplete))


def complete_queues(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The queues that begin so; for `queue resume` those that are paused."""
    only_paused = ctx.command_path.endswith("queue resume")
    rows = ask_store(lambda store: (row.name for row in store.queues.all() if row.paused or not only_paused))
    return [name for name in rows if name.startswith(incomplete) and name not in (ctx.params.get("names") or ())]


def complete_on_lost(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """What --on-lost takes."""
    return [word for word in ON_LOST if word.startswith(incomplete)]


def complete_limit(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The one word among the limits of a queue."""
    return ["none"] if "none".startswith(incomplete) else []


def complete_keys(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The config keys that begin so."""
    return [key for key in SETTINGS if key.startswith(incomplete.replace("-", "_"))]


def complete_value(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """What a config key takes: files for a hook, else its value and its default."""
    key = str(ctx.params.get("key")).replace("-", "_")
    if key not in SETTINGS:
        return []
    if SETTINGS[key].parse is str:
        return complete_files(ctx, param, incomplete)
    values = ask_store(lambda store: (plain(getattr(store.config.settings(), key)), plain(getattr(Settings(), key))))
    return [value for value in dict.fromkeys(values) if value.startswith(incomplete)]


_COMPLETIONS = {
    "cwd": complete_files, "after": complete_ids, "queue": complete_queues, "tag": complete_tags,
    "on_lost": complete_on_lost,
}  # fmt: skip


def as_option(name: str) -> str:
    """The name of a field as its option bears it."""
    return name.replace("_", "-")


def _field_option(name: str, field: Field) -> Callable[[Any], Any]:
    option = f"--{as_option(name)}"
    if field.kind == "flag":
        return click.option(option, name, is_flag=True, help=field.help)
    return click.option(option, name, multiple=field.kind == "many", metavar=field.metavar, help=field.help,
                        shell_complete=_COMPLETIONS.get(name))  # fmt: skip


def field_options(*names: str) -> Callable[[Any], Any]:
    """An option for each of these fields of a job."""

    def decorate(command: Any) -> Any:
        return functools.reduce(lambda made, name: _field_option(name, FIELDS[name])(made), reversed(names), command)

    return decorate


id_argument = click.argument("id", shell_complete=complete_ids)
ids_argument = click.argument("ids", nargs=-1, metavar="[ID]...", shell_complete=complete_ids)
all_option = click.option("--all", "every", is_flag=True, help="All of them.")
clear_option = click.option(
    "--clear", type=click.Choice(sorted({*CLEARABLE, *map(as_option, CLEARABLE)})), multiple=True,
    metavar="FIELD", help="Put this field back to its default; may be repeated.",
)  # fmt: skip
limit_option = click.option("--limit", type=click.IntRange(0, MAX_INTEGER), metavar="N",
                            help="The newest N; default 100, and no limit with --all or --json.")  # fmt: skip
queues_option = click.option("--queue", "queues", multiple=True, metavar="Q", shell_complete=complete_queues,
                             help="Take only this queue; may be repeated.")  # fmt: skip
key_argument = click.argument("key", shell_complete=complete_keys)


def state_option(states: Iterable[State]) -> Callable[[Any], Any]:
    """--state, which may be repeated, of the states that a command is for."""
    return click.option("--state", "states", multiple=True, type=click.Choice([state.value for state in states]),
                        help="Only jobs in this state; may be repeated.")  # fmt: skip


def selection_options(
    *states: State, ids: bool = True, check: Callable[[Selection], Selection] = check_selection
) -> Callable[[Any], Any]:
    """[ID]…, --tag, --queue, --state of these states, and --all; the command is given the Selection that they make."""

    def decorate(command: Any) -> Any:
        @functools.wraps(command)
        def run(ids: Sequence[str] = (), states: Sequence[str] = (), *, tag: str | None, queue: str | None,
                every: bool, **options: Any) -> Any:  # fmt: skip
            which = Selection(ids, tag, queue, every, [State(state) for state in states] if states else None)
            return command(which=check(which), **options)

        made = all_option(run)
        made = state_option(states)(made) if states else made
        made = click.option("--queue", metavar="Q", help="Only jobs of queue Q.", shell_complete=complete_queues)(made)
        made = click.option("--tag", metavar="T", help="Only jobs with tag T.", shell_complete=complete_tags)(made)
        return ids_argument(made) if ids else made

    return decorate


def changes_given(
    typed: Sequence[str] | None, options: Mapping[str, Any], clear: Sequence[str], now: int, prepared: Preparation
) -> Spec:
    """What a command line makes of fields: those that it sets, and those that it clears."""
    fields = parse_options({**options, "env": with_values(options["env"])})
    refuse_both("command" in fields and "--command", bool(typed) and "a command behind --")
    if typed:
        fields["command"] = as_typed(typed)
    cleared = {name: BLANK[name] for name in (word.replace("-", "_") for word in clear)}
    for name in cleared:
        refuse_both(name in fields and f"setting {name!r}", "--clear of it")
    spec = check_fields(fields, now)
    return {**prepared(spec), **cleared}


def change_options(*states: State) -> Callable[[Any], Any]:
    """Ids and options that choose jobs, and an option for each field but `id`; for a Selection and a Spec.

    With ids, --queue and --tag are new values; without, they choose the jobs.
    """

    def decorate(command: Any) -> Any:
        @functools.wraps(command)
        def run(which: Selection, as_json: bool, clear: Sequence[str], **options: Any) -> Any:
            if which.ids:
                options |= {"tag": which.tag, "queue": which.queue}
                which = which._replace(tag=None, queue=None)
            now = now_ms()
            prepared = Preparation(now)
            spec = changes_given(click.get_current_context().meta.get("typed"), options, clear, now, prepared)
            command(which=check_selection(which), spec=spec, as_json=as_json)
            prepared.tell(echo_err)

        made = clear_option(run)
        made = field_options(*(name for name in FIELDS if name not in ("id", "queue", "tag")))(made)
        return selection_options(*states, check=lambda which: which)(made)

    return decorate


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="queuectl")
def cli() -> None:
    """A background job queue for commands. Its home is ~/.queuectl, or QUEUECTL_HOME."""


def source_options(command: Any) -> Any:
    """Where jobs are read from; the command is given those that were named, as one dictionary."""

    @functools.wraps(command)
    def run(null: bool, **options: Any) -> Any:
        sources = {name: options.pop(name) for name in ("each", "array", "csv", "lines", "file")}
        named = {name: source for name, source in sources.items() if source is not None}
        if null and "each" not in named:
            raise BadInput("-0 says how the items of --each end; give --each too")
        if null:
            named["each0"] = named.pop("each")
        return command(sources=named, **options)

    file = click.File("rb")
    made = click.option("--file", "file", type=file, help="JSON Lines from a file.")(run)
    made = click.option("--lines", type=file, metavar="FILE", help="A job for each line, which is its command.")(made)
    made = click.option("--csv", type=file, metavar="FILE", help="A job for each row; {NAME} is its column.")(made)
    made = click.option("--array", metavar="N-M", help="A job for each number: 1-100, 1-10:2, 1,3,7-9.")(made)
    made = click.option("--null", "-0", is_flag=True, help="The items of --each end in NUL (find -print0).")(made)
    return click.option("--each", type=file, metavar="FILE", help="A job for each line; {} stands for it.")(made)


@cli.command("enqueue", cls=TypedCommand)
@click.argument("job", nargs=-1, metavar="[JOB | - | -- COMMAND [ARG]...]", shell_complete=complete_files)
@field_options(*(name for name in FIELDS if name != "command"))
@source_options
@click.option("--skip-existing", is_flag=True, help="Pass over jobs whose id exists already.")
@click.option("--dry-run", is_flag=True, help="Print the jobs as JSON Lines and store nothing.")
@click.option("--wait", is_flag=True, help="Stay, show the output, exit with the job's exit code (124: timed out).")
@json_option
def enqueue_command(
    job: Sequence[str], sources: dict[str, Any], skip_existing: bool, dry_run: bool, wait: bool, as_json: bool,
    **options: Any,
) -> int:  # fmt: skip
    """Store jobs: one as JSON, one as a command after --, or JSON Lines from standard input with -.

    --each, --array, --csv and --lines store many jobs in one call: {} stands for the item, {.} for it without its
    ending, {/} for its last part, {//} for its directory, {/.} for its last part without ending, {#} for its
    number.
    """
    refuse_both(dry_run and "--dry-run", wait and "--wait")
    options["env"] = with_values(options["env"])
    typed = click.get_current_context().meta.get("typed")
    given = Given(source_of(job, typed, sources), typed, {"cwd": ".", **parse_options(options)}, now_ms())
    prepared = Preparation(given.now)
    specs = given.specs(prepared)
    if dry_run:
        show_specs(specs, as_json)
        prepared.tell(echo_err)
        return 0
    with opened() as (home, store):
        with counting(specs) as counted:
            stored = store.intake.enqueue(counted, given.now, skip_existing=skip_existing, tag_them=given.wants_tag)
        wake_worker(home, store, echo_err)
        ids = show_enqueued(stored, as_json, wait)
        prepared.tell(echo_err)
        if not wait and sys.stderr.isatty():
            hint_at_workers(home, store, echo_err)
        write = (lambda _: None) if as_json else write_or_go_on
        return stream_stored(home, store, ids, write, echo_err) if wait else 0


def show_specs(specs: Iterable[tuple[str, Spec]], as_json: bool) -> None:
    """Print jobs that are not stored."""
    lines = (spec_line(spec) for _, spec in specs)
    echo([f"[{', '.join(lines)}]"] if as_json else lines)


def show_enqueued(stored: Enqueued, as_json: bool, keep: bool) -> Sequence[str]:
    """Print what an `enqueue` has stored. Return the ids where they are to be kept."""
    jobs = list(stored) if keep else stored
    if as_json:
        tags: Sequence[dict[str, Any]] = ({"tag": None}, {"tag": stored.tag}) if stored.tag else ({}, {})
        echo_array({"id": id, "created": created, **tags[created]} for id, created in jobs)
    else:
        echo(id for id, _ in jobs)
    if stored.tag and stored.made and sys.stderr.isatty():
        echo_err(batch_line(stored.made, stored.tag))
    return [id for id, _ in jobs] if keep else []


@contextlib.contextmanager
def counting(specs: Iterable[tuple[str, Spec]]) -> Iterator[Iterable[tuple[str, Spec]]]:
    """Show on a terminal how many jobs have been read, where they are read from a file that holds any."""
    if isinstance(specs, list) or not sys.stderr.isatty():
        yield specs
        return
    rest = iter(specs)
    first = list(itertools.islice(rest, 1))
    if not first:
        yield first
        return
    with click.progressbar(itertools.chain(first, rest), label="reading", file=sys.stderr, show_pos=True) as bar:
        yield bar


def write_or_go_on(block: bytes) -> bool:
    """Bytes to standard output, at once; False, and silent from then on, once nobody reads them."""

    def write() -> None:
        sys.stdout.buffer.write(block)
        sys.stdout.buffer.flush()

    return put_out(write)


def write_out(block: bytes) -> None:
    """The same for a command that has nothing else to do: it ends once nobody reads them."""
    if not write_or_go_on(block):
        raise BrokenPipeError


def source_of(words: Sequence[str], typed: Sequence[str] | None, sources: Mapping[str, Any]) -> tuple[str, Any]:
    """The one form of an `enqueue` that was given, a key of FORMS, and what it reads; BadInput for none or two."""
    named = list(sources.items())
    if list(words) == ["-"]:
        named.append(("-", sys.stdin.buffer))
    elif len(words) == 1 and words[0].lstrip()[:1] in ("{", "["):
        named.append(("json", words[0]))
    elif any(word.lstrip().startswith("{") or ":" in word for word in words):
        raise BadInput("the shell has taken the JSON apart; quote it, or use: queuectl enqueue -- COMMAND")
    elif words:
        named.append(("", None))
    if typed is not None and (not named or not FORMS[named[0][0]].takes_command):
        named.append(("typed", None))
    if len(named) > 1:
        raise BadInput(f"{' and '.join(FORMS[name].called for name, _ in named)} exclude each other")
    if not named or not named[0][0] or (not typed and FORMS[named[0][0]].takes_command):
        raise BadInput("give one job: as JSON, as a command behind -- (queuectl enqueue -- echo hello), or many with -")
    return named[0]


class Given(NamedTuple):
    """What an `enqueue` was given."""

    source: tuple[str, Any]  # its form, and what that reads
    typed: Sequence[str] | None
    fields: dict[str, Any]
    now: int

    @property
    def wants_tag(self) -> bool:
        """Do its jobs get a tag that is made up?"""
        return FORMS[self.source[0]].is_many and "tag" not in self.fields

    @property
    def command(self) -> str | list[str]:
        """One word is a line for the shell, several are a program and its arguments."""
        return as_typed(self.typed or ())

    def specs(self, prepared: Preparation) -> Iterable[tuple[str, Spec]]:
        """The jobs, prepared; a list where there is one."""
        name, source = self.source
        specs = FORMS[name].specs(self, source)
        found = prepared_batch(specs, prepared)
        return list(found) if isinstance(specs, list) else found

    def items(self, items: Iterable[Item], columns: Sequence[str] = ()) -> Iterable[tuple[str, Spec]]:
        """The jobs of items."""
        return specs_of_items(items, columns, self.command if self.typed else None, self.fields, SHELL, self.now)

    def rows(self, file: BinaryIO) -> Iterable[tuple[str, Spec]]:
        """The jobs of the rows of a CSV file."""
        columns, items = read_rows(file)
        return self.items(items, columns)

    def one(self, job: Any) -> list[tuple[str, Spec]]:
        """The one job."""
        return [("", check_job(job, self.now, self.fields))]


class Form(NamedTuple):
    """A way to name jobs to `enqueue`."""

    called: str
    specs: Callable[[Given, Any], Iterable[tuple[str, Spec]]]
    takes_command: bool = False  # behind --
    is_many: bool = False  # of one line


FORMS = {
    "typed": Form("a command behind --", lambda given, _: given.one({"command": given.command}), takes_command=True),
    "json": Form("a job as JSON", lambda given, text: given.one(parse_job(text))),
    "-": Form("-", lambda given, file: read_batch(file, given.now, given.fields)),
    "file": Form("--file", lambda given, file: read_batch(file, given.now, given.fields)),
    "each": Form("--each", lambda given, file: given.items(read_items(file)), True, True),
    "each0": Form("--each", lambda given, file: given.items(read_items(file, null=True)), True, True),
    "array": Form("--array", lambda given, text: given.items(number_items(text)), True, True),
    "csv": Form("--csv", lambda given, file: given.rows(file), True, True),
    "lines": Form("--lines", lambda given, file: given.items(read_items(file)), is_many=True),
    "": Form("a word", lambda given, _: given.one(None)),
}


def as_typed(words: Sequence[str]) -> str | list[str]:
    """One word is a line for the shell, several are a program and its arguments."""
    return words[0] if len(words) == 1 else list(words)


def prepared_batch(batch: Iterable[tuple[str, Spec]], prepared: Preparation) -> Iterator[tuple[str, Spec]]:
    """The specs of a batch, prepared; BadInput names the line."""
    for where, spec in batch:
        try:
            yield where, prepared(spec)
        except BadInput as error:
            raise BadInput(f"{where}{error}") from None


@cli.group("worker")
def worker_group() -> None:
    """Start, stop, scale and list workers."""


@worker_group.command("start")
@click.option("--count", type=click.IntRange(1, 1000), default=1, metavar="N", help="How many to start; default 1.")
@queues_option
@click.option("--foreground", is_flag=True, help="Run one worker here until Ctrl-C or SIGTERM.")
@click.option("--drain", is_flag=True, help="Leave when nothing is left that could run.")
@json_option
def worker_start_command(count: int, queues: Sequence[str], foreground: bool, drain: bool, as_json: bool) -> None:
    """Start detached workers; returns once all are up."""
    refuse_both(foreground and "--foreground", as_json and "--json")
    leave_job(sys.argv[1:])
    check_queues(queues)
    home = open_home()
    open_store(home.database).close()
    if foreground:
        refuse_several(count)
        return serve(home, queues, drain, echo=True)
    started, failure = start_workers(home, count, queues, drain)
    if started or not failure:
        answer(as_json, [{"id": worker} for worker in started], (f"worker {worker} started" for worker in started))
    raise_some(failure)


def raise_some(error: QueueError | None) -> None:
    """Raise an error where there is one, once what was done is printed."""
    if error:
        raise error


def check_queues(queues: Sequence[str]) -> None:
    """BadInput for a name that no queue can have."""
    for queue in queues:
        check_field("queue", queue)


def refuse_several(count: int) -> None:
    """A foreground worker is one process."""
    if count > 1:
        raise BadInput("--foreground is one worker; start it several times for more")


@worker_group.command("stop")
@click.argument("ids", nargs=-1, metavar="[ID]...", type=click.IntRange(1))
@click.option("--now", is_flag=True, help="End their jobs too, and put these back to pending.")
@click.option("--timeout", metavar="TIME", help="Wait at most this long.")
@json_option
@with_store
def worker_stop_command(
    home: Home, store: Store, ids: Sequence[int], now: bool, timeout: str | None, as_json: bool
) -> int:
    """Stop all workers, or those named: each finishes its job first, and the command waits for that."""
    timeout_s = option_duration("--timeout", timeout)
    is_watched = sys.stderr.isatty() and not now
    busy = [row.job for row in workers_named(home, store, ids) if row.job] if is_watched else []
    if busy:
        echo_err(f"workers leave when their jobs have ended, {busy[0]} among them; at once: queuectl worker stop --now")
    told, left = stop_workers(home, store, "now" if now else "finish", timeout_s, echo_err, ids)
    if left:
        raise QueueError(f"{len(left)} of {len(told)} workers are still there; at once: queuectl worker stop --now")
    answer(as_json, [{"id": worker} for worker in told], [f"{number_of(len(told), 'worker')} stopped"])
    return 0


@worker_group.command("scale")
@click.argument("count", metavar="N", type=click.IntRange(0, 1000))
@queues_option
@json_option
def worker_scale_command(count: int, queues: Sequence[str], as_json: bool) -> None:
    """Bring the workers for all queues, or for just those named, to N.

    Missing workers are started, and the command returns once they are up. Surplus workers finish their job and
    leave, idle ones first, and of those the newest. Workers that are leaving do not count.
    """
    leave_job(sys.argv[1:])
    check_queues(queues)
    started, leaving, failure = scale_workers(open_home(), count, queues)
    document = {"started": started, "leaving": [row.id for row in leaving]}
    if started or leaving or not failure:
        answer(as_json, document, scaled_lines(started, leaving))
    raise_some(failure)


@worker_group.command("list")
@json_option
@with_store
def worker_list_command(home: Home, store: Store, as_json: bool) -> None:
    """Show the workers that run."""
    rows = living_workers(home, store)
    answer(as_json, [worker_json(row) for row in rows], worker_lines(rows, now_ms(), width()))
    for line in stuck_lines(store.workers.all()):
        echo_err(line)


@cli.command("status")
@click.option("--watch", is_flag=True, help="Redraw every second until Ctrl-C.")
@json_option
@with_store
def status_command(home: Home, store: Store, watch: bool, as_json: bool) -> None:
    """Show how many jobs are in each state, and what keeps them from running."""
    refuse_both(watch and "--watch", as_json and "--json")
    if watch:
        return watch_status(home, store)
    seen = overview(home, store)
    answer(as_json, status_json(seen), status_lines(seen))


def watch_status(home: Home, store: Store) -> None:
    """Draw the status every second until Ctrl-C, or until nobody looks."""
    with screen() as draw:
        while draw(status_lines(overview(home, store))):
            time.sleep(1)


# The terminal's alternate screen, without its cursor; what stood on the terminal before comes back with _LEAVE_SCREEN.
_ENTER_SCREEN, _LEAVE_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_TO_TOP, _ERASE_REST_OF_LINE, _ERASE_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


@contextlib.contextmanager
def screen() -> Iterator[Callable[[Iterable[str]], bool]]:
    """What draws lines in the place of those before; the terminal's scroll-back stays as it is.

    Where output goes elsewhere, lines are printed below those before, and nothing drives a terminal.
    """
    if not has_screen():
        yield echo
        return
    click.echo(_ENTER_SCREEN, nl=False, color=True)
    try:
        yield draw
    finally:
        click.echo(_LEAVE_SCREEN, nl=False, color=True)


def draw(lines: Iterable[str]) -> bool:
    """Draw lines from the top of the screen, as many as it holds, in one write; False once nobody looks."""
    shown = [line if wants_colour() is None else click.unstyle(line) for line in lines][: terminal_rows()]
    text = "\n".join(line + _ERASE_REST_OF_LINE for line in shown)
    return put_out(lambda: click.echo(_TO_TOP + text + _ERASE_BELOW, nl=False, color=True))


@cli.command("list")
@selection_options(*State)
@click.option("--next", "following", type=click.IntRange(1, MAX_INTEGER), metavar="N",
              help="The N that start next, in that order.")  # fmt: skip
@limit_option
@click.option("--sort", type=click.Choice([f"{sign}{key}" for key in SORTS for sign in ("", "-")]),
              metavar="KEY", help=f"By {', '.join(SORTS)}; -KEY for the other way round.")  # fmt: skip
@click.option("--columns", metavar="NAMES", help="For scripts: only these JSON fields, like id,state, tabs between.")
@json_option
@with_store
def list_command(home: Home, store: Store, which: Selection, following: int | None, limit: int | None,
                 sort: str | None, columns: str | None, as_json: bool) -> None:  # fmt: skip
    """Show jobs, in the order of enqueueing unless --sort says otherwise.

    Jobs that are named by id come in the order of the ids; one that does not exist is an error, once the others
    have been shown.
    """
    refuse_both(as_json and "--json", columns is not None and "--columns")
    names = None if columns is None else parse_columns(columns)
    refuse_beside("ids", which.ids, {"--next": following, "--limit": limit, "--sort": sort})
    refuse_beside("--next", following, {"--limit": limit, "--sort": sort, "another choice than --queue": (
        which._replace(queue=None).is_filter)})  # fmt: skip
    if following:
        return show_next(home, store, which.queue, following, names, as_json)
    if which.ids:
        return show_named(home, store, which.ids, names, as_json)
    return show_jobs(home, store, which, limit, as_json, sort or "seq", names)


def refuse_beside(what: str, given: object, others: Mapping[str, object]) -> None:
    """BadInput where one thing was given and one of the others too."""
    for name, value in others.items():
        refuse_both(what if given else "", name if value is not None and value is not False else "")


def show_named(home: Home, store: Store, ids: Sequence[str], names: Sequence[str] | None, as_json: bool) -> None:
    """Print the jobs of these ids, in that order; NotFound afterwards where one of them is not there."""
    found = store.queries.named(ids)
    print_jobs(home, store, [job for job in found if job], names, as_json)
    missing = [printable(id) for id, job in zip(ids, found, strict=True) if not job]
    if missing:
        more = [f"{len(missing) - 3} more"] if len(missing) > 3 else []
        raise NotFound(f"no job {', '.join([*map(repr, missing[:3]), *more])}")


def show_next(home: Home, store: Store, queue: str | None, count: int, names: Sequence[str] | None,
              as_json: bool) -> None:  # fmt: skip
    """Print the jobs that start next, and which queues rest meanwhile."""
    queues = [row for row in store.queues.all() if queue in (None, row.name)]
    active = [row.name for row in queues if not row.paused and not row.is_full]
    print_jobs(home, store, store.queries.next_to_run(active, count, now_ms()), names, as_json)
    if not as_json and names is None:
        echo(resting_lines(queues))


def show_jobs(home: Home, store: Store, where: Selection, limit: int | None, as_json: bool,
              sort: str = "seq", names: Sequence[str] | None = None) -> None:  # fmt: skip
    """Print the jobs of a choice without ids, and how many more there are."""
    is_cut = limit is None and not (as_json or names or where.every)
    jobs = store.queries.each(where, LIST_ROWS if is_cut else limit, sort)
    if as_json or names:
        return print_jobs(home, store, jobs, names, as_json)
    shown = list(jobs)
    print_jobs(home, store, shown, names, as_json, store.queries.how_many(where) - len(shown))


def print_jobs(home: Home, store: Store, jobs: Iterable[Job], names: Sequence[str] | None, as_json: bool,
               more: int = 0) -> None:  # fmt: skip
    """Print jobs as JSON, as columns for a script, or as a table for a person."""
    if as_json:
        echo_array(job_json(job) for job in jobs)
    elif names:
        echo(column_line(job, names) for job in jobs)
    else:
        living, queues, shown = living_workers(home, store), store.queues.all(), list(jobs)
        found = store.reasons.wait_reasons(shown, living, queues, store.config.settings())
        echo(job_lines(shown, found, more, now_ms(), width()))


@cli.command("show")
@id_argument
@json_option
@with_store
def show_command(home: Home, store: Store, id: str, as_json: bool) -> None:
    """Show one job, whole, with its attempts and why it is not running."""
    job = store.queries.get(id)
    history = store.queries.history(job)
    reason, pid = reason_of(home, store, job), pid_of(home, job)
    if as_json:
        echo_json(job_json(job) | {"reason": reason.why, "pid": pid, "history": [attempt_json(a) for a in history]})
    else:
        echo(show_lines(job, history, reason, home.log(job.id), pid, store.config.settings(), now_ms(), width()))


@cli.command("logs")
@click.argument("id", required=False, shell_complete=complete_ids)
@click.option("--failed", is_flag=True, help="The output of the job that failed last.")
@click.option("--follow", "-f", is_flag=True, help="Go on until the job has ended, through retries.")
@click.option("--tail", type=click.IntRange(0, MAX_INTEGER), metavar="N", help="Only the last N lines.")
@click.option("--attempt", type=click.IntRange(1, MAX_INTEGER), metavar="K", help="Only the output of attempt K.")
@click.option("--raw", is_flag=True, help="Every byte as it was written, progress bars too.")
@with_store
def logs_command(
    home: Home, store: Store, id: str | None, failed: bool, follow: bool, tail: int | None, attempt: int | None,
    raw: bool,
) -> None:  # fmt: skip
    """Print a job's output; without an id, that of the job that started last."""
    refuse_both(failed and "--failed", id or "")
    job = store.queries.get(id) if id else last_job(store, failed)
    path = home.log(job.id)
    start, end = log_range(path, job, store.queries.history(job), attempt)
    start = start if tail is None else tail_start(path, tail, start, end)
    if follow and end is None:
        report_stall = StallReporter(home, store, store.queries.snapshot_of([job.seq]), echo_err)
        job = follow_log(store, path, job, write_out, report_stall, attempt, start)
        if job.state is not State.COMPLETED:
            echo_err(f"job {how_ended(job)}")
        return
    if job.state in WAITING and not job.attempts:
        echo_err(f"job {job.id} has not started: {reason_of(home, store, job).why}")
    blocks = read_log(path, start, end)
    written = 0
    for block in blocks if raw else fold_returns(blocks):
        write_out(block)
        written += len(block)
    if not written and tail != 0:
        echo_some(echo_err, error_line(job, store.queries.history(job), attempt))


def last_job(store: Store, failed: bool) -> Job:
    """The job that started last, or failed last; says on stderr which one it is."""
    job = store.queries.last_failed() if failed else store.queries.last_started()
    echo_err(f"job {job.id}")
    return job


@cli.command("wait")
@selection_options(*State)
@click.option("--timeout", metavar="TIME", help="Wait at most this long; then exit 124.")
@json_option
@with_store
def wait_command(home: Home, store: Store, which: Selection, timeout: str | None, as_json: bool) -> int:
    """Wait until jobs have ended; without a choice, all jobs. Exit code 0: all completed; 1: some did not."""
    among = None if which in (NOTHING, EVERY_JOB) else store.queries.snapshot(which)
    total = sum(store.queries.counts(among).values())
    refuse_none(among is None or total)
    timeout_s = option_duration("--timeout", timeout)
    with progress_to(total) as progress:
        found = wait_for_jobs(store, among, timeout_s, progress, StallReporter(home, store, among, echo_err))
    if as_json:
        echo_json({state.value: found[state] if found else 0 for state in ENDED} | {"timed_out": found is None})
    echo_some(echo_err, failures_line(store, among, found))
    return exit_code_of_all(found)


def refuse_none(count: int) -> None:
    """NotFound where there are no jobs to wait for, which is most likely a slip."""
    if not count:
        raise NotFound("no job has that tag, queue or state")


def echo_err(text: str) -> None:
    """A line on standard error, in the place of a progress bar that may stand there."""
    erase = "\r\x1b[K" if sys.stderr.isatty() else ""
    with contextlib.suppress(OSError):  # nobody reads it: that is no reason to stop
        click.echo(erase + printable(text), err=True)


@contextlib.contextmanager
def progress_to(total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on a terminal, told how far it has come; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with click.progressbar(length=total, file=sys.stderr, show_pos=True) as bar:
        yield lambda done: bar.update(min(done, total) - bar.pos)


@cli.command("cancel")
@selection_options(*OPEN)
@json_option
@with_store
def cancel_command(home: Home, store: Store, which: Selection, as_json: bool) -> None:
    """Cancel jobs: waiting ones never run, running ones are ended, and those that have ended are passed over."""
    ids, passed_over = cancel_jobs(home, store, which, echo_err)
    echo_some(echo_err, passed_over_line(passed_over, len(list(ids)) + len(passed_over)) if passed_over else None)
    echo_done(ids, "cancelled", as_json, none=[] if passed_over else NO_JOBS)


@cli.command("edit", cls=TypedCommand)
@change_options(*EDITABLE)
@json_option
@with_store
def edit_command(home: Home, store: Store, which: Selection, spec: Spec, as_json: bool) -> None:
    """Change jobs that wait or are dead; dead ones stay dead. A command after -- replaces theirs.

    With ids, --queue and --tag are new values; without, they choose the jobs.
    """
    done = store.changes.edit(which, require_changes(spec), now_ms())
    wake_worker(home, store, echo_err)
    answer_each(as_json, (
        ({"id": after.id, "changed": changed_fields(before, after)}, edit_line(before, after))
        for before, after in until_broken_off(done, "edited", echo_err)
    ))  # fmt: skip


@cli.command("rerun", cls=TypedCommand)
@change_options(*ENDED)
@json_option
@with_store
def rerun_command(home: Home, store: Store, which: Selection, spec: Spec, as_json: bool) -> None:
    """Run ended jobs again: completed, dead or cancelled, they go back to pending with no attempts made.

    Fields are changed before the job can start, and a command after -- replaces theirs. With ids, --queue and
    --tag are new values; without, they choose the jobs.
    """
    done = store.reruns.rerun(which, now_ms(), spec)
    wake_worker(home, store, echo_err)
    echo_done(done, "pending again", as_json)


def require_changes(spec: Spec) -> Spec:
    """The same; BadInput where nothing is to change."""
    if not spec:
        raise BadInput("name a field to change, for example --priority 5")
    return spec


@cli.group("dlq")
def dlq_group() -> None:
    """The dead letter queue: jobs that failed and are not tried again."""


@dlq_group.command("list")
@selection_options(ids=False)
@limit_option
@json_option
@with_store
def dlq_list_command(home: Home, store: Store, which: Selection, limit: int | None, as_json: bool) -> None:
    """Show dead jobs."""
    show_jobs(home, store, which._replace(states=[State.DEAD]), limit, as_json)


@dlq_group.command("retry", cls=TypedCommand)
@change_options()
@json_option
@with_store
def dlq_retry_command(home: Home, store: Store, which: Selection, spec: Spec, as_json: bool) -> None:
    """Put dead jobs back to pending, with no attempts made.

    Fields are changed before the job can start, and a command after -- replaces theirs. With ids, --queue and
    --tag are new values; without, they choose the jobs.
    """
    done = store.reruns.retry_dead(which, now_ms(), spec)
    wake_worker(home, store, echo_err)
    echo_done(done, "pending again", as_json)


@dlq_group.command("purge")
@selection_options()
@json_option
@with_store
def dlq_purge_command(home: Home, store: Store, which: Selection, as_json: bool) -> None:
    """Remove dead jobs and their logs for good."""
    echo_done(purge_jobs(home, store, which, echo_err), "purged", as_json)


def echo_done(ids: Iterable[str], what: str, as_json: bool, none: Sequence[str] = NO_JOBS) -> None:
    """Print what has become of some jobs, or that there were none."""
    answer_each(as_json, (({"id": id}, f"{id} {what}") for id in until_broken_off(ids, what, echo_err)), none)


@cli.command("hold")
@selection_options(*WAITING)
@json_option
@with_store
def hold_command(home: Home, store: Store, which: Selection, as_json: bool) -> None:
    """Keep jobs that wait from starting until `release`."""
    echo_done(store.changes.set_hold(which, True, now_ms()), "on hold", as_json)


@cli.command("release")
@selection_options(*WAITING)
@json_option
@with_store
def release_command(home: Home, store: Store, which: Selection, as_json: bool) -> None:
    """Let jobs on hold go."""
    done = store.changes.set_hold(which, False, now_ms())
    wake_worker(home, store, echo_err)
    echo_done(done, "released", as_json)


@cli.group("queue")
def queue_group() -> None:
    """Pause, resume and limit queues."""


@queue_group.command("list")
@json_option
@with_store
def queue_list_command(home: Home, store: Store, as_json: bool) -> None:
    """Show how many jobs each queue holds."""
    rows = store.queues.all()
    answer(as_json, [queue_json(row) for row in rows], queue_lines(rows, width()))


@queue_group.command("pause")
@click.argument("names", nargs=-1, metavar="[Q]...", shell_complete=complete_queues)
@all_option
@json_option
@with_store
def queue_pause_command(home: Home, store: Store, names: Sequence[str], every: bool, as_json: bool) -> None:
    """Start nothing new in these queues."""
    chosen = queues_given(store, names, every)
    store.queues.set_paused(chosen, True)
    echo_done(chosen, "paused", as_json)


@queue_group.command("resume")
@click.argument("names", nargs=-1, metavar="[Q]...", shell_complete=complete_queues)
@all_option
@json_option
@with_store
def queue_resume_command(home: Home, store: Store, names: Sequence[str], every: bool, as_json: bool) -> None:
    """Go on with these queues."""
    chosen = queues_given(store, names, every)
    store.queues.set_paused(chosen, False)
    wake_worker(home, store, echo_err)
    echo_done(chosen, "resumed", as_json)


def queues_given(store: Store, names: Sequence[str], every: bool) -> list[str]:
    """The queues named, or all that there are."""
    check_queues(names)
    if bool(names) == every:
        raise BadInput("name queues, or say --all: one of the two")
    return [row.name for row in store.queues.all()] if every else list(names)


@queue_group.command("limit")
@click.argument("name", metavar="Q", shell_complete=complete_queues)
@click.argument("limit", metavar="N|none", shell_complete=complete_limit)
@json_option
@with_store
def queue_limit_command(home: Home, store: Store, name: str, limit: str, as_json: bool) -> None:
    """Let at most N jobs of a queue run at once."""
    check_queues([name])
    store.queues.set_limit(name, None if limit == "none" else check_limit(limit))
    wake_worker(home, store, echo_err)
    echo_done([name], f"limit {limit}", as_json)


def check_limit(text: str) -> int:
    """The limit that a word means; BadInput where it means none."""
    if not re.fullmatch(r"[0-9]{1,10}", text) or not 1 <= int(text) < 2**31:
        raise BadInput(f"a limit must be a number of at least 1, or none; not {text!r}")
    return int(text)


@cli.command("prune")
@click.option("--older-than", default="0", metavar="TIME", help="Only jobs that ended at least this long ago.")
@state_option(ENDED)
@click.option("--dry-run", is_flag=True, help="Only say how many would be removed.")
@json_option
@with_store
def prune_command(
    home: Home, store: Store, older_than: str, states: Sequence[str], dry_run: bool, as_json: bool
) -> None:
    """Remove jobs that have ended, and their logs; without options all of them."""
    before = now_ms() - round(option_duration("--older-than", older_than) * 1000) + 1
    chosen = [State(state) for state in states] or ENDED
    removed, failure = prune_jobs(home, store, chosen, before, dry_run, echo_err)
    what = "would be removed" if dry_run else "removed"
    if as_json or not failure:
        answer(as_json, {"removed": removed, "dry_run": dry_run}, [f"{number_of(removed, 'job')} {what}"])
    raise_some(failure)


@cli.command("export")
@selection_options(*State)
@with_store
def export_command(home: Home, store: Store, which: Selection) -> None:
    """Write jobs as JSON Lines that `enqueue -` reads back; without a choice, all jobs."""
    echo(export_line(job) for job in store.queries.chosen(EVERY_JOB if which == NOTHING else which))


@cli.group("config")
def config_group() -> None:
    """Settings: defaults for jobs, and hooks."""


@config_group.command("list")
@json_option
@with_store
def config_list_command(home: Home, store: Store, as_json: bool) -> None:
    """Show every key, its value and what it means."""
    values = store.config.settings()._asdict()
    rows = [[key, printable(plain(value)), SETTINGS[key].help] for key, value in values.items()]
    answer(as_json, values, table(("KEY", "VALUE", "MEANING"), rows, width()))


@config_group.command("get")
@key_argument
@json_option
@with_store
def config_get_command(home: Home, store: Store, key: str, as_json: bool) -> None:
    """Print only the value of a key."""
    value = getattr(store.config.settings(), setting_key(key))
    if as_json:
        echo_json(value)
    else:
        shown = printable(plain(value)) if sys.stdout.isatty() else plain(value)
        put_out(lambda: click.echo(shown, color=True))  # or click would take escapes off that belong to the value


@config_group.command("set", context_settings={"ignore_unknown_options": True})
@key_argument
@click.argument("value", shell_complete=complete_value)
@json_option
@with_store
def config_set_command(home: Home, store: Store, key: str, value: str, as_json: bool) -> None:
    """Set a key; it reaches running workers with their next job."""
    parsed = parse_setting(key, value)
    if isinstance(parsed, str):  # a hook, which is a line for the shell
        refuse_too_long(parsed, {})
    store.config.set(setting_key(key), parsed)
    echo_setting(setting_key(key), parsed, as_json)


@config_group.command("unset")
@key_argument
@json_option
@with_store
def config_unset_command(home: Home, store: Store, key: str, as_json: bool) -> None:
    """Go back to a key's default."""
    store.config.set(setting_key(key), None)
    echo_setting(setting_key(key), getattr(Settings(), setting_key(key)), as_json)


def echo_setting(key: str, value: Any, as_json: bool) -> None:
    """Print a key and the value that is in force from now on."""
    answer(as_json, {key: value}, [f"{key} = {plain(value)}"])


@cli.command("doctor")
@click.option("--repair", is_flag=True, help="Mend what can be mended.")
@json_option
@with_store
def doctor_command(home: Home, store: Store, repair: bool, as_json: bool) -> int:
    """Look for what is wrong with the queue; exit 1 where something is."""
    if repair:
        repair_home(home, store)
    found = list(findings(home, store))
    surroundings = f"SQLite {sqlite_version()}, {free_bytes(home.path) >> 20} MiB free in {printable(home.path)}"
    answer(as_json, {"ok": not found, "problems": found}, [surroundings, *(found or ["all is well"])])
    return int(bool(found))


@cli.command("backup")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--restore", is_flag=True, help="Replace the queue by the copy; all workers must be stopped.")
@json_option
@with_store
def backup_command(home: Home, store: Store, file: str, restore: bool, as_json: bool) -> None:
    """Copy the queue to a file while workers run, or restore it from one."""
    refuse_own(home, here(file, "name the file with its whole path"))
    if restore:
        restore_copy(home, store, require_file(file))
    else:
        save_copy(store, file)
    count = count_jobs(store, echo_err)
    jobs = "" if count is None else f": {number_of(count, 'job')}"
    done = f"{'restored from' if restore else 'saved to'} {printable(file)}{jobs}"
    answer(as_json, {"file": file, "jobs": count}, [done])


@cli.command("metrics")
@click.option("--prometheus", is_flag=True, help="In Prometheus' text format.")
@json_option
@with_store
def metrics_command(home: Home, store: Store, prometheus: bool, as_json: bool) -> None:
    """Show how many jobs completed or died, how long they waited and ran."""
    refuse_both(prometheus and "--prometheus", as_json and "--json")
    if prometheus:
        now = now_ms()
        versions = {"version": __version__, "python": python_version(), "sqlite": sqlite_version()}
        oldest = store.statistics.oldest_waiting(now)
        echo(prometheus_lines(overview(home, store), store.statistics.tallies(), oldest, now, versions))
        return
    found = metrics_json(store.queries.counts(), store.statistics.times(), store.statistics.tallies())
    answer(as_json, found, shown_here(metrics_lines(found)))


def shown_here(lines: Iterable[str]) -> Iterator[str]:
    """Lines without the emoji that this output cannot show."""
    encoding = sys.stdout.encoding or "ascii"
    for line in lines:
        yield line.encode(encoding, "ignore").decode(encoding).lstrip()


# Each script asks queuectl for what may stand at the cursor, in the way that click answers, and hands it to its shell.
# click has such scripts too, but with those no shell completes `--after=a`: bash makes three words of it, and zsh and
# fish would replace all of it by the value.
_SCRIPTS = {
    "bash": r"""_queuectl_completion() {
    local IFS=$'\n' words=() cword=$COMP_CWORD i completion type value
    for ((i = 0; i < ${#COMP_WORDS[@]}; i++)); do
        if [[ ${COMP_WORDS[i]} == = && $i -lt $COMP_CWORD && ${COMP_WORDS[i - 1]} == --?* ]]; then
            ((cword--))
        else
            words+=("${COMP_WORDS[i]}")
        fi
    done
    COMPREPLY=()
    for completion in $(COMP_WORDS="${words[*]}" COMP_CWORD=$cword _QUEUECTL_COMPLETE=bash_complete "$1"); do
        IFS=, read -r type value <<< "$completion"
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done
}
complete -o nosort -F _queuectl_completion queuectl
""",
    "zsh": r"""#compdef queuectl
_queuectl_completion() {
    local -a response plain described
    local type key description
    response=("${(@f)$(COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT - 1)) _QUEUECTL_COMPLETE=zsh_complete queuectl)}")
    [[ ${words[CURRENT]} == --*=* ]] && compset -P 1 '*='
    for type key description in $response; do
        case $type in
            dir) _path_files -/ ;;
            file) _path_files -f ;;
            plain) if [[ $description == _ ]]; then plain+=("$key"); else described+=("$key:$description"); fi ;;
        esac
    done
    (( $#described )) && _describe -V unsorted described -U -i "$IPREFIX"
    (( $#plain )) && compadd -U -i "$IPREFIX" -V unsorted -a plain
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _queuectl_completion "$@"
else
    compdef _queuectl_completion queuectl
fi
""",
    "fish": r"""function _queuectl_completion
    set -l option (string match -r -- '^--[^=]+=' (commandline -ct))
    set -lx COMP_WORDS (commandline -cp)
    set -lx COMP_CWORD (commandline -ct)
    for completion in (_QUEUECTL_COMPLETE=fish_complete queuectl)
        set -l parts (string split -m 1 , -- $completion)
        switch $parts[1]
            case dir
                set parts '' (__fish_complete_directories $parts[2])
            case file
                set parts '' (__fish_complete_path $parts[2])
        end
        for value in $parts[2..-1]
            echo "$option$value"
        end
    end
end
complete --no-files --command queuectl --arguments '(_queuectl_completion)'
""",
}


@cli.command("completion")
@click.argument("shell", type=click.Choice(list(_SCRIPTS)))
def completion_command(shell: str) -> None:
    """Print the completion script of a shell."""
    click.echo(_SCRIPTS[shell], nl=False)


@cli.command("service")
@click.option("--install", is_flag=True, help="Write it to where systemd looks for it.")
@click.option("--force", is_flag=True, help="With --install: replace another.")
def service_command(install: bool, force: bool) -> None:
    """Print a systemd user unit that runs a worker, or install it."""
    refuse_without("--install", install, force and "--force")
    refuse_without_systemd()
    unit = service_unit(sys.executable, here(__file__), open_home().path)
    if install:
        echo(install_lines(install_unit("queuectl@.service", unit, force), "queuectl@1"))
    else:
        click.echo(unit, nl=False)


def refuse_without_systemd() -> None:
    """QueueError on a system that knows no units."""
    if not HAS_SYSTEMD:
        raise QueueError("units are for systemd on Linux; here let what starts programs run: queuectl worker start")


@cli.command("man")
def man_command() -> None:
    """Print the manual page: queuectl man | man -l -"""
    echo(man_page(__version__, man_entries(click.Context(cli, info_name="queuectl"))))


def man_entries(parent: click.Context) -> Iterator[ManEntry]:
    """Every command below a group, in the order in which they stand there."""
    group = cast(click.Group, parent.command)
    for name, command in group.commands.items():
        context = click.Context(command, parent=parent, info_name=name)
        if isinstance(command, click.Group):
            yield from man_entries(context)
        else:
            usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
            options = (param.get_help_record(context) for param in command.params if isinstance(param, click.Option))
            yield ManEntry(usage, command.help or "", [option for option in options if option])


def main() -> None:
    """The program `queuectl`."""
    with leaving_at_once():
        cli(prog_name="queuectl")


if __name__ == "__main__":
    main()
