"""One training step at a stated precision, of ours and of PyTorch, on a GPU."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmarks import peers
from experiments.benchmarks.interleaved import Report, Turns
from experiments.benchmarks.job import Job
from experiments.benchmarks.ours import Training, create_ours


def load_batches(job: Job, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images, uint8 [steps, B, 32, 32, 3], and labels, int32 [steps, B]; some repeat."""
    from cifar_jax.data.sources import load

    data = load("sample")
    rows = np.arange(steps * job.batch_size) % len(data.train_labels)
    shape = (steps, job.batch_size)
    images, labels = data.train_images[rows], data.train_labels[rows]
    return images.reshape(*shape, *images.shape[1:]), labels.reshape(shape)


def take_turns(
    turns: Turns, work: Callable[[], float], describe: Callable[[], dict[str, Any]]
) -> None:
    """Does `work` once to compile what must be, then once a turn; it returns the last loss."""
    work()
    for report in turns:
        report["loss"] = work()
        report |= describe()


def ours(
    job: Job, precision: str, device: str, steps: int, turns: Turns, *, plain: bool = False
) -> None:
    """The package's own update, `JitExecution.train`, one a call; images come from the host.

    `plain` has it on a backbone of Flax's own layers.
    """
    import jax

    compute_dtype = "bfloat16" if precision == "bfloat16" else "float32"
    config, model = create_ours(job, plain=plain, compute_dtype=compute_dtype)
    images, labels = load_batches(job, steps)
    stacks = [{"image": x[None], "label": y[None]} for x, y in zip(images, labels, strict=True)]
    with jax.default_matmul_precision("highest" if precision == "float32" else "default"):
        training = Training(config, model)
        take_turns(turns, functools.partial(training, stacks), _describe_jax)


def _describe_jax() -> Report:
    import jax

    device = jax.local_devices()[0]
    used = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {"device": device.device_kind, "gpu_bytes": used}


def pytorch(
    job: Job, precision: str, device: str, steps: int, turns: Turns, *, mode: str | None = None
) -> None:
    """PyTorch, channels last; bfloat16 by autocast. Images come from pinned memory of the host.

    `mode` is that of `torch.compile`; None runs it eagerly.
    """
    import torch

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    model = peers.create_torch(job).to(device).train()
    pin = torch.Tensor.pin_memory if device == "cuda" else torch.Tensor.contiguous
    images, labels = (pin(torch.from_numpy(array)) for array in load_batches(job, steps))
    update = peers.torch_update(
        model, mode=mode, autocast=torch.bfloat16 if precision == "bfloat16" else None
    )

    def work() -> float:
        for x, y in zip(images, labels, strict=True):
            x, y = (each.to(device, non_blocking=True) for each in (x, y))
            loss = update(x, y.long())
        return float(loss.detach())  # waits for all of them

    take_turns(turns, work, functools.partial(_describe_torch, device))


def _describe_torch(device: str) -> Report:
    import torch

    if device == "cpu":
        return {"device": "cpu", "gpu_bytes": 0}
    name, used = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    return {"device": name, "gpu_bytes": used}
