#!/usr/bin/env python3
"""How fast queuectl is on this machine: `python bench.py`, under four minutes on two cores.

    python bench.py                       # the table
    python bench.py --only enqueue prune  # some figures
    python bench.py --peers               # and other queues on the same work, as far as installed
    python bench.py --json                # one document

Every figure stands against a baseline that is measured in the same run, in turns with ours, and
is the median of several turns: absolute numbers say more about a machine than about a program.
It is no test. It says `short` where a goal is missed, and exits 0 all the same.

From top to bottom: rows and goals, the bench (homes, commands, workers), the figures one by one,
the peers, the command. A figure is a generator of rows under `@figure`; its name is the function's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import click

import queuectl as q

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = [sys.executable, os.path.join(HERE, "queuectl.py")]
INSTALLED = [sys.executable, "-c", "import queuectl; queuectl.main()"]  # what the `queuectl` on a PATH does
SHELL_TRUE, BARE_TRUE = "true", ["/bin/true"]
TURNS = 3  # how often ours and the baseline take turns, where a turn takes seconds
POLL_S = 0.1  # how often the bench looks whether its jobs have ended


# ======================================================================== rows and goals


class Goal(NamedTuple):
    """What a figure is to reach."""

    sign: str  # ">=" or "<="
    bound: float
    of: str = "ratio"  # which number is compared: "ratio", "difference" (ours - baseline) or "ours"

    def is_met(self, ours: float, baseline: float | None, ratio: float | None) -> bool:
        """Does a figure reach it?"""
        number = {"ratio": ratio, "difference": ours - (baseline or 0), "ours": ours}[self.of]
        return number is not None and (number >= self.bound if self.sign == ">=" else number <= self.bound)

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}" + {"ratio": " x", "difference": " more", "ours": ""}[self.of]


class Row(NamedTuple):
    """A line of the table."""

    figure: str
    unit: str
    ours: float | None
    baseline: float | None = None
    ratio: float | None = None
    goal: Goal | None = None
    note: str = ""

    @property
    def rating(self) -> str:
        """`ok`, `short`, or nothing where there is no goal or no number."""
        if self.goal is None or self.ours is None:
            return ""
        return "ok" if self.goal.is_met(self.ours, self.baseline, self.ratio) else "short"

    def cells(self) -> list[str]:
        """What the table shows of it."""
        numbers = [_short(self.ours), _short(self.baseline), "-" if self.ratio is None else f"{self.ratio:.2f}"]
        return [self.figure, *numbers, self.unit, str(self.goal or "-"), self.rating, self.note]

    def document(self) -> dict[str, Any]:
        """What the JSON holds of it."""
        return {**self._asdict(), "goal": str(self.goal) if self.goal else None, "rating": self.rating or None}


def _short(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


class Skipped(Exception):
    """A figure cannot be had on this system; its text says why."""


Measure = Callable[[], float]


def in_turns(turns: int, *measures: Measure) -> list[list[float]]:
    """What each measure found in each turn. Every other turn goes backwards: who is first gains nothing."""
    found: list[list[float]] = [[] for _ in measures]
    for turn in range(turns):
        for place in range(len(measures)) if turn % 2 == 0 else reversed(range(len(measures))):
            found[place].append(measures[place]())
    return found


def compared(
    figure: str, unit: str, ours: Sequence[float], baseline: Sequence[float], goal: Goal | None, note: str = ""
) -> Row:
    """The row of two measures that took turns: medians, and the median of the ratios of each turn."""
    ratios = [a / b for a, b in zip(ours, baseline, strict=True)]
    middle = statistics.median
    return Row(figure, unit, middle(ours), middle(baseline), middle(ratios), goal, note)


def percentile(values: Sequence[float], part: float) -> float:
    """The value below which a part of the values lies."""
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def seconds(action: Callable[[], object]) -> float:
    """How long an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


# ======================================================================== the bench


