"""Times the training step without each of its fast paths: what each of them buys alone.

    python -m experiments.benchmarks.ablate [--upsampling=4] [--batch-size=16] [--paths PATH ...]

In each contender one path of `twins.py` is replaced by its plain twin. README.md has the findings.
"""

import functools
import os
from pathlib import Path

from cifar_jax.errors import exit_on_user_error
from experiments.benchmarks import interleaved, ours
from experiments.benchmarks.command import add_size, make_parser, read_job, written_by
from experiments.benchmarks.interleaved import Turns
from experiments.benchmarks.job import Job, as_command

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "flax", "optax", "numpy")
# Some paths are worth 2 or 3 %: 7 do not show them. In twice as many as there are contenders each
# follows each other equally often.
ROUNDS = 18


def ours_without(path: str, job: Job, turns: Turns) -> None:
    """The package's step with the plain twin of one of its fast paths."""
    from experiments.benchmarks.twins import TWINS

    twin = TWINS[path]
    setattr(twin.module, twin.name, twin.plain)
    ours.ours(job, turns)


def main() -> None:
    """Runs the benchmark and writes its results."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    from experiments.benchmarks.twins import TWINS

    parser = make_parser(__doc__, rounds=ROUNDS)
    add_size(parser, upsampling=4, batch_size=16)
    add = parser.add_argument
    add("--paths", nargs="+", choices=TWINS, default=[*TWINS], metavar="PATH", help="default: all")
    options = parser.parse_args()
    job = read_job(parser, options)
    machine = interleaved.describe_machine(PACKAGES)
    contenders = {"ours": functools.partial(as_command, ours.ours, job)}
    for path in options.paths:
        run = functools.partial(ours_without, path)
        contenders[f"without: {path}"] = functools.partial(as_command, run, job)
    interleaved.write_comparison(
        options.results or RESULTS / f"ablate_{job.size}px_batch{job.batch_size}",
        interleaved.run(contenders, rounds=options.rounds),
        base="ours",
        title=f"The step without one of its fast paths: {job.size} px, batch {job.batch_size}",
        about=f"{written_by()}; {options.rounds} rounds of {job.images_a_turn} images.",
        job=vars(job),
        machine=machine,
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
