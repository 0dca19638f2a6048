"""The whole training step, compiled ahead of time for accelerators that are not there.

libtpu brings the compiler of real TPUs, JAX's CUDA plug-in that of GPUs. They need a description of
the device and no device, and tell what a step takes there and how devices speak; they cannot tell
how long it runs.
"""

import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from cifar_jax import config as configuration
from cifar_jax.models.registry import create_model
from cifar_jax.optim import OptimizerConfig, make_optimizer, make_schedule
from cifar_jax.parallel import JitExecution, create_execution
from cifar_jax.recipe import Recipe
from cifar_jax.state import TrainState, create_state
from configs import mlp, resnet50, resnet50_best

CONFIGS = {
    "mlp": mlp.get_config,
    "resnet50": resnet50.get_config,
    "resnet50_best": resnet50_best.get_config,
}
TRAIN_IMAGES = 36_000  # of the notebook's protocol
LABELLED_IMAGES = 50_000  # the splits are rows of them
GIB = 2**30
# Of a chip: cloud.google.com/tpu/docs/v5e, /v6e; of an H100 what programs find (PyTorch's report).
MEMORY = {"v5e": 16 * GIB, "v6e": 32 * GIB, "h100": int(79.18 * GIB)}
# An H100 SXM as XLA describes devices: NVIDIA's data sheet, and what the architecture (9.0) limits.
H100 = f"""
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  threads_per_warp: 32
  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  device_memory_size: {MEMORY["h100"]}  memory_bandwidth: 3352320000000  l2_cache_size: 52428800
}}
"""
COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


@dataclasses.dataclass(frozen=True)
class Case:
    """One program: what is trained, how, and where; None is what the configuration says."""

    model: str  # of `CONFIGS`
    execution: str  # "jit" or "pmap"
    topology: str  # "v5e:2x4", or "h100:1"
    batch: int  # images of a step on one chip
    dtype: str = "bfloat16"
    upsampling: int | None = None
    variant: str | None = None
    matmul_precision: str | None = None

    @property
    def chip(self) -> str:
        """The generation, as `MEMORY` names it."""
        return self.topology.partition(":")[0]

    @property
    def chips(self) -> int:
        """How many the topology has."""
        return math.prod(map(int, self.topology.partition(":")[2].split("x")))


def topology_devices(name: str) -> list[jax.Device]:
    """Returns a topology's devices, which can be compiled for and hold nothing.

    Raises:
      ModuleNotFoundError: without libtpu (requirements-tpu.txt) or CUDA's plug-in.
    """
    if name.startswith("h100"):
        return _gpu_devices(name)
    import libtpu  # noqa: F401  # here: an optional need, and JAX's own message hides its absence

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks the network where it runs
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nobody takes a chip from another
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def _gpu_devices(name: str) -> list[jax.Device]:
    import jax_plugins.xla_cuda12  # noqa: F401  # as above

    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # it would look for a driver
    count = name.partition(":")[2]
    options = dict(target_config=H100, topology=f"1x1x{count}")
    return list(topologies.get_topology_desc(platform="cuda", **options).devices)


