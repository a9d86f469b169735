"""Every method and mix through the tree's own script, with one, two and four processes; and the script by itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from arcface_runs import DEGRADED, RUNS, losses, modified_tree, with_files
from conftest import FAKE, Trainings, imported_host, last_state
from faces import CLASSES, IMAGES, PER_CLASS, face

from qsd_plugin.hosts.insightface.shards import read_shards, reshard, write_shards

#: What the small tree is trained with, too; a checkout with everything.
QUICK = ("no method", "AdaFace", "QSD", "QUD", "QSD, AdaFace", "QGFace, QSD, QUD")
TABLE = [(name, processes) for name in RUNS for processes in (1, 2)] + [("QGFace", 4), ("QGFace, QSD, QUD", 4)]


def left_to_checkouts(name: str, processes: int, host_root: Path) -> None:
    if host_root == FAKE and (name not in QUICK or processes > 2):
        pytest.skip("with a checkout only")


@pytest.mark.parametrize(("name", "processes"), TABLE)
def test_method_trains_and_its_weights_load_into_the_plain_network(
    name: str, processes: int, trainings: Trainings, faces: Path, teacher: Path, host_root: Path
) -> None:
    left_to_checkouts(name, processes, host_root)
    run = RUNS[name]
    methods = with_files(run.methods, faces, teacher)
    output, text = trainings.train(methods, processes=processes, batch_size=8 // processes, **run.keys)
    if run.logged:
        assert len(re.findall(f"-qsd_plugin .*{run.logged}", text, re.M)) == 3, text
    assert losses(text)
    assert all(0 < loss < 200 for loss in losses(text))
    stored = torch.load(output / "model.pt", weights_only=True)
    with imported_host(host_root):
        from backbones import get_model

        torch.manual_seed(2048)
        plain = get_model("mbf", dropout=0.0, fp16=False, num_features=16)
        fresh = {key: value.clone() for key, value in plain.state_dict().items()}
        plain.load_state_dict(stored, strict=True)
    learned = {key for key, value in plain.named_parameters() if value.requires_grad}
    # Biases in front of a batch norm have no gradient but rounding, which the trainer's 16-bit sums may lose.
    assert [key for key in learned if torch.equal(stored[key], fresh[key]) and not key.endswith("bias")] == []
    heads = [state_of_head(output, rank) for rank in range(processes)]
    assert all(("weight" in head) == (name != "QUD") for head in heads)
    if "weight" in heads[0]:
        assert sum(len(head.pop("weight")) for head in heads) == CLASSES
    networks = [last_state(output, rank) for rank in range(processes)]
    for rank in range(1, processes):  # batch norm's statistics alone are each process's own
        assert heads[rank].keys() == heads[0].keys()
        assert all(torch.equal(value, heads[0][key]) for key, value in heads[rank].items())
        assert all(torch.equal(networks[rank][key], networks[0][key]) for key in learned)


def state_of_head(output: Path, rank: int) -> dict[str, torch.Tensor]:
    stored = torch.load(output / f"checkpoint_gpu_{rank}.pt", weights_only=True)
    head: dict[str, torch.Tensor] = stored["state_dict_softmax_fc"]
    return head


# Without a method the checkout's own flips come from each process's global generator, so its images are others.
ONE_RUN = [(name, 2) for name, run in RUNS.items() if "sampled" not in name and run.methods and run.methods["methods"]]
ONE_RUN += [("QGFace", 4), ("QGFace, QSD, QUD", 4)]


@pytest.fixture(scope="session")
def modified(host_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A modified tree, whose network has no batch norm: there, processes have nothing of their own but class rows."""
    return modified_tree(host_root, tmp_path_factory.mktemp("modified") / "tree")


