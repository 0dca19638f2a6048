"""Train a model: the MLP baseline or the pretrained ResNet-50.

    python -m cifar_jax.main --config=configs/mlp.py --workdir=runs/mlp
    python -m cifar_jax.main --config=configs/mlp.py --workdir=runs/b64 --config.batch_size=64

The same command goes on where a stopped run left off. Every field of the configuration, with its
unit, stands in configs/common.py; each can be set as --config.NAME=VALUE.
"""

from cifar_jax.command import end, parse_flags
from cifar_jax.errors import exit_on_user_error, set_up_logging
from cifar_jax.memory import set_up_memory

EXAMPLES = {"config": "configs/mlp.py", "workdir": "runs/mlp"}


def main() -> None:
    """Runs the command; exits with 0, 1 (failed run), 2 (bad input) or 128 + signal."""
    with exit_on_user_error():
        values = parse_flags(__doc__, EXAMPLES)
        set_up_logging()
        set_up_memory()
        # JAX and TensorFlow take seconds to import: --help and bad flags do not wait for them.
        from cifar_jax import train

        result = train.train_and_evaluate(values.config, values.workdir, profile=values.profile)
        end(result, values.workdir, module="cifar_jax.main")


if __name__ == "__main__":
    main()
