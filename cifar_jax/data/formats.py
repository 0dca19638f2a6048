"""One reader for each published form of CIFAR-10, from its files to arrays in the original order.

Readers check what their format lets them check (sizes, headers, ranges); whether the content is
really CIFAR-10 is for `content.check_content` to say. The forms made of PNG files are in
`png_formats.py`.
"""

import functools
import gzip
import io
import pickle
import pickletools
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from cifar_jax.data.content import TRAIN_BATCHES, Arrays, empty_arrays
from cifar_jax.errors import UserError
from cifar_jax.labels import CLASS_NAMES

BATCHES = (*(f"data_batch_{i + 1}" for i in range(TRAIN_BATCHES)), "test_batch")
BINARY_FOLDER = "cifar-10-batches-bin"
BINARY_ARCHIVE = "cifar-10-binary.tar.gz"
_PIXELS = 32 * 32
_ROW = 1 + 3 * _PIXELS  # binary form: the label, then the red, the green and the blue plane
_STREAM_BYTES = 1 << 20
_MAX_FILE_BYTES = 1 << 27  # four times the largest real one: no crafted archive fills the memory


def broken(file: object, problem: object) -> UserError:
    """The error for a data file that is not what it should be, in one line."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    return UserError(f"{file}: {text}; replace it by a fresh copy")


def read_binary(place: Path, *, per_batch: int) -> Arrays:
    """Reads `cifar-10-batches-bin`.

    Args:
        place: the folder, or the `.tar.gz` it is published as.
        per_batch: images a batch file must hold.

    Raises:
        UserError: a file is missing, has the wrong size or holds a label above 9.
    """
    return _read_batches(place, ".bin", _decode_binary, per_batch=per_batch)


def read_python(place: Path, *, per_batch: int) -> Arrays:
    """Reads `cifar-10-batches-py`, whose files are pickles; running code from them is impossible.

    Args:
        place: the folder, or the `.tar.gz` it is published as.
        per_batch: images a batch file must hold.

    Raises:
        UserError: a file is missing, is no pickle, asks for anything but arrays and plain types,
            or holds arrays of the wrong shape or labels outside 0..9.
    """
    return _read_batches(place, "", _decode_python, per_batch=per_batch)


def write_binary(folder: Path, arrays: Arrays) -> None:
    """Writes `arrays` (both splits) as the files of `cifar-10-batches-bin` into a new folder."""
    folder.mkdir()
    images = [*np.split(arrays.train_images, TRAIN_BATCHES), arrays.test_images]
    labels = [*np.split(arrays.train_labels, TRAIN_BATCHES), arrays.test_labels]
    for name, batch_images, batch_labels in zip(BATCHES, images, labels, strict=True):
        rows = np.empty((len(batch_images), _ROW), np.uint8)
        rows[:, 0] = batch_labels
        rows[:, 1:] = batch_images.transpose(0, 3, 1, 2).reshape(len(rows), -1)
        rows.tofile(folder / f"{name}.bin")
    (folder / "batches.meta.txt").write_text("\n".join(CLASS_NAMES) + "\n")


def read_files(place: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yields the named files of a folder or `.tar.gz`, one at a time, in the order they lie there.

    An archive is read as a stream and never extracted, so none of its members can end up anywhere.

    Args:
        place: a folder, or an archive in which the files lie in one top folder.
        names: file names.

    Raises:
        UserError: a file is missing or far too large, or the archive is damaged.
    """
    if place.is_dir():
        for name in names:
            yield name, _read_file(place / name)
        return
    missing = set(names)
    try:
        with _BoundedGzip(place) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts
                if len(parts) != 2 or parts[1] not in missing or not member.isfile():
                    continue
                _check_size(f"{place}: {member.name}", member.size)
                missing.remove(parts[1])
                read = functools.partial(archive.extractfile(member).read, _STREAM_BYTES)
                yield parts[1], b"".join(iter(read, b""))
                if not missing:
                    return
    except (tarfile.TarError, zlib.error, EOFError, OSError, RecursionError) as error:
        raise broken(place, f"the archive cannot be read ({error})") from error
    raise broken(place, f"the archive lacks {', '.join(sorted(missing))}")