@pytest.fixture(scope="session")
def continued(modified: Path, trainings: Trainings, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """From a run's name and a number of processes to the state after a second epoch in so many; the first ran in one.

    A third argument spoils the class rows in between.
    """
    folder, first, done = tmp_path_factory.mktemp("continued"), {}, {}

    def run(name: str, teacher: Path, processes: int, spoilt: bool = False) -> dict[str, torch.Tensor]:
        keys: dict[str, Any] = {"network": "mine", "root": modified, "lr": 0.002}
        methods = with_files(RUNS[name].methods, faces, teacher)
        if "QSD" in name:
            assert methods is not None
            methods["qsd"] = {**methods["qsd"], "levels": {"stem": 1.0, "embedding": 0.5}}
        if name not in first:
            first[name] = trainings.train(methods, num_image=2 * IMAGES, **keys)[0]
        if (name, processes, spoilt) not in done:
            shards = reshard(read_shards(first[name]), processes)
            if spoilt:
                shards[-1]["state_dict_softmax_fc"]["weight"].neg_()
            output = folder / f"{name} {processes} {spoilt}"
            write_shards(shards, output)
            keys.update(batch_size=8 // processes, num_epoch=2, resume=True, output=str(output))
            trainings.train(methods, processes=processes, **keys)
            (joined,) = reshard(read_shards(output), 1)
            head = joined["state_dict_softmax_fc"]
            moments = {key: value for key, value in head.items() if "statistics" in key or key == "weight"}
            done[name, processes, spoilt] = {**joined["state_dict_backbone"], **moments}
        state: dict[str, torch.Tensor] = done[name, processes, spoilt]
        return state

    def start(name: str) -> dict[str, torch.Tensor]:
        stored = read_shards(first[name])[0]
        return {**stored["state_dict_backbone"], **stored["state_dict_softmax_fc"]}

    run.start = start  # type: ignore[attr-defined]
    return run


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """Largest difference of two states, as a share of how far that tensor moved in the second epoch."""
    assert one.keys() == other.keys()
    return max(
        float((value - other[key]).abs().max() / (value - start[key]).abs().max().clamp(min=1e-8))
        for key, value in one.items()
        if value.is_floating_point()
    )


@pytest.mark.parametrize(("name", "processes"), ONE_RUN)
def test_several_processes_are_one_run(
    name: str, processes: int, continued: Any, teacher: Path, host_root: Path
) -> None:
    left_to_checkouts(name, processes, host_root)
    alone, several = continued(name, teacher, 1), continued(name, teacher, processes)
    # The trainer sends gradients as 16-bit numbers, which keep three digits.
    assert apart(alone, several, continued.start(name)) < (1e-3 if host_root == FAKE else 2e-2)


def test_a_wrong_shard_is_noticed(continued: Any, teacher: Path) -> None:
    """The control of the test above."""
    spoilt = continued("AdaFace", teacher, 2, True)
    assert apart(continued("AdaFace", teacher, 1), spoilt, continued.start("AdaFace")) > 0.2


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("plugin", [None, {"methods": []}])
def test_without_a_method_it_is_the_script_by_itself(
    plugin: dict[str, Any] | None, processes: int, trainings: Trainings
) -> None:
    keys = {"batch_size": 8 // processes, "num_epoch": 2, "verbose": 3}
    ours, text = trainings.train(plugin, processes=processes, **keys)
    theirs = ours.with_name(f"{ours.name} alone")
    config = trainings.config(None, output=str(theirs), **keys)
    codes, alone = trainings.run(config, processes=processes, plain="alone")
    assert codes == [0] * processes, alone
    assert losses(text) == losses(alone)
    assert accuracies(text) == accuracies(alone) != []
    for rank in range(processes):
        expected, found = last_state(theirs, rank), last_state(ours, rank)
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items())


def accuracies(text: str) -> list[str]:
    return re.findall(r"\[lfw\]\[\d+\]Accuracy-Flip: (\S+)", text)


@pytest.mark.parametrize("methods", [{"methods": ["AdaFace"]}, {"methods": ["QSD"], "qsd": DEGRADED}])
def test_folder_of_images_trains(methods: dict[str, Any], trainings: Trainings, tmp_path: Path) -> None:
    for index in range(IMAGES):
        folder = tmp_path / "images" / f"{index // PER_CLASS:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.jpg").write_bytes(face(index // PER_CLASS, 5, index))
    _, text = trainings.train(methods, rec=str(tmp_path / "images"))
    assert len(losses(text)) >= 2


@pytest.mark.usefixtures("checkout")
def test_synthetic_images_of_the_trainer_run(trainings: Trainings) -> None:
    shorter = "import dataset\ndataset.SyntheticDataset.__len__ = lambda self: 24"
    for methods in (None, {"methods": ["AdaFace"]}):
        codes, text = trainings.run(trainings.config(methods, shorter, rec="synthetic", num_classes=10))
        assert codes == [0], text  # its one image, repeated, makes the loss NaN after a few steps
