"""Reading checkpoints: what torch.save writes comes back, and nothing that a pickle names is ever run or believed."""

import pickle
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
from checkpoint_files import CONFIG, foreign_classes, write_archive

from bmfm_pipeline.errors import CheckpointError
from bmfm_pipeline.models import unpickling
from bmfm_pipeline.models.unpickling import CheckpointFile, Record, plain


def g(module: str, name: str) -> bytes:
    """The instruction that names a global."""
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def calls(module: str, name: str, *arguments: str) -> bytes:
    return g(module, name) + b"(" + b"".join(map(text, arguments)) + b"tR"


class Runs:
    """Unpickled the ordinary way, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w')",))


def everything():
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    kinds = [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    ]
    tensors = {str(kind): torch.arange(5).to(kind) for kind in kinds}
    tensors |= {
        "view": base[1:3, ::2], "transposed": base.T, "whole": base, "empty": torch.zeros(0, 3), "bool": base > 3,
        "scalar": torch.tensor(2.5), "parameter": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    return OrderedDict(tensors)


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saves_comes_back(tmp_path, protocol):
    state = everything()
    state._metadata = {"": {"version": 1}}
    numbers = {
        "epoch": 3,
        "big": 2**70,
        "rate": 1e-3,
        "names": ("a", ["b"], {"c": None}),
        "type": torch.bfloat16,
        "set": {1},
    }
    torch.save({"state_dict": state, **numbers}, tmp_path / "x.ckpt", pickle_protocol=protocol)
    with CheckpointFile(tmp_path / "x.ckpt") as file:
        found = file.state_dict()
        assert plain({name: file.values[name] for name in numbers}) == {
            "epoch": 3, "big": 2**70, "rate": 1e-3, "names": ["a", ["b"], {"c": None}], "type": "torch.bfloat16", "set": [1],
        }  # fmt: skip
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.detach()), name


def test_objects_of_bmfm_targets_become_records_without_it(tmp_path):
    with foreign_classes() as make:
        config = make(CONFIG, "SCBertConfig", hidden_size=8, fields=[make(CONFIG, "FieldInfo", field_name="genes")])
        torch.save({"hyper_parameters": {"model_config": config}}, tmp_path / "x.ckpt")
    with CheckpointFile(tmp_path / "x.ckpt") as file:
        stored = plain(file.values["hyper_parameters"]["model_config"])
    assert stored == {
        "__class__": f"{CONFIG}.SCBertConfig", "hidden_size": 8,
        "fields": [{"__class__": f"{CONFIG}.FieldInfo", "field_name": "genes"}],
    }  # fmt: skip


REFUSED = {
    "a shell command": (calls("posix", "system", "touch CANARY"), "posix.system"),
    "the same by its other name": (calls("os", "system", "touch CANARY"), "os.system"),
    "an expression": (calls("builtins", "eval", "open('CANARY', 'w')"), "builtins.eval"),
    "the older name of builtins": (calls("__builtin__", "exec", "open('CANARY', 'w')"), "__builtin__.exec"),
    "another process": (calls("subprocess", "Popen", "touch CANARY"), "subprocess.Popen"),
    "a download that runs": (calls("torch.hub", "load", "someone/something", "run"), "torch.hub.load"),
    "torch.load of a second file": (calls("torch.serialization", "load", "other.ckpt"), "torch.serialization.load"),
    "attributes, step by step": (
        g("builtins", "getattr") + b"(" + calls("builtins", "__import__", "os") + text("system") + b"tR",
        "builtins.getattr",
    ),
    "a dotted name within an allowed one": (
        b"\x80\x04" + text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93",
        "_rebuild_tensor_v2.__globals__",
    ),
    "the state of a real class": (
        g("torch.nn.modules.linear", "Linear") + b")\x81}" + text("weight") + text("x") + b"sb",
        "torch.nn.modules.linear.Linear",
    ),
    "a module of ours": (calls("bmfm_pipeline.storage", "publish", "x"), "bmfm_pipeline.storage.publish"),
    "a name that bmfm_targets does not have": (calls(f"{CONFIG}", "Popen", "x"), f"{CONFIG}.Popen"),
    "a name it has, elsewhere": (calls("evil", "SCBertConfig", "x"), "evil.SCBertConfig"),
    "a function that copyreg knows": (calls("copyreg", "_reconstructor", "x"), "copyreg._reconstructor"),
    "deep inside of harmless values": (
        b"}" + text("a") + b"](" + b"}" + text("b") + calls("posix", "system", "touch CANARY") + b"se" + b"s",
        "posix.system",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_pickle_that_names_anything_else_is_refused_by_that_name(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body, name = REFUSED[what]
    with pytest.raises(CheckpointError) as refused:
        CheckpointFile(write_archive(tmp_path / "x.ckpt", pickled(body)))
    assert name in str(refused.value) and "nothing was run" in str(refused.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x.ckpt"]


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "loops": [Runs(tmp_path / "canary")]}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"builtins\.exec|builtin__\.exec"):
        CheckpointFile(tmp_path / "x.ckpt")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"(" + text("x") + b"iposix\nsystem\n", "INST"),
        (b"(" + g("collections", "OrderedDict") + b"o", "OBJ"),
        (b"\x82\x01", "EXT1"),
        (b"Pname\n", "PERSID"),
        (b"N\x97", "NEXT_BUFFER"),
        (b"Nr" + struct.pack("<I", 2**31), "room for 2147483648 objects"),
        (b"\x8e" + struct.pack("<Q", 2**50), "damaged"),
        (b"\x8b" + struct.pack("<I", 2**31 - 1), "damaged"),
        (b"(((", "damaged"),
        (b"K\x01b", "damaged or crafted"),
    ],
)  # fmt: skip
def test_instructions_that_a_checkpoint_has_no_use_for_are_refused_unrun(body, word, tmp_path):
    with pytest.raises(CheckpointError, match=word):
        CheckpointFile(write_archive(tmp_path / "x.ckpt", pickled(body)))


def test_an_instruction_that_changes_a_stand_in_changes_nothing_else(tmp_path):
    attributes = b"(N}" + text("__setstate__") + text("x") + b"s" + text("name") + text("evil") + b"st"
    before = Record.__setstate__
    with pytest.raises(CheckpointError, match="damaged or crafted"):
        CheckpointFile(write_archive(tmp_path / "x.ckpt", pickled(g(CONFIG, "SCBertConfig") + attributes + b"b")))
    assert Record.__setstate__ is before and Record.name == ""
    claim = b"(N}" + text("__name__") + text("x") + b"s" + b"tb0"
    changed = g("torch._utils", "_rebuild_tensor_v2") + claim + tensor_of("4", 4)
    path = write_archive(tmp_path / "y.ckpt", pickled(changed), {"0": bytes(16)})
    with CheckpointFile(path) as file:
        assert file.tensor(file.values).tolist() == [0, 0, 0, 0]
        assert file.rebuild.__name__ == "rebuild"


def tensor_of(size: str, elements: int, stride: str = "1", offset: int = 0) -> bytes:
    """A pickled tensor that claims these sizes, in the words of torch."""
    number = lambda value: b"I%d\n" % value  # noqa: E731
    shape = lambda words: b"(" + b"".join(number(int(word)) for word in words.split()) + b"t"  # noqa: E731
    storage = b"(" + text("storage") + g("torch", "FloatStorage") + text("0") + text("cpu") + number(elements) + b"tQ"
    return (
        g("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + number(offset) + shape(size) + shape(stride) + b"tR"
    )


@pytest.mark.parametrize(
    ("claim", "word"),
    [
        ({"size": "1000000000000", "elements": 1000000000000}, "16 bytes are stored"),
        ({"size": "1000000000000", "elements": 4}, "reaches beyond the 4 elements"),
        ({"size": "100000 100000", "stride": "0 0", "elements": 4}, "reaches beyond the 4 elements"),
        ({"size": "4", "elements": 4, "offset": 1}, "reaches beyond"),
        ({"size": "4", "elements": 4, "stride": "2"}, "reaches beyond"),
        ({"size": "4", "elements": -4}, "-4 elements"),
        ({"size": "4", "elements": 4, "offset": -1}, "without sizes"),
        ({"size": "2 2", "elements": 4}, "reaches beyond"),
    ],
)
def test_a_tensor_cannot_claim_more_than_the_file_holds(claim, word, tmp_path):
    path = write_archive(tmp_path / "x.ckpt", pickled(tensor_of(**claim)), {"0": bytes(16)})
    with pytest.raises(CheckpointError, match=word):
        CheckpointFile(path)
    good = write_archive(tmp_path / "good.ckpt", pickled(tensor_of("4", 4)), {"0": struct.pack("<4f", 1, 2, 3, 4)})
    with CheckpointFile(good) as file:
        assert file.tensor(file.values).tolist() == [1, 2, 3, 4]


def test_bombs_are_not_unpacked(tmp_path, monkeypatch):
    bomb = write_archive(tmp_path / "x.ckpt", pickled(text("0" * 1_000_000)), compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 20_000
    with pytest.raises(CheckpointError, match="is compressed"):
        CheckpointFile(bomb)
    monkeypatch.setattr(unpickling, "MOST_PICKLED_BYTES", 100)
    with pytest.raises(CheckpointError, match="nothing was read"):
        CheckpointFile(write_archive(tmp_path / "long.ckpt", pickled(text("0" * 200))))
    doubled = b"]" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(40))
    monkeypatch.undo()
    nested = write_archive(tmp_path / "nested.ckpt", pickled(doubled))
    with CheckpointFile(nested) as file, pytest.raises(CheckpointError, match="nested without end"):
        plain(file.values)
    wide = b"]" + b"".join(b"q%c0](h%ch%ce" % (i, i, i) for i in range(1, 40))
    wide = write_archive(tmp_path / "wide.ckpt", pickled(wide))
    with CheckpointFile(wide) as file, pytest.raises(CheckpointError, match="nested without end"):
        plain(file.values, most=1000)


def test_damaged_and_other_files_are_named(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1000)}}, tmp_path / "x.ckpt")
    whole = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[:-200])
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    flipped = bytearray(whole)
    place = whole.index(struct.pack("<4f", 1, 1, 1, 1))
    flipped[place + 40] ^= 255
    (tmp_path / "flipped.ckpt").write_bytes(flipped)
    for name in ("cut", "old"):
        with pytest.raises(CheckpointError, match="cut short"):
            CheckpointFile(tmp_path / f"{name}.ckpt")
    with CheckpointFile(tmp_path / "flipped.ckpt") as file, pytest.raises(CheckpointError, match="is damaged"):
        file.state_dict()
    with pytest.raises(CheckpointError, match="cannot be read"):
        CheckpointFile(tmp_path / "none.ckpt")
    torch.save({"state_dict": {"a": 3}}, tmp_path / "odd.ckpt")
    with CheckpointFile(tmp_path / "odd.ckpt") as file, pytest.raises(CheckpointError, match="'a', which is no tensor"):
        file.state_dict()
