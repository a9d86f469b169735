"""Finding a checkout, and refusing what is none, by saying what differs."""

from __future__ import annotations

import shutil
import sys
import types
from pathlib import Path

import pytest
from conftest import FAKE, imported_host

from qsd_plugin.core.errors import ConfigError, HostError
from qsd_plugin.hosts import insightface
from qsd_plugin.hosts.insightface import checkout
from qsd_plugin.hosts.insightface.launcher import load_config


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The small tree, to be changed."""
    return Path(shutil.copytree(FAKE, tmp_path / "tree"))


def test_trainer_is_found_by_itself_and_in_a_clone(copy: Path, tmp_path: Path) -> None:
    assert checkout.find_checkout(copy) == copy
    (tmp_path / "clone" / "recognition").mkdir(parents=True)
    copy.rename(tmp_path / "clone" / "recognition" / "arcface_torch")
    assert checkout.find_checkout(tmp_path / "clone").name == "arcface_torch"


def test_wrong_root_and_unknown_layout_say_what_is_missing(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"arcface_torch checkout: got '.*nowhere'; expected a folder with train_v2.py"):
        checkout.find_checkout(tmp_path / "nowhere")
    (copy / "partial_fc_v2.py").unlink()
    (copy / "dataset.py").unlink()
    with pytest.raises(HostError, match=r"unknown layout: got 'no dataset.py, partial_fc_v2.py'; expected the layout"):
        checkout.find_checkout(copy)


def test_script_that_takes_its_parts_from_elsewhere_is_refused(copy: Path) -> None:
    script = copy / "train_v2.py"
    text = script.read_text().replace("from dataset import get_dataloader", "from data import get_dataloader")
    text = text.replace("cfg.dali_aug, cfg.seed, cfg.num_workers)", "cfg.dali_aug)")
    script.write_text(text)
    with pytest.raises(HostError) as caught:
        checkout.find_checkout(copy)
    assert "it takes get_dataloader from data, not from dataset" in str(caught.value)
    assert "it calls get_dataloader with [5] positional arguments, not with 7 or more" in str(caught.value)


def test_contracts_hold_in_the_tree(host_root: Path, host: None) -> None:
    checkout.check_contracts(host_root)


def test_contracts_that_do_not_hold_are_all_listed(copy: Path) -> None:
    head = copy / "partial_fc_v2.py"
    head.write_text(head.read_text().replace("sample_rate=1.0, fp16=False", "fp16=False"))
    loader = copy / "dataset.py"
    loader.write_text(loader.read_text().replace("num_workers=2):", "num_workers=2, bucket=None):"))  # has a default
    losses = copy / "losses.py"
    losses.write_text(losses.read_text().replace("def forward(self, logits, labels)", "def forward(self, logits, y)"))
    with imported_host(copy), pytest.raises(HostError) as caught:
        checkout.check_contracts(copy)
    text = str(caught.value)
    assert "partial_fc_v2.PartialFC_V2(margin_loss, embedding_size, num_classes, fp16) instead of" in text
    assert "losses.CombinedMarginLoss.forward(logits, y) instead of (logits, labels)" in text
    assert "dataset." not in text


def test_foreign_module_of_a_hosts_name_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = types.ModuleType("losses")
    foreign.__file__ = "/elsewhere/losses.py"
    monkeypatch.setitem(sys.modules, "losses", foreign)
    with (
        pytest.raises(HostError, match=r"'losses' has been imported already: got '/elsewhere/losses.py'"),
        checkout.on_path(copy),
    ):
        pass


def test_config_is_found_by_name_or_by_file(host_root: Path, host: None, tmp_path: Path) -> None:
    own = tmp_path / "my_run.py"
    own.write_text("from configs.base import config as base\nconfig = type(base)()\nconfig.lr = 3\n")
    if host_root == FAKE:  # the real base needs easydict, as everything there
        assert load_config(host_root, "configs/ms1mv3_r50") == load_config(host_root, "ms1mv3_r50.py") == "ms1mv3_r50"
    assert load_config(host_root, str(own)) == "my_run"
    assert sys.modules["configs.my_run"].config.lr == 3
    with pytest.raises(ConfigError, match=r"got 'configs/ms1mv3_r5'; .* Did you mean 'ms1mv3_r50'"):
        load_config(host_root, "configs/ms1mv3_r5")
    own.write_text("")
    with pytest.raises(ConfigError, match="expected a dict called config"):
        load_config(host_root, str(own))


def test_activation_outside_the_script_is_refused() -> None:
    with pytest.raises(HostError, match=r"activate\(\): got .*expected to be called by a config"):
        insightface.activate()