class Bench:
    """Temporary homes, and commands and workers in them.

    Each run has a home of its own, and all are removed at the very end: some file systems go on
    clearing up after thousands of files for seconds, at the cost of whoever makes the next.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        dropped = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")
        kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("QUEUECTL_")}
        self._env = {**kept, "PYTHONPATH": HERE, "PYTHONPYCACHEPREFIX": os.path.join(root, "bytecode")}
        self.run([sys.executable, "-c", "import bench"])  # writes the bytecode: to compile costs time, and memory

    def directory(self) -> str:
        """A new one, empty."""
        return tempfile.mkdtemp(dir=self.root)

    def home(self) -> q.Home:
        """A new one, with an empty queue."""
        os.environ["QUEUECTL_HOME"] = self.directory()
        home = q.open_home()
        q.open_store(home.database).close()
        return home

    def env(self, home: q.Home | None = None) -> dict[str, str]:
        """What a command of the bench sees."""
        return {**self._env, **({"QUEUECTL_HOME": home.path} if home else {})}

    def run(self, command: Sequence[str], home: q.Home | None = None, stdin: str = os.devnull) -> None:
        """Run a command to its end; what it prints is dropped."""
        with open(stdin, "rb") as given:
            subprocess.run(
                command, env=self.env(home), stdin=given, stdout=subprocess.DEVNULL, check=True, cwd=self.root
            )

    def start(self, *arguments: str, home: q.Home | None = None) -> subprocess.Popen[str]:
        """Start a Python whose output is to be read."""
        command = [sys.executable, *arguments]
        return subprocess.Popen(
            command, env=self.env(home), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.root
        )

    @contextlib.contextmanager
    def workers(self, home: q.Home, count: int) -> Iterator[list[int]]:
        """Workers that are up; their process ids."""
        self.run([*INSTALLED, "worker", "start", "--count", str(count)], home)
        try:
            yield [pid for (pid,) in rows(home, "SELECT pid FROM workers")]
        finally:
            self.run([*INSTALLED, "worker", "stop", "--now"], home)

    @functools.cached_property
    def large(self) -> tuple[q.Home, q.Home]:
        """A queue of five million jobs, and one of five thousand of the same kinds."""
        big, small = self.home(), self.home()
        fill(big, 1_000_000)
        fill(small, 1_000)
        return big, small

    def jobs_a_second(self, workers: int, jobs: int, command: str | list[str]) -> float:
        """From the first claim to the last finish, with the workers up before the jobs come."""
        home = self.home()
        with self.workers(home, workers), contextlib.closing(sqlite3.connect(home.database)) as db:
            enqueue(home, [command] * jobs)
            while db.execute("SELECT sum(n) FROM counts WHERE state = 'completed'").fetchone() != (jobs,):
                time.sleep(POLL_S)
        [(first, last)] = rows(home, "SELECT min(started_at), max(finished_at) FROM jobs")
        return jobs / float(last - first) * 1000

    def bare_jobs_a_second(self, processes: int, jobs: int, command: Sequence[str]) -> float:
        """What a bare loop of Popen().wait() makes, in several processes at once."""
        children = [self.start("-c", BARE_LOOP, str(jobs // processes), *command) for _ in range(processes)]
        spans = [[float(word) for word in child.communicate()[0].split()] for child in children]
        return jobs / (max(end for _, end in spans) - min(start for start, _ in spans))


BARE_LOOP = """
import subprocess, sys, time
start = time.monotonic()
for _ in range(int(sys.argv[1])):
    subprocess.Popen(sys.argv[2:]).wait()
