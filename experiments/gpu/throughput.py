"""Times the notebook's training step on a GPU against PyTorch: images/s, memory, share of peak.

    python -m experiments.gpu.throughput [--precisions float32 tf32 bfloat16] [--batch-sizes 32 ...]

Needs requirements.txt for a GPU and a PyTorch built for it. README.md says what is compared.
"""

import argparse
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar_jax.errors import RunError, UserError, exit_on_user_error
from experiments.benchmarks import interleaved
from experiments.benchmarks.command import add_upsampling, make_parser, positive, written_by
from experiments.benchmarks.interleaved import Turns
from experiments.benchmarks.job import Job
from experiments.gpu import contenders

RESULTS = Path(__file__).parent / "results" / "throughput"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")
CONTENDERS = {
    "ours": contenders.ours,
    "plain-jax": functools.partial(contenders.ours, plain=True),
    "pytorch": contenders.pytorch,
    "pytorch-compiled": functools.partial(contenders.pytorch, mode="default"),
    "pytorch-cuda-graphs": functools.partial(contenders.pytorch, mode="reduce-overhead"),
}
PRECISIONS = ("float32", "tf32", "bfloat16")
BATCH_SIZES = (32, 64, 128, 256, 512, 1024)
# Dense FLOP/s of NVIDIA's data sheets, by device: the SXM boards.
SXM = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
PEAKS = {name: {"float32": 67e12, "tf32": 494.7e12, "bfloat16": 989.4e12} for name in SXM}
HEADER = (
    *("precision", "batch", "", "images/s", "time over ours", "95 % interval"),
    *("GPU memory, GB", "TFLOP/s", "share of peak", "last loss"),
)


def run_case(
    job: Job, precision: str, names: Sequence[str], *, device: str, rounds: int, steps: int
) -> dict[str, Any]:
    """Lets all contenders train at one precision and batch size, and sums up who could.

    Returns:
      "summary" by contender, of `interleaved.summarize`, with images/s, FLOP/s and memory; "failed"
      by contender, with the error, for instance where the memory does not suffice.
    """
    workers = {
        name: functools.partial(failing_aloud, CONTENDERS[name], (job, precision, device, steps))
        for name in names
    }
    reports, failed = run_survivors(workers, rounds)
    failed |= {
        name: taken[-1].get("failed", "in the last turn")
        for name, taken in reports.items()
        if not all("loss" in each for each in taken)
    }
    done = {name: taken for name, taken in reports.items() if name not in failed}
    images = steps * job.batch_size
    # Without ours there is nothing to compare with, and speeds still count.
    base = "ours" if "ours" in done else next(iter(done), None)
    summary = interleaved.summarize(done, base=base) if done else {}
    for name, row in summary.items():
        row["images_per_second"] = images / row["median"]
        row["flops"] = job.flop * row["images_per_second"]
        row["gpu_bytes"] = max(each["gpu_bytes"] for each in done[name])
        row["device"] = done[name][-1]["device"]
        row["loss"] = done[name][-1]["loss"]
    case = {"precision": precision, "batch_size": job.batch_size, "base": base}
    return {**case, "summary": summary, "failed": failed, "reports": done}


def run_survivors(
    workers: Mapping[str, interleaved.Contender], rounds: int
) -> tuple[dict[str, list[interleaved.Report]], dict[str, str]]:
    """Runs all anew without the one whose process dies; returns the reports, and who died."""
    workers, dead = dict(workers), {}
    while workers:
        try:
            return interleaved.run(workers, rounds=rounds), dead
        except interleaved.DeadContender as error:  # aborted by the driver, or killed for memory
            dead[error.name] = str(error)
            del workers[error.name]
    return {}, dead


def failing_aloud(contender: Callable[..., None], setting: tuple, turns: Turns) -> None:
    """Runs a contender; one that fails reports the first line of its error in every turn."""
    try:
        contender(*setting, turns)
    except (RuntimeError, AssertionError) as error:  # memory; or a PyTorch without CUDA
        for report in turns:
            report["failed"] = str(error).partition("\n")[0]


def format_case(case: Mapping[str, Any]) -> list[list[str]]:
    """Returns the table's rows of one case."""
    first = [case["precision"], f"{case['batch_size']:,}"]
    rows = []
    for name, row in case["summary"].items():
        peak = PEAKS.get(row["device"], {}).get(case["precision"])
        compared = case["base"] == "ours"
        rows.append(
            [
                *(*first, name, f"{row['images_per_second']:,.0f}"),
                f"{row['ratio']:.2f}" if compared else "",
                f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}" if compared else "",
                f"{row['gpu_bytes'] / 1e9:.1f}",
                f"{row['flops'] / 1e12:.1f}",
                f"{row['flops'] / peak:.0%}" if peak else "",
                f"{row['loss']:.3f}",
            ]
        )
    blank = [""] * (len(HEADER) - 4)
    return rows + [[*first, name, f"failed: {why}", *blank] for name, why in case["failed"].items()]


def format_results(results: Mapping[str, Any]) -> str:
    """Returns the Markdown page."""
    rows = [row for case in results["cases"] for row in format_case(case)]
    devices = {row["device"] for case in results["cases"] for row in case["summary"].values()}
    return "\n".join(
        [
            f"# The training step on {', '.join(sorted(devices)) or 'no device'}",
            "",
            f"{written_by()}; {results['rounds']} rounds of "
            f"{results['steps']} steps, {results['size']} px; README.md explains the columns.",
            "",
            interleaved.markdown_table(HEADER, rows),
            "",
            interleaved.format_machine(results["machine"]),
        ]
    )


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    add("--batch-sizes", nargs="+", type=positive, default=BATCH_SIZES, metavar="N")
    add("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS], help="default: all")
    add_upsampling(parser, default=8)
    add("--steps", type=positive, default=20, help="in one turn (default: %(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command itself")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all cases, and writes after each in which somebody could.

    Raises:
      RunError: if nobody could in any.
    """
    options = parse_options(arguments)
    # Contenders share the GPU's memory: nobody may take what it does not use.
    os.environ |= {"JAX_PLATFORMS": options.device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    from cifar_jax.parallel import check_devices

    try:
        check_devices()
    except UserError as error:
        raise UserError(f"{error}; --device=cpu tries the command itself") from error
    results = {
        "machine": interleaved.describe_machine(PACKAGES),
        "rounds": options.rounds,
        "steps": options.steps,
        "size": 32 * options.upsampling,
        "cases": [],
    }
    for precision in options.precisions:
        for batch_size in options.batch_sizes:
            print(f"{precision}, batch {batch_size}", flush=True)
            job = Job("train", options.upsampling, batch_size, "keras")
            case = run_case(
                *(job, precision, options.contenders),
                **{"device": options.device, "rounds": options.rounds, "steps": options.steps},
            )
            results["cases"].append(case)
            if any(each["summary"] for each in results["cases"]):
                path = options.results or RESULTS
                interleaved.write_results(path, results, text=format_results(results))
    if not any(each["summary"] for each in results["cases"]):
        name, why = next(iter(results["cases"][0]["failed"].items()))
        raise RunError(f"no contender could train; nothing was written; {name}: {why}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
