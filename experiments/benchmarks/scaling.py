"""Times our training step by batch, image size, threads and devices, and watches its memory.

    python -m experiments.benchmarks.scaling [--only=batch]

Of each kind one setting varies; the others are 64 px, 32 images, all cores, one device. Devices are
virtual: they share the same cores, and show what dividing the work costs.
"""

import dataclasses
import functools
import itertools
import os
from pathlib import Path
from typing import Any

from cifar_jax.errors import exit_on_user_error
from experiments.benchmarks import interleaved
from experiments.benchmarks.command import make_parser, written_by
from experiments.benchmarks.interleaved import Report, Turns
from experiments.benchmarks.job import LONG_TURN, Job, as_command, make_stacks, take_turns
from experiments.benchmarks.ours import Training, create_ours

CORES = interleaved.usable_cores()
USUAL = {"batch": 32, "size": 64, "threads": CORES, "devices": 1}
VALUES = {
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "size": (32, 64, 96, 128, 192, 256),
    "threads": tuple(range(1, CORES + 1)),
    "devices": (1, 2, 4, 8),
}
LARGE = 128  # px, from which 8 images must do
MEMORY_STEPS, MEMORY_TURNS = 100, 20
PACKAGES = ("jax", "flax", "optax", "numpy")
RESULTS = Path(__file__).parent / "results" / "scaling"


def contender(setting: dict[str, int], turns: Turns) -> None:
    """Our step in one setting."""
    _limit(setting)
    job = _job(setting)
    training, stacks = Training(*create_ours(job)), make_stacks(job)
    take_turns(turns, lambda: training(stacks), "JitExecution.train")


def many_steps(setting: dict[str, int], turns: Turns) -> None:
    """Our step on several batches again and again, and what the process holds after each turn."""
    _limit(setting)
    job = dataclasses.replace(_job(setting), pixels_a_turn=LONG_TURN)
    training, stacks = Training(*create_ours(job)), make_stacks(job)
    stacks = list(itertools.islice(itertools.cycle(stacks), MEMORY_STEPS))
    for report in turns:
        training(stacks)
        report["resident_mb"] = resident_mb()


def resident_mb() -> float:
    """Returns the memory that this process has resident now, in MB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _limit(setting: dict[str, int]) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[: setting["threads"]])
    import jax

    jax.config.update("jax_num_cpu_devices", setting["devices"])


def _job(setting: dict[str, int]) -> Job:
    return Job("train", setting["size"] // 32, setting["batch"], "keras")


def settings_of(kind: str) -> list[dict[str, int]]:
    """Returns the settings in which one thing varies."""
    found = [{**USUAL, kind: value} for value in VALUES[kind]]
    for setting in found:
        setting["batch"] = (
            min(setting["batch"], 8) if setting["size"] >= LARGE else setting["batch"]
        )
    return found


def measure(kind: str, *, rounds: int) -> list[dict[str, Any]]:
    """Times each setting, round by round."""
    settings = settings_of(kind)
    workers = {
        str(setting[kind]): functools.partial(as_command, contender, setting)
        for setting in settings
    }
    reports = interleaved.run(workers, rounds=rounds)
    summary = interleaved.summarize(reports, base=str(USUAL[kind]))
    for setting, row in zip(settings, summary.values(), strict=True):
        row |= setting | {"image_ms": 1e3 * row["median"] / _job(setting).images_a_turn}
    return list(summary.values())


def measure_memory() -> list[Report]:
    """Runs 2,000 steps, a turn of 100 after the other."""
    worker = {"memory": functools.partial(as_command, many_steps, USUAL)}
    return interleaved.run(worker, rounds=MEMORY_TURNS)["memory"]


def format_results(results: dict[str, Any]) -> str:
    """Returns the Markdown page."""
    header = ["", "batch", "px", "threads", "devices", "ms an image", "ms a step", "peak MB"]
    pages = [
        "# Our training step, by batch, size, threads and devices",
        f"{written_by()}; medians of {results['rounds']} rounds, the notebook's model and "
        "optimizer.",
    ]
    for kind, rows in results["scaling"].items():
        cells = [
            [
                kind,
                *(str(row[key]) for key in USUAL),
                f"{row['image_ms']:.1f}",
                f"{row['image_ms'] * row['batch']:.0f}",
                f"{row['peak_mb']:,.0f}",
            ]
            for row in rows
        ]
        pages.append(interleaved.markdown_table(header, cells))
    if memory := results["memory"]:
        held = ", ".join(f"{report['resident_mb']:.0f}" for report in memory)
        pages.append(
            f"Memory held (MB) over {MEMORY_TURNS * MEMORY_STEPS:,} steps on several "
            f"batches in turn, {USUAL['size']} px and {USUAL['batch']} images, after every "
            f"{MEMORY_STEPS}, the first {MEMORY_STEPS} left out: {held}."
        )
    return "\n\n".join([*pages, interleaved.format_machine(results["machine"])])


def main() -> None:
    """Runs the benchmark and writes its results."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--only", choices=(*VALUES, "memory"), help="one kind, in a file of its own"
    )
    options = parser.parse_args()
    only = options.only
    machine = interleaved.describe_machine(PACKAGES)
    os.environ["JAX_PLATFORMS"] = "cpu"
    results = {
        "rounds": options.rounds,
        "scaling": {
            kind: measure(kind, rounds=options.rounds) for kind in VALUES if only in (None, kind)
        },
        "memory": measure_memory() if only in (None, "memory") else [],
        "machine": machine,
    }
    path = RESULTS.with_name(f"scaling_{only}") if only else RESULTS
    interleaved.write_results(options.results or path, results, text=format_results(results))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
