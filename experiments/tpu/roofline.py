"""An estimate: how fast chips could train the ResNet-50 at most, and what they would eat.

    python -m experiments.tpu.roofline

Arithmetic on published peaks and the compiled programs of results/programs.json; nothing is run.
Written to results/roofline.md and .json. README.md says how far it can be trusted.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from cifar_jax.errors import UserError, exit_on_user_error
from experiments.ahead import Case
from experiments.benchmarks.interleaved import markdown_table, write_results

FOLDER = Path(__file__).parent / "results"
EPOCH = 36_000  # images
IMAGE_BYTES = 32 * 32 * 3 + 4  # with its label


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of one chip."""

    name: str
    flops: float  # dense bfloat16 FLOP/s
    bandwidth: float  # of its memory, bytes/s
    source: str


# Compiled for v5e; its traffic stands for what the others' programs would move.
PROGRAM = Case("resnet50", "jit", "v5e:2x4", 128)
CHIPS = (
    Chip("TPU v5e", 197e12, 819e9, "cloud.google.com/tpu/docs/v5e"),
    Chip("TPU v6e", 918e12, 1640e9, "cloud.google.com/tpu/docs/v6e"),
    Chip("H100 SXM", 989e12, 3.35e12, "NVIDIA's H100 data sheet, without sparsity"),
    Chip("H200 SXM", 989e12, 4.8e12, "NVIDIA's H200 data sheet, without sparsity"),
)


def estimate(chip: Chip, *, flop: float, moved: float) -> dict[str, Any]:
    """Returns what an image takes by computing and by moving, in seconds, and images/s."""
    computing, moving = flop / chip.flops, moved / chip.bandwidth
    return {
        **dataclasses.asdict(chip),
        "computing": computing,
        "moving": moving,
        "with_traffic": 1 / max(computing, moving),
        "computing_only": 1 / computing,
    }


def format_results(results: dict[str, Any]) -> str:
    """Returns the Markdown page."""
    rows = [
        [
            each["name"],
            f"{each['flops'] / 1e12:,.0f}",
            f"{each['bandwidth'] / 1e9:,.0f}",
            f"{1e6 * each['computing']:,.0f}",
            f"{1e6 * each['moving']:,.0f}",
            f"{each['computing_only']:,.0f}",
            f"{each['with_traffic']:,.0f}",
            f"{EPOCH / each['with_traffic']:,.1f}",
            f"{each['computing_only'] * IMAGE_BYTES / 1e6:,.0f}",
            f"{each['computing_only'] / results['fed']:.1%}",
        ]
        for each in results["estimates"]
    ]
    header = [
        *("chip", "TFLOP/s", "GB/s", "computing, us an image", "moving, us an image"),
        *("images/s, computing only", "with that traffic", "seconds an epoch"),
        *("eats, MB/s, computing only", "of a host core"),
    ]
    sources = "; ".join(f"{each['name']}: {each['source']}" for each in results["estimates"])
    return "\n".join(
        [
            "# Roofline of the ResNet-50 at 256 px: an estimate, nothing was run",
            "",
            "Written by `python -m experiments.tpu.roofline`. bfloat16, one chip, the notebook's",
            f"recipe. An image takes {results['flop'] / 1e9:.2f} GFLOP and moves "
            f"{results['moved'] / 1e6:,.0f} MB,",
            f"as XLA counts them for {PROGRAM.topology} with {PROGRAM.batch} images a chip.",
            "",
            markdown_table(header, rows),
            "",
            f"A host core feeds {results['fed']:,.0f} images/s (feed.md). Peaks: {sources}.",
        ]
    )


def read_results(name: str, *, command: str) -> dict[str, Any]:
    """Returns what `command` has written to results/`name`.json.

    Raises:
      UserError: where that is not there.
    """
    path = FOLDER / f"{name}.json"
    if not path.exists():
        raise UserError(f"{path} is not there; python -m experiments.tpu.{command} writes it")
    return json.loads(path.read_text())


def main() -> None:
    """Reads the compiled program and the measured feed, and writes the estimate."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    programs = read_results("programs", command="run")["programs"]
    programs = {Case(**each["case"]): each["program"] for each in programs}
    if PROGRAM not in programs:
        missing = f"{FOLDER / 'programs.json'} has no {PROGRAM}"
        raise UserError(f"{missing}; python -m experiments.tpu.run compiles it")
    program, calls = programs[PROGRAM], read_results("feed", command="feed")["calls"]
    flop = program["flop"] / PROGRAM.batch
    moved = program["bytes_accessed"] / PROGRAM.batch
    results = {
        "flop": flop,
        "moved": moved,
        "fed": next(each["median"] for each in calls if each["batch_size"] == 256),
        "estimates": [estimate(chip, flop=flop, moved=moved) for chip in CHIPS],
    }
    write_results(FOLDER / "roofline", results, text=format_results(results))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
