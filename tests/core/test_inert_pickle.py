"""Whole-module files give up their tensors and nothing else: no name in them is imported, no function called."""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import runpy
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qsd_plugin.core.errors import CheckpointError
from qsd_plugin.core.inert_pickle import StoredTensor, read_inert
from qsd_plugin.export.weights import read_weights

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])

EVENTS: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if EVENTS is not None and (
        event in ("exec", "compile", "import", "pickle.find_class", "os.system", "subprocess.Popen", "os.exec")
        or (event == "open" and arguments[1] not in ("r", "rb"))
    ):
        EVENTS.append(event)


sys.addaudithook(_audit)  # cannot be removed, hence the switch


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[list[str]]:
    """What the interpreter does that code from a file could be behind."""
    global EVENTS
    read_inert(archive(b"N.", tmp_path / "first.pth"))  # imports what reading itself needs
    EVENTS = []
    yield EVENTS
    EVENTS = None


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A module of classes that cannot be imported when it is read, as the authors' are on a user's machine."""
    source = types.ModuleType("modeling.baseline")
    block = type("Block", (nn.Sequential,), {"__module__": "modeling.baseline"})
    source.Block = block
    monkeypatch.setitem(sys.modules, "modeling", types.ModuleType("modeling"))
    monkeypatch.setitem(sys.modules, "modeling.baseline", source)
    torch.manual_seed(0)
    model: nn.Module = block(
        OrderedDict(conv=nn.Conv2d(3, 4, 3, bias=False), bn=nn.BatchNorm2d(4), head=nn.Linear(4, 2))
    )
    model.head.weight.data = torch.randn(4, 2).t()  # not contiguous
    model.register_buffer("count", torch.tensor(7))
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    model.register_buffer("nothing", None)
    model.half_precision = nn.Parameter(torch.randn(5).half(), requires_grad=False)
    model.loss = torch.nn.functional.relu  # a function among the attributes
    return model


def save(content: object, path: Path, *, zipped: bool) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_same(tensors: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == state.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == state[name].dtype
        assert tensor.equal(state[name]), name


@FORMATS
def test_module_gives_its_state_dict_without_its_class(
    network: nn.Module, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: list[str]
) -> None:
    path = save(network, tmp_path / "module.pth", zipped=zipped)
    monkeypatch.delitem(sys.modules, "modeling.baseline")
    monkeypatch.delitem(sys.modules, "modeling")
    file = read_weights(path)
    assert_same(file.tensors, network.state_dict())
    assert file.not_run == ()
    assert "pickle.find_class" not in watched


@FORMATS
@pytest.mark.parametrize("wrap", ["parallel", "dict", "state_dict"])
def test_wrapped_modules(network: nn.Module, zipped: bool, wrap: str, tmp_path: Path) -> None:
    content: Any = {
        "parallel": lambda: nn.DataParallel(network),
        "dict": lambda: {"epoch": 3, "model": network, "optimizer": None},
        "state_dict": lambda: {"state_dict": network.state_dict(), "loss": Call(os.system, "true")},
    }[wrap]()
    file = read_weights(save(content, tmp_path / "wrapped.pth", zipped=zipped))
    assert_same(file.tensors, network.state_dict())


@FORMATS
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]
)
def test_types_views_and_empty_tensors(dtype: torch.dtype, zipped: bool, tmp_path: Path) -> None:
    whole = (torch.arange(24) % 2).to(dtype)
    content = {"a": whole.reshape(4, 6)[1:3, ::2], "b": whole[20:], "c": whole[:0].reshape(0, 3), "d": whole[5]}
    loaded = read_inert(save(content, tmp_path / "views.pth", zipped=zipped)).content
    assert isinstance(loaded, dict)
    assert all(isinstance(value, StoredTensor) for value in loaded.values())
    assert_same({name: value.load() for name, value in loaded.items()}, content)


# --- hostile files


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.parts = (function, arguments)

    def __reduce__(self) -> Any:
        return self.parts


def gadgets(marker: Path) -> dict[str, Any]:
    """Each leaves ``marker`` behind, or imports a module, where the pickle is obeyed."""
    write = f"open({str(marker)!r}, 'w')"
    touch = Call(os.system, f"touch {marker}")
    script = marker.with_name("script.py")
    script.write_text(write)
    nested = marker.with_name("nested.pkl")
    nested.write_bytes(pickle.dumps(touch))
    return {
        "system": touch,
        "eval": Call(eval, write),
        "exec": Call(exec, write),
        "import": Call(importlib.import_module, "antigravity"),
        "getattr": Call(getattr, Call(importlib.import_module, "os"), "system"),
        "partial": Call(functools.partial, os.system, f"touch {marker}"),
        "Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "load": Call(torch.load, str(nested), "cpu", None),
        "loads": Call(pickle.loads, nested.read_bytes()),
        "run_path": Call(runpy.run_path, str(script)),
        "touch": Call(Path.touch, marker),
        "from_file": Call(torch.UntypedStorage.from_file, str(marker), True, 8),
        "hook": Call(torch._utils._rebuild_parameter, torch.ones(1), True, OrderedDict(hook=touch)),
    }


#: What each of them wants to call, under the name that a pickle of protocol 2 gives it.
GADGETS = {
    "system": "posix.system",
    "eval": "__builtin__.eval",
    "exec": "__builtin__.exec",
    "import": "importlib.import_module",
    "getattr": "importlib.import_module",
    "partial": "functools.partial",
    "Popen": "commands.Popen",
    "load": "torch.serialization.load",
    "loads": "pickle.loads",
    "run_path": "runpy.run_path",
    "touch": "__builtin__.getattr",
    "from_file": "__builtin__.getattr",
    "hook": "posix.system",
}


@FORMATS
@pytest.mark.parametrize("name", GADGETS)
def test_calls_are_named_and_not_made(
    name: str, zipped: bool, network: nn.Module, tmp_path: Path, watched: list[str]
) -> None:
    hostile = gadgets(tmp_path / "ran")
    network.payload = hostile[name]
    network.payloads = [hostile[name], {"again": hostile[name]}]
    path = save(network, tmp_path / "hostile.pth", zipped=zipped)
    state = network.state_dict()
    watched.clear()
    content = read_inert(path)
    assert watched == []
    file = read_weights(path)
    assert not (tmp_path / "ran").exists()
    assert "antigravity" not in sys.modules
    assert_same(file.tensors, state)
    assert content.calls == file.not_run
    assert GADGETS[name] in file.not_run


@FORMATS
def test_the_gadgets_work_where_they_are_obeyed(zipped: bool, tmp_path: Path) -> None:
    """The control of the test above."""
    for name in ("system", "eval", "exec", "loads", "run_path", "touch", "from_file"):
        marker = tmp_path / f"{name}{zipped}"
        torch.load(save(gadgets(marker)[name], tmp_path / "x.pth", zipped=zipped), weights_only=False)
        assert marker.exists(), name


def archive(pickled: bytes, path: Path, **records: bytes) -> Path:
    """A file as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in {"data.pkl": pickled, "version": b"3", **records}.items():
            file.writestr(f"archive/{name.replace('__', '/')}", content)
    return path


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"(S'touch ran'\nios\nsystem\n.", None),  # INST
        (b"(cos\nsystem\nS'touch ran'\no.", None),  # OBJ
        (text("builtins") + text("__import__('os').system") + b"\x93" + text("touch ran") + b"\x85R.", None),
        (b"cos\nsystem\nN}S'dump_patches'\nI1\ns\x86b.", "__setstate__|state"),  # changes a class
        (b"ctorch._utils\n_rebuild_tensor_v2\nN}S'x'\nI1\ns\x86b.", "sets 'x'"),
        (b"cos\nsystem\n)\x81N}S'__class__'\nI1\ns\x86b.", None),  # slots of an object
        (b"\x82\x01.", "unregistered extension"),  # EXT1
        (b"(S'module'\ncos\nsystem\nS'a'\nS'b'\ntQ.", None),
        (b"(S'storage'\ncos\nsystem\nS'0'\nS'cpu'\nI1\ntQ.", "a storage of type os.system"),
        (b"(S'file'\nS'/etc/passwd'\ntQ.", "an object of kind 'file'"),
        (b"S'x'\nQ.", "."),
    ],
)
def test_opcodes_by_hand(pickled: bytes, message: str | None, tmp_path: Path, watched: list[str]) -> None:
    path = archive(pickled, tmp_path / "x.pth")
    watched.clear()
    if message is None:
        read_inert(path)
    else:
        with pytest.raises(pickle.UnpicklingError, match=message):
            read_inert(path)
    assert watched == []


