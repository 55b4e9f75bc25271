#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["click>=8.1"]
# ///
"""queuectl: a background job queue for commands, in one file, over one SQLite database.

    queuectl enqueue -- make report      # on disk once its id is printed
    queuectl worker start --count 4      # four processes that outlive the terminal
    queuectl status                      # is it working, and what should I do

What makes it right:

1. `jobs` is the truth. A state changes only inside a transaction of the store, and every
   change that ends an attempt names its worker and its attempt: a late one changes nothing.
2. A worker lives exactly as long as its process holds a lock, which the system drops with it.
   Neither a process id alone nor elapsed time is ever taken for life or death.
3. A dead worker's job is tried again only after what it left running has been ended, found by
   the number that every process of an attempt inherits. What cannot be ended keeps it waiting.
4. A worker that cannot record a result keeps it and tries again; it never runs the command
   a second time for it.

The file, from top to bottom; a section uses only those above it:

    errors          what can go wrong, and the exit code of each
    text            values to words, and words to values
    model           states, jobs, attempts, and the rows that others pass about
    fields          what input is legal, and how a command line names it
    templates       many jobs from one line: items, places, quoting for a shell; pure
    settings        typed configuration, and when a failed job runs again
    views           jobs and counts to text or JSON; pure
    schema          migrations, append-only
    database        the connection: transactions, waiting, durability; all of sqlite3
    store           what a queue is, by noun: all SQL
    platform        every difference between systems: spawn, end a tree, wait, wake
    home            the home on disk, the environment, the terminal
    attempts        one attempt, from command to outcome; logs and hooks
    worker          claim, run, record
    control         starting and stopping workers, cancelling, waiting, following
    commands        click, and nothing else knows click
"""

from __future__ import annotations

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, BinaryIO, Literal, NamedTuple, TextIO, TypeVar, cast

try:
    import click
except ModuleNotFoundError:
    sys.exit("Error: queuectl needs click, which this Python does not have; install it: python3 -m pip install click")

__version__ = "1.0.0"

WAIT_REPORT_S = 1.0  # how often a command that waits for workers tells what it waits for
END_POLL_S = 1.0  # how often a worker tries to end what it could not end
POLL_S = 0.25  # poll interval of a worker while its job runs
DUTY_S = 1.0  # how often a worker does its duties; an idle one of n polls every n times that,
MOST_IDLE_POLL_S = 10.0  # and at least this often
MOST_RECOVERY_PAUSE_S = 10.0  # between two tries to end what a dead worker left
HOOK_TIMEOUT_S = 30.0  # how long a hook may run
BUSY_TIMEOUT_S = 30.0  # how long a command waits for a database that another program holds
WORKER_BUSY_TIMEOUT_S = 5.0  # the same for a worker, which then tries again
BUSY_PAUSES_S = (0.0002, 0.004)  # between two tries for a busy lock: at first, and at most; it doubles
WRITE_GATE_S = 0.25  # how long a worker waits at the write gate before it goes ahead
PRUNE_PAUSE_S = 0.01  # between two transactions of `prune`, in which others write
RESTORE_TRIES = 5  # of a restore while others enqueue
WAIT_POLL_S = 0.02  # poll interval of a command that waits
LIMITED_POLL_S = 0.02  # poll interval of an attempt whose output is limited
LOG_BLOCK = 1 << 20  # bytes of a log that are read at a time, and the longest line that is folded
LEAST_CUT_BYTES = 4096  # that are left out at a time while the command writes: more than the line that says so
CUT_TRIES = 20  # of moving what is appended while a log is shortened
SEAL_BYTES = 64  # of a log, by which it is known whether its command has emptied it
WATCHED_SLOTS = 16  # workers that watch their spool: a user has 128 watchers in all
FOLLOW_POLL_S = 0.1  # poll interval of `logs --follow`
PAGE_BYTES = 2048  # a job's step changes six or seven pages, and the WAL takes them whole
CHECKPOINT_CHANCE = 1 / 1500  # of a worker's steps: about 20 MB of the WAL, however many workers there are
WORKER_CHECKPOINT_PAGES = 32_000  # of the WAL at which a checkpoint comes whatever chance says, in the middle of a step
BUCKETS_S = (0.01, 0.1, 1, 10, 60, 600, 3600, 86400)  # of the histograms of wait and run time
WORKER_CACHE_KIB = 512  # a worker looks at few pages; it does not grow with the queue
LIST_ROWS = 100  # rows that a table shows unless told
LOW_DISK_BYTES = 100 << 20  # where `doctor` begins to worry
MAX_COMMAND_BYTES = 128 * 1024
MAX_ARRAY = 10_000_000  # numbers of one `enqueue --array`
MAX_DELAY_S = 100 * 366 * 86_400  # of a job; the moment it leads to must have a date
MAX_SECONDS = 253_402_300_799  # 9999-12-31, the last day that datetime knows
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
OPEN = (*WAITING, State.PROCESSING)
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

Spec = dict[str, Any]  # the fields of a job to be, checked; Store._as_columns makes columns of them
_Check = Callable[[Any], Any]
_DEVICE = re.compile(r"(?i)(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?")


def _text(value: Any) -> str:
    """A string that a command line, a file name and the database can all hold."""
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
    """A name that is also a file name everywhere: Windows keeps some for devices, with any ending."""
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
    """Unix seconds or ISO 8601 (without a zone: local time) to milliseconds since 1970."""
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
    """The seconds that an option of a command names; for ever where it is not given."""
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
    """A field that `enqueue` takes: how its value is checked, how its option is read."""

    check: _Check
    help: str
    parse: Callable[[Any], Any] = str
    kind: str = "one"  # of option: "one", "many" or "flag"
    metavar: str = "TEXT"


FIELDS = {
    "id": Field(_id, "Its name; made up where absent.", metavar="ID"),
    "command": Field(_command, "A line for the shell, or a program and its arguments."),
    "priority": Field(_integer(-(2**31), 2**31 - 1), "Higher runs first; default 0.", parse_number, metavar="N"),
    "max_retries": Field(_integer(0, 2**31 - 1), "How many retries; default by config.", parse_number, metavar="N"),
    "timeout": Field(_number(0), "Longest attempt, 0 for none; default by config.", parse_duration, metavar="TIME"),
    "run_at": Field(
        _moment, "Not before: ISO 8601, 23:00, tomorrow 6:30, mon 8:00, or Unix seconds.", parse_moment, metavar="WHEN"
    ),
    "delay": Field(_number(0, high=MAX_DELAY_S), "Not before this long from now.", parse_duration, metavar="TIME"),
    "backoff_base": Field(_number(0, above=True), "Wait this ** n after failed attempt n.", parse_number, metavar="N"),
    "queue": Field(_name, "The queue that it waits in; default `default`.", metavar="Q"),
    "tag": Field(_name, "A label to select by.", metavar="T"),
    "key": Field(_nonempty, "One job of this key at a time: another enqueues nothing.", metavar="K"),
    "cwd": Field(_nonempty, "The directory that it runs in.", metavar="DIR"),
    "env": Field(_environment, "A variable for it; K alone: as it is here.", _parse_environment, "many", "K=V"),
    "after": Field(_list_of(_id, "ids"), "Start only once this job has completed.", list, "many", "ID"),
    "hold": Field(_flag, "Wait until `release`.", bool, "flag"),
    "on_lost": Field(_choice(*ON_LOST), "If its worker dies: retry, or dead.", metavar="WHAT"),
    "ok_codes": Field(_codes, "Exit codes that complete it, like 3,4.", _parse_codes, "many", "CODES"),
    "no_retry_codes": Field(_codes, "Exit codes that make it dead at once.", _parse_codes, "many", "CODES"),
    "snooze": Field(_flag, "Exit code 75: back for its backoff, the attempt not counted.", bool, "flag"),
}


BLANK: dict[str, Any] = dict.fromkeys(FIELDS) | {  # what holds where nothing is said
    "priority": 0, "queue": "default", "hold": False, "on_lost": "retry", "snooze": False,
}  # fmt: skip
STORED = [name for name in FIELDS if name != "delay"]  # each is a column of `jobs`
CLEARABLE = [name for name in STORED if name not in ("id", "command", "cwd")]


def check_field(name: str, value: Any) -> Any:
    """The value that a field holds, from what JSON gave. BadInput says what is wrong with it."""
    if name not in FIELDS:
        raise BadInput(f"unknown field {printable(name)!r}{nearest(name, FIELDS)}")
    try:
        return FIELDS[name].check(value)
    except BadInput as error:
        raise BadInput(f"field {name!r} {error}") from None


def check_selection(which: Selection) -> Selection:
    """The same; BadInput for ids beside another choice, and for a tag or a queue that no job can have."""
    if which.ids and which.is_filter:
        raise BadInput("name jobs by id, or choose them with --tag, --queue, --state or --all: not both")
    for name, value in (("tag", which.tag), ("queue", which.queue)):
        if value is not None:
            check_field(name, value)
    return which


def limited_to(which: Selection, states: Sequence[State]) -> Selection:
    """Those of a choice without ids that are in one of the states; NOTHING stays nothing."""
    if which == NOTHING:
        return which
    return which._replace(states=[state for state in states if which.states is None or state in which.states])


def check_fields(fields: Mapping[str, Any], now: int) -> Spec:
    """The spec that these fields make; `delay` becomes a `run_at` that many seconds after `now` (ms).

    A clock time in `run_at` is the next one after `now`. BadInput names the field that is wrong.
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
    """The spec of a whole job: of a JSON object, and of what holds where it says nothing."""
    if not isinstance(given, dict):
        raise BadInput('a job must be a JSON object like {"command": "echo hello"}')
    spec = check_fields({**(defaults or {}), **given}, now)
    if "command" not in spec:
        raise BadInput("field 'command' is missing")
    return spec


def parse_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the options of a command line name, as JSON would name them."""
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
    """The specs of JSON Lines, each with the name of its line; blank lines are passed over."""
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield f"line {number}: ", check_job(parse_job(text), now, defaults)
        except UnicodeDecodeError:
            raise BadInput(f"line {number}: is not UTF-8") from None
        except BadInput as error:
            raise BadInput(f"line {number}: {error}") from None


_FACTS = (
    "state", "attempts", "created_at", "updated_at", "started_at", "finished_at", "exit_code", "error", "worker",
)  # fmt: skip
JSON_FIELDS = (*FIELDS, *_FACTS)  # of a job


def job_json(job: Job) -> dict[str, Any]:
    """A job as JSON shows it."""
    shown = {name: getattr(job, name, None) for name in JSON_FIELDS}  # no job has a delay: it has become a run_at
    for name in ("run_at", "created_at", "updated_at", "started_at", "finished_at"):
        shown[name] = iso_time(shown[name])
    return shown | {"state": job.state.value}


def parse_columns(text: str) -> list[str]:
    """The names of JSON_FIELDS in a list like `id,state`; BadInput for any other word."""
    names = [word.strip().replace("-", "_") for word in text.split(",")]
    for name in names:
        if name not in JSON_FIELDS:
            raise BadInput(f"--columns knows no field {printable(name)!r}{nearest(name, JSON_FIELDS)}")
    return names


# ======================================================================== templates

Shell = Literal["sh", "cmd"]  # what runs a command that is a line; both are handled on every system
ITEM_FIELDS = ("id", "tag", "cwd", "key", "queue")  # places in these stand for the item, and in `env` and the command
_ITEM, _INDEX = "QUEUECTL_ITEM", "QUEUECTL_INDEX"
_PLACE = "\0"  # stands for a place while a line is read: no command line can hold it


class Item(NamedTuple):
    """One of the many that a call of `enqueue` makes jobs of."""

    value: str
    number: int  # from 1
    cells: Sequence[str] = ()  # of its row, where it comes from a CSV file


_Get = Callable[[Item], str]
_Quote = Callable[[str], str]


def _paths(shell: Shell) -> Any:
    """The module that knows the file names of a shell's system."""
    import ntpath
    import posixpath

    return posixpath if shell == "sh" else ntpath


def _last_part(path: str, paths: Any) -> str:
    return str(paths.basename(path.rstrip(f"/{paths.sep}")) or path)


def _directory(path: str, paths: Any) -> str:
    return str(paths.dirname(path.rstrip(f"/{paths.sep}") or path) or ".")


def _place(name: str, columns: Sequence[str], shell: Shell) -> _Get:
    """What stands at the place `{name}`, given an item."""
    paths = _paths(shell)
    known: dict[str, _Get] = {
        "": lambda item: item.value,
        ".": lambda item: str(paths.splitext(item.value)[0]),
        "/": lambda item: _last_part(item.value, paths),
        "//": lambda item: _directory(item.value, paths),
        "/.": lambda item: str(paths.splitext(_last_part(item.value, paths))[0]),
        "#": lambda item: str(item.number),
    }
    if name in known:
        return known[name]
    column = columns.index(name)
    return lambda item: item.cells[column]


def _places(columns: Sequence[str]) -> re.Pattern[str]:
    """Finds the places in a text, and the braces that are written twice."""
    names = "|".join(re.escape(name) for name in columns if name)
    return re.compile(r"\{\{|\}\}|\{(|\.|//?|/\.|#" + (f"|{names}" if names else "") + r")\}")


class Template:
    """A text with places for an item: compiled once, filled for each item.

    With `line` it is a line for the shell, and every value is quoted as its place demands. BadInput where a place
    stands at which nothing can be quoted safely.
    """

    def __init__(self, text: str, columns: Sequence[str], shell: Shell, *, line: bool = False) -> None:
        if _PLACE in text:
            raise BadInput("must not contain a NUL character")
        self._gets: list[_Get] = []

        def keep(match: re.Match[str]) -> str:
            if match[1] is None:
                return match[0][0]
            self._gets.append(_place(match[1], columns, shell))
            return _PLACE

        text = _places(columns).sub(keep, text)
        if line:
            self._gets = [
                functools.partial(_quoted, quote, get)
                for quote, get in zip(_quotes_of(text, shell), self._gets, strict=True)
            ]
        self._format = text.replace("%", "%%").replace(_PLACE, "%s")

        self.has_places = bool(self._gets)
        self.text = text  # with marks where the places are

    def fill(self, item: Item) -> str:
        """The text for an item."""
        return self._format % tuple([get(item) for get in self._gets])


def _quoted(quote: _Quote, get: _Get, item: Item) -> str:
    return quote(get(item))


# ---- quoting for a shell

_SH_BARE = re.compile(r"[A-Za-z0-9_@%+:./-]+")
_SH_RESERVED = re.compile("if|then|else|elif|fi|do|done|case|esac|while|until|for|in|function|select|time|coproc")
_CMD_BARE = re.compile(r"[A-Za-z0-9_@+:.\\/~-]+")
_CMD_SPECIAL = re.compile(r'[%!^"&|<>\x00-\x1f]')


def _sh_text(value: str) -> str:
    return "'" + value.replace("'", "'\"'\"'") + "'"


def quote_sh(value: str) -> str:
    """A value as one word of a line for /bin/sh."""
    is_plain = _SH_BARE.fullmatch(value) and not _SH_RESERVED.fullmatch(value)
    return value if is_plain else _sh_text(value)


def _in_double_quotes(value: str) -> str:
    return re.sub(r'([\\"$`])', r"\\\1", value)


def _in_single_quotes(value: str) -> str:
    return value.replace("'", "'\\''")


def _refuse_special(value: str) -> str:
    """BadInput for a value that cmd.exe would change or take apart, even in quotes."""
    if found := _CMD_SPECIAL.search(value):
        raise BadInput(f"{printable(value)!r} holds {printable(found[0])!r}, which cannot be quoted in a line for "
                       "cmd.exe; give the command as several words")  # fmt: skip
    return value


def quote_cmd(value: str) -> str:
    """A value as one word of a line for cmd.exe."""
    if _CMD_BARE.fullmatch(_refuse_special(value)) and not value.endswith("\\"):
        return value
    ending = len(value) - len(value.rstrip("\\"))  # programs take a backslash before a quote for an escape
    return f'"{value}{ending * chr(92)}"'


def _in_cmd_quotes(value: str) -> str:
    if value.endswith("\\"):
        raise BadInput(f"{printable(value)!r} ends in a backslash; take the quotes round its place away")
    return _refuse_special(value)


class _Grammar(NamedTuple):
    """How a shell reads a line, as far as it is certain what quoting holds at a place."""

    token: re.Pattern[str]  # a place is quoted as the name of the group says; what matches no token ends the certainty
    quotes: Mapping[str, _Quote]
    runs: re.Pattern[str]  # the end of a text behind which a word is run as a line of its own


_RUNS_SH = r"sh(?:\.exe)?['\"]?\s+(?:-\S+\s+)*-\w*c\s+(?:\$\S*\s+)*\S*$"
_RUNS_POWERSHELL = r"(?i:(?:^|[\s\\/])(?:powershell|pwsh)(?:\.exe)?['\"]?\s+(?!.*-f(?:ile)?\s)[^&|\0]*$)"
# Quotes round a place may hold only what file names are made of: what stands in others may be a line for another
# shell (`sh -c "cat {}"`, `ssh host "cat {}"`), which would read the value once more.
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
        {"single": _in_single_quotes, "double": _in_double_quotes, "forced": _sh_text, "bare": quote_sh},
        re.compile(rf"{_RUNS_SH}|(?<![\w./-])(?:eval|trap|let|alias|declare|typeset|unset|read|test\s.*-v|"
                   rf"\[\s.*-v)\s(?:[^;&|\n<>\\]|\\[\s\S])*$|{_RUNS_POWERSHELL}"),
    ),
    "cmd": _Grammar(
        re.compile(_CMD_TOKEN, re.X | re.A | re.S), {"inside": _in_cmd_quotes, "bare": quote_cmd},
        re.compile(f"{_RUNS_SH}|{_RUNS_POWERSHELL}"),
    ),
}  # fmt: skip


def _shown(text: str) -> str:
    return printable(text[-30:].replace(_PLACE, "{}") + "{}")


def _refuse_if_run(before: str, runs: re.Pattern[str]) -> None:
    """BadInput where what stands behind this text is a command line to another shell."""
    if runs.search(before):
        raise BadInput(f"what stands for the braces in {_shown(before)!r} would be run as a command line; "
                       """pass it as an argument, like: sh -c 'cat "$1"' sh {}""")  # fmt: skip


def _quotes_of(line: str, shell: Shell) -> list[_Quote]:
    """For each place in a line for the shell: how what stands there is quoted."""
    grammar = _GRAMMARS[shell]
    found: list[_Quote] = []
    at = 0
    while _PLACE in line[at:]:
        token = grammar.token.match(line, at)
        if token is None:
            raise BadInput(f"a value cannot be quoted safely in {_shown(line[: line.index(_PLACE, at)])!r}; write its "
                           "braces as a word or a part of one, outside of quotes, comments, `...`, ${...}, $((...)) "
                           "and here-documents, or give the command as several words")  # fmt: skip
        if _PLACE in token[0]:
            _refuse_if_run(line[: at + token[0].index(_PLACE)], grammar.runs)
            found += [grammar.quotes[token.lastgroup or ""]] * token[0].count(_PLACE)
        at = token.end()
    return found


# ---- the command and the fields

_OPEN_END = re.compile(r"[;&|({`\\^!]$")  # what would be added behind it is a command, or none


def _line_template(line: str, columns: Sequence[str], shell: Shell) -> Template:
    """A line for the shell; the item is its last word where it says nothing of one."""
    template = Template(line, columns, shell, line=True)
    if template.has_places:
        return template
    line = line.rstrip()
    if not line or _OPEN_END.search(line):
        raise BadInput("say where the item stands in this line: {}")
    return Template(f"{line} {{}}", columns, shell, line=True)