print(start, time.monotonic())
"""


def rows(home: q.Home, sql: str) -> list[tuple[Any, ...]]:
    """What a query finds, by a connection of its own."""
    with contextlib.closing(sqlite3.connect(home.database)) as db:
        return db.execute(sql).fetchall()


def enqueue(home: q.Home, commands: Sequence[str | list[str]]) -> float:
    """Store jobs and wake a worker, as `enqueue` does; the moment when they were on disk."""
    with q.open_store(home.database) as store:
        store.intake.enqueue([("", {"command": command, "cwd": "/"}) for command in commands], q.now_ms())
        committed = time.perf_counter()
        q.wake_one(home, store)
    return committed


def of_process(pid: int, name: str) -> str:
    """A file of proc(5) about a process."""
    try:
        with open(f"/proc/{pid}/{name}", encoding="ascii", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        raise Skipped(f"needs /proc/PID/{name}") from None


def kib_of(pid: int, file: str, field: str) -> int:
    """A number of KiB that proc(5) tells of a process."""
    return int(of_process(pid, file).partition(f"{field}:")[2].split()[0])


def cpu_seconds(pid: int) -> float:
    """What a process has used so far."""
    user, system = of_process(pid, "stat").rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------ large queues

# The five kinds of job in a large queue: what their columns hold, as SQL over n = 1, 2, …
KINDS: dict[str, dict[str, str]] = {
    "done": {
        "state": "iif(n % 10, 'completed', 'dead')", "error": "iif(n % 10, NULL, 'exit code 1')",
        "attempts": "1", "worker": "0", "started_at": ":now - 9", "finished_at": ":now - 5",
    },
    "waiting": {},
    "future": {"priority": "9", "run_at": ":now + 1000000000", "due_at": ":now + 1000000000"},
    "on hold": {"priority": "9", "hold": "1"},
    "in a paused queue": {"priority": "9", "queue": "'paused'"},
}  # fmt: skip


def fill(home: q.Home, each: int) -> None:
    """Put so many jobs of each kind into an empty queue, by SQL alone: nothing else takes seconds for millions."""
    with contextlib.closing(sqlite3.connect(home.database, isolation_level=None)) as db:
        for setting in ("journal_mode = MEMORY", "synchronous = OFF", "cache_size = -400000"):
            db.execute(f"PRAGMA {setting}")
        triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        db.execute("BEGIN IMMEDIATE")
        for name, _ in triggers:
            db.execute(f"DROP TRIGGER {name}")
        for place, columns in enumerate(KINDS.values()):
            _fill_kind(db, place * each, each, columns)
        db.execute(
            """INSERT INTO attempts (job, n, number, worker, started_at, ended_at, ended_by)
            SELECT seq, 1, 1, worker, started_at, finished_at, 'exited' FROM jobs WHERE finished_at IS NOT NULL"""
        )
        db.execute("INSERT INTO counts SELECT state, queue, count(*) FROM jobs GROUP BY state, queue")
        db.execute("INSERT INTO queues (name, paused) VALUES ('paused', 1)")
        for _, statement in triggers:
            db.execute(statement)
        db.execute("COMMIT")
        db.execute("PRAGMA journal_mode = WAL")


def _fill_kind(db: sqlite3.Connection, last: int, each: int, columns: Mapping[str, str]) -> None:
    """Insert jobs of one kind, numbered from `last` on."""
    same = {"seq": ":last + n", "id": "printf('j%07x', :last + n)", "command": "'\"true\"'", "cwd": "'/'"}
    values = {**same, "created_at": ":now - 9", "updated_at": ":now - 9", **columns}
    db.execute(
        f"""WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :each)
        INSERT INTO jobs ({", ".join(values)}) SELECT {", ".join(values.values())} FROM numbers""",
        {"last": last, "each": each, "now": q.now_ms()},
    )


class Exchanges:
    """A worker's side of a queue: what it does with the database between two jobs, and nothing else."""

    def __init__(self, home: q.Home) -> None:
        self._store = q.open_store(home.database, durable=False)
        self._worker = self._store.workers.register(
            os.getpid(), "bench", None, False, q.now_ms(), open_signs=lambda worker: None, is_alive=lambda worker: True
        )[0].id
        self._job = self._store.jobs.claim(self._worker, None, q.now_ms())

    def time_one(self) -> float:
        """Seconds that it takes to finish a job and claim the next, as Worker does it."""
        return seconds(self._exchange)

    def _exchange(self) -> None:
        assert self._job, "the bench has claimed every job that it made"
        with self._store.db.writing():
            self._store.jobs.finish(
                self._job, q.Outcome(q.EndReason.EXITED, 0), self._store.config.settings(), q.now_ms()
            )
            self._job = self._store.jobs.claim(self._worker, None, q.now_ms())

    def close(self) -> None:
        """Leave, and leave nothing under way."""
        if self._job:
            self._store.jobs.finish(self._job, q.Outcome(q.EndReason.EXITED, 0), q.Settings(), q.now_ms())
        self._store.workers.unregister(self._worker)
        self._store.close()


# ======================================================================== figures

Figure = Callable[[Bench], Iterator[Row]]
FIGURES: dict[str, Figure] = {}


def figure(measure: Figure) -> Figure:
    """Register a figure under its function's name."""
    FIGURES[measure.__name__.replace("_", "-")] = measure
    return measure


@figure
def shell_jobs(bench: Bench) -> Iterator[Row]:
    """Jobs that are a line for the shell: `true`."""
    return _throughput(bench, "`true` by the shell", SHELL_TRUE, ["/bin/sh", "-c", "true"])


@figure
def program_jobs(bench: Bench) -> Iterator[Row]:
    """Jobs that are a program, with no shell between: ["/bin/true"]."""
    return _throughput(bench, "/bin/true, no shell", BARE_TRUE, BARE_TRUE)


def _throughput(bench: Bench, what: str, job: str | list[str], bare: Sequence[str]) -> Iterator[Row]:
    """Jobs a second by 1, 2 and 4 workers against a bare loop in 1, 2 and 2 processes."""
    for workers, processes, jobs in ((1, 1, 1000), (2, 2, 1600), (4, 2, 1600)):
        ours, baseline = in_turns(
            TURNS,
            functools.partial(bench.jobs_a_second, workers, jobs, job),
            functools.partial(bench.bare_jobs_a_second, processes, jobs, bare),
        )
        yield compared(f"{what}, {_workers(workers)} : bare loop", "jobs/s", ours, baseline, Goal(">=", 0.9))


def _workers(count: int) -> str:
    return f"{count} worker{'s' * (count != 1)}"


@figure
def real_jobs(bench: Bench) -> Iterator[Row]:
    """Jobs that are real work, 200 of 50 ms of CPU each, by 4 workers, against `xargs -P4`."""
    if not shutil.which("xargs"):
        raise Skipped("needs xargs")
    jobs = 200
    line = _burn(0.05)

    def by_xargs() -> float:
        command = ["xargs", "-P4", "-n1", "/bin/sh", "-c", line]
        given = os.path.join(bench.directory(), "numbers")
        with open(given, "w") as file:
            file.writelines(f"{n}\n" for n in range(jobs))
        return jobs / seconds(lambda: bench.run(command, stdin=given))

    ours, baseline = in_turns(TURNS, lambda: bench.jobs_a_second(4, jobs, line), by_xargs)
    yield compared("50 ms of CPU each, 4 workers : xargs -P4", "jobs/s", ours, baseline, Goal(">=", 0.97))


