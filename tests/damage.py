"""What can be wrong with a data file: functions that do it to a sound file, hostile pickles."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests import cifar_forms as forms

BINARY = "cifar-10-batches-bin"


class CallsSystem:
    """Unpickled by the ordinary means, it creates a file."""

    def __reduce__(self):
        return os.system, ("touch executed",)


class CallsNumpy:
    """A function that is in NumPy, but no array."""

    def __reduce__(self):
        return np.load, ("executed",)


def python_batch(**changes: object) -> bytes:
    sound = {"data": np.zeros((20, 3072), np.uint8), "labels": [0] * 20}
    return forms.python2_pickle(sound | changes)


def cut(file: str, size: int = -1) -> Callable[[Path], object]:
    """Truncates a file to `size` bytes; -1 drops the last byte."""

    def damage(directory: Path) -> None:
        path = directory / file
        path.write_bytes(path.read_bytes()[:size])

    return damage


def put(file: str, data: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / file).write_bytes(data)


def poke(file: str, offset: int, value: int) -> Callable[[Path], object]:
    """Sets one byte."""

    def damage(directory: Path) -> None:
        data = bytearray((directory / file).read_bytes())
        data[offset] = value
        (directory / file).write_bytes(data)

    return damage


def wipe(file: str, offset: int) -> Callable[[Path], object]:
    """Zeroes a hundred bytes in the middle."""

    def damage(directory: Path) -> None:
        data = (directory / file).read_bytes()
        (directory / file).write_bytes(data[:offset] + bytes(100) + data[offset + 100 :])

    return damage


def drop(file: str) -> Callable[[Path], object]:
    return lambda directory: (directory / file).unlink()


def to_folder(file: str) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        (directory / file).unlink()
        (directory / file).mkdir()

    return damage


def picture(file: str, width: int, height: int, mode: str) -> Callable[[Path], object]:
    return lambda directory: Image.new(mode, (width, height)).save(directory / file, "PNG")


def replace_text(file: str, old: str, new: str) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        text = (directory / file).read_text()
        assert old in text
        (directory / file).write_text(text.replace(old, new, 1))

    return damage


def tar_with(member: str, kind: bytes = tarfile.REGTYPE) -> Callable[[Path], object]:
    """An archive that holds a member of this name and kind instead of the second batch."""

    def damage(directory: Path) -> None:
        folder = directory / "scratch" / BINARY
        with tarfile.open(directory / "cifar-10-binary.tar.gz", "w:gz") as archive:
            odd = tarfile.TarInfo(member)
            odd.type, odd.linkname = kind, "/etc/hostname"
            archive.addfile(odd)
            for file in sorted(folder.iterdir()):
                if file.name != "data_batch_2.bin":
                    archive.add(file, arcname=f"{BINARY}/{file.name}")

    return damage


def endless_name(kind: bytes) -> Callable[[Path], object]:
    """A member whose name (GNU's or PAX's way) is of 64 MB, in an archive of a few kilobytes."""

    def damage(directory: Path) -> None:
        with tarfile.open(directory / "cifar-10-binary.tar.gz", "w:gz") as archive:
            odd = tarfile.TarInfo("././@LongLink")
            odd.type, odd.size = kind, 1 << 26
            archive.fileobj.write(odd.tobuf(tarfile.GNU_FORMAT))
            archive.fileobj.write(bytes(odd.size))

    return damage


def names_of_names(directory: Path) -> None:
    """Each member's header says that the next one has its name, two thousand times."""
    with tarfile.open(directory / "cifar-10-binary.tar.gz", "w:gz") as archive:
        odd = tarfile.TarInfo("././@LongLink")
        odd.type, odd.size = tarfile.GNUTYPE_LONGNAME, 512
        archive.fileobj.write((odd.tobuf(tarfile.GNU_FORMAT) + b"a" * 512) * 2000)


def bomb(directory: Path) -> None:
    """A member that claims to be a gigabyte."""
    with tarfile.open(directory / "cifar-10-binary.tar.gz", "w:gz") as archive:
        odd = tarfile.TarInfo(f"{BINARY}/data_batch_1.bin")
        odd.size = 1 << 30
        archive.fileobj.write(odd.tobuf())
