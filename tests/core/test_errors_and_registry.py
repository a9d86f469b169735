"""Messages and near misses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qsd_plugin.core import streams
from qsd_plugin.core.errors import DataError, QSDPluginError, RegistryError, did_you_mean, nearest
from qsd_plugin.core.files import write_atomically
from qsd_plugin.core.progress import duration
from qsd_plugin.core.registry import Registry


def test_message_names_thing_value_expectation_and_remedy() -> None:
    error = QSDPluginError("Config key QSD.TAU", value=1.5, expected="0 <= tau < 1", remedy="Lower it.")
    assert str(error) == "Config key QSD.TAU: got 1.5; expected 0 <= tau < 1. Lower it."


def test_nearest_ignores_case_and_keeps_order() -> None:
    assert nearest("market", ["Market1501", "DukeMTMC"]) == ["Market1501"]
    assert did_you_mean("xyz", ["b", "a"]) == "Known names: a, b."


def test_registry_refuses_a_second_object_and_suggests_on_a_miss() -> None:
    registry: Registry[int] = Registry("loss")
    registry.add("QSDLoss", 1)
    registry.add("QSDLoss", 1)
    with pytest.raises(RegistryError, match="registered already"):
        registry.add("QSDLoss", 2)
    with pytest.raises(RegistryError, match=r"Unknown loss: got 'QSDLos'. Did you mean 'QSDLoss'"):
        registry.get("QSDLos")


def test_streams_depend_on_path_only() -> None:
    draws = [streams.numpy_stream(0, "augment", epoch, 3).random(4) for epoch in (1, 2, 1)]
    assert np.array_equal(draws[0], draws[2])
    assert not np.array_equal(draws[0], draws[1])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = torch.rand(3, generator=streams.torch_stream(5, "x"))
    assert torch.equal(first, torch.rand(3, generator=streams.torch_stream(5, "x")))
    assert torch.equal(before, torch.get_rng_state())


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"old")

    def fail(file: object) -> None:
        file.write(b"ne")  # type: ignore[attr-defined]
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        write_atomically(target, fail)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"Cannot write.*writable folder"):
        write_atomically(tmp_path / "file" / "below", b"")


def test_duration() -> None:
    assert (duration(59.6), duration(3729)) == ("1:00", "1:02:09")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, qsd_plugin; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "torchvision", "numpy", "fastreid", "cv2"} & set(eval(loaded))