def test_nothing_a_file_does_outlives_it(tmp_path: Path) -> None:
    """Classes are made per file, and the shared ones cannot be changed."""
    for name in ("collections OrderedDict", "torch._utils _rebuild_tensor_v2"):
        module, attribute = name.split()
        pickled = f"c{module}\n{attribute}\n".encode() + b"N}S'__new__'\ncos\nsystem\ns\x86b."
        with pytest.raises(pickle.UnpicklingError, match="sets '__new__'"):
            read_inert(archive(pickled, tmp_path / "x.pth"))


def stored(geometry: str, count: int = 4, key: str = "0") -> bytes:
    """The pickle of one tensor: ``geometry`` are pickled offset, size and stride."""
    storage = f"(S'storage'\nctorch\nFloatStorage\nS'{key}'\nS'cpu'\nI{count}\ntQ"
    return f"}}S'w'\nctorch._utils\n_rebuild_tensor_v2\n({storage}{geometry}I00\nNtRs.".encode()


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ("I0\n(I5\nt(I1\nt", r"shape \(5,\) in a storage of 4"),
        ("I2\n(I3\nt(I1\nt", "in a storage of 4"),
        ("I-1\n(I2\nt(I1\nt", "offset, size and stride"),
        ("I0\n(I2\nt(I-1\nt", "offset, size and stride"),
        ("I0\n(I2\nt(I1\nI1\nt", "offset, size and stride"),
        ("I0\n(I1000000000\nt(I0\nt", "in a storage of 4"),
        ("S'0'\n(I2\nt(I1\nt", "offset, size and stride"),
    ],
)
def test_tensors_stay_within_their_storage(geometry: str, message: str, tmp_path: Path) -> None:
    numbers = struct.pack("<4f", 1, 2, 3, 4)
    fine = archive(stored("I1\n(I2\nt(I2\nt"), tmp_path / "fine.pth", data__0=numbers)
    content = read_inert(fine).content
    assert isinstance(content, dict)
    assert content["w"].load().tolist() == [2.0, 4.0]
    content = read_inert(archive(stored(geometry), tmp_path / "x.pth", data__0=numbers)).content
    assert isinstance(content, dict)
    with pytest.raises(pickle.UnpicklingError, match=message):
        content["w"].load()


