"""Damaged and hostile files of weights: one clear line each, in bounded memory, running nothing."""

import contextlib
import io
import json
import pickle
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cifar_jax.errors import UserError
from cifar_jax.pretrained import port
from cifar_jax.pretrained.ours import Header

_MEMORY = 1 << 30  # bytes
# Reads every file that it is given with at most 1 GiB of address space, and says what happened.
_WORKER = f"""
import json, resource, sys
from cifar_jax.errors import UserError
from cifar_jax.pretrained import port
resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY}, {_MEMORY}))
for path in sys.argv[1:]:
    try:
        port.read(path)
        result = ["read", ""]
    except UserError as error:
        result = ["UserError", str(error)]
    except BaseException as error:
        result = [type(error).__name__, str(error)]
    print(json.dumps(result), flush=True)
"""


def _read_all_apart(paths: list[Path]) -> list[tuple[str, str]]:
    """Reads files in another process, which libhdf5 may crash without harm to this one."""
    command = [sys.executable, "-c", _WORKER, *map(str, paths)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    results = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.stderr, paths[len(results)])
    return results


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextlib.contextmanager
def bounded(seconds: float = 5) -> Iterator[None]:
    """Lets the block take so long, and 1 GiB of address space beside what this process has."""

    def too_long(*_):
        raise TimeoutError

    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + _MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, handler)


def _small_state() -> dict[str, torch.Tensor]:
    return {
        "conv1.weight": torch.arange(24, dtype=torch.float32).reshape(2, 3, 2, 2),
        "bn1.running_var": torch.ones(5),
        "bn1.num_batches_tracked": torch.tensor(3),
    }


def _saved(state=None, **options) -> bytes:
    stream = io.BytesIO()
    torch.save(_small_state() if state is None else state, stream, **options)
    return stream.getvalue()


def _with_pickle(change: Callable[[bytes], bytes]) -> bytes:
    """A file of torch.save whose pickle is changed, its checksums right again."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_saved())) as source, zipfile.ZipFile(stream, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return stream.getvalue()


def _replaced(old: bytes, new: bytes) -> bytes:
    def change(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new)

    return _with_pickle(change)


class _Touch:
    """Pickles as a call that would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def _safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _tensor(shape: list, start: int, end: int) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def _small_safetensors() -> bytes:
    arrays = {name: tensor.numpy() for name, tensor in _small_state().items()}
    return safetensors.numpy.save(arrays, {"license": "none"})