def _burn(wanted_s: float) -> str:
    """A line for the shell that uses about so much CPU on this machine."""
    line = "i=0; while [ $i -lt {} ]; do i=$((i+1)); done"
    tries = [seconds(lambda: subprocess.run(["/bin/sh", "-c", line.format(50_000)], check=True)) for _ in range(5)]
    return line.format(int(50_000 * wanted_s / statistics.median(tries)))


@figure
def enqueue_one(bench: Bench) -> Iterator[Row]:
    """One `enqueue` from the shell, against a Python that imports what it needs."""
    home, baseline = bench.home(), "import click, sqlite3, json"
    arguments = ["enqueue", "--", "true"]
    commands = ([*INSTALLED, *arguments], [sys.executable, "-c", baseline], [*SCRIPT, *arguments])
    measures = [functools.partial(seconds, functools.partial(bench.run, command, home)) for command in commands]
    for measure in measures:
        measure()  # makes the tables
    ours, imports, script = ([s * 1000 for s in times] for times in in_turns(25, *measures))
    yield compared(f"one `enqueue` : {baseline}", "ms", ours, imports, Goal("<=", 1.25))
    yield compared("the same as `python queuectl.py enqueue`", "ms", script, imports, None, "compiled at each call")
    with contextlib.closing(sqlite3.connect(home.database)) as db:
        db.execute("SELECT 1 FROM jobs").fetchone()  # as a worker does, it keeps the write-ahead log alive
        ours, imports = ([s * 1000 for s in times] for times in in_turns(25, *measures[:2]))
    yield compared("the same while others have the queue open", "ms", ours, imports, Goal("<=", 1.25))


@figure
def enqueue_many(bench: Bench) -> Iterator[Row]:
    """`enqueue -`, the whole command, against a bare executemany of the same rows in the same schema."""
    jobs = 50_000
    batch = os.path.join(bench.directory(), "batch.jsonl")
    with open(batch, "w") as file:
        file.writelines(json.dumps({"command": f"echo {n}"}) + "\n" for n in range(jobs))

    def by_us() -> float:
        home = bench.home()
        return jobs / seconds(lambda: bench.run([*INSTALLED, "enqueue", "-"], home, stdin=batch))

    def bare() -> float:
        home, now = bench.home(), q.now_ms()
        made = [(f"j{n:07x}", f'"echo {n}"', "/", now, now) for n in range(jobs)]
        with contextlib.closing(sqlite3.connect(home.database)) as db:
            return jobs / seconds(lambda: _insert(db, made))

    ours, baseline = in_turns(TURNS, by_us, bare)
    yield compared("`enqueue -` of 50,000 : executemany", "jobs/s", ours, baseline, Goal(">=", 0.35))


def _insert(db: sqlite3.Connection, made: Sequence[tuple[Any, ...]]) -> None:
    with db:
        db.executemany("INSERT INTO jobs (id, command, cwd, created_at, updated_at) VALUES (?, ?, ?, ?, ?)", made)


@figure
def pick_up(bench: Bench) -> Iterator[Row]:
    """From the commit of an enqueue to the command's first instruction, against starting it from here."""
    if not hasattr(os, "mkfifo"):
        raise Skipped("needs FIFOs")
    home = bench.home()
    path = os.path.join(bench.directory(), "fifo")
    os.mkfifo(path)
    line = f"echo > {path}"
    fifo = os.open(path, os.O_RDWR)

    def by_worker() -> float:
        time.sleep(0.05)  # the worker is to be idle again
        committed = enqueue(home, [line])
        os.read(fifo, 1)
        return (time.perf_counter() - committed) * 1000

    def by_hand() -> float:
        time.sleep(0.05)
        start = time.perf_counter()
        with subprocess.Popen(["/bin/sh", "-c", line]):
            os.read(fifo, 1)
            taken_s = time.perf_counter() - start
        return taken_s * 1000

    with bench.workers(home, 1):
        ours, baseline = in_turns(60, by_worker, by_hand)
    os.close(fifo)
    for name, part, most in (("median", 0.5, 3), ("p95", 0.95, 10)):
        a, b = percentile(ours, part), percentile(baseline, part)
        yield Row(f"pick-up by an idle worker : sh -c, {name}", "ms", a, b, a / b, Goal("<=", most, "difference"))


@figure
def idle_cpu(bench: Bench) -> Iterator[Row]:
    """What an idle worker uses of a core, the mean of eight."""
    home, watched_s = bench.home(), 6.0
    with bench.workers(home, 8) as pids:
        time.sleep(0.5)
        before = sum(map(cpu_seconds, pids))
        time.sleep(watched_s)
        share = (sum(map(cpu_seconds, pids)) - before) / len(pids) / watched_s
    yield Row("CPU of an idle worker : a core", "%", share * 100, 100, share, Goal("<=", 0.2, "ours"))