def test_missing_and_odd_numbers_are_named(tmp_path: Path) -> None:
    geometry = "I0\n(I1\nt(I1\nt"
    for numbers in ({}, {"data__0": b"odd"}):
        with pytest.raises(CheckpointError, match=r"x\.pth: got .*(cannot be read|numbers of a tensor)"):
            read_weights(archive(stored(geometry), tmp_path / "x.pth", **numbers))


# --- files that are no weights


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04", pickle.dumps({"a": 1})])
def test_other_files_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.pth: got .{len(content)} bytes that cannot be read.*torch\.save"):
        read_weights(tmp_path / "x.pth")


@FORMATS
def test_cut_files_are_named(network: nn.Module, zipped: bool, tmp_path: Path) -> None:
    path = save(network, tmp_path / "x.pth", zipped=zipped)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="cut off"):
        read_weights(path)


def test_scripts_missing_files_and_files_without_weights(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match=r"TorchScript.*model\.state_dict\(\)"):
        read_weights(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="expected an existing file"):
        read_weights(tmp_path / "none.pth")
    torch.save({"epoch": 3, "best": 0.5}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"\['best', 'epoch'\]; expected a module, a state dict, or one under"):
        read_weights(tmp_path / "x.pth")


def test_modules_that_contain_themselves_are_refused(network: nn.Module, tmp_path: Path) -> None:
    network.head._modules["back"] = network
    path = save(network, tmp_path / "x.pth", zipped=True)
    with pytest.raises(CheckpointError, match="contains itself"):
        read_weights(path)
    wrapped: dict[str, Any] = {}
    wrapped["model"] = wrapped
    with pytest.raises(CheckpointError, match="recursion"):
        read_weights(save(wrapped, tmp_path / "y.pth", zipped=True))


def test_a_parameter_that_is_no_tensor_is_not_dropped_silently(network: nn.Module, tmp_path: Path) -> None:
    network.head._parameters["weight"] = Call(print, "x")
    with pytest.raises(CheckpointError, match=r"head\.weight is no tensor but a __builtin__\.print"):
        read_weights(save(network, tmp_path / "x.pth", zipped=True))
