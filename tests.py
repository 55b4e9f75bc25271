#!/usr/bin/env python3
"""Tests of queuectl: `python tests.py [--long | --quick] [--dev] [NAME or part of a name]...` (`--help`)

Each test has a temporary home of its own, waits for conditions and never for a time, and leaves no
process behind. Needs click; with --dev (those tests alone) also hypothesis and prometheus-client.
They stand in the order of the sections of queuectl.py. How a command line behaves is tested with
real processes, races with real databases and workers, what is pure with the time passed in.
"""

from __future__ import annotations

import ast
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import difflib
import functools
import inspect
import io
import json
import math
import os
import random
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import symtable
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

import queuectl as q

HERE = Path(__file__).resolve().parent
PROGRAM = [sys.executable, str(HERE / "queuectl.py")]
WINDOWS = sys.platform == "win32"
DEADLINE_S = 240 if WINDOWS else 90  # generous: reached only by what will never happen
KILL = signal.SIGTERM if WINDOWS else signal.SIGKILL  # on Windows any signal ends a process at once
LONG = "--long" in sys.argv
OPTIONS = ("--long", "--quick", "--dev", "-h", "--help")
ENV_LOCK = threading.Lock()  # the environment belongs to all tests

Test = Callable[..., None]


# ---- the harness


class Skip(Exception):
    """What a test is about is not there."""


def posix(test: Test) -> Test:
    """For systems with signals, modes and sessions."""
    test.here = not WINDOWS  # type: ignore[attr-defined]
    return test


def windows(test: Test) -> Test:
    """For Windows."""
    test.here = WINDOWS  # type: ignore[attr-defined]
    return test


def dev(test: Test) -> Test:
    """Needs development dependencies: run with --dev alone, one by one: hypothesis sets the recursion limit of all."""
    test.dev = test.alone = True  # type: ignore[attr-defined]
    return test


def alone(test: Test) -> Test:
    """Needs both cores: run with no other test beside it."""
    test.alone = True  # type: ignore[attr-defined]
    return test


def slow(test: Test) -> Test:
    """Takes long: left out with --quick, as are those that run alone."""
    test.slow = True  # type: ignore[attr-defined]
    return test


def same(got: Any, wanted: Any) -> None:
    """Fail and show both unless they are equal."""
    assert got == wanted, f"\n     got {got!r}\n  wanted {wanted!r}"


def until(condition: Callable[[], Any], what: str = "") -> Any:
    """Wait for a condition and return what it gave."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"never came true: {what or inspect.getsource(condition).strip()}"
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def refuses(kind: type[BaseException], *words: str) -> Iterator[None]:
    """The block must raise that kind of error, with those words in it."""
    try:
        yield
    except kind as error:
        for word in words:
            assert word in str(error), f"no {word!r} in {str(error)!r}"
    else:
        raise AssertionError(f"did not raise {kind.__name__}")


class Home:
    """A queue in a directory of its own, driven as its users drive it; made at first use."""

    def __init__(self) -> None:
        self.root = Path(os.path.realpath(tempfile.mkdtemp(prefix="queuectl-test-")))
        self.path, self.work = self.root / "home", self.root / "work"
        self.work.mkdir()
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("QUEUECTL_", "PYTHONIO", "PYTHONUTF8"))}
        self.env |= {"QUEUECTL_HOME": str(self.path), "PYTHONDONTWRITEBYTECODE": "1"}

    # -- the command line

    def popen(
        self, *args: str, env: dict[str, str] | None = None, before: Sequence[str] = (), **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a command of queuectl, with the words of a tool before it."""
        where: dict[str, Any] = {"cwd": self.work, "env": {**self.env, **(env or {})}}
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*before, *PROGRAM, *args], **{**where, **pipes, **options})

    def run(self, *args: str, stdin: str | bytes = "", code: int = 0, **options: Any) -> Ran:
        """Run a command of queuectl to its end, which must have that exit code and be orderly."""
        process = self.popen(*args, stdin=subprocess.PIPE, **options)
        given = stdin if isinstance(stdin, bytes) else stdin.encode()
        try:
            out, err = process.communicate(given, timeout=DEADLINE_S)
        finally:
            process.kill()
        ran = Ran(process.returncode, out, err)
        same((args, ran.code, ran.err if ran.code != code else ""), (args, code, ""))
        assert "Traceback" not in ran.err and "is locked" not in ran.err, ran.err
        return ran

    def out(self, *args: str, **options: Any) -> str:
        """What a command prints."""
        return self.run(*args, **options).out

    def json(self, *args: str, **options: Any) -> Any:
        """What a command says with --json: one document and nothing else."""
        at = args.index("--") if "--" in args else len(args)
        return json.loads(self.out(*args[:at], "--json", *args[at:], **options))

    def fails(self, *args: str, code: int = 1, **options: Any) -> str:
        """The one line with which a command must fail, having changed nothing."""
        before = self.dump()
        ran = self.run(*args, code=code, **options)
        assert re.fullmatch(r"Error: [^\n]+\n", ran.err), ran.err
        same((ran.out, self.dump()), ("", before))
        return ran.err

    def start(self, count: int = 1, *args: str, **options: Any) -> list[q.WorkerRow]:
        """Start workers; those that run then."""
        self.run("worker", "start", "--count", str(count), *args, **options)
        return self.store.workers.all()

    # -- the database

    @functools.cached_property
    def home(self) -> q.Home:
        """The home, as queuectl makes it."""
        with ENV_LOCK:
            os.environ["QUEUECTL_HOME"] = str(self.path)
            try:
                return q.open_home()
            finally:
                del os.environ["QUEUECTL_HOME"]

    @functools.cached_property
    def store(self) -> q.Store:
        """The store of this home."""
        return q.open_store(self.home.database, DEADLINE_S)

    def dump(self) -> list[str]:
        """Every row there is."""
        with contextlib.closing(sqlite3.connect(self.home.database, timeout=DEADLINE_S)) as db:
            return list(db.iterdump())

    def sql(self, statement: str) -> list[Any]:
        """Run a statement, behind queuectl's back."""
        with contextlib.closing(sqlite3.connect(self.home.database, timeout=DEADLINE_S)) as db, db:
            return db.execute(statement).fetchall()

    def add(self, command: str | list[str] = "exit 0", **fields: Any) -> str:
        """Store a job without the command line; its id."""
        return self.add_all([{"command": command, **fields}])[0]

    def add_all(self, jobs: Iterable[dict[str, Any]]) -> list[str]:
        """Store jobs in one transaction."""
        now = q.now_ms()
        specs = [("", q.check_job({"cwd": str(self.work), **job}, now)) for job in jobs]
        return [id for id, _ in self.store.intake.enqueue(specs, now)]

    def job(self, id: str) -> q.Job:
        """A job as it is now."""
        return self.store.queries.get(id)

    def state(self, id: str) -> str:
        """The state of a job."""
        return self.job(id).state.value

    def history(self, id: str) -> list[q.Attempt]:
        """The attempts of a job that have ended."""
        return self.store.queries.history(self.job(id))

    def ended(self, id: str) -> q.Job:
        """A job, once it has ended."""
        until(lambda: self.job(id).state in q.ENDED, f"{id} ends")
        return self.job(id)

    def until_up(self, id: str) -> None:
        """Wait until the command of a job runs and has said so."""
        until(lambda: b"up" in self.log(id), f"{id} is up")

    def worker_row(self, pid: int = 0) -> int:
        """Register a worker that is not there."""
        return self.store.workers.register(pid, "host", None, False, q.now_ms(), lambda _: None, lambda _: True)[0].id

    def claim(self, worker: int, now: int | None = None) -> q.Job:
        """Claim a job for a worker; there must be one."""
        job = self.store.jobs.claim(worker, None, q.now_ms() if now is None else now)
        assert job
        return job

    # -- files

    def log(self, id: str) -> bytes:
        """A job's output so far."""
        path = Path(self.home.log(id))
        return path.read_bytes() if path.exists() else b""

    def script(self, name: str, text: str) -> str:
        """A Python program in the directory where jobs run."""
        (self.work / name).write_text(text)
        return name

    def text(self, name: str) -> str:
        """A file in the directory where jobs run; empty where it is missing."""
        path = self.work / name
        return path.read_text() if path.exists() else ""

    def lines(self, name: str) -> list[str]:
        """The whole lines of a file in the directory where jobs run."""
        return [line.rstrip("\n") for line in self.text(name).splitlines(True) if line.endswith("\n")]

    # -- the end

    def kill_workers(self) -> list[q.WorkerRow]:
        """`kill -9` of every worker."""
        rows = self.store.workers.all()
        for number in (KILL,) if WINDOWS else (signal.SIGSTOP, KILL):  # at once: none sees another dead
            for row in rows:
                os.kill(row.pid, number)
        until(lambda: not q.living_workers(self.home, self.store), "killed workers are gone")
        return rows

    def close(self) -> None:
        """Leave nothing behind, whatever has happened."""
        with contextlib.suppress(Exception):
            if os.path.exists(self.home.database) and self.store.workers.all():
                pids = [row.pid for row in q.living_workers(self.home, self.store)]
                with contextlib.suppress(AssertionError):
                    self.run("worker", "stop", "--now", "--timeout", "20")
                left = {row.pid for row in q.living_workers(self.home, self.store)}
                for pid in left.intersection(pids):
                    os.kill(pid, KILL)
        with contextlib.suppress(Exception):
            self.store.close()
        self._sweep()
        shutil.rmtree(self.root, ignore_errors=True)

    def _sweep(self) -> None:
        """End every process that was started with this home in its environment."""
        for entry in Path("/proc").glob("[0-9]*") if not WINDOWS else ():
            with contextlib.suppress(OSError):
                if f"QUEUECTL_HOME={self.path}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)


class Ran:
    """A command that has ended."""

    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code, self.raw = code, out
        self.out, self.err = (s.decode("utf-8", "replace").replace("\r\n", "\n") for s in (out, err))


def is_running(pid: int) -> bool:
    """Is there such a process, and has it not ended?"""
    if sys.platform == "win32":
        import ctypes

        kernel32 = ctypes.WinDLL("kernel32")
        kernel32.OpenProcess.restype = ctypes.c_void_p
        handle = ctypes.c_void_p(kernel32.OpenProcess(0x100000, False, pid))
        try:
            return bool(handle.value) and kernel32.WaitForSingleObject(handle, 0) == 0x102
        finally:
            kernel32.CloseHandle(handle)
    if os.path.isdir("/proc/self"):
        try:
            return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
        except OSError:
            return False
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return True
    return False


def completed(home: Home, count: int) -> bool:
    """Have so many jobs completed?"""
    return home.store.queries.counts()[q.State.COMPLETED] >= count


def sleeping(seconds: float) -> str:
    """A line for the shell that says `up` and takes that long."""
    return f"echo up& ping -n {int(seconds) + 1} 127.0.0.1 >nul" if WINDOWS else f"echo up; exec sleep {seconds}"


def a_job(**changes: Any) -> q.Job:
    """A job that is in no database."""
    blank: dict[str, Any] = dict.fromkeys(q.COLUMNS) | {
        "seq": 1, "id": "a", "command": "exit 0", "priority": 0, "queue": "default", "cwd": "/", "hold": False,
        "on_lost": "retry", "snooze": False, "state": q.State.PENDING, "attempts": 0, "blockers": 0,
        "cancelling": False, "created_at": 0, "updated_at": 0,
    }  # fmt: skip
    return q.Job(**(blank | changes))


def a_worker(**changes: Any) -> q.WorkerRow:
    """A worker that is in no database."""
    blank: dict[str, Any] = {"id": 1, "pid": 1, "host": "h", "slot": 1, "queues": None, "drain": False, "stop": None}
    return q.WorkerRow(**(blank | {"started_at": 0, "job": None} | changes))


def exited(code: int) -> q.Outcome:
    """The outcome of a command that ended by itself."""
    return q.Outcome(q.EndReason.EXITED, code, error=f"exit code {code}" if code else None)


# A job that runs until a file is there.
LONG_JOB = "import os, time\nwhile not os.path.exists('go'):\n    time.sleep(0.02)"


# What a command is told: its arguments, where it is, and its environment.
TELL = """
import json, os, sys
print(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ), sys.stdin.read()]))
"""


TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


# -- what it takes to break things


# A child that cannot be asked to leave and is in a session of its own; it writes down its id.
DEAF = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.setsid()
with open(sys.argv[1], "a") as file:
    file.write(f"{os.getpid()}\\n")
time.sleep(600)
"""


def counters_equal_rows(home: Home) -> None:
    """The counters and the counted parents are what the rows say."""
    counted = home.sql("SELECT state, queue, count(*) FROM jobs GROUP BY state, queue ORDER BY state, queue")
    same(home.sql("SELECT state, queue, n FROM counts WHERE n <> 0 ORDER BY state, queue"), counted)
    wrong = home.sql("""SELECT id FROM jobs WHERE blockers <> (SELECT count(*) FROM dependencies
        JOIN jobs AS parents ON parents.seq = parent WHERE child = jobs.seq AND parents.state <> 'completed')""")
    same(wrong, [])


def failing_disk() -> str:
    """A program that lets this process's waits for the disk fail from then on: it has the kernel refuse the calls."""
    numbers = {"x86_64": (74, 75), "aarch64": (82, 83)}.get(getattr(os, "uname", lambda: None)().machine)  # type: ignore[union-attr]
    if not numbers or not sys.platform.startswith("linux"):
        raise Skip("system calls are made to fail on Linux alone")
    return f"""
import ctypes, struct
load, jump, give = 0x20, 0x15, 0x06
refuse, allow = 0x50005, 0x7FFF0000
is_sync = [(jump, 1, 0, {numbers[0]}), (jump, 0, 1, {numbers[1]})]
code = [(load, 0, 0, 0), *is_sync, (give, 0, 0, refuse), (give, 0, 0, allow)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
if libc.prctl(22, 2, ctypes.byref(Program(5, ctypes.addressof(code)))):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    sys.exit(77)
"""


def seen_on_a_terminal(home: Home, *args: str, stream: str = "stdout", **env: str) -> bytes:
    """What a command prints on a terminal."""
    import pty

    master, slave = pty.openpty()
    process = home.popen(*args, env={"TERM": "xterm", **env}, **{stream: slave})
    os.close(slave)
    text = b""
    with contextlib.suppress(OSError), open(master, "rb", buffering=0) as terminal:
        while block := terminal.read(4096):
            text += block
    process.communicate(timeout=DEADLINE_S)
    return text


# How a process begins that dies, or sees another clock, at a point that a test names.
CHILD = """import os, signal, sys, time
import queuectl as q
HERE = os.getcwd()
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def until(name):
    while not os.path.exists(f"{HERE}/{name}"):
        time.sleep(0.01)
"""
SERVE = "\nq.serve(q.open_home(), [], False, echo=True)\n"


# The time-out of an attempt begins when the file `ready` is there: once the command has come so far, however slowly.
READY = """
def watch(*words, watch=q._watch):
    until("ready")
    return watch(*words)
q._watch = watch"""


class Child(subprocess.Popen[Any]):
    """A process that does not outlive its block, whatever happens there."""

    def __exit__(self, *how: Any) -> None:
        """Kill it, and then do what else is to be done."""
        self.kill()
        super().__exit__(*how)


def child(home: Home, program: str, *words: str, **options: Any) -> Child:
    """A process that has queuectl at hand, and does with it as the program says."""
    where: dict[str, Any] = {"cwd": home.work, "env": {**home.env, "PYTHONPATH": str(HERE)}}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return Child([sys.executable, "-c", CHILD + program, *words], **{**where, **pipes, **options})


def finished(process: subprocess.Popen[Any]) -> Ran:
    """A process that ran to its end."""
    try:
        out, err = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    return Ran(process.returncode, out or b"", err or b"")


def killed(process: subprocess.Popen[Any]) -> None:
    """Wait for a process to die of SIGKILL."""
    ran = finished(process)
    assert ran.code == -signal.SIGKILL, (ran.code, ran.out, ran.err)


def says(process: subprocess.Popen[Any], text: str) -> None:
    """Read what a process says until it has said that."""
    assert process.stderr
    for line in process.stderr:
        if text.encode() in line:
            return
    raise AssertionError(f"it never said {text!r}")


def one_line(ran: Ran, *texts: str) -> None:
    """A command failed as commands shall: with one line that says why."""
    assert re.fullmatch(r"Error: [^\n]+\n", ran.err) and all(text in ran.err for text in texts), (texts, ran.err)


def pids_with(text: str) -> dict[int, str]:
    """The processes that have a text in their environment or command line, and those command lines."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes()
            if text.encode() in words + (entry / "environ").read_bytes() and is_running(int(entry.name)):
                found[int(entry.name)] = words.replace(b"\0", b" ").decode(errors="replace").strip()
    return {pid: words for pid, words in found.items() if pid != os.getpid()}


def attempts_running(home: Home) -> dict[int, str]:
    """The processes that have the run tag of an attempt of this home."""
    found = pids_with(q.run_tag_in(q.file_identity(home.home.database), ""))
    return {pid: words for pid, words in found.items() if q._run_of(pid) not in (None, q._run_number(q.NO_ATTEMPT))}


def living(home: Home) -> list[q.WorkerRow]:
    """The workers that run now."""
    return q.living_workers(home.home, home.store)


def touch(home: Home, name: str) -> None:
    """Give the sign that a job or a child waits for."""
    (home.work / name).touch()


def waits_for(name: str) -> str:
    """A line for the shell that waits for that sign."""
    return f"while [ ! -e {name} ]; do sleep 0.02; done"


def errors_of(home: Home, id: str) -> list[str | None]:
    """The errors of a job's attempts."""
    return [attempt.error for attempt in home.history(id)]


def is_well(home: Home) -> None:
    """`doctor` finds nothing, and the counters equal the rows."""
    assert "all is well" in home.out("doctor")
    rows = collections.Counter(job.state for job in home.store.queries.jobs())
    same(home.store.queries.counts(), {state: rows[state] for state in q.State})


@functools.cache
def refusal(*words: str) -> str:
    """Why a tool of the system is of no use here; empty where it works."""
    if not shutil.which(words[0]):
        return f"{words[0]} is not installed"
    ran = subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL, text=True, timeout=DEADLINE_S)
    why = " ".join(ran.stderr.splitlines()[-1:])
    return f"the system does not permit {words[0]}: {why}" if ran.returncode else ""


def needs(*words: str) -> None:
    """Skip the test unless that works."""
    if reason := refusal(*words):
        raise Skip(reason)


WRITES = "pwrite64,fdatasync,fsync,ftruncate"  # the system calls by which SQLite writes, its shared memory included


def straced(log: Path, inject: str = "") -> list[str]:
    """The words before a command that log its writes, and what it starts, and inject a fault into one of them."""
    needs("strace", "-f", "-qq", "-o", os.devnull, "-e", "inject=fsync:error=EIO:when=1", "true")
    words = ["strace", "-f", "-qq", "-o", str(log), "-e", f"trace={WRITES},execve"]
    return [*words, *(["-e", f"inject={inject}"] if inject else [])]


def faked_clock(home: Home, offset: str) -> dict[str, str]:
    """The environment of a process that sees another time of day, which `turn_clock` changes; elapsed time is true."""
    found = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), *Path("/usr/lib").glob("faketime/libfaketime.so.1")]
    if not found:
        raise Skip("faketime is not installed")
    turn_clock(home, offset)
    clock = {"FAKETIME_TIMESTAMP_FILE": str(home.work / "faketime"), "FAKETIME_NO_CACHE": "1"}
    return {**home.env, "LD_PRELOAD": str(found[0]), "DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1", **clock}


def turn_clock(home: Home, offset: str) -> None:
    """Set the clock of those that have a faked one: `+2h`, `-1d`, `+0`."""
    (home.work / "faketime.new").write_text(f"{offset}\n")
    (home.work / "faketime.new").rename(home.work / "faketime")


def namespaced() -> list[str]:
    """The words before a command that put it into a PID namespace of its own, whose first process it is."""
    words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    needs(*words, "true")
    return words


def as_nobody(home: Home) -> list[str]:
    """The words before a command that make it an ordinary user's; the files of the test become that user's."""
    words = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--no-new-privs"]
    needs(*words, "true")
    same(home.home.path, str(home.path))  # opened while it is ours
    home.root.chmod(0o755)
    for path in (home.root, *home.root.rglob("*")):
        os.chown(path, 65534, 65534, follow_symlinks=False)
    home.env |= {"HOME": str(home.work), "USER": "nobody", "LOGNAME": "nobody"}
    needs(*words, *PROGRAM, "--version")  # what runs the tests may be root's alone
    return words


RUN_ONCE = "echo $QUEUECTL_ATTEMPT >> account"


def bury_many(home: Home, count: int, command: str = "true") -> None:
    """Put dead jobs into the queue."""
    home.run("status")
    with contextlib.closing(sqlite3.connect(home.home.database)) as db, db:
        db.executemany(
            "INSERT INTO jobs (id, command, cwd, state, attempts, created_at, updated_at, finished_at, exit_code) "
            "VALUES (?, ?, '/', 'dead', 4, 1000, 1000, 1000, 1)",
            [(f"dead{n}", json.dumps(command)) for n in range(count)],
        )


# The statements of a migration, of which some are run before the process dies.
DYING = """
class Dying(tuple):
    def __iter__(self):
        yield from list(tuple.__iter__(self))[:{point}]
        die()
"""


class Sleepers:
    """Processes that sleep, and are found whatever became of their environment, group and parents."""

    def __init__(self, home: Home) -> None:
        home.script("sleeper.py", "import time\ntime.sleep(600)\n")
        self.line = f"{sys.executable} {home.work}/sleeper.py"

    def __enter__(self) -> Sleepers:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.pids():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def pids(self) -> list[int]:
        """Those that are there now."""
        return [pid for pid, words in pids_with(self.line.split()[1]).items() if words == self.line]


@contextlib.contextmanager
def small_disk(home: Home, size: str = "3m") -> Iterator[Path]:
    """A file system of its own for a test, which holds its home and can be filled."""
    disk = home.root / "disk"
    disk.mkdir(0o700)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "none", str(disk)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        raise Skip("only root on Linux can mount a small disk")
    home.path = disk / "home"
    home.env["QUEUECTL_HOME"] = str(home.path)
    try:
        yield disk
    finally:
        (disk / "fill").unlink(missing_ok=True)
        home.store.close()
        home._sweep()
        until(lambda: not pids_with(str(home.path)))
        until(lambda: subprocess.run(["umount", disk], capture_output=True).returncode == 0, "umount")
        shutil.rmtree(disk)
        home.path = home.root / "home"
        home.__dict__.pop("home", None)
        home.__dict__.pop("store", None)


def fill(disk: Path) -> Path:
    """Leave not a byte free; the file that does."""
    with open(disk / "fill", "ab", buffering=0) as file:
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    return disk / "fill"


@contextlib.contextmanager
def held(home: Home, begin: str = "BEGIN") -> Iterator[sqlite3.Connection]:
    """The database in the hands of another program: one that reads, so that the WAL only grows, or that writes."""
    with contextlib.closing(sqlite3.connect(home.home.database, isolation_level=None)) as db:
        db.execute(begin)
        db.execute("SELECT count(*) FROM jobs").fetchone()
        yield db
        db.execute("ROLLBACK")


def bound_by_modes() -> None:
    """In a child before it becomes a program: let file modes bind it, also where it is root's."""
    if os.geteuid() == 0:
        import ctypes

        cap_dac_override, cap_dac_read_search, pr_capbset_drop = 1, 2, 24
        for capability in (cap_dac_override, cap_dac_read_search):
            ctypes.CDLL(None).prctl(pr_capbset_drop, capability, 0, 0, 0)


# A child's clock, which a file sets.
CLOCK = """
def time_ns(real=time.time_ns, clock=HERE + "/clock"):
    return real() + int(open(clock).read()) * 10**9
time.time_ns = time_ns"""


def set_clock(home: Home, seconds: int) -> None:
    """Set the clock of the children that have one."""
    (home.work / "clock.new").write_text(str(seconds))
    (home.work / "clock.new").rename(home.work / "clock")


# ---- errors


def test_program_without_click_says_what_to_install(home: Home) -> None:
    """Where click is missing, one line says how to get it."""
    (home.work / "click.py").write_text("raise ModuleNotFoundError('no click')")
    env = {**home.env, "PYTHONPATH": str(home.work)}
    ran = finished(subprocess.Popen([*PROGRAM, "status"], env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE))
    same(ran.code, 1)
    assert re.fullmatch(r"Error: [^\n]+ -m pip install click\n", ran.err), ran.err


def test_sqlite_without_json_is_refused_in_one_line(home: Home) -> None:
    """An SQLite that was built without its JSON functions is refused when the queue is opened."""
    home.run("status")
    patch = """
real = sqlite3.connect
def connect(*words, **options):
    db = real(*words, **options)
    db.set_authorizer(lambda action, a, name, *_: sqlite3.SQLITE_DENY if name == "json_array" else sqlite3.SQLITE_OK)
    return db
sqlite3.connect = connect
q.main()"""
    ran = finished(child(home, "import sqlite3, sys\nsys.argv[1:] = ['status']" + patch))
    assert ran.code == 1 and re.fullmatch(r"Error: [^\n]*JSON functions[^\n]*\n", ran.err), ran.err


def test_exit_code_is_one_that_the_system_takes() -> None:
    """Whatever a job ended with, on whichever system, is an exit code, and never that of success."""
    for code in (0, 1, 255, 256, 2**31, 0xC0000005, 0xC0000100, 2**32 - 1):
        status = q.exit_status(code)
        assert -(2**31) <= status < 2**31 and (status == 0) == (code == 0), (code, status)
        assert WINDOWS or status < 256, (code, status)


def test_errors_have_the_exit_codes_of_the_contract() -> None:
    """Bad input is 2, everything else that cannot be done is 1."""
    kinds = {q.QueueError: 1, q.BadInput: 2, q.NotFound: 1, q.StoreError: 1, q.StoreBusy: 1}
    same({kind: kind.exit_code for kind in kinds}, kinds)


def test_error_is_one_line_and_changes_nothing(home: Home) -> None:
    """Whatever is wrong is said in one line on stderr with its exit code, and nothing has changed."""
    home.add(id="here")
    calls: list[tuple[int, list[str]]] = [
        (1, ["show", "nowhere"]), (1, ["logs", "nowhere"]), (1, ["dlq", "retry", "here"]), (1, ["release", "nowhere"]),
        (1, ["enqueue", '{"id": "HERE", "command": "x"}']), (1, ["config", "get", "no_such_key"]),
        (2, ["dlq", "purge"]), (2, ["enqueue"]), (2, ["enqueue", "{"]), (2, ["enqueue", "[]"]),
        (2, ["enqueue", '{"command": ""}']), (2, ["enqueue", "{command:", "x}"]), (2, ["enqueue", "--"]),
        (2, ["config", "set", "max_retries", "-1"]), (2, ["list", "--state", "nosuch"]), (2, ["list", "--limit", "x"]),
        (2, ["nosuchcommand"]), (2, ["status", "--nosuchoption"]), (2, ["worker", "start", "--count", "0"]),
        (2, ["worker", "start", "--queue", "bad name"]), (2, ["worker", "stop", "--timeout", "soon"]),
        (2, ["enqueue", "--delay", "soon", "--", "x"]), (2, ["enqueue", "--file", "gone.jsonl"]),
    ]  # fmt: skip
    for code, args in calls[:: 4 if WINDOWS else 1]:
        home.fails(*args, code=code)


def test_error_says_what_to_do(home: Home) -> None:
    """An unknown job is answered with the nearest one, shell-eaten JSON with the form that survives every shell."""
    home.add(id="report")
    assert "did you mean 'report'" in home.fails("show", "reprot")
    assert "enqueue -- COMMAND" in home.fails("enqueue", "{command:x}", code=2)


def test_error_about_an_option_of_the_command_hints_at_the_dashes(home: Home) -> None:
    """`enqueue ls -l` is told to put the command behind --; a slip in one of our own options is not."""
    assert "queuectl enqueue -- ls -l" in home.fails("enqueue", "ls", "-l", code=2)
    assert "queuectl enqueue -- COMMAND -l" in home.fails("enqueue", "--tag", "t", "ls", "-l", code=2)
    assert "queuectl edit ID -- COMMAND -l" in home.fails("edit", "a", "ls", "-l", code=2)
    slip = home.fails("enqueue", "--tagg", "t", code=2)
    assert "--tag" in slip and "behind" not in slip, slip


def test_error_shows_control_characters_escaped(home: Home) -> None:
    """What an error quotes cannot drive the terminal."""
    line = home.fails("enqueue", '{"\\u001b[2J": 1, "command": "x"}', code=2)
    assert "\x1b" not in line and "\\x1b[2J" in line, line


# ---- text


def test_parse_job_says_where_json_breaks() -> None:
    """What is not JSON is refused with its place; so are NaN, a field named twice and a bottomless nest."""
    for text, word in (('{"a" 1}', "character 6"), ('{"a": NaN}', "NaN"), ('{"a": 1, "a": 2}', "twice"),
                       ("[" * 100_000, "nested"), ("", "character 1"), ("9" * 5000, "number")):  # fmt: skip
        with refuses(q.BadInput, word):
            q.parse_job(text)


def test_iso_time_reaches_as_far_as_a_job_may_be_put_off() -> None:
    """A moment is shown to the millisecond, from 1970 to the last day of the year 9999, on every system."""
    same(q.iso_time(1), "1970-01-01T00:00:00.001Z")
    same(q.iso_time(1_795_534_753_887), "2026-11-24T15:39:13.887Z")
    same(q.iso_time(q.MAX_SECONDS * 1000), "9999-12-31T23:59:59.000Z")


def test_parse_duration_takes_units() -> None:
    """A duration is seconds, or numbers with units, and nothing else."""
    good = {"90": 90, "90s": 90, "10m": 600, "1h30m": 5400, "7d": 604800, "1.5h": 5400, "250ms": 0.25, "0": 0}
    same({text: q.parse_duration(text) for text in good}, good)
    for text in ("", "s", "1x", "-1", "1h30", "1 h", "1e3", "nan", "inf", "1h-5m"):
        with refuses(q.BadInput, "duration"):
            print(text, q.parse_duration(text))


def test_printable_escapes_what_drives_a_terminal() -> None:
    """Control characters are shown escaped, everything else as it is."""
    same(q.printable("a\x1b[31m\r\n\x07\x9b\u202eü"), "a\\x1b[31m\\r\\n\\x07\\x9b\\u202eü")


def test_command_line_is_as_one_would_type_it() -> None:
    """The list form is shown quoted, the shell form as it is."""
    same([q.command_line("a | b"), q.command_line(["a b", "c"])], ["a | b", "'a b' c"])


def test_durations_and_moments_read_well() -> None:
    """Times are shown in the units that matter."""
    same([q.duration(s) for s in (0.1234, 3, 61, 3600, 90_061)], ["0.123 s", "3 s", "1 m 1 s", "1 h", "1 d 1 h"])
    same([q.ago(ms, 100_000) for ms in (None, 95_000, 40_000, 130_500)], ["-", "5 s ago", "1 m ago", "in 31 s"])
    same([q.iso_time(None), q.iso_time(0), q.iso_time(1896112800250)],
         [None, "1970-01-01T00:00:00.000Z", "2030-01-31T18:00:00.250Z"])  # fmt: skip


# ---- model


def test_job_goes_through_the_database_unchanged(home: Home) -> None:
    """Every field of a job is read back as it was given."""
    given: dict[str, Any] = {
        "id": "x", "command": ["a", "ü\n"], "priority": 5, "max_retries": 1, "timeout": 0.5, "run_at": 1.5,
        "backoff_base": 3.0, "queue": "q", "tag": "t", "key": "k", "cwd": "/d", "env": {"A": "b"}, "hold": True,
        "on_lost": "dead", "ok_codes": [3], "no_retry_codes": [4], "snooze": True,
    }  # fmt: skip
    home.add(**given)
    job = home.job("x")
    same({name: getattr(job, name) for name in given}, {**given, "run_at": 1500})


def test_job_of_an_unknown_state_is_refused(home: Home) -> None:
    """A row whose state does not exist is an error, not a job."""
    row = list(a_job())
    for name in ("hold", "snooze", "cancelling"):
        row[q.COLUMNS.index(name)] = 0
    row[q.COLUMNS.index("command")] = '"x"'
    row[q.COLUMNS.index("state")] = "asleep"
    with refuses(q.Damaged, "asleep"):
        q.job_from_row(row)


# ---- fields


def test_fields_every_one_is_taken() -> None:
    """A job may name every field of the contract, and each arrives as the database will hold it."""
    given = {
        "id": "a.b-c_1", "command": ["prog", ""], "priority": -(2**31), "max_retries": 0, "timeout": 0.5, "delay": 3,
        "backoff_base": 0.1, "queue": "q", "tag": "t", "key": "k", "cwd": "/", "env": {"A": "ä", "B": ""},
        "after": ["x"], "hold": True, "on_lost": "dead", "ok_codes": [3], "no_retry_codes": [4, 5], "snooze": True,
    }  # fmt: skip
    same(set(given) | {"run_at"}, set(q.FIELDS))
    wanted = {name: value for name, value in given.items() if name != "delay"} | {"run_at": 3000}
    same(q.check_job(given, 0), wanted)


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"id": ""}, "id"), ({"id": "-x"}, "id"), ({"id": "x."}, "id"), ({"id": "x" * 129}, "id"), ({"id": "a/b"}, "id"),
    ({"id": "ä"}, "id"), ({"id": 7}, "id"), ({"id": None}, "id"), ({"id": "a\n"}, "id"), ({"id": "a b"}, "id"),
    ({"id": "nul"}, "device"), ({"id": "Con.txt"}, "device"), ({"id": "LPT1"}, "device"), ({"id": "com9.a"}, "device"),
    ({"command": ""}, "command"), ({"command": " \n"}, "command"), ({"command": []}, "command"),
    ({"command": [""]}, "command"), ({"command": ["a", 1]}, "command"), ({"command": 5}, "command"),
    ({"command": None}, "command"), ({"command": "a\0b"}, "NUL"), ({"command": ["a", "\0"]}, "NUL"),
    ({"command": "\ud800"}, "Unicode"), ({"command": {"a": 1}}, "command"),
    ({"priority": 1.0}, "priority"), ({"priority": "1"}, "priority"), ({"priority": True}, "priority"),
    ({"priority": 2**31}, "priority"), ({"priority": -(2**31) - 1}, "priority"), ({"priority": None}, "priority"),
    ({"max_retries": -1}, "max_retries"), ({"max_retries": 1.5}, "max_ret"), ({"max_retries": False}, "max_ret"),
    ({"timeout": -1}, "timeout"), ({"timeout": "5"}, "timeout"), ({"timeout": True}, "timeout"),
    ({"timeout": float("nan")}, "timeout"), ({"timeout": float("inf")}, "timeout"), ({"timeout": 10**30}, "timeout"),
    ({"run_at": "tomorrow"}, "run_at"), ({"run_at": -1}, "run_at"), ({"run_at": "2030-13-01"}, "run_at"),
    ({"run_at": True}, "run_at"), ({"run_at": 10**30}, "run_at"), ({"run_at": []}, "run_at"),
    ({"delay": -1}, "delay"), ({"delay": "1s"}, "delay"), ({"delay": 1, "run_at": 1}, "exclude"),
    ({"backoff_base": 0}, "backoff_base"), ({"backoff_base": -2}, "backoff_base"), ({"backoff_base": "2"}, "backoff_b"),
    ({"queue": ""}, "queue"), ({"queue": "a b"}, "queue"), ({"tag": "-"}, "tag"), ({"tag": 1}, "tag"),
    ({"key": ""}, "key"), ({"key": 1}, "key"), ({"cwd": ""}, "cwd"), ({"cwd": 1}, "cwd"), ({"cwd": "\0"}, "cwd"),
    ({"env": []}, "env"), ({"env": {"A": 1}}, "env"), ({"env": {"": "x"}}, "env"), ({"env": {"A=B": "x"}}, "env"),
    ({"env": {"A": "\0"}}, "env"), ({"after": "a"}, "after"), ({"after": [1]}, "after"), ({"after": ["a b"]}, "after"),
    ({"hold": 1}, "hold"), ({"hold": "yes"}, "hold"), ({"on_lost": "again"}, "on_lost"), ({"on_lost": 1}, "on_lost"),
    ({"ok_codes": 3}, "ok_codes"), ({"ok_codes": ["3"]}, "ok_codes"), ({"ok_codes": [-1]}, "ok_codes"),
    ({"no_retry_codes": [True]}, "no_retry_codes"), ({"snooze": 0}, "snooze"),
]  # fmt: skip


def test_fields_bad_input_of_every_kind_is_refused() -> None:
    """A wrong type, range or character in any field is bad input, and the error names the field or the reason."""
    for fields, word in BAD_FIELDS:
        with refuses(q.BadInput, word):
            print(f"\n  taken, but should not be: {q.check_fields(fields, 0)}")


def test_fields_a_job_must_be_an_object_with_a_command() -> None:
    """Other JSON than an object, and an object without a command, are refused."""
    for value in (None, 1, "x", [], [{"command": "x"}], True):
        with refuses(q.BadInput, "JSON object"):
            q.check_job(value, 0)
    with refuses(q.BadInput, "command"):
        q.check_job({}, 0)


def test_fields_an_unknown_one_is_refused_with_the_nearest() -> None:
    """A misspelt field is answered with the one that was meant."""
    with refuses(q.BadInput, "'max_retrys'", "'max_retries'"):
        q.check_fields({"max_retrys": 1}, 0)


def test_command_may_be_128_kib_and_no_more() -> None:
    """A command of 128 KiB is taken, a longer one is refused, counted in bytes."""
    q.check_fields({"command": "x" * (128 * 1024 - 1)}, 0)
    for command in ("x" * 128 * 1024 + "x", ["x", "ä" * 65 * 1024]):
        with refuses(q.BadInput, "131072"):
            q.check_fields({"command": command}, 0)


def test_run_at_is_unix_seconds_or_iso_8601() -> None:
    """A start time may be Unix seconds or ISO 8601, which without a zone means local time."""

    def at(value: Any) -> int:
        return int(q.check_fields({"run_at": value}, 0)["run_at"])

    local = datetime.datetime(2030, 1, 31, 18, 0).timestamp()
    same([at(0), at(1.5), at("2030-01-31T18:00Z"), at("2030-01-31T19:00:00.250+01:00"), at("2030-01-31 18:00")],
         [0, 1500, 1896112800000, 1896112800250, round(local * 1000)])  # fmt: skip


# What clock times mean at a moment, in the zone of this process.
CLOCK_TIMES = """
import datetime, json, sys
import queuectl as q
now, *texts = json.loads(sys.argv[1])
at = int(datetime.datetime.fromisoformat(now).timestamp() * 1000)
utc = datetime.timezone.utc
found = [q.clock_time(text, at) for text in texts]
print(json.dumps([ms and datetime.datetime.fromtimestamp(ms / 1000, utc).strftime("%a %F %T") for ms in found]))
"""


def clock_times(zone: str, now: str, *texts: str) -> list[str | None]:
    """What clock times mean in a zone, at a moment: each as day and time in UTC."""
    words = [sys.executable, "-c", CLOCK_TIMES, json.dumps([now, *texts])]
    ran = subprocess.run(words, env={**os.environ, "TZ": zone, "PYTHONPATH": str(HERE)}, capture_output=True, text=True)
    same((ran.returncode, ran.stderr), (0, ""))
    return list(json.loads(ran.stdout))


@posix
def test_clock_time_is_the_next_one() -> None:
    """Times alone, of tomorrow and of a weekday are the next that come, and what is no clock time is none."""
    same(
        clock_times("UTC", "2030-01-07T12:00+00:00", "23:00", "6:30", "12:00", "12:00:01", "tomorrow 6:30",
                    "today 6:30", "mon 8:00", "Monday 13:00", " SUN  0:00", "tue 11:59"),
        ["Mon 2030-01-07 23:00:00", "Tue 2030-01-08 06:30:00", "Tue 2030-01-08 12:00:00", "Mon 2030-01-07 12:00:01",
         "Tue 2030-01-08 06:30:00", "Mon 2030-01-07 06:30:00", "Mon 2030-01-14 08:00:00", "Mon 2030-01-07 13:00:00",
         "Sun 2030-01-13 00:00:00", "Tue 2030-01-08 11:59:00"],
    )  # fmt: skip
    wrong = ("24:00", "6:60", "6", "630", "6:3", "tomorrow", "mo 8:00", "mond 8:00", "sunny 8:00", "8:00 mon", "")
    same(clock_times("UTC", "2030-01-07T12:00+00:00", *wrong), [None] * len(wrong))


@posix
def test_clock_time_keeps_to_the_wall_clock_over_a_change_of_clocks() -> None:
    """Local times stay so over a change; one that it skips is as far behind it, one that it repeats comes once more."""
    berlin = "CET-1CEST,M3.5.0,M10.5.0/3"
    same(clock_times(berlin, "2030-03-30T12:00+01:00", "tomorrow 2:30", "tomorrow 8:00", "11:00", "mon 8:00"),
         ["Sun 2030-03-31 01:30:00", "Sun 2030-03-31 06:00:00", "Sun 2030-03-31 09:00:00",
          "Mon 2030-04-01 06:00:00"])  # fmt: skip
    for now, wanted in (("2030-10-27T02:15+02:00", "00:30"), ("2030-10-27T02:45+02:00", "01:30")):
        same(clock_times(berlin, now, "2:30", "23:00"), [f"Sun 2030-10-27 {wanted}:00", "Sun 2030-10-27 22:00:00"])
    same(clock_times(berlin, "2030-10-27T02:45+01:00", "2:30"), ["Mon 2030-10-28 01:30:00"])


def test_run_at_takes_clock_times_wherever_it_is_said(home: Home) -> None:
    """Options, JSON and JSON Lines know clock times, and a date with its time behind a blank."""
    now = datetime.datetime.now()
    home.run("enqueue", "--id", "a", "--run-at", "tomorrow 6:30", "--", "x")
    home.run("enqueue", '{"id": "b", "command": "x", "run_at": "2040-01-31 18:00"}')
    home.run("enqueue", "-", stdin='{"id": "c", "command": "x", "run_at": "23:59:59"}')
    home.run("edit", "c", "--run-at", "tomorrow 0:00")
    moments = [datetime.datetime.fromtimestamp((home.job(id).run_at or 0) / 1000) for id in "abc"]
    same([moment.strftime("%H:%M") for moment in moments], ["06:30", "18:00", "00:00"])
    assert moments[0] > now and moments[2] > now
    assert "tomorrow 6:30" in home.fails("enqueue", "--run-at", "25:00", "--", "x", code=2)


def test_run_at_in_the_past_is_taken_and_said(home: Home) -> None:
    """A moment that has passed is no error: one line on stderr says how many jobs do not wait for theirs."""
    ran = home.run("enqueue", "--id", "a", "--run-at", "2020-01-01", "--", "x")
    same((ran.out, ran.err), ("a\n", "note: run_at has passed: it is not waited for\n"))
    lines = '{"command": "x", "run_at": 1}\n' * 3 + '{"command": "x", "delay": 0}\n'
    same(home.run("enqueue", "-", stdin=lines).err, "note: run_at has passed for 3 jobs: it is not waited for\n")
    home.fails("enqueue", "-", stdin=lines + "nonsense", code=2)
    same(home.run("edit", "a", "--run-at", "1").err, "note: run_at has passed: it is not waited for\n")
    same(home.run("edit", "a", "--clear", "run-at").err, "")


def test_read_batch_names_the_bad_line() -> None:
    """JSON Lines may have a byte order mark, blank lines and CRLF; a bad line is named by its number."""
    good = b'\xef\xbb\xbf{"command": "a"}\r\n\n  \n{"command": "b", "queue": "own"}'
    found = [spec for _, spec in q.read_batch(good.splitlines(True), 0, {"queue": "shared"})]
    same([(spec["command"], spec["queue"]) for spec in found], [("a", "shared"), ("b", "own")])
    for bad in (b'{"command": 1}', b"{", b"[]", b"\xff"):
        with refuses(q.BadInput, "line 3"):
            list(q.read_batch([b'{"command": "a"}\n', b"\n", bad], 0, {}))


# ---- templates


EVIL = (
    "$(touch PWNED).wav", "`touch PWNED`", "';touch PWNED;'", '";touch PWNED;"', "\ntouch PWNED\n", "\\';touch PWNED #",
    "a[$(touch PWNED)]", "\\$(touch PWNED)", "#\ntouch PWNED", "|touch PWNED", "&touch PWNED&", "}$(touch PWNED)",
    "))$(touch PWNED)", "\nEOF\ntouch PWNED\n", "two words", "*", "~", "-n", "", "a\\", "if", "2", "ü",
)  # fmt: skip
REFUSED_LINES = (
    "'{}x y'", '"x {}"', "`echo {}`", '"$(echo {})"', "x # {}", "${}", "$x{}", "${x:-{}}", "$((1 + {}))", "\\{}",
    "cat <<EOF\n{}\nEOF", "((x = {}))", "[[ {} -eq 1 ]]", "a[{}]=1", "eval echo {}", "sh -c {}", "let \\\n {}",
    "/bin/sh -ec 'cat {}'", "unset {}", 'case x in a) "{}', "echo $\\\n({}", "pwsh -c cat {}", "$'{}'",
)  # fmt: skip


def filled(text: str, value: str = "", *, shell: q.Shell = "sh", line: bool = False) -> str:
    """A template, filled for an item of this value with the number 7 and a row of A=1, B=2."""
    return q.Template(text, ("A", "B"), shell, line=line).fill(q.Item(value, 7, ("1", "2")))


def test_template_places_stand_for_the_item() -> None:
    """Each place is what the table of the manual says; braces written twice are braces, others are left."""
    path = "in/day.1/some song.tar.gz"
    for text, wanted in (
        ("{}", path), ("{.}", "in/day.1/some song.tar"), ("{/}", "some song.tar.gz"), ("{//}", "in/day.1"),
        ("{/.}", "some song.tar"), ("{#}", "7"), ("{A}-{B}", "1-2"),
        ("{C} ${HOME} {1..3} { } {", "{C} ${HOME} {1..3} { } {"),
        ("{{}} {{A}}", "{} {A}"), ("{{{}}}", "{" + path + "}"), ("100%s %", "100%s %"),
    ):  # fmt: skip
        same((text, filled(text, path)), (text, wanted))


def test_template_parts_of_odd_paths_are_those_of_the_system() -> None:
    """A name without a directory is in `.`; on Windows both slashes part, on other systems a backslash is a letter."""
    found: dict[str, list[str]] = {}
    shells: dict[q.Shell, list[str]]
    shells = {"sh": ["name", ".rc", "a.d/b", "d/e/", "/x", "/", "a\\b.c"], "cmd": ["C:\\music\\a.wav", "d/e.f\\g"]}
    for shell, paths in shells.items():
        found |= {path: [filled(place, path, shell=shell) for place in ("{/}", "{//}", "{.}")] for path in paths}
    same(found, {
        "name": ["name", ".", "name"], ".rc": [".rc", ".", ".rc"], "a.d/b": ["b", "a.d", "a.d/b"],
        "d/e/": ["e", "d", "d/e/"], "/x": ["x", "/", "/x"], "/": ["/", "/", "/"], "a\\b.c": ["a\\b.c", ".", "a\\b"],
        "C:\\music\\a.wav": ["a.wav", "C:\\music", "C:\\music\\a"], "d/e.f\\g": ["g", "d/e.f", "d/e.f\\g"],
    })  # fmt: skip


@posix
def test_template_line_gives_the_shell_the_value_and_nothing_to_run(home: Home) -> None:
    """What a program gets is the value, in each kind of quotes and as a part of a word, whatever the value holds."""
    for line, before, after in (
        ("{}", "", ""), ('"{}"', "", ""), ("'{}'", "", ""), ('"d/{}.mp3"', "d/", ".mp3"), ("a-{}-b", "a-", "-b"),
        ("\"${x}\"{}'x y'", "", "x y"), ("{} >&1 # {{x}}", "", ""), ("\\\\{}", "\\", ""), ("a#{}", "a#", ""),
    ):  # fmt: skip
        for value in EVIL:
            text = f"printf '<%s>' {filled(line, value, line=True)}"
            ran = subprocess.run(["/bin/sh", "-c", text], cwd=home.work, capture_output=True)
            same((line, value, ran.stdout.decode()), (line, value, f"<{before}{value}{after}>"))
    same(os.listdir(home.work), [])


def test_template_line_refuses_a_place_where_nothing_can_be_quoted() -> None:
    """Inside other quotes, substitutions, comments, here-documents, and behind eval or sh -c a place is refused."""
    for line in REFUSED_LINES:
        with refuses(q.BadInput):
            raise AssertionError(f"{line!r} became {filled(line, 'x', line=True)!r}")


def test_template_line_takes_the_places_that_are_certain() -> None:
    """Variables, substitutions outside of quotes, pipes, loops and words beside quotes are no hindrance."""
    for line, wanted in (
        ("x=$(basename {} .wav) && echo \"$x\"", "x=$(basename 'a b' .wav) && echo \"$x\""),
        ("for f in {} \"$HOME\"/*; do wc -l <$f; done", "for f in 'a b' \"$HOME\"/*; do wc -l <$f; done"),
        ("a | tr a-z '[:upper:]' >{.}.txt 2>&1", "a | tr a-z '[:upper:]' >'a b'.txt 2>&1"),
        ("ls [[:digit:]]* {} # it's \"fine\"", "ls [[:digit:]]* 'a b' # it's \"fine\""),
        ('convert "it\'s ${x:-so}" {} \\\n  -o "{.}.png"', 'convert "it\'s ${x:-so}" \'a b\' \\\n  -o "a b.png"'),
        ("sh -c 'cat \"$1\"' sh {}", "sh -c 'cat \"$1\"' sh 'a b'"), ("echo {#}>out", "echo '7'>out"),
        ("read -r x <{}; echo $?", "read -r x <'a b'; echo $?"), ("ssh {} uptime", "ssh 'a b' uptime"),
    ):  # fmt: skip
        same(filled(line, "a b", line=True), wanted)


def test_template_line_for_cmd_quotes_or_refuses() -> None:
    """cmd.exe gets quotes where they help; a value that it would change even in quotes is refused, and named."""

    def line(text: str, value: str) -> str:
        return filled(text, value, shell="cmd", line=True)

    same(line("copy {} {.}.bak", "a b.txt"), 'copy "a b.txt" "a b".bak')
    same(line('copy "{}" "to/{/}"', "d\\a.txt"), 'copy "d\\a.txt" "to/a.txt"')
    same(line("type {} {#}", "plain.txt"), "type plain.txt 7")
    same(
        [line("dir {}", "C:\\a b\\"), line("dir {}", "d\\"), line("x {}", "")],
        ['dir "C:\\a b\\\\"', 'dir "d\\\\"', 'x ""'],
    )
    for char in '%!^"&|<>\n\r\x1a':
        with refuses(q.BadInput, "cmd.exe", "several words"):
            line("type {}", f"a{char}b")
        with refuses(q.BadInput, "cmd.exe"):
            line('type "{}"', f"a{char}b")
    for text in ("%{}%", "^{}", '{}"x"', "{}{.}", 'cmd "a b {}"', '"\\" {}', "powershell -c cat {}", "bash -c {}"):
        with refuses(q.BadInput):
            raise AssertionError(f"{text!r} became {line(text, 'x')!r}")


@windows
def test_template_line_for_cmd_gives_the_program_the_value(home: Home) -> None:
    """A program that a real cmd.exe starts gets the value as it is."""
    show = home.script("show.py", "import sys; print(ascii(sys.argv[1:]))")
    for value in ("a b", "C:\\d e\\", "x\\y.z", "(a),b;c=d", "it's $(x) `y`", "-n", "#*?~{}[]"):
        for line, wanted in (("{}", [value]), ("-o {} z", ["-o", value, "z"])):
            text = f'"{sys.executable}" {show} ' + filled(line, value, shell="cmd", line=True)
            ran = subprocess.run(f'cmd.exe /d /s /c "{text}"', cwd=home.work, capture_output=True, text=True)
            same((line, ran.stdout.strip()), (line, ascii(wanted)))


def specs(
    items: Iterable[q.Item], command: str | list[str] | None, *, shell: q.Shell = "sh", **fields: Any
) -> list[q.Spec]:
    """The specs of items, of which the columns are A and B."""
    return [spec for _, spec in q.specs_of_items(items, ("A", "B"), command, fields, shell, 1000)]


def test_specs_of_items_fill_the_command_and_the_fields() -> None:
    """Places are replaced in every word and in the fields of the contract; the item is the last word if it is none."""
    one = q.Item("d/a b.wav", 3, ("x", "y"))
    made = specs([one], ["play", "{}", "{A}"], id="j-{#}", tag="t{B}", queue="q{#}", key="{}", cwd="{//}", priority=2,
                 env={"N": "{/.}", "QUEUECTL_INDEX": "{#}0"}, delay=1)  # fmt: skip
    same(made, [{
        "id": "j-3", "tag": "ty", "queue": "q3", "key": "d/a b.wav", "cwd": "d", "priority": 2, "run_at": 2000,
        "command": ["play", "d/a b.wav", "x"],
        "env": {"N": "a b", "QUEUECTL_INDEX": "30", "QUEUECTL_ITEM": "d/a b.wav"},
    }])  # fmt: skip
    same([spec["command"] for spec in specs([one], ["play", "{x}"])], [["play", "{x}", "d/a b.wav"]])
    same([spec["command"] for spec in specs([one], "play -q")], ["play -q 'd/a b.wav'"])
    same([spec["command"] for spec in specs([one], None)], ["d/a b.wav"])
    for line in ("play;", "play &", "a |", "# play", " ", "sh -c"):
        with refuses(q.BadInput):
            raise AssertionError(specs([one], line))


def test_specs_of_items_refuse_what_would_be_run() -> None:
    """In several words too, no value becomes the line of a shell, nor an argument that a batch file would run."""
    for words in (["sh", "-c", "cat {}"], ["env", "bash", "-ec", "x {}"], ["pwsh", "-Command", "cat", "{}"]):
        with refuses(q.BadInput, "run as a command line"):
            specs([], words)
    same(specs([q.Item("x", 1)], ["sh", "-c", 'cat "$1"', "sh", "{}"])[0]["command"][-1], "x")
    with refuses(q.BadInput, "item 2: ", "a&b"):
        specs([q.Item("a", 1), q.Item("a&b", 2)], ["convert.BAT", "x&y"], shell="cmd")


def test_specs_of_items_name_the_item_that_is_wrong() -> None:
    """What is wrong with a value is said with the number of its item; what is wrong with all before any is read."""
    with refuses(q.BadInput, "item 2: field 'id'"):
        specs([q.Item("a", 1), q.Item("a b", 2)], ["x"], id="{}")
    with refuses(q.BadInput, "item 1: ", "must not contain a NUL"):
        specs([q.Item("a\0", 1)], "x")
    with refuses(q.BadInput, "field 'priority'"):
        q.specs_of_items(iter([]), (), "x", {"priority": "high"}, "sh", 0)


def test_read_items_by_line_and_by_nul() -> None:
    """Ends of lines are taken off, also those of Windows, and blank lines passed over; behind NUL everything counts."""

    def values(given: bytes, **options: bool) -> list[tuple[int, str]]:
        return [(item.number, item.value) for item in q.read_items(io.BytesIO(given), **options)]

    same(values(b"\xef\xbb\xbfone\r\n\n  \n two \nthree"), [(1, "one"), (2, " two "), (3, "three")])
    same(values(b"a\nb\0\0 \0c\r\n", null=True), [(1, "a\nb"), (2, " "), (3, "c\r\n")])
    same(values(b""), [])
    many = [f"{n}-{'x' * (n % 97)}" for n in range(5000)]
    same([value for _, value in values("\n".join(many).encode())], many)
    with refuses(q.BadInput, "line 3: is not valid UTF-8"):
        values(b"a\n\n\xff\n")
    with refuses(q.BadInput, "item 2: is not valid UTF-8"):
        values(b"a\0\xff\0", null=True)
    with refuses(q.BadInput, "more than 1 MiB"):
        values(b"x" * (3 << 20))


def test_read_rows_of_a_csv_file() -> None:
    """The head line names the columns; quotes, commas and ends of lines inside cells are taken, odd rows refused."""

    def rows(given: str) -> tuple[list[str], list[q.Item]]:
        columns, items = q.read_rows(io.BytesIO(given.encode()))
        return columns, list(items)

    same(rows('\ufeffname, size\r\n"a, ""b""",1\r\n\r\n"two\nlines",2\n'), (
        ["name", "size"], [q.Item('a, "b",1', 1, ["a, \"b\"", "1"]), q.Item("two\nlines,2", 2, ["two\nlines", "2"])]
    ))  # fmt: skip
    for given, said in (
        ("", "is empty"), ("a,b\n1,2\n3\n", "line 3: has 1 cell"), ("a,b\n1,2,3\n", "line 2: has 3 cells"),
        ("a,a\n", "'a' twice"), ('a\n"x\n', "is not CSV"), ('a\n"x"y\n', "line 2: is not CSV"),
    ):  # fmt: skip
        with refuses(q.BadInput, said):
            raise AssertionError(rows(given))


def test_number_items_of_an_array() -> None:
    """Ranges, steps and lists of numbers; what is none, descends or is too many is refused at once."""

    def values(text: str) -> list[str]:
        return [item.value for item in q.number_items(text)]

    same(values("1,3,7-9"), ["1", "3", "7", "8", "9"])
    same(values("1-10:4, 0"), ["1", "5", "9", "0"])
    same([item.number for item in q.number_items("5-7")], [1, 2, 3])
    for text in ("", "x", "1-", "-3", "1,,2", "3-1", "1-9:0", "1-3:x", "1-100%4", "1.5", "0-10000000", "٣"):
        with refuses(q.BadInput, "--array"):
            values(text)


# ---- settings


def test_settings_have_the_defaults_of_the_contract() -> None:
    """Base 2, three retries, 30 seconds, 5 seconds of grace, no cap and no jitter unless somebody says so."""
    found = q.Settings()
    same((found.backoff_base, found.max_retries, found.job_timeout, found.kill_grace), (2, 3, 30, 5))
    same((found.backoff_max, found.backoff_jitter, set(q.SETTINGS)), (0, 0, set(found._fields)))


def test_settings_are_checked() -> None:
    """A key may be written with dashes, is answered with the nearest where unknown, and takes only what it can be."""
    same((q.parse_setting("max-retries", "5"), q.parse_setting("job_timeout", "2m")), (5, 120.0))
    with refuses(q.NotFound, "'max_retries'"):
        q.setting_key("max_retrys")
    for key, text in (("max_retries", "1.5"), ("max_retries", "x"), ("backoff_base", "0"), ("backoff_base", "nan"),
                      ("job_timeout", "-1"), ("backoff_jitter", "2"), ("log_max_bytes", "-1")):  # fmt: skip
        with refuses(q.BadInput, key):
            q.parse_setting(key, text)


def test_backoff_is_base_to_the_power_of_the_attempt() -> None:
    """After failed attempt n a job waits exactly base ** n, with the base of the job or else the setting."""
    waits = [q.backoff_s(a_job(attempts=n), q.Settings(), 0.9) for n in (1, 2, 3, 10)]
    same(waits, [2, 4, 8, 1024])
    job = a_job(attempts=2, backoff_base=0.3)
    same(q.backoff_s(job, q.settings_for(job, q.Settings()), 0.9), 0.3**2)
    same(q.backoff_s(a_job(attempts=3), q.Settings(backoff_base=5), 0.9), 125)


def test_backoff_may_be_capped_and_spread() -> None:
    """`backoff_max` caps, `backoff_jitter` adds a fraction, and no number of attempts overflows."""
    same(q.backoff_s(a_job(attempts=9), q.Settings(backoff_max=60), 0), 60)
    same(q.backoff_s(a_job(attempts=3), q.Settings(backoff_jitter=0.5), 0.5), 10)
    assert 0 < q.backoff_s(a_job(attempts=10**6), q.Settings(), 1) < 10**12


def test_decide_completes_on_zero_and_ok_codes() -> None:
    """Exit code 0 and the job's `ok_codes` complete, also where the job was being cancelled."""
    for job, code in ((a_job(), 0), (a_job(ok_codes=[3]), 3), (a_job(cancelling=True), 0)):
        same(q.decide(job._replace(attempts=1), exited(code), q.Settings(), 0, 0), q.Transition(q.State.COMPLETED, 1))


def test_decide_fails_until_the_retries_are_used_up() -> None:
    """Attempt n of at most 1 + max_retries fails and waits base ** n; the last is dead."""
    results = [q.decide(a_job(attempts=n), exited(1), q.Settings(max_retries=2), 1000, 0) for n in (1, 2, 3)]
    same(results, [(q.State.FAILED, 1, 3000), (q.State.FAILED, 2, 5000), (q.State.DEAD, 3, None)])
    same(q.decide(a_job(attempts=1, max_retries=0), exited(1), q.Settings(), 0, 0).state, q.State.DEAD)
    for end in (q.EndReason.TIMED_OUT, q.EndReason.NOT_STARTED):
        same(q.decide(a_job(attempts=1), q.Outcome(end), q.Settings(), 0, 0), (q.State.FAILED, 1, 2000))


def test_decide_no_retry_codes_are_final() -> None:
    """An exit code in `no_retry_codes` sends a job to the dead at once."""
    same(q.decide(a_job(attempts=1, no_retry_codes=[4]), exited(4), q.Settings(), 0, 0), (q.State.DEAD, 1, None))


def test_decide_snooze_does_not_count() -> None:
    """Exit code 75 of a job with `snooze` puts it back for its backoff without counting the attempt."""
    same(q.decide(a_job(attempts=1, snooze=True), exited(75), q.Settings(), 0, 0), (q.State.PENDING, 0, 2000))
    same(q.decide(a_job(attempts=1), exited(75), q.Settings(), 0, 0).state, q.State.FAILED)


def test_decide_given_back_does_not_count() -> None:
    """A job that its worker gave back is pending, and the attempt is not counted."""
    same(q.decide(a_job(attempts=2), q.Outcome(q.EndReason.GIVEN_BACK), q.Settings(), 0, 0), (q.State.PENDING, 1, None))


def test_decide_lost_counts_and_goes_by_on_lost() -> None:
    """A lost attempt counts and is tried again at once, or is the end where `on_lost` is `dead`."""
    lost = q.Outcome(q.EndReason.LOST)
    same(q.decide(a_job(attempts=1), lost, q.Settings(), 0, 0), (q.State.FAILED, 1, None))
    same(q.decide(a_job(attempts=1, on_lost="dead"), lost, q.Settings(), 0, 0), (q.State.DEAD, 1, None))
    same(q.decide(a_job(attempts=4), lost, q.Settings(), 0, 0), (q.State.DEAD, 4, None))


def test_decide_cancelled_stays_cancelled() -> None:
    """A job that is being cancelled ends so however its attempt ended, unless it completed first."""
    for outcome in (
        exited(1),
        q.Outcome(q.EndReason.CANCELLED),
        q.Outcome(q.EndReason.LOST),
        q.Outcome(q.EndReason.GIVEN_BACK),
    ):
        same(q.decide(a_job(attempts=1, cancelling=True), outcome, q.Settings(), 0, 0).state, q.State.CANCELLED)


def test_backoff_max_holds_for_the_part_that_chance_adds_too() -> None:
    """No backoff is longer than `backoff_max`, however much `backoff_jitter` adds."""
    settings = q.Settings(backoff_max=60, backoff_jitter=1)
    same([q.backoff_s(a_job(attempts=n), settings, 1.0) for n in (1, 5, 9, 5000)], [4, 60, 60, 60])


# ---- views


def test_leftovers_reason_advises_to_kill_only_what_has_an_id() -> None:
    """Processes that cannot be ended are named with the command that ends them; those without an id have none."""
    same(q.leftovers_reason("12 (sleep), 13 (sh)").remedy, "sudo kill -9 12 13")
    same(q.leftovers_reason("processes without a name").remedy, None)


def test_why_waiting_names_every_reason() -> None:
    """What keeps a job from running is named, the nearest hindrance first, with the command that helps."""
    here = q.WaitReasons([], False, None, 0, [a_worker()])
    job = a_job()
    cases = [
        (job._replace(hold=True), here, "on hold", "release a"),
        (job._replace(blockers=1), here._replace(parents=["p", "r"]), "after p, r", "show p"),
        (job._replace(due_at=12_500), here, "due in 12 s", None),
        (job._replace(due_at=12_500, state=q.State.FAILED), here, "retry due in 12 s", None),
        (job, here._replace(paused=True), "queue default paused", "queue resume default"),
        (job, here._replace(max_running=2, running=2), "queue default at its limit of 2", "queue limit default none"),
        (job, here._replace(workers=[]), "no worker is running", "worker start"),
        (job, here._replace(workers=[a_worker(queues=["x"])]), "no worker takes queue default", "worker start"),
        (job, here, "waiting for a free worker", None),
        (job._replace(state=q.State.PROCESSING, worker=7), here, "its worker is gone", None),
        (job._replace(state=q.State.PROCESSING, worker=7), here._replace(workers=[]), "its worker is gone", "start"),
    ]
    for case, found, reason, command in cases:
        got = q.why_not_running(case, found, 500)
        same((got[0], command is None or command in str(got[1])), (reason, True))
    for state in set(q.State) - set(q.WAITING):
        helps = "queuectl dlq retry a" if state is q.State.DEAD else None
        same(q.why_not_running(job._replace(state=state, worker=here.workers[0].id), here, 0), (None, helps))


def test_exit_code_of_a_job_is_what_a_shell_would_give() -> None:
    """`enqueue --wait` exits with the job's code, 128 + signal, 124 where it timed out, 1 where it never ran."""
    dead, attempt = q.State.DEAD, q.Attempt(1, 1, 0, 0, None, 9, "exited", None, None, None, None, None)
    cases = [
        (a_job(state=q.State.COMPLETED, exit_code=3), None, 0), (a_job(state=dead, exit_code=7), None, 7),
        (a_job(state=dead), attempt._replace(ended_by="timed out"), 124), (a_job(state=dead), attempt, 137),
        (a_job(state=q.State.CANCELLED), None, 1),
    ]  # fmt: skip
    for job, last, code in cases:
        same((job, q.exit_code_of(job, last)), (job, code))


def test_table_fits_the_width() -> None:
    """Columns are as wide as their widest cell, the last is cut to what the terminal leaves."""
    lines = list(q.table(("A", "LONG"), [["xxx", "y" * 50], ["z", "w"]], 25))
    same(lines, ["A    LONG", "xxx  " + "y" * 17 + "...", "z    w"])
    long = list(q.table(("A", "B"), [["x" * 50, "y"]], 60))
    same(long, ["A".ljust(15) + "  B", "x" * 12 + "...  y"])


def test_list_fits_a_narrow_terminal() -> None:
    """Columns that would say nothing are left out there, so that none is broken; elsewhere all are there."""
    job = q.Job._make(None for _ in q.Job._fields)._replace(
        id="train-resnet50-with-a-long-name", command="python train.py --lr 3", state=q.State.DEAD, queue="default",
        priority=0, attempts=1, updated_at=0, blockers=0, error="exit code 3",
    )  # fmt: skip
    here = q.WaitReasons([], False, None, 0, [])
    same(list(q.job_lines([job], [here], 0, 9000, 80)), [
        "ID                    STATE  TRIES  CHANGED  WHY          COMMAND",
        "train-resnet50-wi...  \x1b[31mdead \x1b[0m  1      9 s ago  exit code 3  python train.py --lr 3",
    ])  # fmt: skip
    head = next(q.job_lines([job._replace(queue="q")], [here], 0, 9000, 80)).split()
    same(head, ["ID", "STATE", "QUEUE", "TRIES", "CHANGED", "WHY", "COMMAND"])
    same(next(q.job_lines([job], [here], 0, 9000, 10_000)).split(), list(q.JOB_HEAD))


def test_table_of_a_terminal_without_a_size_has_80_columns() -> None:
    """A terminal that says it has no columns is taken for one of 80."""
    with ENV_LOCK:
        real = shutil.get_terminal_size
        shutil.get_terminal_size = functools.partial(os.terminal_size, (0, 0))
        try:
            same(q.terminal_columns(), 80)
        finally:
            shutil.get_terminal_size = real


def test_metrics_are_those_of_the_request() -> None:
    """The four lines of the request, a rate of completed and dead, null where there is none."""
    counts = dict.fromkeys(q.State, 0) | {q.State.COMPLETED: 8, q.State.DEAD: 2}
    tallies = {"run count": 12, "run cpu": 1.5, "retries": 2, **{f"result {result}": 0.0 for result in q.RESULTS}}
    found = q.metrics_json(counts, [(0, n * 1000, n * 3000) for n in range(1, 101)], tallies)
    lines = list(q.metrics_lines(found))
    same(lines[:4], ["📊 Total jobs: 10", "✅ Completed: 8", "☠️ Dead: 2", "Success rate: 80.0%"])
    same((found["wait_seconds"], found["run_seconds"]["p50"]), ({"p50": 50, "p95": 95, "p99": 99}, 100))
    empty = q.metrics_json(dict.fromkeys(q.State, 0), [], tallies)
    same((empty["success_rate"], empty["wait_seconds"]), (None, {"p50": None, "p95": None, "p99": None}))
    assert list(q.metrics_lines(empty))


def test_status_names_what_stands_in_the_way() -> None:
    """`status` says which command helps where nothing would happen otherwise."""
    counts = dict.fromkeys(q.State, 0) | {q.State.PENDING: 2, q.State.DEAD: 1}
    paused = q.QueueRow("slow", True, None, counts)
    text = "\n".join(q.status_lines(q.Overview(counts, [], [paused], 1, 1)))
    text += "\n".join(
        q.status_lines(q.Overview(counts, [a_worker(queues=["x"])], [paused._replace(paused=False)], 0, 0))
    )
    for word in ("start one: queuectl worker start", "dlq list", "queue resume slow", "1 dead worker",
                 "config set job_timeout", "worker start --queue slow"):  # fmt: skip
        assert word in text, text


def test_views_escape_control_characters_and_hide_env_values(home: Home) -> None:
    """No command, error or directory can drive the terminal, and values of `env` are in --json alone."""
    home.add("echo \x1b]0;owned\x07", id="a", env={"TOKEN": "s3cret"}, cwd=str(home.work / "\x1b[2J"), max_retries=0)
    home.start()
    home.ended("a")
    for args in (["list"], ["show", "a"], ["dlq", "list"], ["status"], ["worker", "list"])[: 2 if WINDOWS else 5]:
        text = home.out(*args)
        assert "\x1b" not in text and "\x07" not in text and "s3cret" not in text, text
    same(home.json("show", "a")["env"], {"TOKEN": "s3cret"})
    assert "TOKEN" in home.out("show", "a") and "\\x1b]0;owned" in home.out("list")


def test_roff_leaves_no_character_a_meaning() -> None:
    """What roff would take for a request or an escape is printed as it stands; backquotes make bold."""
    same(q.roff(r".so \fB 'x' --all ~^ `"), r"\&.so \efB \(aqx\(aq \-\-all \(ti\(ha \(ga")
    same(q.roff("until `release`\nof Zoë"), r"until \fBrelease\fR of Zo\[u00EB]")


def every_obstacle(home: Home) -> dict[str, str]:
    """A queue with each hindrance that a view can name: the job that has it, and what of it is to be gone."""
    worker = home.worker_row()

    def ended(id: str, outcome: q.Outcome, **fields: Any) -> None:
        home.add(id=id, **{"max_retries": 0, **fields})
        now = q.now_ms()
        home.store.jobs.finish(home.claim(worker, now - 60_000), outcome, home.store.config.settings(), now)

    ended("d1", exited(1))
    home.add(id="d2", after=["d1"])
    home.add(id="d3", after=["d2"])
    ended("d4", exited(1))
    home.add(id="d5", after=["d1", "d4"])
    ended("k1", exited(1), key="k")
    home.add(id="k2", key="k", hold=True)
    cut = q.Outcome(q.EndReason.TIMED_OUT, error="timed out")
    ended("t1", cut, timeout=60)
    ended("t2", cut, timeout=30, max_retries=5, backoff_base=100_000)
    ended("t3", cut)
    home.add(id="h1", hold=True)
    home.add(id="p1", queue="slow")
    home.store.queues.set_paused(["slow"], True)
    home.add(id="p2", after=["h1"])
    home.store.workers.unregister(worker)
    return {"d3": "dead", "d5": "dead", "t1": "dead", "t2": "--timeout", "t3": "dead", "h1": "on hold", "p1": "paused"}


def words_of(remedy: str) -> list[str]:
    """The words of a command that a remedy names."""
    words = shlex.split(remedy)
    same(words[0], "queuectl")
    return words[1:]


def knows(words: Sequence[str]) -> bool:
    """Does the program have that command, with those options?"""
    group: Any = q.cli
    for word in words:
        if not isinstance(group, click.Group):
            break
        if word not in group.commands:
            return False
        group = group.commands[word]
    options = {name for param in group.params for name in param.opts}
    return all(word in options for word in words if word.startswith("--"))


def test_remedies_that_show_prints_do_what_they_say(home: Home) -> None:
    """The command that `show` names is run in that very state: it exits 0, and the hindrance is gone."""
    for id, sign in every_obstacle(home).items():
        reason = q.reason_of(home.home, home.store, home.job(id))
        shown = "".join(line for line in home.out("show", id).splitlines(True) if line.startswith(("state", "try")))
        assert sign in shown and f"try        {reason.remedy}\n" in shown, shown
        words = words_of(str(reason.remedy))
        assert id not in words or words[0] != "show", words
        if not knows(words):
            words = [word for word in words if word not in ("--timeout", "10m")]
            if words[0] == "edit":
                continue
        home.run(*words)
        after = q.reason_of(home.home, home.store, home.job(id))
        assert home.state(id) != "dead" and after != reason, (id, words, after)
    reason = q.reason_of(home.home, home.store, home.job("k1"))
    same(reason.remedy, "queuectl wait k2")
    home.run("cancel", "k2")
    home.run("wait", "k2", code=1)
    home.run(*words_of(str(q.reason_of(home.home, home.store, home.job("k1")).remedy)))
    same(home.state("k1"), "pending")
    same(q.reason_of(home.home, home.store, home.job("p1")).remedy, "queuectl worker start")
    home.run("worker", "start", "--queue", "other")
    for id, remedy in (("p1", "queuectl worker start --queue slow"), ("d1", "queuectl worker start --queue default")):
        same(q.reason_of(home.home, home.store, home.job(id)).remedy, remedy)
        home.run(*words_of(remedy))
        home.ended(id)


def test_remedies_that_status_prints_do_what_they_say(home: Home) -> None:
    """Each command that `status` names is run in that very state: it exits 0, and its line is gone."""
    every_obstacle(home)
    for _ in range(9):
        seen = q.overview(home.home, home.store)
        lines = [line for line in q.hints(seen) if knows(words_of("queuectl" + line.rpartition("queuectl")[2]))]
        lines = [line for line in lines if " --timeout " not in line or knows(["dlq", "retry", "--timeout"])]
        lines = [
            line for line in lines if not line.endswith("look: queuectl dlq list")
        ]  # it promises no more than that
        if not lines:
            break
        for command in re.findall(r"queuectl [^,;]*", lines[0]):
            home.run(*words_of(command))
        assert lines[0] not in list(q.hints(q.overview(home.home, home.store))), lines
        if "worker start" in lines[0]:
            until(lambda: not [row for row in home.store.workers.all() if row.job])
    left = [line for line in q.hints(q.overview(home.home, home.store)) if "own time-out" not in line]
    same([line for line in left if not line.endswith("dead; look: queuectl dlq list")], [])


def test_remedies_for_parents_that_cannot_be_retried_are_others(home: Home) -> None:
    """What waited for a cancelled job needs that one to run again, what waited for a removed one to wait no more."""
    home.add_all([{"id": "c1", "command": "x"}, {"id": "c2", "command": "x", "after": ["c1"]}])
    home.add_all([{"id": "r1", "command": "x"}, {"id": "r2", "command": "x", "after": ["r1"]}])
    home.run("cancel", "c1", "r1")
    home.run("prune", "--state", "cancelled", "--older-than", "0")
    home.add_all([{"id": "c1", "command": "x"}, {"id": "c3", "command": "x", "after": ["c1"]}])
    home.run("cancel", "c1")
    remedies = {id: q.reason_of(home.home, home.store, home.job(id)).remedy for id in ("c3", "r2")}
    same(remedies, {"c3": "queuectl rerun c1", "r2": "queuectl dlq retry r2 --clear after"})
    for id, remedy in remedies.items():
        if knows(words_of(str(remedy))):
            home.run(*words_of(str(remedy)))
            assert home.state(id) != "dead", id


def test_status_proposes_a_longer_timeout_only_where_that_helps(home: Home) -> None:
    """A time-out that has been raised is no hindrance any more, and none is proposed that is not longer."""
    every_obstacle(home)
    home.run("config", "set", "job_timeout", "45")
    assert "1 cut off by the default time-out; raise it: queuectl config set job_timeout 10m" in home.out("status")
    home.run("config", "set", "job_timeout", "90")
    assert "default time-out" not in home.out("status")
    same([q.longer(seconds) for seconds in (1, 300, 301, 1800, 20_000)], ["10m", "10m", "1h", "1h", "40000"])


# ---- schema


def test_schema_brings_an_empty_file_up(home: Home) -> None:
    """An empty file, and a database of version 0, become a queue."""
    home.path.mkdir(mode=0o700)
    (home.path / "queue.db").touch(0o600)
    home.run("enqueue", "--id", "a", "--", "exit 0")
    same(home.sql("PRAGMA user_version"), [(len(q.MIGRATIONS),)])
    old = home.root / "old.db"
    with contextlib.closing(sqlite3.connect(old)) as db:
        db.execute("VACUUM")  # a header, and version 0
    with q.open_store(str(old)) as store:
        same(sum(store.queries.counts().values()), 0)


def test_schema_every_step_from_0_leads_to_the_same(home: Home) -> None:
    """A database of each older version is brought up to just the schema that a new one has."""
    older = range(1, len(q.MIGRATIONS))
    for version in older:
        path = home.root / f"{version}.db"
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            for _, statements in q.MIGRATIONS[:version]:
                for statement in statements:
                    db.execute(statement)
            db.execute(f"PRAGMA user_version = {version}")
        q.open_store(str(path)).close()
        same(schema_of(path), home.store and schema_of(home.home.database))
    assert older, "there is a step"
    assert all(re.match(rf"{n}: \w", why) for n, (why, _) in enumerate(q.MIGRATIONS, 1)), "each has its line of why"


# What 1.0.0 made: its schema, a job in each state, and rows in every table. It is never changed.
DATABASE_OF_1_0_0 = """
PRAGMA application_id = 1902343217;
PRAGMA user_version = 1;
BEGIN;
CREATE TABLE attempts (
    job INTEGER NOT NULL, n INTEGER NOT NULL, number INTEGER NOT NULL, worker INTEGER NOT NULL,
    started_at INTEGER NOT NULL, ended_at INTEGER NOT NULL, exit_code INTEGER, signal INTEGER,
    ended_by TEXT NOT NULL, error TEXT, max_rss INTEGER, cpu_s REAL, log_start INTEGER, log_end INTEGER,
    PRIMARY KEY (job, n)) WITHOUT ROWID;
INSERT INTO attempts VALUES (2,1,1,1,2000,2500,0,NULL,'exited',NULL,4096,0.5,0,3);
INSERT INTO attempts VALUES (3,1,1,1,3000,3500,NULL,9,'exited','ended by SIGKILL',NULL,NULL,NULL,NULL);
INSERT INTO attempts VALUES (5,1,1,1,4000,4500,1,NULL,'exited','exit code 1',NULL,NULL,NULL,NULL);
CREATE TABLE config (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO config VALUES ('max_retries','7');
INSERT INTO config VALUES ('on_dead','"echo dead"');
CREATE TABLE counts (
    state TEXT NOT NULL, queue TEXT NOT NULL, n INTEGER NOT NULL,
    PRIMARY KEY (state, queue)) WITHOUT ROWID;
INSERT INTO counts VALUES ('cancelled','default',1);
INSERT INTO counts VALUES ('completed','default',1);
INSERT INTO counts VALUES ('dead','default',2);
INSERT INTO counts VALUES ('failed','default',1);
INSERT INTO counts VALUES ('pending','default',0);
INSERT INTO counts VALUES ('pending','q',1);
INSERT INTO counts VALUES ('processing','default',1);
CREATE TABLE dependencies (
    parent INTEGER NOT NULL, child INTEGER NOT NULL, PRIMARY KEY (parent, child)) WITHOUT ROWID;
INSERT INTO dependencies VALUES (3,4);
INSERT INTO dependencies VALUES (2,8);
INSERT INTO dependencies VALUES (7,8);
CREATE TABLE jobs (
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
);
INSERT INTO jobs VALUES (2, 'completed', '"true"', 0, NULL, NULL, NULL, NULL, 'default', NULL, NULL, '/srv', NULL,
    NULL, 0, 'retry', NULL, NULL, 0, 'completed', 1, 0, NULL, NULL, 0, 1000, 2500, 2000, 2500, 0, NULL, 1);
INSERT INTO jobs VALUES (3, 'dead', '"true"', 0, 0, NULL, NULL, NULL, 'default', NULL, NULL, '/srv', NULL, NULL, 0,
    'retry', NULL, NULL, 0, 'dead', 1, 0, NULL, NULL, 0, 1000, 3500, 3000, 3500, NULL, 'ended by SIGKILL', 1);
INSERT INTO jobs VALUES (4, 'with-it', '"true"', 0, NULL, NULL, NULL, NULL, 'default', NULL, NULL, '/srv', NULL,
    '["dead"]', 0, 'retry', NULL, NULL, 0, 'dead', 0, 1, NULL, 3, 0, 1000, 1000, NULL, 1000, NULL,
    'waited for dead, which is dead', NULL);
INSERT INTO jobs VALUES (5, 'failed', '"true"', 0, NULL, NULL, NULL, NULL, 'default', NULL, NULL, '/srv', NULL,
    NULL, 0, 'retry', NULL, NULL, 0, 'failed', 1, 0, 6500, NULL, 0, 1000, 4500, 4000, NULL, 1, 'exit code 1', 1);
INSERT INTO jobs VALUES (6, 'cancelled', '"true"', 0, NULL, NULL, NULL, NULL, 'default', NULL, NULL, '/srv', NULL,
    NULL, 0, 'retry', NULL, NULL, 0, 'cancelled', 0, 0, NULL, NULL, 0, 1000, 5000, NULL, 5000, NULL, NULL, NULL);
INSERT INTO jobs VALUES (7, 'processing', '"true"', 9, NULL, NULL, NULL, NULL, 'default', NULL, NULL, '/srv', NULL,
    NULL, 0, 'retry', NULL, NULL, 0, 'processing', 1, 0, NULL, NULL, 0, 1000, 6000, 6000, NULL, NULL, NULL, 1);
INSERT INTO jobs VALUES (8, 'all', '["echo","it''s","ü"]', -3, 1, 0.5, 3.0, 4000000000000, 'q', 't', 'k', '/srv',
    '{"A":"b"}', '["completed","processing"]', 1, 'dead', '[3]', '[4]', 1, 'pending', 0, 1, 4000000000000, NULL, 0,
    1000, 1000, NULL, NULL, NULL, NULL, NULL);
CREATE TABLE past (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
INSERT INTO past VALUES
    ('run 0.01', 0.0), ('run 0.1', 0.0), ('run 1', 1.0), ('run 10', 1.0), ('run 3600', 1.0), ('run 60', 1.0),
    ('run 600', 1.0), ('run 86400', 1.0), ('run count', 1.0), ('run cpu', 0.25), ('run sum', 0.5),
    ('wait 0.01', 1.0), ('wait 0.1', 1.0), ('wait 1', 1.0), ('wait 10', 1.0), ('wait 3600', 1.0), ('wait 60', 1.0),
    ('wait 600', 1.0), ('wait 86400', 1.0), ('wait count', 1.0), ('wait cpu', 0.25), ('wait sum', 0.0);
CREATE TABLE queues (
    name TEXT PRIMARY KEY,
    paused INTEGER NOT NULL DEFAULT 0,  -- nothing new is started
    max_running INTEGER  -- at most so many at once
    ) WITHOUT ROWID;
INSERT INTO queues VALUES ('q',1,2);
CREATE TABLE workers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice: it names the bell
    pid INTEGER NOT NULL,  -- to be read by people; nothing is ever signalled by it
    host TEXT NOT NULL,
    slot INTEGER NOT NULL,  -- the lowest number that no other live worker holds
    queues TEXT,  -- JSON array of those that it takes, null for all
    drain INTEGER NOT NULL DEFAULT 0,  -- leaves when nothing is left that could run
    stop TEXT CHECK (stop IN ('finish', 'now')),  -- it is to leave, after its job or at once
    started_at INTEGER NOT NULL);
INSERT INTO workers VALUES (1,4242,'here',1,'["default","q"]',1,NULL,1000);
CREATE INDEX jobs_ready ON jobs (queue, priority DESC, seq) WHERE ready;
CREATE INDEX jobs_due ON jobs (due_at) WHERE due_at IS NOT NULL AND hold = 0 AND blockers = 0;
CREATE INDEX jobs_state ON jobs (state, seq);
CREATE INDEX jobs_tag ON jobs (tag) WHERE tag IS NOT NULL;
CREATE UNIQUE INDEX jobs_key ON jobs (key)
    WHERE key IS NOT NULL AND state IN ('pending', 'processing', 'failed');
CREATE INDEX dependencies_child ON dependencies (child);
CREATE VIEW heads AS
    SELECT head.seq, head.priority, head.queue FROM counts AS waiting
    JOIN jobs AS head ON head.seq = (
        SELECT seq FROM jobs WHERE ready AND queue = waiting.queue ORDER BY priority DESC, seq LIMIT 1)
    LEFT JOIN queues ON queues.name = waiting.queue
    WHERE waiting.state IN ('pending', 'failed') AND waiting.n > 0
    AND NOT coalesce(queues.paused, 0)
    AND (queues.max_running IS NULL OR queues.max_running > coalesce((
        SELECT n FROM counts WHERE state = 'processing' AND queue = waiting.queue), 0));
CREATE TRIGGER jobs_inserted AFTER INSERT ON jobs BEGIN
    INSERT INTO counts VALUES (NEW.state, NEW.queue, 1) ON CONFLICT DO UPDATE SET n = n + 1;
END;
CREATE TRIGGER jobs_moved AFTER UPDATE OF state, queue ON jobs
    WHEN OLD.state <> NEW.state OR OLD.queue <> NEW.queue BEGIN
    UPDATE counts SET n = n - 1 WHERE state = OLD.state AND queue = OLD.queue;
    INSERT INTO counts VALUES (NEW.state, NEW.queue, 1) ON CONFLICT DO UPDATE SET n = n + 1;
END;
CREATE TRIGGER jobs_before_delete BEFORE DELETE ON jobs WHEN OLD.state = 'completed' BEGIN
    DELETE FROM dependencies WHERE parent = OLD.seq;
END;
CREATE TRIGGER jobs_deleted AFTER DELETE ON jobs BEGIN
    UPDATE counts SET n = n - 1 WHERE state = OLD.state AND queue = OLD.queue;
    DELETE FROM attempts WHERE job = OLD.seq;
    DELETE FROM dependencies WHERE child = OLD.seq;
END;
CREATE TRIGGER jobs_completed AFTER UPDATE OF state ON jobs WHEN NEW.state = 'completed' BEGIN
    UPDATE jobs SET blockers = blockers - 1
        WHERE seq IN (SELECT child FROM dependencies WHERE parent = NEW.seq);
END;
CREATE TRIGGER dependencies_inserted AFTER INSERT ON dependencies BEGIN
    UPDATE jobs SET blockers = blockers + 1 WHERE seq = NEW.child
        AND (SELECT state FROM jobs WHERE seq = NEW.parent) <> 'completed';
END;
CREATE TRIGGER dependencies_deleted AFTER DELETE ON dependencies BEGIN
    UPDATE jobs SET blockers = blockers - 1 WHERE seq = OLD.child
        AND (SELECT state FROM jobs WHERE seq = OLD.parent) IS NOT 'completed';
END;
DELETE FROM sqlite_sequence;
INSERT INTO sqlite_sequence VALUES ('workers',1);
INSERT INTO sqlite_sequence VALUES ('jobs',8);
COMMIT;
"""


def rows_of(path: Path, sql: str) -> list[dict[str, Any]]:
    """What a database answers to a query of another program, by column."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute(sql)]


def schema_of(path: str | Path) -> list[tuple[str, ...]]:
    """The schema of a database; indentation does not count."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()
    return [(kind, name, " ".join((sql or "").split())) for kind, name, sql in rows]


def database_of_1_0_0(home: Home) -> Path:
    """A file as 1.0.0 has left it."""
    path = home.root / "1.0.0.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(DATABASE_OF_1_0_0)
    return path


def test_schema_of_1_0_0_is_brought_up_to_that_of_a_new_database(home: Home) -> None:
    """A database of 1.0.0, kept here as it was, gets just the schema that a new one has."""
    path = database_of_1_0_0(home)
    with contextlib.closing(sqlite3.connect(path)) as db:
        same(db.execute("PRAGMA user_version").fetchone(), (1,))
    q.open_store(str(path)).close()
    same(schema_of(path), home.store and schema_of(home.home.database))
    same(rows_of(path, "PRAGMA user_version"), [{"user_version": len(q.MIGRATIONS)}])


def test_schema_brought_up_from_1_0_0_keeps_every_job_and_attempt(home: Home) -> None:
    """Each job of a 1.0.0 database reads back as its row was, its attempts too, and the counters are right."""
    path = database_of_1_0_0(home)
    rows, attempts = rows_of(path, "SELECT * FROM jobs ORDER BY seq"), rows_of(path, "SELECT * FROM attempts")
    same({row["state"] for row in rows}, {state.value for state in q.State})
    with q.open_store(str(path)) as store:
        jobs = sorted(store.queries.jobs())
        same([as_1_0_0_names_it(job) for job in jobs], [as_values(row) for row in rows])
        kept = [{"job": job.seq, **attempt._asdict()} for job in jobs for attempt in store.queries.history(job)]
        same([{name: each[name] for name in attempts[0] if name != "n"} for each in kept],
             [{name: value for name, value in row.items() if name != "n"} for row in attempts])  # fmt: skip
        same((store.upkeep.damage(), store.upkeep.miscounts()), ([], []))


def as_values(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `jobs` as 1.0.0 made it, its JSON read, without the column that is derived."""
    values = {name: json.loads(row[name]) if name in q.JSON_COLUMNS and row[name] else row[name] for name in row}
    return {name: value for name, value in values.items() if name != "ready"}


def as_1_0_0_names_it(job: q.Job) -> dict[str, Any]:
    """What a job has of the columns that 1.0.0 knew, by their names then."""
    since = job._asdict() | {"doomed_by": job.failed_parent}
    names = re.findall(r"(?m)^    (\w+) (?:INTEGER|TEXT|REAL)", DATABASE_OF_1_0_0.partition("CREATE TABLE jobs")[2])
    return {name: since[name] for name in names[: names.index("worker") + 1]}


def test_schema_brought_up_from_1_0_0_keeps_what_is_beside_the_jobs(home: Home) -> None:
    """Dependencies, the worker, the queue, the settings, the tallies and the next number outlive the change."""
    path = database_of_1_0_0(home)
    with q.open_store(str(path)) as store:
        (worker,) = store.workers.all()
        same((worker.id, worker.pid, worker.host, worker.slot), (1, 4242, "here", 1))
        same((worker.queues, worker.drain, worker.started_at, worker.job), (["default", "q"], True, 1000, "processing"))
        paused = [(queue.name, queue.max_running) for queue in store.queues.all() if queue.paused]
        same((paused, store.config.settings().max_retries), ([("q", 2)], 7))
        tallies = store.statistics.tallies()
        same([tallies[name] for name in ("run count", "run cpu", "run sum")], [4, 0.75, 2.0])
        spec = q.check_fields({"command": "true", "cwd": "/", "after": ["all"]}, 0)
        same(list(store.intake.enqueue([("", spec)], 7000)), [("j0000009", True)])
        store.jobs.finish(store.queries.get("processing"), exited(0), q.Settings(), 8000)
        same((store.queries.get("all").blockers, store.upkeep.miscounts()), (0, []))


def test_schema_newer_is_refused(home: Home) -> None:
    """A database that a newer queuectl made is refused and left as it is."""
    home.add(id="a")
    home.sql("PRAGMA user_version = 999")
    assert "newer" in home.fails("status")
    assert "newer" in home.fails("worker", "start")


def test_schema_of_a_stranger_is_refused(home: Home) -> None:
    """Another program's database is refused and left as it is."""
    home.path.mkdir(mode=0o700)
    with contextlib.closing(sqlite3.connect(home.path / "queue.db")) as db:
        db.execute("CREATE TABLE theirs (a)")
    assert "another program" in home.fails("status")


def test_schema_many_processes_make_it_at_once(home: Home) -> None:
    """Processes that find no home at the same time all end well, and each has stored its job."""
    many = [home.popen("enqueue", "--", "exit 0") for _ in range(3 if WINDOWS else 8)]
    same({(p.communicate(timeout=DEADLINE_S)[1], p.returncode) for p in many}, {(b"", 0)})
    same(len(home.store.queries.jobs()), len(many))


# -- kill points


@posix
def test_schema_killed_while_it_is_made_is_made_by_the_next(home: Home) -> None:
    """A process killed inside the transaction that makes the database leaves one that the next command makes."""
    patch = "\nq.MIGRATIONS = tuple((why, Dying(each)) for why, each in q.MIGRATIONS)\nq.cli(['status'])"
    for point in (0, 1, 2, 10, 100):
        killed(child(home, DYING.format(point=point) + patch))
    same(home.out("enqueue", "--id", "a", "--", "true"), "a\n")
    is_well(home)


@posix
def test_schema_killed_while_it_is_brought_up_stays_as_it_was(home: Home) -> None:
    """A migration killed midway leaves the older schema with its jobs; the next one brings it up."""
    home.run("enqueue", "--id", "a", "--", "true")
    statements = "('ALTER TABLE jobs ADD COLUMN colour TEXT', \"UPDATE jobs SET colour = 'red'\")"
    newer = "\nq.MIGRATIONS += (('test', {}),)\nq.cli(['enqueue', '--id', 'b', '--', 'true'])"
    for point in (0, 1, 2):
        killed(child(home, DYING.format(point=point) + newer.format(f"Dying({statements})")))
        same([job["id"] for job in home.json("list")], ["a"])
    same(finished(child(home, newer.format(statements))).out, "b\n")
    same(home.sql("SELECT id, colour FROM jobs ORDER BY seq"), [("a", "red"), ("b", None)])
    assert "newer queuectl" in home.fails("list")


# ---- database


def test_store_damaged_is_said_in_one_line(home: Home) -> None:
    """A file that is no database is an error that says so."""
    home.path.mkdir(mode=0o700)
    (home.path / "queue.db").write_bytes(b"no database at all, whatever its name is" * 100)
    for args in (["status"], ["worker", "start"]):
        ran = home.run(*args, code=1)
        assert re.fullmatch(r"Error: .*damaged.*\n", ran.err), ran.err


@posix
def test_commit_that_the_disk_refuses_is_undone_for_good(home: Home) -> None:
    """What a command says is not stored does not come back, not even when all who have the database open die."""
    home.add_all([{"id": "a", "command": "x", "hold": True}, {"id": "b", "command": "x", "queue": "slow"}])
    home.run("queue", "pause", "slow")
    before = [line for line in home.dump() if "workers" not in line]
    for words in (["enqueue", "--id", "new", "--hold", "--", "x"], ["cancel", "a"], ["edit", "a", "--priority", "5"],
                  ["release", "a"], ["config", "set", "max_retries", "9"], ["queue", "resume", "slow"]):  # fmt: skip
        pids = [row.pid for row in home.start()]
        home.store.close()  # only the worker has it open, and does not close it: so who comes next reads the WAL anew
        del home.store
        ran = finished(child(home, failing_disk() + "q.main()", *words))
        if ran.code == 77:
            raise Skip("this system lets nobody refuse a call")
        same((words, ran.code, ran.out), (words, 1, ""))
        one_line(ran, "disk I/O error", "nothing was stored")
        for pid in pids:
            os.kill(pid, KILL)
            until(lambda pid=pid: not is_running(pid), "it is gone")  # type: ignore[misc]
        same((words, [line for line in home.dump() if "workers" not in line]), (words, before))
        home.sql("DELETE FROM workers")


@posix
def test_commit_whose_fate_is_unknown_is_said_with_the_command_that_tells(home: Home) -> None:
    """Where it cannot be told whether a commit holds, that is what is said."""
    home.add(id="a")
    patch = failing_disk() + "q.Database._overwrite_wal = lambda self: False\nq.main()"
    for words, look in ((["enqueue", "--", "x"], "queuectl list"), (["queue", "pause", "x"], "queuectl queue list"),
                        (["config", "set", "max_retries", "9"], "queuectl config list")):  # fmt: skip
        ran = finished(child(home, patch, *words))
        if ran.code == 77:
            raise Skip("this system lets nobody refuse a call")
        same((words, ran.code, ran.out), (words, 1, ""))
        one_line(ran, "whether it was stored is not known", f"look: {look}")
        home.run(*look.split()[1:])


@posix
def test_database_that_cannot_be_used_is_refused_unchanged(home: Home) -> None:
    """A database truncated, of another program, newer, or none at all: one line, exit 1, and not a byte changed."""
    home.add_all([{"command": "true"}] * 500)
    home.store.close()
    database = Path(home.home.database)
    good = database.read_bytes()
    with contextlib.closing(sqlite3.connect(home.root / "other")) as db, db:
        db.execute("CREATE TABLE songs (name)")
    cases = [
        (good[: len(good) // 2], "damaged"), (good[: 3 * q.PAGE_BYTES], "damaged"), (good[:70], "queue.db"),
        (b"all work and no play\n" * 1000, "damaged"), ((home.root / "other").read_bytes(), "another program"),
        (good[:60] + (99).to_bytes(4, "big") + good[64:], "newer queuectl"),
    ]  # fmt: skip
    calls = [["enqueue", "--", "true"], ["list"], ["worker", "start"], ["dlq", "retry", "--all"]]
    for content, text in cases:
        for words in calls:
            database.write_bytes(content)
            one_line(home.run(*words, code=1), text)
            assert database.read_bytes() == content, (text, words)
    database.write_bytes(good[:8192] + bytes(range(256)) * ((len(good) - 8192) // 256))
    one_line(home.run("list", code=1), "damaged")
    home.run("doctor", code=1)


# -- the disk is full


def test_store_full_disk_is_said_in_one_line(home: Home) -> None:
    """Where the disk is full, nothing is stored and the error says so."""
    home.add()
    home.store.db._connection.execute(f"PRAGMA max_page_count = {home.sql('PRAGMA page_count')[0][0]}")
    with refuses(q.StoreError, "full"):
        home.add_all({"command": "x" * 100_000} for _ in range(3))
    same(len(home.store.queries.jobs()), 1)


@posix
def test_disk_full_refuses_an_enqueue_in_one_line(home: Home) -> None:
    """A full disk: `enqueue` says so in one line and stores nothing; with room it works again."""
    with small_disk(home) as disk:
        home.run("enqueue", "--id", "a", "--", "true")
        full = fill(disk)
        one_line(home.run("enqueue", "--id", "b", "--", "true", code=1), "full")
        one_line(home.run("enqueue", "-", stdin='{"command": "true"}\n' * 20_000, code=1), "full")
        one_line(home.run("config", "set", "on_dead", "x" * 50_000, code=1), "full")
        one_line(home.run("worker", "start", code=1), "full")
        full.unlink()
        home.run("enqueue", "--id", "c", "--", "true")
        same([job["id"] for job in home.json("list")], ["a", "c"])
        same((home.store.upkeep.miscounts(), home.store.upkeep.damage()), ([], []))


@posix
def test_disk_full_refuses_a_new_home_in_one_line(home: Home) -> None:
    """A full disk on which the home is to be made: one line, and with room it is made."""
    with small_disk(home) as disk:
        full = fill(disk)
        one_line(home.run("enqueue", "--", "true", code=1))
        one_line(home.run("worker", "start", code=1))
        full.unlink()
        home.run("enqueue", "--", "true")


@posix
def test_disk_full_of_temporary_files_refuses_a_batch_in_one_line(home: Home) -> None:
    """A full disk under SQLite's temporary files: one line, nothing stored."""
    with small_disk(home, "200k") as disk:
        home.path = home.root / "home"
        home.env |= {"QUEUECTL_HOME": str(home.path), "SQLITE_TMPDIR": str(disk)}
        one_line(home.run("enqueue", "-", stdin='{"command": "true"}\n' * 100_000, code=1), "full")
        same(home.json("list"), [])
        home.path = disk / "home"


@posix
def test_disk_full_refuses_a_change_in_one_line(home: Home) -> None:
    """A full disk: no command does half of what it was asked, and each says why in one line."""
    with small_disk(home, "16m") as disk:
        bury_many(home, 2000, "true " * 300)  # more than SQLite keeps in memory
        home.add(tag="t")
        before = home.dump()
        with held(home):
            full = fill(disk)
            for words in (
                ["dlq", "retry", "--all"], ["dlq", "purge", "--all"], ["prune"], ["hold", "--tag", "t"],
                ["cancel", "--tag", "t"], ["edit", "--tag", "t", "--priority", "3"], ["queue", "pause", "default"],
            ):  # fmt: skip
                one_line(home.run(*words, code=1), "full")
        full.unlink()
        same(home.dump(), before)
        same((home.store.upkeep.miscounts(), home.store.upkeep.damage()), ([], []))


# -- other programs


def test_store_says_in_one_line_that_another_program_holds_it(home: Home) -> None:
    """Where the database is held for longer than the busy timeout, nothing is stored and nobody reads `locked`."""
    home.add(id="a")
    with contextlib.closing(sqlite3.connect(home.home.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with (
            q.open_store(home.home.database, 0.05) as store,
            refuses(q.StoreBusy, "another program holds", "nothing was"),
        ):
            store.intake.enqueue([("", q.check_fields({"command": "x", "cwd": "/"}, 0))], 1)
        same([job["id"] for job in home.json("list")], ["a"])
    same(len(home.store.queries.jobs()), 1)


@alone
def test_store_many_at_once_never_see_locked(home: Home) -> None:
    """Many enqueuers beside busy workers all succeed, nobody reads `locked`, and every job runs."""
    home.start(2)
    many, each = (3, 5) if WINDOWS else (12, 25)
    (home.work / "batch").write_text('{"command": "exit 0"}\n' * each)
    processes = [home.popen("enqueue", "--file", "batch") for _ in range(many)]
    same({(p.communicate(timeout=DEADLINE_S)[1], p.returncode) for p in processes}, {(b"", 0)})
    until(lambda: home.store.queries.counts()[q.State.COMPLETED] == many * each)
    assert "locked" not in Path(home.home.worker_log).read_text()


def test_enqueue_from_a_slow_pipe_keeps_nobody_waiting(home: Home) -> None:
    """While a batch is still arriving on standard input, others can write."""
    home.add()
    process = home.popen("enqueue", "-", stdin=subprocess.PIPE)
    assert process.stdin
    process.stdin.write(b'{"command": "exit 0"}\n' * 20_000)  # more than a pipe holds: it is being read
    process.stdin.flush()
    try:
        with q.open_store(home.home.database, 3.0) as store:
            store.intake.enqueue([("", q.check_fields({"command": "x", "cwd": "/"}, 0))], 1)
    finally:
        process.communicate(timeout=DEADLINE_S)
    same((process.returncode, len(home.store.queries.jobs())), (0, 20_002))


@posix
def test_long_reader_holds_up_nobody(home: Home) -> None:
    """A program that reads the database for long keeps neither workers nor `enqueue` waiting."""
    home.start(2)
    with held(home) as reader:
        same(home.run("enqueue", "-", stdin='{"command": "true"}\n' * 100).err, "")
        home.run("wait")
        same(reader.execute("SELECT count(*) FROM jobs").fetchone(), (0,))
    same(home.store.queries.counts()[q.State.COMPLETED], 100)


@posix
def test_long_writer_is_named_to_who_enqueues(home: Home) -> None:
    """Who enqueues against a program that never lets go is told so in one line; one that does is waited for."""
    same(q.BUSY_TIMEOUT_S, 30)
    impatient = "q.open_store.__defaults__ = (0.3,)\nq.cli(sys.argv[1:])"
    same(home.json("list"), [])
    with held(home, "BEGIN IMMEDIATE"):
        for words in (["enqueue", "--", "true"], ["config", "set", "max_retries", "1"], ["queue", "pause", "q"]):
            ran = finished(child(home, impatient, *words))
            same(ran.code, 1)
            one_line(ran, "another program holds", "nothing was stored")
        same(finished(child(home, impatient, "list")).out, "no jobs\n")  # who reads is not held up
        asks = "print('asks', file=sys.stderr, flush=True)\nq.cli(['enqueue', '--id', 'a', '--', 'true'])"
        patient = child(home, asks)
        says(patient, "asks")
    same(finished(patient).out, "a\n")
    same([job["id"] for job in home.json("list")], ["a"])


# ---- store


def test_enqueue_lands_whole_or_not_at_all(home: Home) -> None:
    """A batch with one bad line, or one id that exists, stores nothing and names the line."""
    home.add(id="a")
    for bad in ('{"command": 1}', '{"command": "x", "id": "a"}', '{"command": "x", "after": ["nowhere"]}'):
        code = 2 if "1}" in bad else 1
        assert "line 2" in home.fails("enqueue", "-", stdin='{"command": "x"}\n' + bad, code=code)


def test_enqueue_ids_are_unique_without_regard_to_case(home: Home) -> None:
    """An id that exists in any case is refused, or passed over where that is wanted."""
    home.add(id="Job")
    with refuses(q.QueueError, "exists"):
        home.add(id="jOB")
    spec = q.check_fields({"command": "x", "id": "JOB", "cwd": "/"}, 0)
    same(list(home.store.intake.enqueue([("", spec)], 0, skip_existing=True)), [("JOB", False)])
    same(len(home.store.queries.jobs()), 1)


def test_enqueue_made_up_ids_sort_by_time_and_are_never_used_twice(home: Home) -> None:
    """Ids made up are short, rise in the order of creation, avoid those chosen, and do not come again after a purge."""
    first = [home.add() for _ in range(20)]
    home.add(id=f"J{len(first) + 2:07x}")
    first += [home.add() for _ in range(3)]
    same((first, len(set(first)), max(map(len, first)) < 12), (sorted(first), 23, True))
    home.sql("UPDATE jobs SET state = 'dead'")
    home.store.changes.purge_dead(q.EVERY_JOB)
    assert home.add() > first[-1]


def test_enqueue_made_up_ids_avoid_those_of_the_same_batch(home: Home) -> None:
    """An id made up for one line is not the one that another line of the batch chose."""
    ids = home.add_all([{"command": "x", "id": f"j{n:07x}"} for n in (3, 2)] + [{"command": "x"}] * 3)
    same((len(set(ids)), len(home.store.queries.jobs())), (5, 5))


def test_key_lets_one_job_at_a_time_in(home: Home) -> None:
    """Enqueueing a key that a job bears which has not ended gives that job's id and changes nothing."""
    home.add(id="a", key="k")
    before = home.dump()
    ran = home.json("enqueue", "--key", "k", "--", "exit 0")
    same((ran, home.dump()), ([{"id": "a", "created": False}], before))
    home.store.jobs.finish(home.claim(home.worker_row()), exited(0), q.Settings(), 1)
    same(home.add(id="b", key="k"), "b")


def test_key_of_another_keeps_the_dead_from_coming_back(home: Home) -> None:
    """A dead job whose key another job bears meanwhile cannot be retried, in one line."""
    home.add(id="a", key="k", max_retries=0)
    home.store.jobs.finish(home.claim(home.worker_row()), exited(1), q.Settings(), 1)
    home.add(id="b", key="k")
    assert "'k'" in home.fails("dlq", "retry", "a")


def test_claim_takes_the_highest_priority_then_the_first(home: Home) -> None:
    """Higher priority first over all queues, among equals the first enqueued."""
    for id, priority, queue in (("a", 0, "x"), ("b", 5, "y"), ("c", -1, "x"), ("d", 5, "x"), ("e", 0, "y")):
        home.add(id=id, priority=priority, queue=queue)
    worker = home.worker_row()
    same([home.claim(worker).id for _ in range(5)], ["b", "d", "a", "e", "c"])
    same(home.store.jobs.claim(worker, None, q.now_ms()), None)


def test_claim_passes_over_what_may_not_run(home: Home) -> None:
    """Not before its time, not while on hold, not before its parents, not of other queues."""
    now = q.now_ms()
    home.add(id="later", delay=60)
    home.add(id="held", hold=True)
    home.add(id="parent", queue="other")
    home.add(id="child", after=["parent"])
    worker = home.worker_row()
    same(home.store.jobs.claim(worker, ["default"], now), None)
    same(home.claim(worker, now).id, "parent")
    same(home.store.jobs.claim(worker, None, now + 59_000), None)
    same(home.claim(worker, now + 120_000).id, "later")


def test_claim_keeps_to_pauses_and_limits(home: Home) -> None:
    """Of a paused queue nothing is started, of a limited one at most so many at once."""
    home.add_all({"command": "x", "id": f"{queue}{n}", "queue": queue} for queue in "ab" for n in range(3))
    home.sql("INSERT INTO queues VALUES ('a', 1, NULL), ('b', 0, 2)")
    worker = home.worker_row()
    jobs = [home.claim(worker), home.claim(worker)]
    same(([job.id for job in jobs], home.store.jobs.claim(worker, None, q.now_ms())), (["b0", "b1"], None))
    home.store.jobs.finish(jobs[0], exited(0), q.Settings(), 1)
    same(home.claim(worker).id, "b2")


def test_claim_gives_nothing_to_who_is_leaving(home: Home) -> None:
    """A worker that was told to stop, or that was taken for dead, gets no job."""
    home.add()
    worker = home.worker_row()
    home.store.workers.request_stop([worker], "finish")
    same(home.store.jobs.claim(worker, None, q.now_ms()), None)
    home.store.workers.unregister(worker)
    same(home.store.jobs.claim(worker, None, q.now_ms()), None)


def test_finish_refuses_a_late_result(home: Home) -> None:
    """A worker that was taken for dead cannot overwrite what came after."""
    home.add(id="a")
    late = home.claim(home.worker_row(), 1000)
    same(home.store.jobs.finish(late, q.Outcome(q.EndReason.LOST), q.Settings(), 2000), q.State.FAILED)
    home.claim(home.worker_row(), 3000)
    before = home.dump()
    same((home.store.jobs.finish(late, exited(0), q.Settings(), 4000), home.dump()), (None, before))


def test_dead_parent_takes_its_children_along_all_the_way_down(home: Home) -> None:
    """When a job dies, what waits for it is dead with it at any depth, also what is enqueued later."""
    home.add(id="a", max_retries=0)
    for id, parents in (("b", ["a"]), ("c", ["b"]), ("d", ["b", "c"])):
        home.add(id=id, after=parents)
    home.store.jobs.finish(home.claim(home.worker_row()), exited(1), q.Settings(), 1)
    home.add(id="e", after=["d"])
    same([home.state(id) for id in "abcde"], ["dead"] * 5)
    assert "waited for a" in str(home.job("d").error)


def test_dlq_retry_brings_the_children_back(home: Home) -> None:
    """Retrying a dead parent makes it and what died because of it pending, with no attempts made."""
    home.add(id="a", max_retries=0)
    home.add(id="b", after=["a"])
    home.add(id="c", after=["b"])
    worker = home.worker_row()
    home.store.jobs.finish(home.claim(worker), exited(1), q.Settings(), 1)
    home.store.reruns.retry_dead(q.Selection(["a"]), 2)
    same([(home.state(id), home.job(id).attempts) for id in "abc"], [("pending", 0)] * 3)
    for id in "abc":
        job = home.claim(worker)
        home.store.jobs.finish(job, exited(0), q.Settings(), 3)
        same(job.id, id)


def test_dlq_retry_keeps_the_time_before_which_a_job_shall_not_run(home: Home) -> None:
    """A job that died with its parent, came back and was to run later is still to run later, and no more dead."""
    home.add(id="a", max_retries=0)
    home.add(id="b", after=["a"], run_at=9)
    worker = home.worker_row()
    home.store.jobs.finish(home.claim(worker), exited(1), q.Settings(), 1)
    assert "waited for a" in (home.job("b").error or "")
    home.store.reruns.retry_dead(q.Selection(["a"]), 2)
    home.store.jobs.finish(home.claim(worker, 3), exited(0), q.Settings(), 3)
    same((home.job("b").due_at, home.job("b").error, home.store.jobs.claim(worker, None, 8)), (9000, None, None))
    same(home.claim(worker, 9000).id, "b")


def test_dlq_retry_of_a_child_alone_is_refused(home: Home) -> None:
    """A job cannot come back from the dead before its parent does."""
    home.add(id="a", max_retries=0)
    home.add(id="b", after=["a"])
    home.store.jobs.finish(home.claim(home.worker_row()), exited(1), q.Settings(), 1)
    assert "waited for a, which is dead" in home.fails("dlq", "retry", "b")


def test_after_waits_for_every_parent(home: Home) -> None:
    """A job starts only once all jobs that it names have completed."""
    for id in "ab":
        home.add(id=id)
    home.add(id="c", after=["a", "b", "a"], priority=9)
    worker = home.worker_row()
    jobs = [home.claim(worker), home.claim(worker)]
    for job in jobs:
        same(home.store.jobs.claim(worker, None, q.now_ms()), None)
        home.store.jobs.finish(job, exited(0), q.Settings(), 1)
    same(home.claim(worker).id, "c")


def test_after_refuses_unknown_jobs_and_itself(home: Home) -> None:
    """A job cannot wait for one that is not there, nor for itself."""
    with refuses(q.NotFound, "nowhere"):
        home.add(after=["nowhere"])
    with refuses(q.BadInput, "waits for it"):
        home.add(id="a", after=["a"])
    same(home.store.queries.jobs(), [])


def test_cancel_keeps_waiting_jobs_from_running_and_dooms_their_children(home: Home) -> None:
    """A cancelled job never runs, and what waits for it is dead."""
    home.add(id="a")
    home.add(id="b", after=["a"])
    home.store.changes.cancel(q.Selection(["a"]), 1)
    same(
        (home.state("a"), home.state("b"), home.store.jobs.claim(home.worker_row(), None, 2)),
        ("cancelled", "dead", None),
    )
    assert "a, which is cancelled" in str(home.job("b").error)


def test_cancel_passes_over_what_has_ended(home: Home) -> None:
    """Of several jobs those that can be are cancelled, a line names the others, and an unknown id stops it all."""
    home.add_all({"command": "x", "id": id, "max_retries": 0} for id in ("done", "pend", "run"))
    worker = home.worker_row()
    home.store.jobs.finish(home.claim(worker), exited(0), q.Settings(), 1)
    assert "nowhere" in home.fails("cancel", "done", "pend", "nowhere")
    ran = home.run("cancel", "done", "pend", "done")
    same((ran.out, ran.err), ("pend cancelled\n", "passed over 1 of 2 jobs, which had ended: done is completed\n"))
    ran = home.run("cancel", "--json", "done", "pend")
    same(json.loads(ran.out), [])
    same(ran.err, "passed over 2 of 2 jobs, which had ended: done is completed, pend is cancelled\n")
    same(home.out("cancel", "--state", "pending", "--queue", "other"), "no such jobs\n")
    same([home.state(id) for id in ("done", "pend", "run")], ["completed", "cancelled", "pending"])


def test_edit_changes_what_has_not_started(home: Home) -> None:
    """Fields of a waiting job change as if it had been enqueued so; a bad value or a running job changes nothing."""
    home.add(id="p")
    home.add(id="a", priority=1, delay=60)
    home.run("edit", "a", "--priority", "7", "--delay", "0", "--tag", "t", "--queue", "q", "--", "echo", "new")
    job = home.job("a")
    same((job.priority, job.due_at, job.tag, job.queue, job.command), (7, None, "t", "q", ["echo", "new"]))
    home.run("edit", "--tag", "t", "--after", "p")
    same((home.job("a").blockers, home.job("a").after), (1, ["p"]))
    home.fails("edit", "a", "p", "--priority", "x", code=2)
    home.fails("edit", "a", code=2)
    assert "waits for it" in home.fails("edit", "p", "--after", "a", code=2)
    home.claim(home.worker_row())
    assert "processing" in home.fails("edit", "a", "p", "--priority", "9")
    counters_equal_rows(home)


def test_edit_leaves_what_it_does_not_name(home: Home) -> None:
    """Only the fields that are named change."""
    fields: dict[str, Any] = {"env": {"A": "b"}, "timeout": 5.0, "tag": "t", "queue": "q", "key": "k", "hold": True}
    fields |= {"ok_codes": [3], "max_retries": 1, "command": ["x", "y"], "snooze": True, "cwd": str(home.work)}
    home.add(id="a", **fields)
    home.run("edit", "a", "--priority", "7")
    job = home.job("a")
    same({name: getattr(job, name) for name in fields} | {"priority": job.priority}, fields | {"priority": 7})


def test_edit_leaves_a_failed_job_its_rules(home: Home) -> None:
    """Neither more attempts than allowed, nor a backoff cut short by taking back a moment that was never set."""
    home.add("exit 1", id="a", max_retries=2, backoff_base=600)
    home.start()
    until(lambda: home.state("a") == "failed")
    due = home.job("a").due_at
    assert "cancel" in home.fails("edit", "a", "--max-retries", "0")
    home.run("edit", "a", "--max-retries", "1", "--clear", "run-at")
    same(home.job("a").due_at, due)
    home.run("edit", "a", "--run-at", "2020-01-01")  # that is to say now
    same(home.ended("a").attempts, 2)


def test_cancel_of_parent_and_child_cancels_both(home: Home) -> None:
    """In whatever order they are named, what was to be cancelled is cancelled and not dead."""
    for first, second in (("p1", "c1"), ("c2", "p2")):
        home.add(id=(parent := min(first, second, key=lambda id: id[0] != "p")), hold=True)
        home.add(id=(child := max(first, second, key=lambda id: id[0] != "p")), after=[parent])
        same(home.out("cancel", first, second), f"{first} cancelled\n{second} cancelled\n")
        same([home.state(parent), home.state(child)], ["cancelled", "cancelled"])


def test_dlq_retry_of_all_takes_one_of_each_key(home: Home) -> None:
    """Of dead jobs with the same key one comes back; one that was named and cannot is an error."""
    home.start()
    for id, key in (("a", "K"), ("b", "K"), ("c", "L")):
        home.ended(home.add("exit 1", id=id, key=key, max_retries=0))
    home.run("worker", "stop")
    same(home.out("dlq", "retry", "--all"), "a pending again\nc pending again\n")
    assert "'K' has not ended" in home.fails("dlq", "retry", "b")


def test_edit_of_a_dead_job_leaves_it_dead_and_lets_it_be_retried(home: Home) -> None:
    """A dead job may be changed in every way, stays dead, and runs as it was changed once it is retried."""
    home.add(id="a", max_retries=0)
    home.add(id="b", after=["a"], key="k")
    home.add(id="c")
    worker = home.worker_row()
    home.store.jobs.finish(home.claim(worker), exited(1), q.Settings(), 1)
    home.run("edit", "a", "--max-retries", "0", "--run-at", "2099-01-01", "--", "echo", "new")
    same((home.state("a"), home.job("a").due_at, home.store.jobs.next_due()), ("dead", None, None))
    home.run("edit", "b", "--after", "c", "--priority", "9")
    same((home.state("b"), home.job("b").blockers), ("dead", 1))
    counters_equal_rows(home)
    home.run("dlq", "retry", "b")
    same((home.state("b"), home.store.queries.get("b").error), ("pending", None))
    home.store.jobs.finish(home.claim(worker), exited(0), q.Settings(), 2)
    same((home.claim(worker).id, home.state("a")), ("b", "dead"))
    home.run("dlq", "retry", "a")
    same((home.job("a").command, home.job("a").due_at), (["echo", "new"], home.job("a").run_at))


def test_edit_refuses_a_dead_job_the_key_of_one_that_has_not_ended(home: Home) -> None:
    """A key that another bears is refused to a dead job too, which could not come back with it."""
    home.add(id="a", max_retries=0)
    home.store.jobs.finish(home.claim(home.worker_row()), exited(1), q.Settings(), 1)
    home.add(id="b", key="k")
    assert "'k'" in home.fails("edit", "a", "--key", "k")
    home.run("edit", "a", "--key", "l")


def test_edit_says_what_it_changed(home: Home) -> None:
    """Each field that changed, with both values; of variables only that they did; a job that was so already."""
    home.add(id="a", tag="t", command="old")
    said = home.out("edit", "a", "--priority", "7", "--hold", "--env", "A=secret", "--run-at", "0", "--", "x", "y z")
    same(said, "a edited: command old -> x 'y z', priority 0 -> 7, run_at - -> 1970-01-01T00:00:00.000Z, "
         "env, hold false -> true\n")  # fmt: skip
    same(home.out("edit", "--tag", "t", "--priority", "7"), "a is so already\n")
    same(home.json("edit", "a", "--clear", "hold", "--timeout", "5"), [{"id": "a", "changed": ["timeout", "hold"]}])


def test_dlq_retry_changes_a_job_before_it_can_start(home: Home) -> None:
    """Fields and a command are set in the transaction that brings the job back, or nothing of it happens."""
    for id in "abc":
        home.add("exit 1", id=id, tag="t", max_retries=0)
    worker = home.worker_row()
    for _ in "abc":
        home.store.jobs.finish(home.claim(worker), exited(1), q.Settings(), 1)
    home.run("dlq", "retry", "a", "--timeout", "9", "--tag", "u", "--hold", "--clear", "max-retries", "--", "new")
    job = home.job("a")
    same((job.state, job.timeout, job.tag, job.hold), (q.State.PENDING, 9, "u", True))
    same((job.max_retries, job.command), (None, "new"))
    assert "'K'" in home.fails("dlq", "retry", "b", "c", "--key", "K")
    home.run("dlq", "retry", "--tag", "t", "--key", "K", "--delay", "60")
    same([(home.state(id), home.job(id).key) for id in "bc"], [("pending", "K"), ("dead", None)])
    same((home.job("b").due_at, home.job("c").run_at), (home.job("b").run_at, None))


def test_rerun_takes_jobs_of_every_ended_state(home: Home) -> None:
    """Completed, dead and cancelled jobs are pending again with no attempts made; the history stays."""
    home.add_all({"command": "x", "id": id, "max_retries": 0, "tag": "t"} for id in ("good", "bad", "off", "wait"))
    worker = home.worker_row()
    for code in (0, 1):
        home.store.jobs.finish(home.claim(worker), exited(code), q.Settings(), 1)
    home.store.changes.cancel(q.Selection(["off"]), 1)
    assert "wait is pending" in home.fails("rerun", "good", "wait")
    home.fails("rerun", "good", "nowhere")
    home.fails("rerun", code=2)
    home.fails("rerun", "good", "--state", "completed", code=2)
    home.fails("rerun", "--state", "pending", code=2)
    same(home.out("rerun", "--state", "completed", "--state", "dead", "--tag", "t"),
         "good pending again\nbad pending again\n")  # fmt: skip
    same(home.out("rerun", "--state", "dead"), "no such jobs\n")
    same(home.json("rerun", "--all", "--priority", "9"), [{"id": "off"}])
    same([(home.state(id), home.job(id).attempts, home.job(id).finished_at) for id in ("good", "bad", "off")],
         [("pending", 0, None)] * 3)  # fmt: skip
    again = [home.claim(worker) for _ in range(3)]
    same([(job.id, job.attempts) for job in again], [("off", 1), ("good", 1), ("bad", 1)])
    home.store.jobs.finish(again[1], exited(0), q.Settings(), 2)
    same([(a.number, a.ended_at) for a in home.history("good")], [(1, 1), (1, 2)])


def test_rerun_of_a_parent_lets_its_children_wait_again(home: Home) -> None:
    """What has not started, or is to be retried, waits for the parent once more; what runs or has ended stays."""
    home.add(id="p")
    for id, priority in (("done", 4), ("fails", 3), ("runs", 2), ("waits", 1)):
        home.add(id=id, after=["p"], priority=priority)
    home.add(id="below", after=["waits"])
    worker = home.worker_row()
    home.store.jobs.finish(home.claim(worker, 1), exited(0), q.Settings(), 2)
    for code in (0, 1):
        home.store.jobs.finish(home.claim(worker, 3), exited(code), q.Settings(), 4)
    running = home.claim(worker, 5)
    home.run("rerun", "p")
    same([home.state(id) for id in ("p", "done", "fails", "runs", "waits", "below")],
         ["pending", "completed", "failed", "processing", "pending", "pending"])  # fmt: skip
    counters_equal_rows(home)
    same(home.store.jobs.finish(running, exited(0), q.Settings(), 6), q.State.COMPLETED)
    parent = home.claim(worker, 10**6)
    same((parent.id, home.store.jobs.claim(worker, None, 10**6)), ("p", None))
    home.store.jobs.finish(parent, exited(0), q.Settings(), 10**6)
    same([home.claim(worker, 10**6).id for _ in range(2)], ["fails", "waits"])
    counters_equal_rows(home)


def test_rerun_of_parent_and_child_runs_them_in_order(home: Home) -> None:
    """A child that is run again with its parent waits for it; alone it does not."""
    home.add(id="p")
    home.add(id="c", after=["p"], priority=9)
    worker = home.worker_row()
    for _ in "pc":
        home.store.jobs.finish(home.claim(worker), exited(0), q.Settings(), 1)
    home.run("rerun", "c", "p")
    for id in "pc":
        job = home.claim(worker)
        home.store.jobs.finish(job, exited(0), q.Settings(), 2)
        same(job.id, id)
    home.run("rerun", "c")
    same(home.claim(worker).id, "c")


def test_rerun_brings_back_what_died_with_a_cancelled_job(home: Home) -> None:
    """What died because a job was cancelled comes back with it, and not what was cancelled by itself."""
    home.add(id="a")
    home.add(id="b", after=["a"])
    home.add(id="c", after=["a"])
    for id in ("c", "a"):
        home.store.changes.cancel(q.Selection([id]), 1)
    same([home.state(id) for id in "abc"], ["cancelled", "dead", "cancelled"])
    assert "waited for a" in home.fails("rerun", "b")
    home.run("rerun", "a")
    same([home.state(id) for id in "abc"], ["pending", "pending", "cancelled"])
    counters_equal_rows(home)


def test_rerun_leaves_what_cannot_run_as_it_was(home: Home) -> None:
    """A taken key, a parent that is dead or gone: refused by name, passed over in a selection without a trace."""
    home.add(id="p", max_retries=0)
    home.add(id="q", max_retries=0)
    for id in "pq":
        home.add(id=f"after-{id}", after=[id], tag="t", priority=9)
    home.add(id="keyed", key="k", tag="t", priority=9)
    home.add(id="fine", tag="t", priority=9)
    worker = home.worker_row()
    for _ in range(6):
        home.store.jobs.finish(home.claim(worker), exited(0), q.Settings(), 1)
    home.add(id="other", key="k")
    home.run("rerun", "p", "q")
    for _ in "pq":
        home.store.jobs.finish(home.claim(worker), exited(1), q.Settings(), 2)
    home.run("dlq", "purge", "q")
    assert "'k' has not ended" in home.fails("rerun", "keyed")
    assert "waited for p, which is dead" in home.fails("rerun", "after-p", "fine")
    assert "--clear after" in home.fails("rerun", "after-q")
    before = [home.job(id) for id in ("after-p", "after-q", "keyed")]
    same(home.out("rerun", "--tag", "t", "--timeout", "7", "--env", "A=b"), "fine pending again\n")
    same([home.job(id) for id in ("after-p", "after-q", "keyed")], before)
    home.run("rerun", "after-q", "--clear", "after")
    home.run("rerun", "keyed", "--key", "l")
    same((home.state("after-q"), home.job("after-q").blockers, home.state("keyed")), ("pending", 0, "pending"))
    counters_equal_rows(home)


def test_rerun_changes_all_or_nothing(home: Home) -> None:
    """Jobs of a call come back and change all together; where one cannot, none does."""
    home.add_all({"command": "x", "id": id} for id in "ab")
    worker = home.worker_row()
    for _ in "ab":
        home.store.jobs.finish(home.claim(worker), exited(0), q.Settings(), 1)
    before = home.dump()
    home.fails("rerun", "a", "b", "--after", "b", code=2)
    same(home.dump(), before)


def test_selection_of_nothing_is_never_all(home: Home) -> None:
    """What changes jobs wants to be told which; a state that does not fit chooses none of them."""
    home.add(id="a")
    changes, reruns = home.store.changes, home.store.reruns
    calls: list[Callable[[q.Selection], Any]] = [
        lambda which: changes.cancel(which, 1), lambda which: changes.set_hold(which, True, 1),
        lambda which: changes.edit(which, {"priority": 9}, 1), lambda which: reruns.retry_dead(which, 1),
        lambda which: reruns.rerun(which, 1), changes.purge_dead,
    ]  # fmt: skip
    before = home.job("a")
    for call in calls:
        for which in (q.NOTHING, q.Selection(["a"], tag="t"), q.Selection(["a"], states=[q.State.PENDING])):
            with refuses(q.BadInput, "--tag"):
                call(which)
        same(list(call(q.Selection(states=[]))), [])
    for call, states in ((calls[0], q.ENDED), (calls[3], q.WAITING), (calls[4], q.OPEN), (calls[5], q.OPEN)):
        same(list(call(q.Selection(states=states))), [])
    same(home.job("a"), before)


def test_edit_clears_what_was_said(home: Home) -> None:
    """`--clear` makes a field what it is where nothing is said, of every field that has such a value."""
    home.add(id="p", hold=True)
    fields: dict[str, Any] = {"priority": 3, "max_retries": 1, "timeout": 5.0, "backoff_base": 3.0, "queue": "q"}
    fields |= {"tag": "t", "key": "k", "env": {"A": "b"}, "after": ["p"], "hold": True, "on_lost": "dead"}
    fields |= {"ok_codes": [3], "no_retry_codes": [4], "snooze": True, "run_at": 4_000_000_000}
    same(sorted(fields), sorted(q.CLEARABLE))
    home.add(id="a", **fields)
    home.add(id="b")
    for name in q.CLEARABLE:
        home.run("edit", "a", "--clear", name if name == "run_at" else name.replace("_", "-"))
        same(getattr(home.job("a"), name), getattr(home.job("b"), name))
    same((home.job("a").blockers, home.job("a").due_at), (0, None))
    home.fails("edit", "a", "--clear", "tag", "--tag", "u", code=2)
    home.fails("edit", "a", "--clear", "command", code=2)
    home.fails("edit", "a", "--command", "x", "--", "y", code=2)


def test_edit_cannot_take_a_key_that_another_bears(home: Home) -> None:
    """A key stays with one job at a time also when jobs are edited, whichever way several are."""
    home.add(id="a", key="k")
    home.add_all([{"command": "x", "id": "b"}, {"command": "x", "id": "c"}])
    assert "'k'" in home.fails("edit", "b", "--key", "k")
    assert "'new'" in home.fails("edit", "b", "c", "--key", "new")


def test_edit_after_of_a_long_chain_refuses_every_cycle(home: Home) -> None:
    """A job cannot be made to wait for one that waits for it, however far away."""
    home.add(id="n0")
    for n in range(1, 50):
        home.add(id=f"n{n}", after=[f"n{n - 1}"])
    with refuses(q.BadInput, "n0", "waits for it"):
        home.store.changes.edit(q.Selection(["n0"]), q.check_fields({"after": ["n49"]}, 0), 1)
    same(home.job("n0").blockers, 0)


def test_enqueue_of_a_chain_lands_in_any_order_and_names_a_circle(home: Home) -> None:
    """Children may stand before their parents; jobs that wait for each other are refused with the line of one."""
    chain: list[dict[str, Any]] = [{"command": "x", "id": f"n{n}", "after": [f"n{n + 1}"]} for n in range(300)]
    home.add_all([*chain, {"command": "x", "id": "n300"}])
    same([home.job(id).blockers for id in ("n0", "n299", "n300")], [1, 1, 0])
    lines = [f'{{"command": "x", "id": "m{n}", "after": ["m{(n + 1) % 5 if n < 5 else n - 1}"]}}' for n in range(9)]
    refused = home.fails("enqueue", "-", code=2, stdin="\n".join(lines))
    assert any(f"line {n + 1}: job m{n} cannot wait for m{(n + 1) % 5}," in refused for n in range(5)), refused
    same(len(home.store.queries.jobs()), 301)
    counters_equal_rows(home)


def test_link_in_circle_is_on_one() -> None:
    """Of links in the order of parents one on a circle is found, also where others hang on it, or none."""
    same(q.link_in_circle([(1, 2), (1, 3), (2, 3), (7, 1)]), None)
    same(q.link_in_circle([]), None)
    same(q.link_in_circle([(4, 4)]), (4, 4))
    parent, child = q.link_in_circle([(1, 2), (2, 3), (3, 2), (3, 4), (4, 5)]) or (0, 0)
    same({parent, child}, {2, 3})


def test_changes_of_many_go_page_by_page(home: Home) -> None:
    """What a selection means is settled first; then each page is changed at once, the rest as it is asked for."""
    many = q.PAGE_JOBS + 10
    home.add_all({"command": "x", "id": f"n{n}", "tag": "t", **({"after": [f"n{n - 1}"]} if n else {})}
                 for n in range(many))  # fmt: skip
    tagged = q.Selection(tag="t")
    done = home.store.changes.set_hold(tagged, True, 1)
    same(home.sql("SELECT count(*) FROM jobs WHERE hold"), [(q.PAGE_JOBS,)])
    home.add(id="late", tag="t")
    same((len(list(done)), home.job("late").hold), (many, False))
    done_jobs = home.store.changes.cancel(tagged, 2)
    same(home.job(f"n{many - 1}").state, q.State.PENDING)
    home.store.jobs.fail_all_dependents()  # as a worker would between two pages
    same(home.job(f"n{many - 1}").state, q.State.DEAD)
    same(len(list(done_jobs)), many + 1)
    same(home.store.queries.counts()[q.State.CANCELLED], many + 1)
    same(len(list(home.store.reruns.rerun(tagged, 3))), many + 1)
    same(home.store.queries.counts()[q.State.PENDING], many + 1)
    counters_equal_rows(home)


def test_changes_that_are_broken_off_say_how_many_are_done() -> None:
    """What was done before an error, or before Ctrl-C, is handed on and counted."""

    def done(error: BaseException) -> Iterator[str]:
        yield from "abc"
        raise error

    for error in (q.StoreBusy("held"), q.QueueError("no")):
        seen: list[str] = []
        with refuses(q.QueueError, "broken off after 3 jobs held"):
            for batch in q.batches(q.until_broken_off(done(error), "held", print), 2):
                seen += batch
        same(seen, [*"abc"])
    said: list[str] = []
    with contextlib.suppress(KeyboardInterrupt):
        list(q.until_broken_off(done(KeyboardInterrupt()), "held", said.append))
    same(said, ["3 jobs held before it was interrupted"])


def test_dependents_of_a_dead_job_fail_in_short_steps(home: Home) -> None:
    """However many wait for a job that dies, one step fails a few; none can start, and a worker does the rest."""
    many = 2 * q.CASCADE_JOBS
    home.add(id="root", max_retries=0)
    home.add_all({"command": "x", "id": f"n{n}", "after": ["root"]} for n in range(many))
    home.add(id="below", after=["n0"])
    worker = home.worker_row()
    home.store.jobs.finish(home.claim(worker), exited(1), q.Settings(), 1)
    same(home.store.queries.counts()[q.State.DEAD], q.CASCADE_JOBS + 1)
    same((home.store.jobs.claim(worker, None, 2), home.store.upkeep.miscounts()), (None, []))
    home.sql("DELETE FROM workers")
    home.start()
    until(lambda: home.store.queries.counts()[q.State.DEAD] == many + 2)
    assert "waited for root, which is dead" in str(home.job("below").error)
    list(home.store.reruns.retry_dead(q.Selection(["root"]), 3))
    same(home.store.queries.counts()[q.State.DEAD], 0)


def test_claim_of_very_many_that_are_due_takes_the_best(home: Home) -> None:
    """Where more came due at once than are made ready at once: by priority, then by the moment, and all in the end."""
    many = q.MOST_PROMOTED + 50
    home.add_all({"command": "x", "id": f"n{n}", "queue": "ab"[n % 2], "run_at": 2000 - n // 2} for n in range(many))
    home.add(id="first", priority=5, run_at=2000)
    home.add(id="later", priority=9, run_at=4_000_000_000)
    worker = home.worker_row()
    home.sql("UPDATE jobs SET due_at = run_at WHERE id <> 'later'")
    now = 3_000_000
    got = [home.claim(worker, now).id for _ in range(3)]
    same(got[0], "first")
    assert all(int(id[1:]) >= many - 2 * 3 * q.FLOOD_PROMOTED for id in got[1:]), got  # those that came due first
    same(len({home.claim(worker, now).id for _ in range(many - 2)}), many - 2)
    same(home.store.jobs.claim(worker, None, now), None)


def test_key_is_found_by_its_index(home: Home) -> None:
    """Looking for the job that bears a key reads no other job."""
    home.add(id="a", key="k")
    plan = home.sql(f"EXPLAIN QUERY PLAN SELECT id FROM jobs WHERE key = 'k' AND {q.IS_OPEN}")
    assert "jobs_key" in str(plan), plan


def test_backoffs_count_from_now_where_the_clock_was_set_back(home: Home) -> None:
    """Where the clock is set back, a retry waits its backoff from then on and not the hours between."""
    home.add(id="a")
    home.store.jobs.finish(home.claim(home.worker_row(), 10_000_000), exited(1), q.Settings(), 10_000_000)
    home.store.jobs.restart_backoffs(1_000_000)
    same(home.job("a").due_at, 1_002_000)


def test_prune_removes_only_what_has_ended_long_enough(home: Home) -> None:
    """`prune` goes by the end of a job and its state, in batches, and never touches what has not ended."""
    home.add_all({"command": "x", "id": f"n{n}", "max_retries": 0} for n in range(6))
    worker = home.worker_row()
    for n in range(5):
        home.store.jobs.finish(home.claim(worker), exited(n % 2), q.Settings(), 1000 * n)
    before = home.dump()
    same(list(home.store.changes.prune(q.ENDED, 3000, dry_run=True, batch=2)), [["n0", "n2"], ["n1"]])
    same(home.dump(), before)
    same(list(home.store.changes.prune([q.State.DEAD], 3000, dry_run=False)), [["n1"]])
    same(list(home.store.changes.prune(q.ENDED, 10**15, dry_run=False, batch=2)), [["n0", "n2"], ["n4"], ["n3"]])
    same([job.id for job in home.store.queries.jobs()], ["n5"])
    counters_equal_rows(home)


def test_oldest_waiting_is_found_whatever_its_priority(home: Home) -> None:
    """Of each queue the first job that waits for nothing but a worker; what is due counts, what is held does not."""
    ages = {"a1": 10, "a2": 50, "a3": 40, "b1": 99, "b2": 7, "c1": 30}
    now = q.now_ms()
    home.add_all({"command": "x", "id": id, "queue": id[0], "priority": -int(id[1]), "hold": id == "b1"} for id in ages)
    for id, age_s in ages.items():
        home.sql(f"UPDATE jobs SET created_at = {now - age_s * 1000} WHERE id = '{id}'")
    home.sql(f"UPDATE jobs SET due_at = {now - 5000}, run_at = {now - 5000} WHERE id = 'c1'")
    same({queue: now - since for queue, since in home.store.statistics.oldest_waiting(now).items()},
         {"a": 50_000, "b": 7000, "c": 5000})  # fmt: skip


def test_could_run_is_what_a_draining_worker_stays_for(home: Home) -> None:
    """Running, ready, failed and delayed jobs could run; held, blocked, paused and foreign ones could not."""
    home.add(id="held", hold=True)
    home.add(id="behind", after=["held"])
    home.add(id="paused", queue="slow")
    home.store.queues.set_paused(["slow"], True)
    same(home.store.queues.could_run(None), False)
    home.add(id="later", delay=3600, queue="q")
    same([home.store.queues.could_run(queues) for queues in (None, ["q"], ["other"])], [True, True, False])


def test_dlq_retry_of_the_root_brings_back_what_was_enqueued_after_its_dead_children(home: Home) -> None:
    """a died, b after a with it, c was enqueued after b: a retried brings back both, and is what the errors name."""
    home.add_all([{"id": "a", "command": "x", "max_retries": 0}, {"id": "b", "command": "x", "after": ["a"]}])
    worker = home.worker_row()
    home.store.jobs.finish(home.claim(worker), exited(1), q.Settings(max_retries=0), 1)
    home.add(id="c", after=["b"])
    same([home.state(id) for id in "abc"], ["dead"] * 3)
    reason = q.reason_of(home.home, home.store, home.job("c"))
    same(reason.remedy, "queuectl dlq retry a")
    assert "first: queuectl dlq retry a" in home.fails("dlq", "retry", "c")
    home.run("dlq", "retry", "a")
    same([home.state(id) for id in "abc"], ["pending"] * 3)


# -- counters and tallies


def test_tallies_never_go_down(home: Home) -> None:
    """What removed jobs have added to the sums of all attempts stays in them."""
    home.add_all({"command": "x", "id": f"n{n}", "max_retries": 0} for n in range(4))
    worker = home.worker_row()
    for n in range(4):
        now = q.now_ms()
        home.store.jobs.finish(home.claim(worker, now), exited(n % 2)._replace(cpu_s=0.5), q.Settings(), now + 700)
    before = home.store.statistics.tallies()
    same((before["run count"], round(before["run sum"], 3), before["run cpu"]), (4, 2.8, 2.0))
    home.store.changes.purge_dead(q.EVERY_JOB)
    list(home.store.changes.prune(q.ENDED, 10**15, dry_run=False))
    same(({k: round(v, 6) for k, v in home.store.statistics.tallies().items() if v}, home.store.queries.jobs()),
         ({k: round(v, 6) for k, v in before.items() if v}, []))  # fmt: skip


def test_tallies_stay_though_a_job_is_edited(home: Home) -> None:
    """A job that has run and then gets another queue or time takes nothing away from any counter."""
    home.add(id="a", queue="one", backoff_base=0.001)
    home.sql("UPDATE jobs SET created_at = created_at - 5000")
    home.store.jobs.finish(home.claim(home.worker_row()), exited(1), q.Settings(), q.now_ms())
    before = home.store.statistics.tallies()
    same((before["wait count one"], before["wait 1"], before["wait 10"], before["result failed"]), (1, 0, 1, 1))
    home.run("edit", "a", "--queue", "two")
    home.run("edit", "a", "--run-at", "2100-01-01")
    after = home.store.statistics.tallies()
    same({name: value for name, value in before.items() if after.get(name, 0) < value}, {})


def test_tallies_count_attempts_by_result_and_retries(home: Home) -> None:
    """Each attempt is counted once by how it ended; those after a failed one of the same job are retries."""
    home.add(id="a", ok_codes=[3], max_retries=9)
    worker = home.worker_row()
    ends = (exited(1), q.Outcome(q.EndReason.TIMED_OUT, error="x"), q.Outcome(q.EndReason.GIVEN_BACK, error="x"),
            q.Outcome(q.EndReason.LOST, error="x"), q.Outcome(q.EndReason.EXITED, 3))  # fmt: skip
    for outcome in ends:
        home.sql("UPDATE jobs SET due_at = NULL")
        home.store.jobs.finish(home.claim(worker), outcome, q.Settings(), q.now_ms())
    found = home.json("metrics")
    wanted = dict.fromkeys(q.RESULTS, 0) | dict.fromkeys(("failed", "timed_out", "given_back", "lost", "completed"), 1)
    same((found["attempts_by_result"], found["retries"], found["attempts"]), (wanted, 3, 5))


def test_counts_equal_rows_whatever_happens(home: Home) -> None:
    """After any mixture of changes the counters are what counting the rows gives."""
    dice = random.Random(7)
    worker = home.worker_row()
    codes = [0, 1, 1, 75]
    for n in range(300):
        job = home.store.jobs.claim(worker, None, n * 10_000) if dice.random() < 0.6 else None
        if job:
            home.store.jobs.finish(job, exited(dice.choice(codes)), q.Settings(), n * 10_000)
        else:
            parents = [dice.choice(home.store.queries.jobs()).id] if n > 5 and dice.random() < 0.3 else []
            home.add(queue=dice.choice("xy"), after=parents, max_retries=1, snooze=dice.random() < 0.2)
        if n % 50 == 49:
            home.store.reruns.retry_dead(q.EVERY_JOB, n)
            home.store.changes.purge_dead(q.EVERY_JOB)
    counters_equal_rows(home)


# -- backups


def test_backup_is_not_restored_while_another_program_holds_the_queue(home: Home) -> None:
    """A restore waits for others no longer than other commands do, and then says so."""
    home.add(id="a")
    home.run("backup", "copy.db")
    home.add(id="b")
    with contextlib.closing(sqlite3.connect(home.home.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with q.open_store(home.home.database, 0.05) as store, refuses(q.StoreBusy, "another program holds"):
            store.upkeep.restore(str(home.work / "copy.db"), str(home.work), q.now_ms(), lambda _: None)
    same([job.id for job in home.store.queries.jobs()], ["a", "b"])


def test_backup_keeps_numbers_though_its_restore_is_killed(home: Home) -> None:
    """A restore goes over in one step, so that no id comes twice, whenever it is killed."""
    first = home.add()
    home.run("backup", "copy.db")
    later = home.add()
    patch = """
real = q.Database.restore
def killed(self, *words):
    real(self, *words)
    os.kill(os.getpid(), 9)
q.Database.restore = killed
with q.open_store(home.database) as store:
    q.restore_copy(home, store, sys.argv[1])"""
    program = "import os, signal, sys\nhome = q.open_home()" + patch
    ran = finished(child(home, program, str(home.work / "copy.db")))
    assert ran.code, ran.err
    same([job["id"] for job in home.json("list")], [first])
    assert home.add() not in (first, later)


def test_backup_is_made_again_where_somebody_enqueues_meanwhile(home: Home) -> None:
    """Numbers that are given while a backup is got ready are not given again either."""
    home.add(id="a")
    home.run("backup", "copy.db")
    real, added = q.copy_backup, list[str]()

    def slow(path: str, to: str) -> None:
        real(path, to)
        if not added:
            added.append(home.add())

    q.copy_backup = slow
    try:
        with q.open_store(home.home.database) as store:
            store.upkeep.restore(str(home.work / "copy.db"), str(home.work), q.now_ms(), lambda _: None)
    finally:
        q.copy_backup = real
    same([job["id"] for job in home.json("list")], ["a"])
    assert home.add() not in added


def test_backup_holds_no_workers(home: Home) -> None:
    """What ran when a copy was made is lost to it by the rule for that, and nobody waits for its worker."""
    home.add_all([{"id": "a", "command": sleeping(600), "timeout": 0},
                  {"id": "b", "command": sleeping(600), "timeout": 0, "on_lost": "dead"}])  # fmt: skip
    home.start(2)
    home.until_up("a")
    home.until_up("b")
    home.run("backup", "copy.db")
    with contextlib.closing(sqlite3.connect(home.work / "copy.db")) as copy:
        same(copy.execute("SELECT count(*) FROM workers").fetchall(), [(0,)])
    home.run("worker", "stop", "--now")
    home.run("backup", "--restore", "copy.db")
    same((home.state("a"), home.state("b"), home.store.workers.all()), ("failed", "dead", []))
    same(home.json("doctor"), {"ok": True, "problems": []})


@posix
def test_backup_is_made_in_a_file_of_its_own(home: Home) -> None:
    """Neither a file nor a link that somebody has laid beside it is written to, and the copy is its owner's alone."""
    home.add(id="a")
    (home.work / "copy.db.part").symlink_to(home.root / "elsewhere")
    home.run("backup", "copy.db")
    same((home.root / "elsewhere").exists(), False)
    same(stat.S_IMODE((home.work / "copy.db").stat().st_mode), 0o600)
    same(sorted(os.listdir(home.work)), ["copy.db", "copy.db.part"])


def test_backup_is_not_restored_under_who_came_meanwhile(home: Home) -> None:
    """The last look for workers comes when none can register any more; who is found then keeps the queue."""
    home.add_all({"command": "x", "id": f"a{n}"} for n in range(500))
    home.run("backup", "copy.db")
    home.add(id="b")
    seen = []

    def refuse(rows: list[q.WorkerRow]) -> None:
        seen.append(rows)
        other = sqlite3.connect(home.home.database, 0, isolation_level=None)
        with contextlib.closing(other), refuses(sqlite3.OperationalError, "locked"):
            other.execute("BEGIN IMMEDIATE")
        raise q.QueueError("somebody works")

    with refuses(q.QueueError, "somebody works"):
        home.store.upkeep.restore(str(home.work / "copy.db"), str(home.work), q.now_ms(), refuse)
    same((seen, home.store.queries.how_many(), home.store.upkeep.damage()), ([[]], 501, []))
    home.add(id="c")
    home.run("backup", "--restore", "copy.db")
    same((home.store.queries.how_many(), home.store.upkeep.damage()), (500, []))


# -- damaged rows


BAD_ROWS = {  # what is set in a row behind queuectl's back, and the word by which its error names it
    "env = '{bad'": "Expecting", "env = '[1]'": "env", "env = '{\"A\": 1}'": "env", "after = '7'": "after",
    "command = '[]'": "command", "command = '[1]'": "command", "command = CAST(x'22ff22' AS TEXT)": "command",
    "cwd = CAST(x'2fff' AS TEXT)": "cwd", "command = '\"\\udcff\"'": "command",
    "timeout = 'long'": "timeout", "timeout = -1": "timeout", "created_at = 'then'": "created_at",
    "created_at = 9223372036854775807": "a moment", "max_retries = x'00'": "max_retries",
    "ok_codes = '{}'": "ok_codes", "tag = char(27) || '[2J'": "tag", "snooze = 0.5": "snooze",
    "due_at = 'soon'": "due_at",
    "id = '../' || id": "id", "id = id || char(10)": "id", "env = '" + "[" * 99_999 + "'": "row is damaged",
}  # fmt: skip


def test_row_that_is_damaged_costs_its_own_job_alone(home: Home) -> None:
    """A job whose row cannot be read is dead with its reason, seen by every command; workers run the others."""
    changes = {f"bad{n}": change for n, change in enumerate(BAD_ROWS)}
    home.add_all({"command": "exit 0", "id": id} for id in changes)
    home.add(id="child", after=["bad0"])
    for id, change in changes.items():
        home.sql(f"UPDATE jobs SET {change} WHERE id = '{id}'")
    home.add(id="good")
    listed = home.json("list")
    sound = [job for job in listed if "bad" in job["id"] and "its row is damaged" not in str(job["error"])]
    same([(job["id"], BAD_ROWS) for job in sound], [])
    [row] = home.start()
    home.ended("good")
    until(lambda: not home.store.queries.how_many(q.Selection(states=(q.State.PENDING, q.State.PROCESSING))))
    same([each.id for each in home.start()], [row.id, row.id + 1])
    dead = {job["id"]: job for job in home.json("dlq", "list")}
    same((len(dead), dead.pop("child")["error"]), (len(BAD_ROWS) + 1, "waited for bad0, which is dead"))
    for job, (change, word) in zip(dead.values(), BAD_ROWS.items(), strict=True):
        assert "its row is damaged" in job["error"], (change, job["error"])
        assert word in job["error"], (change, job["error"])
    found = "\n".join(home.json("doctor", code=1)["problems"])
    named = [id for id, change in changes.items() if not re.match("id =|due_at", change)]  # that is set anew
    same([id for id in named if f"job {id}: its row is damaged" not in found], [])
    for words in (["status"], ["list"], ["dlq", "list"], ["show", "bad0"], ["metrics"], ["metrics", "--prometheus"]):
        assert "\x1b" not in home.out(*words), words
    home.run("dlq", "purge", "--all")
    same(home.json("doctor"), {"ok": True, "problems": []})


def test_row_that_is_damaged_while_it_runs_or_was_never_a_jobs_is_no_traceback(home: Home) -> None:
    """Nor do damaged rows of attempts, workers, queues, counts and settings stop commands or workers."""
    home.add("exit 1", id="a", max_retries=0)
    home.start()
    home.ended("a")
    home.sql("UPDATE attempts SET started_at = 'x', cpu_s = 9e999, error = char(27), max_rss = 'much'")
    home.sql("INSERT INTO config VALUES ('kill_grace', '\"soon\"'), ('on_dead', '{'), ('max_retries', '1e9')")
    home.sql("INSERT INTO queues VALUES (char(27) || '[2J', 'x', 'many')")
    home.sql("INSERT INTO counts VALUES ('asleep', 'default', 3), ('pending', char(27), 'some')")
    home.sql("INSERT INTO workers (pid, host, slot, queues, started_at) VALUES ('x', char(27), 'y', '[1', 'z')")
    for words in (["status"], ["list"], ["show", "a"], ["worker", "list"], ["queue", "list"], ["config", "list"],
                  ["metrics"], ["export"], ["logs", "a"], ["dlq", "list"]):  # fmt: skip
        assert "\x1b" not in home.out(*words), words
    assert "config kill_grace is damaged" in "\n".join(home.json("doctor", code=1)["problems"])
    same(home.ended(home.add("exit 0")).state.value, "completed")


@alone
def test_fuzz_of_the_database_is_one_line_and_no_traceback(home: Home) -> None:
    """Whatever bytes of the database are changed, a command works or says one line."""
    home.add_all({"command": f"echo {n}", "id": f"j{n}", "tag": "t", "env": {"A": "b"}} for n in range(60))
    home.add_all({"command": "exit 0", "after": [f"j{n}"]} for n in range(20))
    home.start()
    home.run("wait")
    home.run("worker", "stop")
    home.add(id="p", hold=True)
    home.store.close()
    home.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    whole, ran = Path(home.home.database).read_bytes(), collections.Counter[str]()
    seed = int(os.environ.get("SEED") or random.randrange(10**6))
    print(f"        fuzz of the database with SEED={seed}", flush=True)
    chance = random.Random(seed)
    with ENV_LOCK:
        os.environ["QUEUECTL_HOME"] = str(home.path)
        try:
            for _ in range(300 if LONG else 40):
                damaged = bytearray(whole)
                for _ in range(chance.choice([1, 4, 40])):
                    at = chance.choice([chance.randrange(len(whole)), chance.randrange(4096)])
                    damaged[at] = chance.randrange(256)
                for words in (["status"], ["list", "--json"], ["list"], ["show", "j7"], ["logs", "j7"], ["dlq", "list"],
                              ["worker", "list"], ["queue", "list"], ["config", "list"], ["metrics"], ["export"],
                              ["metrics", "--prometheus"], ["doctor"], ["wait", "j7", "--timeout", "0"]):  # fmt: skip
                    for end in ("-wal", "-shm"):
                        Path(home.home.database + end).unlink(missing_ok=True)
                    Path(home.home.database).write_bytes(damaged)
                    code, out, err = in_process(*words)
                    note = (seed, words, code, err)
                    assert code in (0, 1, 124) and "Traceback" not in err and "unexpected" not in err, note
                    assert not err or re.fullmatch(r"[^\n]+\n", err), note
                    assert "\x1b" not in out + err, note
                    ran["said" if code == 1 else "shown"] += 1
        finally:
            del os.environ["QUEUECTL_HOME"]
    Path(home.home.database).write_bytes(whole)
    del home.store
    assert min(ran["said"], ran["shown"]) > 10, ran


# -- kill points


def killed_batch(home: Home, patch: str) -> None:
    """`enqueue -` of 100,000 lines, killed as the patch says."""
    (home.work / "batch").write_text('{"command": "true"}\n' * 100_000)
    with open(home.work / "batch") as lines:
        killed(child(home, patch + "\nq.cli(['enqueue', '-'])", stdin=lines))


@posix
def test_enqueue_killed_while_staging_stores_nothing(home: Home) -> None:
    """`enqueue -` killed while it reads 100,000 lines leaves none of them."""
    patch = """
check, seen = q.check_fields, []
q.check_fields = lambda fields, now: seen.append(1) or (die() if len(seen) == 50_000 else check(fields, now))"""
    killed_batch(home, patch)
    same(home.store.queries.jobs(), [])
    is_well(home)


@posix
def test_enqueue_killed_while_landing_stores_nothing(home: Home) -> None:
    """`enqueue -` killed with 100,000 jobs inserted and not committed leaves none of them, and the next one lands."""
    patch = """
change = q.Database.run
def change_and_die(store, sql, **values):
    found = change(store, sql, **values)
    if "INSERT INTO jobs" in sql:
        assert store.one("SELECT count(*) FROM jobs")[0] == 100_000
        die()
    return found
q.Database.run = change_and_die"""
    killed_batch(home, patch)
    same(home.store.queries.jobs(), [])
    is_well(home)
    home.run("enqueue", "--", "true")


@posix
def test_enqueue_killed_after_landing_has_stored_all(home: Home) -> None:
    """`enqueue -` killed after its commit and before the first id is printed has stored 100,000 jobs, whole."""
    killed_batch(home, "q.wake_one = die")
    same((home.store.queries.how_many(), home.store.upkeep.miscounts(), home.store.upkeep.damage()), (100_000, [], []))
    same(home.sql("SELECT count(*), count(DISTINCT id) FROM jobs WHERE state = 'pending'"), [(100_000, 100_000)])


@posix
def test_dlq_retry_killed_midway_retries_whole_pages(home: Home) -> None:
    """`dlq retry --all` killed in a page leaves the pages before it retried, and the next one brings all back."""
    bury_many(home, q.PAGE_JOBS + 100)
    patch = """
revive, seen = q.Reruns._reopen, []
q.Reruns._reopen = lambda *words: seen.append(1) or revive(*words) if not seen else (revive(*words), die())
q.cli(["dlq", "retry", "--all"])"""
    killed(child(home, patch))
    same(home.store.queries.counts()[q.State.DEAD], 100)
    is_well(home)
    home.run("dlq", "retry", "--all")
    same({(job.state, job.attempts) for job in home.store.queries.jobs()}, {(q.State.PENDING, 0)})


# ---- platform


def test_bell_is_heard_exactly_as_long_as_its_worker_lives(home: Home) -> None:
    """A worker is alive until its process ends, however it ends; a number nobody has is dead."""
    (row,) = home.start()
    same([q.has_living_process(home.home, row), q.is_alive(home.home, row.id + 1, None)], [True, False])
    home.kill_workers()
    same([q.has_living_process(home.home, row), q.ring(home.home, row.id)], [False, False])


def test_platform_never_signals_what_it_did_not_start(home: Home) -> None:
    """A dead worker's process id that has gone to another process is never used against it."""
    innocent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=home.env)
    try:
        home.add(id="a")
        home.claim(home.worker_row(innocent.pid))
        home.start()
        same((home.ended("a").state.value, home.job("a").attempts), ("completed", 2))
        home.run("worker", "stop", "--now")
        same(innocent.poll(), None)
    finally:
        innocent.communicate(b"\n")


@windows
@alone
def test_platform_starts_a_process_again_that_ended_before_it_began(home: Home) -> None:
    """The system's "internal error" at the start of a process costs no attempt; what stays wrong is said."""
    import ctypes

    real, left = q.subprocess.Popen, [ctypes.WinError(1359), ctypes.WinError(1359)]

    def popen(*words: Any, **options: Any) -> Any:
        if left:
            raise left.pop()
        return real(*words, **options)

    def start() -> q.Process:
        return q.Process(["cmd", "/c", "exit 3"], str(home.work), dict(os.environ), home.home.log("a"), "t@h")

    q.subprocess.Popen = popen
    try:
        process = start()
        same(until(process.poll).exit_code, 3)
        process.close()
        for error in (ctypes.WinError(1359), ctypes.WinError(2)):
            left.extend([error] * 3)
            with refuses(OSError):
                start()
        same(len(left), 2)  # any other error is final at once
    finally:
        q.subprocess.Popen = real


@posix
def test_worker_waits_for_its_turn_and_not_for_ever(home: Home) -> None:
    """Workers let each other write first; one that never comes to its turn works all the same."""
    import fcntl

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    home.start(2)  # with that, as anybody may start them
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    fd = os.open(home.home.bells, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        for id in home.add_all([{"command": "true"}] * 4):
            same(home.ended(id).state, q.State.COMPLETED)
    finally:
        os.close(fd)
    program = """
import fcntl, signal, time
q.become_worker(lambda: None)
first, second = q.WriteGate(q.open_home()), q.WriteGate(q.open_home())
def is_free(gate):
    try:
        fcntl.flock(gate._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(gate._fd, fcntl.LOCK_UN)
    return True
with first:
    print(is_free(second))
    start = time.monotonic()
    with second:
        print(time.monotonic() - start >= q.WRITE_GATE_S)
    print(is_free(second))
print(is_free(second), signal.getitimer(signal.ITIMER_REAL)[0])"""
    same(finished(child(home, program)).out.split(), ["False", "True", "False", "True", "0.0"])


@posix
def test_worker_row_with_the_id_of_a_stranger_harms_nobody(home: Home) -> None:
    """A process id in the table of workers is never signalled, whoever has it now."""
    with Child(["sleep", "600"]) as innocent:
        id = home.add()
        home.claim(home.worker_row(innocent.pid))
        home.start()
        same(home.ended(id).attempts, 2)
        home.run("worker", "stop", "--now")
        same(innocent.poll(), None)
        innocent.kill()


@posix
def test_platform_signals_no_process_of_another_start() -> None:
    """A process is known by its id and its start together: the id alone reaches nobody."""
    with Child(["sleep", "600"]) as process:
        _, _, _, started, _ = q._stat(process.pid)
        for stranger in (started - 1, 0):
            q._send((process.pid, stranger), signal.SIGKILL)
        q._send((process.pid, started), signal.SIGSTOP)
        until(lambda: q._stat(process.pid)[0] == "T")  # later than what the strangers would have got
        q._send((process.pid, started), signal.SIGKILL)
        same(process.wait(DEADLINE_S), -signal.SIGKILL)
        q._send((process.pid, started), signal.SIGKILL)  # one that is gone is no error


# -- what cannot be seen, signalled or caught


ANOTHER_USER = 12345
POWERLESS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"]  # root as an ordinary user: no capabilities


def linux_root(*programs: str) -> None:
    """Skip where a test cannot have what it needs."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise Skip("needs Linux, and root")
    for program in programs:
        if not shutil.which(program):
            raise Skip(f"needs {program}")


def foreign(home: Home, program: str, name: str, mode: int) -> str:
    """A copy of a program that belongs to another user; the path by which a job calls it."""
    path = shutil.copy(shutil.which(program) or "", home.work / name)
    os.chown(path, ANOTHER_USER, -1)
    os.chmod(path, mode)
    if os.statvfs(path).f_flag & os.ST_NOSUID:
        raise Skip("needs a directory in which set-uid counts")
    return f"./{name}"


def named(name: str) -> list[int]:
    """The processes that run a program of that name."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "comm").read_text().strip() == name and is_running(int(entry.name)):
                found.append(int(entry.name))
    return found


def kill_named(name: str) -> None:
    """End what runs a program of that name; never by an id from before, which may have gone to a thread of ours."""
    for pid in named(name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def has_lines(home: Home, file: str, count: int) -> bool:
    """Has a file that many lines by now?"""
    return len(home.lines(file)) == count


def start_powerless(home: Home, count: int) -> list[q.WorkerRow]:
    """Workers of an ordinary user."""
    words = [*POWERLESS, *PROGRAM, "worker", "start", "--count", str(count)]
    subprocess.run(words, env=home.env, check=True, stdout=subprocess.DEVNULL)
    return living(home)


def holder(home: Home, id: str) -> q.WorkerRow:
    """The worker that has a job, once it has begun."""
    until(lambda: home.json("show", id)["pid"], f"{id} runs")
    return next(row for row in home.store.workers.all() if row.id == home.job(id).worker)


def is_named_everywhere(home: Home, id: str, pid: int) -> None:
    """Whoever looks hears which process stands in the way of a job, and what to do."""
    until(lambda: any(row.leftovers for row in home.store.workers.all()))
    for said in (home.out("status"), home.out("show", id), home.run("doctor", code=1).out):
        assert f"{pid} (" in said and f"sudo kill -9 {pid}" in said, said
    assert f"sudo kill -9 {pid}" in Path(home.home.worker_log).read_text()


@posix
def test_platform_ends_what_it_cannot_look_at(home: Home) -> None:
    """A set-uid and an unreadable program of a dead worker's job are ended before the job starts again."""
    linux_root("setpriv")
    start_powerless(home, 4)
    for name, mode in (("qtsetuid", 0o4755), ("qtunreadable", 0o111)):
        path = foreign(home, "sleep", name, mode)
        id = home.add(f"echo $QUEUECTL_ATTEMPT >> {name}.account; exec env -i {path} 97 >/dev/null 2>&1", timeout=0)
        first = until(functools.partial(named, name), name)[0]
        os.kill(holder(home, id).pid, signal.SIGKILL)
        until(functools.partial(has_lines, home, f"{name}.account", 2), name)
        until(functools.partial(named, name), name)
        assert first not in named(name) and len(named(name)) == 1
    home.run("worker", "stop", "--now")


@posix
def test_platform_names_what_it_cannot_end(home: Home) -> None:
    """A time-out that the system refuses is no end: no retry, everybody is told whom to end, and then it is over."""
    linux_root("setpriv")
    path, sleep = foreign(home, "setpriv", "qtother", 0o4755), foreign(home, "sleep", "qtdeaf", 0o755)
    start_powerless(home, 2)
    line = f"{path} --reuid {ANOTHER_USER} {sleep} 98; true"
    id = home.add(f"echo $QUEUECTL_ATTEMPT >> account; {line}", timeout=0.5, max_retries=3)
    pid = until(lambda: named("qtdeaf"))[0]
    try:
        is_named_everywhere(home, id, pid)
        with home.popen("cancel", id) as cancel, home.popen("worker", "stop", "--now", "--timeout", "3") as stop:
            says(cancel, str(pid))
            says(stop, str(pid))
            same(finished(stop).code, 1)
            same((home.state(id), home.lines("account"), cancel.poll()), ("processing", ["1"], None))
            os.kill(pid, signal.SIGKILL)
            same(finished(cancel).code, 0)
        same((home.state(id), home.lines("account")), ("cancelled", ["1"]))
    finally:
        kill_named("qtdeaf")


UNMARKED = "env -i prlimit --locks=unlimited"  # neither run tag nor run number


@posix
def test_platform_finds_a_command_by_what_is_on_record(home: Home) -> None:
    """A dead worker's command that gave up environment, limit and log is known by its id and its start."""
    linux_root("prlimit")
    with Sleepers(home) as sleepers:
        id = home.add(f"exec {UNMARKED} {sleepers.line} >/dev/null 2>&1", timeout=0, on_lost="dead")
        home.start(2)
        until(sleepers.pids)
        os.kill(holder(home, id).pid, signal.SIGKILL)
        same((home.ended(id).state, sleepers.pids()), (q.State.DEAD, []))


@posix
def test_platform_knows_a_log_whatever_its_path(home: Home) -> None:
    """What a dead worker's job left is found by its log, though the folder of the logs is a link to another."""
    linux_root("prlimit", "setsid")
    with Sleepers(home) as sleepers:
        os.rename(home.home.logs, home.root / "elsewhere")
        os.symlink(home.root / "elsewhere", home.home.logs)
        id = home.add(f"({UNMARKED} setsid {sleepers.line} &); echo up; sleep 95", timeout=0, on_lost="dead")
        home.start(2)
        until(lambda: sleepers.pids() and home.log(id) == b"up\n")
        os.kill(holder(home, id).pid, signal.SIGKILL)
        same((home.ended(id).state, sleepers.pids()), (q.State.DEAD, []))


@posix
def test_platform_knows_a_home_whatever_its_path(home: Home) -> None:
    """A worker that reaches the home by another path ends what a dead one left before the job starts again."""
    linux_root("mount", "umount")
    other = home.root / "other"
    other.mkdir()
    home.home  # noqa: B018 (it is made)
    if subprocess.run(["mount", "--bind", str(home.path), str(other)], stderr=subprocess.DEVNULL).returncode:
        raise Skip("needs bind mounts")
    try:
        with Sleepers(home) as sleepers:
            id = home.add(f"setsid {sleepers.line} >/dev/null 2>&1 & wait", timeout=0, on_lost="dead")
            home.start()
            until(sleepers.pids)
            home.run("worker", "start", env={"QUEUECTL_HOME": str(other)})
            os.kill(holder(home, id).pid, signal.SIGKILL)
            same((home.ended(id).state, sleepers.pids()), (q.State.DEAD, []))
            home.run("worker", "stop")
    finally:
        subprocess.run(["umount", "-l", str(other)], check=True)


def test_platform_sees_only_what_is_in_its_namespace() -> None:
    """What another worker started is in sight in the same PID namespace, and gone with the machine."""
    own = q.own_process()
    same([q.can_see(process) for process in (own, None)], [True, True])
    if WINDOWS or sys.platform != "linux":
        return
    boot, namespace, pid, start = own.split(":")
    same(q.can_see(f"another:1:{pid}:{start}"), True)
    if namespace != q._INITIAL_NAMESPACE:
        same([q.can_see(f"{boot}:1:{pid}:{start}"), q.can_see(f"{boot}:1:1:{start}")], [False, True])
    same([q._is_process_alive(own), q._is_process_alive(f"{boot}:{namespace}:{pid}:1")], [True, False])
    same(q._is_process_alive(f"another:{namespace}:{pid}:{start}"), False)
    same([(q._is_process_alive(damaged), q.can_see(damaged)) for damaged in ("", "x", "a:b:c:d")], [(False, True)] * 3)


HOPPER = """#include <unistd.h>
int main(int n, char **words) { for (;;) { if (fork()) _exit(0); if (n > 1) setsid(); usleep(50); } }
"""


@posix
@alone
def test_platform_catches_what_forks_and_exits_for_ever(home: Home) -> None:
    """What lives on in ever new processes and sessions is ended, at a time-out and after its worker's death."""
    linux_root("gcc")
    (home.work / "hopper.c").write_text(HOPPER)
    subprocess.run(["gcc", "-o", "qthopper", "hopper.c"], cwd=home.work, check=True)
    home.run("config", "set", "kill_grace", "0")
    try:
        home.start(3)
        for words in ("", " session"):
            id = home.add(f"env -i ./qthopper{words}; {waits_for('never')}", timeout=0.5, max_retries=0)
            same((home.ended(id).state, named("qthopper")), (q.State.DEAD, []))
            id = home.add(f"env -i ./qthopper{words} & touch up; {waits_for('never')}", timeout=0, on_lost="dead")
            until((home.work / "up").exists)
            (home.work / "up").unlink()
            os.kill(holder(home, id).pid, signal.SIGKILL)
            same((home.ended(id).state, named("qthopper")), (q.State.DEAD, []))
    finally:
        until(lambda: subprocess.run(["pkill", "-9", "-x", "qthopper"]).returncode)


@posix
def test_platform_spares_what_a_leftover_starts(home: Home) -> None:
    """A time-out ends its own attempt alone, not what an earlier job's background process has started meanwhile."""
    with Sleepers(home) as sleepers:
        maker = f"env -i sh -c '{waits_for('now')}; ({sleepers.line} >/dev/null 2>&1 &); {waits_for('go')}'"
        home.add(f"{maker} >/dev/null 2>&1 & true", id="first")
        home.start()
        home.ended("first")
        id = home.add(f"touch now; {waits_for('never')}", timeout=1, max_retries=0)
        same(home.ended(id).state, q.State.DEAD)
        same(len(until(sleepers.pids)), 1)
        touch(home, "go")


@posix
def test_life_is_held_by_nobody_but_its_worker(home: Home) -> None:
    """A worker is dead though others, jobs too, hold all of its files open."""
    job = "exec 3<>$QUEUECTL_HOME/bells/1 4<>$QUEUECTL_HOME/bells/1.life; "
    id = home.add(
        f"echo $QUEUECTL_ATTEMPT >> account; {job}[ $QUEUECTL_ATTEMPT = 2 ] || {waits_for('never')}", timeout=0
    )
    (row,) = home.start()
    with open(home.home.life(row.id), "r+b"), open(home.home.bell(row.id), "r+b", buffering=0):
        until(lambda: home.lines("account") == ["1"])
        os.kill(row.pid, signal.SIGKILL)
        until(lambda: not living(home))
        home.start()
        same((home.ended(id).state, home.lines("account")), (q.State.COMPLETED, ["1", "2"]))


# ---- home


@posix
def test_home_is_made_for_its_owner_alone(home: Home) -> None:
    """Directories of a home are 0700 and its files 0600, whatever the umask."""
    for mask in ("000", "077"):
        root = home.root / mask
        script = f'umask {mask}; "$@" enqueue -- "echo hi" >/dev/null && exec "$@" worker start'
        env = home.env | {"QUEUECTL_HOME": str(root)}
        own = Home()
        own.path, own.env = root, env
        try:
            subprocess.run(["sh", "-c", script, "sh", *PROGRAM], env=env, check=True, stdout=subprocess.DEVNULL)
            until(functools.partial(completed, own, 1))
            found = {str(path.relative_to(root)): stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*")}
            found["."] = stat.S_IMODE(root.stat().st_mode)
            wrong = {name: oct(mode) for name, mode in found.items()
                     if mode != (0o700 if (root / name).is_dir() else 0o600)}  # fmt: skip
            same((wrong, "job_logs/j0000001.log" in found, "worker.log" in found), ({}, True, True))
        finally:
            own.close()


@posix
def test_home_leaves_the_umask_of_jobs_alone(home: Home) -> None:
    """What a job writes has the modes that its user's umask gives."""
    (home.work / "x").mkdir()
    subprocess.run(["sh", "-c", 'umask 027; exec "$@" worker start', "sh", *PROGRAM], env=home.env, check=True,
                   cwd=home.work, stdout=subprocess.DEVNULL)  # fmt: skip
    home.ended(home.add("echo x > made"))
    same(oct((home.work / "made").stat().st_mode & 0o777), "0o640")


@posix
def test_home_that_others_can_write_to_is_refused(home: Home) -> None:
    """A home that is open to the group or to all is refused with the command that closes it."""
    home.path.mkdir()
    for mode in (0o770, 0o707, 0o722):
        home.path.chmod(mode)
        ran = home.run("enqueue", "--", "exit 0", code=1)
        assert re.fullmatch(r"Error: .*chmod go-w.*\n", ran.err), ran.err
        same(list(home.path.iterdir()), [])


def test_home_that_cannot_be_is_said_in_one_line(home: Home) -> None:
    """Where a home cannot be made, the error names the directory and the variable."""
    home.path.write_text("a file")
    ran = home.run("enqueue", "--", "exit 0", code=1)
    assert re.fullmatch(r"Error: .*QUEUECTL_HOME.*\n", ran.err), ran.err


def test_home_is_dot_queuectl_by_default(home: Home) -> None:
    """Without QUEUECTL_HOME the home is `.queuectl` in the user's directory."""
    env = home.env | {"HOME": str(home.root), "USERPROFILE": str(home.root)}
    del env["QUEUECTL_HOME"]
    subprocess.run([*PROGRAM, "enqueue", "--", "exit 0"], env=env, check=True, stdout=subprocess.DEVNULL)
    assert (home.root / ".queuectl" / "queue.db").exists()


def test_homes_never_see_each_other(home: Home) -> None:
    """Jobs, configuration and workers of one home do not exist for another."""
    other = {"QUEUECTL_HOME": str(home.root / "other")}
    home.add(id="a")
    home.store.config.set("max_retries", 9)
    home.start()
    home.ended("a")
    same([home.json("list", env=other), home.json("worker", "list", env=other)], [[], []])
    same(home.out("config", "get", "max_retries", env=other), "3\n")
    home.out("worker", "stop", "--now", env=other)
    same(len(q.living_workers(home.home, home.store)), 1)


@posix
def test_home_that_is_everybodys_directory_is_not_to_be_closed(home: Home) -> None:
    """Where others work in a directory, the error advises one of one's own, and not to close it to them."""
    home.path.mkdir()
    for mode, names in ((0o1777, []), (0o777, ["theirs"])):
        for name in names:
            (home.path / name).touch()
        home.path.chmod(mode)
        ran = home.run("list", code=1)
        assert "chmod" not in ran.err and "QUEUECTL_HOME to a directory of your own" in ran.err, ran.err
    (home.path / "queue.db").touch()
    home.path.chmod(0o777)
    mend = home.run("list", code=1).err.partition("run: ")[2]
    subprocess.run(mend, shell=True, check=True)
    same(home.out("list"), "no jobs\n")


def test_home_is_expanded_or_refused(home: Home) -> None:
    """`~` in QUEUECTL_HOME is the home directory; where none is known, one line says so and nothing is made."""
    env = {"HOME": str(home.root), "USERPROFILE": str(home.root), "QUEUECTL_HOME": "~/home"}
    home.add(id="a")
    same([job["id"] for job in home.json("list", env=env)], ["a"])
    for given in () if WINDOWS else ("~no-such-user/q", "~/q", ""):  # Windows always knows a home
        env = {"HOME": "", "QUEUECTL_HOME": given}
        ran = home.run("list", env=env, code=2)
        assert re.fullmatch(r"Error: no home directory is known .* QUEUECTL_HOME .*\n", ran.err), ran.err
    same(list(home.work.iterdir()), [])


@posix
def test_home_that_cannot_be_written_to_is_said_in_one_line(home: Home) -> None:
    """A home without the right to write: one line for a command; a job's log that cannot be kept is said with it."""
    if sys.platform != "linux" and os.geteuid() == 0:
        raise Skip("no mode binds root here")
    bound: dict[str, Any] = {"preexec_fn": bound_by_modes}
    home.run("enqueue", "--id", "a", "--", "true", **bound)
    home.path.chmod(0o500)
    one_line(home.run("enqueue", "--", "true", code=1, **bound))
    home.path.chmod(0o700)
    with child(home, SERVE, **bound) as worker:
        same(home.ended("a").state, q.State.COMPLETED)
        (home.path / "job_logs").chmod(0o500)
        job = home.ended(home.add("echo lost; exit 3", max_retries=0))
        same((job.state, job.error), (q.State.DEAD, "exit code 3; its output is lost: Permission denied"))
        job = home.ended(home.add(max_retries=0))
        assert job.state is q.State.DEAD and "cannot open its log" in (job.error or ""), job
        (home.path / "job_logs").chmod(0o700)
        same((home.ended(home.add()).state, worker.poll()), (q.State.COMPLETED, None))
        worker.kill()


# ---- attempts


def test_command_that_ends_with_an_ok_code_has_no_error(home: Home) -> None:
    """A job that an exit code of `ok_codes` completes is as good as any: nothing was wrong with it."""
    home.add("exit 3", id="a", ok_codes=[3])
    home.start()
    job = home.ended("a")
    same((job.state.value, job.exit_code, job.error, home.history("a")[0].error), ("completed", 3, None, None))
    [job_id] = home.json("enqueue", "--ok-codes", "3,4", "--ok-codes", "5", "--", "exit 5")
    same(home.job(job_id["id"]).ok_codes, [3, 4, 5])


def test_command_sees_what_the_contract_names(home: Home) -> None:
    """A command finds its id, attempt, queue, home and slot in its environment, and its input empty."""
    home.add([sys.executable, home.script("tell.py", TELL)], id="a", queue="q", env={"OWN": "vä=l"})
    home.start()
    home.ended("a")
    _, where, env, given = json.loads(home.log("a"))
    found = {k: v for k, v in env.items() if k.startswith("QUEUECTL_") and k != q.RUN_TAG}
    same(found, {"QUEUECTL_JOB_ID": "a", "QUEUECTL_ATTEMPT": "1", "QUEUECTL_QUEUE": "q", "QUEUECTL_SLOT": "1",
                 "QUEUECTL_HOME": str(home.path)})  # fmt: skip
    same((env["OWN"], given, os.path.realpath(where)), ("vä=l", "", str(home.work)))


def test_command_finds_its_own_directory_in_pwd(home: Home) -> None:
    """PWD is the job's directory and not the worker's, OLDPWD is gone; what the job's `env` says goes before."""
    told = home.script("tell.py", TELL)
    home.add([sys.executable, told], id="a")
    home.add([sys.executable, told], id="b", env={"PWD": "mine", "OLDPWD": "old"})
    home.start(env={"PWD": "/elsewhere", "OLDPWD": "/before"}, cwd=home.root)
    seen = {}
    for id in "ab":
        home.ended(id)
        env = json.loads(home.log(id))[2]
        seen[id] = env.get("PWD"), env.get("OLDPWD")
    same(seen, {"a": (str(home.work), None), "b": ("mine", "old")})


# Prints the signals that are blocked, and those that do not have their default.
SIGNALS = """
import signal
usual = {signal.SIGINT: signal.default_int_handler, signal.SIGPIPE: signal.SIG_IGN, signal.SIGXFSZ: signal.SIG_IGN}
odd = [n.name for n in signal.Signals if signal.getsignal(n) is not usual.get(n, signal.SIG_DFL)]
print(odd, sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
"""


@posix
def test_command_has_every_signal_as_it_is_by_default(home: Home) -> None:
    """Signals that whoever started the worker ignores or blocks are neither ignored nor blocked in its jobs."""
    names = ("QUIT", "USR1", "USR2", "TSTP", "TTIN", "TTOU", "INT", "ALRM", "CHLD")
    home.script(
        "start.py",
        f"""
import os, signal, sys
for name in {names}:
    signal.signal(getattr(signal, "SIG" + name), signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTSTP])
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
""",
    )
    home.add([sys.executable, home.script("signals.py", SIGNALS)], id="a")
    ignoring = [sys.executable, "start.py", *PROGRAM[1:], "worker", "start"]
    same(subprocess.run(ignoring, cwd=home.work, env=home.env, stdout=subprocess.DEVNULL).returncode, 0)
    home.ended("a")
    same(home.log("a"), b"[] []\n")


def test_command_attempt_number_rises(home: Home) -> None:
    """QUEUECTL_ATTEMPT is the number of the attempt."""
    number = "%QUEUECTL_ATTEMPT%" if WINDOWS else "$QUEUECTL_ATTEMPT"
    home.add(f"echo no {number}&& exit 1", id="a", max_retries=1, backoff_base=0.01)
    home.start()
    home.ended("a")
    same(re.findall(rb"no (\d)", home.log("a")), [b"1", b"2"])


def test_command_as_a_list_has_no_shell_between(home: Home) -> None:
    """The list form hands on spaces, quotes and what shells would take, word for word."""
    words = ["a b", 'say "hi"', "it's", "$HOME %PATH% `x` && | > ;", "", "back\\slash\\", "tail\\ \\\\", "*", "ü"]
    home.run("enqueue", "--id", "a", "--", sys.executable, home.script("tell.py", TELL), *words)
    home.start()
    home.ended("a")
    same(json.loads(home.log("a"))[0], words)


@posix
def test_command_as_a_string_is_a_line_for_the_shell(home: Home) -> None:
    """The string form goes to /bin/sh, with pipes, quotes and variables."""
    home.add("X='a  b'; echo \"$X\" | tr ab xy; readlink /proc/$$/exe 2>/dev/null | grep -c . >&2; exit 0", id="a")
    home.start()
    same((home.ended("a").state.value, home.log("a").startswith(b"x  y\n")), ("completed", True))


@windows
def test_command_as_a_string_is_a_line_for_cmd(home: Home) -> None:
    """The string form goes to cmd.exe as it was typed: quotes, && and a quoted program with spaces."""
    (home.work / "a dir").mkdir()
    (home.work / "a dir" / "say it.bat").write_text("@echo [%1]\r\n")
    home.add('"a dir\\say it.bat" "x & y" && echo "two  spaces"', id="a")
    home.start()
    same((home.ended("a").error, home.log("a").split(b"\r\n")[:2]), (None, [b'["x & y"]', b'"two  spaces"']))


def test_cwd_is_where_enqueue_was_called(home: Home) -> None:
    """A job runs in its `cwd`, by default in the directory that `enqueue` was called in."""
    (home.work / "sub").mkdir()
    show = "cd" if WINDOWS else "pwd -P"
    home.run("enqueue", "--id", "a", "--", show)
    home.run("enqueue", json.dumps({"id": "b", "command": show, "cwd": "sub"}))
    home.start(cwd=home.root)
    home.ended("a"), home.ended("b")
    same([home.log(id).decode().strip() for id in "ab"], [str(home.work), str(home.work / "sub")])


def test_cwd_that_is_gone_fails_the_attempt(home: Home) -> None:
    """Where the directory is gone, or is none, the attempt fails with that reason, and the worker goes on."""
    (home.work / "file").touch()
    home.add(id="a", cwd=str(home.work / "gone"), max_retries=0)
    home.add(id="b", cwd=str(home.work / "file"), max_retries=0)
    home.add(id="c")
    home.start()
    same(home.ended("a").error, f"its directory {home.work / 'gone'} does not exist")
    same(home.ended("b").error, f"its directory {home.work / 'file'} is not a directory")
    same(home.ended("c").state.value, "completed")


def test_program_that_is_missing_fails_the_attempt(home: Home) -> None:
    """A program that is not there is exit code 127 with its name."""
    home.add(["no-such-program", "x"], id="a", max_retries=0)
    home.start()
    job = home.ended("a")
    same((job.exit_code, "no-such-program" in str(job.error)), (127, True))


@posix
def test_program_with_blanks_in_its_path_fails_with_what_to_do(home: Home) -> None:
    """A line that is the path of a program, blanks and all, is taken apart by the shell; the error shows the list."""
    program = home.work / "with blank" / "x.sh"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 7\n")
    program.chmod(0o755)
    fields = {"max_retries": 0}
    home.add(str(program), id="a", **fields)
    home.add(f"'{program}'", id="b", **fields)
    home.add("no such thing", id="c", **fields)
    home.start()
    a, b, c = (home.ended(id) for id in "abc")
    assert f'{{"command": ["{program}"]}}' in str(a.error), a.error
    same((a.exit_code, b.exit_code, b.error, c.error), (127, 7, "exit code 7", "exit code 127"))
    row = next(line for line in home.out("list").splitlines() if line.startswith("a "))
    assert "exit code 127  " in row and "enqueue" not in row, row


@posix
def test_signal_fails_the_attempt_and_is_kept(home: Home) -> None:
    """A command that a signal ends has failed, and its history says which one."""
    home.add("kill -SEGV $$", id="a", max_retries=0)
    home.start()
    home.ended("a")
    (attempt,) = home.history("a")
    same((attempt.exit_code, attempt.signal, attempt.error), (None, int(signal.SIGSEGV), "ended by SIGSEGV"))


@posix
def test_history_has_what_an_attempt_cost(home: Home) -> None:
    """Peak memory and CPU time of every attempt are kept (Wine tells neither)."""
    script = "import time\nx = b'x' * (80 << 20)\nwhile time.process_time() < 0.3: pass"
    home.add([sys.executable, home.script("burn.py", script)], id="a")
    home.start()
    same(home.ended("a").error, None)
    (attempt,) = home.json("show", "a")["history"]
    assert 0.2 < attempt["cpu_seconds"] < 30, attempt
    assert 80 << 20 <= attempt["max_rss_bytes"] < 2 << 30, attempt


@posix
def test_background_process_is_left_alone(home: Home) -> None:
    """What a command leaves running when it has ended by itself goes on, whatever comes of its worker."""
    home.add("sleep 600 >/dev/null 2>&1 & echo $! > pid", id="a")
    home.start()
    same(home.ended("a").state.value, "completed")
    pid = int(home.text("pid"))
    home.ended(home.add("exec sleep 600", timeout=0.05, max_retries=0))
    same(is_running(pid), True)
    home.run("worker", "stop", "--now")
    same(is_running(pid), True)


@posix
def test_start_that_fails_names_what_is_wrong_with_the_file(home: Home) -> None:
    """Line ends of Windows, a missing interpreter, no `#!`, no right to run: each is named, with what helps."""
    files = {"crlf": "#!/bin/sh\r\necho hi\r\n", "nowhere": "#!/no/such -x\necho hi\n", "bare": "echo hi\n"}
    for name, text in files.items():
        (home.work / name).write_text(text, newline="")
        (home.work / name).chmod(0o755)
    (home.work / "closed").write_text("#!/bin/sh\necho hi\n")
    (home.work / "closed").chmod(0o644)
    (home.work / "link").symlink_to("nothing")
    (home.work / "elf").write_bytes(b"\x7fELF\2\1\1" + bytes(200))
    (home.work / "elf").chmod(0o755)
    wanted = {
        "crlf": ["CR LF", "/bin/sh\\r"], "nowhere": ["interpreter '/no/such' does not exist"],
        "bare": ["no #! line", "sh "],
        "closed": ["not executable", "chmod +x"], "link": ["link that leads nowhere"], "elf": ["another system"],
        ".": ["it is a directory"], "none": ["no such file"],
    }  # fmt: skip
    home.start()
    for name, words in wanted.items():
        job = home.ended(home.add([f"./{name}", "x"], max_retries=0))
        same((name, [word for word in words if word not in str(job.error)]), (name, []))
        code = 127 if name in ("crlf", "nowhere", "link", "none", "elf") else 126
        assert job.exit_code == code or name == "elf", (name, job.exit_code)
    for name in ("crlf", "nowhere", "closed"):  # the shell that runs a line says less
        job = home.ended(home.add(f"./{name}", max_retries=0))
        same((name, [word for word in wanted[name] if word not in str(job.error)]), (name, []))
    for mend in ("crlf", "closed"):
        line = str(home.ended(home.add([f"./{mend}"], max_retries=0)).error).partition("run: ")[2]
        subprocess.run(line, shell=True, check=True, cwd=home.work)
        same(home.ended(home.add([f"./{mend}"], max_retries=0)).state.value, "completed")


def test_start_of_what_only_a_shell_knows_hints_at_one_word(home: Home) -> None:
    """A builtin or a variable as the first of several words is named, and so is the form that works."""
    home.start()
    odd = {("FOO=b r", "exit"): "FOO='b r' exit", ("!", "false"): "! false", ("echo a | cat", "-n"): "echo a | cat -n"}
    for words in (["FOO=bar", "exit"], ["cd", "."], ["no-such-alias", "x"], *([] if WINDOWS else map(list, odd))):
        error = str(home.ended(home.add(words, max_retries=0)).error)
        assert "one word" in error, error
        given = shlex.split(error.partition("queuectl ")[2])
        assert given[:2] == ["enqueue", "--"] and given[2:] == [odd.get(tuple(words), " ".join(words))], given
        if words[0] != "no-such-alias" and not WINDOWS:
            home.run(*given[:1], "--wait", *given[1:])


@posix
def test_command_that_the_system_could_not_start_is_refused(home: Home) -> None:
    """A line, a word or a variable longer than the system takes is refused with that limit; what just fits runs."""
    most = 32 * os.sysconf("SC_PAGE_SIZE") if sys.platform.startswith("linux") else 0
    if not most:
        raise Skip("only Linux limits a single string")
    line = "exit 0 #" + "x" * (most - 9)
    home.add(id="a")
    for job in (
        {"command": line + "x"},
        {"command": "x", "env": {"V": "y" * 200_000}},
        {"command": "x", "env": {"V": "\u00e9" * (most // 2)}},
    ):
        error = home.fails("enqueue", "-", stdin=json.dumps(job), code=2)
        assert error.startswith("Error: line 1: field") and str(most - 1) in error, error
    total = {f"V{n}": "y" * 100_000 for n in range(os.sysconf("SC_ARG_MAX") // 100_000 + 1)}
    assert str(os.sysconf("SC_ARG_MAX")) in home.fails(
        "enqueue", "-", stdin=json.dumps({"command": "x", "env": total}), code=2
    )
    home.run("enqueue", "-", stdin=json.dumps({"command": line, "id": "fits", "env": {"V": "y" * (most - 3)}}))
    home.run("worker", "start", "--drain")
    same(home.ended("fits").error, None)


@posix
def test_worker_runs_hooks_with_the_facts(home: Home) -> None:
    """`on_complete` and `on_dead` run after the job with its facts; what goes wrong in them changes nothing."""
    hook = f'cd {home.work}; echo "$QUEUECTL_JOB_ID $QUEUECTL_STATE $QUEUECTL_EXIT_CODE" >> hooks; cat >> facts'
    home.run("config", "set", "on_complete", hook)
    home.run("config", "set", "on_dead", hook + "; exit 3")
    home.add(id="good")
    home.add("exit 4", id="bad", max_retries=0)
    home.start()
    until(lambda: len(home.lines("hooks")) == 2)
    same(home.lines("hooks"), ["good completed 0", "bad dead 4"])
    home.run("worker", "stop")
    facts = json.loads("[" + home.text("facts").replace("}{", "},{") + "]")
    same([(fact["id"], fact["state"]) for fact in facts], [("good", "completed"), ("bad", "dead")])
    assert "hook of job bad: exit code 3" in Path(home.home.worker_log).read_text()
    same((home.state("good"), home.state("bad")), ("completed", "dead"))


# -- logs


def test_log_has_the_output_byte_for_byte_and_in_order(home: Home) -> None:
    """Standard output and error go to the log as they come, whatever the bytes."""
    script = "import os\nfor n in range(200): os.write(1 + n % 2, bytes([n + 56, 0, 10, 13, 255, n]))"
    home.add([sys.executable, home.script("bytes.py", script)], id="a")
    home.start()
    same(home.ended("a").error, None)
    wanted = b"".join(bytes([n + 56, 0, 10, 13, 255, n]) for n in range(200))
    same((home.log("a"), home.run("logs", "--raw", "a").raw), (wanted, wanted))


@posix
def test_log_is_made_when_there_is_something_in_it(home: Home) -> None:
    """A job that says nothing and ends leaves no log; of one that goes on it is there, and so is what it says."""
    home.add_all([{"id": "silent", "command": "true"}, {"id": "quick", "command": "echo said"},
                  {"id": "slow", "command": f"echo said; {waits_for('go')}"}])  # fmt: skip
    home.start()
    until(lambda: home.log("slow") == b"said\n", "its output is to be seen while it runs")
    touch(home, "go")
    home.ended("slow")
    same((home.log("quick"), home.run("logs", "silent").raw), (b"said\n", b""))
    same(os.path.exists(home.home.log("silent")), sys.platform != "linux")


@posix
def test_log_is_never_that_of_the_job_before(home: Home) -> None:
    """What a silent job left running writes to its own log, though the next job has begun."""
    home.add_all([{"id": "a", "command": f"({waits_for('go')}; echo a) &"}, {"id": "b", "command": "touch ran"}])
    home.start()
    home.ended("b")
    home.add(f"echo b; {waits_for('stop')}", id="c")
    until(lambda: home.log("c") == b"b\n")
    touch(home, "go")
    until(lambda: home.log("a") == b"a\n")
    touch(home, "stop")
    home.ended("c")
    same((home.log("a"), home.log("c")), (b"a\n", b"b\n"))


@posix
def test_log_has_what_comes_in_the_moment_of_the_end(home: Home) -> None:
    """What a job's leftover writes while the spool is being closed, and then lets go, is in the job's log."""
    home.run("status")
    late = """
def let_go(fd):
    open(home.spool(7), "w").write("late")
    return False
q.is_open_elsewhere = let_go
log = q.JobLog(home.log("a"), None, q.Spool(home.spool(7)), 0)
log.close()"""
    same(finished(child(home, "home = q.open_home()" + late)).err, "")
    same((home.log("a"), os.path.exists(home.home.spool(7))), (b"late", False))


@posix
def test_log_is_not_what_somebody_else_did_to_the_spool(home: Home) -> None:
    """Neither what lay there before, nor what a job has passed its output to, nor its modes reach another's log."""
    home.run("status")
    Path(home.home.spool(1)).write_text("of another time")
    passes = "import array, socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('socket')\n"
    passes += "s.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [1]))])"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(home.work / "socket"))
        listener.listen()
        home.add([sys.executable, home.script("passes.py", passes)], id="a")
        home.start()
        with listener.accept()[0] as connection:
            _, passed, _, _ = socket.recv_fds(connection, 1, 1)
        home.ended("a")
        if sys.platform == "linux":
            home.ended(home.add("chmod 400 /proc/self/fd/1"))
        home.ended(home.add("echo b", id="b"))
        os.write(passed[0], b"late")
        os.close(passed[0])
    same((home.log("a"), home.log("b")), (b"late", b"b\n"))
    same(os.stat(home.home.log("b")).st_mode & 0o777, 0o600)


@posix
def test_log_is_right_though_the_spool_was_moved_linked_or_is_read(home: Home) -> None:
    """What a silent job did to its spool, and who moves all logs away, cost no other job its output."""
    home.start()
    ours = 'f=$(readlink "/proc/$$/fd/1") || exit 0; '  # only Linux says what it is
    home.ended(home.add("true"))
    os.rename(home.path / "job_logs", home.path / "job_logs.old")
    (home.path / "job_logs").mkdir(mode=0o700)
    same((home.ended(home.add("echo a", id="a")).error, home.log("a")), (None, b"a\n"))
    reads = f'exec 3< "$f"; ({waits_for("go")}; cat <&3 > read.part; mv read.part read) > out 2>&1 &'
    for n, deed in enumerate(['ln "$f" link', 'mv "$f" moved', reads]):
        home.ended(home.add(ours + deed))
        same((home.ended(home.add(f"echo {n}", id=f"n{n}")).error, home.log(f"n{n}")), (None, f"{n}\n".encode()))
    if sys.platform == "linux":
        touch(home, "go")
        until((home.work / "read").exists)
        same([(home.work / name).read_bytes() for name in ("link", "moved", "read")], [b"", b"", b""])


@posix
def test_log_of_a_killed_worker_is_kept(home: Home) -> None:
    """What a job said in the moment before its worker was killed stands in its log, before what the retry says."""
    home.add('echo "$QUEUECTL_ATTEMPT"; [ $QUEUECTL_ATTEMPT = 2 ] || kill -9 $PPID; sleep 0.01', id="a")
    home.start(2)
    same(home.ended("a").attempts, 2)
    first, separator, second = home.log("a").splitlines()
    same((first, b"attempt 2" in separator, second), (b"1", True, b"2"))
    is_well(home)
    home.run("worker", "stop")
    same(sorted(os.listdir(os.path.dirname(home.home.log("")))), ["a.log"])


def test_log_is_appended_to_with_a_separator(home: Home) -> None:
    """A retry adds to the log after one line that names the attempt."""
    home.add("echo out&& exit 1", id="a", max_retries=2, backoff_base=0.01)
    home.start()
    home.ended("a")
    lines = home.log("a").decode().split()
    same((lines.count("out"), len(home.log("a").splitlines()), b"attempt 2" in home.log("a")), (3, 5, True))


def test_log_that_cannot_be_opened_fails_the_attempt(home: Home) -> None:
    """Where the log cannot be opened the attempt fails with its reason, and the worker goes on."""
    Path(home.home.log("a")).mkdir(parents=True)
    home.add(id="a", max_retries=0)
    home.add(id="b")
    home.start()
    assert "cannot open its log" in str(home.ended("a").error)
    same(home.ended("b").state.value, "completed")


def test_log_of_a_progress_bar_is_shown_as_a_terminal_would_leave_it() -> None:
    """Of a line that carriage returns began anew only the last state is shown, wherever the blocks are cut."""
    text = b"10%\r50%\r100%\nplain\r\nlast\rline"
    for size in range(1, len(text)):
        blocks = [text[at : at + size] for at in range(0, len(text), size)]
        same(b"".join(q.fold_returns(blocks)), b"100%\nplain\r\nline")


@posix
def test_log_of_a_long_line_is_read_in_blocks_and_once(home: Home) -> None:
    """The last line of a log is found, and a line without end is shown, by reading each byte once and keeping few."""
    path = str(home.work / "log")
    line = b"x" * (9 * q.LOG_BLOCK + 7)
    long = b"a\nb\n" + line
    for lines, start, text in ((1, 4, long), (2, 2, long + b"\n"), (3, 0, line), (0, 2, b"a\n")):
        Path(path).write_bytes(text)
        same(q.tail_start(path, lines), start)
    read = []

    class Counting(q.LogReader):
        def read(self, at: int, size: int) -> bytes:
            read.append(size)
            return super().read(at, size)

    Path(path).write_bytes(line)
    real, q.LogReader = q.LogReader, Counting  # type: ignore[misc]
    try:
        q.tail_start(path, 1)
    finally:
        q.LogReader = real  # type: ignore[misc]
    assert sum(read) <= len(line) + 1, read
    shown = list(q.fold_returns(q.read_log(path)))
    assert max(map(len, shown)) <= 2 * q.LOG_BLOCK, [len(block) for block in shown]
    same(b"".join(shown), line)


@posix
def test_log_that_its_command_empties_keeps_what_other_attempts_wrote(home: Home) -> None:
    """Who opens /dev/stderr by name empties the log: other attempts' output and their ends stay, the job says so."""
    empties = "echo one; echo two >/dev/stderr; echo three"
    home.add(f"test $QUEUECTL_ATTEMPT = 1 && echo first || {{ {empties}; }}; exit 1", id="a", max_retries=2,
             backoff_base=0.01)  # fmt: skip
    home.add(f"echo first; test $QUEUECTL_ATTEMPT = 1 || {{ {waits_for('go')}; printf XXXXX 1<>/dev/stdout; }}; exit 1",
             id="b", max_retries=1, backoff_base=0.01)  # fmt: skip
    home.add("rm -f $QUEUECTL_HOME/job_logs/c.log; echo first; exit 1", id="c", max_retries=1, backoff_base=0.01)
    home.start(3)
    same([home.ended("a").state.value, home.out("logs", "a", "--attempt", "1")], ["dead", "first\n"])
    for n in "23":
        same(home.out("logs", "a", "--attempt", n), "two\nthree\n")
    kept = home.log("a").splitlines()
    same(kept[:1] + kept[2:4] + kept[5:], [b"first", b"two", b"three", b"two", b"three"])
    assert all("changed its own log" in str(attempt.error) for attempt in home.history("a")[1:])
    touch(home, "go")
    home.ended("b")
    same(home.out("logs", "b", "--attempt", "1"), "first\n")
    same((home.ended("c").state.value, home.out("logs", "c", "--attempt", "1")), ("dead", "first\n"))
    same([name for name in os.listdir(home.home.logs) if name.startswith(".") and name.endswith(".log")], [])
    same(home.json("doctor"), {"ok": True, "problems": []})


@posix
def test_log_that_its_command_empties_is_followed_and_restored(home: Home) -> None:
    """A retry's emptied log is read as it should be while it runs, also after its worker's death."""
    home.add(f"echo try $QUEUECTL_ATTEMPT; case $QUEUECTL_ATTEMPT in 1) exit 1;; 3) exit 0;; esac; "
             f"{waits_for('empty')}; echo two >/dev/stderr; {waits_for('never')}",
             id="a", backoff_base=0.01)  # fmt: skip
    home.start()
    until(lambda: b"try 2" in home.log("a"))
    with home.popen("logs", "--follow", "a") as whole, home.popen("logs", "--follow", "--attempt", "2", "a") as second:
        assert whole.stdout and second.stdout
        same([whole.stdout.readline() for _ in range(3)][::2], [b"try 1\n", b"try 2\n"])
        same(second.stdout.readline(), b"try 2\n")
        touch(home, "empty")
        same((whole.stdout.readline(), second.stdout.readline()), (b"two\n", b"two\n"))
        same([home.out("logs", "a", "--attempt", n) for n in "12"], ["try 1\n", "two\n"])
        assert home.out("logs", "a").startswith("try 1\n--- attempt 2,")
        home.kill_workers()
        home.start()
        same((second.stdout.read(), second.wait(DEADLINE_S)), (b"", 0))
        whole.stdout.read()
        whole.wait(DEADLINE_S)
    same([home.out("logs", "a", "--attempt", n) for n in "123"], ["try 1\n", "two\n", "try 3\n"])
    same(home.ended("a").attempts, 3)


@posix
def test_log_that_is_emptied_in_a_first_attempt_is_said(home: Home) -> None:
    """Also a short first attempt whose command has emptied its log says so, where the system tells."""
    home.add("echo one; echo two >/dev/stderr; echo three", id="quick")
    home.add(f"echo one; {waits_for('go')}; echo two | tee /dev/stderr", id="slow")
    home.add("echo one; echo two; cat < /dev/null", id="good")
    home.start(3)
    until(lambda: b"one" in home.log("slow"))
    touch(home, "go")
    same((home.ended("slow").state.value, home.log("slow")[-4:]), ("completed", b"two\n"))
    same((home.ended("quick").state.value, home.log("quick")), ("completed", b"two\nthree\n"))
    if sys.platform == "linux":  # a busy machine may miss one, so the next may say it

        def is_said() -> bool:
            id = home.ended(home.add("echo one; echo two >/dev/stderr; echo three")).id
            return "changed its own log" in str(home.job(id).error) and "changed its own log" in home.out("show", id)

        until(is_said)
    same(home.ended("good").error, None)


@posix
def test_log_that_is_no_regular_file_fails_the_attempt(home: Home) -> None:
    """A FIFO, a socket, a device, a directory or a link to one is refused with its reason, and nobody waits for it."""
    logs = Path(home.home.logs)
    os.mkfifo(logs / "fifo.log")
    (logs / "dir.log").mkdir()
    (logs / "link.log").symlink_to(logs / "fifo.log")
    (logs / "null.log").symlink_to("/dev/null")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(logs / "sock.log"))
    ids = ["fifo", "dir", "link", "null", "sock"]
    for id in ids:
        home.add("echo hi", id=id, max_retries=0)
    home.add("echo hi", id="good")
    home.start()
    for id in ids:
        assert f"cannot open its log {logs / id}.log: " in str(home.ended(id).error), home.job(id).error
    same(home.ended("good").state.value, "completed")
    for id in ("fifo", "link", "null"):
        assert "no regular file" in str(home.job(id).error) and "no regular file" in home.fails("logs", id)


@posix
def test_log_limit_is_for_each_attempt_and_keeps_head_and_tail(home: Home) -> None:
    """Each attempt keeps its first and last bytes, whatever the ones before have written."""
    home.store.config.set("log_max_bytes", 100)
    home.add("echo begin $QUEUECTL_ATTEMPT; seq 100000; echo end $QUEUECTL_ATTEMPT; exit 1", id="a", max_retries=2,
             backoff_base=0.01)  # fmt: skip
    home.start()
    home.ended("a")
    for n in "123":
        text = home.out("logs", "a", "--attempt", n)
        assert text.startswith(f"begin {n}\n1\n2\n") and text.endswith(f"99999\n100000\nend {n}\n"), text
        [(about, left_out)] = re.findall(r"\n--- (about )?(\d+) bytes are left out here", text)
        same((len(text) < 200, about or int(left_out)), (True, about or 588895 + 8 + 6 - 100))


@posix
def test_log_limit_holds_in_the_grace(home: Home) -> None:
    """A command that is deaf to SIGTERM and floods its log is held to the limit until it is killed."""
    home.store.config.set("log_max_bytes", 10_000)
    home.store.config.set("kill_grace", 2)
    home.add("trap '' TERM; echo up; while :; do head -c 300000 /dev/zero; touch flooded; sleep 0.02; done", id="a",
             timeout=0.3, max_retries=0)  # fmt: skip
    home.start()
    most = 0
    while home.job("a").state not in q.ENDED:
        most = max(most, q.size_of(home.home.log("a")))
        time.sleep(0.01)
    assert b"left out" in home.log("a") and len(home.log("a")) < 10_100
    assert (home.work / "flooded").exists() and most < 10_000_000, most


@posix
def test_log_may_be_limited(home: Home) -> None:
    """With `log_max_bytes` what goes beyond is dropped and the log says so, while the job runs on."""
    home.store.config.set("log_max_bytes", 1000)
    home.add("yes | head -c 300000; echo end", id="a")
    home.start()
    same(home.ended("a").state.value, "completed")
    assert len(home.log("a")) < 1200 and b"left out" in home.log("a"), len(home.log("a"))
    same(home.log("a")[-5:], b"\nend\n")


@posix
def test_log_may_be_limited_to_the_byte(home: Home) -> None:
    """What is beyond the limit is dropped also where it is little; what is not stays as it is, through retries."""
    home.store.config.set("log_max_bytes", 10)
    home.add("printf 1234567890", id="a")
    home.add("printf 12345678901", id="b", max_retries=0)
    home.start()
    same((home.ended("a").state.value, home.log("a")), ("completed", b"1234567890"))
    note = b"\n--- 1 bytes are left out here (config log_max_bytes) ---\n"
    same((home.ended("b").state.value, home.log("b")), ("completed", b"12345" + note + b"78901"))


def peak_memory(pid: int) -> int:
    """The most that a process ever held, in KiB."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])


@posix
@alone
def test_command_that_floods_its_log_is_held_to_the_limit(home: Home) -> None:
    """Beyond log_max_bytes output is dropped with a note; the job goes on, and no memory grows."""
    home.run("config", "set", "log_max_bytes", "100000")
    pid = home.start()[0].pid
    before, most = peak_memory(pid), 0
    log = shlex.quote(home.home.log("flood"))
    dropped = f"until [ -e {log} ] && [ $(wc -c < {log}) -lt 1000000 ]; do sleep 0.02; done"
    command = f"echo begin; for i in 1 2 3 4 5 6 7 8; do head -c 30000000 /dev/zero; {dropped}; done; touch through"
    id = home.add(command, id="flood", timeout=0)

    def has_ended() -> bool:
        nonlocal most
        most = max(most, os.path.getsize(home.home.log(id)) if os.path.exists(home.home.log(id)) else 0)
        return home.job(id).state in q.ENDED

    until(has_ended)
    text = home.log(id)
    same((home.state(id), (home.work / "through").exists()), ("completed", True))
    assert len(text) < 100_200 and text.startswith(b"begin\n\0\0\0"), len(text)
    same(text.count(b"log_max_bytes"), 1)
    assert most < 31_000_000, f"the log held {most} bytes meanwhile"
    assert peak_memory(pid) - before < 8_000


@posix
def test_log_that_is_no_file_fails_the_attempt(home: Home) -> None:
    """A pipe, a directory, a socket, a device and a link to one in the place of a log fail the attempt at once."""
    logs = Path(home.home.logs)
    os.mkfifo(logs / "pipe.log")
    (logs / "folder.log").mkdir()
    (logs / "device.log").symlink_to(os.devnull)
    (logs / "link.log").symlink_to("pipe.log")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(logs / "socket.log"))
    home.start()
    for id in ("pipe", "folder", "device", "link", "socket"):
        job = home.ended(home.add("echo hi", id=id, max_retries=0))
        assert job.state is q.State.DEAD and "cannot open its log" in (job.error or ""), job
        home.run("logs", id, code=1)
    same(home.ended(home.add()).state, q.State.COMPLETED)


@posix
def test_disk_full_of_a_log_is_its_jobs_own_affair(home: Home) -> None:
    """A command that cannot write its output goes on, and so does its worker."""
    with small_disk(home) as disk:
        home.start()
        id = home.add(f"head -c 9000000 /dev/zero; echo $? > account; sleep 0.5; rm {disk}/home/job_logs/x.log", id="x")
        same((home.ended(id).state, home.lines("account")), (q.State.COMPLETED, ["1"]))
        same(home.ended(home.add()).state, q.State.COMPLETED)


# -- time-outs


@posix
def test_timeout_ends_a_deaf_child_in_another_session(home: Home) -> None:
    """At its time-out an attempt is ended whole: also a child that ignores SIGTERM and left its session."""
    home.store.config.set("kill_grace", 0.2)
    deaf = f"{shlex.quote(sys.executable)} {home.script('deaf.py', DEAF)} pids"
    home.add(f"{deaf} & while [ ! -s pids ]; do sleep 0.02; done; trap '' TERM; touch ready; sleep 600 & wait; wait",
             id="a", timeout=0.1, max_retries=0)  # fmt: skip
    with child(home, READY + SERVE):
        job = home.ended("a")
    same((job.state.value, "timed out" in str(job.error), job.exit_code), ("dead", True, None))
    (pid,) = map(int, home.lines("pids"))
    same(is_running(pid), False)


@windows
def test_timeout_ends_the_tree(home: Home) -> None:
    """At its time-out an attempt is ended whole: also a child of its child."""
    script = "import subprocess\nprint(subprocess.Popen(['ping', '-n', '600', '127.0.0.1'], stdout=-3).pid, flush=True)"
    home.script("tree.py", script + "\nimport time\ntime.sleep(600)")
    home.add(f'"{sys.executable}" tree.py', id="a", timeout=8, max_retries=0)
    home.start()
    assert "timed out" in str(home.ended("a").error)
    same(is_running(int(home.log("a"))), False)


def test_timeout_of_a_job_goes_before_the_setting(home: Home) -> None:
    """A job's own `timeout` counts, 0 for none; others have the setting."""
    home.store.config.set("job_timeout", 0.3)
    home.store.config.set("max_retries", 0)
    home.add(sleeping(1), id="free", timeout=0)
    home.add(sleeping(600), id="bound")
    home.start()
    same((home.ended("free").state.value, home.ended("bound").state.value), ("completed", "dead"))
    assert "0.3 s" in str(home.job("bound").error)


# -- unruly commands


HIDING = {  # ways of a child to get away
    "in a group of its own": "set -m; {}& set +m",
    "in a session of its own": "setsid {}&",
    "with a cleared environment": "env -i {}&",
    "forked twice": "(setsid sh -c '({} >/dev/null 2>&1 &)' &)",
    "stopped": "{}& kill -STOP $!",
    "forked twice with a cleared environment": "(env -i setsid sh -c '({} >/dev/null 2>&1 &)' &)",
}


@posix
def test_command_is_ended_whole_however_its_children_hide(home: Home) -> None:
    """A time-out ends children in other groups and sessions, with a cleared environment, forked twice, stopped."""
    home.run("config", "set", "kill_grace", "0.2")
    with Sleepers(home) as sleepers:
        script = "\n".join(way.format(sleepers.line) for way in HIDING.values())
        id = home.add(f"{script}\n{waits_for('go')}\nwait", timeout=0.1, max_retries=0)
        with child(home, READY + SERVE):
            until(lambda: len(sleepers.pids()) >= len(HIDING) - 1)  # the stopped one may not have come so far
            touch(home, "ready")
            assert "timed out" in (home.ended(id).error or "")
        same(sleepers.pids(), [])


@posix
def test_command_that_ignores_sigterm_is_ended(home: Home) -> None:
    """A command that is deaf to SIGTERM is killed once its grace is over."""
    home.run("config", "set", "kill_grace", "0.3")
    with Sleepers(home) as sleepers:
        id = home.add(f"trap '' TERM INT HUP; {sleepers.line}; {sleepers.line}", timeout=0.1, max_retries=0)
        with child(home, READY + SERVE):
            until(sleepers.pids)
            touch(home, "ready")
            assert "timed out" in (home.ended(id).error or "")
        same(sleepers.pids(), [])


@posix
def test_command_that_hears_sigterm_has_its_grace(home: Home) -> None:
    """A command that cleans up on SIGTERM is given the time for it."""
    home.run("config", "set", "kill_grace", str(DEADLINE_S))
    command = "trap 'sleep 0.3; echo clean >> account; exit 0' TERM; touch ready; sleep 600 & wait"
    id = home.add(command, timeout=0.1, max_retries=0)
    with child(home, READY + SERVE):
        assert "timed out" in (home.ended(id).error or "")
    same(home.lines("account"), ["clean"])


@posix
def test_command_that_stops_itself_is_ended_by_its_time_out(home: Home) -> None:
    """A command that is stopped hears nothing, and is ended nevertheless."""
    home.run("config", "set", "kill_grace", "0.3")
    with Sleepers(home) as sleepers:
        id = home.add(f"{sleepers.line} & kill -STOP $$", timeout=0.1, max_retries=0)
        with child(home, READY + SERVE):
            until(sleepers.pids)
            touch(home, "ready")
            assert "timed out" in (home.ended(id).error or "")
        same(sleepers.pids(), [])


# For root a real one, which the system holds to 80 processes; for others one that ends at 64.
FORK_BOMB = """
import os, resource, time
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(64321)
    os.setuid(64321)
    resource.setrlimit(resource.RLIMIT_NPROC, (80, 80))
    while True:
        try:
            os.fork()
        except OSError:
            time.sleep(0.001)
for _ in range(6):
    os.fork()
time.sleep(90)
"""


@posix
@alone
def test_command_that_is_a_fork_bomb_is_ended_whole(home: Home) -> None:
    """A command that forks faster than one can kill is ended by its time-out, the last process of it."""
    home.run("config", "set", "kill_grace", "0")
    mark = f"bomb in {home.work}"
    id = home.add([sys.executable, "-c", FORK_BOMB, mark], timeout=0.1, max_retries=0)
    with child(home, READY + SERVE):
        until(lambda: len(pids_with(mark)) > 50)
        touch(home, "ready")
        assert "timed out" in (home.ended(id).error or "")
        same(pids_with(mark), {})
        same(home.ended(home.add()).state, q.State.COMPLETED)


@posix
def test_command_that_keeps_its_output_open_has_ended(home: Home) -> None:
    """A job ends with its shell; what that left in the background lives on, and goes on writing to the log."""
    id = home.add(f"({waits_for('go')}; echo late) & echo soon")
    home.start()
    same((home.ended(id).state, home.log(id)), (q.State.COMPLETED, b"soon\n"))
    after = home.add("sleep 60", timeout=0.3, max_retries=0)  # what is ended with this one is not the other's
    assert "timed out" in (home.ended(after).error or "")
    touch(home, "go")
    until(lambda: home.log(id) == b"soon\nlate\n")


@posix
def test_command_that_reads_its_input_finds_none(home: Home) -> None:
    """Standard input is empty: whoever reads it comes to its end at once."""
    id = home.add("cat; read line || echo none", timeout=0, max_retries=0)
    home.start()
    same((home.ended(id).state, home.log(id)), (q.State.COMPLETED, b"none\n"))


# ---- worker


def test_schema_that_is_raised_under_a_worker_lets_it_leave(home: Home) -> None:
    """A worker that is older than the database claims nothing more and leaves, saying why; its job's result stays."""
    home.add(f"echo up; {waits_for('go')}" if not WINDOWS else "exit 0", id="a")
    home.start()
    home.ended("a") if WINDOWS else home.until_up("a")
    home.store.config.settings()
    store = home.store
    home.sql(f"PRAGMA user_version = {len(q.MIGRATIONS) + 1}")
    until(lambda: "newer queuectl" in Path(home.home.worker_log).read_text())
    home.add(id="b")
    touch(home, "go")
    until(lambda: not store.workers.all())
    same((home.state("a"), home.state("b")), ("completed", "pending"))


def test_backoffs_of_a_wrong_clock_count_from_now_once_a_worker_starts(home: Home) -> None:
    """A retry that was put off by a clock that was 400 days ahead is due after its backoff, whoever was there then."""
    ahead = q.now_ms() + 400 * 86_400_000
    home.add(id="a", backoff_base=0.01)
    home.store.jobs.finish(home.claim(home.worker_row(), ahead), exited(1), q.Settings(), ahead)
    home.sql("DELETE FROM workers")
    home.start()
    same(home.ended("a").state.value, "completed")


def test_worker_waits_for_the_time_of_a_job(home: Home) -> None:
    """A delayed job, by `run_at` or `delay`, starts only when its time has come, others meanwhile."""
    now = time.time()
    home.run("enqueue", json.dumps({"id": "at", "command": "exit 0", "run_at": now + 1.5}))
    home.run("enqueue", "--id", "delay", "--delay", "1500ms", "--", "exit 0")
    home.run("enqueue", "--id", "year", "--run-at", "2099-01-01", "--", "exit 0")
    home.add(id="now")
    home.start()
    for id in ("now", "at", "delay"):
        job = home.ended(id)
        assert job.started_at and job.started_at >= (job.run_at or 0), job
    same([home.state("year"), home.job("at").run_at], ["pending", round((now + 1.5) * 1000)])


def test_worker_keeps_a_held_job_until_release(home: Home) -> None:
    """A job on hold is passed over until it is released."""
    home.run("enqueue", "--id", "a", "--hold", "--priority", "9", "--", "exit 0")
    home.start()
    home.ended(home.add())
    same((home.state("a"), home.json("show", "a")["reason"]), ("pending", "on hold"))
    home.run("release", "a")
    same(home.ended("a").state.value, "completed")


def test_worker_runs_a_chain_in_order(home: Home) -> None:
    """A job that waits for others starts once these have completed, across several workers."""
    parents: dict[str, list[str]] = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}
    for id, names in parents.items():
        home.add("echo x", id=id, after=names)
    home.start(2)
    ended = {id: home.ended(id) for id in parents}
    for id, names in parents.items():
        assert all((ended[name].finished_at or 0) <= (ended[id].started_at or 0) for name in names), ended


def test_worker_ok_codes_no_retry_codes_and_snooze(home: Home) -> None:
    """Exit codes are judged as the job says."""
    home.add("exit 3", id="ok", ok_codes=[3])
    home.add("exit 4", id="final", no_retry_codes=[4])
    home.add("if not exist x (echo x> x& exit 75)" if WINDOWS else "[ -e x ] || { touch x; exit 75; }", id="snooze",
             snooze=True, backoff_base=0.05, max_retries=0)  # fmt: skip
    home.start()
    same([(home.ended(id).state.value, home.job(id).attempts) for id in ("ok", "final", "snooze")],
         [("completed", 1), ("dead", 1), ("completed", 1)])  # fmt: skip
    same(len(home.history("snooze")), 2)


def test_worker_takes_a_changed_setting_with_the_next_job(home: Home) -> None:
    """A change of the configuration reaches workers that run."""
    home.start()
    home.ended(home.add())
    home.run("config", "set", "job-timeout", "300ms")
    home.run("config", "set", "max_retries", "0")
    job = home.ended(home.add(sleeping(600)))
    same((job.state.value, job.attempts), ("dead", 1))
    home.run("config", "unset", "max_retries")
    home.run("config", "set", "backoff_base", "0.01")
    same(home.ended(home.add("exit 1")).attempts, 4)


def test_worker_paused_queue_rests_until_it_is_resumed(home: Home) -> None:
    """Of a paused queue nothing new is started, other queues go on, and `resume` lets it go."""
    home.run("queue", "pause", "slow")
    home.add(id="a", queue="slow", priority=9)
    home.start()
    home.ended(home.add())
    same((home.state("a"), home.json("show", "a")["reason"]), ("pending", "queue slow paused"))
    same(home.json("status")["paused"], ["slow"])
    home.run("queue", "resume", "slow")
    same(home.ended("a").state.value, "completed")


@posix
def test_worker_limited_queue_never_runs_more_at_once(home: Home) -> None:
    """With a limit of two, three workers never run more than two jobs of the queue at once."""
    home.run("queue", "limit", "q", "2")
    command = "touch in.$$; ls in.* | wc -l >> most; sleep 0.05; rm in.$$"
    home.add_all({"command": command, "queue": "q"} for _ in range(20))
    home.start(3)
    until(lambda: home.store.queries.counts()[q.State.COMPLETED] == 20)
    assert max(map(int, home.lines("most"))) <= 2, home.lines("most")


def test_workers_take_only_the_queues_that_they_are_for(home: Home) -> None:
    """A worker for some queues passes over the others, and `show` says why they wait."""
    home.add(id="other", queue="slow", priority=9)
    home.start(1, "--queue", "fast")
    home.ended(home.add(queue="fast"))
    same((home.state("other"), home.json("show", "other")["reason"]), ("pending", "no worker takes queue slow"))


def test_workers_that_drain_leave_when_nothing_could_run(home: Home) -> None:
    """`--drain` runs what is there and due later, retries included, and leaves then; what is held stays."""
    home.add("exit 1", id="a", max_retries=1, backoff_base=0.3)
    home.add(id="b", delay=0.5)
    home.add(id="held", hold=True)
    home.run("worker", "start", "--drain")
    until(lambda: not home.store.workers.all())
    same([home.state(id) for id in ("a", "b", "held")], ["dead", "completed", "pending"])


@posix
def test_workers_first_sigterm_finishes_the_job(home: Home) -> None:
    """A worker that gets SIGTERM finishes its job and leaves."""
    home.add("echo up; while [ ! -e go ]; do sleep 0.02; done", id="a", timeout=0)
    home.add(id="b")
    (row,) = home.start()
    home.until_up("a")
    os.kill(row.pid, signal.SIGTERM)
    (home.work / "go").touch()
    until(lambda: not home.store.workers.all())
    same((home.state("a"), home.state("b"), home.job("a").attempts), ("completed", "pending", 1))


@posix
def test_workers_second_sigterm_gives_the_job_back(home: Home) -> None:
    """A worker that gets SIGTERM twice gives its job back as pending, the attempt not counted."""
    home.add(sleeping(600), id="a", timeout=0)
    (row,) = home.start()
    home.until_up("a")

    def gone() -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(row.pid, signal.SIGTERM)  # two that come together may be one
        return not home.store.workers.all()

    until(gone)
    same((home.state("a"), home.job("a").attempts), ("pending", 0))


@posix
def test_workers_ctrl_c_is_not_meant_for_their_jobs(home: Home) -> None:
    """Ctrl-C at a foreground worker reaches every process of its terminal, and yet the job finishes."""
    process = home.popen("worker", "start", "--foreground", start_new_session=True)
    home.add("echo up; while [ ! -e go ]; do sleep 0.02; done", id="a", timeout=0, max_retries=0)
    home.until_up("a")
    os.killpg(process.pid, signal.SIGINT)
    until(lambda: "finishes job a first" in Path(home.home.worker_log).read_text())  # and says so
    (home.work / "go").touch()
    process.communicate(timeout=DEADLINE_S)
    same((process.returncode, home.state("a"), home.job("a").attempts), (0, "completed", 1))


@posix
def test_workers_outlive_the_terminal(home: Home) -> None:
    """A worker has a session of its own, and a hangup does not end it."""
    (row,) = home.start()
    assert os.getsid(row.pid) == row.pid != os.getsid(0)
    os.kill(row.pid, signal.SIGHUP)
    same(home.ended(home.add()).state.value, "completed")


@posix
def test_workers_load_nothing_at_their_first_job(home: Home) -> None:
    """What a job needs is imported before the fork: else each worker would have it for itself."""
    if sys.platform != "linux":
        raise Skip("only Linux tells what a process has loaded")
    (row,) = home.start()

    def loaded() -> set[str]:
        maps = Path(f"/proc/{row.pid}/maps").read_text()
        return set(re.findall(r"\S+\.so\S*", maps))

    before = loaded()
    home.ended(home.add())
    same(loaded() - before, set())


def test_worker_log_says_what_matters_and_not_a_line_a_job(home: Home) -> None:
    """worker.log tells of starting, recovering and leaving, not of every job."""
    home.add_all({"command": "exit 0"} for _ in range(5))
    home.start()
    until(lambda: home.store.queries.counts()[q.State.COMPLETED] == 5)
    home.run("worker", "stop")
    text = Path(home.home.worker_log).read_text()
    same((len(text.splitlines()), "started" in text, "left" in text), (2, True, True))


def mode_of(path: Path) -> int:
    """The mode of a file; 0 where it is missing."""
    return path.stat().st_mode if path.exists() else 0


@posix
def test_worker_looks_after_its_signs_of_life(home: Home) -> None:
    """A worker whose files somebody removes or replaces is not dead: it makes them again, and hears of what comes."""
    (row,) = home.start()
    bell, life = Path(home.home.bell(row.id)), Path(home.home.life(row.id))
    for path, is_replaced in ((bell, False), (life, False), (bell, True), (life, True)):
        path.unlink()
        if is_replaced:
            path.write_text("not this")
        same(len(living(home)), 1)
        until(lambda: stat.S_ISFIFO(mode_of(bell)) and stat.S_ISREG(mode_of(life)) and not life.read_bytes())
    same(home.ended(home.add()).attempts, 1)
    home.run("worker", "stop")
    same(os.listdir(home.home.bells), [])


# -- those that died


def test_worker_cancelled_job_whose_worker_died_is_cancelled(home: Home) -> None:
    """Of a job that is being cancelled and whose worker dies only the end is put in order."""
    home.add(sleeping(600), id="a", timeout=0)
    home.start()
    home.until_up("a")
    home.kill_workers()
    home.run("cancel", "a")
    home.start()
    same(home.ended("a").state.value, "cancelled")


@alone
def test_worker_kill_9_of_all_changes_only_the_attempts_of_their_jobs(home: Home) -> None:
    """After a kill -9 of every worker in the middle new ones run all jobs, with one attempt more for those in hand."""
    kill_all_in_the_middle(home, 24 if WINDOWS else 100, rounds=20 if LONG else 1 if WINDOWS else 3)


def kill_all_in_the_middle(home: Home, count: int, rounds: int) -> None:
    """Run jobs that say start and end, kill all workers so many times, and look at every log."""
    command = "echo start& ping -n 2 127.0.0.1 >nul& echo end" if WINDOWS else "echo start; sleep 0.05; echo end"
    lost: collections.Counter[str] = collections.Counter()
    running = q.Selection(states=[q.State.PROCESSING])
    for turn in range(rounds):
        ids = home.add_all({"command": command, "max_retries": 9} for _ in range(count))
        home.start(2 if WINDOWS else 4)
        until(functools.partial(completed, home, len(ids) * turn + count // 4))
        if WINDOWS:  # a command that is just being made would stay there, frozen
            until(lambda: all(home.log(job.id).count(b"start") for job in home.store.queries.jobs(running)))
        home.kill_workers()
        lost.update(job.id for job in home.store.queries.jobs(running))
        home.start(2 if WINDOWS else 4)
        until(lambda: home.store.queries.counts()[q.State.COMPLETED] == len(home.store.queries.jobs()))
        home.run("worker", "stop")
    for job in home.store.queries.jobs():
        same((job.id, job.attempts), (job.id, 1 + lost[job.id]))
        tries = re.split(r"--- attempt.*\n", home.log(job.id).decode())
        assert len(tries) <= job.attempts and tries[-1].split() == ["start", "end"], tries
        assert all(t.split() in (["start"], ["start", "end"]) for t in tries), tries
    assert sum(lost.values()) >= rounds and ids
    counters_equal_rows(home)


@posix
@alone
def test_worker_killed_its_deaf_child_is_ended_before_the_job_starts_again(home: Home) -> None:
    """A killed worker's job starts again only after its TERM-deaf child has been ended; it is missed within seconds."""
    home.script("deaf.py", DEAF)
    script = """
import os, subprocess, sys, time
def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
def say(word):
    with open("lines", "a") as file:
        file.write(f"{word} {os.environ['QUEUECTL_ATTEMPT']}\\n")
say("start")
if os.path.exists("pids"):
    say("beside" if any(alive(int(pid)) for pid in open("pids")) else "free")
else:
    subprocess.Popen([sys.executable, "deaf.py", "pids"])
    time.sleep(600)
say("end")
"""
    home.add([sys.executable, home.script("job.py", script)], id="a", timeout=0)
    rows = home.start(2)
    (pid,) = map(int, until(lambda: home.lines("pids")))
    first = home.job("a").worker
    os.kill(next(row.pid for row in rows if row.id == first), signal.SIGKILL)
    home.ended("a")
    same(home.lines("lines"), ["start 1", "start 2", "free 2", "end 2"])
    assert q.DUTY_S < 5, "workers look for the dead every few seconds"
    lost = home.history("a")[0]
    same((is_running(pid), home.job("a").attempts, f"worker {first} died" in str(lost.error)), (False, 2, True))


@windows
def test_worker_killed_its_job_is_ended_and_starts_again(home: Home) -> None:
    """A killed worker's job is ended with its children, then it starts again."""
    script = "import os, subprocess, time\nagain = os.path.exists('pid')\nif not again:\n"
    script += "    child = subprocess.Popen(['ping', '-n', '600', '127.0.0.1'], stdout=-3)\n"
    script += "    open('pid', 'w').write(f'{child.pid}\\n')\n    time.sleep(600)"
    home.add([sys.executable, home.script("job.py", script)], id="a", timeout=0)
    home.start()
    (pid,) = map(int, until(lambda: home.lines("pid")))
    home.kill_workers()
    home.start()
    same((home.ended("a").attempts, is_running(pid)), (2, False))


@posix
def test_worker_killed_what_cleared_its_environment_is_ended_too(home: Home) -> None:
    """A child of a killed worker's job that wears no mark any more, but writes to the log, is ended."""
    home.add("if [ -e pid ]; then exit 0; fi; env -i setsid sh -c 'echo $$ > pid; exec sleep 600' & wait; wait", id="a",
             timeout=0)  # fmt: skip
    home.start()
    pid = int(until(lambda: home.lines("pid"))[0])
    home.kill_workers()
    home.start()
    same((home.ended("a").attempts, is_running(pid)), (2, False))


def test_worker_that_its_jobs_kill_ends_with_the_job_dead(home: Home) -> None:
    """A job that kills its worker each time is dead after its retries, not in a loop."""
    script = """
import os, signal, time
while True:
    try:
        os.kill(int(open("pid").read()), getattr(signal, "SIGKILL", signal.SIGTERM))
    except OSError:
        time.sleep(0.02)  # it is the id of the worker before
"""
    home.add([sys.executable, home.script("killer.py", script)], id="a", max_retries=1, hold=True)
    for n in (1, 2):
        (row,) = [row for row in home.start() if q.has_living_process(home.home, row)]
        (home.work / "pid").write_text(str(row.pid))
        if n == 1:
            home.store.changes.set_hold(q.Selection(["a"]), False, q.now_ms())
        until(lambda: not q.living_workers(home.home, home.store))
    home.start()
    same((home.ended("a").state.value, home.job("a").attempts, len(home.history("a"))), ("dead", 2, 2))


def test_worker_killed_job_that_must_not_run_twice_is_dead(home: Home) -> None:
    """With `on_lost` `dead` a lost attempt is the last."""
    home.add(("echo x>> ran& " if WINDOWS else "echo x >> ran; ") + sleeping(600), id="a", on_lost="dead", timeout=0)
    home.start()
    until(lambda: home.lines("ran"))
    home.kill_workers()
    home.start()
    job = home.ended("a")
    same((job.state.value, job.attempts, "died" in str(job.error), len(home.lines("ran"))), ("dead", 1, True, 1))


class FakeClock(q.Clock):
    """A clock that goes on only where somebody waits."""

    def __init__(self, now_ms: int) -> None:
        self.ms = self.began_ms = now_ms

    def now_ms(self) -> int:
        """The time of day."""
        return self.ms

    def monotonic_s(self) -> float:
        """The same, from another beginning."""
        return self.ms / 1000

    def chance(self) -> float:
        """Always in the middle."""
        return 0.5


class FakeSigns:
    """A bell that nobody rings, whose wait takes no time but the clock's; and a life that nobody looks at."""

    has_news = False

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock

    def wait(self, timeout_s: float, process: object = None) -> bool:
        """Let the clock go on."""
        self.clock.ms += max(1, round(timeout_s * 1000))
        return False

    def watch(self, process: str | None) -> bool:
        """There is no neighbour."""
        return False

    def look_after(self) -> None:
        """Nothing can be missing."""


class Rehearsal(q.Worker):
    """A worker whose attempts take no time and end as they are told; it notes when each began, in seconds."""

    def __init__(self, home: Home, clock: FakeClock, outcomes: dict[str, list[q.Outcome]]) -> None:
        signs: Any = FakeSigns(clock)
        worker = home.store.workers.register(
            1, "host", None, True, clock.now_ms(), lambda _: None, lambda _: True, q.own_process()
        )[0]
        super().__init__(home.home, home.store, worker, q.Signs(signs, signs), lambda _: None, clock)
        self.clock, self.outcomes = clock, outcomes
        self.starts: list[tuple[str, float]] = []

    def _attempt(self, job: q.Job) -> q.Outcome:
        self.starts.append((job.id, (self.clock.ms - self.clock.began_ms) / 1000))
        return self.outcomes[job.id].pop(0)


def rehearsed(home: Home, clock: FakeClock, outcomes: dict[str, list[q.Outcome]]) -> list[tuple[str, float]]:
    """What a draining worker starts, and when."""
    worker = Rehearsal(home, clock, outcomes)
    worker.run()
    return worker.starts


@alone
def test_worker_waits_out_backoffs_by_its_clock(home: Home) -> None:
    """A job that fails starts again 2, 4 and 8 seconds after each failure, and is dead then."""
    home.add(id="a")
    starts = rehearsed(home, FakeClock(q.now_ms()), {"a": [exited(1)] * 4})
    same([round(s) for _, s in starts], [0, 2, 6, 14])
    assert all(s >= wanted for (_, s), wanted in zip(starts, [0, 2, 6, 14], strict=True))
    same(home.state("a"), "dead")


@alone
def test_worker_starts_what_is_put_off_when_its_time_has_come(home: Home) -> None:
    """A job that is due in an hour starts then and not before; meanwhile others run."""
    clock = FakeClock(q.now_ms())
    home.add(id="later", run_at=clock.ms / 1000 + 3600)
    home.add(id="now")
    starts = dict(rehearsed(home, clock, {"later": [exited(0)], "now": [exited(0)]}))
    same((round(starts["now"]), 3600 <= starts["later"] < 3601), (0, True))


@alone
def test_worker_does_its_duties_in_their_own_time(home: Home) -> None:
    """Each duty comes in its own interval, however long a worker waits, and a new home is noticed by one of them."""
    clock = FakeClock(q.now_ms())
    home.add(id="later", run_at=clock.ms / 1000 + 60)
    worker = Rehearsal(home, clock, {"later": [exited(0)]})
    done: list[float] = []
    worker._duties.append(q.Duty(20, lambda: done.append((clock.ms - clock.began_ms) / 1000)))
    worker.run()
    same([round(s) for s in done], [0, 20, 40, 60])


# A worker that writes down how often it has looked for workers that died.
LOOKS = """
def watch(self, watch=q.Worker._watch_ring):
    watch(self)
    with open(HERE + "/looks", "a") as file:
        file.write("x\\n")
q.Worker._watch_ring = watch"""


@posix
def test_worker_that_is_stopped_is_not_dead(home: Home) -> None:
    """However long a worker stands still, its job is not taken away, and runs once."""
    home.add("echo x >> ran; while [ ! -e go ]; do sleep 0.02; done", id="a", timeout=0)
    (row,) = home.start()
    until(lambda: home.lines("ran"))
    os.kill(row.pid, signal.SIGSTOP)
    try:
        with child(home, LOOKS + SERVE):
            until(lambda: len(home.lines("looks")) > 2)
            same(home.state("a"), "processing")
            touch(home, "go")
    finally:
        os.kill(row.pid, signal.SIGCONT)
    same((home.ended("a").state.value, home.job("a").attempts, home.lines("ran")), ("completed", 1, ["x"]))


@posix
def test_worker_that_recovers_late_harms_nobody(home: Home) -> None:
    """A worker that was held up while it recovered another does no harm to the attempt that came since."""
    id = home.add("echo s$QUEUECTL_ATTEMPT >> account; " + waits_for("go") + "; echo e$QUEUECTL_ATTEMPT >> account")
    killed(child(home, "q.run_attempt = die" + SERVE))
    late = """
def held_up(store, worker, under_way=q.Jobs.running_jobs):
    found = under_way(store, worker)
    if not os.path.exists(HERE + "/late"):
        open(HERE + "/late", "w").close()
        until("now")
    return found
def end_leftovers(leftovers, timeout_s, end=q.Leftovers.end):
    left = end(leftovers, timeout_s)
    open(HERE + "/done", "w").close()
    return left
q.Jobs.running_jobs, q.Leftovers.end = held_up, end_leftovers
q.serve(q.open_home(), ["other"], False)"""
    with child(home, late, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        until((home.work / "late").exists)
        home.start()
        until(lambda: home.lines("account") == ["s2"])
        touch(home, "now")
        until((home.work / "done").exists)
        touch(home, "go")
        home.start()
        home.ended(id)
    same(home.lines("account"), ["s2", "e2"])
    same(errors_of(home, id), ["worker 1 died while it ran", None])


@posix
def test_worker_taken_for_dead_cannot_overwrite_what_came_after(home: Home) -> None:
    """The result of a worker that was taken for dead comes too late, is refused, and the worker leaves."""
    id = home.add(f"{RUN_ONCE}; [ $QUEUECTL_ATTEMPT = 2 ] || exit 7; {waits_for('go')}")
    late = """
def exchange(self, report, exchange=q.Worker._exchange):
    if report:
        open(HERE + "/ran", "w").close()
        until("late")
    return exchange(self, report)
q.Worker._exchange = exchange"""
    first = child(home, late + SERVE)
    until((home.work / "ran").exists)
    home.sql("UPDATE workers SET process = 'of another start of the machine:0:0:0'")
    os.unlink(home.home.life(living(home)[0].id))  # from here on everybody takes it for dead
    home.start()
    until(lambda: home.lines("account") == ["1", "2"])
    touch(home, "late")
    said = finished(first).err
    assert "too late: refused" in said and "removed by a peer, leaves" in said, said
    same(home.state(id), "processing")
    touch(home, "go")
    job = home.ended(id)
    same((job.state, job.attempts, job.exit_code), (q.State.COMPLETED, 2, 0))
    same((home.lines("account"), len(home.history(id))), (["1", "2"], 2))


@posix
def test_platform_looks_at_all_processes_on_a_busy_machine(home: Home) -> None:
    """That others make processes, and run for long between two steps of a look, does not keep it from an end."""
    if sys.platform != "linux":
        raise Skip("only Linux has /proc")
    busy = """
import itertools
newest, seconds = q._newest_pid(), itertools.count()
made = iter([newest, newest + 1, newest + 2, newest + 3, newest + 3])
q._newest_pid, time.monotonic = lambda: next(made), lambda: next(seconds)
print(os.getpid() in [process.pid for process in q._processes()])"""
    same(finished(child(home, busy)).out, "True\n")


@posix
def test_platform_ends_a_command_on_a_machine_too_busy_to_look_at(home: Home) -> None:
    """Others that fork without an end, or a look that takes longer than the time-out, keep no command from its end."""
    if sys.platform != "linux":
        raise Skip("only Linux has /proc")
    busy = """
import itertools
q.become_worker(lambda: None)
start = lambda: q.Process(["sleep", "600"], os.getcwd(), dict(os.environ), sys.argv[1], "t@h")
process, made, seconds = start(), itertools.count(q._newest_pid()), itertools.count(step=60)
q._newest_pid = lambda: next(made)
print(process.end(0), process.poll().signal)
process, time.monotonic = start(), lambda: next(seconds)
process.end(0)
while not process.poll():
    time.sleep(0.01)
print(process.poll().signal)"""
    same(finished(child(home, busy, str(home.work / "log"))).out, "[] 9\n9\n")


@posix
def test_platform_looks_at_all_processes_of_a_large_machine(home: Home) -> None:
    """That the first look takes long, as it does where there are thousands of processes, does not end it."""
    if sys.platform != "linux":
        raise Skip("only Linux has /proc")
    large = """
newest, spent = q._newest_pid(), []
made = iter([newest, newest + 1, newest + 1])
def find(pid, since, find=q._find):
    if pid <= newest:
        spent.append(pid)
    return find(pid, since)
q._find, q._newest_pid, time.thread_time = find, lambda: next(made), lambda: len(spent)
print(os.getpid() in [process.pid for process in q._processes()])"""
    same(finished(child(home, large)).out, "True\n")


@posix
def test_platform_ends_what_takes_longer_to_look_at_than_there_is_time(home: Home) -> None:
    """What a dead worker left is killed, and not only stopped, though no look at the machine is done in time."""
    slow = """
process = q.Process(["sleep", "94"], HERE, dict(os.environ), HERE + "/log", "run")
leftovers = q.Leftovers("run", process.command, HERE + "/log", lambda: True)
while leftovers.end(timeout_s=0.0):
    pass
print(process.poll().signal)"""
    same(finished(child(home, slow)).out, "9\n")


@posix
def test_command_of_a_dead_worker_is_ended_whole_before_the_retry(home: Home) -> None:
    """What a killed worker's job left in other groups and sessions, or with a cleared environment, ends first."""
    with Sleepers(home) as sleepers:
        ways = [way for name, way in HIDING.items() if name != "forked twice with a cleared environment"]
        script = "\n".join(way.format(sleepers.line) for way in ways)
        look = f"{sys.executable} look.py {sleepers.line} > left; exit 0"
        home.script("look.py", LOOK)
        id = home.add(f"[ $QUEUECTL_ATTEMPT = 1 ] || {{ {look}; }}\n{script}\nwait")
        home.start()
        until(lambda: len(sleepers.pids()) >= len(ways) - 1)
        home.kill_workers()
        home.start()
        same((home.ended(id).state, home.job(id).attempts), (q.State.COMPLETED, 2))
        same((home.lines("left"), sleepers.pids()), (["0"], []))


# How many processes have just this command line?
LOOK = """
import glob, sys
count = 0
for path in glob.glob("/proc/[0-9]*/cmdline"):
    try:
        count += open(path, "rb").read().rstrip(b"\\0").split(b"\\0") == [word.encode() for word in sys.argv[1:]]
    except OSError:
        pass
print(count)
"""


@posix
def test_worker_that_cannot_be_recovered_holds_up_no_other(home: Home) -> None:
    """A dead worker's job that cannot be ended is not retried and is named; one that dies after it is recovered."""
    linux_root("setpriv")
    path, sleep = foreign(home, "setpriv", "qtother", 0o4755), foreign(home, "sleep", "qtstuck", 0o755)
    start_powerless(home, 3)
    stuck = home.add(f"{RUN_ONCE}; [ $QUEUECTL_ATTEMPT = 2 ] || {path} --reuid {ANOTHER_USER} {sleep} 99", timeout=0)
    pid = until(lambda: named("qtstuck"))[0]
    try:
        os.kill(holder(home, stuck).pid, signal.SIGKILL)
        is_named_everywhere(home, stuck, pid)
        other = home.add(f"[ $QUEUECTL_ATTEMPT = 2 ] || {waits_for('never')}", timeout=0)
        os.kill(holder(home, other).pid, signal.SIGKILL)
        same(home.ended(other).attempts, 2)
        same((home.state(stuck), home.lines("account")), ("processing", ["1"]))
        os.kill(pid, signal.SIGKILL)
        same((home.ended(stuck).state, home.lines("account")), (q.State.COMPLETED, ["1", "2"]))
    finally:
        kill_named("qtstuck")


@posix
def test_worker_leaves_alone_what_it_cannot_see(home: Home) -> None:
    """A worker in another PID namespace does not recover the job of one whose processes it cannot see, and says so."""
    linux_root("unshare")
    inside = ["unshare", "-pf", "--mount-proc", "--kill-child"]
    if subprocess.run([*inside, "true"], stderr=subprocess.DEVNULL).returncode:
        raise Skip("needs PID namespaces")
    with Sleepers(home) as sleepers:
        id = home.add(f"echo $QUEUECTL_ATTEMPT >> account; {sleepers.line}", timeout=0)
        home.start()
        until(sleepers.pids)
        with Child([*inside, *PROGRAM, "worker", "start", "--foreground"], env=home.env, stderr=subprocess.DEVNULL):
            until(lambda: len(living(home)) == 2)
            os.kill(holder(home, id).pid, signal.SIGKILL)
            until(lambda: "PID namespace" in home.out("status"))
            for said in (home.run("worker", "list").err, home.run("doctor", code=1).out, home.out("show", id)):
                assert "PID namespace" in said, said
            same((len(sleepers.pids()), home.lines("account"), home.state(id)), (1, ["1"], "processing"))
            home.start()  # one that sees all
            until(lambda: home.lines("account") == ["1", "2"])
            same(len(until(sleepers.pids)), 1)
        home.run("worker", "stop", "--now")


@posix
def test_worker_is_recovered_once_its_namespace_is_gone(home: Home) -> None:
    """The job of a worker whose PID namespace has ended is recovered."""
    linux_root("unshare")
    inside = ["unshare", "-pf", "--mount-proc", "--kill-child"]
    if subprocess.run([*inside, "true"], stderr=subprocess.DEVNULL).returncode:
        raise Skip("needs PID namespaces")
    id = home.add(f"echo $QUEUECTL_ATTEMPT >> account; [ $QUEUECTL_ATTEMPT = 2 ] || {waits_for('never')}", timeout=0)
    words = [*inside, "sh", "-c", f"{shlex.join(PROGRAM)} worker start --foreground 2>/dev/null & wait"]
    with Child(words, env=home.env):
        until(lambda: home.lines("account") == ["1"])
    home.start()
    same((home.ended(id).state, home.lines("account")), (q.State.COMPLETED, ["1", "2"]))


@posix
def test_worker_sees_off_what_a_job_has_left_behind(home: Home) -> None:
    """An idle worker leaves no zombies of what an earlier job has left running."""
    home.add(f"for n in 1 2 3 4 5 6 7 8 9; do ({waits_for('go')}) & done >/dev/null 2>&1", id="a")
    (row,) = home.start()
    home.ended("a")
    children = Path(f"/proc/{row.pid}/task/{row.pid}/children")
    if not children.exists():
        raise Skip("the system does not tell the children of a process")
    until(lambda: len(children.read_text().split()) == 9)
    touch(home, "go")
    until(lambda: children.read_text() == "")


NEVER_POLLS = "q.DUTY_S = q.MAX_IDLE_POLL_S = 3600.0\n"


@posix
def test_worker_is_recovered_with_nobody_polling(home: Home) -> None:
    """The deaths of a worker and of its neighbour start their recovery by themselves, in idle and in busy workers."""
    if not hasattr(os, "pidfd_open"):
        raise Skip("needs pidfds")
    ids = home.add_all([{"command": f"[ $QUEUECTL_ATTEMPT = 2 ] || {waits_for('go')}", "timeout": 0}] * 4)
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(child(home, NEVER_POLLS + SERVE, stderr=subprocess.DEVNULL)) for _ in range(5)]
        until(lambda: all(home.state(id) == "processing" for id in ids) and len(living(home)) == 5)
        busy = sorted((holder(home, id).id, holder(home, id).pid, id) for id in ids)
        for _, pid, _ in busy[1:3]:
            os.kill(pid, signal.SIGKILL)
        same([home.ended(id).attempts for _, _, id in busy[1:3]], [2, 2])
        touch(home, "go")
        same([home.ended(id).attempts for _, _, id in (busy[0], busy[3])], [1, 1])
        for row in living(home):
            os.kill(row.pid, signal.SIGTERM)
        for worker in workers:
            worker.wait(DEADLINE_S)


# -- kill points


def killed_once(home: Home, patch: str, command: str = RUN_ONCE) -> tuple[list[str], list[str]]:
    """A job whose first worker dies as the patch says: its own account, and what became of each attempt."""
    id = home.add(command)
    killed(child(home, patch + SERVE))
    home.start()
    job = home.ended(id)
    same((job.state, attempts_running(home)), (q.State.COMPLETED, {}))
    same(job.attempts, len(errors_of(home, id)))
    home.run("worker", "stop")
    is_well(home)
    return home.lines("account"), ["lost" if "died" in (e or "") else e or "completed" for e in errors_of(home, id)]


@posix
def test_worker_killed_before_a_claim_leaves_no_trace(home: Home) -> None:
    """A worker that dies before it has claimed costs no attempt."""
    same(killed_once(home, "q.Jobs.claim = die"), (["1"], ["completed"]))


@posix
def test_worker_killed_inside_a_claim_leaves_no_trace(home: Home) -> None:
    """A worker that dies with its claim made and not committed costs no attempt."""
    patch = "claim = q.Jobs.claim\nq.Jobs.claim = lambda *words: claim(*words) and die()"
    same(killed_once(home, patch), (["1"], ["completed"]))


@posix
def test_worker_killed_after_a_claim_costs_an_attempt(home: Home) -> None:
    """A worker that dies between claim and start loses that attempt, and the next one runs."""
    same(killed_once(home, "q.run_attempt = die"), (["2"], ["lost", "completed"]))


@posix
def test_worker_killed_after_spawn_leaves_nothing_running(home: Home) -> None:
    """What a worker left running that died after the start is ended before the next attempt begins."""
    command = "echo s$QUEUECTL_ATTEMPT >> account; [ $QUEUECTL_ATTEMPT = 2 ] || sleep 60; echo e >> account"
    patch = "q._watch = lambda *_: until('account') or die()"
    same(killed_once(home, patch, command), (["s1", "s2", "e"], ["lost", "completed"]))


@posix
def test_worker_killed_before_a_finish_counts_both_runs(home: Home) -> None:
    """A worker that dies after its command ended and before that was noted: run again, and both counted."""
    same(killed_once(home, "q.Jobs.finish = die"), (["1", "2"], ["lost", "completed"]))


@posix
def test_worker_killed_inside_a_finish_counts_both_runs(home: Home) -> None:
    """A worker that dies with its result written and not committed: run again, and both counted."""
    same(killed_once(home, "q.Jobs._keep_attempt = die"), (["1", "2"], ["lost", "completed"]))


# -- chaos


CHAOS_JOB = r"""
say() { echo "$1 $QUEUECTL_ATTEMPT $(date +%s%N)" >> "$0"; }
say start
work() { for i in 1 2 3 4; do sleep 0.0$2; say tick; done; }
case $1 in
    plain) work "$@" ;;
    session) setsid sh -c "$3" "$0" "$2" & wait ;;
    fails) work "$@"; [ $QUEUECTL_ATTEMPT -gt 1 ] || { say end; exit 1; } ;;
esac
say end
"""
CHAOS_SESSION = 'for i in 1 2 3 4; do sleep 0.0$1; echo "tick $QUEUECTL_ATTEMPT $(date +%s%N)" >> "$0"; done'


class Chaos:
    """Workers and enqueuers that are killed and stopped at random."""

    def __init__(self, home: Home, seed: int, seconds: float) -> None:
        self.home, self.chance, self.seconds = home, random.Random(seed), seconds
        self.enqueuers: list[subprocess.Popen[Any]] = []
        self.starter: subprocess.Popen[Any] | None = None
        self.asleep: dict[int, float] = {}  # when a stopped process goes on
        self.stops = self.kills = 0

    def batch(self) -> str:
        """A few jobs, a line each; each writes to a file of its own."""
        lines = []
        for n in range(self.chance.randint(1, 8)):
            id = f"c{self.chance.getrandbits(40):010x}"
            kind, pace = self.chance.choice(["plain", "session", "fails"]), str(self.chance.randint(1, 9))
            words = ["sh", "-c", CHAOS_JOB, f"{id}.run", kind, pace, CHAOS_SESSION]
            lines.append(json.dumps({"id": id, "command": words, "max_retries": 1000, "priority": n}))
        return "\n".join(lines)

    def enqueue(self) -> None:
        """Start an enqueuer, whose output outlives it."""
        (self.home.work / f"{len(self.enqueuers)}.in").write_text(self.batch())
        with open(self.home.work / f"{len(self.enqueuers)}.out", "w") as file:
            self.enqueuers.append(self.home.popen("enqueue", "--file", f"{len(self.enqueuers)}.in", stdout=file))

    def start(self) -> None:
        """Start workers, and go on at once: one that is stopped may hold the lock until it is woken."""
        if self.starter is None:
            self.starter = self.home.popen("worker", "start", "--count", "2")
        elif self.starter.poll() is not None:
            self.started()

    def started(self) -> None:
        """Whoever starts workers waits for the lock long enough; but they may be killed before they are up."""
        if self.starter:
            said = finished(self.starter).err
            assert "another program holds" not in said and "Traceback" not in said, said
        self.starter = None

    def victims(self) -> list[int]:
        """The workers and enqueuers that run; none of them is a stranger."""
        ours = pids_with(f"QUEUECTL_HOME={self.home.path}")
        workers = [row.pid for row in living(self.home) if row.pid in ours]
        enqueuers = [process.pid for process in self.enqueuers if process.poll() is None]
        return [pid for pid in workers + enqueuers if pid not in self.asleep]

    def hit(self) -> None:
        """Kill or stop somebody."""
        if not (victims := self.victims()):
            return
        pid = self.chance.choice(victims)
        if self.chance.random() < 0.2:
            self.stops += 1
            self.asleep[pid] = time.monotonic() + q.WORKER_BUSY_TIMEOUT_S + 1
        else:
            self.kills += 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP if pid in self.asleep else signal.SIGKILL)

    def wake(self, until: float) -> None:
        """Let those go on that have slept until then."""
        for pid in [pid for pid, end in self.asleep.items() if end <= until]:
            del self.asleep[pid]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def rage(self) -> None:
        """Do it all for a while, and until enough has happened."""
        began = time.monotonic()
        while time.monotonic() < began + self.seconds or not self.is_enough():
            assert time.monotonic() < began + self.seconds + DEADLINE_S, "too little happens"
            if len([p for p in self.enqueuers if p.poll() is None]) < 2:
                self.enqueue()
            if len(living(self.home)) < 4 + len(self.asleep):
                self.start()
            time.sleep(self.chance.uniform(0.05, 0.4))
            self.hit()
            self.wake(time.monotonic())
        self.wake(math.inf)
        self.started()
        for process in self.enqueuers:
            finished(process)

    def is_enough(self) -> bool:
        """Have some been killed and stopped, and have so many jobs come that an attempt was lost with a worker?"""
        jobs = self.home.store.queries.jobs()
        is_lost = any("died" in (error or "") for job in jobs for error in errors_of(self.home, job.id))
        return self.kills > 5 and self.stops > 0 and len(jobs) > 20 and is_lost

    def printed(self) -> set[str]:
        """Every id that was printed, whole."""
        return {id for n in range(len(self.enqueuers)) for id in self.home.lines(f"{n}.out")}


def check_account(job: q.Job, history: list[q.Attempt], account: list[list[str]]) -> None:
    """A job's own account of itself, words with their attempts, agrees with what queuectl has noted of it."""
    same([attempt.number for attempt in history], list(range(1, job.attempts + 1)))
    starts = [int(number) for word, number, _ in account if word == "start"]
    order = [int(number) for _, number, _ in account]
    assert starts == sorted(set(starts)), f"an attempt of {job.id} was started twice: {account}"
    assert order == sorted(order), f"two attempts of {job.id} overlapped: {account}"
    for attempt in history:
        words = [word for word, number, _ in account if int(number) == attempt.number]
        whole = words == ["start", "tick", "tick", "tick", "tick", "end"]
        assert whole or "died while it ran" in (attempt.error or ""), (job.id, attempt, words)
    same((job.state, order[-1]), (q.State.COMPLETED, job.attempts))


@posix
@alone
def test_chaos_loses_nothing_and_runs_nothing_twice(home: Home) -> None:
    """Workers and enqueuers are killed and stopped at random: nothing is lost, run twice or left running."""
    seed = int(os.environ.get("SEED") or random.randrange(10**6))
    print(f"        chaos with SEED={seed}", flush=True)
    home.run("config", "set", "backoff_base", "0.5")
    chaos = Chaos(home, seed, 120 if LONG else 15)
    chaos.rage()
    home.start(3)
    home.run("wait")
    until(lambda: len(home.store.workers.all()) == len(living(home)), "the dead are recovered")
    jobs = home.store.queries.jobs()
    assert chaos.printed() <= {job.id for job in jobs}
    for job in jobs:
        check_account(job, home.history(job.id), [line.split() for line in home.lines(f"{job.id}.run")])
    home.run("worker", "stop")
    same(attempts_running(home), {})
    is_well(home)


# -- writes that fail


class Fault(NamedTuple):
    """What becomes of one system call: the n-th of its name."""

    call: str
    nth: int
    how: str

    def injection(self) -> str:
        """In strace's words. A full disk stays so for two calls, one that fails does so once."""
        which = f"{self.nth}..{self.nth + 1}" if self.how == "ENOSPC" else str(self.nth)
        return f"{self.call}:{'signal' if self.how == 'KILL' else 'error'}={self.how}:when={which}"


class Calls(NamedTuple):
    """The writes in a log of strace, each with its number among those of its name: before and after the first job."""

    before: list[tuple[str, int]]
    after: list[tuple[str, int]]


def calls_in(log: str) -> Calls:
    """What a process wrote, and not what it started."""
    calls, numbers, is_after = Calls([], []), collections.Counter[str](), False
    for pid, name in re.findall(r"^(\d+) +(\w+)\(", log, re.MULTILINE):
        if not log.startswith(f"{pid} "):
            is_after = is_after or name == "execve"
        elif name != "execve":
            numbers[name] += 1
            calls[is_after].append((name, numbers[name]))
    return calls


def faults_at(calls: list[tuple[str, int]]) -> list[Fault]:
    """About 25 faults, evenly spread; with --long all of them. What waits for the disk is rare: each of it fails."""
    every = [Fault(*call, how) for call in calls for how in ("EIO", "ENOSPC", "KILL")]
    step = 1 if LONG else -(-len(every) // 25)
    step += step > 1 and step % 3 == 0  # so that each kind of fault comes
    return [fault for n, fault in enumerate(every) if n % step == 0 or (fault.call, fault.how) == ("fdatasync", "EIO")]


def struck(
    home: Home, words: Callable[[int], list[str]], part: Callable[[Calls], list[tuple[str, int]]]
) -> Iterator[tuple[int, Ran]]:
    """A command, first whole and then with a fault each time in another of its writes: the number and how it ended.

    It ends with 0, or with one line and 1, or dies where the fault is a kill. `words` makes it ready and names it.
    """
    log = home.root / "strace.log"

    def ended(n: int, inject: str = "") -> tuple[Ran, str]:
        args = words(n)
        home.store.close()
        del home.__dict__["store"]
        return finished(home.popen(*args, before=straced(log, inject))), log.read_text()

    clean, said = ended(0)
    same((clean.code, "INJECTED" in said), (0, False))
    yield 0, clean
    faults, hits = faults_at(part(calls_in(said))), 0
    assert len(faults) > 10, f"too few writes to let fail: {said}"
    for n, fault in enumerate(faults, 1):
        ran, said = ended(n, fault.injection())
        is_killed = "killed by SIGKILL" in said
        hits += is_killed or "INJECTED" in said
        wanted = (-signal.SIGKILL,) if is_killed else (0, 1)
        assert ran.code in wanted and "Traceback" not in ran.err, (fault, ran.code, ran.out, ran.err)
        assert ran.code != 1 or re.fullmatch(r"Error: [^\n]+\n", ran.err), (fault, ran.err)
        yield n, ran
    assert hits > len(faults) // 2, f"only {hits} of {faults} happened"


def is_sound(home: Home) -> None:
    """The file is whole, and counters and links are right."""
    same((home.store.upkeep.damage(), home.store.upkeep.miscounts()), ([], []))


def work_off(home: Home) -> None:
    """Let a healthy worker do all that is left, and see to what others left behind."""
    home.run("worker", "start", "--foreground", "--drain")
    same(home.store.workers.all(), [])


def states_of(home: Home, *ids: str) -> list[str]:
    """The states of jobs; nothing for those that there are not."""
    states = dict(home.sql("SELECT id, state FROM jobs"))
    return [states[id] for id in ids if id in states]


RUN_TOLD = "echo s$QUEUECTL_ATTEMPT >> $QUEUECTL_JOB_ID.run; echo e$QUEUECTL_ATTEMPT >> $QUEUECTL_JOB_ID.run"


def ran_honestly(home: Home, id: str, fails_with: str = "died while it ran") -> list[str | None]:
    """A job completed, no run of it overlapped another, and each is an attempt; the errors of its attempts."""
    job, account, errors = home.job(id), " ".join(home.lines(f"{id}.run")), errors_of(home, id)
    assert re.fullmatch(r"(?:s(\d+)(?: e\1)? ?)*", account), account
    runs = [int(number) for number in re.findall(r"s(\d+)", account)]
    same((job.state, job.attempts, runs), (q.State.COMPLETED, len(errors), sorted(set(runs))))
    same((runs[-1], errors[-1]), (job.attempts, None))
    assert all("died while it ran" in str(error) or fails_with in str(error) for error in errors[:-1]), errors
    return errors


def worker_survives(
    home: Home, ready: Callable[[str], object], part: Callable[[Calls], list[tuple[str, int]]], lost: int = 0
) -> None:
    """A worker whose writes fail does its job all the same; of one that was killed, the next does it.

    `lost` attempts were lost before.
    """

    def words(n: int) -> list[str]:
        ready(f"w{n}")
        return ["worker", "start", "--foreground", "--drain"]

    for n, ran in struck(home, words, part):
        if ran.code:  # killed, or refused before it was up
            work_off(home)
        errors = ran_honestly(home, f"w{n}")
        assert len(errors) - 1 - lost in ((0, 1) if ran.code < 0 else (0,)), (n, ran.code, ran.err, errors)
        is_sound(home)
    is_well(home)


@posix
@slow
def test_worker_whose_writes_of_a_claim_fail_loses_nothing(home: Home) -> None:
    """A write fails, or is the last, between a worker's start and its job's: the job runs as often as is noted."""
    worker_survives(home, lambda id: home.add(RUN_TOLD, id=id), lambda calls: calls.before)


@posix
@slow
def test_worker_whose_writes_of_a_result_fail_keeps_it(home: Home) -> None:
    """A write fails, or is the last, after a job has ended: the worker keeps its result, and runs nothing again."""
    worker_survives(home, lambda id: home.add(RUN_TOLD, id=id), lambda calls: calls.after)


@posix
@slow
def test_worker_whose_writes_of_a_recovery_fail_recovers_all_the_same(home: Home) -> None:
    """A write fails, or is the last, while a dead worker's job is recovered: it runs, and the lost attempt counts."""

    def ready(id: str) -> None:
        home.add(RUN_TOLD, id=id, backoff_base=0.01)
        same(home.claim(home.worker_row()).id, id)

    worker_survives(home, ready, lambda calls: calls.before, lost=1)


@posix
@slow
def test_enqueue_whose_writes_fail_tells_the_truth(home: Home) -> None:
    """A write fails, or is the last, of an `enqueue`: what it printed is stored, what it says is not stored is not."""
    # Another process holds the database open, and is killed then: whoever comes next reads all that is in the WAL.
    hold = "store = q.open_store(sys.argv[1])\nprint('open', file=sys.stderr, flush=True)\nuntil('never')"
    holders: list[Child] = []

    def words(n: int) -> list[str]:
        holders.append(child(home, hold, home.home.database))
        says(holders[-1], "open")
        return ["enqueue", "--id", f"e{n}", "--", RUN_TOLD]

    for n, ran in struck(home, words, lambda calls: calls.before):
        holders[-1].kill()
        killed(holders.pop())
        is_stored = bool(states_of(home, f"e{n}"))
        assert ran.out in ("", f"e{n}\n") and (is_stored or not ran.out), (n, ran.out)
        assert not is_stored or "nothing" not in ran.err, (n, ran.err)
        assert ran.code or ran.out, n
        is_sound(home)
    work_off(home)
    for job in home.store.queries.jobs():
        same(ran_honestly(home, job.id), [None])


@posix
@slow
def test_cancel_whose_writes_fail_is_whole_or_not_at_all(home: Home) -> None:
    """A write fails, or is the last, of a `cancel` of a family: all of it is cancelled, or none, as it says."""

    def words(n: int) -> list[str]:
        home.add_all([{"command": RUN_TOLD, "id": f"p{n}"}, {"command": RUN_TOLD, "id": f"c{n}", "after": [f"p{n}"]}])
        return ["cancel", f"p{n}"]

    for n, ran in struck(home, words, lambda calls: calls.before):
        is_done = states_of(home, f"p{n}", f"c{n}") != ["pending", "pending"]
        same(states_of(home, f"p{n}", f"c{n}"), ["cancelled", "dead"] if is_done else ["pending", "pending"])
        assert is_done or ran.code, n
        assert not is_done or "nothing" not in ran.err, (n, ran.err)
        is_sound(home)
    work_off(home)
    ran_ids = {path.stem for path in home.work.glob("*.run")}
    same(ran_ids, {job.id for job in home.store.queries.jobs() if job.state is q.State.COMPLETED})
    is_well(home)


@posix
@slow
def test_prune_whose_writes_fail_removes_no_log_of_what_stays(home: Home) -> None:
    """A write fails, or is the last, of a `prune`: no job that is left has lost its log, and the next one goes on."""

    def words(n: int) -> list[str]:
        home.store.close()
        with contextlib.closing(sqlite3.connect(home.home.database)) as db, db:
            db.executemany(
                "INSERT INTO jobs (id, command, cwd, state, attempts, created_at, updated_at, finished_at, exit_code) "
                "VALUES (?, '\"true\"', '/', 'completed', 1, 1000, 1000, 1000, 0)",
                [(f"r{n}.{each}",) for each in range(3)],
            )
        for each in range(3):
            Path(home.home.log(f"r{n}.{each}")).write_text("output")
        return ["prune", "--older-than", "1d"]

    home.run("status")
    home.add(id="stays")
    for n, ran in struck(home, words, lambda calls: calls.before):
        left = [id for (id,) in home.sql("SELECT id FROM jobs WHERE id <> 'stays'")]
        assert not left or ran.code, (n, left)
        same([id for id in left if not os.path.exists(home.home.log(id))], [])
        assert left or "nothing" not in ran.err, (n, ran.err)
        is_sound(home)
    home.run("prune", "--older-than", "1d")
    same([job["id"] for job in home.json("list")], ["stays"])


@posix
@slow
def test_restore_whose_writes_fail_leaves_the_old_queue_or_the_new(home: Home) -> None:
    """A write fails, or is the last, of `backup --restore`: the queue is whole, and the one before or the copy."""
    home.add_all([{"command": RUN_TOLD, "id": f"a{n}"} for n in range(20)])
    home.run("backup", "copy")
    old, new = {"a0", "b0"}, {f"a{n}" for n in range(20)}
    numbers: list[Any] = []  # the last that was given to a job, which none may have again

    def words(n: int) -> list[str]:
        with home.store.db.writing():
            home.store.db.run("DELETE FROM jobs")
            home.store.db.run("DELETE FROM counts")
        home.add_all([{"command": RUN_TOLD, "id": id} for id in sorted(old)])
        numbers.append(home.sql("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'"))
        return ["backup", "--restore", "copy"]

    for n, ran in struck(home, words, lambda calls: calls.before):
        found = {id for (id,) in home.sql("SELECT id FROM jobs")}
        assert found == new or (found == old and ran.code), (n, ran.code, ran.err, found)
        assert found == old or "nothing" not in ran.err, (n, ran.err)
        same(home.sql("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'") >= numbers[-1], True)
        is_sound(home)
    home.run("backup", "--restore", "copy")
    work_off(home)
    same({job.id for job in home.store.queries.jobs() if job.state is q.State.COMPLETED}, new)
    is_well(home)


# -- other clocks, process ids and users


# libfaketime takes the absolute end of a sleep, as Python gives it, for a time of its own reckoning.
SLEEPS = """
import select
time.sleep = lambda seconds: select.select([], [], [], seconds)
"""


def wrong_worker(home: Home, offset: str) -> Child:
    """A worker whose time of day is wrong by that much; `turn_clock` sets it."""
    return child(home, SLEEPS + SERVE, env={**faked_clock(home, offset), "PYTHONPATH": str(HERE)})


def with_wrong_clock(home: Home, offset: str) -> None:
    """A worker starts at a wrong time of day, dies, and one that has the right time goes on."""
    retried = home.add("[ $QUEUECTL_ATTEMPT -gt 1 ]")
    cut = home.add("sleep 600", timeout=0.5, max_retries=0)
    with wrong_worker(home, offset) as worker:
        same((home.ended(retried).state, home.job(retried).attempts), (q.State.COMPLETED, 2))
        error = home.ended(cut).error or ""
        assert "time" in error and 0.5 <= duration_of(home.history(cut)[0]) < DEADLINE_S, (error, home.history(cut))
        later = home.add("[ $QUEUECTL_ATTEMPT -gt 1 ]", backoff_base=3)
        until(lambda: home.state(later) == "failed")
        lost = home.add("echo s$QUEUECTL_ATTEMPT >> account; [ $QUEUECTL_ATTEMPT -gt 1 ] || exec sleep 600")
        until(lambda: home.lines("account") == ["s1"])
        for words in (["status"], ["list"], ["show", lost], ["metrics"], ["wait", "--timeout", "0.1", retried]):
            home.run(*words)
        worker.kill()
    home.start()
    same([home.ended(id).attempts for id in (lost, later)], [2, 2])
    same((home.lines("account"), errors_of(home, lost)), (["s1", "s2"], ["worker 1 died while it ran", None]))
    home.run("worker", "stop")
    is_well(home)


def duration_of(attempt: q.Attempt) -> float:
    """How long an attempt took by the clock of its worker."""
    return (attempt.ended_at - attempt.started_at) / 1000


@posix
def test_clock_two_hours_ahead_at_a_workers_start_does_no_harm(home: Home) -> None:
    """A worker at +2 h retries, times out and is recovered as any other; what is due by its clock runs, once."""
    due, not_due = home.add(RUN_TOLD, id="due", delay=3600), home.add(delay=86400)
    with_wrong_clock(home, "+2h")
    same((ran_honestly(home, due), home.state(not_due)), ([None], "pending"))


@posix
def test_clock_a_day_behind_at_a_workers_start_does_no_harm(home: Home) -> None:
    """A worker at -1 d retries, times out and is recovered as any other; what is due by no clock does not run."""
    not_due = home.add(delay=3600)
    with_wrong_clock(home, "-1d")
    same(home.state(not_due), "pending")


@posix
def test_clock_that_jumps_fires_nothing_twice_and_ends_nobody(home: Home) -> None:
    """The clock jumps to and fro under three workers, one of which is killed: only its job runs once more."""
    home.run("config", "set", "backoff_base", "0.2")
    told = RUN_TOLD.replace("; ", "; sleep 0.2; ")
    plain = home.add_all([{"command": told, "id": f"plain{n}"} for n in range(12)])
    fails = home.add_all([{"command": f"{told}; [ $QUEUECTL_ATTEMPT -gt 1 ]", "id": f"fails{n}"} for n in range(6)])
    plain.append(home.add(told, id="delayed", delay=3600))
    runs = home.add(waits_for("go"), timeout=600, max_retries=0, priority=1)
    with wrong_worker(home, "+0"), wrong_worker(home, "+0"), wrong_worker(home, "+0"):
        until(lambda: len(living(home)) == 3 and home.state(runs) == "processing")
        for number, offset in enumerate(["+2h", "-1d", "+0", "+400d", "-2h", "+0"] * 2, 1):
            turn_clock(home, offset)
            until(lambda count=number: completed(home, count))
            if number == 6:
                os.kill(next(row.pid for row in living(home) if row.job != runs), signal.SIGKILL)
        touch(home, "go")
        home.run("wait", *plain, *fails, runs, "--timeout", "60")
        same((home.job(runs).state, home.job(runs).attempts, len(living(home))), (q.State.COMPLETED, 1, 2))
        errors = [error for id in (*plain, *fails) for error in ran_honestly(home, id, "exit code 1")]
        lost = sum("died" in (error or "") for error in errors)
        assert lost <= 1 and errors.count(None) == 19 and 6 - lost <= errors.count("exit code 1") <= 6, errors
        home.run("worker", "stop")
    is_well(home)


@posix
def test_namespace_of_a_dead_worker_is_gone_and_its_job_runs_outside(home: Home) -> None:
    """A worker that is killed with its PID namespace: its job is recovered outside, and nothing runs twice at once."""
    id = home.add("echo s$QUEUECTL_ATTEMPT >> account; [ $QUEUECTL_ATTEMPT -gt 1 ] || exec sleep 600")
    inside = home.popen("worker", "start", "--foreground", before=namespaced())
    try:
        until(lambda: home.lines("account") == ["s1"])
        same([row["state"] for row in home.json("worker", "list")], ["busy"])
    finally:
        inside.kill()
        until(lambda: not living(home), "nobody is left in the namespace")  # whose process ids mean others here
    home.start()
    same((home.ended(id).attempts, home.lines("account")), (2, ["s1", "s2"]))
    same(errors_of(home, id), ["worker 1 died while it ran", None])
    is_well(home)


@posix
def test_namespace_of_a_worker_does_not_keep_it_from_being_stopped(home: Home) -> None:
    """A worker in a PID namespace does jobs and leaves as it is told from outside."""
    inside = home.popen("worker", "start", "--foreground", before=namespaced())
    try:
        same(home.ended(home.add()).state, q.State.COMPLETED)
        home.run("worker", "stop", "--timeout", "60")
        same(finished(inside).code, 0)
    finally:
        inside.kill()
        until(lambda: not living(home))
    is_well(home)


@posix
def test_user_without_rights_has_all_that_root_has(home: Home) -> None:
    """An ordinary user enqueues, works, loses a worker to `kill -9` and has its job ended and tried again."""
    words = as_nobody(home)
    line = "id -u >> account; [ $QUEUECTL_ATTEMPT -gt 1 ] || { setsid sleep 600 & exec sleep 600; }"
    same(home.out("enqueue", "--id", "a", "--", line, before=words), "a\n")
    home.run("worker", "start", "--count", "2", before=words)
    until(lambda: home.lines("account") == ["65534"] and len(attempts_running(home)) >= 2)
    [busy] = [row["pid"] for row in home.json("worker", "list", before=words) if row["job"]]
    os.kill(busy, signal.SIGKILL)
    home.run("wait", "a", "--timeout", "60", before=words)
    same((home.lines("account"), attempts_running(home)), (["65534"] * 2, {}))
    same({path.stat().st_uid for path in home.path.rglob("*")}, {65534})
    home.run("worker", "stop", before=words)
    assert "all is well" in home.out("doctor", before=words)


# -- the machine


@alone
def test_worker_2000_jobs_run_once_each(home: Home) -> None:
    """With four workers each of 2,000 jobs runs once, none is lost, and the counters equal the rows."""
    count = 40 if WINDOWS else 2000
    ids = home.add_all({"command": "exit 0" if WINDOWS else "echo $QUEUECTL_JOB_ID >> ran"} for _ in range(count))
    home.start(2 if WINDOWS else 4)
    until(lambda: home.store.queries.counts()[q.State.COMPLETED] == count)
    same(home.sql("SELECT count(*), min(n), max(n), count(DISTINCT job) FROM attempts"), [(count, 1, 1, count)])
    if not WINDOWS:
        same(sorted(home.lines("ran")), sorted(ids))
    counters_equal_rows(home)
    ran = home.run("worker", "stop")
    assert "locked" not in ran.out + ran.err + Path(home.home.worker_log).read_text()


@posix
def test_worker_survives_signals_that_mean_nothing_now(home: Home) -> None:
    """Neither the end of a wait that is over, nor that somebody wants a leased file, ends a worker or its job."""
    (row,) = home.start()
    home.add(f"echo up; {waits_for('go')}", id="a")
    home.until_up("a")
    for number in (signal.SIGALRM, signal.SIGIO) * 10:
        os.kill(row.pid, number)
        time.sleep(0.01)
    touch(home, "go")
    job = home.ended("a")
    same((job.state, job.attempts, home.ended(home.add("true")).worker), (q.State.COMPLETED, 1, row.id))


def test_worker_checkpoints_and_loses_nothing_where_that_fails(home: Home) -> None:
    """What workers write reaches the database itself; where that fails, their jobs do not notice."""
    home.add_all([{"command": "exit 0"}] * 5)
    program = """
q.CHECKPOINT_CHANCE = 2
made = []
def checkpoint(self, real=q.Database.checkpoint):
    made.append(1)
    if len(made) % 2:
        raise q.StoreError("full")
    real(self)
q.Database.checkpoint = checkpoint
q.serve(q.open_home(), (), True)
print(len(made) > 5)"""
    said = finished(child(home, program))
    same((said.code, said.err, said.out.splitlines()[-1]), (0, "", "True"))
    same(home.store.queries.counts()[q.State.COMPLETED], 5)


@posix
def test_worker_keeps_its_result_while_another_program_holds_the_database(home: Home) -> None:
    """A worker that cannot record tries on, never runs the command again for it, and says so in its log."""
    home.add("echo x >> ran; while [ ! -e go ]; do sleep 0.02; done", id="a", timeout=0)
    home.start()
    until(lambda: home.lines("ran"))
    with contextlib.closing(sqlite3.connect(home.home.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        (home.work / "go").touch()
        until(lambda: "another program holds" in Path(home.home.worker_log).read_text())
        other.execute("ROLLBACK")
    same((home.ended("a").state.value, home.job("a").attempts, home.lines("ran")), ("completed", 1, ["x"]))


@posix
def test_worker_leaves_when_its_home_is_gone(home: Home) -> None:
    """Workers of a home that was removed end by themselves."""
    rows = home.start(2)
    home.store.close()
    shutil.rmtree(home.path)
    until(lambda: not any(is_running(row.pid) for row in rows))


@posix
def test_worker_keeps_its_claim_when_the_disk_does_not(home: Home) -> None:
    """A job that must not run twice is run also where putting its claim on disk fails at first."""
    id, other = home.add(RUN_ONCE, on_lost="dead"), home.add()
    patch = """
def sync(store, sync=q.Database.sync, seen=[]):
    seen.append(1)
    if len(seen) == 1:
        raise q.StoreError("the disk is full")
    sync(store)
q.Database.sync = sync
q.serve(q.open_home(), [], True)"""
    finished(child(home, patch))
    same((home.state(id), home.state(other), home.lines("account")), ("completed", "completed", ["1"]))


@posix
def test_disk_full_while_a_job_ends_keeps_its_result(home: Home) -> None:
    """A worker whose disk is full while its job ends keeps the result, notes it with room, and runs nothing twice."""
    with small_disk(home) as disk:
        id = home.add(f"{RUN_ONCE}; {waits_for('go')}; exit 3", max_retries=0)
        with held(home), child(home, SERVE) as worker:
            until(lambda: home.lines("account") == ["1"])
            full = fill(disk)
            touch(home, "go")
            says(worker, "full")
            same(home.state(id), "processing")
            full.unlink()
            same((home.ended(id).state, home.job(id).exit_code), (q.State.DEAD, 3))
            same((home.lines("account"), len(home.history(id)), worker.poll()), (["1"], 1, None))
            same(home.ended(home.add()).state, q.State.COMPLETED)
            worker.kill()


@posix
def test_disk_full_while_claiming_costs_no_attempt(home: Home) -> None:
    """A worker whose disk is full when a job comes due claims it once there is room."""
    with small_disk(home) as disk, child(home, SERVE) as worker:
        until(lambda: living(home))
        id = home.add(RUN_ONCE, delay=1)
        with held(home):
            full = fill(disk)
            says(worker, "full")
            same(home.state(id), "pending")
            full.unlink()
            same((home.ended(id).attempts, home.lines("account"), worker.poll()), (1, ["1"], None))
        worker.kill()


@posix
def test_home_that_is_removed_is_left_by_its_workers(home: Home) -> None:
    """Workers whose home was removed, one idle and one busy, end their jobs, leave, and say why."""
    with Sleepers(home) as sleepers:
        home.add(sleepers.line, timeout=0)
        workers = [child(home, SERVE), child(home, SERVE)]
        until(lambda: len(living(home)) == 2 and sleepers.pids())
        until(lambda: Path(home.home.worker_log).read_text().count("started") == 2, "both are up")
        shutil.rmtree(home.path)
        for worker in workers:
            said = finished(worker).err  # who looks while half of it is there may take another for dead
            assert re.search("(home is gone|taken for dead), leaves", said) and "Traceback" not in said, said
        same((sleepers.pids(), home.path.exists()), ([], False))


@posix
def test_home_that_is_replaced_is_left_by_its_workers(home: Home) -> None:
    """Workers whose home was moved away and made anew end their jobs, leave, and let the new one alone."""
    with Sleepers(home) as sleepers:
        home.add(sleepers.line, timeout=0)
        worker = child(home, SERVE)
        until(lambda: living(home) and sleepers.pids())
        home.path.rename(home.root / "old")
        home.run("enqueue", "--id", "new", "--", "true")
        home.start()  # has the id that the old one has, but a bell of its own
        said = finished(worker).err
        assert "home is gone, leaves" in said and "Traceback" not in said, said
        same((sleepers.pids(), len(home.json("worker", "list"))), ([], 1))
        same([(job["id"], job["state"]) for job in home.json("list")], [("new", "completed")])


@posix
def test_clock_set_back_by_an_hour_keeps_retries_due(home: Home) -> None:
    """The clock goes back by an hour: a retry comes once its backoff is over, and what runs runs on."""
    set_clock(home, 0)
    fails = home.add("[ $QUEUECTL_ATTEMPT = 2 ]")
    runs = home.add(waits_for("go"), timeout=1800, max_retries=0)
    with child(home, CLOCK + SERVE) as one, child(home, CLOCK + SERVE) as two:
        until(lambda: home.state(fails) == "failed" and home.state(runs) == "processing")
        set_clock(home, -3600)
        began = time.monotonic()
        same((home.ended(fails).state, home.job(fails).attempts), (q.State.COMPLETED, 2))
        assert time.monotonic() - began > 0.5  # and long before the hour is over: `ended` does not wait for that
        touch(home, "go")
        same((home.ended(runs).state, home.job(runs).attempts), (q.State.COMPLETED, 1))
        same((one.poll(), two.poll()), (None, None))
        home.run("metrics")
        home.run("show", runs)
        home.run("worker", "stop")
    is_well(home)


@posix
def test_clock_set_forward_by_an_hour_ends_nobody(home: Home) -> None:
    """The clock goes forward by an hour: what is due then runs, what runs is not timed out, and nobody is dead."""
    set_clock(home, 0)
    soon, later = home.add(delay=1800), home.add(delay=86400)
    runs = home.add(waits_for("go"), timeout=1800, max_retries=0)
    with child(home, CLOCK + SERVE) as one, child(home, CLOCK + SERVE) as two:
        until(lambda: home.state(runs) == "processing")
        set_clock(home, 3600)
        same(home.ended(soon).state, q.State.COMPLETED)
        same((home.state(runs), home.state(later)), ("processing", "pending"))
        touch(home, "go")
        same((home.ended(runs).state, home.job(runs).attempts), (q.State.COMPLETED, 1))
        same((one.poll(), two.poll()), (None, None))
        home.run("worker", "stop")


@posix
@alone
def test_suspended_workers_run_each_job_once(home: Home) -> None:
    """What is stopped and goes on was not dead: one worker beside others, and then everything of a home."""
    suspended_s = 60 if LONG else 2.5 * q.DUTY_S
    command = "echo $QUEUECTL_JOB_ID start >> account; " + waits_for("go") + "; echo $QUEUECTL_JOB_ID end >> account"
    ids = home.add_all([{"command": command, "timeout": 0}] * 3)
    home.start(3)
    until(lambda: len(home.lines("account")) == 3)
    home.start()  # one that has nothing to do but to look after the others
    for stopped in ([living(home)[0].pid], list(pids_with(f"QUEUECTL_HOME={home.path}"))):
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(suspended_s if number == signal.SIGSTOP else 0)
    touch(home, "go")
    same([(home.ended(id).state, home.job(id).attempts) for id in ids], [(q.State.COMPLETED, 1)] * 3)
    same(sorted(home.lines("account")), sorted(f"{id} {word}" for id in ids for word in ("start", "end")))
    log = Path(home.home.worker_log).read_text()
    assert "recovered" not in log and "dead" not in log, log
    same(len(living(home)), 4)


@posix
def test_descriptors_used_up_fail_an_attempt_and_nothing_else(home: Home) -> None:
    """A worker without a free descriptor fails attempts with the reason, lives, and works once it has some."""
    if sys.platform != "linux":
        raise Skip("only Linux can take descriptors from a process")
    import resource

    pid = home.start()[0].pid
    same(home.ended(home.add()).state, q.State.COMPLETED)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (10, hard))  # it has more, and a shell needs one that is higher
    id = home.add(RUN_ONCE, max_retries=100, backoff_base=1)
    until(lambda: any("Too many open files" in (error or "") for error in errors_of(home, id)))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    job = home.ended(id)
    same((job.state, home.lines("account")), (q.State.COMPLETED, [str(job.attempts)]))
    same([row.pid for row in living(home)], [pid])


@posix
def test_descriptors_few_from_the_start_are_one_line(home: Home) -> None:
    """With hardly a descriptor a command works, or says in one line that it cannot; no job is lost or run twice."""
    home.run("status")
    codes = collections.defaultdict(set)
    enqueue, start = ["enqueue", "--max-retries", "0", "--", RUN_ONCE], ["worker", "start", "--foreground", "--drain"]
    run = "import asyncio, ctypes, logging, socket, encodings.idna\nq.cli(sys.argv[1:])"
    for most in range(4, 13):
        for words in (enqueue, start):
            with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
                limit = f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({most}, {most}))\n"
                process = child(home, run.replace("q.cli", limit + "q.cli"), *words, stdout=out, stderr=err)
                codes[words[0]].add(process.wait(DEADLINE_S))
                err.seek(0)
                said = err.read().decode()
            assert "Traceback" not in said and (process.returncode == 0 or "Error: " in said), (most, words, said)
    same(codes, {"enqueue": {0, 1}, "worker": {0, 1}})
    home.start(1, "--drain")
    until(lambda: not home.store.workers.all())
    done = [home.state(job.id) for job in home.store.queries.jobs()]
    same(len(home.lines("account")), done.count("completed"))
    assert set(done) <= {"completed", "dead"}, done


@posix
@alone
def test_crowd_of_workers_and_enqueuers_never_meets_a_lock(home: Home) -> None:
    """32 workers and 32 enqueuers at once: no lock is seen, each job runs once, each slot is held once."""
    rows = home.start(32)
    same(sorted(row.slot for row in rows), list(range(1, 33)))
    (home.work / "batch").write_text('{"command": "echo $QUEUECTL_JOB_ID >> account"}\n' * 10)
    crowd = [home.popen("enqueue", "--file", "batch") for _ in range(32)]
    rans = [finished(process) for process in crowd]
    same({(ran.code, ran.err) for ran in rans}, {(0, "")})
    ids = sorted(id for ran in rans for id in ran.out.split())
    home.run("wait")
    same((len(ids), sorted(home.lines("account"))), (320, ids))
    log = Path(home.home.worker_log).read_text()
    assert "holds" not in log and "recovered" not in log, log
    same(len(living(home)), 32)
    home.run("worker", "stop")
    is_well(home)


@posix
def test_long_writer_does_not_cost_a_result(home: Home) -> None:
    """A program that holds the database while a job ends: its result is kept and noted later, and it runs once."""
    id = home.add(f"{RUN_ONCE}; {waits_for('go')}; exit 3", max_retries=0)
    with child(home, "q.WORKER_BUSY_TIMEOUT_S = 0.2" + SERVE) as worker:
        until(lambda: home.lines("account") == ["1"])
        with held(home, "BEGIN EXCLUSIVE"):
            touch(home, "go")
            says(worker, "another program holds")
        job = home.ended(id)
        same((job.state, job.attempts, job.exit_code, home.lines("account")), (q.State.DEAD, 1, 3, ["1"]))
        same(home.ended(home.add()).state, q.State.COMPLETED)
        worker.kill()


# ---- control


def test_worker_cancel_ends_the_job_that_runs(home: Home) -> None:
    """`cancel` returns once the processes of a running job are ended, and the job is cancelled for good."""
    home.add(sleeping(600), id="a", timeout=0)
    home.start()
    home.until_up("a")
    home.run("cancel", "a")
    same((home.state("a"), home.history("a")[0].error), ("cancelled", "cancelled"))
    same(home.ended(home.add()).state.value, "completed")


@posix
def test_worker_cancel_ends_the_whole_tree(home: Home) -> None:
    """`cancel` also ends a deaf child in another session."""
    home.store.config.set("kill_grace", 0.1)
    home.add(f"{shlex.quote(sys.executable)} {home.script('deaf.py', DEAF)} pids & wait", id="a", timeout=0)
    home.start()
    (pid,) = map(int, until(lambda: home.lines("pids")))
    home.run("cancel", "a")
    same((is_running(pid), home.state("a")), (False, "cancelled"))


def test_workers_are_up_when_start_returns(home: Home) -> None:
    """`worker start --count N` returns with N workers listening, in the lowest free slots."""
    count = 2 if WINDOWS else 3
    home.start(count)
    rows = home.json("worker", "list")
    same(([row["slot"] for row in rows], {row["state"] for row in rows}), ([*range(1, count + 1)], {"idle"}))


def test_workers_list_has_the_fields_of_the_contract(home: Home) -> None:
    """`worker list --json` gives id, pid, host, slot, state, job, queues and since."""
    home.add(sleeping(600), id="a", timeout=0, queue="q")
    (row,) = home.start(1, "--queue", "q", "--queue", "r")
    home.until_up("a")
    (found,) = home.json("worker", "list")
    same(set(found), {"id", "pid", "host", "slot", "state", "job", "queues", "since"})
    same((found["pid"], found["slot"], found["state"], found["job"]), (row.pid, 1, "busy", "a"))
    same(found["queues"], ["q", "r"])
    assert re.fullmatch(TIME, found["since"]) and is_running(found["pid"])


def test_workers_slot_of_the_dead_is_free_again(home: Home) -> None:
    """A new worker gets the lowest slot that no other live worker holds."""
    rows = home.start(2)
    os.kill(rows[0].pid, KILL)
    until(lambda: not q.has_living_process(home.home, rows[0]))
    home.start()
    same(sorted(row.slot for row in q.living_workers(home.home, home.store)), [1, 2])


def test_workers_stop_lets_the_job_finish(home: Home) -> None:
    """`worker stop` waits until each worker has finished its job and left."""
    script = "import os, time\nprint('up', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.02)"
    home.add([sys.executable, home.script("job.py", script)], id="a", timeout=0)
    home.add(id="b")
    home.start()
    home.until_up("a")
    process = home.popen("worker", "stop")
    until(lambda: home.store.workers.all()[0].stop)
    same((home.state("a"), process.poll()), ("processing", None))
    (home.work / "go").touch()
    same((process.communicate(timeout=DEADLINE_S)[1], process.returncode), (b"", 0))
    same((home.state("a"), home.state("b"), home.store.workers.all()), ("completed", "pending", []))


def test_workers_stop_now_gives_the_job_back_uncounted(home: Home) -> None:
    """`worker stop --now` ends the job and makes it pending, the attempt not counted."""
    home.add(sleeping(600), id="a", timeout=0)
    home.start()
    home.until_up("a")
    home.run("worker", "stop", "--now")
    same((home.state("a"), home.job("a").attempts, home.store.workers.all()), ("pending", 0, []))
    assert "given back" in str(home.history("a")[0].error)


@posix
def test_workers_stop_now_ends_the_whole_tree(home: Home) -> None:
    """`worker stop --now` also ends a deaf child in another session."""
    home.store.config.set("kill_grace", 0.1)
    home.add(f"{shlex.quote(sys.executable)} {home.script('deaf.py', DEAF)} pids & wait", id="a", timeout=0)
    home.start()
    (pid,) = map(int, until(lambda: home.lines("pids")))
    home.run("worker", "stop", "--now")
    same((is_running(pid), home.state("a")), (False, "pending"))


def test_workers_stop_of_some_leaves_the_others(home: Home) -> None:
    """`worker stop ID` stops that worker alone; an id that no running worker has is an error, and none is told."""
    first, second = home.start(2)
    assert "no worker 99" in home.fails("worker", "stop", str(first.id), "99")
    home.fails("worker", "stop", "x", code=2)
    same(home.json("worker", "stop", str(second.id)), [{"id": second.id}])
    same([(row.id, row.state) for row in home.store.workers.all()], [(first.id, "idle")])


def test_workers_scale_brings_their_number_to_n(home: Home) -> None:
    """What is missing is started, the surplus leaves, only workers of those queues count, and again it does nothing."""
    same(home.json("worker", "scale", "0"), {"started": [], "leaving": []})
    same(home.out("worker", "scale", "2"), "worker 1 started\nworker 2 started\n")
    same(home.out("worker", "scale", "2"), "")
    same(home.json("worker", "scale", "1", "--queue", "b", "--queue", "a"), {"started": [3], "leaving": []})
    same(home.out("worker", "scale", "1", "--queue", "a", "--queue", "b"), "")
    same(home.out("worker", "scale", "1"), "worker 2 leaves\n")
    until(lambda: [row.id for row in living(home)] == [1, 3])
    home.fails("worker", "scale", "-1", code=2)


def test_workers_scale_lets_the_surplus_finish(home: Home) -> None:
    """Idle workers leave first, of them the newest; a busy one ends its job, and counts no more while it leaves."""
    home.start(3)
    home.add([sys.executable, home.script("long.py", LONG_JOB)], id="a", timeout=0)
    until(lambda: home.state("a") == "processing")
    busy = next(row.id for row in living(home) if row.job)
    idle = sorted((row.id for row in living(home) if not row.job), reverse=True)
    same(home.json("worker", "scale", "1"), {"started": [], "leaving": idle})
    same(home.out("worker", "scale", "0"), f"worker {busy} leaves after job a\n")
    same(home.json("worker", "scale", "1"), {"started": [4], "leaving": []})
    touch(home, "go")
    same(home.ended("a").state, q.State.COMPLETED)
    until(lambda: [row.id for row in living(home)] == [4])


def test_workers_scale_twice_at_once_does_not_overshoot(home: Home) -> None:
    """However many calls start workers at the same moment, the number asked for stays."""
    home.run("status")
    calls = [home.popen("worker", "scale", "2") for _ in range(3)]
    same([finished(call).code for call in calls], [0, 0, 0])
    until(lambda: len(living(home)) == 2)
    same([row.state for row in living(home)], ["idle", "idle"])


def test_workers_stop_says_who_is_still_there(home: Home) -> None:
    """Where a worker is still there at the time-out the exit code is 1, and it is `stopping`."""
    home.add(sleeping(600), id="a", timeout=0)
    home.start()
    home.until_up("a")
    ran = home.run("worker", "stop", "--timeout", "0.1s", code=1)
    assert "1 of 1" in ran.err and "--now" in ran.err, ran.err
    same(home.json("worker", "list")[0]["state"], "stopping")
    same(home.json("status")["workers"], {"total": 1, "idle": 0, "busy": 0, "stopping": 1})


def test_workers_stop_without_any_is_done(home: Home) -> None:
    """Stopping where nobody runs is no error."""
    home.run("worker", "stop")


@posix
def test_workers_foreground_stays_until_told(home: Home) -> None:
    """`--foreground` is one worker that stays, says what it does, and leaves on SIGINT or SIGTERM with 0."""
    for number in (signal.SIGINT, signal.SIGTERM):
        process = home.popen("worker", "start", "--foreground")
        home.ended(home.add())
        process.send_signal(number)
        process.communicate(timeout=DEADLINE_S)
        same(process.returncode, 0)
    same(home.store.workers.all(), [])
    assert "one worker" in home.fails("worker", "start", "--foreground", "--count", "2", code=2)


@posix
def test_workers_start_where_every_stream_is_closed(home: Home) -> None:
    """A script that has closed its standard streams starts workers like any other, and is not kept waiting."""
    for streams in ("<&- >&-", "<&- >&- 2>&-", ">&-"):
        line = ["/bin/sh", "-c", f'exec "$@" {streams}', "sh", *PROGRAM, "worker", "start"]
        same(subprocess.run(line, env=home.env, timeout=DEADLINE_S).returncode, 0)
    same(len(home.store.workers.all()), 3)
    same(home.ended(home.add("echo hi")).state.value, "completed")


@posix
def test_workers_do_not_keep_what_their_starter_had_open(home: Home) -> None:
    """A pipe or lock of the script that starts a worker is not held by it."""
    reader, writer = os.pipe()
    try:
        home.start(1, pass_fds=[writer])
        os.close(writer)
        home.ended(home.add())
        same(select.select([reader], [], [], DEADLINE_S)[0], [reader])
        same(os.read(reader, 1), b"")
    finally:
        os.close(reader)


@posix
def test_workers_started_by_a_job_are_not_of_its_attempt(home: Home) -> None:
    """A worker that a job starts lives on when what the job left is ended; it even sees to that."""
    home.add(f"{shlex.join(PROGRAM)} worker start && exec sleep 600", id="a", timeout=0, on_lost="dead")
    (first,) = home.start()
    until(lambda: len(home.store.workers.all()) == 2)
    os.kill(first.pid, signal.SIGKILL)
    same(home.ended("a").state.value, "dead")
    same(home.ended(home.add()).state.value, "completed")
    same(len(q.living_workers(home.home, home.store)), 1)


# ---- commands


def test_cwd_is_expanded_and_checked_when_it_is_given(home: Home) -> None:
    """`~` means the home directory in `--cwd` and in JSON; where no job can start there, that is said at once."""
    env = {"HOME": str(home.work), "USERPROFILE": str(home.work)}
    (home.work / "sub").mkdir()
    (home.work / "file").touch()
    wanted = str(home.work / "sub")
    for words in (["--cwd=~/sub", "--", "x"], ['{"command": "x", "cwd": "~/sub"}']):
        ran = home.run("enqueue", *words, env=env)
        same((home.job(ran.out.strip()).cwd, ran.err), (wanted, ""))
    home.run("edit", home.add(id="e"), "--cwd=~/sub", env=env)
    same(home.job("e").cwd, wanted)
    for cwd, problem in (("gone", "does not exist"), ("file", "is not a directory"), ("file/x", "")):
        ran = home.run("enqueue", "--cwd", cwd, "--", "x")
        same((ran.err.count("\n"), problem in ran.err, str(home.work / cwd) in ran.err), (1, True, True))
    many = "\n".join(json.dumps({"command": "x", "cwd": "gone"}) for _ in range(3))
    same(home.run("enqueue", "-", stdin=many).err.count("\n"), 1)
    if not WINDOWS:  # there every name beside one's own is taken for that of a user
        assert "no home directory" in home.fails("enqueue", "--cwd=~no-such-user/x", "--", "x", code=2)


@posix
def test_enqueue_from_a_directory_that_is_gone(home: Home) -> None:
    """A whole `--cwd`, or one in the JSON, is all that is needed there; without it the error says so."""
    here = home.work / "here"
    here.mkdir()
    script = f"cd {here} && rmdir {here} && {shlex.join([*PROGRAM, 'enqueue'])}"
    cases = [
        ("--cwd / -- true", 0),
        ("""'{"command": "true", "cwd": "/"}'""", 0),
        ("-- true", 1),
        ("--cwd x -- true", 1),
    ]
    for words, code in cases:
        here.mkdir(exist_ok=True)
        ran = subprocess.run(["/bin/sh", "-c", f"{script} {words}"], env=home.env, capture_output=True, text=True)
        same((words, ran.returncode), (words, code))
        assert code == 0 or "--cwd with a whole path" in ran.stderr, ran.stderr
    same({job.cwd for job in home.store.queries.jobs()}, {"/"})
    here.mkdir(exist_ok=True)
    script = f"cd {here} && rmdir {here} && {shlex.join([*PROGRAM, 'backup', 'copy.db'])}"
    ran = subprocess.run(["/bin/sh", "-c", script], env=home.env, capture_output=True, text=True)
    same((ran.returncode, "current directory is gone" in ran.stderr), (1, True))


def test_worker_a_job_can_enqueue_more(home: Home) -> None:
    """A job finds the home in its environment and can enqueue into it."""
    home.add([*PROGRAM, "enqueue", "--id", "child", "--", "echo child"], id="parent")
    home.start()
    same(home.ended("parent").error, None)
    same((home.ended("child").state.value, home.log("child").split()), ("completed", [b"child"]))


@posix
def test_workers_start_says_which_are_up_where_one_is_refused(home: Home) -> None:
    """With a fork that the system refuses, those that are up are named, and how many are not, and why: exit 1."""
    home.add(id="a")
    patch = """
import errno
def refuse(*words, real=q.start_detached, left=[2]):
    left[0] -= 1
    if left[0] < 0:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
    return real(*words)
q.start_detached = refuse
q.main()
"""
    ran = finished(child(home, patch, "worker", "start", "--count", "4"))
    same((ran.code, ran.out), (1, "worker 1 started\nworker 2 started\n"))
    one_line(ran, "2 of 4 workers did not start", "Resource temporarily unavailable")
    ran = finished(child(home, patch.replace("[2]", "[0]"), "worker", "start"))
    same((ran.code, ran.out), (1, ""))
    one_line(ran, "1 of 1 worker did not start", "Resource temporarily unavailable")


JOB_KEYS = set(q.FIELDS) | {"state", "attempts", "created_at", "updated_at", "started_at", "finished_at"}
JOB_KEYS |= {"exit_code", "error", "worker"}


def test_json_of_jobs_is_as_the_contract_says(home: Home) -> None:
    """A job has every field and what became of it, times in UTC with milliseconds, absent values null."""
    home.add(id="a", run_at=1.5, tag="t", max_retries=0, env={"A": "b"})
    home.add("exit 1", id="b", max_retries=0)
    home.start()
    home.ended("a"), home.ended("b")
    a, b = home.json("list")
    same((set(a), set(b)), (JOB_KEYS, JOB_KEYS))
    same((a["run_at"], a["delay"], a["timeout"], a["key"]), ("1970-01-01T00:00:01.500Z", None, None, None))
    same((a["hold"], a["snooze"], a["max_retries"], a["command"]), (False, False, 0, "exit 0"))
    same((a["tag"], a["env"], a["priority"], a["queue"], a["on_lost"]), ("t", {"A": "b"}, 0, "default", "retry"))
    same((a["state"], b["state"], b["error"], b["exit_code"]), ("completed", "dead", "exit code 1", 1))
    for name in ("created_at", "updated_at", "started_at", "finished_at"):
        assert re.fullmatch(TIME, a[name]), a
    same(home.json("dlq", "list"), [b])
    shown = home.json("show", "a")
    same(({k: shown[k] for k in JOB_KEYS}, set(shown) - JOB_KEYS), (a, {"reason", "history", "pid"}))
    same((shown["reason"], shown["pid"]), (None, None))
    (attempt,) = shown["history"]
    same((attempt["number"], attempt["worker"], attempt["exit_code"], attempt["signal"], attempt["error"]),
         (1, a["worker"], 0, None, None))  # fmt: skip


def test_json_of_a_waiting_job_has_its_reason(home: Home) -> None:
    """`show --json` says why a job is not running."""
    home.add(id="a")
    home.add(id="b", after=["a"])
    same([home.json("show", id)["reason"] for id in "ab"], ["no worker is running", "after a"])


def test_json_of_status_and_metrics_is_as_the_contract_says(home: Home) -> None:
    """`status` counts jobs by state and workers by theirs; `metrics` has the figures."""
    home.add(id="a")
    home.sql("INSERT INTO queues VALUES ('q', 1, NULL)")
    jobs = {"pending": 1, "processing": 0, "completed": 0, "failed": 0, "dead": 0, "cancelled": 0}
    none = {"total": 0, "idle": 0, "busy": 0, "stopping": 0}
    same(home.json("status"), {"jobs": jobs, "total": 1, "workers": none, "paused": ["q"]})
    found = home.json("metrics")
    same((found["total"], found["completed"], found["dead"], found["success_rate"]), (1, 0, 0, None))
    same((set(found["wait_seconds"]), set(found["run_seconds"])), ({"p50", "p95", "p99"},) * 2)


def test_enqueue_prints_ids_one_a_line(home: Home) -> None:
    """Each form of `enqueue` prints the ids alone, in order, or as JSON whether each is new."""
    same(home.out("enqueue", '{"id": "a", "command": "x"}'), "a\n")
    same(home.out("enqueue", "-", stdin='{"id": "b", "command": "x"}\n\n{"id": "c", "command": "x"}\n'), "b\nc\n")
    (home.work / "f.jsonl").write_text('{"id": "d", "command": "x"}')
    same(home.out("enqueue", "--file", "f.jsonl"), "d\n")
    same(home.json("enqueue", "--id", "e", "--", "x"), [{"id": "e", "created": True}])
    same(home.json("enqueue", "--skip-existing", "--id", "E", "--", "x")[0]["created"], False)
    same([job.id for job in home.store.queries.jobs()], [*"abcde"])


def test_enqueue_one_word_is_a_line_and_several_are_a_list(home: Home) -> None:
    """Behind -- one word is a line for the shell, several are a program and its arguments, options and all."""
    home.run("enqueue", "--id", "a", "--", "echo hi | cat")
    home.run("enqueue", "--id", "b", "--", "echo", "--json", "--", "-x")
    same([home.job("a").command, home.job("b").command], ["echo hi | cat", ["echo", "--json", "--", "-x"]])


def test_enqueue_has_an_option_for_each_field(home: Home) -> None:
    """What JSON can say the options can say too, with units for durations."""
    home.add(id="p")
    home.run(
        "enqueue", "--id", "a", "--priority", "-3", "--max-retries", "1", "--timeout", "1h30m", "--delay", "7d",
        "--backoff-base", "1.5", "--queue", "q", "--tag", "t", "--key", "k", "--cwd", ".", "--env", "A=b=c",
        "--env", "HERE", "--after", "p", "--hold", "--on-lost", "dead", "--ok-codes", "3,4", "--no-retry-codes", "5",
        "--snooze", "--", "x", env={"HERE": "from here"},
    )  # fmt: skip
    job = home.job("a")
    same((job.priority, job.max_retries, job.timeout, job.backoff_base, job.queue), (-3, 1, 5400, 1.5, "q"))
    same((job.tag, job.key, job.cwd, job.env), ("t", "k", str(home.work), {"A": "b=c", "HERE": "from here"}))
    same((job.after, job.hold, job.on_lost, job.ok_codes, job.no_retry_codes), (["p"], True, "dead", [3, 4], [5]))
    same((bool(job.snooze), (job.run_at or 0) - job.created_at), (True, 7 * 86_400_000))
    options = {option for param in q.cli.commands["enqueue"].params for option in param.opts}
    same({f"--{name.replace('_', '-')}" for name in q.FIELDS if name != "command"} - options, set())


@posix
def test_enqueue_ctrl_c_leaves_nothing(home: Home) -> None:
    """Ctrl-C in the middle of a batch exits 130, without a word of Python, and nothing is stored."""
    home.add(id="a")
    process = home.popen("enqueue", "-", stdin=subprocess.PIPE)
    assert process.stdin
    process.stdin.write(b'{"command": "exit 0"}\n' * 20_000)  # more than a pipe holds: it is being read
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE_S)
    same((process.returncode, b"Traceback" in err, len(home.store.queries.jobs())), (130, False, 1))


def test_enqueue_wait_shows_the_output_and_exits_like_the_job(home: Home) -> None:
    """`enqueue --wait` prints the id and the output as it comes, and exits with the code of the job, 124 timed out."""
    home.start()
    same(home.out("enqueue", "--wait", "--id", "a", "--", "echo out").splitlines(), ["a", "out"])
    ran = home.run("enqueue", "--wait", "--max-retries", "0", "--", "echo out&& exit 7", code=7)
    same(ran.out.split()[1:], ["out"])
    home.run("enqueue", "--wait", "--max-retries", "0", "--timeout", "0.3", "--", sleeping(600), code=124)


def test_wait_exits_by_how_the_jobs_ended(home: Home) -> None:
    """`wait` exits 0 where all completed, 1 where some did not, 124 at the time-out; by id, tag, queue, or all."""
    home.add(id="good", tag="t")
    home.add("exit 1", id="bad", max_retries=0, queue="q")
    home.start()
    calls = [(0, ["good"]), (1, ["good", "bad"]), (0, ["--tag", "t"]), (1, ["--queue", "q"]), (1, [])]
    for code, args in calls[: 2 if WINDOWS else 5]:
        home.run("wait", *args, code=code)
    home.add(id="held", hold=True)
    home.run("wait", "held", "--timeout", "0.2s", code=124)
    home.fails("wait", "nowhere")


def test_wait_returns_when_the_job_ends(home: Home) -> None:
    """`wait` stays while a job has not ended."""
    home.add(id="a", hold=True)
    home.start()
    process = home.popen("wait", "a")
    home.ended(home.add())
    same(process.poll(), None)
    home.run("release", "a")
    process.communicate(timeout=DEADLINE_S)
    same(process.returncode, 0)


def test_hold_cancel_and_release_take_all_or_nothing(home: Home) -> None:
    """Several ids are done together or not at all; --tag and --queue choose; without any it is wrong usage."""
    for id, tag in (("a", "t"), ("b", "t"), ("c", "u")):
        home.add(id=id, tag=tag, queue=tag)
    home.store.changes.cancel(q.Selection(["c"]), 1)
    for command in ("hold", "release", "cancel")[: 1 if WINDOWS else 3]:
        home.fails(command, "a", "nowhere")
        if command != "cancel":
            home.fails(command, "a", "c")
        home.fails(command, code=2)
    same(home.json("hold", "--tag", "t"), [{"id": "a"}, {"id": "b"}])
    same([job.id for job in home.store.queries.jobs() if job.hold], ["a", "b"])
    home.run("release", "--queue", "t")
    same([job.id for job in home.store.queries.jobs() if job.hold], [])
    home.run("cancel", "--tag", "t")
    same([home.state(id) for id in "ab"], ["cancelled"] * 2)


def test_queue_list_shows_counts_pauses_and_limits(home: Home) -> None:
    """`queue list --json` is an array with each queue, its counts, pause and limit; a bad name or limit is refused."""
    home.add(queue="q")
    home.run("queue", "limit", "q", "2")
    home.run("queue", "pause", "--all")
    found = {row["queue"]: row for row in home.json("queue", "list")}
    same(set(found), {"default", "q"})
    same((found["q"]["jobs"]["pending"], found["q"]["limit"], found["default"]["paused"]), (1, 2, True))
    home.run("queue", "resume", "--all")
    home.run("queue", "limit", "q", "none")
    same(home.sql("SELECT * FROM queues"), [])
    for args in (["limit", "q", "0"], ["limit", "q", "many"], ["pause"], ["pause", "bad name"])[: 1 if WINDOWS else 4]:
        home.fails("queue", *args, code=2)


def test_prune_removes_jobs_and_their_logs(home: Home) -> None:
    """`prune` removes ended jobs older than so long, with their logs; `--dry-run` only says so."""
    home.add_all({"command": "x", "id": id} for id in "ab")
    home.store.jobs.finish(home.claim(home.worker_row()), exited(0), q.Settings(), q.now_ms() - 3_600_000)
    Path(home.home.log("a")).write_text("x")
    same(home.json("prune", "--older-than", "2h"), {"removed": 0, "dry_run": False})
    same(home.json("prune", "--older-than", "59m", "--dry-run")["removed"], 1)
    same(home.json("prune", "--older-than", "59m", "--state", "dead")["removed"], 0)
    same(os.path.exists(home.home.log("a")), True)
    home.run("prune", "--older-than", "59m")
    same(([job.id for job in home.store.queries.jobs()], os.path.exists(home.home.log("a"))), (["b"], False))


def test_purge_leaves_the_log_of_a_new_job_of_that_id(home: Home) -> None:
    """Logs go with their rows: that of a job which has taken the same id meanwhile stays, without the old output."""
    home.add("echo old&& exit 1", id="a", max_retries=0)
    home.start()
    home.ended("a")
    home.store.changes.purge_dead(q.Selection(["a"]))
    home.ended(home.add("echo new", id="a"))
    q.remove_logs(home.home, home.store, ["a"])
    same(home.log("a").split(), [b"new"])


@windows
def test_prune_survives_a_log_that_somebody_reads(home: Home) -> None:
    """A log that is open elsewhere does not keep `prune` from its work."""
    home.add(id="a")
    home.store.jobs.finish(home.claim(home.worker_row()), exited(0), q.Settings(), 1)
    Path(home.home.log("a")).write_text("x")
    with open(home.home.log("a")):
        home.run("prune")
    same(home.store.queries.jobs(), [])


def test_export_is_read_back_by_enqueue(home: Home) -> None:
    """What `export` writes `enqueue -` reads, and the jobs are the same."""
    home.add(id="a", command=["x", "ü"], tag="t", run_at="2099-01-01", env={"A": "b"}, ok_codes=[3])
    home.add(id="b", hold=True, max_retries=0, snooze=True)
    text = home.out("export")
    other = {"QUEUECTL_HOME": str(home.root / "other")}
    same(home.out("enqueue", "-", stdin=text, env=other), "a\nb\n")
    same(home.out("export", env=other), text)
    same(home.out("export", "--state", "dead"), "")


def test_doctor_finds_and_repairs(home: Home) -> None:
    """`doctor` exits 1 and says what is wrong: counters, ownerless jobs, dead workers, stray logs; --repair mends."""
    home.add(id="a")
    same(home.json("doctor"), {"ok": True, "problems": []})
    home.sql("UPDATE counts SET n = 7")
    home.sql("UPDATE jobs SET blockers = 3")
    (Path(home.home.log("stray"))).write_text("x")
    problems = "\n".join(home.json("doctor", code=1)["problems"])
    for word in ("count of pending", "job a waits", "stray.log"):
        assert word in problems, problems
    home.run("doctor", "--repair")
    counters_equal_rows(home)
    home.claim(home.worker_row())
    assert "died with job a" in home.json("doctor", code=1)["problems"][0]


def test_backup_is_whole_and_can_be_restored(home: Home) -> None:
    """A backup made while workers run holds the queue; it is restored only when none runs."""
    home.add(id="a", hold=True)
    home.start()
    home.run("backup", "copy.db")
    home.start()
    home.add(id="b", hold=True)
    assert "stop" in home.fails("backup", "--restore", "copy.db")
    home.run("worker", "stop")
    home.run("backup", "--restore", "copy.db")
    same([job.id for job in home.store.queries.jobs()], ["a"])
    home.start()
    # No id is used twice, though the copy knows of one alone; that one is dead, and is recovered.
    until(lambda: [row.id for row in home.store.workers.all()] == [3])
    home.run("worker", "stop")
    (home.work / "bad.db").write_bytes(b"not a database" * 1000)
    for name in ("gone.db", "bad.db"):
        home.fails("backup", "--restore", name)


@posix
def test_backup_replaces_nothing_but_a_file(home: Home) -> None:
    """Neither a part of the queue nor a device or a FIFO is taken for a file that a copy could replace."""
    home.add(id="a")
    os.mkfifo(home.work / "fifo")
    for name in ("queue.db", "queue.db-wal", "queue.db-shm"):
        home.fails("backup", str(home.path / name), code=2)
    home.fails("backup", "fifo", code=2)
    (home.work / "copy.db.part").write_text("what is left of another")
    home.run("backup", "copy.db")


@posix
def test_doctor_escapes_the_names_of_files(home: Home) -> None:
    """A name among the logs cannot drive the terminal of who reads about it."""
    home.run("status")
    (Path(home.home.logs) / "a\x1b[2Jb").touch()
    out = home.out("doctor", code=1)
    assert "\x1b" not in out and "a\\x1b[2Jb" in out, out


@posix
def test_doctor_leaves_what_is_not_its_own(home: Home) -> None:
    """`--repair` closes the home and the queue's files to others; a hook in it can still be run."""
    home.add(id="a")
    hook, outside = home.path / "hook", home.root / "outside"
    for path in (hook, outside):
        path.touch(0o755)
        path.chmod(0o755)
    (home.path / "link").symlink_to(outside)
    home.path.chmod(0o750)
    Path(home.home.database).chmod(0o644)
    same(home.json("doctor", "--repair"), {"ok": True, "problems": []})
    modes = [path.stat().st_mode & 0o777 for path in (home.path, Path(home.home.database), hook, outside)]
    same(modes, [0o700, 0o600, 0o755, 0o755])


@posix
def test_logs_of_a_lost_attempt(home: Home) -> None:
    """What an attempt had written before its worker died is its own."""
    home.start(2)
    home.add("echo try $QUEUECTL_ATTEMPT; test $QUEUECTL_ATTEMPT -gt 1 || kill -9 $PPID; sleep 0.1", id="a",
             backoff_base=0.01)  # fmt: skip
    home.ended("a")
    same([home.out("logs", "a", "--attempt", n) for n in "12"], ["try 1\n", "try 2\n"])


def test_logs_of_a_job_that_has_not_started_say_why(home: Home) -> None:
    """An empty log is told from one that is still to come."""
    home.add(id="a", hold=True)
    ran = home.run("logs", "a")
    same((ran.out, ran.err), ("", "job a has not started: on hold\n"))


def test_logs_of_one_attempt_alone(home: Home) -> None:
    """`logs --attempt K` prints what that attempt wrote and nothing else; there must have been one."""
    number = "%QUEUECTL_ATTEMPT%" if WINDOWS else "$QUEUECTL_ATTEMPT"
    home.add(f"echo no {number}&& exit 1", id="a", max_retries=1, backoff_base=0.01)
    home.start()
    home.ended("a")
    same([home.out("logs", "a", "--attempt", n) for n in "12"], ["no 1\n", "no 2\n"])
    home.fails("logs", "a", "--attempt", "3")


@posix
def test_logs_of_an_attempt_are_the_same_while_it_runs_and_after(home: Home) -> None:
    """The line between attempts belongs to none; `--follow --attempt` ends with that attempt, and not with the job."""
    home.add(f"printf 'no '; echo $QUEUECTL_ATTEMPT; {waits_for('go')}; rm go; exit 1", id="a", max_retries=2,
             backoff_base=0.01)  # fmt: skip
    home.start()
    for n in "123":
        until(lambda n=n: home.job("a").attempts == int(n) and home.log("a").endswith(b"no " + n.encode() + b"\n"))
        same(home.out("logs", "a", "--attempt", n), f"no {n}\n")
        with home.popen("logs", "--follow", "--attempt", n, "a") as followed:
            assert followed.stdout
            same(followed.stdout.readline(), f"no {n}\n".encode())
            touch(home, "go")
            same((followed.stdout.read(), followed.wait(DEADLINE_S)), (b"", 0))
    same([home.out("logs", "a", "--attempt", n) for n in "123"], ["no 1\n", "no 2\n", "no 3\n"])


def test_logs_follow_goes_on_until_the_job_has_ended(home: Home) -> None:
    """`logs --follow` hands on what comes while the job runs, and ends with it."""
    script = "import os, time\nprint('first', flush=True)\n"
    script += "while not os.path.exists('go'): time.sleep(0.02)\nprint('last')"
    home.add([sys.executable, home.script("slow.py", script)], id="a", timeout=0)
    home.start()
    process = home.popen("logs", "--follow", "a", text=True)
    assert process.stdout and process.stderr
    of_attempt = home.popen("logs", "--follow", "--attempt", "1", "a", text=True)
    assert of_attempt.stdout and of_attempt.stderr
    same((process.stdout.readline(), process.poll()), ("first\n", None))
    same((of_attempt.stdout.readline(), of_attempt.poll()), ("first\n", None))
    (home.work / "go").touch()
    for each in (process, of_attempt):
        assert each.stdout and each.stderr
        same((each.stdout.read(), each.wait(DEADLINE_S)), ("last\n", 0))
        each.stdout.close(), each.stderr.close()


def test_list_sorts(home: Home) -> None:
    """`list --sort` orders the rows by a column, either way."""
    home.add_all({"command": "x", "id": id, "priority": n} for n, id in enumerate("bca"))
    for sort, ids in (("id", "abc"), ("-priority", "acb"), ("seq", "bca"))[: 1 if WINDOWS else 3]:
        same("".join(job["id"] for job in home.json("list", "--sort", sort)), ids)


# How a person begins a shell, and makes it complete the words of queuectl.
SHELLS = {
    "bash": ["--norc", "--noprofile", "-i"],
    "zsh": ["-f", "-i"],
    "fish": ["--no-config", "--interactive"],
}
PREPARED = {
    "bash": 'bind "set bell-style none"; eval "$(queuectl completion bash)"',
    "zsh": 'autoload -U compinit; compinit -u -D; eval "$(queuectl completion zsh)"',
    "fish": "queuectl completion fish | source",
}


def test_list_selects_and_says_how_many_more(home: Home) -> None:
    """`list` shows at most 100 rows unless told, says how many more, and selects by state, queue and tag."""
    home.add_all({"command": "x", "id": f"n{n:03}", "queue": "q" if n % 2 else "r"} for n in range(105))
    home.add(id="t", tag="t")
    lines = home.out("list").splitlines()
    same((len([line for line in lines if line.startswith("n")]), "6 older" in lines[0]), (99, True))
    selections = [([], 106), (["--limit", "7"], 7), (["--queue", "q"], 52), (["--tag", "t"], 1)]
    selections.append((["--state", "dead"], 0))
    for args, count in selections[: 2 if WINDOWS else 5]:
        same((args, len(home.json("list", *args))), (args, count))


def test_list_next_is_the_order_of_the_claims(home: Home) -> None:
    """`list --next` gives what may start now by priority, then what is due later, and is what workers then claim."""
    now = q.now_ms()
    home.add_all([
        {"command": "x", "id": "later", "delay": 7200, "priority": 9}, {"command": "x", "id": "low", "priority": -1},
        {"command": "x", "id": "soon", "delay": 3600}, {"command": "x", "id": "high", "queue": "q", "priority": 5},
        {"command": "x", "id": "first"}, {"command": "x", "id": "held", "hold": True, "priority": 9},
        {"command": "x", "id": "after", "after": ["held"], "priority": 9}, {"command": "x", "id": "second"},
        {"command": "x", "id": "resting", "queue": "p", "priority": 9}, {"command": "x", "id": "full", "queue": "f"},
        {"command": "x", "id": "over", "queue": "f", "priority": 9},
        {"command": "x", "id": "came", "priority": 4},
    ])  # fmt: skip
    home.store.queues.set_paused(["p"], True)
    home.store.queues.set_limit("f", 1)
    worker = home.worker_row()
    same(home.store.jobs.claim(worker, ["f"], now) and home.state("over"), "processing")
    home.sql("UPDATE jobs SET due_at = 1 WHERE id = 'came'")  # its time has come since the last claim
    order = ["high", "came", "first", "second", "low", "soon", "later"]
    same([job["id"] for job in home.json("list", "--next", "20")], order)
    same(home.out("list", "--next", "3", "--columns", "id"), "high\ncame\nfirst\n")
    same(home.out("list", "--next", "3", "--queue", "q", "--columns", "id"), "high\n")
    said = home.out("list", "--next", "1").splitlines()
    same(said[-2:], ["(queue f is at its limit of 1: its jobs are not shown)",
                     "(queue p is paused: its jobs are not shown)"])  # fmt: skip
    same([home.claim(worker, now + n * 3_600_000).id for n in (0, 0, 0, 0, 0, 1, 2)], order)
    for words in (["a"], ["--tag", "t"], ["--limit", "1"], ["--sort", "id"], ["--all"], ["--state", "dead"]):
        home.fails("list", "--next", "1", *words, code=2)


def test_list_of_ids_comes_in_their_order(home: Home) -> None:
    """Named jobs are shown as they were named; those that do not exist are an error once the others are shown."""
    home.add_all({"command": "x", "id": id} for id in "abc")
    same(home.out("list", "c", "A", "c", "--columns", "id,state"), "c\tpending\na\tpending\nc\tpending\n")
    same([job["id"] for job in home.json("list", "b", "a")], ["b", "a"])
    lines = home.out("list", "b", "a").splitlines()
    same([line.split()[0] for line in lines], ["ID", "b", "a"])
    ran = home.run("list", "x", "b", *(f"y{n}" for n in range(4)), "--columns", "id", code=1)
    same((ran.out, ran.err), ("b\n", "Error: no job 'x', 'y0', 'y1', 2 more\n"))
    for words in (["--tag", "t"], ["--state", "dead"], ["--all"], ["--limit", "1"], ["--sort", "id"]):
        home.fails("list", "a", *words, code=2)


def test_list_of_thousands_of_ids_is_one_query(home: Home) -> None:
    """The states of 5,000 jobs come from one statement, in the order of the ids."""
    ids = home.add_all({"command": "x"} for _ in range(5000))[::-1]
    seen: list[str] = []
    home.store.db._connection.set_trace_callback(seen.append)
    same([job and job.id for job in home.store.queries.named(ids)], ids)
    same(len(seen), 1)


def test_list_columns_are_for_scripts(home: Home) -> None:
    """Any JSON field, with tabs between: whole, escaped, empty for null, JSON for a list; no values of variables."""
    home.add(["echo", "a\tb", "x" * 300], id="a", env={"A": "secret"}, ok_codes=[3], tag="t", run_at=1.5)
    home.add("printf '\\033[2J\x1b[2J\n'", id="b", hold=True)
    names = "id,run-at,tag,ok_codes,env,hold,priority,finished_at"
    same(home.out("list", "--columns", names).splitlines(), [
        'a\t1970-01-01T00:00:01.500Z\tt\t[3]\t{"A": "***"}\tfalse\t0\t', "b\t\t\t\t\ttrue\t0\t",
    ])  # fmt: skip
    same(home.out("list", "a", "--columns", "command"), json.dumps(["echo", "a\tb", "x" * 300]) + "\n")
    same(home.out("list", "b", "--columns", "command"), "printf '\\033[2J\\x1b[2J\\n'\n")
    same(set(q.JSON_FIELDS), set(home.json("list", "a")[0]))
    assert "priority" in home.fails("list", "--columns", "id,priorty", code=2)
    home.fails("list", "--columns", "", code=2)
    home.fails("list", "--columns", "id", "--json", code=2)


def test_list_all_has_no_limit(home: Home) -> None:
    """`list --all` shows every row, and --state may be said more than once."""
    home.add_all({"command": "x", "id": f"n{n:03}"} for n in range(105))
    home.store.changes.cancel(q.Selection(["n000"]), 1)
    same((len(home.out("list", "--all").splitlines()), len(home.out("list").splitlines())), (106, 102))
    same(len(home.json("list", "--state", "cancelled", "--state", "pending")), 105)


def test_wait_and_export_take_a_choice(home: Home) -> None:
    """`wait` and `export` are about jobs by id, tag, queue and state; with none of them, or --all, about every job."""
    home.add_all({"command": "x", "id": id, "tag": id, "queue": id} for id in "abc")
    home.store.changes.cancel(q.Selection(["a"]), 1)
    for words, ids in ((["c", "a"], "ca"), (["--tag", "b"], "b"), (["--queue", "c"], "c"), (["--all"], "abc"),
                       (["--state", "pending"], "bc"), ([], "abc")):  # fmt: skip
        same("".join(json.loads(line)["id"] for line in home.out("export", *words).splitlines()), ids)
    home.fails("export", "a", "--tag", "a", code=2)
    home.fails("export", "nowhere")
    home.run("wait", "--state", "cancelled", code=1)
    home.fails("wait", "--state", "dead")
    for words in ([], ["--all"]):
        home.run("wait", "--timeout", "0.1", *words, code=124)


def test_logs_without_an_id_are_those_of_the_newest(home: Home) -> None:
    """`logs` alone is about the job that started last, `--failed` the one that failed last; stderr says which."""
    home.store.queries.jobs()  # which makes the home
    assert "started" in home.fails("logs")
    assert "failed" in home.fails("logs", "--failed")
    for id, priority in (("old", 1), ("bad", 3), ("new", 0), ("ok", 2), ("snoozed", 4), ("off", 5)):
        home.add(id=id, priority=priority, ok_codes=[3] if id == "ok" else [], snooze=id == "snoozed", max_retries=0)
        Path(home.home.log(id)).write_text(f"log of {id}\n")
    worker = home.worker_row()
    jobs = {job.id: job for job in (home.claim(worker, n) for n in range(1000, 1006))}
    ends = {"bad": exited(1), "ok": exited(3), "snoozed": exited(75), "old": exited(0),
            "off": q.Outcome(q.EndReason.GIVEN_BACK, error="given back")}  # fmt: skip
    for n, (id, outcome) in enumerate(ends.items(), 2000):
        home.store.jobs.finish(jobs[id], outcome, q.Settings(), n)
    ran = home.run("logs")
    same((ran.out, ran.err), ("log of new\n", "job new\n"))
    ran = home.run("logs", "--failed", "--tail", "1")
    same((ran.out, ran.err), ("log of bad\n", "job bad\n"))
    home.store.jobs.finish(jobs["new"], q.Outcome(q.EndReason.TIMED_OUT, error="timed out"), q.Settings(), 3000)
    same(home.run("logs", "--failed").err, "job new\n")
    home.fails("logs", "--failed", "new", code=2)


def test_logs_without_an_id_scan_nothing(home: Home) -> None:
    """The newest attempts come from an index, however many jobs there are."""
    seen: list[str] = []
    db = home.store.db._connection
    db.set_trace_callback(seen.append)
    for find in (home.store.queries.last_started, home.store.queries.last_failed):
        with refuses(q.NotFound):
            find()
    db.set_trace_callback(None)
    plans = [" ".join(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}")) for sql in seen]
    for plan, index in zip(plans, ("jobs_started", "attempts_failed"), strict=True):
        assert index in plan and "TEMP B-TREE" not in plan, plan


def test_logs_tail_gives_the_last_lines(home: Home) -> None:
    """`logs --tail N` prints the last N lines, whole."""
    home.add(id="a")
    Path(home.home.log("a")).write_bytes(b"".join(b"%d\n" % n for n in range(50_000)))
    same([home.out("logs", "a", "--tail", n) for n in ("0", "2")], ["", "49998\n49999\n"])
    same(len(home.out("logs", "a", "--tail", "40000").splitlines()), 40_000)


def test_dlq_retry_and_purge_take_all_or_nothing(home: Home) -> None:
    """Several ids are done together or not at all; --all, --tag and --queue choose; a purge takes the log along."""
    for id, tag in (("a", "t"), ("b", "t"), ("c", "u")):
        home.add(id=id, tag=tag, max_retries=0)
    home.add(id="alive")
    worker = home.worker_row()
    for _ in range(3):
        home.store.jobs.finish(home.claim(worker), exited(1), q.Settings(), 1)
    Path(home.home.log("a")).write_text("x")
    home.fails("dlq", "retry", "a", "nowhere")
    home.fails("dlq", "purge", "a", "alive")
    home.run("dlq", "retry", "--tag", "u")
    same([home.state(id) for id in ("a", "b", "c")], ["dead", "dead", "pending"])
    home.run("dlq", "purge", "a")
    same(os.path.exists(home.home.log("a")), False)
    home.run("dlq", "purge", "--all")
    same([job.id for job in home.store.queries.jobs()], ["c", "alive"])


def test_options_that_no_integer_of_the_database_can_hold_are_refused(home: Home) -> None:
    """Every number of the command line is held to what can be stored, in one line."""
    home.run("status")
    for number in ("99999999999999999999", "9" * 5000):
        for words in (["list", "--limit", number], ["dlq", "list", "--limit", number], ["logs", "a", "--tail", number],
                      ["logs", "a", "--attempt", number], ["queue", "limit", "q", number],
                      ["worker", "start", "--count", number], ["enqueue", "--priority", number, "--", "x"],
                      ["enqueue", "--max-retries", number, "--", "x"], ["enqueue", "--ok-codes", number, "--", "x"],
                      ["config", "set", "log_max_bytes", number]):  # fmt: skip
            home.fails(*words, code=2)


def test_options_that_exclude_each_other_are_refused(home: Home) -> None:
    """What cannot be had at once is said in one line."""
    home.run("status")
    for args in (["status", "--watch"], ["metrics", "--prometheus"], ["worker", "start", "--foreground"]):
        assert "exclude" in home.fails(*args, "--json", code=2)


def test_enqueue_wait_exits_1_where_the_job_was_cancelled_between_attempts(home: Home) -> None:
    """It did not run then: how the attempt before ended is not how the job did."""
    home.start()
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    waiting = home.popen("enqueue", "--wait", "--id", "a", "--timeout", "0.1", "--backoff-base", "600", "--", *sleep)
    until(lambda: home.store.queries.exists("a") and home.state("a") == "failed")
    home.run("cancel", "a")
    same(finished(waiting).code, 1)


def test_enqueue_wait_says_what_the_output_does_not(home: Home) -> None:
    """Why a job did not start, or was ended, is said to who waits for it; an exit code speaks for itself."""
    home.start()
    ran = home.run("enqueue", "--wait", "--id", "a", "--cwd", str(home.work / "gone"), "--max-retries", "0",
                   "--", "exit 0", code=1)  # fmt: skip
    assert re.fullmatch(r"note: directory .*\njob a is dead: its directory .* does not exist\n", ran.err), ran.err
    same(home.run("enqueue", "--wait", "--max-retries", "0", "--", "exit 3", code=3).err, "")
    home.run("worker", "stop")
    ran = home.run("wait", "a", code=1)  # it has ended: no worker is needed
    assert re.fullmatch(r"1 of 1 did not complete: a is dead: its directory .* does not exist\n", ran.err), ran.err


def test_wait_names_those_that_did_not_complete(home: Home) -> None:
    """Who waited for many need not look for the ones that failed."""
    for option in ("--tag", "--queue"):
        home.fails("wait", option, "", code=2)  # most likely a variable that was not set
    home.start()
    ids = [home.add("exit 3", id=f"bad{n}", max_retries=0) for n in range(4)] + [home.add(id="good")]
    bad = ", ".join(f"bad{n} is dead: exit code 3" for n in range(3))
    same(home.run("wait", *ids, code=1).err, f"4 of 5 did not complete: {bad}, 1 more\n")
    same(home.run("wait", "good").err, "")
    same(home.run("logs", "--follow", "bad1").err, "job bad1 is dead: exit code 3\n")
    same(home.run("logs", "--follow", "good").err, "")


def test_wait_counts_those_that_failed_and_were_removed(home: Home) -> None:
    """A dead job that is pruned while somebody waits has not completed for all that."""
    home.start()
    home.ended(home.add("exit 1", id="bad", max_retries=0))
    home.ended(home.add(id="good"))
    home.add(id="held", hold=True)
    waiting = home.popen("wait", "--json", "bad", "good", "held")
    assert waiting.stderr
    same(waiting.stderr.readline().decode().strip(), "job held: on hold; queuectl release held")  # it has begun
    home.run("prune")
    home.run("queue", "pause", "default")
    home.run("release", "held")
    paused = "job held: queue default paused; queuectl queue resume default"
    same(waiting.stderr.readline().decode().strip(), paused)  # so it has looked since
    home.run("queue", "resume", "default")
    ran = finished(waiting)
    same((ran.code, json.loads(ran.out)["dead"], ran.err), (1, 1, "1 of 2 did not complete\n"))


def test_wait_says_that_a_queue_is_paused(home: Home) -> None:
    """A pause is named with the command that ends it."""
    home.add(id="a")
    home.run("queue", "pause", "default")
    said = "job a: queue default paused; queuectl queue resume default\n"
    same(home.run("wait", "--timeout", "0.1", code=124).err, said)


def test_wait_says_what_keeps_jobs_from_ending(home: Home) -> None:
    """On hold, paused, or with nobody to run them: it is said, once, to who waits, also what a parent waits for."""
    start = "queuectl worker start"
    home.add(id="first", hold=True)
    home.add(id="then", after=["first"])
    for command in (["wait", "--timeout", "1.5", "then"], ["wait", "--timeout", "0.1"]):
        same(home.run(*command, code=124).err, "job first: on hold; queuectl release first\n")
    home.run("release", "first")
    same(home.run("wait", "--timeout", "0.1", "then", code=124).err, f"job first: no worker is running; {start}\n")
    script = home.script("long.py", "import os, time\nwhile not os.path.exists('go'):\n    time.sleep(0.02)")
    home.add([sys.executable, script], id="long", priority=9, timeout=0)
    home.start()
    until(lambda: home.state("long") == "processing")
    waiting, stopping = home.popen("wait", "then"), home.popen("worker", "stop")
    assert waiting.stderr
    for why in (f"every worker is leaving; {start}", f"no worker is running; {start}"):  # as soon as that is so
        same(waiting.stderr.readline().decode().strip(), f"job first: {why}")
        touch(home, "go")
    same(finished(stopping).code, 0)
    home.start()
    same((finished(waiting).code, home.state("then")), (0, "completed"))


def test_config_get_prints_the_value_alone(home: Home) -> None:
    """`config get` prints a value that `set` takes, dashes are underscores, and `unset` brings the default back."""
    same(home.out("config", "get", "backoff_base"), "2\n")
    home.run("config", "set", "backoff-base", "1.5")
    home.run("config", "set", "job_timeout", "2m")
    same([home.out("config", "get", key) for key in ("backoff-base", "job_timeout")], ["1.5\n", "120\n"])
    same(home.json("config", "list")["backoff_base"], 1.5)
    home.run("config", "unset", "backoff_base")
    same(home.out("config", "get", "backoff_base"), "2\n")


def test_change_is_reported_as_done_whatever_fails_after_it(home: Home) -> None:
    """What comes after the commit (the wake-up, a count) cannot undo it: exit 0, the ids, and a note on stderr."""
    home.add_all([{"id": id, "command": "x", "hold": True} for id in ("r", "e")])
    job = home.add_all([{"id": "d", "command": "x", "max_retries": 0}])[0]
    home.store.jobs.finish(home.claim(home.worker_row()), exited(1), q.Settings(max_retries=0), 1)
    same(home.state(job), "dead")
    patch = """
def fail(*words, **more):
    raise q.StoreBusy("another program holds it")
q.wake_one = q.living_workers = q.remove_logs = fail
q.Queries.counts = q.Config.settings = fail
q.main()
"""
    cases = {
        ("enqueue", "--id", "a", "--", "x"): "a\n", ("release", "r"): "r released\n", ("hold", "a"): "a on hold\n",
        ("edit", "e", "--priority", "3"): "e edited: priority 0 -> 3\n", ("dlq", "retry", "d"): "d pending again\n",
        ("queue", "limit", "default", "3"): "default limit 3\n",
        ("config", "set", "max-retries", "4"): "max_retries = 4\n",
        ("config", "unset", "max-retries"): "max_retries = 3\n", ("cancel", "a"): "a cancelled\n",
        ("backup", "copy.db"): "saved to copy.db\n",
    }  # fmt: skip
    for words, out in cases.items():
        ran = finished(child(home, patch, *words))
        same((words, ran.code, ran.out), (words, 0, out))
        assert not ran.err or re.fullmatch(r"note: [^\n]+\n", ran.err), ran.err
    same([home.state(id) for id in ("a", "d")], ["cancelled", "pending"])
    same(json.loads(home.run("enqueue", "--json", "--", "x").out)[0]["created"], True)


def test_cancel_of_a_job_that_ends_or_goes_meanwhile_is_told_as_it_is(home: Home) -> None:
    """Cancelled is what was; a job that completed first, or was pruned while cancel waited, is named on stderr."""
    worker = home.worker_row()
    for id in "abc":
        home.add(id=id)
    claimed = {home.claim(worker).id for _ in "ab"}
    same(claimed, {"a", "b"})
    patch = """
def end(home, worker):
    with q.open_store(home.database) as store:
        for job in store.jobs.running_jobs(worker):
            store.jobs.finish(job, q.Outcome(q.EndReason.EXITED, 0), q.Settings(), 1)
        list(store.changes.prune([q.State.COMPLETED], 10**15, dry_run=False))
        store.intake.enqueue([("", q.check_job({"command": "x", "cwd": "/"}, 1))], 1)
    return True
q.ring = end
q.main()
"""
    ran = finished(child(home, patch, "cancel", "a", "b", "c"))
    same((ran.code, ran.out), (0, "c cancelled\n"))
    same(ran.err, "".join(f"job {id} is not cancelled but removed: it had come to its end\n" for id in "ab"))
    worker = home.worker_row()
    same(home.claim(worker).state, q.State.PROCESSING)
    [id] = [job.id for job in home.store.queries.jobs(q.Selection(states=[q.State.PROCESSING]))]
    patch = patch.replace("        list(store", "        0 and list(store")
    ran = finished(child(home, patch, "cancel", id))
    same((ran.code, ran.err), (0, f"job {id} is not cancelled but completed: it had come to its end\n"))


def test_prune_that_is_broken_off_says_what_it_has_removed(home: Home) -> None:
    """Where the database is held in the middle, the jobs removed are counted, in words and in JSON: exit 1."""
    patch = """
def remove(self, state, seq, *words, real=q.Changes._prune_batch):
    if seq:
        raise q.StoreBusy("another program holds it")
    return real(self, state, seq, *words)
q.Changes._prune_batch = remove
q.main()
"""
    for words, out in ((["prune"], ""), (["prune", "--json"], '{"removed": 100, "dry_run": false}\n')):
        home.add_all([{"command": "x"}] * 150)
        home.run("cancel", "--queue", "default")
        before = len(home.store.queries.jobs())
        ran = finished(child(home, patch, *words))
        same((ran.code, ran.out, ran.err.count("nothing was stored")), (1, out, 0))
        one_line(ran, "broken off after 100 jobs removed: another program holds it")
        same(len(home.store.queries.jobs()), before - 100)


def test_logs_of_a_job_without_output_say_what_went_wrong(home: Home) -> None:
    """`logs` of a job that could not start, or timed out in silence, gives its error on stderr; else nothing."""
    home.start()
    home.ended(home.add(["no-such-program", "x"], id="a", max_retries=0))
    home.ended(home.add([sys.executable, "-c", "import time; time.sleep(600)"], id="b", timeout=0.3, max_retries=0))
    home.ended(home.add(id="c"))
    for id, words in (("a", "cannot start no-such-program"), ("b", "timed out after 0.3 s"), ("c", "")):
        for more in ([], ["--attempt", "1"], ["--follow"], ["--tail", "5"], ["--raw"]):
            ran = home.run("logs", id, *more)
            same((id, more, ran.out, ran.err.count("\n"), words in ran.err), (id, more, "", int(bool(words)), True))


def test_export_of_ended_jobs_that_share_a_key_is_read_back_whole(home: Home) -> None:
    """Each job that has ended comes back, also where several had one key in turn; one that has not ended keeps it."""
    for id in ("a", "b"):
        home.add(id=id, key="k")
        home.run("cancel", id)
    home.add(id="c", key="k")
    lines = home.out("export")
    home.run("cancel", "c")
    home.run("prune")
    out = home.run("enqueue", "-", stdin=lines).out
    same((out.split(), [home.job(id).key for id in "abc"]), (["a", "b", "c"], [None, None, "k"]))


def test_enqueue_each_makes_a_job_of_each_line(home: Home) -> None:
    """One line makes a job for each item, in one transaction, with a tag of their own; each sees its item."""
    same(home.add("exit 0", tag="t0000004"), "j0000001")
    (home.work / "names").write_bytes("a b\r\n\nü\n".encode())
    same(home.out("enqueue", "--each", "names", "--", "echo", "{#}:{}"), "j0000002\nj0000003\n")
    same([(home.job(id).command, home.job(id).tag, home.job(id).env) for id in ("j0000002", "j0000003")], [
        (["echo", "1:a b"], "t0000002", {"QUEUECTL_ITEM": "a b", "QUEUECTL_INDEX": "1"}),
        (["echo", "2:ü"], "t0000002", {"QUEUECTL_ITEM": "ü", "QUEUECTL_INDEX": "2"}),
    ])  # fmt: skip
    same(home.json("enqueue", "-0", "--each", "-", "--", "echo", "{}", stdin="x\ny\0"), [
        {"id": "j0000004", "created": True, "tag": "t0000004x"}  # somebody has chosen t0000004
    ])  # fmt: skip
    home.out("enqueue", "--array", "1-2", "--tag", "mine", "--key", "{}", "--", "echo")
    same([home.job(id).tag for id in ("j0000005", "j0000006")], ["mine", "mine"])
    same(home.json("enqueue", "--array", "2-3", "--key", "{}", "--", "echo"), [
        {"id": "j0000006", "created": False, "tag": None}, {"id": "j0000008", "created": True, "tag": "t0000007"}
    ])  # fmt: skip


def test_enqueue_makes_jobs_of_rows_numbers_and_lines(home: Home) -> None:
    """--csv names columns, --array numbers, and of --lines each line is a command; all take the options of fields."""
    (home.work / "people.csv").write_text('name,mail\n"A, B",a@x\nC,c@x\n')
    home.out("enqueue", "--csv", "people.csv", "--id", "m-{name}", "--", "mail", "{mail}", code=2)
    home.out("enqueue", "--csv", "people.csv", "--id", "m-{#}", "--", "mail", "{mail}", "{name}", "{other}")
    same([home.job(id).command for id in ("m-1", "m-2")],
         [["mail", "a@x", "A, B", "{other}"], ["mail", "c@x", "C", "{other}"]])  # fmt: skip
    home.out("enqueue", "--array", "8-9", "--id", "n{}", "--priority", "3", "--", "echo {}.txt")
    same([(home.job(id).command, home.job(id).priority) for id in ("n8", "n9")], [("echo 8.txt", 3), ("echo 9.txt", 3)])
    home.out("enqueue", "--lines", "-", "--id", "l{#}", stdin="echo {} # one\r\n\n  exit 3\n")
    same([home.job(id).command for id in ("l1", "l2")], ["echo {} # one", "  exit 3"])
    same(home.job("l2").tag, "t0000005")


def test_enqueue_of_many_is_all_or_none(home: Home) -> None:
    """A bad item is named by its number and nothing is stored; forms exclude each other."""
    same(home.store.queries.newest_ids(), [])
    assert "item 2: " in home.fails("enqueue", "--each", "-", "--id", "{}", "--", "x", stdin="a\nb c\n", code=2)
    assert "item 2: job a exists" in home.fails("enqueue", "--each", "-", "--id", "{}", "--", "x", stdin="a\na\n")
    for args in (
        ["--array", "1-2", "-"], ["--array", "1", "--each", "-", "--", "x"], ["--lines", "-", "--", "x"],
        ["--array", "1", '{"command": "x"}'], ["--file", os.devnull, "--array", "1", "--", "x"], ["--array", "1"],
        ["--array", "1", "--"], ["-0", "--array", "1", "--", "x"], ["--array", "3-1", "--", "x"], ["--array", "1", "x"],
        ["--dry-run", "--wait", "--", "x"], ["--each", "missing", "--", "x"], ["--csv", os.devnull, "--", "x"],
    ):  # fmt: skip
        home.fails("enqueue", *args, code=2)
    same(home.out("enqueue", "--each", os.devnull, "--", "x"), "")


def test_enqueue_of_many_shows_each_job_its_item(home: Home) -> None:
    """A job finds its item and number in its environment, unless its own says otherwise; --wait waits for all."""
    show = "import os; print(*(os.environ[f'QUEUECTL_{k}'] for k in ('ITEM', 'INDEX')))"
    args = ["--id", "j{#}", "--env", "QUEUECTL_INDEX={#}0", "--", sys.executable, home.script("show.py", show)]
    home.start()
    home.out("enqueue", "--wait", "--each", "-", *args, stdin="one\ntwo words\n")
    same([home.log(id).split() for id in ("j1", "j2")], [[b"one", b"10"], [b"two", b"words", b"20"]])


@posix
def test_enqueue_each_says_on_a_terminal_how_to_follow(home: Home) -> None:
    """A person is told how many jobs there are, and by which tag to follow them."""
    said = seen_on_a_terminal(home, "enqueue", "--array", "1-500", "--", "exit 0", stream="stderr")
    assert b"500 jobs, tag t0000001; follow them: queuectl wait --tag t0000001" in said, said
    said = seen_on_a_terminal(home, "enqueue", "--array", "1-5", "--tag", "x", "--", "exit 0", stream="stderr")
    assert b"follow" not in said, said


def test_enqueue_dry_run_prints_what_enqueue_reads_back(home: Home) -> None:
    """--dry-run prints each form as JSON Lines, needs no home and makes none; read back, they are the same jobs."""
    batch = '{"command": ["a", "ü"], "delay": 5, "env": {"A": "b"}}\n{"command": "x", "tag": "y"}\n'
    for args, stdin in (
        (["--each", "-", "--key", "{}", "--", "a", "b"], "x\ny\n"), (["--priority", "4", "-"], batch),
        (['{"command": "x", "hold": true}'], ""), (["--cwd", "d", "--", "a b"], ""),
    ):  # fmt: skip
        given = home.out("enqueue", "--dry-run", *args, stdin=stdin)
        same(home.out("enqueue", "--dry-run", "-", stdin=given), given)
    same(home.json("enqueue", "--dry-run", "-", stdin=given), [json.loads(given)])
    assert not home.path.exists()
    home.out("enqueue", "-", stdin=home.out("enqueue", "--dry-run", "--array", "2", "--id", "j{}", "--", "echo {}"))
    same((home.job("j2").command, home.job("j2").cwd), ("echo 2", str(home.work)))


PEAK = """
import contextlib, resource, sys, queuectl
with contextlib.suppress(SystemExit):
    queuectl.cli(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1), file=sys.stderr)
"""


@posix
def test_enqueue_of_100000_items_takes_little_memory(home: Home) -> None:
    """The memory of an enqueue does not grow with the number of items."""
    peaks = []
    for count in (1000, 100_000):
        args = ["enqueue", "--array", f"1-{count}", "--", "gzip -k {}.log"]
        ran = subprocess.run([sys.executable, "-c", PEAK, *args], cwd=HERE, env=home.env, capture_output=True)
        same(ran.stdout.count(b"\n"), count)
        peaks.append(int(ran.stderr))
    assert peaks[1] - peaks[0] < 16_000, peaks


def test_show_has_the_process_of_what_runs(home: Home) -> None:
    """`show` gives the process id of the command that runs, and none before and after."""
    code = "import os, time\nprint(os.getpid(), flush=True)\nwhile not os.path.exists('go'): time.sleep(0.05)"
    id = home.add([sys.executable, home.script("pid.py", code)])
    same(home.json("show", id)["pid"], None)
    home.start()
    until(lambda: home.log(id).strip())
    pid = int(home.log(id))
    same(home.json("show", id)["pid"], pid)
    assert f"process    {pid}" in home.out("show", id)
    touch(home, "go")
    home.ended(id)
    same(home.json("show", id)["pid"], None)


# -- services and metrics


@posix
def test_metrics_prometheus_has_nothing_that_promtool_minds(home: Home) -> None:
    """Where Prometheus is installed, its own checker takes `metrics --prometheus` without a word."""
    checker = shutil.which("promtool")
    if not checker:
        raise Skip("promtool is not here")
    home.add(queue="slow")
    home.run("queue", "limit", "slow", "3")
    text = home.out("metrics", "--prometheus")
    ran = subprocess.run([checker, "check", "metrics"], input=text, capture_output=True, text=True)
    same((ran.returncode, ran.stdout + ran.stderr), (0, ""))


@posix
def test_service_prints_a_unit_that_systemd_takes(home: Home) -> None:
    """`service` prints a unit for this home, whatever its path holds; where systemd is, it takes it without a word."""
    verifier = shutil.which("systemd-analyze")
    for name in ("home", 'with "blank" 50%i \\x $HOME'):
        path = home.root / name
        unit = home.out("service", env={"QUEUECTL_HOME": str(path)})
        assert "--foreground" in unit and "OOMPolicy=continue" in unit, unit
        if verifier:
            file = home.root / "queuectl@1.service"
            file.write_text(unit)
            env = {**home.env, "XDG_RUNTIME_DIR": str(home.root)}
            ran = subprocess.run([verifier, "--user", "verify", file], capture_output=True, text=True, env=env)
            same((ran.returncode, ran.stdout + ran.stderr), (0, ""))


def test_service_unit_escapes_what_systemd_would_read() -> None:
    """Per cent signs, quotes, backslashes and dollars in paths reach the program as they are."""
    unit = q.service_unit("/opt/a b/python", '/srv/100%/"q"/$x.py', "/home/b\\c/%h")
    assert 'Environment="QUEUECTL_HOME=/home/b\\\\c/%%h"\n' in unit, unit
    assert 'ExecStart="/opt/a b/python" "/srv/100%%/\\"q\\"/$$x.py" worker start --foreground\n' in unit, unit


@posix
def test_service_install_writes_the_unit_once(home: Home) -> None:
    """`service --install` writes the unit, says what starts it, and replaces another only with --force."""
    config = home.root / "config"
    unit = config / "systemd" / "user" / "queuectl@.service"
    env = {"XDG_CONFIG_HOME": str(config)}
    if not q.HAS_SYSTEMD:
        raise Skip("systemd is for Linux")
    for _ in range(2):  # again is no error: it is there as it shall be
        said = home.out("service", "--install", env=env)
        same([line.strip() for line in said.splitlines() if "systemctl" in line],
             ["systemctl --user daemon-reload", "systemctl --user enable --now queuectl@1"])  # fmt: skip
        same((str(unit) in said, unit.read_text()), (True, home.out("service")))
    unit.write_text("mine")
    assert "--force" in home.fails("service", "--install", env=env)
    same(unit.read_text(), "mine")
    home.run("service", "--install", "--force", env=env)
    same((unit.read_text(), os.listdir(unit.parent)), (home.out("service"), [unit.name]))
    home.fails("service", "--force", code=2)


@windows
def test_service_says_that_it_is_for_systemd(home: Home) -> None:
    """Where there is no systemd, `service` is one line that says so."""
    for words in (["service"], ["service", "--install"]):
        assert "systemd" in home.fails(*words)


# -- what a person sees


@posix
def test_status_watch_redraws_until_ctrl_c(home: Home) -> None:
    """`status --watch` goes on until Ctrl-C, which exits 130 without a word of Python; in a pipe it has no escapes."""
    home.add()
    process = home.popen("status", "--watch")
    assert process.stdout
    text = b""
    while text.count(b"pending") < 2:
        text += process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE_S)
    same((process.returncode, err.strip(), b"\x1b" in text), (130, b"", False))


@posix
def test_status_watch_leaves_the_scroll_back_alone(home: Home) -> None:
    """On a terminal it draws on the alternate screen, and leaves that on Ctrl-C and on errors."""
    import pty

    for is_error in (False, True):
        home.store.close()
        master, slave = pty.openpty()
        process = home.popen("status", "--watch", stdout=slave, env={"TERM": "xterm"})
        os.close(slave)
        text = b""
        while text.count(b"pending") < 2:
            text += os.read(master, 4096)
        if is_error:
            home.sql("DROP TABLE queues")
        else:
            process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):
            while block := os.read(master, 4096):
                text += block
        _, err = process.communicate(timeout=DEADLINE_S)
        os.close(master)
        same((process.returncode, b"Error: " in err), (1, True) if is_error else (130, False))
        same((text.startswith(b"\x1b[?1049h"), text.endswith(b"\x1b[?1049l"), b"\x1b[2J" in text), (True, True, False))


@posix
def test_a_person_is_told_what_a_script_knows(home: Home) -> None:
    """On a terminal `enqueue` says that no worker is there, and `worker stop` what it waits for."""
    assert b"no worker is running" in seen_on_a_terminal(home, "enqueue", "--", "sleep 600", stream="stderr")
    same(home.run("enqueue", "--", "exit 0").err, "")
    home.start()
    until(lambda: home.store.queries.counts()[q.State.PROCESSING])
    same(seen_on_a_terminal(home, "enqueue", "--", "exit 0", stream="stderr"), b"")
    said = seen_on_a_terminal(home, "worker", "stop", "--timeout", "0.1", stream="stderr")
    assert b"j0000001 among them" in said, said


@posix
def test_status_is_coloured_on_a_terminal_unless_told_not_to_be(home: Home) -> None:
    """A terminal gets colour, with NO_COLOR it does not."""
    for no_colour, coloured in (("", True), ("1", False)):
        text = seen_on_a_terminal(home, "status", NO_COLOR=no_colour)
        same((b"\x1b[" in text, b"completed" in text), (coloured, True))


def test_completion_knows_ids_and_leaves_files_to_the_shell(home: Home) -> None:
    """Where an id goes those that there are, behind `--` files, for --cwd directories."""
    home.add(id="abc")

    same([completed_words(home, f"queuectl {line}") for line in ("show a", "show x", "enqueue --after a")],
         [["abc"], [], ["abc"]])  # fmt: skip
    lines = ("enqueue -- python a", "edit abc -- a", "enqueue --cwd /t")
    same([completed_words(home, f"queuectl {line}") for line in lines],
         [["file,a"], ["file,a"], ["dir,/t"]])  # fmt: skip


def completed_words(home: Home, line: str) -> list[str]:
    """What bash is told to offer at the end of a line."""
    words = line.split(" ")
    env = {"_QUEUECTL_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return [found.removeprefix("plain,") for found in home.out(env=env).split()]


def test_completion_offers_the_jobs_that_a_command_can_be_about(home: Home) -> None:
    """`dlq retry` is offered dead jobs alone, `release` those on hold, `cancel` those that have not ended."""
    home.add_all([{"command": "x", "id": "held", "hold": True}, {"command": "x", "id": "open"}])
    home.add_all([{"command": "x", "id": id} for id in ("dead", "done")])
    home.sql("UPDATE jobs SET state = 'dead' WHERE id = 'dead'")
    home.sql("UPDATE jobs SET state = 'completed' WHERE id = 'done'")
    lines = ("dlq retry ", "dlq purge d", "release ", "hold ", "cancel ", "edit ", "cancel open ", "show d", "show DO")
    offered = [completed_words(home, f"queuectl {line}") for line in lines[: 3 if WINDOWS else None]]
    wanted = [["dead"], ["dead"], ["held"], ["open"], ["open", "held"], ["dead", "open", "held"], ["held"],
              ["done", "dead"], ["done"]]  # fmt: skip
    same(offered, wanted[: len(offered)])


def test_completion_knows_queues_tags_and_words(home: Home) -> None:
    """Queues, tags, sort keys, config keys and their values, and the words of --on-lost are completed."""
    home.add(id="a", queue="fast", tag="night")
    home.add(id="b", queue="slow", tag="noon")
    home.run("queue", "pause", "slow")
    home.run("config", "set", "max-retries", "7")
    wanted = {
        "list --queue f": ["fast"], "enqueue --queue s": ["slow"], "worker start --queue ": ["default", "fast", "slow"],
        "queue resume ": ["slow"], "queue limit fast n": ["none"], "list --tag ni": ["night"],
        "enqueue --tag n": ["night", "noon"], "list --sort cr": ["created"], "enqueue --on-lost d": ["dead"],
        "config set max_r": ["max_retries"], "config set max-retries ": ["7", "3"],
        "config set on_dead ./n": ["file,./n"], "config set nonsense ": [],
    }  # fmt: skip
    for line, words in list(wanted.items())[: 3 if WINDOWS else None]:
        same((line, completed_words(home, f"queuectl {line}")), (line, words))


def test_completion_reads_a_few_rows_however_many_there_are(home: Home) -> None:
    """Ids and tags come from steps through indexes; an old job is found once enough of its id has been typed."""
    home.add_all({"command": "x", "id": f"n{n:04}", "tag": f"t{n % 3}", "hold": n == 0} for n in range(3000))
    queries = home.store.queries
    same((queries.ids_beginning("n000", tuple(q.State), None), queries.tags_beginning("")),
         ([f"n000{n}" for n in reversed(range(10))], ["t0", "t1", "t2"]))  # fmt: skip
    same((len(queries.ids_beginning("", q.OPEN, None, most=20)), queries.ids_beginning("n0", q.OPEN, True)),
         (20, ["n0000"]))  # fmt: skip
    steps: list[str] = []
    home.store.db._connection.set_trace_callback(steps.append)
    queries.ids_beginning("n", tuple(q.State), None), queries.tags_beginning("t")
    home.store.db._connection.set_trace_callback(None)
    plans = [row[3] for step in steps for row in home.sql(f"EXPLAIN QUERY PLAN {step}")]
    same([plan for plan in plans if plan.startswith("SCAN jobs")], [])


@posix
def test_completion_works_in_the_shells_that_are_here(home: Home) -> None:
    """Typed with TAB into bash, zsh and fish, an id is completed behind `--after=` and `--after `, a tag too."""
    bin = home.root / "bin"
    bin.mkdir()
    (bin / "queuectl").write_text(f'#!/bin/sh\nexec {shlex.join(PROGRAM)} "$@"\n')
    (bin / "queuectl").chmod(0o755)
    home.add(id="alpha", tag="night", hold=True)
    is_old = ["bash", "-c", "! complete -o nosort -F f c"]  # before 4.4, as on macOS
    for shell in filter(shutil.which, SHELLS):
        if shell == "bash" and subprocess.run(is_old, stderr=subprocess.DEVNULL).returncode == 0:
            continue
        lines = [PREPARED[shell]]
        lines += [f"queuectl enqueue --id {shell}{n} --tag=ni\t {after}\t -- true"
                  for n, after in enumerate(("--after=alp", "--after alp"))]  # fmt: skip
        typed_into(home, shell, bin, [*lines, "exit"])
        same([(home.job(f"{shell}{n}").after, home.job(f"{shell}{n}").tag) for n in (0, 1)], [(["alpha"], "night")] * 2)


def typed_into(home: Home, shell: str, bin: Path, lines: list[str]) -> None:
    """Type lines into an interactive shell on a terminal, the next where it has printed its prompt, to its end."""
    import pty

    path = os.pathsep.join([str(bin), home.env["PATH"]])
    env = {**home.env, "PATH": path, "PS1": "ready> ", "PROMPT": "ready> ", "TERM": "xterm", "HOME": str(home.root)}
    prompt = ["-C", "function fish_prompt; echo 'ready> '; end"] if shell == "fish" else []
    take_terminal = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
    begin = [sys.executable, "-c", f"{take_terminal}; os.execvp(sys.argv[1], sys.argv[1:])"]
    master, slave = pty.openpty()
    streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
    begin += [shell, *SHELLS[shell], *prompt]
    process = subprocess.Popen(begin, env=env, cwd=home.work, start_new_session=True, **streams)
    os.close(slave)
    text = b""
    try:
        with contextlib.suppress(OSError):  # the shell has gone
            for line in lines:
                while b"ready> " not in text:
                    assert select.select([master], [], [], DEADLINE_S)[0], text
                    text += os.read(master, 4096)
                text = b""
                os.write(master, line.encode() + b"\r")
            while os.read(master, 4096):
                pass
        process.wait(DEADLINE_S)
    finally:
        process.kill()
        os.close(master)


def test_completion_prints_a_script() -> None:
    """`completion` prints a script for each shell, which asks queuectl by its variable."""
    for shell in ("bash", "zsh", "fish"):
        assert "_QUEUECTL_COMPLETE" in in_process("completion", shell)[1]


def test_module_runs_as_the_program_does(home: Home) -> None:
    """`python -m queuectl`, which Python keeps compiled, takes the same words as the script."""
    ran = subprocess.run([sys.executable, "-m", "queuectl", "enqueue", "--id", "m", "--", "echo one"],
                         cwd=HERE, env=home.env, capture_output=True, text=True)  # fmt: skip
    same((ran.returncode, ran.stdout, ran.stderr), (0, "m\n", ""))
    same(home.json("show", "m")["command"], "echo one")


def test_man_has_every_command_option_field_and_key(home: Home) -> None:
    """The manual page has a subsection for each command with all its options, each field, key and exit code."""
    page = home.out("man").replace(r"\-", "-")
    described = dict(part.split(" [", 1) for part in page.split("\n.SS queuectl ")[1:])
    same(list(described), [name for name, _ in commands()])
    for name, command in commands():
        options = {opt for p in command.params if isinstance(p, click.Option) for opt in p.opts}
        same({opt for opt in options if not re.search(rf"\\fB(?:.*, )?{opt}\b", described[name])}, set())
    rest = page.partition("\n.SH FIELDS\n")[2]
    same([word for word in (*q.FIELDS, *q.SETTINGS, "124", "130", "NO_COLOR") if rf"\fB{word}\fR" not in rest], [])


@posix
def test_man_is_typeset_without_a_warning(home: Home) -> None:
    """groff and man take the manual page without a word, and print what is in it."""
    page = home.run("man").raw
    ways = [["groff", "-man", "-ww", "-Tutf8"], ["man", "--warnings=w", "-l", "-"]]
    here = [way for way in ways if shutil.which(way[0])]
    if not here:
        raise Skip("neither groff nor man is there")
    for way in here:
        ran = subprocess.run(way, input=page, capture_output=True, env={**home.env, "LC_ALL": "C.UTF-8"})
        same((ran.returncode, ran.stderr), (0, b""))
        text = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", ran.stdout.decode())
        assert "--skip-existing" in text and "EXIT STATUS" in text, text


@posix
def test_config_shows_no_control_characters_and_changes_none(home: Home) -> None:
    """A value with an escape is escaped where a person looks, and whole where a program does."""
    value = "echo \x1b[31mred"
    home.run("config", "set", "on_dead", value)
    same((home.out("config", "get", "on_dead"), home.json("config", "get", "on_dead")), (value + "\n", value))
    for args in (["config", "list"], ["config", "get", "on_dead"]):
        shown = seen_on_a_terminal(home, *args)
        assert b"\x1b" not in shown and b"\\x1b[31mred" in shown, shown


@posix
def test_output_that_nobody_reads_is_no_traceback(home: Home) -> None:
    """Whoever closes the pipe, or has a full disk behind it, costs neither the jobs nor a clear error."""
    for _ in range(5):
        reader, writer = os.pipe()
        os.close(reader)
        ran = finished(home.popen("enqueue", "--hold", "--", "true", stdout=writer))
        os.close(writer)
        same((ran.code, ran.err), (0, ""))
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            ran = finished(home.popen("enqueue", "-", stdin=subprocess.DEVNULL, stdout=full))
            same((ran.code, ran.err), (0, ""))
            ran = finished(home.popen("enqueue", "--hold", "--", "true", stdout=full))
        assert ran.code == 1 and re.fullmatch(r"Error: .*output.*done all the same\n", ran.err), ran.err
    same(len(home.store.queries.jobs()), 6 if os.path.exists("/dev/full") else 5)


def test_output_reaches_a_terminal_that_knows_no_emoji(home: Home) -> None:
    """On a cp1252 or ASCII standard output every command still works, without what cannot be shown."""
    home.add("echo ☠ ü", id="a")
    for encoding in ("ascii", "cp1252", "utf-8"):
        env = {"PYTHONIOENCODING": encoding}
        lines = home.run("metrics", env=env).out.splitlines()
        same([line.encode().isascii() for line in lines[:1]], [encoding != "utf-8"])
        assert lines[0].endswith("Total jobs: 1") and lines[3] == "Success rate: -", lines
        for args in (["list"], ["show", "a"], ["list", "--json"])[: 1 if WINDOWS else 3]:
            home.run(*args, env=env)


@posix
def test_output_into_a_closed_pipe_is_no_error(home: Home) -> None:
    """A reader that has seen enough ends a command without a complaint."""
    home.add_all({"command": "x" * 100} for _ in range(3000))
    process = home.popen("list", "--limit", "3000")
    assert process.stdout and process.stderr
    process.stdout.read(1)
    process.stdout.close()
    same((process.stderr.read(), process.wait(DEADLINE_S)), (b"", 0))
    process.stderr.close()


def test_version_and_help_need_no_home(home: Home) -> None:
    """`--version` and `--help` of every group work and make nothing."""
    assert q.__version__ in home.out("--version")
    for args in ([], ["worker"], ["dlq", "retry"])[: 1 if WINDOWS else 3]:
        assert "Usage: queuectl" in home.out(*args, "--help")
    same(home.path.exists(), False)


@posix
def test_enqueue_whose_output_fails_says_that_it_is_stored(home: Home) -> None:
    """Where the ids cannot be written the error is about the output, and says what has been done; a list just fails."""
    if not os.path.exists("/dev/full"):
        raise Skip("there is no /dev/full")
    with open("/dev/full", "wb") as full:
        ran = finished(home.popen("enqueue", "--id", "a", "--", "x", stdout=full))
        same(ran.code, 1)
        same(
            ran.err,
            "Error: cannot write the output: No space left on device; what was asked for is done all the same\n",
        )
        ran = finished(home.popen("list", stdout=full))
        same(ran.err, "Error: cannot write the output: No space left on device\n")
    same(home.state("a"), "pending")


@posix
def test_exit_codes_survive_an_output_that_nobody_reads(home: Home) -> None:
    """`enqueue --wait` and `wait --json` through a pipe that is closed early keep the exit code that they mean."""
    home.start()
    job = "echo one; while [ ! -e closed ]; do sleep 0.02; done; echo two; exit 7"
    for words, code in (
        (["enqueue", "--wait", "--id", "a", "--max-retries", "0", "--", job], 7),
        (["wait", "a", "--json"], 1),
    ):
        reader, writer = os.pipe()
        process = home.popen(*words, stdout=writer)
        os.close(writer)
        if code == 7:
            with open(reader, "rb", buffering=0) as seen:
                text = b""
                while b"one" not in text:
                    text += seen.read(100)
        else:
            os.close(reader)
        (home.work / "closed").touch()
        ran = finished(process)
        same((words[0], ran.code, "Broken" in ran.err), (words[0], code, False))


# -- whatever the input


GOOD: dict[str, list[Any]] = {  # legal values of the fields, so that not all of a fuzz is refused for the first
    "id": ["a", "b", "A", "c.d"], "command": ["true", ["echo", ""]], "priority": [0, -5], "max_retries": [0, 7],
    "timeout": [0, 1.5], "run_at": [1, "2030-01-31T18:00"], "delay": [0, 1e6], "backoff_base": [0.5], "queue": ["q"],
    "tag": ["t"], "key": ["k", "l"], "cwd": ["/", "."], "env": [{}, {"A": "\n"}], "after": [[], ["a"], ["b", "a"]],
    "hold": [True], "on_lost": ["dead"], "ok_codes": [[], [3]], "no_retry_codes": [[4]], "snooze": [False],
}  # fmt: skip


class Fuzz:
    """Values and texts at random, most of them nearly right."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def text(self) -> str:
        """A string, of the kinds that do harm."""
        kinds = [
            "a", "", " ", "\0", "a\0b", "\n", "a\nb", "\x1b[2J", "\r", "ä", "\u202e", "\ud800", "\udfff\ud83d", "😀",
            "../x", "/etc/passwd", "a/b", "..", ".", "a.", "-x", "-", "con", "NUL.txt", "x" * 129, "x" * 5000, "A",
            "j0000001", "%s%n", "'; DROP TABLE jobs; --", "$(reboot)", "true", "null", "1e999", "nan", "inf", "-1",
            "0x10", "1_000", "٣", "1e-400", "9" * 400, "7d", "1h30", "2030-01-31T18:00", "0000-00-00",
            "9999-12-31T23:59Z", "2030-13-01T00:00", "retry", "dead", "default", "=", "=x", "K=V",
        ]  # fmt: skip
        return self.chance.choice(kinds) + (self.chance.choice(kinds) if self.chance.random() < 0.1 else "")

    def number(self) -> int | float:
        """A number, of the kinds that do harm."""
        edges = [0, -0.0, 1, -1, 0.5, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**63, -(2**63) - 1, 10**30, 1e308,
                 1e-320, 253402300799, 253402300800, 3, 75, 255]  # fmt: skip
        return self.chance.choice(edges)

    def value(self, depth: int = 2) -> Any:
        """Any JSON value."""
        kind = self.chance.randrange(8 if depth else 5)
        if kind >= 5:
            items = [self.value(depth - 1) for _ in range(self.chance.randrange(4))]
            return items if kind < 7 else {self.text(): item for item in items}
        return [None, True, False, self.number(), self.text()][kind]

    def job(self) -> str:
        """The JSON of something that wants to be a job."""
        fields: dict[str, Any] = {"command": self.chance.choice(["true", ["true", "x"]])}
        for name in self.chance.sample([*q.FIELDS, "nonsense", "Id", ""], self.chance.randrange(5)):
            is_good = name in GOOD and self.chance.random() < 0.8
            fields[name] = self.chance.choice(GOOD[name]) if is_good else self.value()
        meant = fields if self.chance.random() < 0.95 else self.value()
        text = json.dumps(meant, ensure_ascii=self.chance.random() < 0.5)
        return self.spoiled(text) if self.chance.random() < 0.2 else text

    def spoiled(self, text: str) -> str:
        """JSON that is not quite so any more."""
        at = self.chance.randrange(len(text) + 1)
        deep = self.chance.choice([50, 100_000])
        return self.chance.choice([
            text[:at], text[at:], text[:at] + self.chance.choice('{}[]",:\\\0\x1b') + text[at:], text + text,
            text.replace("{", '{"priority": NaN, ', 1), text.replace("{", '{"timeout": -Infinity, ', 1),
            text.replace("{", '{"command": "twice", "command": "x", ', 1), text.replace("{", '{"id": "\\ud800", ', 1),
            text.replace("{", '{"priority": 1' + "0" * 5000 + ", ", 1), text.replace('"', "'"),
            text.replace("{", '{"env": ' + "[" * deep + "]" * deep + ", ", 1), "\ufeff" + text, "[" * deep,
            '{"a":' * deep,
        ])  # fmt: skip


def in_process(*words: str, stdin: bytes = b"") -> tuple[int, str, str]:
    """Run a command line in this process: exit code, stdout, stderr. Only for a test that is alone."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    stood = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            q.cli.main(list(words), prog_name="queuectl")
    except SystemExit as leaving:
        code = leaving.code
    finally:
        sys.stdin = stood
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode().replace("\r\n", "\n"))  # type: ignore[attr-defined]
    return code or 0, texts[0], texts[1]


# What a command that went well may say on stderr.
NOTES = r"(job [^\n]+ has not started: |note: |passed over )[^\n]+\n"


@contextlib.contextmanager
def fuzzing(home: Home, what: str) -> Iterator[tuple[Fuzz, Callable[..., tuple[int, str]]]]:
    """What makes the input, and what runs a command with it and sees that it behaves."""
    seed = int(os.environ.get("SEED") or random.randrange(10**6))
    print(f"        {what} with SEED={seed}", flush=True)
    home.run("status")
    with contextlib.closing(sqlite3.connect(home.home.database)) as db, ENV_LOCK:

        def version() -> int:
            return int(db.execute("PRAGMA data_version").fetchone()[0])

        def run(*words: str, stdin: bytes = b"") -> tuple[int, str]:
            before = version()  # and the words as a system hands them over, whatever they hold
            words = tuple(w.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape") for w in words)
            code, out, err = in_process(*words, stdin=stdin)
            note = (words, stdin, code, out, err)
            assert code in (0, 1, 2), note
            if code:
                assert re.fullmatch(r"Error: [^\n]+\n", err) and q.printable(err[:-1]) == err[:-1] and not out, note
                assert version() == before, f"an error changed the database: {note}"
            else:
                assert not err or re.fullmatch(NOTES, err), note
            return code, out

        os.environ["QUEUECTL_HOME"] = str(home.path)
        try:
            yield Fuzz(seed), run
        finally:
            del os.environ["QUEUECTL_HOME"]
    same((home.store.upkeep.miscounts(), home.store.upkeep.damage()), ([], []))


@alone
def test_fuzz_of_enqueue_is_stored_whole_or_refused_in_one_line(home: Home) -> None:
    """Whatever is given to `enqueue` is stored as it was meant, or refused in one line with nothing changed."""
    codes: collections.Counter[int] = collections.Counter()
    with fuzzing(home, "fuzz of enqueue") as (fuzz, run):
        for _ in range(20_000 if LONG else 1000):
            texts = [fuzz.job() for _ in range(fuzz.chance.randint(1, 3))]
            if len(texts) == 1 and fuzz.chance.random() < 0.5:
                code, out = run("enqueue", *texts)
            else:
                code, out = run("enqueue", "-", stdin="\n".join(texts).encode("utf-8", "surrogatepass"))
            codes[code] += 1
            for id in out.split():
                json.dumps(q.job_json(home.job(id)), allow_nan=False)
                assert os.path.dirname(home.home.log(id)) == str(home.path / "job_logs"), id
        assert run("list", "--json")[0] == run("status")[0] == 0
        run("list", "--limit", "100000")
    assert set(codes) == {0, 1, 2} and min(codes.values()) >= 5, codes


@alone
def test_fuzz_of_options_and_settings_is_taken_or_refused_in_one_line(home: Home) -> None:
    """Whatever is given as an option or a config value is taken, or refused in one line with nothing changed."""
    codes: collections.Counter[int] = collections.Counter()
    options = [f"--{name.replace('_', '-')}" for name in q.FIELDS if name not in ("command", "hold", "snooze")]
    with fuzzing(home, "fuzz of settings") as (fuzz, run):
        for _ in range(10_000 if LONG else 600):
            word = fuzz.text() if fuzz.chance.random() < 0.6 else str(fuzz.number())
            key = fuzz.chance.choice([*q.SETTINGS, "max-retries", fuzz.text()])
            words = fuzz.chance.choice([
                ["config", "set", key, word], ["config", "get", key], ["config", "unset", key], ["show", word],
                ["enqueue", fuzz.chance.choice(options), word, "--", fuzz.text()], ["queue", "limit", "q", word],
                ["edit", "--queue", "default", fuzz.chance.choice(options), word], ["prune", "--older-than", word],
                ["release", word], ["list", "--tag", word], ["cancel", word], ["logs", word],
            ])  # fmt: skip
            codes[run(*words)[0]] += 1
            home.store.config.settings()
    assert set(codes) == {0, 1, 2} and min(codes.values()) >= 20, codes


@posix
def test_fuzz_bytes_that_are_no_text_are_refused_in_one_line(home: Home) -> None:
    """Bytes that are no UTF-8, a nest too deep and a line too long, from a real shell: one line, and nothing stored."""
    same(home.json("list"), [])
    for words in (
        [b"enqueue", b'{"command": "\xff"}'], [b"enqueue", b"--id", b"\xff", b"--", b"x"], [b"enqueue", b"--", b"\xff"],
        [b"show", b"\xff\x1b"], [b"config", b"set", b"on_dead", b"\xff"], [b"cancel", b"--tag", b"\xff", b"a"],
    ):  # fmt: skip
        one_line(finished(subprocess.Popen([*map(os.fsencode, PROGRAM), *words], stderr=subprocess.PIPE, env=home.env)))
    for given in (b'{"command": "\xff"}', b"[" * 1_000_000, b'{"command": "' + b"x" * 10_000_000 + b'"}', b"\0" * 1000):
        one_line(home.run("enqueue", "-", stdin=given, code=2), "line 1")
    there = os.fsencode(home.root) + b"/\xff"
    os.mkdir(there)
    one_line(finished(home.popen("enqueue", "--cwd", ".", "--", "x", cwd=there)))
    same(home.json("list"), [])


# ---- the request's scenarios


def test_scenario_successful_job(home: Home) -> None:
    """A job that succeeds moves to `completed`."""
    home.run("enqueue", '{"id":"job_ok","command":"echo hello","max_retries":2}')
    home.start()
    home.ended("job_ok")
    job = home.json("show", "job_ok")
    same((job["state"], job["attempts"], job["exit_code"], job["error"]), ("completed", 1, 0, None))
    same(home.log("job_ok").split(), [b"hello"])


def test_scenario_failed_job(home: Home) -> None:
    """A job that fails is retried after base ** n seconds each time, and then moves to `dead`."""
    home.run("enqueue", '{"id":"job_fail","command":"nonexistent_cmd","max_retries":2,"backoff_base":0.3}')
    home.start()
    job = home.ended("job_fail")
    tries = home.history("job_fail")
    same((job.state.value, job.attempts, [a.number for a in tries]), ("dead", 3, [1, 2, 3]))
    same({a.exit_code for a in tries}, {9009 if WINDOWS and tries[0].exit_code == 9009 else 1 if WINDOWS else 127})
    for n in (1, 2):
        assert tries[n].started_at - tries[n - 1].ended_at >= round(0.3**n * 1000), tries


def test_scenario_dlq_retry(home: Home) -> None:
    """A dead job that is retried moves back to `pending` with no attempts made, and runs again."""
    home.add("exit 1", id="a", max_retries=1, backoff_base=0.01)
    home.start()
    home.ended("a")
    home.run("worker", "stop")
    same([job["id"] for job in home.json("dlq", "list")], ["a"])
    home.run("dlq", "retry", "a")
    same((home.state("a"), home.job("a").attempts), ("pending", 0))
    home.start()
    same((home.ended("a").state.value, home.job("a").attempts, len(home.history("a"))), ("dead", 2, 4))


def test_scenario_restart_workers(home: Home) -> None:
    """Jobs that are pending when workers stop are run by those that start later."""
    home.start()
    home.ended(home.add())
    home.run("worker", "stop")
    home.add(id="later")
    home.start()
    same(home.ended("later").state.value, "completed")


@alone
def test_scenario_multiple_workers(home: Home) -> None:
    """Workers run in parallel and no job twice."""
    workers = 2 if WINDOWS else 4
    other = "import os, sys, time\nopen(sys.argv[1], 'w').close()\n"
    other += "while len([n for n in os.listdir('.') if n.startswith('here')]) < int(sys.argv[2]): time.sleep(0.02)"
    script = home.script("meet.py", other)  # ends only once all are there at the same time
    ids = [home.add([sys.executable, script, f"here{n}", str(workers)], timeout=0) for n in range(workers)]
    home.start(workers)
    jobs = [home.ended(id) for id in ids]
    same(([job.attempts for job in jobs], len({job.worker for job in jobs})), ([1] * workers, workers))


def test_scenario_persistence(home: Home) -> None:
    """Jobs and configuration survive restarts and a kill -9 of everything."""
    (id,) = home.out("enqueue", "--priority", "3", "--", "exit 0").split()
    home.run("config", "set", "max_retries", "7")
    home.run("config", "set", "job_timeout", "0")
    home.add(sleeping(600), id="long", priority=9, on_lost="dead")
    home.start()
    home.until_up("long")
    home.kill_workers()
    same((home.json("show", id)["priority"], home.out("config", "get", "max-retries")), (3, "7\n"))
    home.start()
    same((home.ended(id).state.value, home.ended("long").state.value), ("completed", "dead"))


def test_scenario_timeout(home: Home) -> None:
    """A job that runs longer than `job_timeout` is terminated, retried and then dead."""
    home.run("config", "set", "job_timeout", "0.3")
    home.add(sleeping(600), id="a", max_retries=1, backoff_base=0.05)
    home.start()
    job = home.ended("a")
    same((job.state.value, job.attempts), ("dead", 2))
    assert all("timed out after 0.3 s" in str(a.error) for a in home.history("a"))


def test_scenario_priority(home: Home) -> None:
    """Jobs of high priority are executed first."""
    for name, priority in (("a", 1), ("b", 5), ("c", -5), ("d", 5), ("e", 0)):
        home.add(f"echo {name}>> order", priority=priority)
    home.start()
    until(lambda: home.store.queries.counts()[q.State.COMPLETED] == 5)
    same([line.strip() for line in home.lines("order")], ["b", "d", "a", "e", "c"])


# ---- docs


def document(name: str) -> str:
    """The text of a document beside this file."""
    if not (HERE / name).exists():
        raise Skip(f"{name} is not there")
    return (HERE / name).read_text(encoding="utf-8")


def commands(group: click.Group = q.cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, with the words that call it."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def test_docs_every_command_and_option_has_help() -> None:
    """Each command and each option says what it does."""
    for name, command in commands():
        assert command.help, name
        for param in command.params:
            assert not isinstance(param, click.Option) or param.help, f"{name} {param.opts}"


def test_docs_manual_has_every_command_option_field_and_key() -> None:
    """docs/manual.md names each command, option, field and config key."""
    manual = document("docs/manual.md")
    wanted = {name for name, _ in commands()} | set(q.FIELDS) | set(q.SETTINGS)
    wanted |= {opt for _, c in commands() for p in c.params for opt in p.opts if opt.startswith("--")}
    missing = [word for word in sorted(wanted) if not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", manual)]
    same(missing, [])


def run_examples(home: Home, name: str) -> None:
    """Run the ```sh blocks of a document, top to bottom in one home; all must exit 0."""
    bin = home.root / "bin"
    bin.mkdir()
    (bin / "queuectl").write_text(f'#!/bin/sh\nexec {shlex.join(PROGRAM)} "$@"\n')
    (bin / "queuectl").chmod(0o755)
    path = os.pathsep.join([str(bin), os.path.dirname(sys.executable), home.env["PATH"]])
    env = home.env | {"PATH": path, "HOME": str(home.root)}
    blocks = re.findall(r"^(<!-- not run: [^\n]+ -->\n\n?)?```sh\n(.*?)^```$", document(name), re.S | re.M)
    for marked, block in blocks:
        if not marked:
            ran = subprocess.run(["sh", "-e", "-c", block], env=env, cwd=home.work, stdin=subprocess.DEVNULL,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=DEADLINE_S)  # fmt: skip
            assert ran.returncode == 0, f"\n{block}\n{ran.stdout.decode()}"
    assert blocks, f"{name} has no examples"


@posix
def test_docs_readme_examples_run(home: Home) -> None:
    """The examples of README.md run as they stand, one after the other."""
    run_examples(home, "README.md")


@posix
def test_docs_manual_examples_run(home: Home) -> None:
    """The examples of docs/manual.md run as they stand, one after the other."""
    run_examples(home, "docs/manual.md")


def anchor_of(heading: str) -> str:
    """The anchor by which a link finds a heading."""
    return "#" + re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")


def test_docs_links_lead_somewhere() -> None:
    """Each link between the documents leads to a file that is there, and to a heading that it has."""
    broken = []
    for name in ("README.md", "docs/manual.md", "design.md"):
        prose = re.sub(r"^```.*?^```$", "", document(name), flags=re.S | re.M)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            file, _, anchor = target.partition("#")
            if "://" not in target:
                there = (HERE / name).parent / file if file else HERE / name
                heads = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.M) if there.exists() else []
                if not there.exists() or (anchor and f"#{anchor}" not in map(anchor_of, heads)):
                    broken.append((name, target))
    same(broken, [])


def test_docs_design_has_a_diagram_of_every_state() -> None:
    """The state diagram of design.md shows each state."""
    blocks = re.findall(r"^```.*?^```$", document("design.md"), re.S | re.M)
    assert any(all(state.value in block for state in q.State) for block in blocks)


def test_docs_design_names_tests_that_there_are() -> None:
    """Each test that design.md names as the proof of a promise is in this file."""
    named = set(re.findall(r"`(test_\w+)`", document("design.md")))
    same({name for name in named if name not in globals()}, set())
    assert named


@windows
def test_docs_demo_bat_runs(home: Home) -> None:
    """demo.bat runs to its end."""
    document("demo.bat")
    env = home.env | {"PATH": os.path.dirname(sys.executable) + os.pathsep + home.env["PATH"]}
    ran = subprocess.run(["cmd", "/c", str(HERE / "demo.bat")], env=env, cwd=HERE, stdin=subprocess.DEVNULL,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=DEADLINE_S)  # fmt: skip
    if ran.returncode:
        print(ran.stdout[-4000:].decode(errors="replace"), flush=True)
    same((ran.returncode, b"Traceback" in ran.stdout), (0, False))


# -- the source


SOURCE = (HERE / "queuectl.py").read_text(encoding="utf-8")
BANNERS = {n: line.split(" ", 2)[2] for n, line in enumerate(SOURCE.splitlines(), 1) if line.startswith("# ====")}


def section_of(line: int) -> str:
    """The section in which a line of queuectl.py stands."""
    return next((name for number, name in reversed(BANNERS.items()) if number <= line), "head")


def test_docs_map_at_the_head_is_true() -> None:
    """The sections that the docstring names are those that the file has, in that order."""
    text = str(q.__doc__).partition("The file, from top to bottom")[2]
    same(re.findall(r"^    (\S+(?: \S+)*)  +\S", text, re.M), list(BANNERS.values()))


def test_docs_tests_stand_in_the_order_of_the_sections() -> None:
    """This file has the sections of queuectl.py in their order, and then what is about the whole."""
    text = (HERE / "tests.py").read_text(encoding="utf-8")
    rest = ["the request's scenarios", "docs", "development dependencies", "the run"]
    same(re.findall(r"^# ---- (.+)", text, re.M), ["the harness", *BANNERS.values(), *rest])


def names_used(node: ast.stmt) -> set[str]:
    """The names of its module that a statement refers to, at any depth."""

    def walk(scope: symtable.SymbolTable) -> Iterator[str]:
        for symbol in scope.get_symbols():
            top = scope.get_type() == "module"
            if symbol.is_referenced() and (top or symbol.is_global()):
                yield symbol.get_name()
        for inner in scope.get_children():
            yield from walk(inner)

    return set(walk(symtable.symtable(ast.unparse(node), "queuectl.py", "exec")))


def test_docs_a_section_uses_only_those_above_it() -> None:
    """No section of queuectl.py refers to a name that a later section defines."""
    statements = ast.parse(SOURCE).body
    order = ["head", *BANNERS.values()]
    defined: dict[str, int] = {}
    for node in statements:
        for inner in ast.walk(node) if isinstance(node, ast.If) else [node]:
            names = [inner.name] if isinstance(inner, ast.FunctionDef | ast.ClassDef) else []
            targets = inner.targets if isinstance(inner, ast.Assign) else []
            names += [target.id for target in targets if isinstance(target, ast.Name)]
            for name in names:
                defined.setdefault(name, order.index(section_of(node.lineno)))
    late = {
        (section_of(node.lineno), name)
        for node in statements
        for name in names_used(node)
        if defined.get(name, 0) > order.index(section_of(node.lineno))
    }
    same(late, set())


def test_docs_only_some_sections_know_the_system() -> None:
    """click, sqlite3 and the modules of the operating system are known only where the style allows."""
    may = {"click": {"commands"}, "sqlite3": {"database"}}
    may |= {module: {"platform", "home", "attempts"} for module in ("os", "signal", "subprocess", "ctypes")}
    found = {(section_of(node.lineno), name) for node in ast.parse(SOURCE).body for name in names_used(node) & set(may)}
    same({(section, name) for section, name in found if section not in may[name] | {"head"}}, set())
    asked = [line for line in SOURCE.splitlines() if "sys.platform" in line]
    same(asked, ['if sys.platform == "win32":'])


RETIRED = (
    "bury|buries|buried|burial|tends?|tended|patience|dooms?|doomed|verdicts?|judge|obstacles?|lookout|see_through|"
    "cut_off|say_aside|worker_voice|LOOK_S|TEND_S|Turn|Obstacles|Orders|Lookout|Verdict"
)


def test_docs_no_retired_word_comes_back() -> None:
    """The field's words stand in code, tests and documents, and not those of ours that they replaced."""
    found = []
    for name in ("queuectl.py", "tests.py", "bench.py", "design.md", "README.md", "docs/manual.md", "CHANGELOG.md"):
        text = document(name)
        if name == "tests.py":
            text = text.partition("RETIRED = (")[0] + text.partition("def test_docs_no_retired_word")[2]
        for number, line in enumerate(text.splitlines(), 1):
            found += [(name, number, word) for word in re.findall(rf"(?<![\w-])(?:{RETIRED})(?![\w-])", line)]
    same(found, [])


def test_docs_no_class_and_no_function_is_large() -> None:
    """No class of queuectl.py has more than 250 lines, no function more than 45, and half have 8 at the most."""
    nodes = list(ast.walk(ast.parse(SOURCE)))
    lines = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in nodes if isinstance(node, ast.ClassDef)}
    same({name: size for name, size in lines.items() if size > 250}, {})
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    sizes = {f"{node.name}, line {node.lineno}": (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    same({name: size for name, size in sizes.items() if size > 45}, {})
    assert sorted(sizes.values())[len(sizes) // 2] <= 8


def test_docs_some_sections_are_pure() -> None:
    """What turns values into words and rules into decisions asks neither the clock nor the disk nor the database."""
    pure = {"text", "model", "fields", "templates", "settings", "views"}
    impure = {"time", "os", "sqlite3", "click", "signal", "subprocess", "Store", "Database", "Home"}
    found = {(section_of(node.lineno), name) for node in ast.parse(SOURCE).body for name in names_used(node) & impure}
    same({(section, name) for section, name in found if section in pure}, set())


def test_docs_both_halves_of_the_platform_define_the_same() -> None:
    """Windows and POSIX define the same names with the same parameters in the same order, under the same banners."""
    halves = next(n for n in ast.parse(SOURCE).body if isinstance(n, ast.If) and "sys.platform" in ast.unparse(n.test))
    windows, posix = (list(signatures(body)) for body in (halves.body, halves.orelse))
    same(windows, posix)
    paragraph, _, code = SOURCE.partition("# What follows exists twice")[2].partition("\nif sys.platform")
    same(re.findall(r"^#     (\w+)", paragraph, re.M), [line.split("(")[0] for line in posix if line[0] != " "])
    texts = code.partition("\n# ====")[0].split("\nelse:\n")
    banners = re.findall(r"^#   (\w.+)", paragraph, re.M)
    same([re.findall(r"^    # ---- (.+)", text, re.M) for text in texts], [banners, banners])


def signatures(body: Iterable[ast.stmt], indent: str = "") -> Iterator[str]:
    """What a block of code offers to others: a line for each function, class, method and constant."""
    for node in body:
        if isinstance(node, ast.FunctionDef) and (node.name[0] != "_" or node.name.endswith("__")):
            result = ast.unparse(node.returns) if node.returns else ""
            yield f"{indent}{node.name}({ast.unparse(node.args)}) -> {result}"
        elif isinstance(node, ast.ClassDef) and node.name[0] != "_":
            yield f"{indent}{node.name}"
            yield from signatures(node.body, indent + "    ")
        elif isinstance(node, ast.Assign) and not indent:
            yield from (name for name in map(ast.unparse, node.targets) if name.isidentifier() and name[0] != "_")
        elif isinstance(node, ast.AnnAssign) and node.value and not indent:
            yield ast.unparse(node.target)


# ---- development dependencies


@dev
def test_fields_no_json_whatever_is_more_than_bad_input() -> None:
    """Any JSON value is either a legal job or bad input, and nothing else ever happens."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
    jobs = st.dictionaries(st.sampled_from(list(q.FIELDS)) | st.text(max_size=3), values)

    @settings(max_examples=2000 if LONG else 500, deadline=None)
    @given(jobs | values)
    def check(value: Any) -> None:
        with contextlib.suppress(q.BadInput):
            q.check_job(value, 0)

    check()


@dev
def test_parse_job_no_text_whatever_is_more_than_bad_input() -> None:
    """Any text on the command line is JSON or bad input."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    @settings(max_examples=500, deadline=None)
    @given(st.text() | st.text(alphabet='{}[]":,0e+-.\\u'))
    def check(text: str) -> None:
        for read in (q.parse_job, q.parse_duration, q.parse_number):
            with contextlib.suppress(q.BadInput):
                read(text)

    check()


@dev
@posix
def test_template_line_no_item_whatever_runs_or_changes(home: Home) -> None:
    """For any value and any line that is taken, a real shell gives a program just the value, and runs nothing of it."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    odd = st.sampled_from("'\"\\$`\n#;& ")
    values = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]) | odd)
    beside = st.text('ab/.-$`\\#();|&<>\n!*?[]=~ "', max_size=8)  # in single quotes all of it is as it stands
    pieces = ("{}", "'", "$(", "`", "${x:-", "<<E\n", "eval ", "[[ ", "((", "case a in a)", ";;esac", "sh -c ", "\\\n")
    lines = st.lists(beside | st.sampled_from(pieces), max_size=6).map("".join)

    @settings(max_examples=1000 if LONG else 300, deadline=None)
    @given(values, beside, beside)
    def check_value(value: str, before: str, after: str) -> None:
        line = filled(f"printf '<%s>' '{before}'{{}}'{after}'", value, line=True)
        ran = subprocess.run(["/bin/sh", "-c", line], cwd=home.work, capture_output=True)
        same(ran.stdout.decode(), f"<{before}{value}{after}>")

    @settings(max_examples=1000 if LONG else 300, deadline=None)
    @given(lines, lines, st.sampled_from(EVIL))
    def check_line(before: str, after: str, value: str) -> None:
        with contextlib.suppress(q.BadInput, subprocess.TimeoutExpired):
            line = filled(before + "{}" + after, value, line=True)
            subprocess.run(["/bin/sh", "-c", line], cwd=home.work, env={"PATH": os.defpath}, stdin=subprocess.DEVNULL,
                           capture_output=True, timeout=10)  # fmt: skip
        assert not (home.work / "PWNED").exists(), (before, after, value)

    check_value()
    check_line()


@dev
def test_decide_never_runs_a_job_more_than_one_plus_max_retries_times() -> None:
    """Whatever the outcomes, attempts that count never exceed 1 + max_retries, and the backoff is the formula."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    ends = st.sampled_from([q.EndReason.EXITED, q.EndReason.TIMED_OUT, q.EndReason.LOST, q.EndReason.NOT_STARTED])

    @settings(max_examples=500, deadline=None)
    @given(st.lists(ends, min_size=8, max_size=8), st.integers(0, 5), st.floats(0.01, 5))
    def check(outcomes: list[q.EndReason], retries: int, base: float) -> None:
        job = a_job(max_retries=retries, backoff_base=base)
        for end in outcomes:
            job = job._replace(attempts=job.attempts + 1)
            result = q.decide(job, q.Outcome(end, 1 if end is q.EndReason.EXITED else None), q.Settings(), 0, 0.5)
            if result.state is q.State.DEAD:
                break
            if end is not q.EndReason.LOST:
                same(result.due_at, round(base**job.attempts * 1000))
        same(job.attempts, 1 + retries)

    check()


@dev
def test_metrics_prometheus_reads_them(home: Home) -> None:
    """`metrics --prometheus` is what Prometheus' own parser reads, with the right figures."""
    from prometheus_client.parser import text_string_to_metric_families as parse

    home.add()
    home.add("exit 1", max_retries=0)
    home.add(queue="slow", hold=True)
    home.run("queue", "limit", "slow", "3")
    home.run("queue", "pause", "slow")
    home.start()
    until(lambda: home.store.queries.counts()[q.State.DEAD] and home.store.queries.counts()[q.State.COMPLETED])
    families = {family.name: family for family in parse(home.out("metrics", "--prometheus"))}
    of = {name: {tuple(s.labels.values()): s.value for s in family.samples} for name, family in families.items()}
    jobs = of["queuectl_jobs"]
    same((jobs["default", "completed"], jobs["default", "dead"], jobs["slow", "pending"]), (1, 1, 1))
    runs = {sample.name: sample.value for sample in families["queuectl_run_seconds"].samples}
    same((families["queuectl_run_seconds"].type, runs["queuectl_run_seconds_count"]), ("histogram", 2))
    results = {name: n for (name,), n in of["queuectl_attempts"].items() if n}
    same((results, families["queuectl_attempts"].type), ({"completed": 1, "failed": 1}, "counter"))
    same((of["queuectl_queue_limit"], of["queuectl_queue_paused"]),
         ({("slow",): 3}, {("default",): 0, ("slow",): 1}))  # fmt: skip
    waits = {s.labels["queue"]: s.value for s in families["queuectl_queue_wait_seconds"].samples if "_count" in s.name}
    same((waits, list(of["queuectl_build_info"].values())), ({"default": 2, "slow": 0}, [1]))


@dev
def test_store_keeps_every_legal_job_as_it_was(home: Home) -> None:
    """Whatever job is legal goes into the database and comes out the same."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
    legal = st.fixed_dictionaries(
        {"command": (text | st.lists(text, min_size=1)).filter(lambda c: (c if isinstance(c, str) else c[0]).strip())},
        optional={
            "priority": st.integers(-(2**31), 2**31 - 1), "timeout": st.floats(0, 1e9), "snooze": st.booleans(),
            "env": st.dictionaries(text.filter(lambda key: "=" not in key), text, min_size=1), "hold": st.booleans(),
            "ok_codes": st.lists(st.integers(0, 2**32 - 1), min_size=1), "max_retries": st.integers(0, 9),
        },
    )  # fmt: skip

    @settings(max_examples=200, deadline=None)
    @given(legal)
    def check(fields: dict[str, Any]) -> None:
        job = home.job(home.add(**fields))
        same({name: getattr(job, name) for name in fields}, fields)

    check()


# -- the store against a model


# The store against a model: both do what hypothesis thinks of, and are compared after each step.

QUEUES, TAGS, KEYS = ["default", "other"], ["t", "u"], ["k", "l"]
ACTIVE = (q.State.PENDING, q.State.FAILED, q.State.PROCESSING)
BLANK: dict[str, Any] = {
    "priority": 0, "queue": "default", "hold": False, "max_retries": 3, "on_lost": "retry", "ok_codes": (),
    "no_retry_codes": (),
}  # fmt: skip


OUTCOMES = [q.Outcome(q.EndReason.EXITED, code) for code in (0, 0, 1, 1, 3, 4, 75)] + [
    q.Outcome(q.EndReason.TIMED_OUT), q.Outcome(q.EndReason.GIVEN_BACK), q.Outcome(q.EndReason.NOT_STARTED, 127),
    q.Outcome(q.EndReason.EXITED, None, signal.SIGTERM),
]  # fmt: skip


HINDRANCES = ("hold", "after", "delay")  # what keeps a job from running at once


@dataclasses.dataclass
class Known:
    """What the model knows of a job."""

    seq: int
    id: str
    fields: dict[str, Any]
    state: q.State = q.State.PENDING
    attempts: int = 0
    run_at: int | None = None
    due_at: int | None = None
    parents: list[int] = dataclasses.field(default_factory=list)
    has_failed_with_parent: bool = False
    worker: int | None = None
    cancelling: bool = False
    ended_at: int | None = None
    ran: int = 0  # attempts that have ended

    def has(self, name: str) -> Any:
        """The value of a field, or what stands for it."""
        return self.fields.get(name, BLANK.get(name))


class Refused(Exception):
    """The model says that this cannot be done."""


class Model:
    """The queue as the contract describes it, in memory and without haste."""

    def __init__(self) -> None:
        self.jobs: dict[int, Known] = {}
        self.last = 0
        self.paused: set[str] = set()
        self.limits: dict[str, int] = {}

    def by_id(self, id: str) -> Known | None:
        """The job of that id, whatever its case."""
        return next((job for job in self.jobs.values() if job.id.lower() == id.lower()), None)

    def waiting(self) -> list[Known]:
        """The jobs that have not started or are to be retried."""
        return [job for job in self.jobs.values() if job.state in q.WAITING]

    def is_blocked(self, job: Known) -> bool:
        """Does it wait for a parent? One that was removed is waited for no more."""
        return any(not self.has_completed(seq) for seq in job.parents)

    def has_completed(self, seq: int) -> bool:
        """Has a parent completed? One that was removed before it had never will."""
        return seq in self.jobs and self.jobs[seq].state is q.State.COMPLETED

    def below(self, seq: int) -> set[int]:
        """A job and everything that waits for it."""
        found, new = {seq}, {seq}
        while new:
            new = {job.seq for job in self.jobs.values() if new & set(job.parents)} - found
            found |= new
        return found

    def fail_dependents(self, now: int) -> None:
        """What waits for a job that never completes is dead, and what waits for that."""
        while failing := [
            job for job in self.waiting()
            if any(seq in self.jobs and self.jobs[seq].state in q.HOPELESS for seq in job.parents)
        ]:  # fmt: skip
            for job in failing:
                job.state, job.has_failed_with_parent, job.ended_at, job.due_at = q.State.DEAD, True, now, None

    def bind(self, job: Known, ids: list[str]) -> None:
        """Let a job wait for others."""
        for id in ids:
            if not (parent := self.by_id(id)) or parent.seq in self.below(job.seq):
                raise Refused
            job.parents = [*job.parents, parent.seq] if parent.seq not in job.parents else job.parents

    def enqueue(self, batch: list[dict[str, Any]], skip: bool, now: int) -> list[tuple[str, bool]]:
        """Take jobs in; their ids, and whether they are new."""
        seen: set[str] = set()
        told: list[tuple[str, bool]] = []
        new: list[tuple[Known, list[str]]] = []
        for n, fields in enumerate(batch, 1):
            id = fields.get("id") or f"j{self.last + n:07x}"
            if "id" in fields and (self.by_id(id) or id.lower() in seen):
                if not skip:
                    raise Refused
                told.append((id, False))
                continue
            seen.add(id.lower())
            holder = self.holder(fields.get("key"))
            if holder:
                told.append((holder.id, False))
                continue
            due = fields["run_at"] if fields.get("run_at", 0) > now else None
            job = Known(self.last + n, id, fields, run_at=due, due_at=due)
            new.append((job, fields.get("after", [])))
            self.jobs[job.seq] = job
            told.append((id, True))
        for job, after in new:
            self.bind(job, after)
        self.fail_dependents(now)
        self.last = max([self.last, *(job.seq for job, _ in new)])
        return told

    def holder(self, key: str | None) -> Known | None:
        """The job that bears a key."""
        return next((job for job in self.jobs.values() if key and job.has("key") == key and job.state in ACTIVE), None)

    def next(self, queues: list[str] | None, now: int) -> Known | None:
        """The job that a worker is to get."""
        may_run = []
        for job in self.waiting():
            queue = job.has("queue")
            running = [other for other in self.jobs.values()
                       if other.state is q.State.PROCESSING and other.has("queue") == queue]  # fmt: skip
            is_due = job.due_at is None or job.due_at <= now
            has_room = queue not in self.paused and len(running) < self.limits.get(queue, 1000)
            if is_due and has_room and not job.has("hold") and not self.is_blocked(job) and queue in (queues or QUEUES):
                may_run.append(job)
        return min(may_run, key=lambda job: (-job.has("priority"), job.seq), default=None)

    def finish(self, job: Known, outcome: q.Outcome, now: int) -> None:
        """End an attempt, with a backoff of 2 ** n seconds."""
        job.ran += 1
        code, ended = outcome.exit_code, outcome.end is q.EndReason.EXITED
        later = now + 1000 * 2**job.attempts
        job.due_at = None
        if ended and (code == 0 or code in job.has("ok_codes")):
            job.state = q.State.COMPLETED
        elif job.cancelling:
            job.state = q.State.CANCELLED
        elif outcome.end is q.EndReason.GIVEN_BACK or (ended and code == 75 and job.fields.get("snooze")):
            job.state, job.attempts = q.State.PENDING, job.attempts - 1
            job.due_at = later if ended else None
        elif (
            job.attempts > job.has("max_retries") or code in job.has("no_retry_codes")
            or (outcome.end is q.EndReason.LOST and job.has("on_lost") == "dead")
        ):  # fmt: skip
            job.state = q.State.DEAD
        else:
            job.state, job.due_at = q.State.FAILED, None if outcome.end is q.EndReason.LOST else later
        job.cancelling = False
        job.ended_at = now if job.state in q.ENDED else None
        self.fail_dependents(now)

    def set_fields(self, job: Known, spec: dict[str, Any], now: int) -> None:
        """Change fields of a job that is not under way."""
        if job.state in q.WAITING and job.attempts > spec.get("max_retries", job.attempts):
            raise Refused
        job.fields = {**job.fields, **spec}
        if "run_at" in spec:
            job.run_at = spec["run_at"] if spec["run_at"] > now else None
            job.due_at = job.run_at if job.state in q.WAITING else None
        if "after" in spec:
            job.parents = []
            self.bind(job, spec["after"])

    def run_again(self, seqs: list[int], spec: dict[str, Any], is_named: bool, now: int) -> list[str]:
        """Bring ended jobs back, changed, and what died because of them; those that cannot run stay as they were."""
        before = copy.deepcopy(self.jobs)
        while True:
            for seq in seqs:
                self.jobs[seq].parents = [] if "after" in spec else self.jobs[seq].parents
            for seq in seqs:
                self.set_fields(self.jobs[seq], spec, now)
            back = self.able_to_run(seqs)
            left = [seq for seq in seqs if seq not in back]
            if not left:
                break
            if is_named:
                raise Refused
            seqs = [seq for seq in seqs if seq not in left]
            self.jobs = copy.deepcopy(before)
        for job in (self.jobs[seq] for seq in back):
            job.state, job.attempts, job.ended_at, job.has_failed_with_parent = q.State.PENDING, 0, None, False
            job.due_at = job.run_at if (job.run_at or 0) > now else None
        return [self.jobs[seq].id for seq in seqs]

    def able_to_run(self, seqs: list[int]) -> list[int]:
        """Those of ended jobs, and of what died because of them, that can come back together."""
        back = list(seqs)
        for seq in back:  # which grows
            back += sorted(
                job.seq for job in self.jobs.values()
                if self.jobs[seq].state in q.HOPELESS and seq in job.parents and job.seq not in back
                and job.state is q.State.DEAD and job.has_failed_with_parent
            )  # fmt: skip
        back = seqs + sorted(set(back) - set(seqs))
        back = self.without_stuck(back)
        first = {self.jobs[seq].has("key"): seq for seq in reversed(back)}
        keyed = [seq for seq in back if (key := self.jobs[seq].has("key")) and (self.holder(key) or first[key] != seq)]
        return self.without_stuck([seq for seq in back if seq not in keyed])

    def without_stuck(self, back: list[int]) -> list[int]:
        """The same without those that would wait for a job that is gone or will never complete."""
        while stuck := [
            seq for seq in back
            if any(parent not in self.jobs or (self.jobs[parent].state in q.HOPELESS and parent not in back)
                   for parent in self.jobs[seq].parents)
        ]:  # fmt: skip
            back = [seq for seq in back if seq not in stuck]
        return back

    def edit(self, jobs: list[Known], spec: dict[str, Any], now: int) -> None:
        """Change jobs that wait or are dead; only one that waits takes a key."""
        for job in jobs:
            if self.holder(spec.get("key")) not in (None, job):
                raise Refused
            if job.state in q.WAITING and "key" in spec:
                job.fields = {**job.fields, "key": spec["key"]}
        for job in jobs:
            job.parents = [] if "after" in spec else job.parents
        for job in jobs:
            self.set_fields(job, spec, now)
        self.fail_dependents(now)

    def cancel(self, jobs: list[Known], now: int) -> None:
        """Tell what runs to end, and end what waits with everything below it."""
        waiting = [job for job in jobs if job.state is not q.State.PROCESSING]
        for job in jobs:
            job.cancelling = job.state is q.State.PROCESSING
        for job in waiting:
            job.state, job.ended_at = q.State.CANCELLED, now
        self.fail_dependents(now)  # only now: what was to be cancelled is not dead

    def row_of(self, job: Known) -> tuple[Any, ...]:
        """What is compared of a job."""
        blockers = sum(not self.has_completed(seq) for seq in job.parents)
        return (job.id, job.state, job.attempts, job.has("queue"), job.has("priority"), job.has("hold"), job.cancelling,
                job.has_failed_with_parent, blockers, job.ended_at, job.has("key"), job.ran)  # fmt: skip

    def remove(self, jobs: list[Known]) -> None:
        """Forget jobs for good; a child goes on waiting for one that had not completed."""
        done = {job.seq for job in jobs if job.state is q.State.COMPLETED}
        for job in jobs:
            del self.jobs[job.seq]
        for other in self.jobs.values():
            other.parents = [seq for seq in other.parents if seq not in done]


class StoreSteps:
    """A store and its model side by side: each step does the same to both, and fails where they disagree."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="queuectl-test-")
        self.path = os.path.join(self.folder.name, "queue.db")
        self.store, self.model, self.now = q.open_store(self.path, durable=False), Model(), 1_000_000
        self.workers: dict[int, list[str] | None] = {}  # and the queues that they take
        self.slots: dict[int, int] = {}
        self.claims: list[q.Job] = []  # every one that was ever made, the late ones too

    def teardown(self) -> None:
        """Leave nothing behind."""
        self.store.close()
        self.folder.cleanup()

    # -- how the two are compared

    def agree(self, do: Callable[[], Any], expect: Callable[[], Any]) -> Any:
        """Store and model do the same, or both refuse and nothing has changed."""
        before = copy.deepcopy(self.model.jobs), self.model.last
        try:
            wanted = expect()
        except Refused:
            self.model.jobs, self.model.last = before
            with refuses(q.QueueError):
                do()
            return None
        got = do()
        return same(got, wanted)

    def chosen(self, which: q.Selection, states: Iterable[q.State]) -> list[Known]:
        """The jobs that a selection means to the model."""
        if which == q.NOTHING or (which.ids and which.is_filter):
            raise Refused
        if which.ids:
            return self.named(which.ids, states)
        return [
            job for _, job in sorted(self.model.jobs.items())
            if job.state in states and (which.states is None or job.state in which.states)
            and which.tag in (None, job.has("tag")) and which.queue in (None, job.has("queue"))
        ]  # fmt: skip

    def named(self, ids: Iterable[str], states: Iterable[q.State]) -> list[Known]:
        """The jobs of these ids, each once; all must be there in one of the states."""
        found = [self.model.by_id(id) for id in ids]
        if not all(job and job.state in states for job in found):
            raise Refused
        return list({job.seq: job for job in found if job}.values())

    def with_parents(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Fields whose `after` names jobs that exist, mostly the newest, instead of counting them."""
        ids = [job.id for _, job in sorted(self.model.jobs.items(), reverse=True)] or ["nobody"]
        after = dict.fromkeys("nobody" if n == 20 else ids[n % min(len(ids), 4)] for n in fields.get("after", ()))
        return {**fields, "after": list(after)} if after else fields

    def rows_are_as_the_model_says(self) -> None:
        """Jobs, counts and counters are what the model has."""
        got = {job.seq: self.row_of(job) for job in self.store.queries.jobs()}
        same(got, {job.seq: self.model.row_of(job) for job in self.model.jobs.values()})
        states = collections.Counter(job.state for job in self.model.jobs.values())
        same(self.store.queries.counts(), {state: states[state] for state in q.State})
        same(self.store.upkeep.miscounts(), [])

    def row_of(self, job: q.Job) -> tuple[Any, ...]:
        """What is compared of a job."""
        return (job.id, job.state, job.attempts, job.queue, job.priority, job.hold, job.cancelling,
                job.failed_parent is not None, job.blockers, job.finished_at, job.key,
                len(self.store.queries.history(job)))  # fmt: skip

    # -- jobs come, and workers work

    def begin(self, batch: list[dict[str, Any]]) -> None:
        """Start with jobs, and with a worker that takes every queue: most runs would never come so far."""
        self.enqueue([{name: value for name, value in job.items() if name not in HINDRANCES} for job in batch], True)
        self.register(None)
        self.claim(0)

    def enqueue(self, batch: list[dict[str, Any]], skip: bool) -> None:
        """Take a batch in."""
        batch = [q.check_fields(self.with_parents(fields), self.now) for fields in batch]
        self.agree(
            lambda: list(self.store.intake.enqueue([("", dict(spec)) for spec in batch], self.now, skip_existing=skip)),
            lambda: self.model.enqueue(batch, skip, self.now),
        )

    def register(self, queues: list[str] | None) -> None:
        """Let a worker come, in the lowest free slot."""
        free = min(set(range(1, len(self.slots) + 2)) - set(self.slots.values()))
        row, _ = self.store.workers.register(
            1, "h", queues, False, self.now, lambda _: None, lambda row: row.id in self.slots
        )
        same((row.slot, row.queues), (free, queues))
        self.workers[row.id], self.slots[row.id] = queues, free

    def claim(self, n: int) -> None:
        """Let one of the workers claim a job."""
        worker = sorted(self.workers)[n % len(self.workers)]
        if any(job.worker == worker and job.state is q.State.PROCESSING for job in self.model.jobs.values()):
            return
        self.now += 1  # no two attempts of a job begin in the same millisecond
        job = self.store.jobs.claim(worker, self.workers[worker], self.now)
        wanted = self.model.next(self.workers[worker], self.now)
        same(job and job.id, wanted and wanted.id)
        if job and wanted:
            wanted.state, wanted.worker, wanted.due_at = q.State.PROCESSING, worker, None
            wanted.attempts += 1
            self.claims.append(job)

    def finish(self, n: int, outcome: q.Outcome) -> None:
        """End the attempt of one of the last claims, which may be over long since."""
        claim = self.claims[-6:][n % min(len(self.claims), 6)]
        job = self.model.jobs.get(claim.seq)
        newest = [other for other in self.claims if other.seq == claim.seq][-1]
        is_mine = job and job.state is q.State.PROCESSING and newest is claim and claim.worker in self.workers
        if job and is_mine:
            self.model.finish(job, outcome, self.now)
        got = self.store.jobs.finish(claim, outcome, q.Settings(max_retries=3), self.now)
        same(got, job.state if job and is_mine else None)

    def die_and_be_recovered(self, n: int) -> None:
        """Let one of the workers die, and another recover its job."""
        worker, lost = sorted(self.workers)[n % len(self.workers)], q.Outcome(q.EndReason.LOST, error="died")
        for job in self.store.jobs.running_jobs(worker):
            self.model.finish(self.model.jobs[job.seq], lost, self.now)
            got = self.store.jobs.finish(job, lost, q.Settings(max_retries=3), self.now)
            same(got, self.model.jobs[job.seq].state)
        self.store.workers.unregister(worker)
        del self.workers[worker], self.slots[worker]

    # -- what people do

    def hold_or_release(self, which: q.Selection, hold: bool) -> None:
        """Hold jobs, or let them go."""

        def expect() -> list[str]:
            found = self.chosen(which, q.WAITING)
            for job in found:
                job.fields = {**job.fields, "hold": hold}
            return [job.id for job in found]

        self.agree(lambda: list(self.store.changes.set_hold(which, hold, self.now)), expect)

    def cancel(self, which: q.Selection) -> None:
        """Cancel jobs: what runs is told to end, what waits ends at once."""

        def expect() -> list[str]:
            found = self.chosen(which, list(q.State) if which.ids else ACTIVE)
            wanted = [job.id for job in found]
            self.model.cancel([job for job in found if job.state in ACTIVE], self.now)
            return wanted

        self.agree(lambda: [job.id for job in self.store.changes.cancel(which, self.now)], expect)

    def edit(self, which: q.Selection, spec: dict[str, Any]) -> None:
        """Change jobs that wait."""
        spec = q.check_fields(self.with_parents({"priority": 0, **spec}), self.now)

        def expect() -> list[str]:
            found = self.chosen(which, q.EDITABLE)
            self.model.edit(found, spec, self.now)
            return [job.id for job in found]

        self.agree(lambda: [job.id for _, job in self.store.changes.edit(which, spec, self.now)], expect)

    def run_again(self, which: q.Selection, spec: dict[str, Any], only_dead: bool) -> None:
        """Bring dead jobs, or ended ones, back with changes."""
        spec = q.check_fields(self.with_parents(spec), self.now)
        do = self.store.reruns.retry_dead if only_dead else self.store.reruns.rerun

        def expect() -> list[str]:
            found = self.chosen(which, [q.State.DEAD] if only_dead else q.ENDED)
            return self.model.run_again([job.seq for job in found], spec, bool(which.ids), self.now)

        self.agree(lambda: list(do(which, self.now, spec)), expect)

    def purge_dead(self, which: q.Selection) -> None:
        """Remove dead jobs."""

        def expect() -> list[str]:
            found = self.chosen(which, [q.State.DEAD])
            self.model.remove(found)
            return [job.id for job in found]

        self.agree(lambda: list(self.store.changes.purge_dead(which)), expect)

    def prune(self, states: set[q.State], age: int, dry: bool) -> None:
        """Remove jobs that ended long enough ago."""
        before = self.now - age
        found = [job for job in self.model.jobs.values() if job.state in states and (job.ended_at or 0) < before]
        got = [id for ids in self.store.changes.prune(sorted(states), before, dry_run=dry, batch=2) for id in ids]
        same(sorted(got), sorted(job.id for job in found))
        if not dry:
            self.model.remove(found)

    def pause_or_resume(self, queue: str, paused: bool) -> None:
        """Pause a queue, or let it go on."""
        self.store.queues.set_paused([queue], paused)
        (self.model.paused.add if paused else self.model.paused.discard)(queue)

    def limit(self, queue: str, limit: int | None) -> None:
        """Limit a queue, or no more."""
        self.store.queues.set_limit(queue, limit)
        self.model.limits = {**self.model.limits, queue: limit or 1000}

    def time_passes(self, seconds: int) -> None:
        """Let time pass."""
        self.now += seconds * 1000

    def restart(self) -> None:
        """Close the database and open it again."""
        self.store.close()
        self.store = q.open_store(self.path, durable=False)


def store_fields() -> dict[str, Any]:
    """For each field the values that hypothesis may give it; few, so that jobs meet."""
    from hypothesis import strategies as st

    return {
        "id": st.sampled_from(["a", "A", "b", "c", "d"]), "priority": st.integers(-1, 1),
        "max_retries": st.integers(0, 2), "delay": st.integers(0, 9), "queue": st.sampled_from(QUEUES),
        "tag": st.sampled_from(TAGS), "key": st.sampled_from(KEYS), "hold": st.booleans(), "snooze": st.booleans(),
        "after": st.lists(st.integers(0, 20), min_size=1, max_size=2), "on_lost": st.sampled_from(["retry", "dead"]),
        "ok_codes": st.just([3]), "no_retry_codes": st.just([4]),
    }  # fmt: skip


def store_selections() -> Any:
    """The selections of jobs that hypothesis may make."""
    from hypothesis import strategies as st

    ids = store_fields()["id"] | st.sampled_from([f"j{n:07x}" for n in range(1, 12)])
    tags, queues = st.none() | st.sampled_from(TAGS), st.none() | st.sampled_from(QUEUES)
    some_ids = st.lists(ids, min_size=1, max_size=3, unique=True)
    states = st.none() | st.lists(st.sampled_from(list(q.State)), max_size=3, unique=True)
    kinds = [(some_ids,), (st.just(()), tags, queues, st.booleans(), states), (some_ids, tags)]  # the last is refused
    return st.one_of([st.tuples(*kind).map(lambda values: q.Selection(*values)) for kind in kinds])


def worker_rules() -> dict[str, Any]:
    """The steps by which jobs come and workers work, with what hypothesis may call them with."""
    from hypothesis import strategies as st
    from hypothesis.stateful import initialize, precondition, rule

    jobs = st.fixed_dictionaries({"command": st.just("true"), "cwd": st.just("/")}, optional=store_fields())
    takes, which, steps = st.lists(st.sampled_from(QUEUES), min_size=1, unique=True), st.integers(0, 5), StoreSteps
    has_workers, has_claims = precondition(lambda self: self.workers), precondition(lambda self: self.claims)
    return {
        "begin": initialize(batch=st.lists(jobs, min_size=2, max_size=5))(steps.begin),
        "enqueue": rule(batch=st.lists(jobs, min_size=1, max_size=3), skip=st.booleans())(steps.enqueue),
        "register": rule(queues=st.none() | takes)(steps.register),
        "claim": has_workers(rule(n=which)(steps.claim)),
        "finish": has_claims(rule(n=which, outcome=st.sampled_from(OUTCOMES))(steps.finish)),
        "die_and_be_recovered": has_workers(rule(n=which)(steps.die_and_be_recovered)),
    }


def people_rules() -> dict[str, Any]:
    """The steps that people make, and what happens without anybody, with what hypothesis may call them with."""
    from hypothesis import strategies as st
    from hypothesis.stateful import rule

    which, steps, fields, queue = store_selections(), StoreSteps, store_fields(), st.sampled_from(QUEUES)
    changing = ("priority", "max_retries", "queue", "key", "after", "delay")
    changes = st.fixed_dictionaries({}, optional={name: fields[name] for name in changing})
    states = st.sets(st.sampled_from(q.ENDED), min_size=1)
    return {
        "hold_or_release": rule(which=which, hold=st.booleans())(steps.hold_or_release),
        "cancel": rule(which=which)(steps.cancel),
        "edit": rule(which=which, spec=changes)(steps.edit),
        "run_again": rule(which=which | st.just(q.EVERY_JOB), spec=changes, only_dead=st.booleans())(steps.run_again),
        "purge_dead": rule(which=which)(steps.purge_dead),
        "prune": rule(states=states, age=st.sampled_from([0, 5000]), dry=st.booleans())(steps.prune),
        "pause_or_resume": rule(queue=queue, paused=st.booleans())(steps.pause_or_resume),
        "limit": rule(queue=queue, limit=st.none() | st.integers(1, 2))(steps.limit),
        "time_passes": rule(seconds=st.sampled_from([1, 2, 4, 10]))(steps.time_passes),
        "restart": rule()(steps.restart),
    }


def store_machine() -> Any:
    """The state machine by which hypothesis makes the steps, in whatever order it thinks of."""
    from hypothesis.stateful import RuleBasedStateMachine, invariant

    rules = {**worker_rules(), **people_rules()}
    rules["rows_are_as_the_model_says"] = invariant()(StoreSteps.rows_are_as_the_model_says)
    return type("StoreMachine", (StoreSteps, RuleBasedStateMachine), rules)


@dev
def test_store_does_what_the_model_does() -> None:
    """Whatever is asked of a store, in any order, with time passing and workers dying, it agrees with the model."""
    from hypothesis import HealthCheck, settings
    from hypothesis.stateful import run_state_machine_as_test

    examples = settings(max_examples=1000 if LONG else 80, stateful_step_count=60, deadline=None,
                        suppress_health_check=list(HealthCheck), report_multiple_bugs=False)  # fmt: skip
    run_state_machine_as_test(store_machine(), settings=examples)


# ---- the run


def run_test(name: str, test: Test) -> tuple[str, str]:
    """Run one test, print its line, and say how it ended."""
    began = time.monotonic()
    home = Home() if "home" in inspect.signature(test).parameters else None
    result, note = "ok", ""
    try:
        test(*[home] if home else [])
    except Skip as reason:
        result, note = "skipped", f"\n        {reason}"
    except BaseException:
        result, note = "FAILED", "\n" + traceback.format_exc()
    finally:
        if home:
            home.close()
    sentence = inspect.getdoc(test) or "says nothing"
    line = f"{result:7} {name}: {sentence} {time.monotonic() - began:.1f} s{note}"
    print(line.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding), flush=True)
    return name, result


def run_tests(tests: dict[str, Test]) -> dict[str, str]:
    """Run tests side by side, and then those that want to be alone; how each ended."""
    together = {name: test for name, test in tests.items() if not hasattr(test, "alone")}
    apart = {name: test for name, test in tests.items() if hasattr(test, "alone")}
    with concurrent.futures.ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        ended = dict(pool.map(run_test, together, together.values()))
    return ended | dict(map(run_test, apart, apart.values()))


def usage() -> str:
    """How the tests are called."""
    tests = all_tests()
    of_dev = [test for test in tests.values() if hasattr(test, "dev")]
    return f"""Usage: python tests.py [--long | --quick] [--dev] [NAME]...

NAME is the name of a test or a part of it; without one all tests run.

  --long      also what takes minutes: more rounds and more examples
  --quick     without what takes long or needs the machine for itself
  --dev       those tests alone that need the development dependencies hypothesis and prometheus-client
  -h, --help  this page

SEED=N in the environment repeats a run of chaos or fuzz that has printed SEED=N.
There are {len(tests) - len(of_dev)} tests, and {len(of_dev)} with --dev. The exit code is 0 where none failed."""


def all_tests() -> dict[str, Test]:
    """Every test of this file by its name."""
    return {name: test for name, test in globals().items() if name.startswith("test_")}


def likeness(part: str, name: str) -> float:
    """How much a part of a name, as somebody typed it, is like so many words of a name."""
    words, count = name.split("_"), part.count("_") + 1
    parts = ["_".join(words[at : at + count]) for at in range(len(words))]
    return max(difflib.SequenceMatcher(None, part, each).ratio() for each in parts)


def mistake(words: list[str]) -> str | None:
    """What is wrong with a command line, in one line."""
    for word in words:
        is_dev = "--dev" in words
        if word.startswith("-"):
            if word not in OPTIONS:
                close = difflib.get_close_matches(word, OPTIONS, 1) or OPTIONS
                return f"there is no option {word}; did you mean {' or '.join(close)}?"
        elif not any(word in name for name in chosen(is_dev, [])):
            if any(word in name for name in chosen(not is_dev, [])):
                return f"the tests called {word} run {'without' if is_dev else 'with'} --dev"
            near = sorted(chosen(is_dev, []), key=lambda name: likeness(word, name), reverse=True)[:3]
            return f"no test is called {word}; the nearest are {', '.join(near)}"
    return None


def chosen(is_dev: bool, parts: list[str]) -> dict[str, Test]:
    """The tests that have one of these parts in their name, or all, of one of the two kinds."""
    return {
        name: test for name, test in all_tests().items()
        if hasattr(test, "dev") == is_dev and (not parts or any(part in name for part in parts))
    }  # fmt: skip


def let_children_be_interrupted() -> None:
    """Give children SIGINT as it is by default: a shell without job control starts `python tests.py &` without it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)  # a handler ends with exec; this process goes on ignoring it


def main(words: list[str]) -> int:
    """Run the tests that the words choose; the exit code."""
    if {"-h", "--help"} & set(words):
        print(usage())
        return 0
    wrong = mistake(words) if __debug__ else "python -O takes the assertions away"
    if wrong:
        print(f"tests.py: {wrong}", file=sys.stderr)
        return 2
    let_children_be_interrupted()
    asked = chosen("--dev" in words, [word for word in words if not word.startswith("-")])
    if "--quick" in words:
        asked = {name: test for name, test in asked.items() if not hasattr(test, "alone") and not hasattr(test, "slow")}
    ended = run_tests({name: test for name, test in asked.items() if getattr(test, "here", True)})
    return report(ended, len(asked) - len(ended))


def report(ended: dict[str, str], elsewhere: int) -> int:
    """Sum up how the tests ended; the exit code."""
    results = collections.Counter(ended.values())
    for name, result in ended.items():
        if result == "FAILED":
            print(f"FAILED {name}")
    print(f"{elsewhere} not for this system, {results['skipped']} skipped")
    print(f"{results['ok']} passed, {results['FAILED']} failed")
    return 1 if results["FAILED"] else 0


# -- its own tests


def run_of_tests(home: Home, *words: str, before: str = "") -> Ran:
    """What this file does when it is run with these words, in a shell that has done something before."""
    line = [sys.executable, str(HERE / "tests.py"), *words]
    if before:
        line = ["/bin/sh", "-c", f'{before}; exec "$@"', "sh", *line]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return finished(subprocess.Popen(line, cwd=home.work, env=env, **pipes))


def test_run_says_how_it_is_called(home: Home) -> None:
    """--help names every option, what NAME does and how many tests there are, and runs none."""
    for option in ("-h", "--help"):
        ran = run_of_tests(home, "--dev", option)
        same((ran.code, ran.err, ran.out), (0, "", usage() + "\n"))
    kinds = [len(chosen(is_dev, [])) for is_dev in (False, True)]
    assert all(option in usage() for option in OPTIONS) and f"{kinds[0]} tests, and {kinds[1]}" in usage(), usage()


def test_run_refuses_what_it_does_not_know(home: Home) -> None:
    """An unknown option, and a name that no test has, are one line with what is nearest, exit 2, and nothing runs."""
    for words, said in (
        (["--lnog"], "no option --lnog; did you mean --long?"), (["-x"], "--help"),
        (["test_erors_have"], "test_errors_have_the_exit_codes_of_the_contract"),
        (["ctrl", "nosuch"], "called nosuch;"),
        (["model_does"], "with --dev"), (["--dev", "ctrl_c"], "without --dev"),
    ):  # fmt: skip
        ran = run_of_tests(home, *words)
        same((ran.code, ran.out), (2, ""))
        assert re.fullmatch(r"tests\.py: [^\n]+\n", ran.err) and said in ran.err, ran.err


@posix
def test_run_goes_well_where_interrupts_are_ignored(home: Home) -> None:
    """Ctrl-C ends a command under test also where the tests were started with SIGINT ignored."""
    ran = run_of_tests(home, "ctrl_c_leaves_nothing", "watch_redraws", before="trap '' INT")
    same((ran.code, ran.err, "2 passed, 0 failed" in ran.out), (0, "", True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
