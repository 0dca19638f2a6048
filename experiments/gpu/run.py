"""Compiles the whole training step for H100s that are not there, and writes what it takes.

    python -m experiments.gpu.run

Needs JAX's CUDA plug-in (`make test-gpu` brings it) and no GPU. README.md says what is in the
table; up to a minute a program on two cores.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from cifar_jax.errors import UserError, exit_on_user_error
from experiments.ahead import (
    MEMORY,
    Case,
    all_reduces,
    lower,
    measure,
    run_config,
    total_memory,
)
from experiments.benchmarks.interleaved import markdown_table, write_results

RESULTS = Path(__file__).parent / "results" / "programs"
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin")
PRECISIONS = {  # dtype, matmul_precision
    "float32": ("float32", "highest"),
    "tf32": ("float32", "default"),
    "bfloat16": ("bfloat16", "default"),
}
HEADER = (
    *("model", "variant", "px", "execution", "GPUs", "precision", "images a GPU"),
    *("arguments", "temporaries", "all", "of the memory", "arrays given away"),
    *("all-reduces", "MB", "largest"),
)


def h100_case(
    model: str,
    precision: str,
    batch: int,
    *,
    gpus: int = 1,
    execution: str = "jit",
    variant: str | None = None,
) -> Case:
    """Returns a case on `gpus` H100s, at a precision of `PRECISIONS`."""
    dtype, matmul_precision = PRECISIONS[precision]
    settings = dict(variant=variant, matmul_precision=matmul_precision)
    return Case(model, execution, f"h100:{gpus}", batch, dtype, **settings)


CASES = [
    h100_case("mlp", "float32", 32),
    h100_case("mlp", "float32", 32, gpus=8, execution="pmap"),
    *(h100_case("resnet50", name, size) for name in PRECISIONS for size in (32, 256, 512, 1024)),
    h100_case("resnet50", "bfloat16", 32, variant="torchvision"),
    h100_case("resnet50", "bfloat16", 32, execution="pmap"),
    h100_case("resnet50", "bfloat16", 32, gpus=8),
    h100_case("resnet50", "bfloat16", 32, gpus=8, execution="pmap"),
    h100_case("resnet50_best", "bfloat16", 256),
    h100_case("resnet50_best", "bfloat16", 32, gpus=8),
]


def compile_apart(case: Case) -> dict[str, Any]:
    """Compiles a case in a process of its own: where XLA's compiler aborts, that process dies.

    Returns:
      As `experiments.ahead.measure`; {"refused": why} where the process died.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(_compile, case).result()
        except BrokenProcessPool:
            return {"refused": "the compiler's process died"}


def _compile(case: Case) -> dict[str, Any]:
    jax.config.update("jax_platforms", "cpu")  # a GPU that is there would be another one
    return measure(case, lower(case))


def format_row(case: Case, row: Mapping[str, Any]) -> list[str]:
    """Returns the cells of one case."""
    names = {settings: name for name, settings in PRECISIONS.items()}
    model = run_config(case)["model"]
    is_mlp = model["name"] == "mlp"
    first = [
        *(case.model, "" if is_mlp else model["variant"]),
        *("32" if is_mlp else f"{32 * model['upsampling']}", case.execution, f"{case.chips}"),
        *(names[case.dtype, case.matmul_precision], f"{case.batch:,}"),
    ]
    if "refused" in row:
        return [*first, row["refused"], *[""] * (len(HEADER) - len(first) - 1)]
    total = total_memory(row)
    reduces = all_reduces(row)
    largest = max(reduces, key=lambda each: each["bytes"], default=None)
    return [
        *first,
        *(f"{size / 1e9:,.2f}" for size in (row["arguments"], row["temporaries"], total)),
        f"{total / MEMORY[case.chip]:.1%}",
        f"{row['aliased_leaves']} of {row['state_leaves']}",
        f"{len(reduces)}",
        f"{sum(each['bytes'] for each in reduces) / 1e6:,.2f}" if reduces else "",
        f"{largest['bytes'] / 1e6:,.2f} MB, {'/'.join(largest['dtypes'])}" if reduces else "",
    ]


def main() -> None:
    """Compiles all cases, and writes after each."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    plugins = importlib.util.find_spec("jax_plugins")
    if plugins is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        raise UserError(
            "JAX's CUDA plug-in is not installed; make test-gpu, then set PYTHONPATH=.venv/cuda"
        )
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    date = datetime.now(UTC).date().isoformat()
    programs: list[dict[str, Any]] = []
    for case in CASES:
        print(f"compiling {case}", flush=True)
        programs.append({"case": dataclasses.asdict(case), "program": compile_apart(case)})
        rows = [format_row(Case(**done["case"]), done["program"]) for done in programs]
        text = "\n".join(
            [
                "# The training step, compiled for NVIDIA's H100",
                "",
                f"Written by `python -m experiments.gpu.run`, {date}; "
                f"{', '.join(map(' '.join, versions.items()))}. Compiled, not run. Memory in GB "
                "on each GPU; README.md explains the columns.",
                "",
                markdown_table(HEADER, rows),
            ]
        )
        results = {"date": date, "versions": versions, "programs": programs}
        write_results(RESULTS, results, text=text)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
