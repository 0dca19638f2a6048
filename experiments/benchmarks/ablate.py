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
    # Some paths are worth 2 or 3 %: with 7 rounds those could not be told from noise.
    parser.add_argument("--rounds", type=int, default=15, help="that count (default: %(default)s)")
    options = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    from experiments.benchmarks.twins import TWINS

    job = Job("train", options.upsampling, options.batch_size, "keras")
    contenders = {"ours": functools.partial(keeping_memory, ours.ours, job)}
    for path in TWINS:
        run = functools.partial(ours_without, path)
        contenders[f"without: {path}"] = functools.partial(keeping_memory, run, job)
    flags = f"--upsampling={job.upsampling} --batch-size={job.batch_size}"
    interleaved.write_comparison(
        RESULTS / f"ablate_{job.size}px_batch{job.batch_size}",
        interleaved.run(contenders, rounds=options.rounds),
        base="ours",
        title=f"The step without one of its fast paths: {job.size} px, batch {job.batch_size}",
        about=f"Written by `python -m experiments.benchmarks.ablate {flags}`; {options.rounds} "
        f"rounds of {job.images_a_turn} images.",
        job=vars(job),
        machine=interleaved.describe_machine(PACKAGES),
    )


if __name__ == "__main__":
    main()
