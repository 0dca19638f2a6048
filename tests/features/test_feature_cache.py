"""The cache of features survives kills, damage and full disks."""

import shutil
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest

from cifar_jax.data.content import aligned
from cifar_jax.errors import RunError, UserError
from cifar_jax.feature_cache import FeatureCache
from tests.runs import ROOT

SHAPE = (50, 1, 1, 6)


def rows_from(start, *, stop=SHAPE[0]):
    """Blocks of at most 8 rows; each number tells its place."""
    for first in range(start, stop, 8):
        last = min(first + 8, stop)
        yield np.arange(first * 6, last * 6, dtype=np.float32).reshape(-1, 1, 1, 6)


EVERYTHING = np.arange(50 * 6, dtype=np.float32).reshape(SHAPE)


def fill(cache, **options):
    cache.fill("train", SHAPE, batch_size=8, compute=lambda start: rows_from(start, **options))


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path, {"weights": "some"})


@pytest.mark.parametrize("tail", [b"", b"\x01" * 7, b"\x02" * 24 * 3])
def test_an_interrupted_set_goes_on_and_ends_with_the_same_bytes(tail, cache, tmp_path):
    fill(cache)
    whole = cache.path("train").read_bytes()
    found = cache.read("train", SHAPE)
    np.testing.assert_array_equal(found, EVERYTHING, strict=True)
    assert aligned(found) is found  # the pipeline takes it where it lies
    other = FeatureCache(tmp_path / "other", cache.key)
    fill(other, stop=16)
    assert other.read("train", SHAPE) is None
    partial = other.folder / "train.partial"
    partial.write_bytes(partial.read_bytes() + tail)  # of a block that was being written
    starts = []

    def rest(start):
        starts.append(start)
        return rows_from(start)

    other.fill("train", SHAPE, batch_size=8, compute=rest)
    assert starts == [16]
    assert other.path("train").read_bytes() == whole and not partial.exists()


def test_a_damaged_beginning_is_begun_again(cache):
    fill(cache, stop=16)
    (cache.folder / "train.partial").write_bytes(b"?" * 300)
    fill(cache)
    np.testing.assert_array_equal(cache.read("train", SHAPE), EVERYTHING)


def test_killed_while_it_is_written(cache, tmp_path):
    code = (
        "import sys, time\nfrom tests.features.test_feature_cache import *\n"
        "def slowly(start):\n"
        "    for block in rows_from(start):\n        yield block\n        time.sleep(0.3)\n"
        f"FeatureCache({str(tmp_path)!r}, {cache.key!r})"
        ".fill('train', SHAPE, batch_size=8, compute=slowly)\n"
    )
    partial = cache.folder / "train.partial"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        try:
            deadline = time.monotonic() + 60
            while not (partial.exists() and partial.stat().st_size > 128 + 8 * 24):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.01)
            with pytest.raises(UserError, match="is in use by another run"):
                fill(cache)
        finally:
            process.kill()
    fill(cache)
    np.testing.assert_array_equal(cache.read("train", SHAPE), EVERYTHING)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "a text": lambda path: path.write_text("no features"),
    "objects": lambda path: np.save(path, np.array([{}]), allow_pickle=True),
    "another shape": lambda path: np.save(path, EVERYTHING[:-1]),
    "another type": lambda path: np.save(path, EVERYTHING.astype(np.float64)),
    "other numbers": lambda path: np.save(path, -EVERYTHING),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "without its digest": lambda path: (path.parent / "about.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_in_one_line(damage, cache):
    fill(cache)
    DAMAGES[damage](cache.path("train"))
    with pytest.raises(UserError) as caught:
        cache.read("train", SHAPE)
    text = str(caught.value)
    assert text.startswith(f"{cache.path('train')} is damaged (") and "\n" not in text
    assert "delete it" in text and type(caught.value) is UserError


def test_too_small_a_disk_is_said_before_anything_is_computed(cache, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(9e9, 8e9, 1e9))
    wanted = {"train": (50_000, 8, 8, 2048), "test": (10_000, 8, 8, 2048)}
    with pytest.raises(UserError, match=r"need 31\.46 GB, the disk has 1\.00 GB free"):
        cache.check_space(wanted)
    cache.check_space({"train": (50_000, 1, 1, 2048)})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1000))
    fill(cache, stop=24)  # 1,328 bytes in all, 704 of them written
    cache.check_space({"train": SHAPE})


def test_a_full_disk_is_one_line(cache):
    def full(start):
        yield from rows_from(start, stop=8)
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"train\.partial: cannot be written \(No space left"):
        cache.fill("train", SHAPE, batch_size=8, compute=full)
    fill(cache)
    np.testing.assert_array_equal(cache.read("train", SHAPE), EVERYTHING)
