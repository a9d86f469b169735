"""``tools/quality_labels.py``: every way to make labels, their report, and comparisons, as a user calls it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from toy import toy_cfg, toy_config, use_market, write_market

from qsd_plugin.data import synthetic
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.quality import QualityLabels, sdd_fiqa_labels

host.activate()

from qsd_plugin.hosts.fastreid import extract, labelling  # noqa: E402 - needs the activated host
from qsd_plugin.hosts.fastreid.compat.images import read_image  # noqa: E402
from qsd_plugin.hosts.fastreid.datasets import training_set  # noqa: E402
from qsd_plugin.hosts.fastreid.folds import fold_of_items  # noqa: E402

TOOL = str(Path(__file__).parents[3] / "tools" / "quality_labels.py")
FEW = ["QUALITY.NEGATIVES", "8", "QUALITY.ROUNDS", "3", "SEED", "5"]
MARKET = ["DATASETS.NAMES", "('Market1501',)", *FEW]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six identities with eight images each."""
    return write_market(tmp_path_factory.mktemp("data"), num_ids=6, per_id=8, test_ids=2)


@pytest.fixture(autouse=True)
def market(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_market(monkeypatch, data)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the tool in this process; returns the exit code, standard output and standard error."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [TOOL, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(TOOL, run_name="__main__")
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def market_items(folder: Path) -> list[Any]:
    return training_set(toy_cfg(folder), "Market1501")[1]


def test_cross_fitted_labels_are_made_by_networks_that_never_saw_the_images(tmp_path: Path, tool: Any) -> None:
    """A fold's labels are those of its own network over the fold's images only; a second call trains nothing."""
    output = tmp_path / "crossed"
    (tmp_path / "config.yml").write_text("RECIPE: {BASELINE: {MAX_EPOCH: 1, WARMUP_ITERS: 0}}\n")
    small = {
        "MODEL.BACKBONE.PRETRAIN": False,
        "DATALOADER.SAMPLER_TRAIN": "NaiveIdentitySampler",
        "DATALOADER.NUM_INSTANCE": 4,
        "SOLVER.IMS_PER_BATCH": 8,
        "TEST.EVAL_PERIOD": 0,
    }
    opts = [*toy_config(output, **small), *FEW]
    command = ["--config-file", tmp_path / "config.yml", "--folds", 2, "--output", output, *opts]
    code, out, err = tool(*command)
    assert code == 0, err
    assert "100.00%" in out
    labels = QualityLabels.load(output / "Market1501.npz")
    assert labels.meta["folds"] == 2
    cfg = toy_cfg(tmp_path / "out", SEED=5, **small)
    items = market_items(tmp_path / "out")
    fold = fold_of_items(cfg, items, 2)
    for k in (1, 2):
        own = [item for item, place in zip(items, fold, strict=True) if place == k]
        checkpoint = output / f"fold{k}" / "model_final.pth"
        assert len(torch.load(checkpoint, weights_only=True)["model"]["heads.weight"]) == 3  # classes
        embeddings = extract.embed(cfg, extract.load_model(cfg, checkpoint), own)
        expected = sdd_fiqa_labels(embeddings, [pid for _, pid, _ in own], negatives=8, rounds=3, seed=5)
        np.testing.assert_allclose(labels.score[fold == k], expected.score, atol=1e-3)
    code, out, err = tool(*command)
    assert code == 0, err
    assert out.count("finished earlier, skipped") == 2


def test_onnx_labels_are_those_of_its_embeddings(tmp_path: Path, tool: Any) -> None:
    """A model that averages colours over the picture: its labels can be computed from the pictures directly."""
    identity = numpy_helper.from_array(np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1), "weight")
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["maps"]),
        helper.make_node("GlobalAveragePool", ["maps"], ["embedding"]),
    ]
    shapes = {"images": ["b", 3, "h", "w"], "embedding": ["b", 3, 1, 1]}
    images, embedding = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in shapes)
    graph = helper.make_graph(nodes, "colours", [images], [embedding], [identity])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "m.onnx")
    preparation = ["--size", 64, 32, "--mean", 10, 20, 30, "--std", 4, 5, 6, "--colour", "BGR", "--batch", 7]
    code, out, err = tool("--onnx", tmp_path / "m.onnx", "--output", tmp_path / "labels", *preparation, *MARKET)
    assert code == 0, err
    assert "100.00%" in out
    items = market_items(tmp_path)
    pixels = [np.array(read_image(path), np.float64)[..., ::-1].mean(axis=(0, 1)) for path, _, _ in items]
    embeddings = ((np.stack(pixels) - [10, 20, 30]) / [4, 5, 6]).astype(np.float32)
    expected = sdd_fiqa_labels(embeddings, [pid for _, pid, _ in items], negatives=8, rounds=3, seed=5)
    labels = QualityLabels.load(tmp_path / "labels" / "Market1501.npz")
    np.testing.assert_allclose(labels.score, expected.score, atol=0.05)
    assert labels.meta["extractor"] == str(tmp_path / "m.onnx")
    report = json.loads((tmp_path / "labels" / "check.json").read_text())
    assert report["Market1501"]["covered"] == 48
    assert (tmp_path / "labels" / "label_histogram.png").read_bytes().startswith(b"\x89PNG")


