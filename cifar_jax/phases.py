"""Phases of a run: which layers are frozen, and how large the images are, from which step on."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

from cifar_jax.durations import Duration
from cifar_jax.errors import UserError

UPSAMPLINGS = range(1, 9)
FREEZE, PROGRESSIVE = "freeze.layers", "progressive"


@dataclasses.dataclass(frozen=True)
class Phase:
    """What holds from step `start` to the next phase."""

    start: int
    upsampling: int
    frozen: tuple[str, ...]  # patterns, as `recipe.is_frozen` reads them
    resized_at: int = 0  # where this upsampling starts, in this phase or one before

    def describe(self) -> str:
        """Says in a line what holds."""
        frozen = ", ".join(self.frozen) or "nothing"
        return f"from step {self.start}: upsampling x{self.upsampling}, frozen: {frozen}"


@dataclasses.dataclass(frozen=True)
class Span:
    """Words that hold until a step, or to the end (None)."""

    words: tuple[str, ...]
    end: Duration | None


def parse_spans(text: str, *, key: str) -> list[Span]:
    """Reads "stem stage1 until 2 epochs, stem until 4 epochs", or "stem" for the whole run.

    Raises:
      UserError: naming `key`, for anything else.
    """
    spans = []
    for part in (each.strip() for each in text.split(",") if text.strip()):
        words, until, end = part.partition(" until ")
        if not words.split() or "until" in words.split() or (spans and spans[-1].end is None):
            raise UserError(
                f'config.{key} is "{text}"; expected parts such as "NAMES until 2 epochs", with '
                "commas between them, of which only the last may have no end"
            )
        if " until " in end:
            raise UserError(
                f'config.{key} is "{text}"; "{part}" has two ends: expected one, and a comma '
                "between two parts"
            )
        ends = f'{key}: the end of "{part}"'
        spans.append(Span(tuple(words.split()), Duration.parse(end, key=ends) if until else None))
    return spans


def check_spans(config: Mapping[str, Any]) -> None:
    """Refuses what cannot be meant.

    Args:
      config: by dotted names, as `config.flatten` gives it.

    Raises:
      UserError: naming the key.
    """
    gradual = any(span.end for span in parse_spans(config[FREEZE], key=FREEZE))
    if gradual and config["optimizer.name"] in ("adam", "adamw"):
        raise UserError(
            f"config.{FREEZE} thaws layers during the run; with config.optimizer.name "
            f'"{config["optimizer.name"]}", whose bias correction counts steps from the first one, '
            "they would move at three to six times the rate for a hundred steps: use "
            '"sgd" or "rmsprop"'
        )
    found = f'config.{PROGRESSIVE} is "{config[PROGRESSIVE]}"'
    sizes = parse_spans(config[PROGRESSIVE], key=PROGRESSIVE)
    for span in sizes:
        if span.end is None or len(span.words) > 1 or span.words[0] not in map(str, UPSAMPLINGS):
            raise UserError(
                f'{found}; expected upsamplings of 1 to 8 such as "2 until 3 epochs, 3 until 4 '
                'epochs"; config.model.upsampling follows'
            )
    upsamplings = [int(span.words[0]) for span in sizes] + [config["model.upsampling"]]
    if any(a >= b for a, b in itertools.pairwise(upsamplings)):
        raise UserError(
            f"{found}; expected upsamplings that grow, up to {upsamplings[-1]}, "
            "which is config.model.upsampling"
        )
    if sizes and (config["model.name"], config["model.head"]) != ("resnet50", "pooled"):
        raise UserError(
            f'{found}; only a ResNet-50 with config.model.head "pooled" reads several sizes'
        )


def make_phases(config: Mapping[str, Any], *, steps_per_epoch: int, total: int) -> list[Phase]:
    """Returns the phases of a run in order; the first one starts at 0.

    Args:
      config: as `config.to_dict` gives it.
      steps_per_epoch: of the run.
      total: steps of the whole run.

    Raises:
      UserError: for spans whose ends do not grow, or lie behind the end of the run.
    """
    texts = {FREEZE: config["freeze"]["layers"], PROGRESSIVE: config[PROGRESSIVE]}
    in_steps = functools.partial(
        Duration.steps,
        steps_per_epoch=steps_per_epoch,
        steps_an_update=config["optimizer"]["accumulate"],
    )
    spans = {}
    for key, text in texts.items():
        spans[key] = [
            (span.words, math.inf if span.end is None else in_steps(span.end))
            for span in parse_spans(text, key=key)
        ]
        _check_ends([end for _, end in spans[key]], total, key=key, text=text)
    resized_at = [0, *(end for _, end in spans[PROGRESSIVE])]
    starts = {0} | {end for of_key in spans.values() for _, end in of_key if end < total}

    def words_at(key: str, step: int) -> tuple[str, ...]:
        return next((words for words, end in spans[key] if step < end), ())

    return [
        Phase(
            start=start,
            upsampling=int((words_at(PROGRESSIVE, start) or [config["model"]["upsampling"]])[0]),
            frozen=words_at(FREEZE, start),
            resized_at=max(end for end in resized_at if end <= start),
        )
        for start in sorted(starts)
    ]


def _check_ends(ends: list[float], total: int, *, key: str, text: str) -> None:
    found = f'config.{key} is "{text}"'
    if any(a >= b for a, b in itertools.pairwise([0, *ends])):
        steps = ", ".join("the end" if end == math.inf else str(end) for end in ends)
        raise UserError(
            f"{found}, in steps {steps}; expected ends that grow (those in epochs are cut to "
            "whole updates, see config.optimizer.accumulate)"
        )
    late = [end for end in ends if total <= end < math.inf]
    if late:
        raise UserError(
            f"{found}; the run (config.train_for) ends after {total} steps, before what follows "
            f"step {late[0]}"
        )
