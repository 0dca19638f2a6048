"""The MLP's training epoch in Keras and PyTorch, each with its best settings."""

import functools
import os
from collections.abc import Callable, Sequence

import numpy as np

from experiments.benchmarks.interleaved import Turns, fastest
from experiments.benchmarks.peers import compile_keras

BATCH_SIZE = 32
LEARNING_RATE = 1e-3
STEPS_PER_EXECUTION = (1, 10, 32, 125, 1125)
SPLIT_SEED = 42  # as in configs/common.py


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


def keras_arrays_on_jax(turns: Turns) -> None:
    """The same on Keras's JAX backend."""
    os.environ["KERAS_BACKEND"] = "jax"
    keras_arrays(turns)


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
    tuning = fastest(candidates)
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
        f"threads={threads}, foreach={foreach}, compiled={compiled}": functools.partial(
            _torch_epoch, images, labels, *_create_torch_step(foreach, compiled), threads=threads
        )
        for threads in (1, 2)
        for foreach in (False, True)
        for compiled in (False, True)
    }
    _take_fastest(turns, candidates)


def _create_torch_step(foreach: bool, compiled: bool):
    """Returns (images, labels) -> loss, logits; and the optimizer's zero_grad and step."""
    import torch
    from torch.nn import Linear, ReLU
    from torch.nn.functional import cross_entropy

    model = torch.nn.Sequential(Linear(3072, 64), ReLU(), Linear(64, 64), ReLU(), Linear(64, 10))
    for kernel in (p for p in model.parameters() if p.ndim == 2):
        torch.nn.init.xavier_uniform_(kernel)
    # PyTorch's RMSprop has no fused form; alpha and eps are Keras's defaults.
    optimizer = torch.optim.RMSprop(
        model.parameters(), lr=LEARNING_RATE, alpha=0.9, eps=1e-7, foreach=foreach
    )

    def classify(x, y):
        logits = model(x)
        return cross_entropy(logits, y), logits

    if compiled:
        return torch.compile(classify), optimizer.zero_grad, torch.compile(optimizer.step)
    return classify, optimizer.zero_grad, optimizer.step


def _torch_epoch(images, labels, classify, zero_grad, update, *, threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    loss_sum, correct = torch.zeros(()), torch.zeros((), dtype=torch.long)
    for rows in torch.randperm(len(images)).split(BATCH_SIZE):
        x, y = images[rows], labels[rows]
        loss, logits = classify(x, y)
        zero_grad()
        loss.backward()
        update()
        loss_sum += loss.detach() * len(y)
        correct += (logits.detach().argmax(1) == y).sum()
    return float(loss_sum) / len(images)