def _word_templates(words: Sequence[str], columns: Sequence[str], shell: Shell) -> list[Template]:
    """The words of a command that no shell reads; the item is the last where they say nothing of one."""
    templates = [Template(word, columns, shell) for word in words]
    if not any(template.has_places for template in templates):
        return [*templates, Template("{}", columns, shell)]
    for at, template in enumerate(templates):
        if template.has_places and at:
            _refuse_if_run(" ".join(words[:at]) + " ", re.compile(f"{_RUNS_SH}|{_RUNS_POWERSHELL}"))
    return templates


def _command_filler(
    command: str | list[str] | None, columns: Sequence[str], shell: Shell
) -> Callable[[Item], str | list[str]]:
    """What makes the command for an item; without a command the item is one itself."""
    if command is None:
        return lambda item: item.value
    if isinstance(command, str):
        return _line_template(command, columns, shell).fill
    check: _Quote = str
    if shell == "cmd" and command[0].lower().endswith((".bat", ".cmd")):
        check = _refuse_special  # cmd.exe reads their arguments
    words = [word.fill if word.has_places else word.text for word in _word_templates(command, columns, shell)]
    return lambda item: [word if isinstance(word, str) else check(word(item)) for word in words]


def specs_of_items(
    items: Iterable[Item], columns: Sequence[str], command: str | list[str] | None, fields: Mapping[str, Any],
    shell: Shell, now: int,
) -> Iterator[tuple[str, Spec]]:  # fmt: skip
    """The spec of a job for each item, with what an error about it begins with.

    What is the same for all is checked before the first item is read.
    """
    templates = {name: Template(fields[name], columns, shell) for name in ITEM_FIELDS if name in fields}
    texts = {name: template for name, template in templates.items() if template.has_places}
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
    """What makes the variables for an item; their names have been checked."""
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


def _pieces(file: BinaryIO, end: bytes) -> Iterator[bytes]:
    """What stands between the ends of a file's items, in bounded memory; QueueError for an endless one."""
    rest = b""
    while block := file.read(1 << 16):
        *whole, rest = (rest + block).split(end)
        yield from whole
        if len(rest) > 1 << 20:
            raise BadInput("a line of more than 1 MiB is no item; is this the right file?")
    if rest:
        yield rest


def _texts(file: BinaryIO, end: bytes, what: str) -> Iterator[str]:
    """The same as text; BadInput names the number of what is not UTF-8."""
    for number, piece in enumerate(_pieces(file, end), 1):
        try:
            yield piece.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise BadInput(f"{what} {number}: is not valid UTF-8") from None


def read_items(file: BinaryIO, *, null: bool = False) -> Iterator[Item]:
    """An item for each line that is not blank; with `null` for each that ends in NUL."""
    if null:
        values: Iterable[str] = filter(None, _texts(file, b"\0", "item"))
    else:
        values = (line for text in _texts(file, b"\n", "line") if (line := text.removesuffix("\r")).strip())
    return (Item(value, number) for number, value in enumerate(values, 1))


def read_rows(file: BinaryIO) -> tuple[list[str], Iterator[Item]]:
    """The names of the columns of a CSV file, and an item for each row below them: its cells joined by commas."""
    import csv

    reader = csv.reader((f"{text}\n" for text in _texts(file, b"\n", "line")), strict=True)

    def rows() -> Iterator[list[str]]:
        try:
            yield from filter(any, reader)
        except csv.Error as error:
            raise BadInput(f"line {reader.line_num}: is not CSV ({error})") from None

    found = rows()
    columns = [name.strip() for name in next(found, [])]
    if not columns:
        raise BadInput("the CSV file is empty; its first line must name the columns")
    twice = next((name for name in columns if name and columns.count(name) > 1), None)
    if twice:
        raise BadInput(f"line 1: names the column {printable(twice)!r} twice")
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
    """An item for each number of an array such as `1-100`, `1-10:2` or `1,3,7-9`; BadInput where it is none."""
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


class Database:
    """A connection to the database: transactions, waiting for others, durability, and the driver's errors made ours.

    What a command commits is on disk before it returns (`synchronous=FULL`). With `durable=False`, for workers,
    a power cut may take back the newest steps but leaves none half done.
    """

    def __init__(self, path: str, busy_timeout_s: float = BUSY_TIMEOUT_S, *, durable: bool = True) -> None:
        if sqlite3.sqlite_version_info < (3, 35):
            raise QueueError(f"needs SQLite 3.35 or later; this Python has {sqlite3.sqlite_version}")
        self.path, self.busy_timeout_s = path, busy_timeout_s
        self.commits = 0  # of this connection, without those that migrate the schema
        try:
            self._connection = sqlite3.connect(path, timeout=0, isolation_level=None)
        except (sqlite3.Error, UnicodeError) as error:
            raise _domain_error(path, error) from error
        self._writing = self._transaction("BEGIN IMMEDIATE", self._commit)
        self._staging = self._transaction("BEGIN", functools.partial(self.run, "COMMIT"))
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

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

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

    def rows(self, sql: str) -> Iterator[Any]:
        """Yield the rows of a statement one by one, for large results."""
        self._connection.text_factory = _any_text  # a generator cannot start over as `_until_free` does
        try:
            for row in self._connection.execute(sql):  # noqa: UP028 (that would close it, after the database perhaps)
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

    def set_savepoint(self) -> None:
        """Remember what the open transaction has done so far."""
        self.run("SAVEPOINT here")

    def undo_to_savepoint(self) -> None:
        """Undo what the open transaction has done since its savepoint, which stays."""
        self.run("ROLLBACK TO here")

    # ---- change notice and durability

    def commits_seen(self) -> int:
        """Return a number that changes whenever another connection commits."""
        return int(self.one("PRAGMA data_version")[0])

    def checkpoint(self) -> None:
        """Copy committed pages from the WAL into the database. This waits for the disk, and blocks nobody."""
        self.run("PRAGMA wal_checkpoint(PASSIVE)")

    def wait_for_disk(self, on: bool) -> None:
        """Choose whether a commit waits for the disk."""
        self.run(f"PRAGMA synchronous = {'FULL' if on else 'NORMAL'}")

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


def _json_or_null(value: Sequence[Any] | None) -> str | None:
    return None if value is None else _to_json(value)