class _BoundedGzip(gzip.GzipFile):
    """Reads little at once: `tarfile` would take in names as long as a header claims they are."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _STREAM_BYTES:
            raise OSError(f"{size:,} bytes in one piece, which no name and no header has")
        return super().read(size)


def _read_file(path: Path) -> bytes:
    try:
        _check_size(path, path.stat().st_size)
        return path.read_bytes()
    except OSError as error:
        raise broken(path, f"cannot be read ({error.strerror})") from error


def _check_size(file: object, size: int) -> None:
    if size > _MAX_FILE_BYTES:
        raise broken(file, f"has {size:,} bytes, no file of CIFAR-10 is as large")


def _read_batches(
    place: Path,
    suffix: str,
    decode: Callable[[str, bytes, np.ndarray, np.ndarray], None],
    *,
    per_batch: int,
) -> Arrays:
    arrays = empty_arrays(TRAIN_BATCHES * per_batch, per_batch)
    for name, data in read_files(place, [batch + suffix for batch in BATCHES]):
        decode(f"{place}/{name}", data, *batch_views(arrays, name.removesuffix(suffix)))
    return arrays


def batch_views(arrays: Arrays, batch: str) -> tuple[np.ndarray, np.ndarray]:
    """The part of (images, labels) that the batch file called `batch` fills."""
    if batch == "test_batch":
        return arrays.test_images, arrays.test_labels
    per_batch = len(arrays.test_labels)
    start = BATCHES.index(batch) * per_batch
    rows = slice(start, start + per_batch)
    return arrays.train_images[rows], arrays.train_labels[rows]


def check_labels(file: object, labels: np.ndarray) -> None:
    """Raises a `UserError` unless every label is in 0..9."""
    wrong = np.flatnonzero((labels < 0) | (labels >= len(CLASS_NAMES)))
    if len(wrong):
        raise broken(file, f"image {wrong[0]} has the label {labels[wrong[0]]}, expected 0..9")


def _fill_planes(images: np.ndarray, planes: np.ndarray) -> None:
    """Fills `images` [N, 32, 32, 3] from channel-first rows [N, 3072]."""
    # A plane at a time is five times as fast as one transposed copy.
    for channel in range(3):
        plane = planes[:, channel * _PIXELS : (channel + 1) * _PIXELS]
        images[..., channel] = plane.reshape(-1, 32, 32)


def _decode_binary(file: str, data: bytes, images: np.ndarray, labels: np.ndarray) -> None:
    if len(data) != len(labels) * _ROW:
        raise broken(file, f"has {len(data):,} bytes, expected {len(labels) * _ROW:,}")
    rows = np.frombuffer(data, np.uint8).reshape(-1, _ROW)
    check_labels(file, rows[:, 0])
    labels[:] = rows[:, 0]
    _fill_planes(images, rows[:, 1:])


def _decode_python(file: str, data: bytes, images: np.ndarray, labels: np.ndarray) -> None:
    try:
        _check_memo(data)
        # The published files were pickled by Python 2, whose strings are bytes.
        batch = _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
    except UserError as error:
        raise broken(file, error) from error
    except Exception as error:  # a damaged pickle can raise nearly any type
        reason = str(error) or type(error).__name__
        raise broken(file, f"is not a readable pickle ({reason})") from error
    batch = {_text(key): value for key, value in batch.items()} if isinstance(batch, dict) else {}
    planes, found = batch.get("data"), batch.get("labels")
    if not isinstance(planes, _PickledArray) or not isinstance(found, list):
        raise broken(file, "does not hold a dictionary with the array 'data' and the list 'labels'")
    rows = planes.decode(file, (len(labels), 3 * _PIXELS))
    if len(found) != len(labels) or not all(type(label) is int for label in found):
        raise broken(
            file, f"'labels' holds {len(found):,} entries, expected {len(labels):,} integers"
        )
    check_labels(file, np.array(found))
    labels[:] = found
    _fill_planes(images, rows)


def _check_memo(data: bytes) -> None:
    """Refuses what the unpickler would make room for: notes numbered far beyond their number."""
    for count, (opcode, number, _) in enumerate(pickletools.genops(data)):
        if opcode.name.endswith("PUT") and number > count:
            raise UserError(f"the pickle's instruction {count} is its note {number:,}")


def _text(value: object) -> object:
    return value.decode("latin-1") if isinstance(value, bytes) else value


class _PickledArray:
    """Stands in for a NumPy array inside a pickle: it keeps the state that it is given, unused."""

    def __init__(self, *_: object):
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def decode(self, file: str, shape: tuple[int, int]) -> np.ndarray:
        """The array, if its state is that of a uint8 array of this shape."""
        match self.state:
            case (_, found, _PickledDtype(name="u1"), bool(fortran), bytes(data)):
                if found == shape and len(data) == shape[0] * shape[1]:
                    rows = np.frombuffer(data, np.uint8)
                    return rows.reshape(shape, order="F" if fortran else "C")
                raise broken(file, f"'data' has the shape {found}, expected {shape}")
        raise broken(file, "'data' is not an array of unsigned bytes")


class _PickledDtype:
    """Stands in for a NumPy dtype inside a pickle."""

    def __init__(self, name: object = None, *_: object):
        self.name = _text(name)

    def __setstate__(self, state: object) -> None:
        """The name is all that counts."""


def _encode_latin1(text: str, _: str) -> bytes:
    return text.encode("latin-1")


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles plain types and stand-ins for NumPy arrays; any other name in the file is refused.

    Nothing of NumPy runs either: its constructors were not made for hostile arguments.
    """

    _ALLOWED = {
        # Called `numpy.core` up to NumPy 1.
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
        # How Python 3 writes bytes in Python 2's pickle protocol.
        ("_codecs", "encode"): _encode_latin1,
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self._ALLOWED:
            raise UserError(f"the pickle asks for {module}.{name}, which is not data")
        return self._ALLOWED[module, name]
