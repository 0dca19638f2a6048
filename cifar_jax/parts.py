"""Names of a ResNet-50's parts, without JAX: configurations name them too."""

from collections.abc import Sequence

STAGE_BLOCKS = (3, 4, 6, 3)


def part_names(stage_blocks: Sequence[int] = STAGE_BLOCKS) -> tuple[str, ...]:
    """Returns the parts in their order: "stem", "stage1.block1", "stage1.block2", "stage1", ...

    The last block of a stage has the stage's name: after it, the whole stage has run.
    """
    names = ["stem"]
    for i, blocks in enumerate(stage_blocks, start=1):
        names += [f"stage{i}.block{j}" for j in range(1, blocks)] + [f"stage{i}"]
    return tuple(names)


def stage_number(part: str) -> int:
    """Returns in which stage a part is, from 1; the stem is in none, 0."""
    return 0 if part == "stem" else int(part.partition(".")[0].removeprefix("stage"))
