"""Train a model: the MLP baseline or the pretrained ResNet-50.

    python -m cifar_jax.main --config=configs/mlp.py --workdir=runs/mlp
    python -m cifar_jax.main --config=configs/mlp.py --workdir=runs/b64 --config.batch_size=64

The same command goes on where a stopped run left off. Every field of the configuration, with its
unit, stands in configs/common.py; each can be set as --config.NAME=VALUE.
"""

import logging
import os
import shlex
import sys
from typing import NoReturn

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from cifar_jax.config import flatten
from cifar_jax.errors import UserError, exit_on_user_error

EXAMPLES = {"config": "--config=configs/mlp.py", "workdir": "--workdir=runs/mlp"}


def define_flags() -> flags.FlagValues:
    """Returns the command's flags, not yet parsed."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Configuration file, such as configs/mlp.py.",
        lock_config=True,
        flag_values=values,
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder for checkpoints, metrics, figure and record; a run found there goes on.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "profile", False, "Write a trace of a few steps to WORKDIR/profile.", flag_values=values
    )
    flags.DEFINE_bool("help", False, "Show this.", flag_values=values)
    return values


def parse_flags() -> flags.FlagValues:
    """Parses `sys.argv` (where ml_collections looks too); `--help` is answered here.

    Raises:
      UserError: one line, for a wrong flag, a missing file, an unknown key or a wrong type.
    """
    try:
        values = define_flags()
        rest = values(sys.argv)[1:]
        if values.config is not None:
            values.config.keys()  # a file that could not be read says so only when it is used
    # A configuration file is a program: reading it may raise anything.
    except Exception as error:
        text = error.args[0] if isinstance(error, KeyError) else error  # its str is a repr
        reason = " ".join(str(text).split())
        raise UserError(f"{reason}; see --help") from error
    if values.help:
        show_help(values)
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; every option is --NAME=VALUE")
    for name, example in EXAMPLES.items():
        if not values[name].value:
            raise UserError(f"--{name} is missing; for example {example}")
    return values


def show_help(values: flags.FlagValues) -> NoReturn:
    """Prints what the command does, its flags, and the fields of the configuration if given."""
    print(__doc__)
    for name in ("config", "workdir", "profile"):
        print(f"--{name}: {values[name].help}")
    if values.config is None:
        print("\nWith --config=FILE, --help lists the fields of that file too.")
    else:
        print("\nFields of this configuration:")
        for key, value in flatten(values.config):
            print(f"--config.{key}={value}")
    sys.stdout.flush()  # a reader that has left is noticed here
    sys.exit(0)


def set_up_logging() -> None:
    """Leaves standard error to us: what goes wrong elsewhere reaches the run as an exception."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("cifar_jax").setLevel(logging.INFO)
    # TensorFlow only feeds the input pipeline: its notes on CPU features are noise here, and the
    # one on oneDNN comes whatever the log level is.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    absl_logging.set_verbosity(absl_logging.FATAL)
    report = sys.unraisablehook

    def without_late_callbacks(unraisable):
        # Orbax gives up a read or a write at its first failure; what else was under way then ends
        # in a closed event loop, each time with a traceback that says no more than that.
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = without_late_callbacks


def main() -> None:
    """Runs the command; exits with 0, 1 (failed run), 2 (bad input) or 128 + signal."""
    with exit_on_user_error():
        values = parse_flags()
        set_up_logging()
        # JAX and TensorFlow take seconds to import: --help and bad flags do not wait for them.
        from cifar_jax import report, train
        from cifar_jax.recording.recorder import CURVES

        result = train.train_and_evaluate(values.config, values.workdir, profile=values.profile)
        go_on = f"{python_command()} -m cifar_jax.main {shlex.join(sys.argv[1:])}"
        if result.stopped_by is not None:
            saved = f"and saved at step {result.step}" if result.step else "before the first step"
            print(f"stopped {saved}; to go on: {go_on}", file=sys.stderr)
            sys.exit(128 + result.stopped_by)
        workdir = shlex.quote(values.workdir)
        print(report.notebook_table(result.record, result.rows))
        print(f"figure: {values.workdir}/{CURVES}; checkpoint: step {result.step}")
        print(f"next: {python_command()} -m cifar_jax.predict --workdir={workdir} PICTURE...")


def python_command() -> str:
    """Returns what to type for this interpreter: it may not be the one on the path."""
    inside = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if inside.startswith("..") else inside)


if __name__ == "__main__":
    main()