def test_embedding_files_are_labelled_with_and_without_a_data_set(tmp_path: Path, tool: Any) -> None:
    items = market_items(tmp_path)
    generator = np.random.default_rng(0)
    identities = [pid for _, pid, _ in items]
    place = {pid: number for number, pid in enumerate(sorted(set(identities)))}
    embeddings = np.eye(8)[[place[pid] for pid in identities]] + 0.2 * generator.normal(size=(48, 8))
    expected = sdd_fiqa_labels(embeddings, identities, negatives=8, rounds=3, seed=5).score
    # Names as another program might have them, in another order: matched by basename.
    order = generator.permutation(48)
    names = np.array([f"crops/{Path(path).name}" for path, _, _ in items])
    np.savez(tmp_path / "mine.npz", keys=names[order], embeddings=embeddings[order])
    code, _, err = tool("--embeddings", tmp_path / "mine.npz", "--output", tmp_path / "a", *MARKET)
    assert code == 0, err
    np.testing.assert_allclose(QualityLabels.load(tmp_path / "a" / "Market1501.npz").score, expected, atol=1e-9)

    code, _, err = tool("--embeddings", tmp_path / "mine.npz", "--output", tmp_path / "b", *FEW)
    assert code == 2
    assert "mine.npz has no identities; expected an array identities [N], or a data set that knows them" in err
    np.savez(tmp_path / "mine.npz", keys=names, embeddings=embeddings, identities=np.array(identities))
    code, out, err = tool("--embeddings", tmp_path / "mine.npz", "--output", tmp_path / "b", *FEW)
    assert code == 0, err
    alone = QualityLabels.load(tmp_path / "b" / "mine.npz")
    assert alone.keys == tuple(names)
    np.testing.assert_allclose(alone.score, expected, atol=1e-9)
    assert "100.00%" in out

    np.savez(tmp_path / "few.npz", keys=names[:20], embeddings=embeddings[:20])
    code, _, err = tool("--embeddings", tmp_path / "few.npz", "--output", tmp_path / "c", *MARKET)
    assert code == 2
    assert "few.npz has a vector for 20 of 48 training images of Market1501; expected at least 99.0%" in err
    code, _, err = tool("--embeddings", tmp_path / "mine.npz", "--output", tmp_path / "d", "--method", "norm", *MARKET)
    assert code == 0, err
    norms = np.linalg.norm(embeddings, axis=1)
    scaled = 100 * (norms - norms.min()) / np.ptp(norms)
    np.testing.assert_allclose(QualityLabels.load(tmp_path / "d" / "Market1501.npz").score, scaled, atol=1e-9)


