"""Times the transfer model against PyTorch and Keras: a train step, inference, or features.

    python -m experiments.benchmarks.resnet [--work=train] [--upsampling=8] [--batch-size=32]

Everybody computes the same network in float32 on all cores; README.md says what is compared.
"""

import argparse
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.errors import exit_on_user_error
from experiments.benchmarks import interleaved, limit, ours, peers
from experiments.benchmarks.command import add_size, make_parser, read_job, written_by
from experiments.benchmarks.interleaved import Report
from experiments.benchmarks.job import LONG_TURN, WORKS, Job, as_command, keeping_memory

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "flax", "optax", "tensorflow-cpu", "keras", "torch", "numpy")
TITLES = {"train": "One training step", "infer": "Inference", "features": "Feature extraction"}
OURS = {"ours": ours.ours, "plain-jax": ours.plain_jax}
PEERS = {
    "pytorch": peers.pytorch,
    "pytorch-compiled": peers.pytorch_compiled,
    "keras-tf": functools.partial(peers.keras, backend="tensorflow", jit_compile=False),
    "keras-tf-xla": functools.partial(peers.keras, backend="tensorflow", jit_compile=True),
    "keras-jax": functools.partial(peers.keras, backend="jax", jit_compile=True),
}
CONTENDERS = {name: functools.partial(as_command, run) for name, run in OURS.items()}
CONTENDERS |= {name: functools.partial(keeping_memory, run) for name, run in PEERS.items()}
CONTENDERS["pytorch-as-installed"] = peers.pytorch


def offered(job: Job) -> list[str]:
    """Returns the names of the contenders that can do a job: Keras has one of the two variants."""
    keras_too = job.variant == "keras"
    plain_too = job.work != "features"  # `cifar_jax.features` makes its own backbone
    return [
        name
        for name in CONTENDERS
        if (keras_too or not name.startswith("keras")) and (plain_too or name != "plain-jax")
    ]


def run(job: Job, names: Sequence[str], *, rounds: int) -> dict[str, Any]:
    """Lets our package and the named contenders take turns, the machine's own rate among them."""
    machine = interleaved.describe_machine(PACKAGES)
    workers = {name: functools.partial(CONTENDERS[name], job) for name in ("ours", *names)}
    reports = interleaved.run({**workers, limit.MACHINE: limit.machine}, rounds=rounds)
    rates = reports.pop(limit.MACHINE)
    return {
        "job": {**vars(job), "size": job.size, "images_a_turn": job.images_a_turn},
        "gflop_per_image": job.flop / 1e9,
        "machine": machine,
        "limit": limit.summarize_rates(rates) | {"rates": [each["gflops"] for each in rates]},
        "summary": summarize(job, reports, rates),
        "reports": reports,
    }


def summarize(
    job: Job, reports: Mapping[str, Sequence[Report]], rates: Sequence[Report]
) -> dict[str, dict[str, Any]]:
    """Adds to `interleaved.summarize` the time of an image, and the share of the machine's rate."""
    summary = interleaved.summarize(reports, base="ours")
    limit.add_shares(summary, reports, rates, flop=job.flop * job.images_a_turn)
    for name, row in summary.items():
        seconds = np.array([each["seconds"] for each in reports[name]]) / job.images_a_turn
        row["image_ms"] = [float(1e3 * f(seconds)) for f in (np.median, np.min, np.max)]
    return summary


def format_results(results: dict[str, Any]) -> str:
    """Returns the Markdown page."""
    job, limits, reports = results["job"], results["limit"], results["reports"]
    header = ["", "ms an image", "range", "ratio to ours", "95 % interval", "peak MB"]
    header += ["GFLOP/s", "share of the machine's rate", "last loss"]
    rows = []
    for name, s in results["summary"].items():
        median, low, high = s["image_ms"]
        loss = reports[name][-1]["loss"]
        rows.append(
            [
                name,
                f"{median:.1f}",
                f"{low:.1f}-{high:.1f}",
                f"{s['ratio']:.2f}",
                f"{s['ratio_low']:.2f}-{s['ratio_high']:.2f}",
                f"{s['peak_mb']:,.0f}",
                f"{s['gflops']:.0f}",
                f"{s['share']:.0%}",
                "" if loss is None else f"{loss:.3f}",
            ]
        )
    shares = results["summary"]["ours"]["shares"]
    return "\n".join(
        [
            f"# {TITLES[job['work']]}: {job['size']} px, batch {job['batch_size']}",
            "",
            f"{written_by()}; {len(reports['ours'])} rounds of {job['images_a_turn']} images.",
            "",
            interleaved.markdown_table(header, rows),
            "",
            f"By formula {results['gflop_per_image']:.2f} GFLOP an image, the stem counted as the "
            "plain convolution that ours folds. The machine's rate is that of the fastest of "
            f"these, in GFLOP/s, measured every round: {limit.format_rates(limits, shares)}.",
            "",
            *(f"- {name}: {taken[-1]['settings']}" for name, taken in reports.items()),
            "",
            interleaved.format_machine(results["machine"]),
        ]
    )


def parse_options() -> tuple[Job, argparse.Namespace]:
    """Reads the command line."""
    parser = make_parser(__doc__)
    add_size(parser, upsampling=8, batch_size=32)
    parser.add_argument("--work", choices=WORKS, default="train", help="(default: %(default)s)")
    parser.add_argument(
        "--variant",
        choices=("keras", "torchvision"),
        default="keras",
        help="of the network; Keras has its own only (default: %(default)s)",
    )
    parser.add_argument(
        "--contenders", nargs="+", metavar="NAME", help=f"of {', '.join(CONTENDERS)}; default: all"
    )
    options = parser.parse_args()
    settings = dict(work=options.work, variant=options.variant, pixels_a_turn=LONG_TURN)
    job = read_job(parser, options, **settings)
    unknown = set(options.contenders or ()) - set(offered(job))
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: not among {', '.join(offered(job))}")
    return job, options


def main() -> None:
    """Runs the benchmark and writes its results."""
    job, options = parse_options()
    # Everybody computes on the processor, and nobody logs.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    names = [name for name in options.contenders or offered(job) if name != "ours"]
    results = run(job, names, rounds=options.rounds)
    name = f"resnet_{job.work}_{job.size}px_batch{job.batch_size}"
    name += "_v1.5" if job.variant == "torchvision" else ""
    path = options.results or RESULTS / name
    interleaved.write_results(path, results, text=format_results(results))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
