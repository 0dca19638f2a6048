"""Times one training epoch of the MLP against Keras and PyTorch.

    python -m experiments.benchmarks.mlp [--rounds=9]

Everybody trains the same model (3072-64-64-10, float32, RMSprop 1e-3) on the same 36,000 images in
batches of 32 and counts loss and accuracy; all but our bare step shuffle every epoch. README.md
says what is compared.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.data import sources
from cifar_jax.errors import exit_on_user_error
from cifar_jax.memory import set_up_memory
from experiments.benchmarks import interleaved, limit, mlp_peers
from experiments.benchmarks.command import make_parser, written_by
from experiments.benchmarks.interleaved import Turns
from experiments.benchmarks.mlp_peers import BATCH_SIZE

TRAIN_IMAGES = 36_000
EPOCH_FLOP = TRAIN_IMAGES * limit.mlp_flop()
ENDLESS = "1000 epochs"
RESULTS = Path(__file__).parent / "results" / "mlp"
PACKAGES = ("jax", "flax", "optax", "tensorflow-cpu", "keras", "torch", "numpy")


def train_silently(prepare: Callable[[Any], None]) -> None:
    """Trains with `configs/mlp.py`, without end; `prepare` is given the loop before it starts."""
    set_up_memory()
    from cifar_jax.loop import Loop
    from cifar_jax.recording.recorder import SilentRecorder
    from cifar_jax.train import train_and_evaluate
    from configs.mlp import get_config

    fit = Loop.fit

    def prepare_and_fit(loop: Loop, *_: Any) -> None:
        loop.recorder = SilentRecorder()
        prepare(loop)
        fit(loop)

    Loop.fit = prepare_and_fit
    config = get_config()
    config.train_for = config.evaluate_every = config.checkpoint_every = ENDLESS
    with tempfile.TemporaryDirectory() as workdir:
        train_and_evaluate(config, workdir)


def ours(turns: Turns) -> None:
    """Our loop: one run, held up after every epoch."""
    from cifar_jax.metrics import Totals

    def prepare(loop):
        finish_edge, report = loop.finish_edge, {}

        def finish_edge_and_wait():
            nonlocal report
            finish_edge()
            if loop.step and loop.step % loop.plan.steps_per_epoch == 0:
                loop.settle()
                report["loss"] = loop.history.since_evaluation.means()["loss"]
                loop.history.since_evaluation = Totals()
                report = next(turns)

        loop.finish_edge = finish_edge_and_wait

    train_silently(prepare)


def bare_step(turns: Turns) -> None:
    """Our compiled scan over batches that lie ready on the device: no pipeline, no loop."""
    import jax

    from cifar_jax.data.pipeline import train_batches, train_rows

    def prepare(loop):
        plan = loop.plan
        calls = list(plan.calls(0))[: plan.steps_per_epoch // plan.steps_per_call]
        split = loop.splits["train"]
        batches = train_batches(split, train_rows(split, calls, batch_size=BATCH_SIZE, seed=0))
        stacks = [jax.tree.map(jax.numpy.asarray, batch) for batch in batches]
        train, state = loop.execution.compiled_train, loop.state
        report = {}
        while True:
            metrics = []
            for stack in stacks:
                state, sums = train(state, stack)
                metrics.append(sums.loss)
            losses = np.concatenate(jax.device_get(metrics))
            report["loss"] = float(losses.mean()) / BATCH_SIZE
            report = next(turns)

    train_silently(prepare)


CONTENDERS = {
    "ours": ours,
    "ours, bare step": bare_step,
    "Keras fit(x, y)": mlp_peers.keras_arrays,
    "Keras fit(x, y), on JAX": mlp_peers.keras_arrays_on_jax,
    "Keras fit(tf.data)": mlp_peers.keras_dataset,
    "Keras fit(tf.data), best steps_per_execution": mlp_peers.keras_tuned,
    "PyTorch loop": mlp_peers.pytorch,
}


def format_results(results: dict[str, Any]) -> str:
    """Returns the Markdown page."""
    reports, machine = results["reports"], results["machine"]
    header = ["", "seconds", "range", "ratio to ours", "95 % interval", "peak MB"]
    header += ["GFLOP/s", "share of the machine's rate", "last loss"]
    rates = limit.format_rates(results["limit"], results["summary"]["ours"]["shares"])
    rows = [
        [
            name,
            f"{s['median']:.3f}",
            f"{s['min']:.3f}-{s['max']:.3f}",
            f"{s['ratio']:.2f}",
            f"{s['ratio_low']:.2f}-{s['ratio_high']:.2f}",
            f"{s['peak_mb']:,.0f}",
            f"{s['gflops']:.0f}",
            f"{s['share']:.0%}",
            f"{reports[name][-1]['loss']:.3f}",
        ]
        for name, s in results["summary"].items()
    ]
    chosen = [
        f"- {name}: {taken[-1]['settings']}"
        for name, taken in reports.items()
        if "settings" in taken[-1]
    ]
    return "\n".join(
        [
            "# One training epoch of the MLP",
            "",
            f"{written_by()}; {len(reports['ours'])} rounds.",
            "",
            interleaved.markdown_table(header, rows),
            "",
            f"By formula {results['gflop']:.1f} GFLOP an epoch. The machine's rate is that of the "
            f"fastest of these, in GFLOP/s, measured every round: {rates}.",
            "",
            "Fastest settings, found in the warm-up:",
            "",
            *chosen,
            "",
            interleaved.format_machine(machine),
        ]
    )


def main() -> None:
    """Runs the benchmark and writes its results."""
    options = make_parser(__doc__, rounds=9).parse_args()
    machine = interleaved.describe_machine(PACKAGES)
    sources.load()  # missing images are told, or fetched, before anybody has set up
    # Everybody computes on the processor, and nobody logs.
    os.environ |= {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "tensorflow"}
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    reports = interleaved.run({**CONTENDERS, limit.MACHINE: limit.machine}, rounds=options.rounds)
    rates = reports.pop(limit.MACHINE)
    summary = interleaved.summarize(reports, base="ours")
    limit.add_shares(summary, reports, rates, flop=EPOCH_FLOP)
    results = {
        "machine": machine,
        "gflop": EPOCH_FLOP / 1e9,
        "limit": limit.summarize_rates(rates),
        "summary": summary,
        "reports": reports,
    }
    interleaved.write_results(options.results or RESULTS, results, text=format_results(results))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