@figure
def memory(bench: Bench) -> Iterator[Row]:
    """What each of eight workers holds of its own, after some jobs, against a bare Python."""

    def each_worker() -> float:
        home = bench.home()
        with bench.workers(home, 8) as pids:
            enqueue(home, [SHELL_TRUE] * 160)
            while rows(home, "SELECT count(*) FROM jobs WHERE state = 'completed'") != [(160,)]:
                time.sleep(POLL_S)
            return statistics.mean(kib_of(pid, "smaps_rollup", "Pss") for pid in pids) / 1024

    def bare_python() -> float:
        with bench.start("-c", "import click, sqlite3; print(flush=True); input()") as child:
            assert child.stdout and child.stdin
            child.stdout.readline()
            found = kib_of(child.pid, "smaps_rollup", "Pss") / 1024
            child.stdin.write("\n")
        return found

    ours, baseline = in_turns(TURNS, each_worker, bare_python)
    yield compared("memory of each of 8 workers : bare Python", "MiB PSS", ours, baseline, Goal("<=", 0.7))


@figure
def memory_growth(bench: Bench) -> Iterator[Row]:
    """A worker's memory after 100,000 jobs that take no time, against after 100."""
    jobs = 100_000
    home = bench.home()
    fill_waiting(home, jobs)
    with bench.start("-c", f"import bench; bench.serve_instantly({jobs})", home=home) as child:
        assert child.stdout
        found = [int(line) / 1024 for line in child.stdout if line.strip().isdigit()]
    early, late = found
    yield Row("memory of a worker after 100,000 jobs : 100", "MiB RSS", late, early, late / early, Goal("<=", 1.05))


def fill_waiting(home: q.Home, jobs: int) -> None:
    """Put waiting jobs into an empty queue by SQL."""
    with contextlib.closing(sqlite3.connect(home.database, isolation_level=None)) as db:
        db.execute("BEGIN")
        _fill_kind(db, 0, jobs, KINDS["waiting"])
        db.execute("COMMIT")


def serve_instantly(jobs: int) -> None:
    """Be a real worker whose attempts end at once; prints its memory in KiB after 100 jobs and after all."""
    done = 0

    def instant(*_: object) -> q.Outcome:
        nonlocal done
        done += 1
        if done in (100, jobs):
            print(kib_of(os.getpid(), "status", "VmRSS"), flush=True)
        return q.Outcome(q.EndReason.EXITED, 0)

    setattr(q, "run_attempt", instant)  # noqa: B010 -- it is to take anything
    q.serve(q.open_home(), (), drain=True)


@figure
def crowd(bench: Bench) -> Iterator[Row]:
    """16 and 64 workers that contend, against 2; so many jobs that the first of each worker do not count."""
    crowds = (2, 16, 64)
    two, *others = in_turns(TURNS, *(functools.partial(bench.jobs_a_second, n, 10_000, SHELL_TRUE) for n in crowds))
    for n, rates, least in zip(crowds[1:], others, (0.9, 0.8), strict=True):
        yield compared(f"`true` by the shell, {n} workers : 2 workers", "jobs/s", rates, two, Goal(">=", least))


@figure
def large_claim(bench: Bench) -> Iterator[Row]:
    """Finish and claim with 1,000,000 jobs of each kind, against 1,000 of each."""
    big, small = bench.large
    sides = [Exchanges(big), Exchanges(small)]
    in_turns(50, *(side.time_one for side in sides))  # fills the caches
    ours, baseline = ([s * 1e6 for s in times] for times in in_turns(600, *(side.time_one for side in sides)))
    for side in sides:
        side.close()
    yield compared("claim + finish, 1,000,000 of each kind : 1,000", "us", ours, baseline, Goal("<=", 1.3))


@figure
def large_looks(bench: Bench) -> Iterator[Row]:
    """`status` and `list`, the whole commands, with 5,000,000 jobs, against 5,000."""
    for command in ("status", "list"):
        run = functools.partial(bench.run, [*INSTALLED, command])
        measures = [functools.partial(seconds, functools.partial(run, home)) for home in bench.large]
        ours, baseline = ([s * 1000 for s in times] for times in in_turns(7, *measures))
        yield compared(f"`{command}` with 5,000,000 jobs : 5,000", "ms", ours, baseline, Goal("<=", 1.5))


@figure
def families(bench: Bench) -> Iterator[Row]:
    """What commands take over 40,000 jobs that wait for each other, against 10,000: a chain, one parent, one child."""
    for shape, after in FAMILIES.items():
        sizes = (40_000, 10_000)
        many, few = (_family_seconds(bench, count, after) for count in sizes)
        for command, taken_s in many.items():
            ratio = taken_s / few[command]
            yield Row(f"{command}, {shape}, 40,000 : 10,000", "s", taken_s, few[command], ratio, Goal("<=", 5))


