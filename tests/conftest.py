"""Eight virtual CPU devices and JAX's strict settings, set before anything imports JAX."""

import os
import signal
import sys

# Under nohup and behind a shell's & they are ignored, and what tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("MPLBACKEND", "agg")

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from cifar_jax.data import sources, splits  # noqa: E402
from configs import mlp  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_end_with_their_module():
    """Frees them: a ResNet's step takes 1,100 memory maps, and 65,530 are all a process may have.

    Where Linux has none left (`vm.max_map_count`) the compiler ends in a segmentation fault.
    """
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def what_a_command_silences_ends_with_its_test():
    """`set_up_logging` is for a process that is one command."""
    hook = sys.unraisablehook
    yield
    sys.unraisablehook = hook


@pytest.fixture(scope="session")
def sample():
    """The shipped sample: 2,000 and 500 real images."""
    return sources.load("sample")


@pytest.fixture(scope="session")
def sample_splits(sample):
    """The notebook's protocol on the sample: 1,440 / 160 / 400 images."""
    return splits.make_splits(sample, protocol="notebook", seed=42)


@pytest.fixture
def small_config():
    """A short run of the MLP on the sample: 45 steps an epoch, 2 epochs, calls of 15 steps."""
    config = mlp.get_config()
    config.data.source = "sample"
    config.train_for = "2 epochs"
    config.steps_per_call = 15
    config.log_every = "15 steps"
    config.eval_batch_size = 64
    config.batch_size = 32
    return config


@pytest.fixture
def batch(sample):
    """A function (start, count) -> batch of consecutive real training images."""

    def make(start: int, count: int) -> dict[str, np.ndarray]:
        rows = slice(start, start + count)
        return {"image": sample.train_images[rows], "label": sample.train_labels[rows]}

    return make


@pytest.fixture
def compiled_names():
    """Grows by the name of every function that XLA compiles."""
    names = []

    def listen(event: str, duration: float, **facts: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(facts["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)
