"""Side-by-side timings: each contender in a process of its own, all taking turns.

A machine that others use drifts by tens of per cent within minutes. So every round times one unit
of work of each contender, one after another and never two at once, and only ratios within a round
are compared. Each round has another order: a turn also pays for what the one before it has left in
the caches.
"""

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import signal
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.errors import RunError, UserError
from cifar_jax.recording.files import write_atomically

Report = dict[str, Any]  # of one turn: "seconds", "peak_mb", and what the contender adds
Turns = Iterator[Report]
Contender = Callable[[Turns], None]  # sets up and warms up, then does one unit of work a turn
BOOTSTRAPS = 10_000


class DeadContender(RunError):
    """A contender's process ended before its turns did; its own words are on stderr."""

    def __init__(self, name: str, exit_code: int | None):
        told = f"the process of {name} ended before its turns did"
        if exit_code == -signal.SIGKILL:
            told += "; it was killed, most likely for want of memory (fewer contenders need less)"
        super().__init__(told)
        self.name = name


def run(
    contenders: Mapping[str, Contender], *, rounds: int, say: Callable[[str], None] = print
) -> dict[str, list[Report]]:
    """Lets contenders take turns, after one round that does not count.

    Args:
      contenders: by name, functions that another process can import. A contender takes the next
        item of its argument to end one unit of work and wait for the next turn, and may put what
        it wants reported into the item.
      rounds: how many count.
      say: is told of each round.

    Returns:
      By name, the reports of each round.

    Raises:
      DeadContender: if one fails or is killed.
    """
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, contender in contenders.items():
            say(f"setting up {name}")
            workers[name] = stack.enter_context(_worker(name, contender))
        reports = {name: [] for name in workers}
        for number in range(rounds + 1):
            before = None
            for name in order_of(list(workers), number):
                reports[name].append({**workers[name](), "after": before})
                before = name
            seconds = ", ".join(
                f"{name} {taken[-1]['seconds']:.3f}" for name, taken in reports.items()
            )
            say(f"round {number or '0 (not counted)'}: {seconds}")
    return {name: taken[1:] for name, taken in reports.items()}


def order_of(names: Sequence[str], number: int) -> list[str]:
    """Returns the order of a round; over 2 n rounds each of n follows each other one equally often.

    A design of Williams (Australian Journal of Scientific Research A 2, 1949), made for what one
    treatment leaves behind for the next.
    """
    count = len(names)
    steps = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]  # 0, 1, -1, 2, -2, ...
    order = [names[(number + step) % count] for step in steps]
    return order[::-1] if number // count % 2 else order


def usable_cores() -> int:
    """Returns how many cores this process may use: `taskset` lowers it."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def _worker(name: str, contender: Contender) -> Iterator[Callable[[], Report]]:
    """Starts a contender's process and waits until it is set up; the value takes one turn."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(contender, theirs), daemon=True)
    process.start()
    theirs.close()  # so that a dead worker is an EOFError here

    def receive() -> Report:
        try:
            return ours.recv()
        except (EOFError, OSError) as error:
            process.join(30)
            raise DeadContender(name, process.exitcode) from error

    def take_turn() -> Report:
        with contextlib.suppress(ConnectionError):  # if it has died, to receive will tell
            ours.send(True)
        return receive()

    try:
        receive()
        yield take_turn
    except KeyboardInterrupt:
        process.kill()
        raise
    finally:
        ours.close()
        process.join(30)
        process.kill()


