"""Train a head on the features of a frozen, pretrained ResNet-50, which are computed only once.

    python -m cifar_jax.features --config=configs/resnet50_probe.py --workdir=runs/probe

The features go to DIRECTORY/features/ (config.data.directory), under a name that stands for the
weights, the images, and all else that they depend on: every later head on pooled ones takes
seconds. The same command goes on where a stopped one left off. WORKDIR then holds the whole model,
backbone and head, for predict and evaluate.
"""

from cifar_jax.command import end, parse_flags
from cifar_jax.errors import exit_on_user_error, set_up_logging
from cifar_jax.memory import set_up_memory

EXAMPLES = {"config": "configs/resnet50_probe.py", "workdir": "runs/probe"}


def main() -> None:
    """Runs the command; exits with 0, 1 (failed run), 2 (bad input) or 128 + signal."""
    with exit_on_user_error():
        values = parse_flags(__doc__, EXAMPLES)
        set_up_logging()
        set_up_memory()
        # JAX and TensorFlow take seconds to import: --help and bad flags do not wait for them.
        from cifar_jax import probe

        result = probe.train_head(values.config, values.workdir, profile=values.profile)
        end(result, values.workdir, module="cifar_jax.features")


if __name__ == "__main__":
    main()