FAMILIES: dict[str, Callable[[int, int], list[str]]] = {
    "a chain": lambda n, last: [f"n{n + 1}"] if n < last else [],  # children first
    "one parent": lambda n, last: ["n0"] if n else [],
    "one child": lambda n, last: [] if n else [f"n{parent}" for parent in range(1, last + 1)],
}


def _family_seconds(bench: Bench, count: int, after: Callable[[int, int], list[str]]) -> dict[str, float]:
    """How much CPU each command uses on a family of so many jobs."""
    tagged = q.Selection(tag="t")
    home = bench.home()
    with q.open_store(home.database) as store:
        changes = store.changes
        specs = (("", {"command": "true", "cwd": "/", "id": f"n{n}", "tag": "t", "after": after(n, count - 1) or None})
                 for n in range(count))  # fmt: skip
        steps: dict[str, Callable[[], Iterable[Any]]] = {
            "`enqueue -`": lambda: store.intake.enqueue(specs, q.now_ms()),
            "`hold`": lambda: changes.set_hold(tagged, True, q.now_ms()),
            "`edit`": lambda: changes.edit(tagged, {"priority": 3}, q.now_ms()),
            "`cancel`": lambda: changes.cancel(tagged, q.now_ms()),
            "`rerun`": lambda: changes.rerun(tagged, q.now_ms()),
        }
        return {name: _cpu_of(step) for name, step in steps.items()}


def _cpu_of(step: Callable[[], Iterable[Any]]) -> float:
    start = time.process_time()
    q.do_to_the_end(step())
    return time.process_time() - start


@figure
def due_at_once(bench: Bench) -> Iterator[Row]:
    """Finish and claim while 500,000 jobs come due at one moment, against as many that wait for nothing."""
    homes = bench.home(), bench.home()
    for home in homes:
        fill_waiting(home, 500_000)
    with contextlib.closing(sqlite3.connect(homes[0].database)) as db, db:
        now = q.now_ms()
        db.execute("UPDATE jobs SET run_at = ?, due_at = ? WHERE seq % 50", (now, now))
    sides = [Exchanges(home) for home in homes]
    in_turns(50, *(side.time_one for side in sides))
    ours, baseline = ([s * 1e6 for s in times] for times in in_turns(600, *(side.time_one for side in sides)))
    for side in sides:
        side.close()
    yield compared("claim + finish, 500,000 come due : ready", "us", ours, baseline, Goal("<=", 1.5))


@figure
def large_changes(bench: Bench) -> Iterator[Row]:
    """How long a claim waits at most while 300,000 jobs are cancelled, and the memory of commands on so many."""
    if not hasattr(os, "wait4"):
        raise Skipped("needs os.wait4")
    home = bench.home()
    fill_waiting(home, 300_000)
    with contextlib.closing(sqlite3.connect(home.database)) as db, db:
        db.execute("UPDATE jobs SET tag = 't' WHERE seq % 50")
    for command in (["list", "--json"], ["export", "--tag", "t"], ["wait", "--tag", "t", "--timeout", "2"]):
        yield Row(f"memory of `{command[0]}` with 300,000 jobs", "MiB RSS", _peak_mib(bench, home, command), None, None,
                  Goal("<=", 64, "ours"))  # fmt: skip
    with bench.workers(home, 2):
        calm = _longest_wait_ms(home, 3.0)
        with bench.start(*INSTALLED[1:], "cancel", "--tag", "t", home=home) as cancel:
            busy = _longest_wait_ms(home, 6.0)
            cancel.terminate()
    name = "longest wait of a claim during `cancel --tag` : without"
    yield Row(name, "ms", busy, calm, busy / calm, Goal("<=", 100, "ours"))


def _peak_mib(bench: Bench, home: q.Home, command: Sequence[str]) -> float:
    """The most memory that a command holds."""
    with subprocess.Popen([*INSTALLED, *command], env=bench.env(home), stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=bench.root) as child:  # fmt: skip
        _, child.returncode, usage = os.wait4(child.pid, 0)
    return usage.ru_maxrss / 1024


@figure
def large_prune(bench: Bench) -> Iterator[Row]:
    """How long a claim waits at most while `prune` removes a million jobs, against the same without it."""
    home, watched_s = bench.large[0], 6.0
    ended_left = "SELECT count(*) FROM jobs WHERE state IN ('completed', 'dead') AND worker = 0"
    with bench.workers(home, 4):
        calm = _longest_wait_ms(home, watched_s)
        [(before,)] = rows(home, ended_left)
        with bench.start(*INSTALLED[1:], "prune", home=home) as prune:
            busy = _longest_wait_ms(home, watched_s)
            prune.terminate()
        [(after,)] = rows(home, ended_left)
    note = f"{(before - after) / watched_s:,.0f} removed/s, watched for {watched_s:g} s"
    yield Row(
        "longest wait of a claim during `prune` : without", "ms", busy, calm, busy / calm, Goal("<=", 50, "ours"), note
    )