def _serve(contender: Contender, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who waits
    contender(_turns(connection))


def _turns(connection: Connection) -> Turns:
    report: Report = {}
    while True:
        connection.send(report)
        try:
            connection.recv()
        except EOFError:  # the end of the benchmark
            return
        report = {}
        start = time.perf_counter()
        yield report
        report["seconds"] = time.perf_counter() - start
        report["peak_mb"] = peak_mb()


def peak_mb() -> float:
    """Returns the most memory this process has had resident, in MB (Linux).

    `getrusage` would not do: what it tells starts from the memory of whoever started the process.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def fastest(candidates: Mapping[str, Callable[[], Any]], *, repeats: int = 2) -> dict[str, float]:
    """Returns the best seconds of each candidate, the fastest first; one untimed call before."""
    best = {}
    for name, work in candidates.items():
        work()
        best[name] = min(timeit.repeat(work, number=1, repeat=repeats))
    return dict(sorted(best.items(), key=lambda item: item[1]))


def summarize(reports: Mapping[str, Sequence[Report]], *, base: str) -> dict[str, dict[str, Any]]:
    """Returns, by name, median, range, and the ratio to `base`, paired by round.

    The ratio is the median over the rounds; its interval is the central 95 % of that median over
    resampled rounds (percentile bootstrap).
    """
    seconds = {name: np.array([r["seconds"] for r in taken]) for name, taken in reports.items()}
    rounds = len(seconds[base])
    samples = np.random.default_rng(0).integers(0, rounds, (BOOTSTRAPS, rounds))
    summary = {}
    for name, times in seconds.items():
        ratios = times / seconds[base]
        low, high = np.percentile(np.median(ratios[samples], axis=1), [2.5, 97.5])
        summary[name] = {
            "median": float(np.median(times)),
            "min": float(times.min()),
            "max": float(times.max()),
            "ratio": float(np.median(ratios)),
            "ratio_low": float(low),
            "ratio_high": float(high),
            "peak_mb": max(report["peak_mb"] for report in reports[name]),
        }
    return summary


def write_comparison(
    path: Path,
    reports: Mapping[str, Sequence[Report]],
    *,
    base: str,
    title: str,
    about: str,
    job: Mapping[str, Any],
    machine: Mapping[str, Any],
) -> None:
    """Writes `path`.md, a table of everybody's turns beside those of `base`, and `path`.json."""
    summary = summarize(reports, base=base)
    header = ["", "s a turn", "range", f"time over {base}", "95 % interval", "peak MB"]
    rows = [
        [
            name,
            f"{s['median']:.2f}",
            f"{s['min']:.2f}-{s['max']:.2f}",
            f"{s['ratio']:.3f}",
            f"{s['ratio_low']:.3f}-{s['ratio_high']:.3f}",
            f"{s['peak_mb']:,.0f}",
        ]
        for name, s in summary.items()
    ]
    text = "\n\n".join([f"# {title}", about, markdown_table(header, rows), format_machine(machine)])
    results = {"job": dict(job), "machine": machine, "summary": summary, "reports": reports}
    write_results(path, results, text=text)


def describe_machine(packages: Sequence[str]) -> dict[str, Any]:
    """Returns date, processor, load, commit and versions, as plain values.

    Call it before anything is timed: so it is the load of others, and what is missing is told.

    Raises:
      UserError: where a package is not installed.
    """
    from cifar_jax.recording.run_record import describe_environment

    environment = describe_environment()
    try:
        versions = {package: importlib.metadata.version(package) for package in packages}
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed; pip install -r requirements-dev.txt"
        ) from error
    return {
        "date": environment["started"][:10],
        **{key: environment[key] for key in ("platform", "cpu")},
        "cpu_count": usable_cores(),
        "load_average": os.getloadavg(),
        "git": environment["git"],
        "python": platform.python_version(),
        **versions,
    }


def format_machine(machine: Mapping[str, Any]) -> str:
    """Returns `describe_machine`'s answer as a sentence."""
    facts = dict(machine)
    git = facts.pop("git", None)
    commit = f"; commit {git['commit'][:7]}{', changed' if git['dirty'] else ''}" if git else ""
    date, cpu, cores = (facts.pop(key) for key in ("date", "cpu", "cpu_count"))
    load = ", ".join(f"{x:.1f}" for x in facts.pop("load_average"))
    del facts["platform"]
    versions = ", ".join(f"{name} {version}" for name, version in facts.items())
    return f"{date}, {cpu}, {cores} cores, load average {load}; {versions}{commit}."


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_results(path: Path, results: dict[str, Any], *, text: str) -> None:
    """Writes `path`.json and, for people, `path`.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".json", json.dumps(results, indent=1)), (".md", text)):
        write_atomically(path.with_name(path.name + suffix), content.encode() + b"\n")
