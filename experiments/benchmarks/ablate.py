"""Times the training step without each of its fast paths: what each of them buys alone.

    python -m experiments.benchmarks.ablate [--upsampling=4] [--batch-size=16]

In each contender one path of `twins.py` is replaced by its plain twin. README.md has the findings.
"""

import argparse
import functools
import os
from pathlib import Path

from experiments.benchmarks import interleaved, ours
from experiments.benchmarks.interleaved import Turns
from experiments.benchmarks.job import Job, keeping_memory

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "flax", "optax", "numpy")


def ours_without(path: str, job: Job, turns: Turns) -> None:
    """The package's step with the plain twin of one of its fast paths."""
    from experiments.benchmarks.twins import TWINS

    twin = TWINS[path]
    setattr(twin.module, twin.name, twin.plain)
    ours.ours(job, turns)


def main() -> None:
    """Runs the benchmark and writes its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upsampling", type=int, default=4, help="of 32 px (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="that count (default: %(default)s)")
    options = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    from experiments.benchmarks.twins import TWINS

    job = Job("train", options.upsampling, options.batch_size, "keras")
    contenders = {"ours": functools.partial(keeping_memory, ours.ours, job)}
    for path in TWINS:
        run = functools.partial(ours_without, path)
        contenders[f"without: {path}"] = functools.partial(keeping_memory, run, job)
    reports = interleaved.run(contenders, rounds=options.rounds)
    summary = interleaved.summarize(reports, base="ours")
    rows = [
        [
            name,
            f"{1e3 * s['median'] / job.images_a_turn:.1f}",
            f"{s['ratio']:.2f}",
            f"{s['ratio_low']:.2f}-{s['ratio_high']:.2f}",
        ]
        for name, s in summary.items()
    ]
    header = ["", "ms an image", "time over ours", "95 % interval"]
    machine = interleaved.describe_machine(PACKAGES)
    flags = f"--upsampling={job.upsampling} --batch-size={job.batch_size}"
    text = "\n\n".join(
        [
            f"# The step without one of its fast paths: {job.size} px, batch {job.batch_size}",
            f"Written by `python -m experiments.benchmarks.ablate {flags}`; "
            f"{options.rounds} rounds of {job.images_a_turn} images.",
            interleaved.markdown_table(header, rows),
            interleaved.format_machine(machine),
        ]
    )
    results = {"job": vars(job), "machine": machine, "summary": summary, "reports": reports}
    name = f"ablate_{job.size}px_batch{job.batch_size}"
    interleaved.write_results(RESULTS / name, results, text=text)


if __name__ == "__main__":
    main()
