"""Compiles the whole training step for an H100 that is not there, and writes what it takes.

    python -m experiments.gpu.ahead

Needs JAX's CUDA plug-in (`make test-gpu` brings it) and no GPU. README.md says what is in the
table; 20 to 30 seconds a program on two cores.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cifar_jax.errors import UserError, exit_on_user_error
from experiments.ahead import MEMORY, Case, lower, measure, total_memory
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
    *("arguments", "temporaries", "all", "of the memory", "arrays given away", "all-reduces"),
)


def case(model: str, precision: str, batch: int, gpus: int = 1, **others: Any) -> Case:
    """Returns a case on `gpus` H100s."""
    dtype, matmul_precision = PRECISIONS[precision]
    others = {"execution": "jit", **others}
    return Case(
        *(model, others.pop("execution"), f"h100:{gpus}", batch, dtype),
        **{"matmul_precision": matmul_precision, **others},
    )


BEST = dict(variant="torchvision", interpolation="bilinear", upsampling=7)
CASES = [
    case("mlp", "float32", 32),
    *(case("resnet50", name, batch) for name in PRECISIONS for batch in (32, 128, 512, 1024)),
    case("resnet50", "bfloat16", 32, variant="torchvision"),
    case("resnet50", "bfloat16", 32, execution="pmap"),
    case("resnet50", "bfloat16", 32, gpus=8),
    case("resnet50", "bfloat16", 32, gpus=8, execution="pmap"),
    case("resnet50_best", "bfloat16", 256, **BEST),
    case("resnet50_best", "bfloat16", 32, gpus=8, **BEST),
]


def compile_apart(each: Case) -> dict[str, Any]:
    """Compiles a case in a process of its own: where XLA's compiler aborts, that process dies.

    Returns:
      As `experiments.ahead.measure`; {"refused": why} of a compiler that aborted.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(_compile, each).result()
        except BrokenProcessPool:
            return {"refused": "the compiler aborted"}


def _compile(each: Case) -> dict[str, Any]:
    return measure(each, lower(each))


def format_row(each: Case, row: Mapping[str, Any]) -> list[str]:
    """Returns the cells of one case."""
    names = {settings: name for name, settings in PRECISIONS.items()}
    precision = names[each.dtype, each.matmul_precision]
    first = [
        *(each.model, each.variant, f"{32 * each.upsampling}" if each.model != "mlp" else "32"),
        *(each.execution, f"{each.chips}", precision, f"{each.batch:,}"),
    ]
    if "refused" in row:
        return [*first, row["refused"], *[""] * (len(HEADER) - len(first) - 1)]
    total = total_memory(row)
    return [
        *first,
        *(f"{size / 1e9:,.2f}" for size in (row["arguments"], row["temporaries"], total)),
        f"{total / MEMORY[each.chip]:.1%}",
        f"{row['aliased_leaves']} of {row['state_leaves']}",
        f"{len(row['collectives'])}",
    ]


def main() -> None:
    """Compiles all cases, and writes after each."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        raise UserError("JAX's CUDA plug-in is not installed; pip install -r requirements.txt")
    os.environ["JAX_PLATFORMS"] = "cpu"  # the GPU is only described
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    date = datetime.now(UTC).date().isoformat()
    programs: list[dict[str, Any]] = []
    for each in CASES:
        print(f"compiling {each}", flush=True)
        programs.append({"case": dataclasses.asdict(each), "program": compile_apart(each)})
        rows = [format_row(Case(**done["case"]), done["program"]) for done in programs]
        text = "\n".join(
            [
                "# The training step, compiled for NVIDIA's H100",
                "",
                f"Written by `python -m experiments.gpu.ahead`, {date}; "
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
