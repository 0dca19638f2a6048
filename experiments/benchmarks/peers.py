"""The transfer model in PyTorch and Keras, each with its own loop and at its best settings."""

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmarks import limit
from experiments.benchmarks.interleaved import Turns, fastest, usable_cores
from experiments.benchmarks.job import LEARNING_RATE, Job, for_each, load_images, take_turns


def pytorch(job: Job, turns: Turns) -> None:
    """Eager PyTorch, channels last."""
    _run_torch(job, turns, compiled=False)


def pytorch_compiled(job: Job, turns: Turns) -> None:
    """PyTorch with `torch.compile` over model and loss; its weights frozen for inference."""
    _run_torch(job, turns, compiled=True)


def create_torch(job: Job):
    """Returns the network as a PyTorch module of uint8 images [B, 32, 32, 3]."""
    import torch
    from torch import nn

    from tests.references.torch_resnet50 import Bottleneck, ResNet50

    net = ResNet50(1)
    if job.variant == "keras":
        for block in (each for each in net.modules() if isinstance(each, Bottleneck)):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
        for conv in (each for each in net.modules() if isinstance(each, nn.Conv2d)):
            conv.bias = nn.Parameter(torch.zeros(conv.out_channels))

    class Transfer(nn.Module):
        def __init__(self):
            super().__init__()
            stem = (net.conv1, net.bn1, nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
            stages = (net.layer1, net.layer2, net.layer3, net.layer4)
            self.backbone = nn.Sequential(*stem, *stages)
            self.head = nn.Identity() if job.work == "features" else _torch_head(job)

        def forward(self, images):
            x = images.permute(0, 3, 1, 2).float() / 255
            x = nn.functional.interpolate(x, scale_factor=job.upsampling, mode="nearest")
            maps = self.backbone(x)
            return maps.mean((2, 3)) if job.work == "features" else self.head(maps)

    return Transfer().to(memory_format=torch.channels_last)


def _torch_head(job: Job):
    from torch import nn

    def norm(features: int):
        return nn.BatchNorm1d(features, eps=1e-3, momentum=0.01)

    flat = job.upsampling**2 * limit.CHANNELS
    first, second = limit.HIDDEN
    return nn.Sequential(
        *(nn.Flatten(), norm(flat)),
        *(nn.Linear(flat, first), nn.ReLU(inplace=True), nn.Dropout(0.5), norm(first)),
        *(nn.Linear(first, second), nn.ReLU(inplace=True), nn.Dropout(0.5), norm(second)),
        nn.Linear(second, limit.CLASSES),
    )


def _run_torch(job: Job, turns: Turns, *, compiled: bool) -> None:
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(usable_cores())
    images, labels = load_images(job)
    images, labels = torch.from_numpy(images).split(job.batch_size), torch.from_numpy(labels)
    labels = labels.long().split(job.batch_size)
    model = create_torch(job).train(job.work == "train")
    if job.work == "train":
        work = functools.partial(_torch_train(model, compiled), images, labels)
    else:
        if compiled:
            torch._inductor.config.freezing = True  # folds batch norms, packs weights for oneDNN
            model = torch.compile(model)
        work = functools.partial(_torch_infer, model, images)
    settings = f"channels last, {torch.get_num_threads()} threads"
    take_turns(turns, work, settings + (", torch.compile" if compiled else ""))


def _torch_infer(model, images) -> None:
    import torch

    with torch.inference_mode():
        for_each(model, images)


def _torch_train(model, compiled: bool) -> Callable[..., float]:
    update = torch_update(model, mode="default" if compiled else None)

    def train(images, labels) -> float:
        for x, y in zip(images, labels, strict=True):
            loss = update(x, y)
        return float(loss.detach())

    return train


def torch_update(model, *, mode: str | None, autocast=None) -> Callable[..., Any]:
    """Returns a function that makes one RMSprop update of `model` and returns the loss before.

    Args:
      model: of uint8 images [B, 32, 32, 3]; returns logits [B, 10].
      mode: of `torch.compile` over model and loss together; None runs them eagerly.
      autocast: dtype of the forward pass's products; None leaves all as it is.
    """
    import torch

    optimizer = torch.optim.RMSprop(model.parameters(), lr=LEARNING_RATE, alpha=0.9, eps=1e-7)

    def loss_of(x, y):
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            return torch.nn.functional.cross_entropy(model(x), y)

    if mode:
        loss_of = torch.compile(loss_of, mode=mode)

    def update(x, y):
        if mode:  # CUDA graphs may then use the memory of the step before
            torch.compiler.cudagraph_mark_step_begin()
        loss = loss_of(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return update


def keras(job: Job, turns: Turns, *, backend: str, jit_compile: bool) -> None:
    """Keras's `fit` or `train_on_batch`, whichever is faster here, and `predict_on_batch`.

    `fit` with one step an execution, and with all of a turn's in one.
    """
    os.environ["KERAS_BACKEND"] = backend
    import keras as library

    library.utils.set_random_seed(0)
    images, labels = load_images(job)
    model = create_keras(job)

    def compile_for(steps: int) -> None:
        if not model.compiled or model.steps_per_execution != steps:  # else it would do it again
            options = dict(jit_compile=jit_compile, steps_per_execution=steps)
            compile_keras(model, learning_rate=LEARNING_RATE, **options)

    def fit() -> float:
        history = model.fit(images, labels, batch_size=job.batch_size, shuffle=False, verbose=0)
        return history.history["loss"][-1]

    batches = np.split(images, job.calls)

    def train_on_batch() -> float:
        for x, y in zip(batches, np.split(labels, job.calls), strict=True):
            loss, _ = model.train_on_batch(x, y)
        return float(loss)

    def predict_on_batch() -> None:
        for_each(model.predict_on_batch, batches)

    # By name: what is called, and the steps of one execution.
    if job.work == "train":
        ways = {"fit": (fit, 1), "train_on_batch": (train_on_batch, 1)}
        if job.calls > 1:
            ways[f"fit, steps_per_execution={job.calls}"] = (fit, job.calls)
    else:
        ways = {"predict_on_batch": (predict_on_batch, 1)}
    seconds = {}
    for name, (way, steps) in ways.items():
        compile_for(steps)
        seconds |= fastest({name: way})
    best = min(seconds, key=seconds.get)
    way, steps = ways[best]
    compile_for(steps)
    take_turns(turns, way, f"{backend} backend, jit_compile={jit_compile}, {best}")


def compile_keras(model, *, learning_rate: float, **options: Any) -> None:
    """Compiles a Keras model of logits as the notebook does: RMSprop, sparse cross-entropy."""
    import keras as library

    model.compile(
        optimizer=library.optimizers.RMSprop(learning_rate),
        loss=library.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **options,
    )


def create_keras(job: Job):
    """Returns the notebook's model, or for features its backbone and the mean of its maps."""
    import keras as library

    from tests.references import keras_transfer

    model = keras_transfer.create(upsampling=job.upsampling, preprocessing="unit", dropout=0.5)
    if job.work != "features":
        return model
    flatten = next(x for x in model.layers if isinstance(x, library.layers.Flatten))
    return library.Model(model.input, library.layers.GlobalAveragePooling2D()(flatten.input))
