"""Profiles the transfer model's training step: by shape of convolution, and by kind of operation.

    python -m experiments.benchmarks.layers [--upsampling=8] [--batch-size=8]

Each distinct convolution is timed alone, through the model's own functions, with PyTorch's beside.
Then some whole steps are traced, and the time of each instruction goes to its kind.
"""

import operator
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.errors import exit_on_user_error
from cifar_jax.memory import keep_freed_memory
from experiments.benchmarks import interleaved
from experiments.benchmarks.command import add_size, make_parser, read_job, written_by
from experiments.benchmarks.hlo import Program
from experiments.benchmarks.job import Job, make_stacks
from experiments.benchmarks.limit import Convolution, convolutions
from experiments.benchmarks.ours import Training, create_ours

PASSES = ("forward", "input gradient", "weight gradient")
TRACED_STEPS = 3
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "flax", "torch", "numpy")
Passes = dict[str, Callable[[], Any]]


def profile_layers(job: Job, backbone, *, rounds: int) -> list[dict[str, Any]]:
    """Times every distinct convolution of the network; the fastest round of each counts.

    Returns:
      For each shape: the names of its layers, GFLOP of one pass over the batch, and the seconds of
      each pass, ours and PyTorch's.
    """
    layers = defaultdict(list)
    for name, shape in convolutions(job.variant, job.size).items():
        layers[shape].append(name)
    rows = []
    for shape, names in layers.items():
        ours = our_passes(job, backbone, names[0], shape)
        torch = torch_passes(job, shape)
        seconds = {
            key: interleaved.fastest({"ours": ours[key], "pytorch": torch[key]}, repeats=rounds)
            for key in ours
        }
        gflop = 2 * shape.macs * job.batch_size / 1e9
        rows.append({**vars(shape), "layers": names, "gflop": gflop, "seconds": seconds})
        print(format_layer(rows[-1], step_seconds=None), flush=True)
    return rows


def our_passes(job: Job, backbone, name: str, shape: Convolution) -> Passes:
    """Returns the passes of one layer of our backbone; no images' gradient is ever asked for."""
    import jax
    from flax import nnx

    path = (*name.split("."), "kernel")
    graphdef, kernel, rest = nnx.split(backbone, lambda each, _: each == path, ...)

    def layer(kernel, x):
        net = nnx.merge(graphdef, kernel, rest)
        if name == "stem_conv":
            return net.stem(x, job.upsampling)
        if shape.kernel == 1:  # its block strides for it
            x = x[:, :: shape.stride, :: shape.stride]
        return operator.attrgetter(name)(net)(x)

    side = 32 if name == "stem_conv" else shape.side
    draw = np.random.default_rng(0).standard_normal
    x = jax.device_put(draw((job.batch_size, side, side, shape.features_in), np.float32))
    d = jax.device_put(
        draw((job.batch_size, shape.side_out, shape.side_out, shape.features_out), np.float32)
    )
    functions = {
        "forward": lambda kernel, x, d: layer(kernel, x),
        "input gradient": lambda kernel, x, d: jax.vjp(lambda x: layer(kernel, x), x)[1](d),
        "weight gradient": lambda kernel, x, d: jax.vjp(lambda k: layer(k, x), kernel)[1](d),
    }

    def compile_pass(function) -> Callable[[], Any]:
        compiled = jax.jit(function).lower(kernel, x, d).compile()
        return lambda: jax.block_until_ready(compiled(kernel, x, d))

    names = [key for key in PASSES if (name, key) != ("stem_conv", "input gradient")]
    return {key: compile_pass(functions[key]) for key in names}