def _longest_wait_ms(home: q.Home, watched_s: float) -> float:
    """The longest time that a worker lost between two claims, beyond what it takes as a rule.

    A worker notes the time, and only then asks for the database: so the time between two starts of
    the same worker holds one job and one wait.
    """
    start = q.now_ms()
    time.sleep(watched_s)
    gaps = [
        gap for (gap,) in rows(home, f"""SELECT started_at - lag(started_at) OVER (PARTITION BY worker ORDER BY seq)
            FROM jobs WHERE worker > 0 AND started_at > {start}""")
        if gap is not None
    ]  # fmt: skip
    return float(max(1, max(gaps) - statistics.median(gaps)))


# ======================================================================== peers


class Peer(NamedTuple):
    """Another queue: how it is found, and how long it takes over jobs that are `true` by the shell."""

    programs: Sequence[str]  # any of them will do
    seconds: Callable[[Bench, str, int, int], float]  # of a program, for so many workers and jobs
    jobs: int  # few where each must be enqueued by a process
    workers: Sequence[int] = (1, 2, 4)


def _xargs(bench: Bench, program: str, workers: int, jobs: int) -> float:
    given = os.path.join(bench.directory(), "numbers")
    with open(given, "w") as file:
        file.writelines(f"{n}\n" for n in range(jobs))
    return seconds(lambda: bench.run([program, f"-P{workers}", "-n1", "/bin/sh", "-c", "true"], stdin=given))


def _task_spooler(bench: Bench, program: str, workers: int, jobs: int) -> float:
    """The jobs wait behind one that reads a FIFO: the time runs from when it is let go."""
    folder = bench.directory()
    env = {**bench.env(), "TS_SOCKET": f"{folder}/socket", "TMPDIR": folder, "TS_MAXFINISHED": str(jobs + 1)}
    spool = functools.partial(subprocess.run, env=env, stdout=subprocess.DEVNULL, check=True)
    os.mkfifo(f"{folder}/gate")
    spool([program, "/bin/sh", "-c", f"cat {folder}/gate"])
    for _ in range(jobs):
        spool([program, "/bin/sh", "-c", "true"])
    spool([program, "-S", str(workers)])

    def let_go() -> None:
        with open(f"{folder}/gate", "w"):
            pass
        while b"queued" in (found := subprocess.run([program], env=env, stdout=subprocess.PIPE).stdout) or (
            b"running" in found
        ):
            time.sleep(0.02)

    try:
        return seconds(let_go)
    finally:
        spool([program, "-K"])


def _nq(bench: Bench, program: str, workers: int, jobs: int) -> float:
    """It runs one job at a time, in the order of arrival."""
    folder = bench.directory()
    env = {**bench.env(), "NQDIR": folder}
    run = functools.partial(subprocess.run, env=env, stdout=subprocess.DEVNULL, check=True)
    os.mkfifo(f"{folder}/gate")
    run([program, "/bin/sh", "-c", f"cat {folder}/gate"])
    for _ in range(jobs):
        run([program, "/bin/sh", "-c", "true"])

    def let_go() -> None:
        with open(f"{folder}/gate", "w"):
            pass
        run([program, "-w"])

    return seconds(let_go)