def _overlapping_zip() -> bytes:
    """Many names for the same bytes: small on disk, large when read."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}." + b" " * 100_000)
        for number in range(50):
            info = zipfile.ZipInfo(f"x/data/{number}")
            for field in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(info, field, getattr(archive.filelist[0], field))
            archive.filelist.append(info)
    return stream.getvalue()


def _deflated(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(name, "w") as member:
            for _ in range(200):
                member.write(bytes(1 << 20))
    return stream.getvalue()


def _keras_archive(content: bytes, config: bytes = b"{}") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("model.weights.h5", content)
        archive.writestr("config.json", config)
    return stream.getvalue()


def _hdf5(fill: Callable[[h5py.File], None]) -> bytes:
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        fill(file)
    return stream.getvalue()


def _fill_legacy(file: h5py.File) -> None:
    file.attrs["layer_names"] = [b"conv1_conv", b"conv1_bn"]
    for layer, names in (("conv1_conv", ("kernel", "bias")), ("conv1_bn", ("gamma", "beta"))):
        group = file.create_group(layer)
        group.attrs["weight_names"] = [f"{layer}/{name}:0".encode() for name in names]
        for name in names:
            group[f"{layer}/{name}:0"] = np.ones((7, 7, 3, 4), np.float32)


def _fill_keras3(file: h5py.File) -> None:
    for layer in ("conv2d", "conv2d_1", "batch_normalization"):
        for index in range(2):
            file[f"layers/{layer}/vars/{index}"] = np.ones((3, 3), np.float32)


def _external_link(file):
    file["conv1_conv"] = h5py.ExternalLink("/etc/hostname", "/x")


def _soft_link(file):
    file["conv1_conv"] = h5py.SoftLink("/elsewhere")


def _external_storage(file):
    file.create_dataset("x", (4,), "f4", external=[("/etc/hostname", 0, 16)])


def _virtual(file):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
    file.create_virtual_dataset("x", layout)


def _never_written(file):
    _fill_keras3(file)
    del file["layers/conv2d/vars/0"]
    file.create_dataset("layers/conv2d/vars/0", (1 << 34,), "f4", chunks=(1 << 16,))


def _gzip_bomb(file):
    file.create_dataset("x", data=np.zeros(1 << 24, np.float32), compression="gzip")


def _cycle(file):
    file.create_group("a")["b"] = file["/"]


def _deep(file):
    file.create_group("/".join("x" * 40))


def _strings(file):
    file["x"] = ["some", "text"]


def _listed_but_missing(file):
    _fill_legacy(file)
    del file["conv1_bn/conv1_bn/beta:0"]


def _two_backbones(file):
    for model in ("a", "b"):
        file[f"layers/{model}/layers/conv2d/vars/0"] = np.ones(3, np.float32)


_DOUBLED_KEY = b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s."
_DEEP_JSON = b'{"a":' + b"[" * 100_000


def _keras_config() -> bytes:
    """A model of few layers that has everything that is read of one."""

    def layer(class_name: str, name: str, *inputs: object, **config) -> dict:
        nodes = [{"args": list(inputs), "kwargs": {}}] if inputs else []
        config = {"name": name, **config}
        return {"class_name": class_name, "config": config, "name": name, "inbound_nodes": nodes}

    def tensor(name: str) -> dict:
        return {"class_name": "__keras_tensor__", "config": {"keras_history": [name, 0, 0]}}

    mean = {"class_name": "__numpy__", "config": {"value": [1.0, 2.0, 3.0]}}
    index = [{"class_name": "__ellipsis__"}, {"class_name": "__slice__", "config": {}}]
    index[1]["config"] = {"start": None, "stop": None, "step": -1}
    index[0]["config"] = {}
    inner = [
        layer("InputLayer", "inner"),
        layer("GetItem", "reverse", tensor("inner"), index),
        layer("Subtract", "subtract", tensor("reverse"), mean),
        layer("ZeroPadding2D", "conv1_pad", tensor("subtract"), padding=[[3, 3], [3, 3]]),
        layer("Activation", "conv5_block3_out", tensor("conv1_pad"), activation="relu"),
    ]
    outer = [
        layer("InputLayer", "outer"),
        layer("Rescaling", "rescaling", scale=0.5, offset=0.0),
        layer("UpSampling2D", "up", size=[2, 2], interpolation="nearest"),
        layer("Functional", "resnet50", layers=inner, output_layers=["conv5_block3_out", 0, 0]),
        layer("Flatten", "flatten", data_format="channels_last"),
        layer("BatchNormalization", "norm", axis=-1, epsilon=1e-3),
        layer("Dense", "dense", activation="relu"),
        layer("Dropout", "dropout", rate=0.5),
    ]
    return json.dumps({"class_name": "Sequential", "config": {"layers": outer}}).encode()


def _keras_with(config: bytes) -> bytes:
    return _keras_archive(_hdf5(_fill_keras3), config)


_HOSTILE = {
    "empty": (lambda: b"", "no HDF5, .keras, PyTorch"),
    "text": (lambda: b"<!DOCTYPE html><html>", "no HDF5, .keras, PyTorch"),
    "bare pickle": (lambda: pickle.dumps({"a": 1}), "no HDF5, .keras, PyTorch"),
    "pth truncated": (lambda: _saved()[:-400], "damaged or truncated zip archive"),
    "pth flipped": (lambda: _saved().replace(b"\x80?", b"\x81?", 1), "Bad CRC-32"),
    "pth call": (lambda: _saved({"a": _Touch(Path("touched"))}), "asks to call io.open"),
    "pth call, protocol 4": (
        lambda: _saved({"a": _Touch(Path("touched"))}, pickle_protocol=4),
        "instruction FRAME is none that tensors need",
    ),
    "pth call, stream": (
        lambda: _saved({"a": _Touch(Path("touched"))}, _use_new_zipfile_serialization=False),
        "asks to call io.open",
    ),
    "pth memo bomb": (
        lambda: _with_pickle(lambda _: b"\x80\x02}r\xff\xff\xff\xff."),
        "names are neither",
    ),
    "pth doubled key": (lambda: _with_pickle(lambda _: _DOUBLED_KEY), "a tuple stands where a str"),
    "pth endless pickle": (lambda: _with_pickle(lambda _: b"}" * 5_000_000), "longer than"),
    "pth no pickle": (lambda: _with_pickle(lambda _: b""), "truncated or damaged pickle"),
    "pth shape lies": (lambda: _replaced(b"K\x02K\x03K\x02", b"K\xffK\xffK\xff"), "does not fit"),
    "pth stride lies": (lambda: _replaced(b"K\x0cK\x04", b"K\xffK\xff"), "does not fit"),
    "pth storage lies": (lambda: _replaced(b"K\x18t", b"K\x19t"), "25 are declared"),
    "pth storage missing": (
        lambda: _replaced(b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x007"),
        "storage 7 is missing",
    ),
    "pth overlapping": (_overlapping_zip, "more bytes than the file has|[Oo]verlap"),
    "pth zip bomb": (lambda: _deflated("x/data.pkl"), "compressed members"),
    "pth stream truncated": (
        lambda: _saved(_use_new_zipfile_serialization=False)[:-60],
        "truncated: storage",
    ),
    "keras zip bomb": (lambda: _deflated("model.weights.h5"), "compressed members"),
    "keras with rubbish": (lambda: _keras_archive(b"rubbish"), "damaged or truncated HDF5"),
    "keras deep config": (lambda: _keras_with(_DEEP_JSON), "Keras's config: no model of Keras"),
    "keras long config": (lambda: _keras_with(b" " * (5 << 20)), "longer than 4,194,304"),
    "keras wide config": (
        lambda: _keras_with(b"[" + b"[]," * 1_300_000 + b"{}]"),
        "Keras's config: no model of Keras",
    ),
    "keras small config": (lambda: _keras_with(_keras_config()), "behind ResNet50: Flatten"),
    "safetensors header too long": (
        lambda: struct.pack("<Q", 1 << 50) + b"{}",
        "declares a header of",
    ),
    "safetensors truncated": (lambda: _small_safetensors()[:-4], "damaged or truncated"),
    "safetensors no JSON": (lambda: _safetensors(b"{rubbish"), "damaged or truncated"),
    "safetensors deep JSON": (lambda: _safetensors(_DEEP_JSON), "damaged or truncated"),
    "safetensors overlapping": (
        lambda: _safetensors({"a": _tensor([2], 0, 8), "b": _tensor([2], 4, 12)}, bytes(12)),
        "damaged or truncated",
    ),
    "safetensors shape lies": (
        lambda: _safetensors({"a": _tensor([1 << 40], 0, 8)}, bytes(8)),
        "damaged or truncated",
    ),
    "safetensors overflow": (
        lambda: _safetensors({"a": _tensor([1 << 62, 1 << 62], 0, 8)}, bytes(8)),
        "damaged or truncated",
    ),
    "safetensors bfloat16": (
        lambda: _safetensors({"conv1.weight": _tensor([4], 0, 8) | {"dtype": "BF16"}}, bytes(8)),
        "conv1.weight: BF16, expected float32",
    ),
    "safetensors forged line": (
        lambda: _safetensors({"a\nerror: all is well": _tensor([2], 0, 8)}, bytes(8)),
        r"found 'a\\nerror: all is well'",
    ),
    "ours without header": (
        lambda: _safetensors({"__metadata__": {"cifar_jax": "[1"}}),
        "damaged header",
    ),
    "ours of the future": (
        lambda: _safetensors(
            {
                "__metadata__": {
                    "cifar_jax": json.dumps(
                        {
                            "header": dict.fromkeys(
                                ("source", "sha256", "md5", "naming", "preprocessing", "license"),
                                "",
                            )
                            | {"variant": "keras", "format_version": 9}
                        }
                    )
                }
            }
        ),
        "format version 9, this program reads 1",
    ),
    "hdf5 external link": (lambda: _hdf5(_external_link), "link to somewhere else"),
    "hdf5 soft link": (lambda: _hdf5(_soft_link), "link to somewhere else"),
    "hdf5 external storage": (lambda: _hdf5(_external_storage), "numbers in another file"),
    "hdf5 virtual": (lambda: _hdf5(_virtual), "numbers in another file"),
    "hdf5 shape lies": (lambda: _hdf5(_never_written), "declare 68,719,476,9.. bytes"),
    "hdf5 bomb": (lambda: _hdf5(_gzip_bomb), "declare 67,108,864 bytes"),
    "hdf5 cycle": (lambda: _hdf5(_cycle), "too deeply nested"),
    "hdf5 deep": (lambda: _hdf5(_deep), "too deeply nested"),
    "hdf5 strings": (lambda: _hdf5(_strings), "no array of numbers"),
    "hdf5 not Keras": (lambda: _hdf5(lambda file: None), "none of Keras"),
    "hdf5 incomplete": (lambda: _hdf5(_fill_keras3), "differences"),
    "hdf5 listed but missing": (lambda: _hdf5(_listed_but_missing), "is listed but missing"),
    "hdf5 two backbones": (lambda: _hdf5(_two_backbones), "2 models with convolutions"),
    "hdf5 truncated": (lambda: _hdf5(_fill_legacy)[:-100], "damaged or truncated HDF5"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    paths = []
    for name, (build, _) in _HOSTILE.items():
        paths.append(folder / name)
        paths[-1].write_bytes(build())
    return dict(zip(_HOSTILE, _read_all_apart(paths), strict=True)), folder


@pytest.mark.parametrize("name", _HOSTILE)
def test_hostile_file_gets_one_clear_line(results, name):
    kind, message = results[0][name]
    assert kind == "UserError", message
    assert message.startswith(str(results[1] / name))
    lines = message.splitlines()
    assert len(lines) == 1 or "differences from" in lines[0]
    assert re.search(_HOSTILE[name][1], message), message
    assert not Path("touched").exists()


def test_negative_control_pickle_itself_would_have_called(tmp_path):
    (tmp_path / "a.pth").write_bytes(_saved({"a": _Touch(tmp_path / "touched")}))
    torch.load(tmp_path / "a.pth", weights_only=False)["a"].close()
    assert (tmp_path / "touched").exists()


def test_corrupt_hdf5_files(tmp_path):
    """A fixed set: each layout cut at every eighth, and with bytes exchanged at drawn places."""
    rng = random.Random(4)
    paths = []
    for fill in (_fill_legacy, _fill_keras3):
        content = _hdf5(fill)
        broken = [content[: len(content) * eighth // 8] for eighth in range(1, 8)]
        for count in (1, 3, 10, 100):
            for _ in range(12):
                changed = bytearray(content)
                # Most of the structure lies at the beginning.
                for _ in range(count):
                    limit = rng.choice((256, 4096, len(content)))
                    changed[rng.randrange(8, limit)] = rng.randrange(256)
                broken.append(bytes(changed))
        for item in broken:
            paths.append(tmp_path / f"{len(paths)}.h5")
            paths[-1].write_bytes(item)
    for path, (kind, message) in zip(paths, _read_all_apart(paths), strict=True):
        assert kind == "UserError", (path, kind, message)


@st.composite
def _mutations(draw, content: bytes) -> bytes:
    """One to four changes: bytes set, ends cut, pieces removed or doubled, counts made extreme."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(changed) - 1, 0)))
        end = start + draw(st.integers(1, 40))
        kind = draw(st.sampled_from(("set", "cut", "remove", "double", "extreme")))
        if kind == "set":
            changed[start : start + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "cut":
            del changed[start:]
        elif kind == "remove":
            del changed[start:end]
        elif kind == "double":
            changed[start:start] = changed[start:end]
        else:
            size = draw(st.sampled_from((1, 2, 4, 8)))
            changed[start : start + size] = b"\xff" * (size - 1) + b"\x7f"
    return bytes(changed)


def _safetensors_with_header(change: Callable[[bytes], bytes]) -> bytes:
    content = _small_safetensors()
    end = 8 + int.from_bytes(content[:8], "little")
    return _safetensors(change(content[8:end]), content[end:])


def _ours(header: bytes) -> bytes:
    return _safetensors({"__metadata__": {"cifar_jax": header.decode("latin-1")}})


_OUR_HEADER = Header("a", "0", "1", "b", "keras", "unit", "c", "flatten", 2, "nearest", {"d": 1})
_OURS = json.dumps({"header": asdict(_OUR_HEADER), "content": "0"}).encode()


def _pickle_of(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read("archive/data.pkl")


# Whole files, and the parts that checksums or lengths would otherwise keep a mutation from.
_FUZZED = {
    "pth": st.one_of(
        _mutations(_saved()),
        _mutations(_saved(_use_new_zipfile_serialization=False)),
        _mutations(
            _saved({"epoch": 1, "model": _small_state()}, _use_new_zipfile_serialization=False)
        ),
        _mutations(_pickle_of(_saved())).map(lambda change: _with_pickle(lambda _: change)),
    ),
    "keras": _mutations(_keras_config()).map(_keras_with),
    "ours": _mutations(_OURS).map(_ours),
    "safetensors": st.one_of(
        _mutations(_small_safetensors()),
        _mutations(_small_safetensors()[8:]).map(
            lambda change: _safetensors_with_header(lambda header: change[: len(header)])
        ),
    ),
}


@pytest.mark.parametrize("examples", [200, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", _FUZZED)
def test_mutated_files_never_end_in_a_traceback(tmp_path, kind, examples):
    path = tmp_path / f"fuzzed.{kind}"

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(_FUZZED[kind])
    def check(content):
        path.write_bytes(content)
        # Even unharmed, the files are no ResNet-50.
        with pytest.raises(UserError) as caught, bounded():
            port.read(path)
        lines = str(caught.value).splitlines()
        assert len(lines) == 1 or "difference" in lines[0]

    check()


def test_the_bounds_of_the_fuzz_hold():
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), bounded():
        np.empty(_address_space() + 2 * _MEMORY, np.uint8)  # however much of it was freed before
    with pytest.raises(TimeoutError), bounded(seconds=0.1):
        while True:
            pass
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