def torch_passes(job: Job, shape: Convolution) -> Passes:
    """Returns the same of PyTorch, channels last."""
    import torch

    torch.set_num_threads(interleaved.usable_cores())
    padding = [shape.kernel // 2] * 2
    stride = [shape.stride] * 2

    def draw(*sizes: int):
        return torch.randn(*sizes).to(memory_format=torch.channels_last)

    x = draw(job.batch_size, shape.features_in, shape.side, shape.side)
    d = draw(job.batch_size, shape.features_out, shape.side_out, shape.side_out)
    kernel = draw(shape.features_out, shape.features_in, shape.kernel, shape.kernel)

    def backward(input_too: bool):
        wanted = [input_too, not input_too, False]
        options = (None, stride, padding, [1, 1], False, [0, 0], 1, wanted)
        return torch.ops.aten.convolution_backward(d, x, kernel, *options)

    return {
        "forward": lambda: torch.nn.functional.conv2d(x, kernel, None, stride, padding),
        "input gradient": lambda: backward(True),
        "weight gradient": lambda: backward(False),
    }


def profile_step(job: Job, config: dict[str, Any], model) -> dict[str, Any]:
    """Times whole compiled steps, then traces as many.

    Returns:
      Seconds of a step that is not traced, and by kind of operation the seconds, as traced, and
      instructions of a step; kinds may overlap in time, so that they add up to more than the step.
    """
    import jax

    training, stack = Training(config, model), make_stacks(job)[:1]
    placed = jax.device_put(stack[0], training.execution.stack_sharding)
    compiled = training.execution.compiled_train.lower(training.state, placed).compile()
    kinds = Program.parse(compiled.as_text()).kinds()
    training(stack * TRACED_STEPS)
    start = time.perf_counter()
    training(stack * TRACED_STEPS)
    seconds = (time.perf_counter() - start) / TRACED_STEPS
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            training(stack * TRACED_STEPS)
        (path,) = Path(folder).rglob("*.xplane.pb")
        durations = instruction_seconds(path)
    unknown = durations.keys() - kinds.keys()
    by_kind, counts = Counter(), Counter(kinds[name] for name in durations.keys() - unknown)
    for name, duration in durations.items():
        by_kind[kinds.get(name, "inside branches and loops")] += duration / TRACED_STEPS
    return {"seconds": seconds, "kinds": dict(by_kind.most_common()), "instructions": dict(counts)}


def instruction_seconds(path: Path) -> dict[str, float]:
    """Returns what each instruction took, by its name in the program, summed over a trace."""
    from jax.profiler import ProfileData

    seconds: Counter = Counter()
    for plane in ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name is not None:
                    seconds[name] += event.duration_ns / 1e9
    return dict(seconds)


def format_layer(row: dict[str, Any], *, step_seconds: float | None) -> list[str]:
    """Returns a layer's cells: each pass as ms of the batch and GFLOP/s, ours before PyTorch's."""
    cells = [
        f"{row['kernel']}x{row['kernel']}{' / 2' if row['stride'] == 2 else ''}, "
        f"{row['features_in']} to {row['features_out']}, {row['side']} px",
        str(len(row["layers"])),
        f"{row['gflop']:.2f}",
    ]
    for who in ("ours", "pytorch"):
        for each in PASSES:
            seconds = row["seconds"].get(each, {}).get(who)
            cells.append(f"{1e3 * seconds:.1f} ({row['gflop'] / seconds:.0f})" if seconds else "")
    if step_seconds is not None:
        cells.append(f"{our_seconds(row) / step_seconds:.1%}")
    return cells


def our_seconds(row: dict[str, Any]) -> float:
    """Returns what all layers of a shape take of a step, if they ran as they do alone."""
    return len(row["layers"]) * sum(seconds["ours"] for seconds in row["seconds"].values())


def format_results(results: dict[str, Any]) -> str:
    """Returns the Markdown page."""
    job, step, rows = results["job"], results["step"], results["layers"]
    header = ["convolution, input", "layers", "GFLOP", *(f"{x}, ours" for x in PASSES)]
    header += [*(f"{x}, PyTorch" for x in PASSES), "share of our step"]
    lines = [format_layer(row, step_seconds=step["seconds"]) for row in rows]
    total = sum(step["kinds"].values())
    kinds = [
        [
            kind,
            f"{1e3 * seconds / job['batch_size']:.1f}",
            f"{seconds / total:.0%}",
            str(step["instructions"].get(kind, "")),
        ]
        for kind, seconds in step["kinds"].items()
    ]
    whole = 1e3 * step["seconds"] / job["batch_size"]
    alone = 1e3 * sum(map(our_seconds, rows)) / job["batch_size"]
    return "\n".join(
        [
            f"# Where a training step goes: {job['size']} px, batch {job['batch_size']}",
            "",
            f"{written_by()}. Alone: ms a batch and, in brackets, GFLOP/s, fastest of "
            f"{results['rounds']}.",
            "",
            interleaved.markdown_table(header, lines),
            "",
            f"A whole step takes {whole:.1f} ms an image; all convolutions alone {alone:.1f}. "
            f"The trace of {TRACED_STEPS} steps, by kind of operation (a fusion is of the heaviest "
            "kind in it; kinds overlap in time):",
            "",
            interleaved.markdown_table(["", "ms an image", "share", "instructions"], kinds),
            "",
            interleaved.format_machine(results["machine"]),
        ]
    )


def main() -> None:
    """Runs the profile and writes its results."""
    parser = make_parser(__doc__, rounds=5)
    add_size(parser, upsampling=8, batch_size=8)
    parser.add_argument("--variant", choices=("keras", "torchvision"), default="keras")
    options = parser.parse_args()
    job = read_job(parser, options, variant=options.variant)
    machine = interleaved.describe_machine(PACKAGES)
    keep_freed_memory()  # as everybody does in the benchmarks of the whole step
    os.environ["JAX_PLATFORMS"] = "cpu"
    step = profile_step(job, *create_ours(job))  # first: layers leave gaps in the memory kept
    _, model = create_ours(job)  # the step has consumed the other one's arrays
    layers = profile_layers(job, model.backbone, rounds=options.rounds)
    results = {
        "job": {**vars(job), "size": job.size},
        "rounds": options.rounds,
        "machine": machine,
        "step": step,
        "layers": layers,
    }
    path = options.results or RESULTS / f"layers_{job.size}px_batch{job.batch_size}"
    interleaved.write_results(path, results, text=format_results(results))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