def test_check_reports_and_warns(tmp_path: Path, tool: Any) -> None:
    keys = tuple(labelling._keys(toy_cfg(tmp_path), "Market1501", market_items(tmp_path)))
    score = np.where(np.arange(48) < 12, 99.9, np.linspace(10, 90, 48))
    QualityLabels(score, score, np.ones(48), keys, {"dataset": "Market1501"}).save(tmp_path / "a.csv")
    code, out, err = tool(
        "--json", tmp_path / "a.json", "--picture", tmp_path / "a.png", "--check", tmp_path / "a.csv", *MARKET
    )
    assert code == 0, err
    assert "WARNING Market1501: 25% of the labels lie within 1% of the scale's ends (saturated)" in out
    report = json.loads((tmp_path / "a.json").read_text())["Market1501"]
    assert report["at_top"] == 0.25
    assert report["constant_identities"] == 1
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = tool("--check", tmp_path / "a.csv", "DATASETS.NAMES", "('Market1501','DukeMTMC')")
    assert code == 2
    assert "expected one label file per training set, in the order of DATASETS.NAMES ('Market1501', 'DukeMTMC')" in err
    (tmp_path / "b.csv").write_text("key,score\na.jpg,170\n")
    code, _, err = tool("--check", tmp_path / "b.csv", *MARKET)
    assert code == 2
    assert "label of 'a.jpg' (1 of 1 labels are wrong): got 170.0; expected a label from 0 to 100" in err


def test_labellings_are_compared_with_each_other_and_with_the_true_severity(tmp_path: Path, tool: Any) -> None:
    values = {"num_train_identities": 5, "num_test_identities": 2, "num_distractors": 0, "seed": 3}
    folder = synthetic.build(tmp_path / "cache", synthetic.SyntheticPedestrians(**values), workers=1)
    truth = synthetic.load_truth(folder)
    train = [row for row, path in enumerate(truth.paths) if path.startswith("bounding_box_train")]
    keys = tuple(f"SyntheticPedestrians/{truth.paths[row]}" for row in train)
    unknown = np.full(len(train), np.nan)
    severity = truth.severity[train]
    for name, score in (
        ("oracle", 100 * (1 - severity)),
        ("against", 100 * severity),
        ("flat", np.full(len(train), 50.0)),
    ):
        QualityLabels(score, unknown, unknown, keys, {"dataset": "SyntheticPedestrians"}).save(tmp_path / f"{name}.npz")
    files = [tmp_path / f"{name}.npz" for name in ("oracle", "against", "flat")]
    opts = ["DATASETS.NAMES", "('SyntheticPedestrians',)", "DATA.CACHE", tmp_path / "cache"]
    opts += [part for name, value in values.items() for part in (f"DATA.SYNTHETIC.{name.upper()}", value)]
    code, out, err = tool("--severity", "--json", tmp_path / "c.json", "--compare", *files, *opts)
    assert code == 0, err
    assert "| oracle" in out
    result = json.loads((tmp_path / "c.json").read_text())
    found = result["truth"]
    assert found["oracle"]["correlation"] == pytest.approx(1.0)
    assert found["against"]["correlation"] == pytest.approx(-1.0)
    assert found["flat"]["correlation"] is None
    assert [found[name]["direction"]["agreement"] for name in found] == [1.0, 0.0, 0.5]
    pairs = found["oracle"]["direction"]["pairs"]
    assert found["flat"]["direction"]["ties"] == pairs > 0
    assert set(found["oracle"]["by_degradation"]) == set(truth.by_degradation)
    assert {(row["labels"], row["reference"]): row["rank_correlation"] for row in result["agreement"]}[
        "oracle", "against"
    ] == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "m.pth"], "--config-file is missing"),
        (["--compare", "a.npz"], "--compare: got 1; expected two label files, or one with --severity"),
        (["--compare", "a.npz", "b.npz", "--severity"], "--severity: got 'Market1501'; expected DATASETS.NAMES Synthe"),
        (["--embeddings", "a.npz", "--method", "nrom"], "QUALITY.METHOD: got 'nrom'. Did you mean 'norm'?"),
        (["--onnx", "nowhere.onnx", "--output", "{tmp}"], "ONNX model: got 'nowhere.onnx'; expected an existing file"),
        (["--embeddings", "a.npz", "--output", "{tmp}"], "Embedding file a.npz cannot be read"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_two(
    tmp_path: Path, tool: Any, arguments: list[str], message: str
) -> None:
    code, _, err = tool(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert code == 2
    assert message in err
    assert "Traceback" not in err
