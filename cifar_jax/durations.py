"""Durations, as a configuration writes them."""

import dataclasses
import math

from cifar_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Duration:
    """A number of epochs or of steps, as written in a configuration."""

    value: float
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
        return cls(value, unit)

    def steps(self, steps_per_epoch: int) -> int:
        """Returns the duration in whole training steps, rounded to the nearest."""
        return round(self.value * (steps_per_epoch if self.unit == "epoch" else 1))
