"""What bounds a step: its work by formula, and what the machine reaches at best."""

import dataclasses
import timeit
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cifar_jax.memory import keep_freed_memory
from experiments.benchmarks.interleaved import Report, Turns, usable_cores

STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))  # blocks, width
CHANNELS = 2048
HIDDEN = (128, 64)  # of the notebook's head
CLASSES = 10
MACHINE = "machine"  # the contender that is no framework
REPEATS = 3  # of each probe in a turn; the best counts


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The shape of one convolution of square maps; sides in pixels."""

    side: int  # of its input
    features_in: int
    features_out: int
    kernel: int
    stride: int

    @property
    def side_out(self) -> int:
        """Side of its output."""
        return self.side // self.stride

    @property
    def macs(self) -> int:
        """Multiply-adds for one image, those with the padding's zeros included, as is usual."""
        return self.side_out**2 * self.kernel**2 * self.features_in * self.features_out


def convolutions(variant: str, size: int) -> dict[str, Convolution]:
    """Returns the convolutions of ResNet-50 by the names of our parameters.

    Args:
      variant: "keras": a block strides in its first 1x1; "torchvision": in its 3x3.
      size: side of the network's input, a multiple of 32 pixels.
    """
    found = {"stem_conv": Convolution(size, 3, 64, 7, 2)}
    side, features = size // 4, 64
    for i, (blocks, width) in enumerate(STAGES, start=1):
        for j in range(1, blocks + 1):
            stride = 2 if j == 1 and i > 1 else 1
            first, second = (1, stride) if variant == "torchvision" else (stride, 1)
            name = f"stage{i}.block{j}"
            found[f"{name}.conv1"] = Convolution(side, features, width, 1, first)
            found[f"{name}.conv2"] = Convolution(side // first, width, width, 3, second)
            found[f"{name}.conv3"] = Convolution(side // stride, width, 4 * width, 1, 1)
            if j == 1:
                found[f"{name}.shortcut_conv"] = Convolution(side, features, 4 * width, 1, stride)
            side, features = side // stride, 4 * width
    return found


def image_flop(work: str, *, variant: str, upsampling: int) -> float:
    """Returns the floating-point operations that one image takes, by formula.

    Two a multiply-add of convolutions and dense layers, nothing else counted. Training takes the
    forward pass three times: once for the gradients of the inputs, once for those of the weights.
    The plain stem counts, whether it is folded or not.

    Args:
      work: "train", "infer", or "features": the backbone alone.
      variant: as for `convolutions`.
      upsampling: side of the network's input, in units of 32 pixels.
    """
    macs = sum(each.macs for each in convolutions(variant, 32 * upsampling).values())
    if work != "features":
        sizes = (upsampling**2 * CHANNELS, *HIDDEN, CLASSES)
        macs += sum(a * b for a, b in zip(sizes, sizes[1:], strict=False))
    return 2 * macs * (3 if work == "train" else 1)


def mlp_flop() -> int:
    """Returns the same for one image and update of the MLP, whose image needs no gradient."""
    first, *others = (32 * 32 * 3 * 64, 64 * 64, 64 * CLASSES)
    return 2 * (2 * first + 3 * sum(others))


def machine(turns: Turns) -> None:
    """Measures, every turn, the GFLOP/s of what runs fastest: large products, a 3x3 convolution."""
    keep_freed_memory()
    probes = {**_xla_gemm(), **_torch_probes()}
    for report in turns:
        report["gflops"] = {
            name: flop / min(timeit.repeat(probe, number=1, repeat=REPEATS)) / 1e9
            for name, (probe, flop) in probes.items()
        }


def summarize_rates(rates: Sequence[Report]) -> dict[str, Any]:
    """Returns what the machine ran fastest and its GFLOP/s, and those of all (medians)."""
    medians = {
        name: float(np.median([each["gflops"][name] for each in rates]))
        for name in rates[0]["gflops"]
    }
    fastest = max(medians, key=medians.get)
    return {"fastest": fastest, "gflops": medians[fastest], "all": medians}


def add_shares(
    summary: Mapping[str, dict[str, Any]],
    reports: Mapping[str, Sequence[Report]],
    rates: Sequence[Report],
    *,
    flop: float,
) -> None:
    """Adds to each row of `interleaved.summarize` its GFLOP/s, and their share of the machine's.

    The share is paired by round, as the ratio is: the machine's rate drifts with all the others'.

    Args:
      summary: of the contenders, by name.
      reports: what it is of.
      rates: what `machine` reported in the same rounds.
      flop: of a turn.
    """
    fastest = summarize_rates(rates)["fastest"]
    for name, row in summary.items():
        gflops = flop / np.array([each["seconds"] for each in reports[name]]) / 1e9
        row["gflops"] = float(np.median(gflops))
        row["shares"] = {
            probe: float(np.median(gflops / [each["gflops"][probe] for each in rates]))
            for probe in rates[0]["gflops"]
        }
        row["share"] = row["shares"][fastest]


def format_rates(limits: Mapping[str, Any], shares: Mapping[str, float]) -> str:
    """Returns what `summarize_rates` gave as a line, with our share of each."""
    return "; ".join(
        f"{name} {rate:.0f} (ours {shares[name]:.0%})" for name, rate in limits["all"].items()
    )


def _xla_gemm(side: int = 2048) -> dict[str, tuple[Callable[[], object], float]]:
    import jax
    import jax.numpy as jnp

    a = jnp.ones((side, side), jnp.float32)
    product = jax.jit(jnp.matmul).lower(a, a).compile()
    return {f"XLA, {side}x{side} product": (lambda: product(a, a).block_until_ready(), 2 * side**3)}


def _torch_probes(side: int = 2048) -> dict[str, tuple[Callable[[], object], float]]:
    import torch

    torch.set_num_threads(usable_cores())
    a = torch.ones(side, side)
    shape = Convolution(side=56, features_in=256, features_out=256, kernel=3, stride=1)
    images, kernel = torch.ones(8, 256, 56, 56), torch.ones(256, 256, 3, 3)
    images, kernel = (x.to(memory_format=torch.channels_last) for x in (images, kernel))

    def convolve() -> None:
        with torch.inference_mode():
            torch.nn.functional.conv2d(images, kernel, padding=1)

    return {
        f"PyTorch, {side}x{side} product": (lambda: a @ a, 2 * side**3),
        "PyTorch (oneDNN), 3x3 convolution of 256 channels": (convolve, 2 * 8 * shape.macs),
    }
