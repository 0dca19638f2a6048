"""Times one training epoch of the MLP against Keras and PyTorch.

    python -m experiments.benchmarks.mlp [--rounds=9]

Everybody trains the same model (3072-64-64-10, float32, RMSprop 1e-3) on the same 36,000 images in
batches of 32, shuffles every epoch, and counts loss and accuracy. README.md says what is compared.
"""

import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.data import sources
from cifar_jax.errors import exit_on_user_error
from experiments.benchmarks import interleaved
from experiments.benchmarks.command import make_parser
from experiments.benchmarks.interleaved import Turns
from experiments.benchmarks.peers import compile_keras

BATCH_SIZE = 32
LEARNING_RATE = 1e-3
STEPS_PER_EXECUTION = (1, 10, 32, 125, 1125)
SPLIT_SEED = 42  # as in configs/common.py
ENDLESS = "1000 epochs"
RESULTS = Path(__file__).parent / "results" / "mlp"
PACKAGES = ("jax", "flax", "optax", "tensorflow-cpu", "keras", "torch", "numpy")


def train_silently(prepare: Callable[[Any], None]) -> None:
    """Trains with `configs/mlp.py`, without end; `prepare` is given the loop before it starts."""
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


def load_train_arrays() -> tuple[np.ndarray, np.ndarray]:
    """Returns the training split as float32 [36000, 32, 32, 3] in 0..1 and int32 labels."""
    from cifar_jax.data.sources import load
    from cifar_jax.data.splits import make_splits

    split = make_splits(load(), protocol="notebook", seed=SPLIT_SEED)["train"]
    return split.images[split.indices].astype(np.float32) / 255, split.labels[split.indices]


def keras_arrays(turns: Turns) -> None:
    """Keras `fit` as the notebook calls it: arrays, everything else by default."""
    images, labels = load_train_arrays()
    model = create_keras_model(seed=0)
    for report in turns:
        history = model.fit(images, labels, batch_size=BATCH_SIZE, verbose=0)
        report["loss"] = history.history["loss"][0]


def keras_dataset(turns: Turns) -> None:
    """Keras `fit` from `tf.data`, one step an execution."""
    _keras(turns, steps_per_execution=(1,))


def keras_tuned(turns: Turns) -> None:
    """Keras `fit` from `tf.data` with the fastest `steps_per_execution`."""
    _keras(turns, steps_per_execution=STEPS_PER_EXECUTION)


def create_keras_model(
    *, seed: int, jit_compile: bool | str = "auto", steps_per_execution: int = 1
):
    """Returns the compiled Keras model (Glorot-uniform kernels are its default)."""
    import keras

    keras.utils.set_random_seed(seed)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )
    options = dict(jit_compile=jit_compile, steps_per_execution=steps_per_execution)
    compile_keras(model, learning_rate=LEARNING_RATE, **options)
    return model


def _keras(turns: Turns, *, steps_per_execution: Sequence[int]) -> None:
    import tensorflow as tf

    images, labels = load_train_arrays()
    dataset = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(images))
    dataset = dataset.batch(BATCH_SIZE).prefetch(tf.data.AUTOTUNE)

    def epoch_with(jit_compile: bool, steps: int) -> Callable[[], float]:
        model = create_keras_model(seed=0, jit_compile=jit_compile, steps_per_execution=steps)
        return lambda: model.fit(dataset, shuffle=False, verbose=0).history["loss"][0]

    candidates = {
        f"jit_compile={jit_compile}, steps_per_execution={steps}": epoch_with(jit_compile, steps)
        for jit_compile in (False, True)
        for steps in steps_per_execution
    }
    _take_fastest(turns, candidates)


def _take_fastest(turns: Turns, candidates: dict[str, Callable[[], float]]) -> None:
    tuning = interleaved.fastest(candidates)
    settings = next(iter(tuning))
    for report in turns:
        report["loss"] = candidates[settings]()
        report |= {"settings": settings, "tuning": tuning}


def pytorch(turns: Turns) -> None:
    """A tidy PyTorch loop over float tensors that lie ready in memory."""
    import torch

    images, labels = load_train_arrays()
    images, labels = torch.from_numpy(images).flatten(1), torch.from_numpy(labels).long()
    candidates = {
        f"threads={threads}, foreach={foreach}": functools.partial(
            _torch_epoch, images, labels, *_create_torch_model(foreach), threads=threads
        )
        for threads in (1, 2)
        for foreach in (False, True)
    }
    _take_fastest(turns, candidates)


def _create_torch_model(foreach: bool):
    import torch
    from torch.nn import Linear, ReLU

    model = torch.nn.Sequential(Linear(3072, 64), ReLU(), Linear(64, 64), ReLU(), Linear(64, 10))
    for kernel in (p for p in model.parameters() if p.ndim == 2):
        torch.nn.init.xavier_uniform_(kernel)
    # PyTorch's RMSprop has no fused form; alpha and eps are Keras's defaults.
    optimizer = torch.optim.RMSprop(
        model.parameters(), lr=LEARNING_RATE, alpha=0.9, eps=1e-7, foreach=foreach
    )
    return model, optimizer


def _torch_epoch(images, labels, model, optimizer, *, threads: int) -> float:
    import torch
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(threads)
    loss_sum, correct = torch.zeros(()), torch.zeros((), dtype=torch.long)
    for rows in torch.randperm(len(images)).split(BATCH_SIZE):
        x, y = images[rows], labels[rows]
        logits = model(x)
        loss = cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach() * len(y)
        correct += (logits.detach().argmax(1) == y).sum()
    return float(loss_sum) / len(images)


CONTENDERS = {
    "ours": ours,
    "ours, bare step": bare_step,
    "Keras fit(x, y)": keras_arrays,
    "Keras fit(tf.data)": keras_dataset,
    "Keras fit(tf.data), best steps_per_execution": keras_tuned,
    "PyTorch loop": pytorch,
}


def format_results(results: dict[str, Any]) -> str:
    """Returns the Markdown page."""
    reports, machine = results["reports"], results["machine"]
    header = ["", "seconds", "range", "ratio to ours", "95 % interval", "peak MB", "last loss"]
    rows = [
        [
            name,
            f"{s['median']:.3f}",
            f"{s['min']:.3f}-{s['max']:.3f}",
            f"{s['ratio']:.2f}",
            f"{s['ratio_low']:.2f}-{s['ratio_high']:.2f}",
            f"{s['peak_mb']:,.0f}",
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
            f"Written by `python -m experiments.benchmarks.mlp`; {len(reports['ours'])} rounds.",
            "",
            interleaved.markdown_table(header, rows),
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
    reports = interleaved.run(CONTENDERS, rounds=options.rounds)
    results = {
        "machine": machine,
        "summary": interleaved.summarize(reports, base="ours"),
        "reports": reports,
    }
    interleaved.write_results(options.results or RESULTS, results, text=format_results(results))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