def run_config(case: Case) -> dict[str, Any]:
    """Returns the configuration of a case: its model's, with what the case names changed."""
    config = CONFIGS[case.model]()
    config.batch_size = case.batch * case.chips
    config.model.compute_dtype = case.dtype
    for part, name in (
        (config.model, "upsampling"),
        (config.model, "variant"),
        (config, "matmul_precision"),
    ):
        if getattr(case, name) is not None:
            part[name] = getattr(case, name)
    # No call crosses an epoch, so a large batch shortens it.
    config.steps_per_call = min(config.steps_per_call, max(TRAIN_IMAGES // config.batch_size, 1))
    configuration.check(config)
    return configuration.to_dict(config)


def abstract_state(config: Mapping[str, Any]) -> TrainState:
    """Returns shapes and dtypes of the state that a run of `config` trains."""
    schedule = make_schedule(
        config["optimizer"]["learning_rate"],
        name=config["schedule"]["name"],
        warmup=0,
        steps=TRAIN_IMAGES // 32,
        final_fraction=config["schedule"]["final_fraction"],
    )
    optimizer = make_optimizer(OptimizerConfig(**config["optimizer"]), schedule)
    model = functools.partial(create_model, config["model"], seed=0)
    recipe = Recipe.of(config)
    return jax.eval_shape(lambda: create_state(model(), optimizer, seed=0, recipe=recipe))


def abstract_batches(*sizes: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one call's batches, (steps, batch), or of one batch."""
    return {
        "image": jax.ShapeDtypeStruct((*sizes, 32, 32, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct(sizes, jnp.int32),
    }


def abstract_inputs(
    config: Mapping[str, Any], batch: int
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct] | None]:
    """Returns the shapes of one call's batches, and of the set that lies on the device, or None."""
    sizes = (config["steps_per_call"], batch)
    if not config["data"]["on_device"]:
        return abstract_batches(*sizes), None
    return {"row": jax.ShapeDtypeStruct(sizes, jnp.int32)}, abstract_batches(LABELLED_IMAGES)


def lower(case: Case) -> jax.stages.Lowered:
    """Lowers one training call as `cifar_jax.parallel` compiles it for attached devices."""
    config, devices = run_config(case), topology_devices(case.topology)
    execution = create_execution(case.execution, devices)
    state = abstract_state(config)
    if isinstance(execution, JitExecution):
        batches, dataset = abstract_inputs(config, case.batch * case.chips)
        state = with_sharding(state, execution.replicated)
        batches = with_sharding(batches, execution.stack_sharding)
    else:
        batches, dataset = abstract_inputs(config, case.batch)
        state = with_sharding(state, execution.replica_sharding, len(devices))
        batches = with_sharding(batches, execution.replica_sharding, len(devices))
    dataset = with_sharding(dataset, execution.replicated)
    with jax.default_matmul_precision(config["matmul_precision"]):
        return execution.compiled_train.lower(state, batches, dataset)


def with_sharding(tree: Any, sharding: jax.sharding.Sharding, *leading: int) -> Any:
    """Gives the leaves of an abstract tree a sharding, and `leading` axes in front."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=sharding), tree
    )


def measure(case: Case, lowered: jax.stages.Lowered) -> dict[str, Any]:
    """Compiles a case and returns what its program takes on each chip, in bytes and FLOP.

    FLOP and bytes accessed are None for GPUs.
    A program that the compiler refuses for its memory gives {"refused": its first line}.
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"refused": str(error).splitlines()[0]}
    seconds = time.perf_counter() - start
    memory, config = compiled.memory_analysis(), run_config(case)
    cost = compiled.cost_analysis() or {}  # that of GPUs tells none
    text = compiled.as_text()
    state = abstract_state(config)
    logical = nbytes(state) + nbytes(abstract_inputs(config, case.batch))
    return {
        "steps_per_call": config["steps_per_call"],
        "arguments": memory.argument_size_in_bytes,
        "padding": memory.argument_size_in_bytes - logical,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "state_leaves": len(jax.tree.leaves(state)),
        "aliased_leaves": count_aliases(text),
        "flop": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
        "collectives": collectives(text),
        "compile_seconds": round(seconds),
    }


def total_memory(row: Mapping[str, Any]) -> int:
    """Returns the bytes that a program holds on a chip while it runs."""
    parts = ("arguments", "outputs", "temporaries", "code")
    return sum(row[part] for part in parts) - row["aliased"]


def count_aliases(hlo: str) -> int:
    """Returns how many inputs of a compiled program give their memory to an output."""
    return len(re.findall(r"\(\d+, \{\}, (?:may|must)-alias\)", hlo))


def collectives(hlo: str) -> list[dict[str, Any]]:
    """Returns every collective of an optimised program: operation, dtypes and bytes on a chip.

    One in the body of a loop counts once.
    """
    found = re.findall(rf"= (\(.*?\)|\S+) ({'|'.join(COLLECTIVES)})(?:-start)?\(", hlo)
    operations = []
    for result, name in found:
        arrays = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", result)
        nbytes = sum(
            DTYPE_BYTES[dtype] * math.prod(map(int, shape.split(",")))
            if shape
            else DTYPE_BYTES[dtype]
            for dtype, shape in arrays
        )
        dtypes = sorted({dtype for dtype, _ in arrays})
        operations.append({"name": name, "dtypes": dtypes, "arrays": len(arrays), "bytes": nbytes})
    return operations


def all_reduces(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns those of a measured program's collectives that sum over the devices."""
    return [each for each in row["collectives"] if each["name"] == "all-reduce"]


def nbytes(tree: Any) -> int:
    """Returns the bytes of a tree of arrays, abstract or not, without padding."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
