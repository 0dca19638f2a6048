"""The few pickle instructions that a state_dict of PyTorch needs; every other one is refused.

A pickle is a program. Here it is interpreted on plain dictionaries, lists, tuples and numbers: no
name that it mentions is looked up, nothing is imported or called. (`pickle.Unpickler` with a strict
`find_class` would still let a file allocate what it likes.)
"""

import pickletools
from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from cifar_jax.pretrained.names import printable

_STORAGES = {
    "torch FloatStorage": np.dtype("<f4"),
    "torch DoubleStorage": np.dtype("<f8"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
    "torch BoolStorage": np.dtype("?"),
}
_DICT = "collections OrderedDict"
_TENSORS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor")
_PARAMETER = "torch._utils _rebuild_parameter"

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ALLOWED = {
    *_CONSTANTS, *_LITERALS, *_EMPTY, *_TUPLES, "PROTO", "MARK", "TUPLE", "SETITEM", "SETITEMS",
    "APPEND", "APPENDS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE",
    "BUILD", "BINPERSID", "STOP",
}  # fmt: skip


class MalformedError(Exception):
    """What is wrong with the pickle or its tensors."""


@dataclass(frozen=True)
class _Global:
    """A name that the pickle asks for; never looked up."""

    name: str


@dataclass(frozen=True)
class Storage:
    key: str
    dtype: np.dtype
    numbers: int


@dataclass(frozen=True)
class Tensor:
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers


_MARK = object()


def unpickle(stream: BinaryIO, dtypes: dict[str, np.dtype] | None = None) -> Any:
    """Interprets one pickle.

    Args:
        stream: behind the pickle afterwards.
        dtypes: is told the dtype of every storage by its key.

    Raises:
        MalformedError: at what no state_dict needs.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    while True:
        code = stream.read(1).decode("latin-1")
        opcode = pickletools.code2op.get(code)
        if opcode is None:
            raise MalformedError("truncated or damaged pickle")
        if opcode.name not in _ALLOWED:
            raise MalformedError(
                f"refused: pickle instruction {opcode.name} is none that tensors need"
            )
        argument = _argument(opcode, stream)
        if opcode.name == "STOP":
            return stack.pop()
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif opcode.name != "PROTO":
            _step(opcode.name, argument, stack)
            if opcode.name == "BINPERSID" and dtypes is not None:
                dtypes[stack[-1].key] = stack[-1].dtype


def _argument(opcode: pickletools.OpcodeInfo, stream: BinaryIO) -> Any:
    if opcode.name == "GLOBAL":
        # pickletools would interpret backslashes, and warn of some.
        lines = [stream.readline(200).removesuffix(b"\n") for _ in range(2)]
        return b" ".join(lines).decode("latin-1")
    return opcode.arg.reader(stream) if opcode.arg else None


def _step(opcode: str, argument: Any, stack: list[Any]) -> None:
    if opcode in _CONSTANTS:
        stack.append(_CONSTANTS[opcode])
    elif opcode in _LITERALS:
        stack.append(argument)
    elif opcode in _EMPTY:
        stack.append(_EMPTY[opcode]())
    elif opcode == "MARK":
        stack.append(_MARK)
    elif opcode == "TUPLE":
        stack.append(tuple(_pop_to_mark(stack)))
    elif opcode in _TUPLES:
        count = _TUPLES[opcode]
        stack[-count:] = [tuple(stack[-count:])]
    elif opcode in ("SETITEM", "SETITEMS"):
        items = _pop_to_mark(stack) if opcode == "SETITEMS" else [stack.pop(-2), stack.pop()]
        _set_items(stack[-1], items)
    elif opcode in ("APPEND", "APPENDS"):
        items = _pop_to_mark(stack) if opcode == "APPENDS" else [stack.pop()]
        expect(stack[-1], list).extend(items)
    elif opcode == "GLOBAL":
        stack.append(_allowed_global(argument))
    elif opcode == "REDUCE":
        arguments = stack.pop()
        stack[-1] = _reduce(expect(stack[-1], _Global).name, expect(arguments, tuple))
    elif opcode == "BUILD":
        stack.pop()  # attributes of an OrderedDict: PyTorch's notes on versions
        expect(stack[-1], dict)
    elif opcode == "BINPERSID":
        stack[-1] = _storage(*expect(stack[-1], tuple))


def _allowed_global(name: str) -> _Global:
    if name not in (_DICT, *_TENSORS, _PARAMETER, *_STORAGES):
        raise MalformedError(
            f"refused: the file asks to call {printable(name.replace(' ', '.'))}; "
            "only tensors are read: save them alone, with torch.save(model.state_dict(), path)"
        )
    return _Global(name)


def _reduce(function: str, arguments: tuple) -> Any:
    if function == _DICT and not arguments:
        return {}
    if function in _TENSORS and len(arguments) >= 4:
        storage, offset, shape, strides = arguments[:4]
        expect(storage, Storage)
        for number in (offset, *expect(shape, tuple), *expect(strides, tuple)):
            if type(number) is not int or not 0 <= number < 1 << 48:
                raise MalformedError("a tensor has an impossible offset, shape or stride")
        if len(shape) != len(strides) or len(shape) > 8:
            raise MalformedError("a tensor has an impossible number of dimensions")
        return Tensor(storage, offset, shape, strides)
    if function == _PARAMETER and arguments:
        return expect(arguments[0], Tensor)
    raise MalformedError(f"damaged pickle: {function} with {len(arguments)} arguments")


def _storage(*identity: Any) -> Storage:
    kind, dtype, key, _location, numbers = identity[:5]
    dtype = _STORAGES.get(expect(dtype, _Global).name)
    if kind != "storage" or dtype is None or type(numbers) is not int or numbers < 0:
        raise MalformedError("damaged pickle: a storage is not described as one")
    return Storage(expect(key, str), dtype, numbers)


def _set_items(target: Any, items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Strings, and numbers of parameters as optimizers have: hashing nested tuples or numbers
        # made to collide could take for ever.
        is_count = type(key) is int and 0 <= key < 1 << 20
        expect(target, dict)[key if is_count else expect(key, str)] = value


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    position = len(stack) - 1
    while stack[position] is not _MARK:
        position -= 1
        if position < 0:
            raise MalformedError("damaged pickle: a list without beginning")
    items = stack[position + 1 :]
    del stack[position:]
    return items


def expect(value: Any, kind: type) -> Any:
    """Returns `value` if it is a `kind`.

    Raises:
        MalformedError: if it is anything else.
    """
    if not isinstance(value, kind):
        raise MalformedError(
            f"damaged pickle: a {type(value).__name__} stands where a {kind.__name__} belongs"
        )
    return value
