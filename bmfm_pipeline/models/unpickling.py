"""Checkpoint files of torch, read without running anything that they hold.

A pickle is a program. Here it can name only what ALLOWED lists, and every name stands for something inert of our own: classes of
bmfm_targets become records of their attributes, tensors become descriptions whose bytes are read afterwards. Nothing a file names is
imported or called, and nothing in it may claim more memory than the file is long.
"""

import io
import math
import pickle
import pickletools
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bmfm_pipeline.errors import CheckpointError

# The pickled part holds names and numbers; weights lie beside it.
MOST_PICKLED_BYTES = 64 * 2**20
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Configuration classes and enumerations of bmfm_targets, by name; which of its modules holds one has changed over time.
RECORDS = (
    "SCBertConfig",
    "SCModernBertConfig",
    "SCPerformerConfig",
    "SCNystromformerConfig",
    "LlamaForMultiTaskConfig",
    "LlamaForMaskedLMConfig",
    "LlamaForSequenceClassification",
    "FieldInfo",
    "LabelColumnInfo",
    "PreTrainedEmbeddingConfig",
    "TokenizerConfig",
    "TrainerConfig",
    "TrainingTaskConfig",
    "LoraConfigWrapper",
    "LossConfig",
)
_PLACE_OF_RECORDS = re.compile(r"bmfm_targets\.(config|models)(\.\w+)*")
# What a dictionary of plain values and tensors needs; anything else (persistent ids as text, extension codes, old ways to make an
# object, buffers outside the file) has no business in a checkpoint.
_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE", "INT", "LONG",
    "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "UNICODE", "SHORT_BINUNICODE",
    "BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "LIST", "EMPTY_DICT",
    "DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE",
    "GET", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "NEWOBJ", "NEWOBJ_EX", "BINPERSID",
}  # fmt: skip
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


class Record:
    """An object of a class that is not here: the name of the class and its attributes, nothing that acts."""

    name = ""

    def __new__(cls, *arguments: Any, **named: Any) -> "Record":
        made = super().__new__(cls)
        made.__dict__.update(arguments=arguments, values=dict(named))
        return made

    def __init__(self, *arguments: Any, **named: Any):
        """What there is to do, __new__ has done."""

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.__dict__["values"].update(part)


