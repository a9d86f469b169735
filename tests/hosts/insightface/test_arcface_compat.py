"""Every shim: the failure it is for, what it does, and that undoing it brings the failure back."""

from __future__ import annotations

import pickle
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAKE, imported_host
from faces import face

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data.recordio import RecordWriter
from qsd_plugin.hosts.insightface import STANDINS, compat, mxnet_standin, shims_cpu


@contextmanager
def applied(name: str) -> Iterator[compat.Shim]:
    shim = next(shim for shim in compat.SHIMS if shim.name == name)
    undo = shim.apply()
    try:
        yield shim
    finally:
        undo()


def test_names_are_unique_and_only_machines_without_gpu_get_changes_in_torch() -> None:
    names = [shim.name for shim in compat.SHIMS]
    assert len(set(names)) == len(names)
    assert {shim.name for shim in compat.SHIMS if shim.needed is shims_cpu.no_cuda} == {
        *("loader on CPU", "seed on CPU", "gloo", "cuda()", "DDP")
    }


def test_mxnet_is_stood_in_for_where_it_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shim = next(shim for shim in compat.SHIMS if shim.name == "mxnet")
    monkeypatch.setitem(sys.modules, "mxnet", types.ModuleType("mxnet"))
    assert not shim.needed()
    monkeypatch.delitem(sys.modules, "mxnet")
    assert shim.needed()
    (tmp_path / "mxnet.py").write_text("import numpy\nbool_type = numpy.bool\nraise AttributeError('np.bool')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert shim.needed()  # it is installed and broken
    with applied("mxnet"):
        import mxnet

        assert hasattr(mxnet, mxnet_standin.MARK)
    assert "mxnet" not in sys.modules
    monkeypatch.syspath_prepend(str(STANDINS))
    import mxnet as on_path
    from mxnet import ndarray as nd

    assert hasattr(on_path, mxnet_standin.MARK)
    assert nd is on_path.nd
    for name in [name for name in sys.modules if name.partition(".")[0] == "mxnet"]:
        monkeypatch.delitem(sys.modules, name)


def test_stand_in_reads_records_as_they_are(tmp_path: Path) -> None:
    picture = face(1, 5, 0)
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.append(b"", [2, 3])
        writer.append(picture, 7.0)
    records = mxnet_standin.MXIndexedRecordIO(str(tmp_path / "train.idx"), str(tmp_path / "train.rec"), "r")
    assert records.keys == [0, 1]
    header, content = mxnet_standin.recordio_unpack(records.read_idx(0))
    assert (header.flag, header.label.tolist(), content) == (2, [2.0, 3.0], b"")
    header, content = mxnet_standin.recordio_unpack(records.read_idx(np.int64(1)))
    assert (header.flag, header.label, header.id, content) == (0, 7.0, 1, picture)
    image = mxnet_standin.imdecode(content)
    assert image.shape == (112, 112, 3)
    turned = mxnet_standin.flip(mxnet_standin.transpose(image, (2, 0, 1)), axis=2).asnumpy()
    np.testing.assert_array_equal(turned[1, 5], image.asnumpy()[5, ::-1, 1])
    wide = mxnet_standin.NDArrayLike(np.zeros((50, 100, 3), np.uint8))
    assert mxnet_standin.resize_short(wide, 112).shape == (112, 224, 3)
    with pytest.raises(ConfigError, match="flag: got 'w'"):
        mxnet_standin.MXIndexedRecordIO("a", "b", "w")


def schedule() -> list[float]:
    from lr_scheduler import PolynomialLRWarmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    steps = PolynomialLRWarmup(optimizer, warmup_iters=0, total_iters=4)
    rates = []
    for _ in range(4):
        optimizer.step()
        steps.step()
        rates.append(steps.get_last_lr()[0])
    return rates


def test_schedule_without_verbose(host: None) -> None:
    shim = next(shim for shim in compat.SHIMS if shim.name == "schedule")
    if not shim.needed():
        pytest.skip("this torch still takes verbose")
    with pytest.raises(TypeError, match="verbose"):
        schedule()
    with applied("schedule"):
        assert schedule() == pytest.approx([0.75, 0.5, 0.25, 0.0])
    with pytest.raises(TypeError, match="verbose"):
        schedule()


def test_interpolation_of_repeated_rates(host: None) -> None:
    from eval import verification

    if not next(shim for shim in compat.SHIMS if shim.name == "interpolation").needed():
        pytest.skip("this scipy still interpolates over duplicates")
    far, thresholds = np.array([0.0, 0.0, 0.5, 0.5, 1.0]), np.arange(5.0)
    with pytest.raises(ValueError, match="duplicates"):
        verification.interpolate.interp1d(far, thresholds, kind="slinear")(0.25)
    with applied("interpolation"):
        found = verification.interpolate.interp1d(far, thresholds, kind="slinear")
        assert [found(0.25), found(0.5), found(0.75)] == [1.5, 3.0, 3.5]
        with pytest.raises(ConfigError, match="kind: got 'cubic'"):
            verification.interpolate.interp1d(far, thresholds, kind="cubic")


class Payload:
    """Runs code where a pickle is loaded without care."""

    def __reduce__(self) -> Any:
        return exec, ("import sys; sys.qsd_test_ran = True",)


def test_verification_sets_run_no_code(host: None, faces: Path, tmp_path: Path) -> None:
    from eval import verification

    evil = tmp_path / "evil.bin"
    evil.write_bytes(pickle.dumps(([Payload()], [True])))
    with applied("bins"):
        with pytest.raises(DataError, match=r"evil.bin cannot be read"):
            verification.load_bin(str(evil), (112, 112))
        data, same = verification.load_bin(str(faces / "lfw.bin"), (112, 112))
    assert not hasattr(sys, "qsd_test_ran")
    assert data[0].shape == (40, 3, 112, 112)
    assert torch.equal(data[1], data[0].flip(3))
    assert list(same[:2]) == [True, False]


def test_error_in_the_loader_reaches_the_trainer(host: None) -> None:
    from dataset import BackgroundGenerator

    def broken() -> Iterator[int]:
        yield 1
        raise DataError("a damaged record")

    with applied("loader on CPU"), applied("loader errors"):
        items = BackgroundGenerator(broken(), 0)
        assert next(items) == 1
        with pytest.raises(DataError, match="a damaged record"):
            next(items)
        whole = BackgroundGenerator(iter([1]), 0)
        assert list(whole) == [1]
    with applied("loader on CPU"):
        silenced, threading.excepthook = threading.excepthook, lambda _: None
        items = BackgroundGenerator(broken(), 0)
        items.join(10)
        threading.excepthook = silenced
        assert items.queue.qsize() == 1  # the control: nothing says that no more will come


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_what_a_machine_without_gpu_needs(host: None) -> None:
    import dataset
    from utils import utils_distributed_sampler

    before = torch.nn.parallel.DistributedDataParallel, torch.Tensor.cuda, torch.distributed.init_process_group
    data = torch.utils.data.TensorDataset(torch.arange(4.0), torch.arange(4))
    with pytest.raises((AssertionError, RuntimeError)):
        dataset.DataLoaderX(local_rank=0, dataset=data, batch_size=2)
    with applied("loader on CPU"):
        loader = dataset.DataLoaderX(local_rank=0, dataset=data, batch_size=2)
        assert [batch[0].tolist() for batch in loader] == [[0.0, 1.0], [2.0, 3.0]]
        assert dataset.torch.zeros is torch.zeros
    assert dataset.torch is torch
    with applied("seed on CPU"):
        assert "cuda" not in utils_distributed_sampler.sync_random_seed.__defaults__
    assert "cuda" in utils_distributed_sampler.sync_random_seed.__defaults__
    with applied("cuda()"):
        layer = torch.nn.Linear(1, 1)
        assert layer.cuda() is layer
        assert layer.weight.cuda() is layer.weight
        torch.cuda.set_device(0)
    with applied("gloo"), applied("DDP"):
        assert torch.distributed.init_process_group is not before[2]
    assert before == (
        *(torch.nn.parallel.DistributedDataParallel, torch.Tensor.cuda),
        torch.distributed.init_process_group,
    )


def test_what_is_applied_is_told_and_undone() -> None:
    lines: list[str] = []
    before = torch.save, torch.load
    with imported_host(FAKE):
        undo = compat.apply_shims("run", lines.append)
        assert torch.save is not before[0]
        assert torch.load is not before[1]
        undo()
        assert (torch.save, torch.load) == before
        assert any(line.startswith("shim bins for eval/verification.py, pickle.load: ") for line in lines)
        from eval import verification

        assert verification.pickle is pickle