def _as_columns(spec: Spec) -> dict[str, Any]:
    """Return the column values of a spec."""
    values = dict(spec)
    for name in JSON_COLUMNS:
        if values.get(name) is not None:
            values[name] = _to_json(values[name])
    return values


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
        rows = self._db.all(
            f"SELECT * FROM ({_SELECT}"
            """WHERE (:states IS NULL OR state IN (SELECT value FROM json_each(:states)))
                AND (:tag IS NULL OR tag = :tag) AND (:queue IS NULL OR queue = :queue)
                ORDER BY seq DESC LIMIT :limit)"""
            f" ORDER BY {SORTS[sort.removeprefix('-')]} {'DESC' if sort.startswith('-') else ''}, seq",
            states=_json_or_null(where.states),
            tag=where.tag, queue=where.queue, limit=-1 if limit is None else limit,
        )  # fmt: skip
        return [readable_job(row) for row in rows]

    def not_completed(self, seqs: Sequence[int] | None, limit: int) -> list[Job]:
        """Return the first dead or cancelled jobs among these; None means all jobs."""
        rows = self._db.all(
            f"""{_SELECT} WHERE (:seqs IS NULL OR seq IN (SELECT value FROM json_each(:seqs)))
                AND {IS_HOPELESS} ORDER BY seq LIMIT :limit""",
            seqs=_json_or_null(seqs), limit=limit,
        )  # fmt: skip
        return [readable_job(row) for row in rows]

    def next_of(self, seqs: Sequence[int] | None) -> Job | None:
        """Return the job that these (None: all) wait for first: a running one, or the oldest that is not blocked."""
        if seqs is None:
            oldest = "SELECT min(seq) FROM jobs WHERE state = :state"
            firsts = (self._db.one(oldest, state=state.value) for state in OPEN)
            seqs = [first[0] for first in firsts if first]
        row = self._db.one(
            f"""WITH RECURSIVE needed(seq) AS (SELECT value FROM json_each(:seqs)
                UNION SELECT parent FROM dependencies JOIN needed ON child = needed.seq)
            {_SELECT} WHERE seq IN needed AND {IS_OPEN} AND blockers = 0
            ORDER BY state = 'processing' DESC, seq LIMIT 1""",
            seqs=_to_json(seqs),
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

    def chosen(self, which: Selection) -> list[Job]:
        """Return the selected jobs in any state. Raise NotFound for an id that no job has."""
        if which == NOTHING:
            raise BadInput("name jobs by id, or choose them with --tag, --queue, --state or --all")
        if not check_selection(which).ids:
            return self.jobs(which)
        found = (job or self.get(id) for id, job in zip(which.ids, self.named(which.ids), strict=True))
        return list({job.seq: job for job in found}.values())

    def choose(self, which: Selection, states: Sequence[State], verb: str) -> list[Job]:
        """Return the selected jobs that are in one of the states. Raise QueueError if a named job is not."""
        chosen = self.chosen(which if which.ids else limited_to(which, states))
        for job in chosen:
            if job.state not in states:
                raise QueueError(f"job {job.id} is {job.state.value}: it cannot be {verb}")
        return chosen

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

    def counts(self, seqs: Sequence[int] | None = None) -> dict[State, int]:
        """Count these jobs by state. None means all jobs, which takes constant time."""
        these = "(SELECT state, 1 AS n FROM jobs WHERE seq IN (SELECT value FROM json_each(:seqs)))"
        source = "counts" if seqs is None else these
        rows = self._db.all(f"SELECT state, sum(n) FROM {source} GROUP BY state", seqs=_to_json(seqs or ()))
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

    def wait_reasons(
        self, jobs: Sequence[Job], workers: list[WorkerRow], queues: Sequence[QueueRow], settings: Settings
    ) -> list[WaitReasons]:
        """Return what keeps each of these jobs from running. `workers` are those that live."""
        rows_of = {row.name: row for row in queues}
        nothing = QueueRow(
            "", False, None, dict.fromkeys(State, 0)
        )  # of a queue whose last job was removed a moment ago
        rows = [rows_of.get(job.queue, nothing) for job in jobs]
        return [
            WaitReasons(
                self._missing_parents(job) if job.blockers and job.state in WAITING else [],
                row.paused, row.max_running, row.counts[State.PROCESSING], workers,
                self.revival(job) if job.blockers and job.state is State.DEAD else Revival(),
                self.key_holder(job.key) if job.state is State.DEAD else None,
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

        Tried again, they bring back what died with them.
        """
        rows = self._db.all(
            f"""WITH RECURSIVE above(seq) AS (SELECT :seq UNION
                SELECT parent FROM dependencies JOIN above ON child = above.seq
                    JOIN jobs ON jobs.seq = parent WHERE {IS_HOPELESS}),
            links AS (SELECT child, jobs.seq IS NULL AS is_removed FROM dependencies
                LEFT JOIN jobs ON jobs.seq = parent WHERE child IN above AND (jobs.seq IS NULL OR {IS_HOPELESS}))
            SELECT id, state, seq IN (SELECT child FROM links WHERE is_removed) FROM jobs
                WHERE seq IN above AND seq NOT IN (SELECT child FROM links WHERE NOT is_removed) ORDER BY seq""",
            seq=job.seq,
        )
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
            first = self._db.all(
                f"{_ANSWERED} ORDER BY n LIMIT {LIST_ROWS}"
            )  # read before the commit, so that no error can follow it
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
        self._insert_where("key IS NULL", last=last, now=now, tag=tag)
        for n, key in self._db.all("SELECT n, key FROM staged WHERE is_new AND key IS NOT NULL ORDER BY n"):
            holder = self._queries.key_holder(key)
            if holder:
                self._db.run("UPDATE staged SET is_new = 0, id = :id WHERE n = :n", n=n, id=holder)
            else:
                self._insert_where("n = :n", last=last, now=now, tag=tag, n=n)
        for n, id, after, origin in self._db.all(
            "SELECT n, id, after, origin FROM staged WHERE is_new AND after IS NOT NULL ORDER BY n"
        ):
            try:
                self.add_dependencies(last + n, id, json.loads(after), now)
            except QueueError as error:
                raise type(error)(f"{origin}{error}") from None

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

    def _insert_where(self, condition: str, **values: Any) -> None:
        columns = ", ".join(name for name in _STAGED if name != "tag")
        self._db.run(
            f"""INSERT INTO jobs (seq, due_at, updated_at, tag, {columns})
                SELECT :last + n, CASE WHEN run_at > :now THEN run_at END, :now, coalesce(tag, :tag), {columns}
                FROM staged WHERE is_new AND {condition} ORDER BY n""",
            **values,
        )

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

    def add_dependencies(self, seq: int, child: str, parents: Sequence[str], now: int) -> None:
        """Add the parents of a job. The job is dead at once if one of them can never complete."""
        found = [self._queries.get(parent) for parent in parents]
        for parent in found:
            if parent.seq == seq or self._db.one(
                """WITH RECURSIVE below(seq) AS (SELECT :seq
                    UNION SELECT child FROM dependencies JOIN below ON parent = below.seq)
                SELECT 1 FROM below WHERE seq = :parent""",
                seq=seq, parent=parent.seq,
            ):  # fmt: skip
                raise BadInput(f"job {child} cannot wait for {parent.id}, which waits for it")
            self._db.run("INSERT OR IGNORE INTO dependencies VALUES (:parent, :child)", parent=parent.seq, child=seq)
        for parent in found:
            if parent.state in HOPELESS:
                self.fail_dependents(parent, now)

    def fail_dependents(self, parent: Job, now: int) -> None:
        """Make every waiting descendant of a job dead, because that job will never complete."""
        self._db.run(
            f"""WITH RECURSIVE below(seq) AS (SELECT child FROM dependencies WHERE parent = :parent
                UNION SELECT child FROM dependencies JOIN below ON parent = below.seq)
            UPDATE jobs SET state = 'dead', failed_parent = :parent, error = :error,
                updated_at = :now, finished_at = :now
            WHERE seq IN below AND {IS_WAITING}""",
            parent=parent.seq, error=f"waited for {parent.id}, which is {parent.state.value}", now=now,
        )  # fmt: skip

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
            self._db.run(
                """UPDATE jobs SET due_at = NULL WHERE due_at IS NOT NULL AND due_at <= :now
                    AND hold = 0 AND blockers = 0""",
                now=now,
            )
            return self._db.one(
                f"""UPDATE jobs SET state = 'processing', attempts = attempts + 1, worker = :worker,
                    started_at = :now, updated_at = :now, exit_code = NULL, error = NULL
                WHERE seq = (SELECT seq FROM claimable
                    WHERE :queues IS NULL OR queue IN (SELECT value FROM json_each(:queues))
                    ORDER BY priority DESC, seq LIMIT 1)
                AND EXISTS (SELECT 1 FROM workers WHERE id = :worker AND stop IS NULL)
                RETURNING {_COLUMNS}""",
                worker=worker, now=now, queues=_json_or_null(queues),
            )  # fmt: skip

    def fail_damaged(self, seq: int, error: str, now: int) -> None:
        """Make a job dead whose row cannot be read: it can never run, and would stand in the way of others."""
        row = self._db.one(
            f"""UPDATE jobs SET state = 'dead', attempts = max(0, attempts - (state = 'processing')), cancelling = 0,
                due_at = NULL, updated_at = :now, finished_at = :now, error = :error
            WHERE seq = :seq RETURNING {_COLUMNS}""",
            seq=seq, now=now, error=error,
        )  # fmt: skip
        self.fail_dependents(readable_job(row), now)

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
                self.fail_dependents(job._replace(state=after.state), now)
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

    def next_due(self) -> int | None:
        """Return when the next job comes due, in milliseconds since 1970."""
        row = self._db.one("SELECT min(due_at) FROM jobs WHERE due_at IS NOT NULL AND hold = 0 AND blockers = 0")
        return cast("int | None", row[0])

    def restart_backoffs(self, now: int) -> None:
        """Restart the backoffs of failed jobs that began at a time which is now in the future."""
        ahead = "SELECT 1 FROM jobs WHERE state = 'failed' AND updated_at > :now LIMIT 1"
        if not self._db.one(ahead, now=now):
            return
        with self._db.writing():
            self._db.run(
                """UPDATE jobs SET due_at = :now + due_at - updated_at, updated_at = :now
                    WHERE state = 'failed' AND updated_at > :now AND due_at > updated_at""",
                now=now,
            )

    def running_jobs(self, worker: int) -> list[Job]:
        """Return the jobs that a worker is running: one at most."""
        rows = self._db.all(_SELECT + "WHERE state = 'processing' AND worker = :worker", worker=worker)
        return [readable_job(row) for row in rows]


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


class Changes:
    """The changes that commands make to stored jobs."""

    def __init__(self, db: Database, jobs: Jobs, queries: Queries, config: Config) -> None:
        self._db, self._jobs, self._queries, self._config = db, jobs, queries, config

    def set_hold(self, which: Selection, hold: bool, now: int) -> list[str]:
        """Hold or release waiting jobs, and return their ids."""
        with self._db.writing():
            chosen = self._queries.choose(which, WAITING, "held" if hold else "released")
            for job in chosen:
                self._db.run(
                    "UPDATE jobs SET hold = :hold, updated_at = :now WHERE seq = :seq", seq=job.seq, hold=hold, now=now
                )
        return [job.id for job in chosen]

    def cancel(self, which: Selection, now: int) -> list[Job]:
        """Cancel waiting jobs, and mark running ones for their workers to end. Return the jobs as they were before.

        A named job that has ended is among them. It does not change.
        """
        with self._db.writing():
            chosen = self._queries.choose(which, OPEN if which.is_filter else list(State), "cancelled")
            for job in chosen:
                if job.state in ENDED:
                    continue
                if job.state is State.PROCESSING:
                    self._db.run("UPDATE jobs SET cancelling = 1 WHERE seq = :seq", seq=job.seq)
                    continue
                self._db.run(
                    f"""UPDATE jobs SET state = 'cancelled', updated_at = :now, finished_at = :now
                    WHERE seq = :seq AND {IS_WAITING}""",
                    seq=job.seq, now=now,
                )  # fmt: skip
            for job in chosen:  # last, so that a selected job that waits for another becomes cancelled and not dead
                if job.state in WAITING:
                    self._jobs.fail_dependents(job._replace(state=State.CANCELLED), now)
        return chosen

    def edit(self, which: Selection, spec: Spec, now: int) -> list[tuple[Job, Job]]:
        """Change fields of waiting and of dead jobs. Dead jobs stay dead. Return each job before and after it."""
        with self._db.writing():
            return self._set_fields(self._queries.choose(which, EDITABLE, "edited"), spec, now)

    def _set_fields(self, chosen: Sequence[Job], spec: Spec, now: int) -> list[tuple[Job, Job]]:
        """Change fields of jobs that do not run. Return each job before and after the change."""
        ran = [job.seq for job in chosen if job.started_at] if {"queue", "run_at"} & spec.keys() else []
        with self._keeping_tallies(ran):
            return [(job, self._edit_one(job, spec, now)) for job in chosen]

    def _edit_one(self, job: Job, spec: Spec, now: int) -> Job:
        if job.state in WAITING and "max_retries" in spec:
            self._refuse_overdrawn(job._replace(max_retries=spec["max_retries"]))
        if "key" in spec and not self._is_key_free(job, spec):
            raise QueueError(f"job {job.id} cannot take key {spec['key']!r}: another bears it")
        values = _as_columns(spec)
        columns = ", ".join(f"{name} = :{name}" for name in values)
        if "run_at" in values and job.state in WAITING:  # clearing it keeps a backoff that is running
            values["due"] = values["run_at"] if (values["run_at"] or 0) > now else None
            columns += ", due_at = CASE WHEN state = 'failed' AND :run_at IS NULL THEN due_at ELSE :due END"
        row = self._db.one(
            f"UPDATE jobs SET {columns}, updated_at = :now WHERE seq = :seq RETURNING {_COLUMNS}",
            **values, seq=job.seq, now=now,
        )  # fmt: skip
        if "after" in spec:
            self._db.run("DELETE FROM dependencies WHERE child = :seq", seq=job.seq)
            self._jobs.add_dependencies(job.seq, job.id, spec["after"] or (), now)
        return readable_job(row)

    def _is_key_free(self, job: Job, spec: Spec) -> bool:
        """Tell whether no other job that has not ended holds the key of a job, or the key that a spec gives it."""
        return self._queries.key_holder(spec.get("key", job.key)) in (None, job.id)

    def _refuse_overdrawn(self, job: Job) -> None:
        """Raise QueueError for a job that has already used more attempts than it would be allowed."""
        if job.attempts > settings_for(job, self._config.settings()).max_retries:
            raise QueueError(f"job {job.id} has no retry left with that: cancel it, or allow {job.attempts} at least")

    def retry_dead(self, which: Selection, now: int, spec: Spec | None = None) -> list[str]:
        """Dead jobs back to `pending`, as `rerun` does it."""
        return self._run_again(which, [State.DEAD], "retried", spec or {}, now)

    def rerun(self, which: Selection, now: int, spec: Spec | None = None) -> list[str]:
        """Jobs that have ended back to `pending` with no attempts made; the ids.

        What died because of them comes back with them. What waits for a completed one, or waits to be retried,
        waits for it again; what runs or has ended stays as it is. The fields of a spec are set first. One whose
        parent can still not complete, or whose key is taken, stays as it was; QueueError where it was named.
        """
        return self._run_again(which, ENDED, "rerun", spec or {}, now)

    def _run_again(self, which: Selection, states: Sequence[State], verb: str, spec: Spec, now: int) -> list[str]:
        with self._db.writing():
            chosen = self._queries.choose(which, states, verb)
            self._db.set_savepoint()
            while left := self._try_to_reopen(chosen, spec, now):
                if which.ids:
                    raise QueueError(self._why_still_ended(left[0], verb, spec))
                self._db.undo_to_savepoint()
                passed_over = {job.seq for job in left}
                chosen = [job for job in chosen if job.seq not in passed_over]
        return [job.id for job in chosen]

    def _try_to_reopen(self, chosen: Sequence[Job], spec: Spec, now: int) -> list[Job]:
        """Bring ended jobs back as far as they can run; those that cannot, as they are then."""
        able = [job for job in chosen if self._is_key_free(job, spec)]
        if spec:  # first for all of them, because one may return to `pending` together with another
            self._set_fields(able, spec, now)
        for job in able:
            self._reopen(job, now)
        for parent in self._hopeless_parents():
            self._jobs.fail_dependents(parent, now)
        return [job for job in self._queries.named([job.id for job in chosen]) if job and job.state in ENDED]

    def _why_still_ended(self, job: Job, verb: str, spec: Spec) -> str:
        if not self._is_key_free(job, spec):
            return f"job {job.id} cannot be {verb}: another of key {spec.get('key', job.key)!r} has not ended"
        if job.failed_parent and self._db.one("SELECT 1 FROM jobs WHERE seq = :seq", seq=job.failed_parent):
            reasons = WaitReasons([], False, None, 0, [], self._queries.revival(job))
            remedy = remedy_of_dead(job, reasons)
            return f"job {job.id} {job.error}: it cannot be {verb} before that; first: {remedy}"
        return f"job {job.id} waits for a job that was removed: it can be {verb} with --clear after"

    def _reopen(self, job: Job, now: int) -> None:
        """Return an ended job, and what died of it, to `pending`, if their keys are free and their parents exist.

        What died of a job that had died of this one is among them: a job can be enqueued after a dead one.
        """
        rows = self._db.all(
            """WITH RECURSIVE below(seq) AS (SELECT :seq
                UNION SELECT child FROM dependencies JOIN below ON parent = below.seq
                    JOIN jobs ON jobs.seq = child WHERE failed_parent IS NOT NULL)
            SELECT seq FROM jobs WHERE seq IN below AND (seq = :seq OR failed_parent IN below) ORDER BY seq""",
            seq=job.seq,
        ) if job.state in HOPELESS else [(job.seq,)]  # fmt: skip
        for row in rows:
            self._db.run(
                f"""UPDATE jobs SET state = 'pending', attempts = 0, failed_parent = NULL, finished_at = NULL,
                    due_at = CASE WHEN run_at > :now THEN run_at END, updated_at = :now,
                    error = CASE WHEN failed_parent IS NULL THEN error END
                WHERE seq = :seq AND {IS_ENDED}
                    AND NOT EXISTS (SELECT 1 FROM jobs AS other WHERE other.key = jobs.key
                        AND other.{IS_OPEN})
                    AND NOT EXISTS (SELECT 1 FROM dependencies WHERE child = jobs.seq
                        AND parent NOT IN (SELECT seq FROM jobs))""",
                seq=row[0], now=now,
            )  # fmt: skip

    def _hopeless_parents(self) -> list[Job]:
        """Return the dead and cancelled jobs that others wait for."""
        rows = self._db.all(
            f"""{_SELECT} WHERE {IS_HOPELESS} AND seq IN (
                SELECT parent FROM dependencies JOIN jobs AS waiting ON waiting.seq = dependencies.child
                WHERE waiting.{IS_WAITING}) ORDER BY seq"""
        )
        return [readable_job(row) for row in rows]

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
                time.sleep(0 if dry_run else PRUNE_PAUSE_S)
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

    def purge_dead(self, which: Selection) -> list[str]:
        """Remove dead jobs, and return their ids. The caller removes their logs."""
        with self._db.writing():
            chosen = self._queries.choose(which, [State.DEAD], "purged")
            self._remove([job.seq for job in chosen])
        return [job.id for job in chosen]

    def _remove(self, seqs: Sequence[int]) -> None:
        """Remove jobs, and keep their contribution to the tallies, which never decrease."""
        with self._keeping_tallies(seqs):
            for seq in seqs:
                self._db.run("DELETE FROM jobs WHERE seq = :seq", seq=seq)

    @contextlib.contextmanager
    def _keeping_tallies(self, seqs: Sequence[int]) -> Iterator[None]:
        """Whatever happens to these jobs inside the block, the tallies stay as they are: a counter never goes down."""
        before = self._queries.tallies_of(seqs)
        yield
        after = self._queries.tallies_of(seqs)
        for name in before | after:
            if value := before.get(name, 0) - after.get(name, 0):
                self._db.run(
                    """INSERT INTO removed_tallies VALUES (:name, :value)
                        ON CONFLICT DO UPDATE SET value = value + :value""",
                    name=name, value=value,
                )  # fmt: skip


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
        ownerless = self._db.all(
            "SELECT id FROM jobs WHERE state = 'processing' AND worker NOT IN (SELECT id FROM workers)"
        )
        mend = "mend it: queuectl doctor --repair"
        return (
            [f"the count of {state} jobs in queue {queue} is off by {n}; {mend}" for queue, state, n in counts]
            + [f"job {id} waits for a wrong number of parents; {mend}" for (id,) in blocked]
            + [f"job {id} is processing with a worker that does not exist; {mend}" for (id,) in ownerless]
            + [f"job {id}: {error}; remove it: queuectl dlq purge {id}" for _, id, _, error in self.damaged_rows()]
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
            self._db.run(
                """UPDATE jobs SET blockers = (SELECT count(*) FROM dependencies LEFT JOIN jobs AS parent
                    ON parent.seq = dependencies.parent WHERE child = jobs.seq AND parent.state IS NOT 'completed')"""
            )
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

    Every change but `prune` is one transaction, or part of the one that is open.
    """

    def __init__(self, db: Database) -> None:
        self.db = db
        self.queries, self.config, self.queues = Queries(db), Config(db), Queues(db)
        self.jobs = Jobs(db, self.queries)
        self.upkeep = Upkeep(db, self.jobs, self.config)
        self.changes = Changes(db, self.jobs, self.queries, self.config)
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

RUN_TAG = "QUEUECTL_RUN"  # the variable that holds the run tag: the attempt that a process belongs to
NO_ATTEMPT = "worker"  # its value in a worker that was started from within a job


class Exit(NamedTuple):
    """How a process ended: by an exit code or a signal, and what it cost where the system tells."""

    exit_code: int | None
    signal: int | None
    max_rss: int | None  # bytes
    cpu_s: float | None


def file_identity(path: str) -> tuple[int, int]:
    """What stays the same of a file, whatever is written to it."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


class Command(NamedTuple):
    """A command that was started: its process id, and the moments between which that happened, in the system's unit."""

    pid: int
    since: int
    until: int


class Home(NamedTuple):
    """The directory that holds one queue."""

    path: str

    @property
    def database(self) -> str:
        """The one place where the truth is."""
        return os.path.join(self.path, "queue.db")

    @property
    def worker_log(self) -> str:
        """What workers have to say."""
        return os.path.join(self.path, "worker.log")

    @property
    def logs(self) -> str:
        """The folder of the jobs' logs."""
        return os.path.join(self.path, "job_logs")

    @property
    def bells(self) -> str:
        """The folder of what the running workers need: their bells, and their signs of life."""
        return os.path.join(self.path, "bells")

    def log(self, job: str) -> str:
        """The file that takes a job's output."""
        return f"{self.logs}{os.sep}{job}.log"

    def spool(self, worker: int) -> str:
        """What a worker's job has written until its log is made: a name that no job can have.

        Nor a worker of a queue that takes the place of this one: its database is another file.
        """
        return os.path.join(self.logs, f".{worker}-{file_identity(self.database)[1]}")

    def bell(self, worker: int) -> str:
        """What wakes a worker, on systems where it is a file."""
        return os.path.join(self.bells, str(worker))

    def life(self, worker: int) -> str:
        """The file that says what command a worker runs, and by its lock that the worker lives."""
        return os.path.join(self.bells, f"{worker}.life")

    def is_there(self, database: tuple[int, int]) -> bool:
        """Is the database still the file that it was? It is not once the home was removed or replaced."""
        try:
            return file_identity(self.database) == database
        except OSError:
            return False


def run_tag_in(database: tuple[int, int], what: str) -> str:
    """The run tag of an attempt or a hook; the identity of the database tells it from another queue's."""
    return f"{what}@{database[0]:x}.{database[1]:x}"  # one word, for `ps`


def read_command(home: Home, worker: int, run_tag: str) -> Command | None:
    """The command of a run, where its worker has started it and it is still the newest."""
    with contextlib.suppress(OSError, ValueError), open(home.life(worker), encoding="utf-8") as file:
        tag, *numbers = file.read().split()
        if tag == run_tag:
            return Command(*map(int, numbers))
    return None


def remove_file(path: str) -> None:
    """Remove a file that may be gone already, or that somebody reads where that keeps it."""
    with contextlib.suppress(OSError):
        os.unlink(path)


NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # to open a FIFO without waiting for its other end


def require_regular(fd: int, path: str) -> int:
    """A descriptor; closed, and OSError, where it is of a FIFO, a device or the like, which may let a process wait."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file", path)
    return fd


def earlier_output(path: str) -> str:
    """The copy of what a log held before a retry began: a name that no log and no spool can have."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}")


def remove_log(path: str) -> None:
    """Remove a job's log."""
    remove_file(path)
    remove_file(earlier_output(path))


OWN_DIRECTORY = "set QUEUECTL_HOME to a directory of your own"


def is_for_a_queue(directory: str) -> bool:
    """Does a directory hold a queue, or nothing? Otherwise its modes are not ours to speak of."""
    names = os.listdir(directory)
    return not names or os.path.basename(Home(directory).database) in names


# What follows exists twice, once for Windows and once for POSIX, by the same names, parameters and order:
#
#   files
#     refuse_if_shared     refuse a directory that somebody else can write to
#     is_open_to_others    can anybody but the owner read or write a file?
#     is_remote            is a path on another machine?
#     open_log             open a file for appending
#     CAN_TELL_WHO_OPENS   does `is_open_elsewhere` know? Workers use a spool only where it does
#     OpenWatch            tells whether a file was opened while it was written to; only Linux does
#     is_open_elsewhere    may anybody else hold a file open? Windows always answers yes
#   wake-up
#     Bell                 what wakes a worker: others, a signal, the end of its command or of its neighbour
#     ring                 wake a worker
#   life
#     own_process          what tells this process from every other, now and later
#     can_see              does this process see those of another worker? In another PID namespace it may not
#     Life                 a worker's sign of life, in which it notes its command; no job can hold it
#     is_alive             does a worker's process live?
#   write gate
#     WriteGate            lets the workers that want to write in, one after the other; does nothing on Windows
#   processes
#     SHELL                the shell that runs a command which is a line
#     exit_status          an exit code as this system takes it from a program
#     Process              a command and all that it starts
#     refuse_too_long      refuse a command or an environment that no process can be given here
#     program_problem      why a file that is there cannot be run
#     is_shell_word        does only a shell know a word?
#     in_one_word          words as one word that a shell is given
#     Leftovers            what a dead worker's attempt left running
#     memory_kills         how many processes the system has ended for want of memory; 0 on Windows
#   worker processes
#     become_worker        make this process a worker: signals, descriptors, orphans
#     start_detached       start a worker process that outlives its parent
#     leave_job            take a worker that a job starts out of that job's attempt
#     HAS_SYSTEMD          may systemd start workers here? `service` is for that

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

    def _must(result: Any) -> Any:
        """What a system call gave; OSError with the reason where that is nothing."""
        if result in (None, 0, wintypes.HANDLE(-1).value):
            raise ctypes.WinError(ctypes.get_last_error())
        return result

    def _object_name(kind: str, of: str) -> str:
        """The name of a system object, the same in every session of the machine."""
        import hashlib

        return f"Global\\queuectl-{kind}-{hashlib.sha256(os.path.normcase(of).encode()).hexdigest()[:32]}"

    # ---- files

    # Who is everybody, and what is writing, in the language of access lists (SDDL).
    _EVERYBODY = re.compile(r"\(A;[^;]*;([^;]*);[^;]*;[^;]*;(?:WD|AU|BU|BG|IU|AN)\)")
    _WRITING = re.compile(r"(?:..)*(?:DC|LC|DT|SD|WD|WO|GA|GW|FA|FW)")
    _WRITING_BITS = 0x500D0046

    def refuse_if_shared(directory: str) -> None:
        """QueueError where everybody can write to a directory, as ssh does; one that is new is closed to them first."""
        us = f"{os.environ.get('USERDOMAIN', '.')}\\{os.environ.get('USERNAME', '')}:(OI)(CI)F"
        if not os.listdir(directory):
            _keep_for(us, directory)
        for rights in _EVERYBODY.findall(_access_list(directory)):
            bits = int(rights, 16) if rights.startswith("0x") else 0
            if bits & _WRITING_BITS or _WRITING.match(rights):
                close_it = f'run: icacls "{directory}" /inheritance:r /grant:r "{us}"'
                help = close_it if is_for_a_queue(directory) else OWN_DIRECTORY
                raise QueueError(f"{directory} can be written to by others; {help}")

    def _keep_for(us: str, directory: str) -> None:
        """Take a directory from everybody but us and the system, where that works."""
        icacls = os.path.join(os.environ.get("SYSTEMROOT", "C:\\Windows"), "System32", "icacls.exe")
        close = [icacls, directory, "/inheritance:r", "/grant:r", us, "*S-1-5-18:(OI)(CI)F"]
        with contextlib.suppress(OSError):
            subprocess.run(close, capture_output=True, creationflags=subprocess.CREATE_NO_WINDOW)

    def _access_list(path: str) -> str:
        """Who may do what with a file, in SDDL; empty where the system does not tell."""
        advapi32, who_may = ctypes.WinDLL("advapi32"), 0x4
        size, text = wintypes.DWORD(), wintypes.LPWSTR()
        advapi32.GetFileSecurityW(path, who_may, None, 0, ctypes.byref(size))
        descriptor = ctypes.create_string_buffer(size.value)
        if not advapi32.GetFileSecurityW(path, who_may, descriptor, size, ctypes.byref(size)):
            return ""
        advapi32.ConvertSecurityDescriptorToStringSecurityDescriptorW(descriptor, 1, who_may, ctypes.byref(text), None)
        try:
            return text.value or ""
        finally:
            _kernel32.LocalFree(text)

    def is_open_to_others(path: str) -> bool:
        """Windows gives a profile's files to their owner."""
        return False

    def is_remote(path: str) -> bool:
        """Is a path on another machine?"""
        drive_remote = 4
        drive = os.path.splitdrive(path)[0] + "\\"
        return path.startswith("\\\\") or bool(_kernel32.GetDriveTypeW(drive) == drive_remote)

    def open_log(path: str) -> int:
        """A descriptor that appends, also in the processes that inherit it."""
        append, share_all, open_always = 0x4, 0x7, 4
        handle = _must(_kernel32.CreateFileW(path, append, share_all, None, open_always, 0x80, None))
        return msvcrt.open_osfhandle(handle, os.O_APPEND | os.O_WRONLY)

    CAN_TELL_WHO_OPENS = False

    class OpenWatch:
        """Nobody tells."""

        def __init__(self) -> None:
            pass

        def follow(self, path: str) -> None:
            """Watch this file in place of the one before."""

        def stop(self) -> None:
            """Watch no file."""

        def was_opened_again(self) -> bool:
            """Was the file opened after it had been written to?"""
            return False

    def is_open_elsewhere(fd: int) -> bool:
        """May anybody else hold the file of a descriptor open? Nobody tells."""
        return True

    # ---- wake-up

    class Bell:
        """A named event: it exists as long as the worker that listens, which the system sees to."""

        def __init__(self, home: Home, worker: int) -> None:
            self.has_news = False  # somebody has rung, or the neighbour has ended, since this was set to False
            self._event = _must(_kernel32.CreateEventW(None, False, False, _event_name(home, worker)))
            self._neighbour: int | None = None

        def wait(self, timeout_s: float, process: Process | None = None) -> bool:
            """Sleep until there is news (True), the process ends, or the time is over."""
            news = [self._event] + [self._neighbour] * (self._neighbour is not None)
            handles = news + ([process.handle] if process else [])
            array = (wintypes.HANDLE * len(handles))(*handles)
            ms = max(0, math.ceil(timeout_s * 1000))
            is_news = bool(_kernel32.WaitForMultipleObjects(len(handles), array, False, ms) < len(news))
            self.has_news = self.has_news or is_news
            return is_news

        def watch(self, process: str | None) -> bool:
            """Let the end of another worker's process be news; False where the system does not tell of it."""
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
            """Nobody can remove an event."""

        def close(self) -> None:
            """Listen no more."""
            self.watch(None)
            _kernel32.CloseHandle(self._event)

    def ring(home: Home, worker: int) -> bool:
        """Wake a worker; False where nobody listens."""
        return _with_event(home, worker, True)

    def _with_event(home: Home, worker: int, ring: bool) -> bool:
        event_modify_state = 0x2
        event = _kernel32.OpenEventW(event_modify_state, False, _event_name(home, worker))
        if not event:
            return ctypes.get_last_error() != _NO_SUCH_FILE  # any other trouble is ours, not its death
        if ring:
            _kernel32.SetEvent(event)
        _kernel32.CloseHandle(event)
        return True

    def _event_name(home: Home, worker: int) -> str:
        return _object_name("bell", run_tag_in(file_identity(home.database), str(worker)))

    # ---- life

    def own_process() -> str:
        """What tells this process from every other: its id, and when it started."""
        return f"{os.getpid()}:{_start_of(-1)}"

    def _start_of(handle: int) -> int:
        """When a process started, by a handle of it; -1 is our own."""
        times = [ctypes.c_uint64() for _ in range(4)]
        _kernel32.GetProcessTimes(wintypes.HANDLE(handle), *map(ctypes.byref, times))
        return times[0].value

    def can_see(process: str | None) -> bool:
        """Job objects are known by name on the whole machine."""
        return True

    class Life:
        """The file in which a worker notes the command that it runs; its sign of life is the event of its bell."""

        def __init__(self, home: Home, worker: int) -> None:
            self._path = home.life(worker)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_BINARY, 0o600)

        def note(self, run_tag: str, command: Command) -> None:
            """Put on record what was started; not on disk, since nothing of it outlives the machine."""
            with contextlib.suppress(OSError):  # the disk is full
                os.lseek(self._fd, 0, os.SEEK_SET)
                os.write(self._fd, f"{run_tag} {command.pid} {command.since} {command.until}".ljust(120).encode())

        def look_after(self) -> None:
            """Nobody can remove a file that is open."""

        def close(self) -> None:
            """Leave: there is nothing left to be recovered."""
            os.close(self._fd)
            remove_file(self._path)

    def is_alive(home: Home, worker: int, process: str | None) -> bool:
        """Does a worker's process live? The event of its bell goes with it."""
        return _with_event(home, worker, False)

    # ---- write gate

    class WriteGate:
        """Workers that want to write at the same time: here each tries until it may."""

        def __init__(self, home: Home) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

        def close(self) -> None:
            """Nothing is held."""

    # ---- processes

    SHELL: Shell = "cmd"

    def exit_status(code: int) -> int:
        """An exit code as this system takes it: of 32 bits, and signed for Python."""
        return (code + 2**31) % 2**32 - 2**31

    _CREATE_SUSPENDED, _BREAKAWAY = 0x4, 0x01000000
    # A hidden console of its own: no window, and no Ctrl-C that is meant for somebody else.
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
        """Say what holds for the processes of a job object, and for its end."""
        limits = _Limits(flags=flags)
        size = ctypes.sizeof(limits)
        _must(_kernel32.SetInformationJobObject(wintypes.HANDLE(job), _EXTENDED_LIMITS, ctypes.byref(limits), size))

    def _query(job: int, kind: int, into: ctypes.Structure) -> None:
        size = ctypes.sizeof(into)
        _kernel32.QueryInformationJobObject(wintypes.HANDLE(job), kind, ctypes.byref(into), size, None)

    def _new_job(run_tag: str) -> int:
        """A job object named by a run tag; one without a name where that name is taken, which is not ours."""
        already_exists = 183
        job = _must(_kernel32.CreateJobObjectW(None, _object_name("job", run_tag)))
        if ctypes.get_last_error() == already_exists:
            _kernel32.CloseHandle(wintypes.HANDLE(job))
            job = _must(_kernel32.CreateJobObjectW(None, None))
        return int(job)

    def _open_job(run_tag: str, rights: int) -> int | None:
        """The job object of an attempt, which has its name as long as its worker lives; None where it is gone."""
        handle = _kernel32.OpenJobObjectW(rights, False, _object_name("job", run_tag))
        return int(handle) if handle else None

    def _end_job(job: int, timeout_s: float) -> list[str]:
        """End every process of a job object; those that are still there after that time."""
        deadline = time.monotonic() + timeout_s
        used = _Accounting(active=1)
        while used.active and time.monotonic() < deadline:
            _kernel32.TerminateJobObject(wintypes.HANDLE(job), 1)
            _query(job, _ACCOUNTING, used)  # it ends them in its own time: wait, or the next attempt meets them
            time.sleep(0.005 if used.active else 0)
        return _processes_of(job) if used.active else []

    def _processes_of(job: int) -> list[str]:
        """The ids of the processes in a job object, of the first hundred at least."""
        found = _ProcessIds()
        _query(job, _PROCESS_IDS, found)
        return [str(pid) for pid in found.ids[: found.listed]] or ["processes that the system does not name"]

    class Process:
        """A command in a job object of its own, which dies with this process."""

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
            """Into the job object first: what it starts before that would not belong to it."""
            process = wintypes.HANDLE(self.handle)
            try:
                _must(_kernel32.AssignProcessToJobObject(wintypes.HANDLE(self._job), process))
            except OSError:
                self._popen.kill()
                raise
            _ntdll.NtResumeProcess(process)

        def poll(self) -> Exit | None:
            """How it ended; None while it runs."""
            code = self._popen.poll()
            if code is None:
                return None
            limits, used = _Limits(), _Accounting()
            _query(self._job, _EXTENDED_LIMITS, limits)
            _query(self._job, _ACCOUNTING, used)
            return Exit(code, None, limits.peak_process_memory or None, (used.user + used.kernel) / 1e7 or None)

        def end(self, grace_s: float, meanwhile: Callable[[], None] = lambda: None) -> list[str]:
            """End it and all that it started, at once: a hidden console has nobody to ask it to leave."""
            return _end_job(self._job, timeout_s=1.0)

        def close(self) -> None:
            """Leave alone what still runs, and forget it."""
            with contextlib.suppress(OSError):
                _limit(self._job, 0)
            _kernel32.CloseHandle(wintypes.HANDLE(self._job))

    def _start_with_retries(start: Callable[[], _Result]) -> _Result:
        """The process that `start` creates, after at most two retries.

        ERROR_INTERNAL_ERROR means that the new process ended before it ran any of its own code (Wine has this now and
        then). A retry is safe.
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
        """A process that has not begun; of variables that differ in case alone, the last one counts."""
        spelled = {name.upper(): (name, value) for name, value in env.items()}
        return _start_with_retries(lambda: subprocess.Popen(
            line, cwd=cwd, env=dict(spelled.values()),
            stdin=subprocess.DEVNULL if stdin is None else stdin, stdout=output, stderr=output,
            creationflags=_HIDDEN | _CREATE_SUSPENDED,
        ))  # fmt: skip

    def _shell_line(command: str) -> str:
        """The command line by which cmd.exe runs a line as it is: /s takes off just the outer quotes."""
        if "\n" in command.strip():
            raise ValueError("cmd.exe would run the first line alone; put several in a script")
        return f'"{os.environ.get("COMSPEC", "cmd.exe")}" /d /s /c "{command.strip()}"'

    def _program(word: str, cwd: str, env: Mapping[str, str]) -> str:
        """The file that a word means, by the PATH that its command will see and the endings of programs."""
        here = {name.upper(): value for name, value in env.items()}
        endings = here.get("PATHEXT", ".COM;.EXE;.BAT;.CMD").lower().split(";")
        place, name = os.path.split(word)
        folders = [os.path.join(cwd, place)] if place else here.get("PATH", "").split(";")
        for folder in folders:
            for ending in [""] if name.lower().endswith(tuple(endings)) else endings:
                if os.path.isfile(path := os.path.join(cwd, folder, name + ending)):
                    return path
        return word

    _MOST_CHARACTERS, _MOST_FOR_CMD = 32_766, 8_191  # of a command line or a variable; of a line for cmd.exe
    _SHELL_WORDS = re.compile(
        "assoc|break|call|cd|chdir|cls|copy|date|del|dir|echo|endlocal|erase|for|ftype|goto|if|md|mkdir|mklink|move|"
        "path|pause|popd|prompt|pushd|rd|rem|ren|rename|rmdir|set|setlocal|shift|start|time|title|type|ver|verify|vol"
    )

    def refuse_too_long(command: str | list[str], env: Mapping[str, str]) -> None:
        """BadInput where Windows could not start such a command, or not give it such an environment."""
        line = command if isinstance(command, str) else subprocess.list2cmdline(command)
        most = _MOST_FOR_CMD if isinstance(command, str) else _MOST_CHARACTERS
        if len(line) > most:
            raise BadInput(f"field 'command' is {len(line)} characters long, and Windows takes {most}; use a script")
        for name, value in env.items():
            if len(name) + 1 + len(value) > _MOST_CHARACTERS:
                raise BadInput(
                    f"field 'env': {name} has more than the {_MOST_CHARACTERS} characters that Windows takes"
                )

    def program_problem(word: str, cwd: str, path: str) -> str | None:
        """Why a file that is there cannot be run; None where there is none, or nothing is wrong with it."""
        file = _program(word, cwd, {"PATH": path, "PATHEXT": os.environ.get("PATHEXT", "")})
        file = os.path.join(cwd, file)
        if os.path.isdir(file):
            return "it is a directory"
        if not os.path.isfile(file) or file.lower().endswith((".com", ".exe", ".bat", ".cmd")):
            return None
        return f"Windows cannot run such a file; name first what can, as in: python {word}"

    def is_shell_word(word: str) -> bool:
        """Does only cmd.exe know a word?"""
        return bool(_SHELL_WORDS.fullmatch(word.lower()))

    def in_one_word(words: Sequence[str]) -> str:
        """Words as one word, as it is typed in cmd.exe."""
        return subprocess.list2cmdline([subprocess.list2cmdline(words)])

    class Leftovers:
        """What a dead worker's attempt left running: the system ends it with the worker, here we wait until it has."""

        def __init__(self, run_tag: str, command: Command | None, log: str, is_under_way: Callable[[], bool]) -> None:
            self._run_tag = run_tag

        def end(self, timeout_s: float) -> list[str]:
            """End it; what is still there after that time."""
            job = _open_job(self._run_tag, _JOB_QUERY | _JOB_TERMINATE)
            if job is None:
                is_gone = ctypes.get_last_error() == _NO_SUCH_FILE
                return [] if is_gone else ["processes that the system does not let us look at"]
            try:
                return _end_job(job, timeout_s)
            finally:
                _kernel32.CloseHandle(wintypes.HANDLE(job))

    def memory_kills() -> int:
        """How many processes this system has ended for want of memory: Windows refuses memory, and ends none."""
        return 0

    # ---- worker processes

    def become_worker(on_stop: Callable[[], None]) -> None:
        """Let Ctrl-C and Ctrl-Break mean: finish and leave."""
        for number in (signal.SIGINT, signal.SIGBREAK, signal.SIGTERM):
            signal.signal(number, lambda *_: on_stop())

    def start_detached(home: Home, arguments: Sequence[str], serve: Callable[[], None]) -> TextIO:
        """A worker process of its own; what it has to say until it is up, and then nothing.

        It lives at the root: a directory that a process lives in can neither be moved nor removed.
        """
        try:
            process = _start_worker(home, arguments, _HIDDEN | _BREAKAWAY)
        except PermissionError:  # the job object that holds us lets nobody go
            process = _start_worker(home, arguments, _HIDDEN)
        process.returncode = 0  # it is meant to outlive us
        return cast(TextIO, process.stdout)

    def _start_worker(home: Home, arguments: Sequence[str], flags: int) -> subprocess.Popen[str]:
        return _start_with_retries(lambda: subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), *arguments], cwd=os.path.splitdrive(home.path)[0] + "\\",
            env={**os.environ, "QUEUECTL_HOME": home.path}, text=True, errors="replace", creationflags=flags,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ))  # fmt: skip

    def leave_job(arguments: Sequence[str]) -> None:
        """Let the workers that a job starts leave the job object of its attempt."""
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
        """QueueError where somebody else can write to a directory, as ssh does."""
        found = os.stat(directory)
        if found.st_uid not in (0, os.geteuid()):
            raise QueueError(f"{directory} belongs to another user; {OWN_DIRECTORY}")
        if found.st_mode & 0o022:
            is_ours = found.st_uid == os.geteuid() and not found.st_mode & stat.S_ISVTX and is_for_a_queue(directory)
            help = f"run: {command_line(['chmod', 'go-w', directory])}" if is_ours else OWN_DIRECTORY
            raise QueueError(f"{directory} can be written to by others; {help}")

    def is_open_to_others(path: str) -> bool:
        """Can anybody but the owner read or write it?"""
        return bool(os.stat(path).st_mode & 0o077)

    def is_remote(path: str) -> bool:
        """Is a path on a network file system? Only Linux tells (proc(5): mounts)."""
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
        """A descriptor that appends to a file; OSError for all else, since a pipe would wait for its other end."""
        try:
            fd = os.open(path, _APPENDING | NONBLOCK, 0o600)
        except OSError as error:
            if error.errno != errno.ENXIO:  # of a pipe that nobody reads, or a socket
                raise
            raise OSError(errno.EINVAL, "it is no regular file", path) from None
        return require_regular(fd, path)

    CAN_TELL_WHO_OPENS = hasattr(fcntl, "F_SETLEASE")  # Linux

    class OpenWatch:
        """Tells whether a file was opened while it was written to; only Linux does (inotify(7))."""

        _OPENED, _MODIFIED = 0x20, 0x2  # an open that empties a file has changed it first

        def __init__(self) -> None:
            self._fd, self._watch = -1, -1
            with contextlib.suppress(AttributeError):
                self._fd = int(_libc().inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

        def follow(self, path: str) -> None:
            """Watch this file in place of the one before."""
            self.stop()
            if self._fd >= 0:
                wanted = self._OPENED | self._MODIFIED
                self._watch = int(_libc().inotify_add_watch(self._fd, os.fsencode(path), wanted))

        def stop(self) -> None:
            """Watch no file."""
            if self._watch >= 0:
                _libc().inotify_rm_watch(self._fd, self._watch)
                self._watch = -1
                self.was_opened_again()  # what has been noticed so far is of no interest

        def was_opened_again(self) -> bool:
            """Was the file opened after it had been written to, since it was last asked? Its command opens it first."""
            if self._fd < 0:
                return False
            try:
                events = memoryview(os.read(self._fd, 1 << 16)).cast("I")  # four words each; equal neighbours are one
            except BlockingIOError:
                return False
            return events[1::4].tolist().count(self._OPENED) > 1

    def is_open_elsewhere(fd: int) -> bool:
        """May anybody else hold the file of a descriptor open?

        The system leases a file for writing only to who alone has opened it: see fcntl(2), F_SETLEASE. Where it
        does not lease, nobody can tell.
        """
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            return True
        return False

    # ---- wake-up

    _RING = b"\0"  # never the number of a signal

    class Bell:
        """A FIFO that others write to. Signals do too, among them the one that says that a child has ended.

        So one wait waits for everything, on every POSIX system; and on Linux also for the end of a neighbour.
        """

        def __init__(self, home: Home, worker: int) -> None:
            self.has_news = False  # somebody has rung, or the neighbour has ended, since this was set to False
            self._path = home.bell(worker)
            self._watched: str | None = None  # the process of the neighbour, and its descriptor
            self._neighbour = -1
            self._poll = select.poll()
            self._hang()

        def _hang(self) -> None:
            remove_file(self._path)
            os.mkfifo(self._path, 0o600)
            self._fd = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)
            self._poll.register(self._fd, select.POLLIN)
            signal.set_wakeup_fd(self._fd, warn_on_full_buffer=False)

        def wait(self, timeout_s: float, process: Process | None = None) -> bool:
            """Sleep until there is news (True), the process ends, or the time is over."""
            ready = self._poll.poll(max(0, math.ceil(timeout_s * 1000)))
            rung = b""
            with contextlib.suppress(BlockingIOError):
                rung = os.read(self._fd, 4096)
            if process is None and rung:
                _reap()  # what an earlier job left running is ours to see off
            is_news = _RING in rung or any(fd == self._neighbour for fd, _ in ready)
            self.has_news = self.has_news or is_news
            return is_news

        def watch(self, process: str | None) -> bool:
            """Let the end of another worker's process be news; False where the system does not tell of it."""
            if process == self._watched and self._neighbour >= 0:
                return True
            if self._neighbour >= 0:
                self._poll.unregister(self._neighbour)
                os.close(self._neighbour)
                self._neighbour = -1
            self._watched = process
            if process and process.rsplit(":", 2)[0] == _own_namespace() and hasattr(os, "pidfd_open"):  # Linux
                with contextlib.suppress(OSError):
                    self._neighbour = os.pidfd_open(int(_parts(process)[2] or 0))
                    self._poll.register(self._neighbour, select.POLLIN)
            return self._neighbour >= 0

        def look_after(self) -> None:
            """Hang it anew where somebody has removed or replaced it."""
            if not _is_same(self._path, self._fd):
                before = self._fd
                self._hang()
                self._poll.unregister(before)
                os.close(before)

        def close(self) -> None:
            """Listen no more."""
            signal.set_wakeup_fd(-1)
            self.watch(None)
            if _is_same(self._path, self._fd):  # in a home that was made anew it is another's
                remove_file(self._path)
            os.close(self._fd)

    def _is_same(path: str, fd: int) -> bool:
        """Is the file of a descriptor still the one at a path?"""
        try:
            return os.path.samestat(os.stat(path), os.fstat(fd))
        except OSError:
            return False

    def _reap() -> None:
        with contextlib.suppress(ChildProcessError):  # none is left
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def ring(home: Home, worker: int) -> bool:
        """Wake a worker; False where nobody listens."""
        return _with_fifo(home, worker, _RING)

    def _with_fifo(home: Home, worker: int, message: bytes) -> bool:
        try:
            fd = os.open(home.bell(worker), os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # among them ENXIO: it has no reader
            return False
        with contextlib.suppress(OSError):  # full: it has been rung often enough
            os.write(fd, message)
        os.close(fd)
        return True

    # ---- life

    @functools.cache
    def _own_namespace() -> str:
        """The start of the machine and the PID namespace that this process is in: process ids mean something there."""
        if not _HAS_PROC:
            return ":"
        return f"{_read('/proc/sys/kernel/random/boot_id').decode().strip()}:{os.stat('/proc/self/ns/pid').st_ino}"

    _FIRST_NAMESPACE = "4026531836"  # of a Linux machine (PROC_PID_INIT_INO): it sees the processes of all others

    def own_process() -> str:
        """What tells this process from every other: start of the machine, PID namespace, process id, its own start."""
        if _HAS_PROC and os.readlink("/proc/self") != str(os.getpid()):
            raise QueueError("/proc shows the processes of another PID namespace; use unshare with --mount-proc")
        return f"{_own_namespace()}:{os.getpid()}:{_start_of(os.getpid())}"

    def _start_of(pid: int) -> int | None:
        """When a process started; None where there is no such process, or it has ended."""
        if _HAS_PROC:
            with contextlib.suppress(OSError):
                state, _, _, start, _ = _stat(pid)
                return None if state in "ZX" else start
            return None
        return next((found.start for found in _processes() if found.pid == pid), None)

    def _parts(process: str) -> list[str]:
        """What `own_process` gave; in a row that was damaged it is a process of another start of the machine."""
        parts = process.split(":")
        return parts if len(parts) == 4 and parts[2].isdigit() else ["?", "", "", ""]

    def can_see(process: str | None) -> bool:
        """Would a process show here that somebody started beside that one? If not, not to see any proves nothing."""
        if process is None or process.rsplit(":", 2)[0] == _own_namespace():
            return True
        boot, namespace, pid, _ = _parts(process)
        own_boot, own_namespace = _own_namespace().split(":")
        if boot != own_boot or pid == "1":
            return True  # with the machine, and with the first process of a namespace, all in it has ended
        return own_namespace == _FIRST_NAMESPACE or _is_in_sight(namespace)

    def _is_in_sight(namespace: str) -> bool:
        """Is a process of a PID namespace visible here?"""
        for pid in _pids():
            with contextlib.suppress(OSError):
                if str(os.stat(f"/proc/{pid}/ns/pid").st_ino) == namespace:
                    return True
        return False

    def _lives(process: str) -> bool | None:
        """Does exactly that process live? None where nobody can say from here."""
        boot, namespace, pid, start = _parts(process)
        own_boot, own_namespace = _own_namespace().split(":")
        if boot != own_boot:
            return False
        if namespace != own_namespace:
            return None if own_namespace != _FIRST_NAMESPACE or _is_in_sight(namespace) else False
        return str(_start_of(int(pid))) == start

    class Life:
        """A worker's sign of life: a file that its process keeps locked, in which it notes the command that it runs.

        The system drops the lock with the process. No child inherits it, and whoever opens the file does not hold
        it. To close any other descriptor of the file would drop it too, so a worker never opens its own again.
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
            os.rename(made, self._path)  # locked before anybody can see it
            return fd

        def note(self, run_tag: str, command: Command) -> None:
            """Put on record what was started; not on disk, since nothing of it outlives the machine."""
            self._note = f"{run_tag} {command.pid} {command.since} {command.until}".ljust(120).encode()
            with contextlib.suppress(OSError):  # the disk is full
                os.pwrite(self._fd, self._note, 0)

        def look_after(self) -> None:
            """Make it anew where somebody has removed or replaced it."""
            if not _is_same(self._path, self._fd):
                before, self._fd = self._fd, self._make()
                os.close(before)

        def close(self) -> None:
            """Leave: there is nothing left to be recovered."""
            if _is_same(self._path, self._fd):
                remove_file(self._path)
            os.close(self._fd)

    def is_alive(home: Home, worker: int, process: str | None) -> bool:
        """Does a worker's process live? Nothing that is missing or cannot be looked at counts as its death."""
        if process is None:  # of release 1.0, whose bell had a reader as long as it lived
            return _with_fifo(home, worker, b"")
        try:
            fd = os.open(home.life(worker), os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return _lives(process) is not False
        except OSError:
            return True
        try:
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
        return _lives(process) is True  # then the file is not the one that it has locked

    # ---- write gate

    class WriteGate:
        """Workers that want to write at the same time queue up: the system wakes one after the other.

        The gate saves them from trying again and again. It protects nothing: the database has its own lock. So a
        worker that waits for long, because the one inside was stopped or has to wait too, goes ahead.
        """

        def __init__(self, home: Home) -> None:
            self._fd = os.open(home.bells, os.O_RDONLY)
            self._is_waiting = False
            signal.signal(signal.SIGALRM, self._stop_waiting)

        def __enter__(self) -> None:
            with contextlib.suppress(OSError):  # TimeoutError is one, and a file system without such locks gives one
                try:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._wait()

        def _wait(self) -> None:
            self._is_waiting = True
            try:
                # Again and again: the first may come before the wait.
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
            """Let go of the gate for good."""
            os.close(self._fd)

    # ---- processes

    SHELL: Shell = "sh"

    def exit_status(code: int) -> int:
        """An exit code as this system takes it: of 8 bits. Windows has larger ones, and none of those is success."""
        return code if 0 <= code < 256 else code % 256 or 1

    _HAS_PROC = os.uname().sysname == "Linux" and os.path.isdir("/proc/self/fd")  # elsewhere `ps` tells what it can
    _RSS_BYTES = 1 if os.uname().sysname == "Darwin" else 1024  # the unit of ru_maxrss (getrusage(2))
    _RLIMIT_LOCKS = 10  # of Linux, which has not counted by it since 2.4 and hands it down to every child
    _RUN_NUMBERS = 1 << 61  # run numbers are at least this: no administrator sets such a limit
    _Identity = tuple[int, int]  # a process id and when that process started

    class _Found(NamedTuple):
        """A process that has not ended."""

        pid: int
        start: int  # in clock ticks since the machine started; where there is no /proc in seconds since 1970
        parent: int
        session: int  # where there is no /proc its group
        name: str
        run: int | None  # the number of the run that it belongs to, where it tells

    def _run_number(run_tag: str) -> int:
        """A run tag as a resource limit: it stays where the environment is cleared, and everybody may read it."""
        return _RUN_NUMBERS + int.from_bytes(run_tag.encode(), "big") % (_RUN_NUMBERS - 1)  # by a prime number

    def _hand_down(run_tag: str) -> None:
        """Let the processes that are started from here on belong to a run."""
        if _HAS_PROC:
            with contextlib.suppress(ImportError, ValueError, OSError):  # where the limit is lowered for good
                import resource

                resource.setrlimit(_RLIMIT_LOCKS, (_run_number(run_tag), resource.RLIM_INFINITY))

    def _run_of(pid: int) -> int | None:
        """The run number of a process, by its limit or its environment; None where neither tells."""
        with contextlib.suppress(OSError, IndexError):
            limit = _read(f"/proc/{pid}/limits").partition(b"file locks")[2].split(None, 1)[0]
            if limit.isdigit() and int(limit) >= _RUN_NUMBERS:
                return int(limit)
        with contextlib.suppress(OSError):
            _, found, rest = (b"\0" + _read(f"/proc/{pid}/environ")).partition(f"\0{RUN_TAG}=".encode())
            return _run_number(os.fsdecode(rest.partition(b"\0")[0])) if found else None
        return None

    def _read(path: str) -> bytes:
        with open(path, "rb", buffering=0) as file:
            return file.read()

    def _ticks() -> int:
        """Now, in the unit in which the start of a process is told."""
        return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK") if _HAS_PROC else time.time())

    def _stat(pid: int) -> tuple[str, int, int, int, str]:
        """State, parent, session, start and name of a process (proc(5): the name may hold anything)."""
        head, _, tail = _read(f"/proc/{pid}/stat").rpartition(b")")
        state, parent, _, session, *rest = tail.split(None, 20)
        return state.decode(), int(parent), int(session), int(rest[15]), os.fsdecode(head.partition(b"(")[2])

    def _find(pid: int, since: int) -> _Found | None:
        """A process, unless it has ended, or started before a moment."""
        with contextlib.suppress(OSError):
            state, parent, session, start, name = _stat(pid)
            if state not in "ZX" and start >= since:
                return _Found(pid, start, parent, session, name, _run_of(pid))
        return None

    def _newest_pid() -> int:
        """The process id that was given last."""
        return int(_read("/proc/loadavg").rsplit(None, 1)[1])

    def _processes(since: int = 0) -> Iterator[_Found]:
        """Every process that started since a moment, and then those that were made meanwhile, until there are none.

        TimeoutError where they are still being made after a while. Only our own work counts: on a busy machine others
        run, and make processes, between any two of our steps. The first look does not count: it is as long as the
        machine has processes.
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
            pids = range(before + 1, newest + 1) if newest >= before else _pids()  # the numbers begin anew at times
            if pids and time.thread_time() > deadline:
                raise TimeoutError

    def _pids() -> list[int]:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]

    def _ps(since: int) -> Iterator[_Found]:
        """The same from `ps`, which shows the environment after the command."""
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
                yield _Found(int(pid), start, int(parent), int(group), name, _run_number(tags[0]) if tags else None)

    def _writes_to(pid: int, file: tuple[int, int]) -> bool:
        """Does a process hold a file open for writing? It is known by its device and inode, whatever its path."""
        folder = f"/proc/{pid}/fd"
        with contextlib.suppress(OSError):
            for fd in os.listdir(folder):
                with contextlib.suppress(OSError):
                    if file_identity(f"{folder}/{fd}") == file and os.lstat(f"{folder}/{fd}").st_mode & 0o200:
                        return True
        return False

    def _send(process: _Identity, number: int) -> None:
        """Signal a process unless its id has gone to another meanwhile; PermissionError where it is not ours to end."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            if not hasattr(os, "pidfd_open"):  # macOS, and Pythons that were built on an old Linux
                if any((found.pid, found.start) == process for found in _processes()):
                    os.kill(process[0], number)
                return
            fd = os.pidfd_open(process[0])  # from here on the id cannot change hands under us
            try:
                if _stat(process[0])[3] == process[1]:
                    signal.pidfd_send_signal(fd, number)
            finally:
                os.close(fd)

    def _is_hidden(pid: int) -> bool:
        """Is there a process that is not ours and that /proc does not show (its option hidepid)?"""
        try:
            os.kill(pid, 0)
        except PermissionError:
            return not os.path.exists(f"/proc/{pid}")
        except OSError:
            pass
        return False

    class _Family:
        """The processes of one attempt: all that have its run number, and what is related to them."""

        def __init__(
            self, run_tag: str, command: Command | None, reaper: int = -1,
            writes: Callable[[int], bool] = lambda pid: False, between: Callable[[], object] = lambda: None,
        ) -> None:  # fmt: skip
            self._run, self._command, self._reaper = _run_number(run_tag), command, reaper
            self._writes, self._between = writes, between  # is the log open there? And what is to be done between looks
            self._members: set[_Identity] = set()  # all that were ever seen
            self._refusing: set[_Identity] = set()  # those that are not ours to signal

        def ask_to_leave(self, grace_s: float, meanwhile: Callable[[], None]) -> None:
            """Send SIGTERM, and wait until all have gone or the grace is over."""
            deadline = time.monotonic() + grace_s
            # By id, so parents before their children: a shell hears of it before it misses the command
            # that it waits for, and can clean up. One that is stopped cannot hear.
            self._signal(signal.SIGTERM, signal.SIGCONT)
            while time.monotonic() < deadline and self._signal().keys() - self._refusing:
                meanwhile()
                time.sleep(0.03)

        def end(self, timeout_s: float) -> list[str]:
            """Kill them all, and what they start meanwhile; those that are still there after that time.

            They are stopped first, until nobody new appears: what forks as fast as we kill cannot get away. They are
            killed at least once, since one look at a large and busy machine may take longer than that time.
            """
            deadline = time.monotonic() + timeout_s
            known: set[_Identity] = set()
            number, is_last = signal.SIGSTOP, False
            while found := self._signal(number):
                if is_last or found.keys() <= self._refusing:
                    break
                is_late = time.monotonic() > deadline
                is_last = is_late and number == signal.SIGKILL  # to see what that one did
                number = signal.SIGKILL if is_late or found.keys() <= known else signal.SIGSTOP
                known |= found.keys()
                time.sleep(0.005 if number == signal.SIGKILL else 0)
            return [f"{pid} ({name})" if pid else name for (pid, _), name in found.items()]

        def _signal(self, *numbers: int) -> dict[_Identity, str]:
            """Send signals to each of them; their names.

            Nobody is there only if every process that was made during the look has been looked at too.
            """
            self._between()
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

        def _has(self, process: _Found, pids: set[int]) -> bool:
            """Does a process belong to the attempt? One that tells no run does if it is related to others that do."""
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
                self._refusing.add(process)
            except OSError:
                pass  # it has gone

    class Process:
        """A command in a session of its own, whose orphans come to this process."""

        def __init__(
            self, command: str | list[str], cwd: str, env: dict[str, str], log: str, run_tag: str,
            stdin: int | None = None,
        ) -> None:  # fmt: skip
            self._exit: Exit | None = None
            words = ["/bin/sh", "-c", command] if isinstance(command, str) else command
            since = _ticks()
            os.chdir(cwd)  # the child begins where we are: posix_spawn has no such option
            _hand_down(run_tag)
            try:
                pid = _spawn(words, {**env, RUN_TAG: run_tag}, log, stdin)
            finally:
                _hand_down(NO_ATTEMPT)
                os.chdir("/")  # its file system can be unmounted
            self.command = Command(pid, since, _ticks())
            self._family = _Family(run_tag, self.command, os.getpid(), between=self.poll)

        def poll(self) -> Exit | None:
            """How it ended; None while it runs. Orphans that ended are seen off."""
            with contextlib.suppress(ChildProcessError):  # nothing is left
                while (ended := os.wait4(-1, os.WNOHANG))[0]:
                    if ended[0] == self.command.pid:
                        self._exit = _exit_of(*ended[1:])
            return self._exit

        def end(self, grace_s: float, meanwhile: Callable[[], None] = lambda: None) -> list[str]:
            """End it and all that it started: SIGTERM, and after the grace SIGKILL; what is still there then.

            `meanwhile` is called now and then during the grace.
            """
            if grace_s:
                self._family.ask_to_leave(grace_s, meanwhile)
            return self._family.end(timeout_s=1.0)

        def close(self) -> None:
            """Leave alone what still runs, and forget it."""

    _SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}  # those that a process can ignore

    def _spawn(words: list[str], env: Mapping[str, str], log: str, stdin: int | None) -> int:
        """Start a program in a session of its own; its process id."""
        return os.posix_spawn(
            _program(words[0], env.get("PATH", os.defpath)), words, env,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
                if stdin is None else (os.POSIX_SPAWN_DUP2, stdin, 0),
                (os.POSIX_SPAWN_OPEN, 1, log, _APPENDING, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True, setsigmask=(), setsigdef=_SIGNALS,  # whoever started the worker may have ignored some
        )  # fmt: skip

    def _exit_of(status: int, usage: Any) -> Exit:
        code = os.waitstatus_to_exitcode(status)
        rss, cpu_s = usage.ru_maxrss * _RSS_BYTES, usage.ru_utime + usage.ru_stime
        return Exit(code, None, rss, cpu_s) if code >= 0 else Exit(None, -code, rss, cpu_s)

    def _program(word: str, path: str) -> str:
        """The file that a word means, by the PATH that its command will see."""
        if "/" in word:
            return word
        import shutil

        return shutil.which(word, path=path) or word

    # execve(2): MAX_ARG_STRLEN, which only Linux has; and what each string costs besides its bytes.
    _MOST_IN_A_STRING = 32 * os.sysconf("SC_PAGE_SIZE") - 1 if _HAS_PROC else sys.maxsize
    _STRING_COST, _FEW_BYTES = 9, 100_000
    _SHELL_WORDS = re.compile(
        r"[.:{!(]|alias|bg|break|case|cd|command|continue|eval|exec|exit|export|fg|for|getopts|hash|if|jobs|local|read|"
        "readonly|return|set|shift|times|trap|type|ulimit|umask|unalias|unset|until|wait|while"
    )

    def refuse_too_long(command: str | list[str], env: Mapping[str, str]) -> None:
        """BadInput where this system could not start such a command, or not give it such an environment."""
        words = ["/bin/sh", "-c", command] if isinstance(command, str) else command
        variables = [f"{name}={value}" for name, value in env.items()]
        strings = words + variables
        if 4 * sum(map(len, strings)) + _STRING_COST * len(strings) < _FEW_BYTES:  # UTF-8 takes 4 at the most
            return
        for field, given in (("command", words), ("env", variables)):
            longest = max((len(string.encode()) for string in given), default=0)
            if longest > _MOST_IN_A_STRING:
                more = f"{longest} bytes in one string, and this system takes {_MOST_IN_A_STRING}; put it in a file"
                raise BadInput(f"field {field!r} has {more}")
        here = [f"{name}={value}" for name, value in os.environ.items() if name not in env]
        total, most = sum(len(os.fsencode(s)) + _STRING_COST for s in strings + here), os.sysconf("SC_ARG_MAX")
        if 0 < most < total:
            more = f"{total} bytes with the environment, and this system takes {most}; put them in a file"
            raise BadInput(f"fields 'command' and 'env' have {more}")

    def program_problem(word: str, cwd: str, path: str) -> str | None:
        """Why a file that is there cannot be run; None where there is none, or nothing is wrong with it."""
        file = os.path.join(cwd, _program(word, path))
        if os.path.isdir(file):
            return "it is a directory"
        if not os.path.exists(file):
            return "it is a link that leads nowhere" if os.path.islink(file) else None
        if not os.access(file, os.X_OK):
            return f"it is not executable; run: {command_line(['chmod', '+x', file])}"
        try:
            with open(file, "rb") as opened:
                return _head_problem(opened.read(256), file)
        except OSError:
            return None  # it may be run, and not read

    def _head_problem(head: bytes, file: str) -> str | None:
        """What the first bytes of a program say about why it does not start."""
        if head.startswith((b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe", b"MZ")):
            return "it is built for another system, or its loader is missing"
        if not head.startswith(b"#!"):
            return f"it has no #! line that says what runs it; name that first: {command_line(['sh', file])}"
        line = os.fsdecode(head[2:].split(b"\n")[0]).strip(" \t")
        if line.endswith("\r"):
            mend = f"sed -i.bak 's/\\r$//' {command_line([file])}"
            return f"its lines end in CR LF, as on Windows, so the system looks for {line!r}; run: {mend}"
        interpreter = line.split(None, 1)[0] if line else ""
        if not os.path.exists(interpreter):
            return f"its interpreter {interpreter!r} does not exist"
        return None if os.access(interpreter, os.X_OK) else f"its interpreter {interpreter!r} is not executable"

    def is_shell_word(word: str) -> bool:
        """Does only a shell know a word?"""
        return bool(_SHELL_WORDS.fullmatch(word))

    def in_one_word(words: Sequence[str]) -> str:
        """Words as one word, as it is typed in a shell."""
        return command_line([command_line(list(words))])

    class Leftovers:
        """What a dead worker's attempt left running.

        It is found by its run number; where that was given up, as the command that is on record, by parents and
        sessions, or by the log that it holds open. The log of a later attempt is the same: that sign counts only
        as long as the attempt is under way, since none can begin before that.
        """

        def __init__(self, run_tag: str, command: Command | None, log: str, is_under_way: Callable[[], bool]) -> None:
            self._log, self._is_under_way = log, is_under_way
            self._file: tuple[int, int] | None = None
            self._family = _Family(run_tag, command, writes=self._writes)

        def _writes(self, pid: int) -> bool:
            return self._file is not None and _writes_to(pid, self._file) and self._is_under_way()

        def end(self, timeout_s: float) -> list[str]:
            """End it; what is still there after that time."""
            with contextlib.suppress(OSError):  # it has no log
                self._file = file_identity(self._log)
            return self._family.end(timeout_s)

    def memory_kills() -> int:
        """How many processes this system has ended for want of memory; only Linux tells (proc(5): vmstat)."""
        try:
            with open("/proc/vmstat", "rb") as file:
                return int(file.read().partition(b"oom_kill ")[2].split()[0])
        except (OSError, IndexError):
            return 0

    # ---- worker processes

    def become_worker(on_stop: Callable[[], None]) -> None:
        """Let signals mean: finish and leave; keep descriptors from jobs; adopt their orphans."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: on_stop())
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGCHLD, signal.SIGIO):  # the one rings the bell; the other says that a lease was broken
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whoever started us may have blocked them
        for fd in _open_descriptors():
            with contextlib.suppress(OSError):
                os.set_inheritable(fd, False)
        pr_set_child_subreaper, m_trim_threshold = 36, -1
        with contextlib.suppress(AttributeError, OSError):  # Linux and its glibc have these alone
            _libc().prctl(pr_set_child_subreaper, 1, 0, 0, 0)
            _libc().mallopt(m_trim_threshold, 64 << 20)  # memory goes back and forth with every statement otherwise

    def _open_descriptors() -> list[int]:
        """The descriptors of this process, and one that has just been closed."""
        return [int(name) for name in os.listdir("/dev/fd")]

    def _libc() -> Any:
        import ctypes

        return ctypes.CDLL(None)

    def start_detached(home: Home, arguments: Sequence[str], serve: Callable[[], None]) -> TextIO:
        """A worker process of its own; what it has to say until it is up, and then nothing.

        It is forked, so that workers share the memory of what has been imported before.
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
        """Import what workers need before they are forked, and keep collections from copying its pages."""
        import ctypes  # noqa: F401
        import gc
        import logging  # noqa: F401
        import resource  # noqa: F401
        import shutil  # noqa: F401
        import socket  # noqa: F401

        gc.freeze()

    def _detach(output: int) -> None:
        """Leave the session, the directory and the open files of whoever forked us."""
        os.setsid()
        os.chdir("/")  # so that the file system it was started from can be unmounted
        for fd, target in ((os.open(os.devnull, os.O_RDWR), 0), (output, 1), (output, 2)):
            os.dup2(fd, target)
        for fd in filter(lambda fd: fd > 2, _open_descriptors()):
            with contextlib.suppress(OSError):  # a lock that a script holds is not the worker's
                os.close(fd)

    def leave_job(arguments: Sequence[str]) -> None:
        """Start over without the run tag of the job that starts this worker: it is not of that attempt."""
        _hand_down(NO_ATTEMPT)
        if os.environ.get(RUN_TAG, NO_ATTEMPT) != NO_ATTEMPT:
            command = [sys.executable, os.path.abspath(__file__), *arguments]
            os.execve(sys.executable, command, {**os.environ, RUN_TAG: NO_ATTEMPT})

    HAS_SYSTEMD = os.uname().sysname == "Linux"


# ======================================================================== home


def open_home() -> Home:
    """The home that QUEUECTL_HOME names, made for its owner alone where it is missing."""
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
    """A path with the `~` at its beginning as a shell reads it; BadInput where no home directory is known."""
    whose = path.partition("/")[0].partition(os.sep)[0]
    if not whose.startswith("~"):
        return path
    found = os.path.expanduser(path)
    if not os.path.isabs(found) or (whose == "~" and os.environ.get("HOME") == ""):
        raise BadInput(f"no home directory is known for {whose} in {path!r}; {otherwise}")
    return found


def directory_problem(path: str) -> str | None:
    """Why no command can start in a directory; None where one can."""
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
    """What is wrong with a home besides its database, which tells whether it has a job and which workers there are."""
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
    """The files among the logs that belong to no job, and to no worker."""
    names = set(os.listdir(home.logs))  # first: a worker that starts meanwhile has its row before its spool
    names -= {os.path.basename(home.spool(worker)) for worker in workers()}
    jobs = {name: name.removeprefix(".").removesuffix(".log") for name in names if name.endswith(".log")}
    return sorted(name for name in names if not (name in jobs and has_job(jobs[name])))


def remove_stray_logs(home: Home, has_job: Callable[[str], bool], workers: Callable[[], Iterable[int]]) -> None:
    """Remove what `stray_logs` names."""
    for name in stray_logs(home, has_job, workers):
        remove_file(os.path.join(home.logs, name))


def free_bytes(path: str) -> int:
    """What the disk that holds a path has left."""
    import shutil

    return shutil.disk_usage(path).free


def make_private(home: Home) -> None:
    """Take the home and what is ours in it from everybody but their owner."""
    os.chmod(home.path, 0o700)
    for file in (home.database, home.worker_log):
        with contextlib.suppress(OSError):
            if not os.path.islink(file):
                os.chmod(file, 0o600)


def require_file(path: str) -> str:
    """A path that must lead to a file."""
    if not os.path.isfile(path):
        raise NotFound(f"there is no file {printable(path)}")
    return path


def refuse_own(home: Home, path: str) -> None:
    """BadInput where a copy of the queue would be a part of the queue itself, or no file."""
    if os.path.realpath(path) in (home.database + end for end in ("", "-wal", "-shm")):
        raise BadInput("that is the queue itself; name another file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadInput(f"{printable(path)} is no file that could be replaced; name another")


@contextlib.contextmanager
def new_file_for(path: str) -> Iterator[str]:
    """A new file beside that of a path, for its owner alone, which takes its place in one step once it is whole."""
    import tempfile

    folder, name = os.path.split(path)
    fd, made = tempfile.mkstemp(".part", f".{name}.", folder or os.curdir)  # never one that somebody has made
    os.close(fd)
    try:
        yield made
        os.replace(made, path)
    finally:
        remove_file(made)


@contextlib.contextmanager
def workspace(home: Home) -> Iterator[str]:
    """A directory in the home for what is made on the way, and gone after it."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix=".restore-", dir=home.path) as path:
        yield path


def is_regular(path: str) -> bool:
    """Is there a regular file at a path, and no FIFO, directory or link?"""
    try:
        return os.access(path, os.F_OK) and stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def install_unit(name: str, text: str, force: bool) -> str:
    """Write a systemd user unit to where its owner's systemd looks for it; where that is.

    QueueError where another of that name is there, unless it is to be replaced.
    """
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    path = os.path.join(config, "systemd", "user", name)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.exists(path) and not force and not _holds(path, text):
            raise QueueError(f"{path} is there already and differs; to replace it: --force")
        with open(f"{path}.part", "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
        os.replace(f"{path}.part", path)
    except OSError as error:
        raise QueueError(f"cannot write {path}: {error.strerror}") from error
    return path


def _holds(path: str, text: str) -> bool:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read() == text


def size_of(path: str) -> int:
    """Bytes in a file; none where there is no file."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def make_private_file(path: str) -> None:
    """A file for its owner alone; one that is there stays as it is. OSError where it is no file."""
    os.close(require_regular(os.open(path, os.O_CREAT | os.O_RDWR | NONBLOCK, 0o600), path))


def now_ms() -> int:
    """The time of day in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class Clock:
    """Time and chance as a worker sees them; a test gives its own."""

    def now_ms(self) -> int:
        """The time of day in milliseconds since 1970."""
        return now_ms()

    def monotonic_s(self) -> float:
        """Seconds that nobody sets."""
        return time.monotonic()

    def chance(self) -> float:
        """A number from 0 to 1: fair enough to spread retries and checkpoints."""
        return time.perf_counter_ns() % 999_983 / 999_983


def own_pid() -> int:
    """The id of this process."""
    return os.getpid()


def host_name() -> str:
    """The name of this machine."""
    import socket

    return socket.gethostname()


def python_version() -> str:
    """Of the interpreter that runs this."""
    return sys.version.split()[0]


def wants_colour() -> bool | None:
    """False where the user said NO_COLOR; None leaves it to the terminal."""
    return False if os.environ.get("NO_COLOR") else None


def terminal_columns() -> int:
    """How wide the terminal is; 80 where it does not say."""
    import shutil

    return shutil.get_terminal_size().columns or 80  # Python 3.10 hands on what a terminal of no size says


def terminal_rows() -> int:
    """How high the terminal is."""
    import shutil

    return shutil.get_terminal_size().lines


def has_screen() -> bool:
    """Does standard output go to a terminal that can be drawn on?"""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def silence_output() -> None:
    """Whoever reads our output has gone: let what is left of it go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def is_reader_gone(error: OSError) -> bool:
    """Has whoever read our output seen enough? Windows says EINVAL then."""
    return error.errno in (errno.EPIPE, errno.EINVAL)


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Exit without taking the interpreter apart: a tenth of the time that a short command takes."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # a stream that was closed at the start is None
    sys.stderr = sys.stderr or open(2, "w", closefd=False)
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError as error:  # whoever read it may just have seen enough
            code = code or int(not is_reader_gone(error))
        os._exit(exit_status(code))


def here(directory: str = "", otherwise: str = "give --cwd with a whole path") -> str:
    """A path as seen from where we are, `~` expanded."""
    try:
        return os.path.abspath(expanded(directory, "give the whole path") or os.curdir)
    except FileNotFoundError:
        raise QueueError(f"the current directory is gone; go elsewhere, or {otherwise}") from None


def with_values(words: Sequence[str]) -> tuple[str, ...]:
    """`K=V` as typed, and `K` with the value that it has here; BadInput where it has none."""
    for word in words:
        if "=" not in word and word not in os.environ:
            raise BadInput(f"--env names {word}, which is not set here; say {word}=VALUE")
    return tuple(word if "=" in word else f"{word}={os.environ[word]}" for word in words)


def inherited_environment() -> dict[str, str]:
    """The environment that every job of this worker begins with.

    OLDPWD is left out: it names a directory of whoever started the worker. PWD is set for each job.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("QUEUECTL_") and name != "OLDPWD"}


# ======================================================================== attempts


def open_regular(path: str, mode: str = "rb") -> BinaryIO:
    """A file, unbuffered; OSError where it is a FIFO, a device or the like: nobody is to wait for its other end."""
    flags = (os.O_RDWR if "+" in mode else os.O_RDONLY) | NONBLOCK | getattr(os, "O_BINARY", 0)
    return cast(BinaryIO, os.fdopen(require_regular(os.open(path, flags), path), mode, buffering=0))


def block_at(file: BinaryIO, at: int, size: int) -> bytes:
    """Bytes from a place in a file, as far as there are any."""
    file.seek(at)
    return file.read(size)


def blocks_of(file: BinaryIO, at: int) -> Iterator[bytes]:
    """The rest of a file from a place on."""
    while block := block_at(file, at, LOG_BLOCK):
        at += len(block)
        yield block


def _seal(file: BinaryIO, size: int) -> tuple[int, bytes]:
    """A place in the first `size` bytes of a file and what stands there, by which they are known again: their end."""
    at = max(0, size - SEAL_BYTES)
    return at, block_at(file, at, min(size, SEAL_BYTES))


class LogReader:
    """A job's output, by places that hold though its command has emptied the log.

    A retry may open /dev/stderr by name, and so empty the log, with what earlier attempts wrote. While it runs there
    is a copy of that, which is read in place of the first part of the log.
    """

    def __init__(self, path: str) -> None:
        self._log: BinaryIO | None = None
        self._earlier: BinaryIO | None = None
        self.own = 0  # where the output of the attempt that runs begins, if it is a retry
        self._base = 0  # where that is in the log
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
        """Let go of the files."""
        for file in (self._log, self._earlier):
            if file:
                file.close()

    @property
    def is_whole(self) -> bool:
        """Does the log begin and end as it did when the attempt that runs began?"""
        first = self.read(0, min(SEAL_BYTES, self.own))
        begins = not first or (self._log is not None and block_at(self._log, 0, len(first)) == first)
        return begins and self._base == self.own

    def size(self) -> int:
        """Where the output ends."""
        return self.own + (max(0, self._log.seek(0, os.SEEK_END) - self._base) if self._log else 0)

    def read(self, at: int, size: int) -> bytes:
        """Bytes from a place on; perhaps fewer than asked for, none at the end."""
        if self._earlier and at < self.own:
            return block_at(self._earlier, at, min(size, self.own - at))
        return block_at(self._log, self._base + at - self.own, size) if self._log else b""


def read_log(path: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """A log in blocks, from one place to another; nothing where there is none yet."""
    with LogReader(path) as log:
        left = sys.maxsize if end is None else end - start
        while left > 0 and (block := log.read(start, min(left, LOG_BLOCK))):
            start += len(block)
            left -= len(block)
            yield block


def tail_start(path: str, lines: int, start: int = 0, end: int | None = None) -> int:
    """Where the last lines of a log, or of what it holds between two places, begin. Read from the end, in blocks."""
    with LogReader(path) as log:
        at = log.size() if end is None else min(end, log.size())
        if lines and at > start and log.read(at - 1, 1) == b"\n":
            lines += 1  # this one ends the last line
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
    """Where the output of an attempt begins and ends in the log, or with None all of it."""
    if number is None:
        return 0, None
    if job.state is State.PROCESSING and job.attempts == number:
        return running_start(path, job, history), None
    for attempt in reversed(history):
        if attempt.number == number:
            return attempt.log_start or 0, attempt.log_end or 0
    raise NotFound(f"job {job.id} has no attempt {number}")


def running_start(path: str, job: Job, history: Sequence[Attempt]) -> int:
    """Where the output of the attempt that runs begins: behind its separator, if it has one."""
    before = max((attempt.log_end or 0 for attempt in history), default=0)
    with LogReader(path) as log:
        if log.own:
            return log.own
        found = log.read(before, LOG_BLOCK).find(separator(job).encode())
    return before + found + len(separator(job)) if found >= 0 else before


def separator(job: Job) -> str:
    """The line between an attempt's output and what came before."""
    return f"--- attempt {job.attempts}, {iso_time(job.started_at)} ---\n"


def fold_returns(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Output as a terminal would leave it: of a line that a carriage return began anew, the last state.

    A state that is longer than a block is handed on with the rest of its line as it is: no terminal shows it whole.
    """
    rest, is_long = b"", False
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line + b"\n" if is_long else _last_state(line) + (b"\r\n" if line.endswith(b"\r") else b"\n")
            is_long = False
        if not is_long:
            rest = rest[max(0, rest.rfind(b"\r", 0, len(rest.rstrip(b"\r")))) :]  # what it began anew is gone
        if is_long or len(rest) > LOG_BLOCK:
            yield rest
            rest, is_long = b"", True
    if rest:
        yield _last_state(rest)


def _last_state(line: bytes) -> bytes:
    return line.rstrip(b"\r").rpartition(b"\r")[2]


class Spool:
    """The file that takes what a worker's jobs write, until one of them has something to say.

    To make a file may cost half of what it costs to start a program, and many a command is silent. The worker
    keeps it open, and each command opens it for itself: so the system can tell whether any still does.
    """

    def __init__(self, path: str, is_watched: bool = True) -> None:
        self.path = path
        self.watch = OpenWatch() if is_watched else None
        self._fd: int | None = None
        self._as_made: tuple[int, ...] = ()

    def take(self) -> int:
        """A descriptor, of a file that is as new: what one job did to it is not to reach the log of the next."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with contextlib.suppress(OSError):
                if self._look() == self._as_made:
                    return fd
            os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        fd = os.open(self.path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._as_made = self._look()
        if self.watch:
            self.watch.follow(self.path)
        return fd

    def _look(self) -> tuple[int, ...]:
        """What is there where a command will open it."""
        found = os.lstat(self.path)
        return found.st_dev, found.st_ino, found.st_nlink, found.st_mode, found.st_uid, found.st_size

    def give_back(self, fd: int) -> bool:
        """Leave it to the next job, unless something is in it, or somebody may still write or read there."""
        if is_open_elsewhere(fd) or os.fstat(fd).st_size:  # in this order: whoever has just let go may have written
            return False
        self._fd = fd
        return True


class JobLog:
    """The log of a job, open for one attempt.

    Where there is none yet, what the attempt writes goes to its worker's spool, which becomes the log at the
    first look of `look_after`, or at the end where it cannot serve the next job.
    """

    def __init__(self, path: str, job: Job, spool: Spool | None, limit: int) -> None:
        is_first = not os.access(path, os.F_OK)
        if not is_first:
            restore_earlier_output(path)
        self._path, self._spool = path, spool if is_first else None
        self._limit = limit  # bytes, 0 for none
        self.at = self._spool.path if self._spool else path  # what the command is to write to
        self._is_lost = False  # it cannot be put in its place
        self._is_emptied = False
        self._loss = ""
        self._cut = Cut()
        self._fd = self._spool.take() if self._spool else open_log(path)
        self.start = self._size()
        self._seal: tuple[int, bytes] | None = None  # what stands in it as long as its command has not emptied it
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
    def trouble(self) -> str | None:
        """Why something of what was written is lost."""
        emptied = "its command changed its own log, as who opens /dev/stderr by name: what was there may be lost"
        return "; ".join(filter(None, (self._loss, emptied if self._is_emptied else ""))) or None

    def look_after(self, is_over: bool = False) -> None:
        """See that it is in its place, whether it was emptied, and that it keeps to the limit."""
        if self.at != self._path:
            self._take_place()
        with contextlib.suppress(OSError), open_regular(self.at) as file:
            self._look_for_emptying(file)
        if self._limit and self._size() - self._begin() > self._limit + self._cut.note:
            with contextlib.suppress(OSError):
                self._cut = shorten(self.at, self._begin(), self._limit, self._cut, is_over)

    def _take_place(self) -> None:
        if self._spool and self._spool.watch:
            self._is_emptied |= self._spool.watch.was_opened_again()
            self._spool.watch.stop()
        try:
            os.rename(self.at, self._path)
            self.at, self._loss = self._path, ""
        except OSError as error:
            self._loss = f"its output is lost: {error.strerror}"

    def _begin(self) -> int:
        """Where the attempt's output begins in the file: not behind what others wrote, where that is gone."""
        return 0 if self._is_emptied else self.start

    def _look_for_emptying(self, file: BinaryIO) -> None:
        if self._seal and block_at(file, self._seal[0], len(self._seal[1])) != self._seal[1]:
            self._is_emptied, self._cut = True, Cut()
            self._seal = None
        if not self._seal and not self.start:  # of a first attempt: its own first bytes, those that no limit takes
            first = block_at(file, 0, min(SEAL_BYTES, self._limit // 2 if self._limit else SEAL_BYTES))
            self._seal = (0, first) if first else None

    def close(self) -> int:
        """Let go of it, with no more in it than the limit; where it ends."""
        if self._spool and self.at != self._path and self._gives_back(self._spool):
            return 0
        self.look_after(is_over=True)
        end = self._size()
        os.close(self._fd)
        if self.start:
            self._is_emptied |= restore_earlier_output(self._path)
            end = size_of(self._path)
        if self._loss:  # what the attempt left running may still write to it: not for the next job
            remove_file(self.at)
        return end

    def _gives_back(self, spool: Spool) -> bool:
        """Does the spool go to the next job, since nothing is in it?"""
        if not spool.give_back(self._fd):
            return False
        self._is_emptied |= bool(spool.watch and spool.watch.was_opened_again())
        self._loss = ""  # nothing was written that could be lost
        return True


class Cut(NamedTuple):
    """What has been left out of an attempt's output."""

    left_out: int = 0  # bytes
    note: int = 0  # bytes of the line that says so


def shorten(path: str, start: int, limit: int, before: Cut, is_over: bool = True) -> Cut:
    """Keep the first and the last half of what a log holds from a place on, and say between them what is left out.

    While the command writes there may be half as much again, so that few bytes are moved often. What it writes
    meanwhile is kept too; only what comes between the last look and the truncation is lost.
    """
    head, tail = limit // 2, limit - limit // 2
    with open_regular(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        beyond = size - start - before.note - limit
        if beyond <= (0 if is_over else max(tail, LEAST_CUT_BYTES)):
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
    """Move what has been appended behind a place, until nothing more comes or too much does; how many bytes."""
    moved = 0
    for _ in range(CUT_TRIES):
        grown = file.seek(0, os.SEEK_END) - source - moved
        if not grown:
            break
        move(file, source + moved, to + moved, grown)
        moved += grown
    return moved


def move(file: BinaryIO, source: int, to: int, size: int) -> None:
    """Move bytes within a file, also to where they partly stand."""
    steps: Iterable[int] = range(0, size, LOG_BLOCK)
    for step in steps if to <= source else reversed(list(steps)):
        block = block_at(file, source + step, min(LOG_BLOCK, size - step))
        file.seek(to + step)
        file.write(block)


def keep_earlier_output(path: str, size: int) -> None:
    """Copy what a log holds, up to a place, before a retry can empty it."""
    copy = earlier_output(path)
    remove_file(copy)
    try:
        with open_regular(path) as log, os.fdopen(os.open(copy, _NEW_FILE, 0o600), "wb") as file:
            for block in blocks_of(log, 0):
                file.write(block[: size - file.tell()])
                if file.tell() >= size:
                    break
    except OSError:  # without room for it the log is as safe as its command lets it be
        remove_file(copy)


_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


def restore_earlier_output(path: str) -> bool:
    """Put back what earlier attempts wrote, where a retry has emptied or overwritten it; whether it had."""
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
            os.replace(made, path)  # in one step: who reads the log finds it all, before and after
        remove_file(copy)
    return is_changed


def keep_spooled(spool: str, path: str) -> None:
    """What a dead worker's spool holds is its job's log, unless that had been made."""
    if not os.path.exists(path):
        with contextlib.suppress(OSError):  # there is no spool where there is nothing to keep
            os.rename(spool, path)


def end_lost_log(path: str, job: Job, history: Sequence[Attempt], limit: int) -> int:
    """Put the log of an attempt in order whose worker died; where its output begins."""
    with contextlib.suppress(QueueError, OSError):
        start = running_start(path, job, history)
        restore_earlier_output(path)
        if limit and size_of(path) - start > 2 * limit:  # more than a limit that was kept leaves
            shorten(path, start, limit, Cut())
        return start
    return 0


def signal_name(number: int) -> str:
    """`SIGKILL` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def describe(exit: Exit) -> str | None:
    """What went wrong, of a command that ended by itself; None where nothing did."""
    if exit.signal is not None:
        return f"ended by {signal_name(exit.signal)}"
    return f"exit code {exit.exit_code}" if exit.exit_code else None


def start_failure(error: OSError | ValueError, job: Job, path: str) -> Outcome:
    """The outcome of a command that could not be started by that PATH, with the exit code that shells give."""
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
    """What to say of a program that is nowhere, and which is perhaps something that only a shell knows."""
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
    """What a shell that failed did not say of its line: the path of a program with blanks, or a script that cannot run.

    None where neither is so.
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
    """How a worker follows an attempt."""

    bell: Bell
    started: Callable[[Command], object]
    interrupted: Callable[[bool], EndReason | None]  # why it must end early; hears whether the bell has rung
    report_left: Callable[[list[str]], object]  # the processes that cannot be ended, until there are none
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
        process = Process(job.command, job.cwd, env, log.at, run_tag)
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
    wrong = "; ".join(filter(None, (why, why and shell_hint(job, end, exit, env), log.trouble)))
    return Outcome(end, exit.exit_code if end is EndReason.EXITED else None, exit.signal, wrong or None,
                   exit.max_rss, exit.cpu_s, log.start, log_end)  # fmt: skip


def _error_of(end: EndReason, exit: Exit, ok_codes: Sequence[int] | None, settings: Settings) -> str | None:
    if end is EndReason.EXITED:
        return None if exit.exit_code in (ok_codes or ()) else describe(exit)
    if end is EndReason.TIMED_OUT:
        return f"timed out after {settings.job_timeout:g} s"  # how to raise it is said by `show` and `status`
    return "cancelled" if end is EndReason.CANCELLED else "given back: its worker was told to leave"


def _watch(process: Process, log: JobLog, settings: Settings, supervision: Supervision) -> tuple[EndReason, Exit]:
    """Wait for a command's end, and bring it about where it must come early."""
    left_s = settings.job_timeout or math.inf
    poll_s = LIMITED_POLL_S if settings.log_max_bytes else POLL_S
    deadline = supervision.clock.monotonic_s() + left_s
    while True:
        rung = supervision.bell.wait(min(poll_s, left_s), process)
        if exit := process.poll():
            return EndReason.EXITED, exit
        log.look_after()
        left_s = deadline - supervision.clock.monotonic_s()
        if why := EndReason.TIMED_OUT if left_s <= 0 else supervision.interrupted(rung):
            return why, _end_whole(process, log, settings, supervision)


def _end_whole(process: Process, log: JobLog, settings: Settings, supervision: Supervision) -> Exit:
    """End a command and all that belongs to it; as long as something of it lives, its attempt has not ended."""
    left = process.end(settings.kill_grace, log.look_after)
    while left or not process.poll():
        supervision.report_left(left)
        supervision.bell.wait(END_POLL_S, process)
        supervision.interrupted(False)  # what else is to be done meanwhile
        log.look_after()
        left = process.end(0)
    supervision.report_left([])
    return cast(Exit, process.poll())


def hook_for(state: State | None, settings: Settings) -> str:
    """The command to run after a job has come to a state; empty for none."""
    if state is State.COMPLETED:
        return settings.on_complete
    return settings.on_dead if state is State.DEAD else ""


def run_hook(line: str, home: Home, env: dict[str, str], document: str, run_tag: str, bell: Bell) -> str | None:
    """Run a hook with a job as JSON on its standard input; what went wrong, if anything did."""
    import tempfile

    process = None
    deadline = time.monotonic() + HOOK_TIMEOUT_S
    try:
        with tempfile.TemporaryFile() as stdin:
            stdin.write(document.encode())
            stdin.seek(0)
            os.close(open_log(home.worker_log))  # refuses what the hook would wait for
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
    """What others know a worker by: what wakes it, and what shows that it lives."""

    bell: Bell
    life: Life


class Recovery:
    """The recovery of a dead worker: tried until nothing of its job is left, and then the job may be tried again.

    Processes are ended outside of any transaction. No other attempt can begin meanwhile, since nobody claims a job
    that is processing; and of several who recover the same worker one alone records it, since `finish` is guarded.
    """

    def __init__(self, home: Home, store: Store, dead: int) -> None:
        self._home, self._store, self._dead = home, store, dead
        self._leftovers: dict[int, Leftovers] = {}  # by the job's seq: what was seen once is not forgotten
        self.next_s, self._pause_s = 0.0, 0.1  # until the next try: ever longer, since a try costs time
        self.left = ""  # what cannot be ended

    def attempt(self, process: str | None, settings: Settings, clock: Clock) -> list[tuple[Job, State | None]] | None:
        """End what is left of the worker's job, unless it is too early to try again; the jobs and what became of them.

        None where something of them is still there, or may be.
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
            self._pause_s = min(2 * self._pause_s, MOST_RECOVERY_PAUSE_S)
            return None
        with self._store.db.writing():
            ended = [(job, self._finish(job, settings, clock.now_ms())) for job in jobs]
            self._store.workers.unregister(self._dead)
        for path in (self._home.bell(self._dead), self._home.life(self._dead), self._home.spool(self._dead)):
            remove_file(path)
        return ended

    def _end(self, job: Job) -> list[str]:
        """End what a job has left running; what is still there."""
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
    """Ring the first idle worker that has something to do; it passes the bell on."""
    queues = store.queues.ready()
    for row in store.workers.all() if queues else ():
        if row.job is None and any(map(row.takes, queues)) and ring(home, row.id):
            return


class Conditions:
    """What a worker depends on and nobody tells it of: its home, the schema, its signs of life, the clock."""

    def __init__(
        self, home: Home, store: Store, signs: Signs, complain: Callable[[str], None], clock: Clock
    ) -> None:  # fmt: skip
        self._home, self._store, self._signs, self._complain, self._clock = home, store, signs, complain, clock
        self._database = file_identity(home.database)
        self._clock_offset_ms = math.inf  # the first check finds backoffs that a wrong clock had begun
        self.is_homeless = False  # the home was removed or replaced under us
        self.is_outdated = False  # a newer queuectl has changed the schema
        self.memory_kills = 0  # how often the system had run out of memory at the last check

    @property
    def forbid_work(self) -> bool:
        """Is there no queue left that this worker could work for?"""
        return self.is_homeless or self.is_outdated

    def check_home(self) -> None:
        """Notice that the home was removed or replaced."""
        self.is_homeless = not self._home.is_there(self._database)

    def check_schema(self) -> None:
        """Notice that a newer queuectl has brought the database up: this one no longer knows what it writes to."""
        if not self.is_outdated and self._store.db.is_newer():
            self.is_outdated = True
            self._complain("the queue was brought up by a newer queuectl: leaves; start a new worker")

    def look_after_signs(self) -> None:
        """Make the signs of life anew where somebody has removed them."""
        try:
            self._signs.bell.look_after()
            self._signs.life.look_after()
        except OSError as error:
            self._complain(f"cannot make its signs of life anew: {error.strerror}")

    def was_clock_set_back(self) -> bool:
        """Was the time of day set back since the last call, or before the first?"""
        before, self._clock_offset_ms = (
            self._clock_offset_ms,
            self._clock.now_ms()
            - self._clock.monotonic_s() * 1000,  # how far it is ahead of the clock that nobody sets
        )
        return self._clock_offset_ms < before - 1000

    def note_memory_kills(self) -> None:
        """Remember how often the system ran out of memory, to tell whether it does so during a job."""
        self.memory_kills = memory_kills()


class Ring:
    """The other workers, as one of them sees them: they stand in a ring by their ids, and each watches the next below.

    So the death of each is noticed by another at once, and that costs the same however many they are.
    """

    def __init__(
        self, home: Home, store: Store, worker: int, bell: Bell, log: Callable[[str], None], clock: Clock
    ) -> None:  # fmt: skip
        self._home, self._store, self._worker, self._bell, self._log = home, store, worker, bell, log
        self._clock = clock
        self._others: list[tuple[int, str | None]] = []  # ids and processes, from the next one below
        self._seen = -1  # `commits_seen` when they were read
        self._recoveries: dict[int, Recovery] = {}  # of dead workers, by their ids
        self.idle_poll_s = DUTY_S  # how long an idle worker sleeps at most while nobody wakes it
        self.next_try_s = math.inf  # when a recovery is to be tried again, on the clock's monotonic scale

    def watch(self, settings: Settings) -> list[tuple[Job, State | None]]:
        """Let the end of the next living worker ring the bell, and recover those before it that have died.

        Two more are looked at: whoever should do so may be stopped. The jobs recovered, and what became of them.
        """
        version = self._store.db.commits_seen()
        if version != self._seen:
            self._others, self._seen = self._store.workers.ring_below(self._worker), version
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
        self._plan()
        return ended

    def _plan(self) -> None:
        """Say when to look again, of its own accord: each recovery has its own next try."""
        self.next_try_s = min((recovery.next_s for recovery in self._recoveries.values()), default=math.inf)
        until_try_s = max(0.0, self.next_try_s - self._clock.monotonic_s())
        self.idle_poll_s = min(MOST_IDLE_POLL_S, DUTY_S * (1 + len(self._others)), until_try_s)

    def _recover(self, dead: int, process: str | None, settings: Settings) -> list[tuple[Job, State | None]]:
        recovery = self._recoveries.setdefault(dead, Recovery(self._home, self._store, dead))
        before = recovery.left
        ended = recovery.attempt(process, settings, self._clock)
        self.log_left(dead, before, recovery.left)
        if ended is None:
            return []
        for job, state in ended:
            self._log(f"recovered job {job.id} of dead worker {dead}: {state.value if state else 'ended'}")
        del self._recoveries[dead]
        self._seen = -1  # what we commit ourselves is no news to our connection
        return ended

    def log_left(self, worker: int, before: str, after: str) -> None:
        """Note what cannot be ended of a worker's job, where that is news."""
        if after and after != before:
            reason = leftovers_reason(after)
            self._log(f"the job of worker {worker} cannot end: {reason.why}; {reason.remedy}")


class Hooks:
    """The hooks that a worker is to run for jobs that have ended, after it has recorded how."""

    def __init__(
        self, home: Home, store: Store, worker: int, env: Mapping[str, str], bell: Bell, log: Callable[[str], None]
    ) -> None:  # fmt: skip
        self._home, self._store, self._worker, self._env, self._bell, self._log = home, store, worker, env, bell, log
        self.waiting: list[tuple[str, str]] = []  # ids of jobs, and the line to run for each

    def run(self) -> None:
        """Run those that wait."""
        while self.waiting:
            self._run_one(*self.waiting.pop(0))

    def _run_one(self, id: str, line: str) -> None:
        """Run a hook; what goes wrong is noted, and changes nothing else."""
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
            trouble = run_hook(line, self._home, {**self._env, **variables}, document, run_tag, self._bell)
            if trouble:
                self._log(f"hook of job {job.id}: {trouble}")


class Duty:
    """Something that a worker does now and then, whatever else it is at."""

    def __init__(self, every_s: float, do: Callable[[], None]) -> None:
        self.every_s, self.do = every_s, do
        self.due_s = 0.0  # on the clock's monotonic scale: at once


class Worker:
    """One worker: it claims a job, runs it, records what came of it, and begins again.

    Workers are equal peers. Each looks after the jobs of those that died.
    """

    def __init__(self, home: Home, store: Store, row: WorkerRow, signs: Signs, log: Callable[[str], None],
                 clock: Clock) -> None:  # fmt: skip
        self._home, self._store, self._row, self._log, self._clock = home, store, row, log, clock
        self._bell, self._life = signs
        self._settings = Settings()
        self._signals = 0  # how often it was told by a signal to leave
        self._env = {
            **inherited_environment(),
            "QUEUECTL_HOME": home.path,
            "QUEUECTL_SLOT": str(row.slot),
        }
        self._hooks = Hooks(home, store, row.id, self._env, self._bell, log)
        self._spool = Spool(home.spool(row.id), row.slot <= WATCHED_SLOTS) if CAN_TELL_WHO_OPENS else None
        self._write_gate = WriteGate(home)
        self._database = file_identity(home.database)
        self._conditions = Conditions(home, store, signs, self._complain, clock)
        self._ring = Ring(home, store, row.id, self._bell, log, clock)
        self._seen = -1  # `commits_seen` when the last claim began
        self._next_poll_s = self._next_duty_s = 0.0  # on the clock's monotonic scale
        self._left = ""  # processes of the job in hand that cannot be ended
        self._complaint = ""
        self._ring_duty = Duty(DUTY_S, self._watch_ring)
        self._duties = [
            Duty(DUTY_S, self._conditions.check_home),
            Duty(DUTY_S, self._conditions.check_schema),
            Duty(DUTY_S, self._conditions.look_after_signs),
            Duty(DUTY_S, self._check_clock),
            Duty(DUTY_S, self._conditions.note_memory_kills),
            self._ring_duty,
        ]

    def leave(self) -> None:
        """Told by a signal: once to finish the job and go, twice to give it back and go."""
        self._signals += 1

    def run(self) -> None:
        """Work until told to leave."""
        report: tuple[Job, Outcome] | None = None
        while True:
            self._do_due_duties()
            self._hooks.run()
            came_idle = report is None
            job = self._keep_trying(functools.partial(self._exchange, report), matters=not came_idle)
            report = None
            if job:
                if job.on_lost == "dead":  # not even a power cut may let it run twice
                    self._keep_trying(self._store.db.sync, matters=True)
                if came_idle or job.after:  # what has just become ready may be more than one
                    self._wake_next()
                report = job, self._attempt(job)
            elif self._hooks.waiting:
                continue
            elif self._is_leaving() or (came_idle and self._is_drained()):
                break
            elif came_idle:  # otherwise claim once more first: the version is noted only then
                self._wait()
        self._write_gate.close()
        if self._spool:
            remove_file(self._spool.path)
        self._keep_trying(functools.partial(self._store.workers.unregister, self._row.id), matters=True)

    # ---- claim and record

    def _exchange(self, report: tuple[Job, Outcome] | None) -> Job | None:
        """Record what came of one job and claim the next, in one transaction."""
        now, store = self._clock.now_ms(), self._store
        ended: State | None = None
        if not report:
            self._seen = store.db.commits_seen()
        with self._write_gate, store.db.writing():
            if report:
                ended = store.jobs.finish(*report, self._settings, now, chance=self._clock.chance())
            hook = hook_for(ended, self._settings)
            self._settings = store.config.settings()
            is_resting = self._signals or self._conditions.forbid_work or hook
            job = None if is_resting else store.jobs.claim(self._row.id, self._row.queues, now)
        if report and hook:
            self._hooks.waiting.append((report[0].id, hook))
        if report and not ended:
            self._log(f"the result of job {report[0].id} came too late: refused")
        if self._clock.chance() < CHECKPOINT_CHANCE:
            self._checkpoint()
        return job

    def _checkpoint(self) -> None:
        with contextlib.suppress(StoreError):  # whoever is next will try again
            self._store.db.checkpoint()

    def _keep_trying(self, action: Callable[[], _Result], matters: bool) -> _Result:
        """Bookkeeping that fails is never the job's fault: keep what we have, and try until it works.

        Told to leave, a worker gives up; where something would be lost that matters, only when told twice.
        """
        while True:
            try:
                result = action()
            except StoreError as error:
                self._complain(str(error))
                self._do_due_duties()
                if self._signals >= (2 if matters else 1) or self._conditions.is_homeless:
                    raise
                self._bell.wait(1.0)
            else:
                self._complaint = ""
                return result

    def _complain(self, text: str) -> None:
        if text != self._complaint:
            self._log(text)
        self._complaint = text

    def _attempt(self, job: Job) -> Outcome:
        """Run a job once."""
        variables = {
            "PWD": job.cwd, "QUEUECTL_JOB_ID": job.id, "QUEUECTL_ATTEMPT": str(job.attempts),
            "QUEUECTL_QUEUE": job.queue,
        }  # fmt: skip
        if job.attempts == 1:
            self._remove_stale_log(job)
        self._next_poll_s = self._clock.monotonic_s() + POLL_S
        run_tag = run_tag_in(self._database, job.run_tag)
        supervision = Supervision(
            self._bell, functools.partial(self._life.note, run_tag), functools.partial(self._interrupted, job),
            self._report_left, self._clock,
        )  # fmt: skip
        outcome = run_attempt(
            job, self._home.log(job.id), self._spool, {**self._env, **variables, **(job.env or {})}, run_tag,
            self._settings, supervision,
        )  # fmt: skip
        if outcome.end is EndReason.EXITED and outcome.signal == 9 and memory_kills() > self._conditions.memory_kills:
            return outcome._replace(error=f"{outcome.error}; probably out of memory")
        return outcome

    def _report_left(self, left: Sequence[str]) -> None:
        """Name the processes of the job in hand that cannot be ended."""
        before, after = self._left, ", ".join(left)
        if after != before:
            with contextlib.suppress(StoreError):  # it is tried again in a second
                self._store.workers.set_leftovers(self._row.id, after or None)
                self._left = after
                self._ring.log_left(self._row.id, before, after)

    def _remove_stale_log(self, job: Job) -> None:
        """Remove the log that an earlier job of this id has left, if its removal is still to come."""
        log = self._home.log(job.id)
        with contextlib.suppress(StoreError):
            if is_regular(log) and not self._store.queries.history(job):
                remove_log(log)

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
            self._complain(str(error))
            return StopRequest(registered=True)

    def _interrupted(self, job: Job, rung: bool) -> EndReason | None:
        """Why a job must end early, asked while it runs."""
        if self._signals > 1:
            return EndReason.GIVEN_BACK
        if self._signals:
            self._complain(f"told to leave: finishes job {job.id} first; told again, gives it back")
        if not rung and self._clock.monotonic_s() < self._next_poll_s:
            return None
        self._next_poll_s = self._clock.monotonic_s() + POLL_S
        self._do_due_duties()
        request = self._stop_request(job)
        if request.cancelling:
            return EndReason.CANCELLED
        return EndReason.GIVEN_BACK if request.stop == "now" or not request.registered else None

    def _wait(self) -> None:
        """Sleep until there may be something to do."""
        try:
            due = self._store.jobs.next_due()
            while not (self._signals or self._conditions.forbid_work):
                left_s = math.inf if due is None else (due - self._clock.now_ms()) / 1000
                left_s = min(left_s, self._ring.idle_poll_s)
                if left_s <= 0 or self._bell.wait(left_s) or self._store.db.commits_seen() != self._seen:
                    return
                self._do_due_duties()
        except StoreError as error:
            self._complain(str(error))
            self._bell.wait(1.0)

    def _wake_next(self) -> None:
        """Wake one more idle worker if jobs remain."""
        with contextlib.suppress(StoreError):
            wake_one(self._home, self._store)

    # ---- duties

    def _do_due_duties(self) -> None:
        """Do each duty that is due. One that the database refuses is tried again in its next turn."""
        now_s = self._clock.monotonic_s()
        if self._bell.has_news:
            self._bell.has_news = False
            self._ring_duty.due_s = self._next_duty_s = now_s
        if now_s < self._next_duty_s:
            return
        for duty in self._duties:
            if (
                now_s >= duty.due_s and not self._conditions.is_homeless
            ):  # with the bells gone all others would seem dead
                duty.due_s = now_s + duty.every_s
                try:
                    duty.do()
                except StoreError as error:
                    self._complain(str(error))
        self._next_duty_s = min(duty.due_s for duty in self._duties)

    def _check_clock(self) -> None:
        if self._conditions.was_clock_set_back():
            self._store.jobs.restart_backoffs(self._clock.now_ms())
            self._claim_anew()

    def _watch_ring(self) -> None:
        ended = self._ring.watch(self._settings)
        self._ring_duty.due_s = min(self._ring_duty.due_s, self._ring.next_try_s)
        for job, state in ended:
            if hook := hook_for(state, self._settings):
                self._hooks.waiting.append((job.id, hook))
        if ended:
            self._claim_anew()
            self._wake_next()  # this worker may have a job in hand

    def _claim_anew(self) -> None:
        self._seen = -1  # what we commit ourselves is no news to our connection


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
    try:
        for ids in store.changes.prune(states, before, dry_run=dry_run):
            removed += len(ids)
            remove_logs(home, store, () if dry_run else ids)
    except KeyboardInterrupt:
        echo_err(f"{number_of(removed, 'job')} removed before it was interrupted")
        raise
    except StoreError as error:
        return removed, QueueError(f"broken off after {number_of(removed, 'job')} removed: {error.reason}")
    return removed, None


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
    """What a `cancel` came to."""

    ids: list[str]
    passed_over: list[Job]  # those that had ended before


def cancel_jobs(home: Home, store: Store, which: Selection, echo_err: EchoErr) -> Cancelled:
    """Cancel jobs, and wait until the processes of those under way are ended.

    A running job that came to another end is named on stderr, and so is one whose end cannot be waited for.
    """
    chosen = store.changes.cancel(which, now_ms())
    passed_over = [job for job in chosen if job.state in ENDED]
    running = [job for job in chosen if job.state is State.PROCESSING]
    ends: dict[int, State] | None = None
    with noting(echo_err, "their end is not known yet, look at them with `queuectl list`", running):
        ends = wait_for_cancelled(home, store, running, echo_err)
    if ends is None:
        return Cancelled([job.id for job in chosen if job.state in WAITING], passed_over)
    for job in running:
        if ends.get(job.seq) is not State.CANCELLED:
            now = ends[job.seq].value if job.seq in ends else "removed"
            echo_err(f"job {job.id} is not cancelled but {now}: it had come to its end")
    gone = [job.id for job in chosen if job.state in WAITING or ends.get(job.seq) is State.CANCELLED]
    return Cancelled(gone, passed_over)


def wait_for_cancelled(home: Home, store: Store, running: Sequence[Job], echo_err: EchoErr) -> dict[int, State]:
    """Wait until the attempts of these jobs have been ended; the states of those that are there then, by seq."""
    holders = {job.worker: Recovery(home, store, job.worker or 0) for job in running}
    for worker in holders:
        ring(home, worker or 0)
    report = WaitReporter(store, home, echo_err)
    seqs = [job.seq for job in running]
    while running and store.queries.counts(seqs)[State.PROCESSING]:
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
    store: Store, seqs: Sequence[int] | None, timeout_s: float, progress: Callable[[int], object],
    look: Callable[[], object],
) -> dict[State, int] | None:  # fmt: skip
    """Wait until these jobs, or with None all of the queue, have ended; how they did. None at the time-out.

    `progress` hears how many have, `look` is called all the while.
    """
    deadline = time.monotonic() + timeout_s
    seen, before = None, None
    removed = 0  # of the dead and cancelled: that they are gone does not make them good
    while True:
        version = store.db.commits_seen()
        if version != seen:
            counts, seen = store.queries.counts(seqs), version
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
    by_default, own = store.queries.recent_timeouts(default)
    counts = store.queries.counts()
    can_retry = counts[State.DEAD] > 0 and store.queries.can_retry()
    return Overview(counts, alive, store.queues.all(), lost, by_default, stuck_lines(rows), default, own, can_retry)


def reason_of(home: Home, store: Store, job: Job) -> Reason:
    """Why a job is not running now, or why what runs cannot be ended."""
    for row in store.workers.all():
        if row.leftovers and row.job == job.id:
            return leftovers_reason(row.leftovers)
    living, queues = living_workers(home, store), store.queues.all()
    [reasons] = store.queries.wait_reasons([job], living, queues, store.config.settings())
    return why_not_running(job, reasons, now_ms())


def pid_of(home: Home, job: Job) -> int | None:
    """The process id of a job's command, while it runs."""
    if job.state is not State.PROCESSING or job.worker is None:
        return None
    command = read_command(home, job.worker, run_tag_in(file_identity(home.database), job.run_tag))
    return command.pid if command else None


def stuck_lines(rows: Iterable[WorkerRow]) -> list[str]:
    """The jobs that cannot be ended, why, and what helps."""
    return [
        f"job {row.job} cannot end: {reason.why}; {reason.remedy}"
        for row in rows
        if row.leftovers and row.job
        for reason in [leftovers_reason(row.leftovers)]
    ]


class StallReporter:
    """Tells who waits for jobs what keeps them from ending, with the command that helps: once for each such thing."""

    def __init__(self, home: Home, store: Store, seqs: Sequence[int] | None, echo_err: EchoErr) -> None:
        self._home, self._store, self._seqs, self._echo_err = home, store, seqs, echo_err
        self._next_poll_s = 0.0  # on the monotonic scale
        self._told: str | None = None

    def __call__(self) -> None:
        """Tell what is new, at most once a second."""
        if time.monotonic() >= self._next_poll_s:
            self._next_poll_s = time.monotonic() + DUTY_S
            found = self._obstacle()
            if found and found != self._told:
                self._echo_err(found)
            self._told = found

    def _obstacle(self) -> str | None:
        job = self._store.queries.next_of(self._seqs)
        if not job:
            return None
        reason = reason_of(self._home, self._store, job)
        return f"job {job.id}: {reason.why}; {reason.remedy}" if reason.why and reason.remedy else None


def failures_line(store: Store, seqs: Sequence[int] | None, counts: Mapping[State, int] | None) -> str | None:
    """A line that names some of these jobs, with None of all, that have ended and not completed."""
    failed = sum(counts[state] for state in HOPELESS) if counts else 0
    if not counts or not failed:
        return None
    named = [how_ended(job) for job in store.queries.not_completed(seqs, 3)]
    more = [f"{failed - len(named)} more"] if failed > len(named) > 0 else []
    what = ": ".join(filter(None, ("did not complete", ", ".join(named + more))))
    return f"{failed} of {sum(counts.values())} {what}"


def stream_until_done(
    home: Home, store: Store, ids: Sequence[str], write: Callable[[bytes], object], echo_err: EchoErr
) -> int:
    """Wait for jobs, handing on the output of one alone; what to exit with."""
    jobs = [store.queries.get(id) for id in ids]
    seqs = [job.seq for job in jobs]
    report_stall = StallReporter(home, store, seqs, echo_err)
    if len(jobs) != 1:
        found = wait_for_jobs(store, seqs, math.inf, lambda _: None, report_stall)
        echo_some(echo_err, failures_line(store, seqs, found))
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
    return all(put_out(functools.partial(click.echo, line, color=wants_colour())) for line in lines)


def echo_json(document: Any) -> bool:
    """Print one JSON document."""
    return put_out(functools.partial(click.echo, json.dumps(document)))


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


MOST = 2**63 - 1  # the largest integer of the database
NO_JOBS = ("no such jobs",)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document.")


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
    metavar="FIELD", help="As if nothing had been said of it; may be repeated.",
)  # fmt: skip
limit_option = click.option("--limit", type=click.IntRange(0, MOST), metavar="N",
                            help="The newest N; default 100, with --all or --json no limit.")  # fmt: skip
queues_option = click.option("--queue", "queues", multiple=True, metavar="Q", shell_complete=complete_queues,
                             help="Take only this queue; may be repeated.")  # fmt: skip
key_argument = click.argument("key", shell_complete=complete_keys)


def state_option(states: Iterable[State]) -> Callable[[Any], Any]:
    """--state, which may be repeated, of the states that a command is for."""
    return click.option("--state", "states", multiple=True, type=click.Choice([state.value for state in states]),
                        help="Those in this state; may be repeated.")  # fmt: skip


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
        made = click.option("--queue", metavar="Q", help="Those of this queue.", shell_complete=complete_queues)(made)
        made = click.option("--tag", metavar="T", help="Those with this tag.", shell_complete=complete_tags)(made)
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
    made = click.option("--null", "-0", is_flag=True, help="The items of --each end in NUL.")(made)
    return click.option("--each", type=file, metavar="FILE", help="A job for each line; {} stands for it.")(made)


@cli.command("enqueue", cls=TypedCommand)
@click.argument("job", nargs=-1, metavar="[JOB | - | -- COMMAND [ARG]...]", shell_complete=complete_files)
@field_options(*(name for name in FIELDS if name != "command"))
@source_options
@click.option("--skip-existing", is_flag=True, help="Pass over ids that exist.")
@click.option("--dry-run", is_flag=True, help="Print the jobs as JSON Lines and store nothing.")
@click.option("--wait", is_flag=True, help="Stay, show the output, exit with the exit code (124: timed out).")
@json_option
def enqueue_command(
    job: Sequence[str], sources: dict[str, Any], skip_existing: bool, dry_run: bool, wait: bool, as_json: bool,
    **options: Any,
) -> int:  # fmt: skip
    """Store jobs: one as JSON, one as typed behind --, or JSON Lines from standard input with -.

    --each, --array, --csv and --lines make many from one line: {} stands for the item, {.} for it without its
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
            stored = store.jobs.enqueue(counted, given.now, skip_existing=skip_existing, tag_them=given.wants_tag)
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
    jobs = list(stored) if as_json or keep else stored
    if as_json:
        tags: Sequence[dict[str, Any]] = ({"tag": None}, {"tag": stored.tag}) if stored.tag else ({}, {})
        echo_json([{"id": id, "created": created, **tags[created]} for id, created in jobs])
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
    """Start, stop and list workers."""


@worker_group.command("start")
@click.option("--count", type=click.IntRange(1, 1000), default=1, metavar="N", help="How many; default 1.")
@queues_option
@click.option("--foreground", is_flag=True, help="Be one worker, here, until told to stop.")
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
@click.option("--now", is_flag=True, help="End their jobs too, and give them back.")
@click.option("--timeout", metavar="TIME", help="Wait so long at the most.")
@json_option
@with_store
def worker_stop_command(
    home: Home, store: Store, ids: Sequence[int], now: bool, timeout: str | None, as_json: bool
) -> int:
    """Let each worker, or those named, finish its job and leave; waits for them."""
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

    What is missing is started; returns once it is up. Who is too much finishes its job and leaves: idle workers
    first, of them the newest. Workers that are leaving do not count.
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
    """Show how many jobs are where, and what stands in the way."""
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
@click.option(
    "--next", "following", type=click.IntRange(1, MOST), metavar="N", help="The N that start next, in that order."
)
@limit_option
@click.option("--sort", type=click.Choice([f"{sign}{key}" for key in SORTS for sign in ("", "-")]),
              metavar="KEY", help=f"By {', '.join(SORTS)}; -KEY for the other way round.")  # fmt: skip
@click.option("--columns", metavar="NAMES", help="For scripts: these JSON fields, like id,state, with tabs between.")
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
    jobs = store.queries.jobs(where, LIST_ROWS if is_cut else limit, sort)
    more = 0 if as_json or names else store.queries.how_many(where) - len(jobs)
    print_jobs(home, store, jobs, names, as_json, more)


def print_jobs(home: Home, store: Store, jobs: Sequence[Job], names: Sequence[str] | None, as_json: bool,
               more: int = 0) -> None:  # fmt: skip
    """Print jobs as JSON, as columns for a script, or as a table for a person."""
    if as_json:
        echo_json([job_json(job) for job in jobs])
    elif names:
        echo(column_line(job, names) for job in jobs)
    else:
        living, queues = living_workers(home, store), store.queues.all()
        found = store.queries.wait_reasons(jobs, living, queues, store.config.settings())
        echo(job_lines(jobs, found, more, now_ms(), width()))


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
@click.option("--failed", is_flag=True, help="Of the job that failed last.")
@click.option("--follow", "-f", is_flag=True, help="Go on until the job has ended.")
@click.option("--tail", type=click.IntRange(0, MOST), metavar="N", help="The last N lines alone.")
@click.option("--attempt", type=click.IntRange(1, MOST), metavar="K", help="The output of attempt K alone.")
@click.option("--raw", is_flag=True, help="Every byte, progress bars in all their states.")
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
        report_stall = StallReporter(home, store, [job.seq], echo_err)
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
@click.option("--timeout", metavar="TIME", help="Wait so long at the most; exit 124 then.")
@json_option
@with_store
def wait_command(home: Home, store: Store, which: Selection, timeout: str | None, as_json: bool) -> int:
    """Wait until jobs have ended, none named: all. Exit 0 all completed, 1 some not."""
    every = which in (NOTHING, EVERY_JOB)
    seqs = None if every else [job.seq for job in some_of(store.queries.chosen(which))]
    counts = store.queries.counts(seqs)
    timeout_s = option_duration("--timeout", timeout)
    with progress_to(sum(counts.values())) as progress:
        found = wait_for_jobs(store, seqs, timeout_s, progress, StallReporter(home, store, seqs, echo_err))
    if as_json:
        echo_json({state.value: found[state] if found else 0 for state in ENDED} | {"timed_out": found is None})
    echo_some(echo_err, failures_line(store, seqs, found))
    return exit_code_of_all(found)


def some_of(jobs: list[Job]) -> list[Job]:
    """Jobs to wait for; NotFound where there are none, which is most likely a slip."""
    if not jobs:
        raise NotFound("no job has that tag, queue or state")
    return jobs


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
    """Let waiting jobs never run, and end those that do; jobs that have ended are passed over."""
    done, passed_over = cancel_jobs(home, store, which, echo_err)
    echo_some(echo_err, passed_over_line(passed_over, len(done) + len(passed_over)))
    echo_done(done, "cancelled", as_json, none=[] if passed_over else NO_JOBS)


@cli.command("edit", cls=TypedCommand)
@change_options(*EDITABLE)
@json_option
@with_store
def edit_command(home: Home, store: Store, which: Selection, spec: Spec, as_json: bool) -> None:
    """Change waiting or dead jobs, which stay dead; a command behind -- replaces theirs.

    With ids, --queue and --tag are new values; without, they choose the jobs.
    """
    done = store.changes.edit(which, require_changes(spec), now_ms())
    wake_worker(home, store, echo_err)
    document = [{"id": after.id, "changed": changed_fields(before, after)} for before, after in done]
    answer(as_json, document, [edit_line(before, after) for before, after in done] or NO_JOBS)


@cli.command("rerun", cls=TypedCommand)
@change_options(*ENDED)
@json_option
@with_store
def rerun_command(home: Home, store: Store, which: Selection, spec: Spec, as_json: bool) -> None:
    """Put jobs that have ended, in whatever way, back to pending with no attempts made.

    Fields are changed before the job can start, and a command behind -- replaces theirs. With ids, --queue and
    --tag are new values; without, they choose the jobs.
    """
    done = store.changes.rerun(which, now_ms(), spec)
    wake_worker(home, store, echo_err)
    echo_done(done, "pending again", as_json)


def require_changes(spec: Spec) -> Spec:
    """The same; BadInput where nothing is to change."""
    if not spec:
        raise BadInput("name a field to change, for example --priority 5")
    return spec


@cli.group("dlq")
def dlq_group() -> None:
    """The dead letter queue: jobs whose retries are used up."""


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

    Fields are changed before the job can start, and a command behind -- replaces theirs. With ids, --queue and
    --tag are new values; without, they choose the jobs.
    """
    done = store.changes.retry_dead(which, now_ms(), spec)
    wake_worker(home, store, echo_err)
    echo_done(done, "pending again", as_json)


@dlq_group.command("purge")
@selection_options()
@json_option
@with_store
def dlq_purge_command(home: Home, store: Store, which: Selection, as_json: bool) -> None:
    """Remove dead jobs and their logs for good."""
    done = store.changes.purge_dead(which)
    with noting(echo_err, "done, but logs are left; remove them: queuectl doctor --repair"):
        remove_logs(home, store, done)
    echo_done(done, "purged", as_json)


def echo_done(ids: Sequence[str], what: str, as_json: bool, none: Sequence[str] = NO_JOBS) -> None:
    """Print what has become of some jobs, or that there were none."""
    answer(as_json, [{"id": id} for id in ids], [f"{id} {what}" for id in ids] or none)


@cli.command("hold")
@selection_options(*WAITING)
@json_option
@with_store
def hold_command(home: Home, store: Store, which: Selection, as_json: bool) -> None:
    """Keep waiting jobs from starting until `release`."""
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
@click.option("--older-than", default="0", metavar="TIME", help="Ended at least so long ago.")
@state_option(ENDED)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
@with_store
def prune_command(
    home: Home, store: Store, older_than: str, states: Sequence[str], dry_run: bool, as_json: bool
) -> None:
    """Remove jobs that have ended (completed, dead or cancelled), and their logs."""
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
    """Write jobs, none named: all, as JSON Lines that `enqueue -` reads back."""
    echo(export_line(job) for job in store.queries.chosen(EVERY_JOB if which == NOTHING else which))


@cli.group("config")
def config_group() -> None:
    """What holds for every job that does not say otherwise."""


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
    """Print a value alone."""
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
@click.option("--restore", is_flag=True, help="Put the copy in the place of the queue.")
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
    """Show how many jobs did well, how long they waited and ran."""
    refuse_both(prometheus and "--prometheus", as_json and "--json")
    if prometheus:
        now = now_ms()
        versions = {"version": __version__, "python": python_version(), "sqlite": sqlite_version()}
        oldest = store.queries.oldest_waiting(now)
        echo(prometheus_lines(overview(home, store), store.queries.tallies(), oldest, now, versions))
        return
    found = metrics_json(store.queries.counts(), store.queries.times(), store.queries.tallies())
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
    """Print the script that completes queuectl's words in a shell."""
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