def _hyperqueue(bench: Bench, program: str, workers: int, jobs: int) -> float:
    """One worker of so many CPUs, and one array of jobs."""
    env = {**bench.env(), "HQ_SERVER_DIR": bench.directory()}
    hq = functools.partial(subprocess.run, env=env, stdout=subprocess.DEVNULL, check=True)
    start = functools.partial(subprocess.Popen, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    array = ["submit", "--stdout=none", "--stderr=none", "--wait", f"--array=1-{jobs}", "/bin/sh", "-c", "true"]
    with start([program, "server", "start"]), start([program, "worker", "start", f"--cpus={workers}"]):
        try:
            hq([program, "worker", "wait", "1"])
            return seconds(lambda: hq([program, *array]))
        finally:
            hq([program, "server", "stop"])


def _spoolctl(bench: Bench, program: str, workers: int, jobs: int) -> float:
    """Its workers are started by hand; what they need to start is taken off by a run without jobs."""
    folder = bench.directory()
    env = {**bench.env(), "HOME": folder}
    for _ in range(jobs):
        add = [program, "add", "--db", f"{folder}/queue.db", "--", "/bin/sh", "-c", "true"]
        subprocess.run(add, env=env, stdout=subprocess.DEVNULL, check=True, cwd=folder)

    def drain() -> None:
        work = [program, "work", "--drain", "--db", f"{folder}/queue.db"]
        quiet = functools.partial(subprocess.Popen, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for worker in [quiet(work, env=env, cwd=folder) for _ in range(workers)]:
            worker.wait()

    return seconds(drain) - seconds(drain)


HUEY = """
import subprocess, sys, time
from huey import SqliteHuey
huey = SqliteHuey(filename=sys.argv[1])
jobs = int(sys.argv[3])
spans = []
@huey.task()
def run():
    start = time.monotonic()
    subprocess.Popen(["/bin/sh", "-c", "true"]).wait()
    spans.append((start, time.monotonic()))
for _ in range(jobs):
    run()
consumer = huey.create_consumer(workers=int(sys.argv[2]))
consumer.start()
while len(spans) < jobs:
    time.sleep(0.02)
consumer.stop()
print(max(spans)[1] - min(spans)[0])
"""


def _huey(bench: Bench, program: str, workers: int, jobs: int) -> float:
    """Its SQLite storage and threads, which suit jobs that are other processes."""
    with bench.start("-c", HUEY, os.path.join(bench.directory(), "huey.db"), str(workers), str(jobs)) as child:
        assert child.stdout
        return float(child.stdout.read())


PEERS = {
    "xargs": Peer(["xargs"], _xargs, 900),
    "task-spooler": Peer(["tsp", "ts"], _task_spooler, 300),
    "nq": Peer(["nq"], _nq, 300, workers=[1]),
    "HyperQueue": Peer(["hq"], _hyperqueue, 900),
    "huey": Peer(["huey_consumer", "huey_consumer.py"], _huey, 900),
    "spoolctl": Peer(["spoolctl"], _spoolctl, 100),
}


def _find(programs: Sequence[str]) -> str | None:
    """Where one of the programs is: on the PATH, or beside this Python."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    return next(filter(None, (shutil.which(program, path=path) for program in programs)), None)


def peer_rows(bench: Bench, name: str, peer: Peer) -> Iterator[Row]:
    """Our jobs a second against a peer's, on the same jobs with as many workers."""
    program = _find(peer.programs)
    if program is None:
        raise Skipped(f"{name} is not installed")
    for workers in peer.workers:
        ours = functools.partial(bench.jobs_a_second, workers, 900, SHELL_TRUE)
        theirs = functools.partial(_peer_rate, bench, peer, program, workers)
        rates, their_rates = in_turns(TURNS, ours, theirs)
        yield compared(
            f"`true` by the shell, {_workers(workers)} : {name}", "jobs/s", rates, their_rates, Goal(">=", 1)
        )


def _peer_rate(bench: Bench, peer: Peer, program: str, workers: int) -> float:
    return peer.jobs / peer.seconds(bench, program, workers, peer.jobs)


# ======================================================================== the command

HEAD = ["figure : baseline", "ours", "baseline", "ratio", "unit", "goal", "", ""]
WIDTHS = [52, 8, 9, 6, 8, 11, 6]


def measured(bench: Bench, figures: Mapping[str, Figure]) -> Iterator[Row]:
    """The rows of some figures, as they come."""
    for name, measure in figures.items():
        try:
            yield from measure(bench)
        except Skipped as reason:
            yield Row(name, "", None, note=f"skipped: {reason}")


def table_line(cells: Sequence[str]) -> str:
    """Cells under one another, the numbers to the right."""
    padded = [c.rjust(w) if 1 <= i <= 3 else c.ljust(w) for i, (c, w) in enumerate(zip(cells, WIDTHS, strict=False))]
    return "  ".join([*padded, *cells[len(WIDTHS) :]]).rstrip()


def system() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "queuectl": q.__version__, "python": platform.python_version(), "sqlite": q.sqlite_version(),
        "system": f"{platform.system()} {platform.release()}", "cpus": os.cpu_count(),
    }  # fmt: skip


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", is_flag=True, help="Run the figures that are named, not all.")
@click.option("--peers", is_flag=True, help="And what other queues make of the same work; takes longer.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.argument("names", nargs=-1, type=click.Choice([*FIGURES, *PEERS]), metavar="[NAME]...")
def main(only: bool, peers: bool, as_json: bool, names: Sequence[str]) -> None:
    """Measure queuectl against baselines on this machine."""
    if only != bool(names):
        raise click.UsageError("say --only and at least one of: " + " ".join([*FIGURES, *PEERS]))
    others: dict[str, Figure] = {n: functools.partial(peer_rows, name=n, peer=peer) for n, peer in PEERS.items()}
    wanted = {name: run for name, run in {**FIGURES, **others}.items() if name in names} if only else dict(FIGURES)
    if peers:
        wanted |= others
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no workers and no homes are left behind
    start, found = time.monotonic(), []
    if not as_json:
        click.echo(table_line(HEAD))
    with tempfile.TemporaryDirectory(prefix="queuectl-bench-") as root:
        for row in measured(Bench(root), wanted):
            found.append(row)
            if not as_json:
                click.echo(table_line(row.cells()))
    took_s = round(time.monotonic() - start)
    if as_json:
        click.echo(json.dumps({**system(), "seconds": took_s, "figures": [row.document() for row in found]}))
    else:
        click.echo(f"{took_s} s; " + ", ".join(f"{name} {value}" for name, value in system().items()))


if __name__ == "__main__":
    main()
