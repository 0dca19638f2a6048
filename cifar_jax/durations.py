"""Durations, as a configuration writes them."""

import dataclasses
import math
from fractions import Fraction

from cifar_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Duration:
    """A number of epochs or of steps, as written in a configuration."""

    value: Fraction
    unit: str  # "epoch" or "step"

    @classmethod
    def parse(cls, text: str, *, key: str) -> "Duration":
        """Reads "10 epochs", "0.5 epoch" or "500 steps".

        Raises:
          UserError: naming `key`, for anything else, negative numbers and parts of a step.
        """
        try:
            number, unit = text.split()
            value, unit = float(number), unit.removesuffix("s")
        except ValueError:
            value, unit = math.nan, ""
        whole = unit == "epoch" or value == int(value if math.isfinite(value) else 0)
        if unit not in ("epoch", "step") or not 0 <= value < math.inf or not whole:
            raise UserError(
                f'config.{key} is "{text}"; expected a number and its unit, such as "10 epochs" '
                'or "500 steps"'
            )
        return cls(Fraction(repr(value)), unit)  # of "1e-9999999" the text would take minutes

    def exact_steps(self, steps_per_epoch: int) -> Fraction:
        """Returns the duration in training steps, of which it may hold a part."""
        return self.value * (steps_per_epoch if self.unit == "epoch" else 1)

    def steps(self, steps_per_epoch: int, *, steps_an_update: int = 1) -> int:
        """Returns the duration in whole training steps, as `nearest_step` rounds.

        Epochs are cut to whole updates of so many steps; steps are taken as they are written.
        """
        steps = nearest_step(self.exact_steps(steps_per_epoch))
        return steps - steps % steps_an_update if self.unit == "epoch" else steps


def nearest_step(steps: Fraction | int) -> int:
    """Returns the nearest whole number, the lower one of two that are equally near.

    Three times "1.5 epochs" end where "4.5 epochs" do, whatever an epoch has.
    """
    return -((steps.denominator - 2 * steps.numerator) // (2 * steps.denominator))
