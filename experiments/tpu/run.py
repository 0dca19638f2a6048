"""Compiles the whole training step for TPUs that are not there, and writes what it takes.

    python -m experiments.tpu.run

Needs requirements-tpu.txt. A ResNet-50 takes minutes; a stopped command goes on where it was. A
program that has changed since is dropped at once, and compiled again. README.md says what the
columns are.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cifar_jax.errors import UserError, exit_on_user_error
from experiments.ahead import MEMORY, Case, all_reduces, lower, measure, total_memory
from experiments.benchmarks.interleaved import markdown_table, write_results

RESULTS = Path(__file__).parent / "results" / "programs"
TOPOLOGIES = ("v5e:2x4", "v5e:16x16", "v6e:4x4")
CASES = [
    *(
        Case("mlp", execution, topology, batch)
        for topology in TOPOLOGIES
        for execution in ("jit", "pmap")
        for batch in (32, 128, 512, 1024)
    ),
    # Minutes each, so not all of a kind; a stopped command has compiled the first of them.
    Case("resnet50", "jit", "v5e:2x4", 32),
    Case("resnet50", "pmap", "v5e:2x4", 32),
    Case("resnet50", "jit", "v5e:16x16", 32),
    Case("resnet50", "jit", "v5e:2x4", 128),
    Case("resnet50", "jit", "v6e:4x4", 128),
    Case("resnet50", "jit", "v5e:2x4", 256),
    Case("resnet50", "jit", "v6e:4x4", 512),
    Case("resnet50", "jit", "v5e:2x4", 512),
    Case("resnet50", "jit", "v6e:4x4", 1024),
    Case("resnet50", "jit", "v5e:2x4", 1024),
    Case("resnet50", "pmap", "v5e:16x16", 32),
    Case("resnet50", "pmap", "v6e:4x4", 128),
    Case("resnet50_best", "jit", "v5e:2x4", 32),
    Case("resnet50", "jit", "v5e:16x16", 128),
    Case("resnet50", "jit", "v6e:4x4", 32),
    Case("resnet50", "jit", "v6e:4x4", 256),
    Case("resnet50", "pmap", "v5e:2x4", 128),
    Case("resnet50", "pmap", "v5e:16x16", 128),
    Case("resnet50", "jit", "v5e:16x16", 512),
    Case("resnet50", "pmap", "v6e:4x4", 32),
    Case("resnet50", "pmap", "v5e:2x4", 512),
    Case("resnet50", "pmap", "v6e:4x4", 512),
    Case("resnet50", "pmap", "v5e:2x4", 1024),
    Case("resnet50", "pmap", "v6e:4x4", 1024),
]
PACKAGES = ("jax", "jaxlib", "libtpu")
HEADER = (
    *(
        "model",
        "execution",
        "chips",
        "images a chip",
        "steps a call",
        "arguments",
        "padding",
        "outputs",
    ),
    *("aliased", "temporaries", "all", "of the chip's", "GFLOP", "GB accessed"),
    *("all-reduces", "MB", "largest", "compiled"),
)


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def program_hash(lowered: Any) -> str:
    """Returns what a result depends on: the program and the compiler."""
    parts = [*versions().values(), lowered.as_text()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def format_row(result: dict[str, Any]) -> list[str]:
    """Returns the cells of one case."""
    case, row = Case(**result["case"]), result["program"]
    first = [case.model, case.execution, case.topology, f"{case.batch:,}"]
    if "refused" in row:
        blank = [""] * (len(HEADER) - len(first) - 2)
        return [*first, f"refused: {row['refused']}", *blank, result["date"]]
    sizes = [row[key] for key in ("arguments", "padding", "outputs", "aliased", "temporaries")]
    total, reduces = total_memory(row), all_reduces(row)
    largest = max(reduces, key=lambda each: each["bytes"])
    return [
        *first,
        f"{row['steps_per_call']}",
        *(f"{size / 2**20:,.1f}" for size in [*sizes, total]),
        f"{total / MEMORY[case.chip]:.2%}",
        f"{row['flop'] / 1e9:,.2f}",
        f"{row['bytes_accessed'] / 1e9:,.2f}",
        f"{len(reduces)}",
        f"{sum(each['bytes'] for each in reduces) / 1e6:,.2f}",
        f"{largest['bytes'] / 1e6:,.2f} MB, {largest['arrays']} {'/'.join(largest['dtypes'])}",
        result["date"],
    ]


def format_results(results: dict[str, Any]) -> str:
    """Returns the Markdown page."""
    rows = [format_row(each) for each in results["programs"]]
    used = {tuple(each["versions"].items()) for each in results["programs"]}
    names = "; or ".join(", ".join(map(" ".join, each)) for each in sorted(used))
    done = [Case(**each["case"]) for each in results["programs"]]
    missing = "; ".join(
        f"{each.model} {each.execution} {each.topology} {each.batch}"
        for each in CASES
        if each not in done
    )
    return "\n".join(
        [
            "# The training step, compiled for TPUs",
            "",
            f"Written by `python -m experiments.tpu.run`; {names}. Compiled, never run.",
            "Memory in MiB and work of one step, each on one chip; README.md explains the columns.",
            "",
            markdown_table(HEADER, rows),
            *(["", f"Not compiled yet: {missing}."] if missing else []),
        ]
    )


def main() -> None:
    """Drops what is of another program, compiles what has no result, and writes after each."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed; pip install -r requirements-tpu.txt")
    os.environ["JAX_PLATFORMS"] = "cpu"  # the chips are only named
    path = RESULTS.with_suffix(".json")
    programs = json.loads(path.read_text())["programs"] if path.exists() else []
    print(f"tracing {len(CASES)} programs", flush=True)
    lowered = {case: lower(case) for case in CASES}
    hashes = {case: program_hash(program) for case, program in lowered.items()}
    by_case = {Case(**each["case"]): each for each in programs}
    by_case = {case: each for case, each in by_case.items() if each["hash"] == hashes.get(case)}
    write_cases(by_case)
    for case in CASES:
        if case not in by_case:
            print(f"compiling {case}", flush=True)
            by_case[case] = {
                "case": dataclasses.asdict(case),
                "hash": hashes[case],
                "versions": versions(),
                "date": datetime.now(UTC).date().isoformat(),
                "program": measure(case, lowered[case]),
            }
            write_cases(by_case)


def write_cases(by_case: Mapping[Case, Any]) -> None:
    """Writes what is known of the cases, in their order."""
    results = {"programs": [by_case[case] for case in CASES if case in by_case]}
    write_results(RESULTS, results, text=format_results(results))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