class _Mapping(dict):
    """A dictionary that keeps its pairs and takes no attributes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """What torch notes beside the weights is not used."""


@dataclass(frozen=True)
class StoredTensor:
    """Where the bytes of a tensor lie in the file, and how they are read; sizes and strides in elements."""

    record: str
    dtype: torch.dtype
    elements: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Storage:
    record: str
    dtype: torch.dtype
    elements: int


class CheckpointFile:
    """A file written by torch.save: `values` are its plain values with descriptions of tensors; `tensor` reads one of those.

    Raises CheckpointError for a damaged file, and for one whose pickle names anything but what is known to be harmless.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._bytes: tuple[str, bytearray] = ("", bytearray())
        try:
            self._zip = zipfile.ZipFile(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        except zipfile.BadZipFile:
            raise CheckpointError(
                f"{self.path}: is no checkpoint that torch 1.6 or later has written, or it is cut short; copy it again, or load it where "
                "it was made and save it with today's torch"
            ) from None
        try:
            self._entries = self._checked_entries()
            self.values = self._unpickle(self._read(self._pickled))
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> "CheckpointFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._zip.close()

    def _checked_entries(self) -> dict[str, zipfile.ZipInfo]:
        entries = {entry.filename: entry for entry in self._zip.infolist()}
        length = self.path.stat().st_size
        packed = [entry.filename for entry in entries.values() if entry.compress_type != zipfile.ZIP_STORED]
        if (
            packed
            or len(entries) != len(self._zip.infolist())
            or sum(item.file_size for item in entries.values()) > length
        ):
            what = f"{packed[0]} is compressed" if packed else "its parts are longer than the file"
            raise CheckpointError(f"{self.path}: was not written by torch.save: {what}; nothing was read")
        found = [name for name in entries if name.rpartition("/")[2] == "data.pkl" and name.count("/") <= 1]
        if len(found) != 1:
            raise CheckpointError(f"{self.path}: holds no data.pkl, so it is no checkpoint of torch")
        self._pickled = found[0]
        self._folder = found[0].rpartition("/")[0]
        if entries[self._pickled].file_size > MOST_PICKLED_BYTES:
            raise CheckpointError(
                f"{self.path}: its pickle takes {entries[self._pickled].file_size / 2**20:.0f} MiB, and a checkpoint's names and numbers "
                f"less than {MOST_PICKLED_BYTES // 2**20}; nothing was read"
            )
        order = self._place("byteorder")
        if order in entries and self._read(order).strip() not in (b"little", b""):
            raise CheckpointError(
                f"{self.path}: was written on a big-endian machine; save it again on the machine at hand"
            )
        return entries

    def _place(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name

    def _read(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        except KeyError:
            raise CheckpointError(f"{self.path}: lacks {name}; copy it again") from None
        except (OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{self.path}: {name} is damaged ({error}); copy the file again") from error

    def _unpickle(self, data: bytes) -> Any:
        self._check_opcodes(data)
        try:
            return _Unpickler(data, self).load()
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self.path}: its pickle is damaged or crafted ({error}); nothing was run"
            ) from error

    def _check_opcodes(self, data: bytes) -> None:
        """Look at every instruction before the first is followed: lengths are within the data, and none reserves memory by a number."""
        try:
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name not in _OPCODES:
                    raise CheckpointError(
                        f"{self.path}: its pickle uses {opcode.name}, which a checkpoint has no use for; nothing was run"
                    )
                if opcode.name in _PUTS and not 0 <= int(argument) <= len(data):
                    raise CheckpointError(
                        f"{self.path}: its pickle asks for room for {argument} objects; nothing was run"
                    )
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self.path}: its pickle is damaged ({error}); nothing was run") from error

    def storage(self, identity: Any) -> _Storage:
        """What a persistent id stands for: ("storage", type, record, device, elements)."""
        if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
            raise CheckpointError(f"{self.path}: a stored object that is no storage of a tensor; nothing was run")
        _, kind, record, _, elements = identity
        entry = self._entries.get(self._place(f"data/{record}"))
        if not isinstance(kind, _StorageType) or not isinstance(record, str) or entry is None:
            raise CheckpointError(f"{self.path}: a tensor names bytes that are not in the file ({record!r})")
        if type(elements) is not int or elements < 0 or elements * kind.dtype.itemsize > entry.file_size:
            raise CheckpointError(
                f"{self.path}: a tensor says it has {elements} elements, and {entry.file_size} bytes are stored for it; nothing was read"
            )
        return _Storage(record, kind.dtype, elements)

    def rebuild(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> StoredTensor:
        """The description that a pickled tensor becomes; refused where it reaches beyond its bytes or repeats them."""
        numbers = (offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
        if not isinstance(storage, _Storage) or any(type(number) is not int or number < 0 for number in numbers):
            raise CheckpointError(f"{self.path}: a tensor without sizes or bytes; nothing was read")
        count = math.prod(size)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=False)) if count else 0
        if len(size) != len(stride) or count > storage.elements or (count and last >= storage.elements):
            raise CheckpointError(
                f"{self.path}: a tensor of size {size} reaches beyond the {storage.elements} elements that are stored for it; nothing "
                "was read"
            )
        return StoredTensor(storage.record, storage.dtype, storage.elements, offset, size, stride)

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """The tensor that a description stands for, on the CPU."""
        if not math.prod(stored.size):
            return torch.empty(stored.size, dtype=stored.dtype)
        if self._bytes[0] != stored.record:
            self._bytes = (stored.record, bytearray(self._read(self._place(f"data/{stored.record}"))))
        flat = torch.frombuffer(self._bytes[1], dtype=stored.dtype, count=stored.elements)
        return flat.as_strided(stored.size, stored.stride, stored.offset)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights of a Lightning checkpoint, or of a file that is a state_dict itself."""
        values = self.values
        found = values.get("state_dict", values) if isinstance(values, dict) else None
        if not isinstance(found, dict) or not found:
            raise CheckpointError(f"{self.path}: holds no state_dict")
        odd = [
            name for name, value in found.items() if not isinstance(name, str) or not isinstance(value, StoredTensor)
        ]
        if odd:
            raise CheckpointError(f"{self.path}: state_dict holds {odd[0]!r}, which is no tensor")
        return {name: self.tensor(value) for name, value in found.items()}

    def averages(self) -> dict[str, torch.Tensor]:
        """Moving averages of weights that a training of ours keeps beside them; empty where there are none."""
        place = self.values
        for name in ("callbacks", "WeightAverage", "averages"):
            place = place.get(name) if isinstance(place, dict) else None
        found = place if isinstance(place, dict) else {}
        return {name: self.tensor(value) for name, value in found.items() if isinstance(value, StoredTensor)}


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype


@dataclass(frozen=True)
class _Word:
    """A name that says something and does nothing, such as torch.float32."""

    text: str


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, file: CheckpointFile):
        super().__init__(io.BytesIO(data))
        self.file = file

    def persistent_load(self, identity: Any) -> _Storage:
        return self.file.storage(identity)

    def find_class(self, module: str, name: str) -> Any:
        stands_for = self._inert(module, name)
        if stands_for is None:
            raise CheckpointError(
                f"{self.file.path}: names {module}.{name}, which is not on the list of what a checkpoint may hold; nothing was run. Use "
                "the file only if you know who made it: load it where it was made, and save the state_dict alone"
            )
        return stands_for

    def _inert(self, module: str, name: str) -> Any:
        # Made anew for every mention: an instruction that changes one changes nothing else.
        if (module, name) == ("collections", "OrderedDict"):
            return type(name, (_Mapping,), {"__slots__": ()})
        if module == "torch" and name in DTYPES:
            return _StorageType(DTYPES[name])
        if module == "torch" and isinstance(getattr(torch, name, None) if name.isidentifier() else None, torch.dtype):
            return _Word(f"torch.{name}")
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: self.file.rebuild(*arguments)  # noqa: PLW0108
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset"):
            return lambda values=(): set(values)
        if (module, name) == ("_codecs", "encode"):  # how bytes are written in the older protocols
            return lambda *arguments: _as_bytes(*arguments)  # noqa: PLW0108
        is_record = name in RECORDS and _PLACE_OF_RECORDS.fullmatch(module)
        if is_record or (module, name) in _OTHER_RECORDS:
            return type(name, (Record,), {"name": f"{module}.{name}"})
        return None


_OTHER_RECORDS = {
    ("torch", "Size"),
    ("torch", "device"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "WindowsPath"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
}


def _as_bytes(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes that are no latin-1 text")
    return text.encode("latin-1")


def plain(value: Any, most: int = 200_000) -> Any:
    """Records as dictionaries of their attributes, tuples as lists, paths and type names as text; tensors are left out as None.

    `most`: how many values it may consist of, so that a small file that repeats itself does not grow without end.
    """
    left = [most]

    def visit(one: Any, depth: int) -> Any:
        left[0] -= 1
        if left[0] < 0 or depth > 50:
            raise CheckpointError("the settings stored in the checkpoint are nested without end; nothing was used")
        if one is None or isinstance(one, bool | int | float | str):
            return one
        if isinstance(one, dict):
            return {str(key): visit(entry, depth + 1) for key, entry in one.items()}
        if isinstance(one, list | tuple | set | frozenset):
            return [visit(entry, depth + 1) for entry in one]
        if isinstance(one, Record):
            if type(one).name.startswith("pathlib."):
                return "/".join(str(part) for part in one.arguments)
            if one.values:
                return {"__class__": type(one).name, **visit(one.values, depth + 1)}
            return visit(one.arguments[0], depth + 1) if len(one.arguments) == 1 else None
        return one.text if isinstance(one, _Word) else None

    return visit(value, 0)
