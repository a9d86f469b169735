"""Face test sets through the host's own evaluation, against embeddings and protocols called by hand."""

from __future__ import annotations

import argparse
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from face_toy import IJB_SIZE, embed, evaluate, face, write, write_ijb
from PIL import Image
from toy import toy_cfg, use_market, write_market

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.evaluation.identification import closed_set, scface
from qsd_plugin.evaluation.templates import verify_templates
from qsd_plugin.evaluation.verification import verify_pairs
from qsd_plugin.hosts import fastreid as host

host.activate()


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


@pytest.mark.parametrize("flip", [False, True])
def test_verification_bins(tmp_path: Path, flip: bool) -> None:
    pytest.importorskip("qsd_plugin.data.verification_bin", reason="the reader of .bin files is not there yet")
    expected, curves = {}, {}
    for number, name in enumerate(("lfw", "cfp_fp")):
        issame = np.arange(40) % 2 == 0
        people = [person for pair, same in enumerate(issame) for person in (pair, pair if same else pair + 500)]
        images = [face(100 * number + person, 1000 * number + seed) for seed, person in enumerate(people)]
        (tmp_path / f"{name}.bin").write_bytes(pickle.dumps(([png(image) for image in images], issame.tolist())))
        result = verify_pairs(embed(images, flip=flip), issame)
        expected[name], curves[name] = 100 * result.accuracy, result.tpr.tolist()
    files = [str(tmp_path / f"{name}.bin") for name in expected]
    options = {"DATA.VERIFICATION": files, "TEST.FLIP.ENABLED": flip}
    found = evaluate(tmp_path, "VerificationBin", **options)
    assert found == {**expected, "metric": sum(expected.values()) / 2}
    assert 55 < found["metric"] < 100
    kept = json.loads((tmp_path / "out" / "evaluation" / "VerificationBin.json").read_text())
    assert {name: kept[name]["tpr"] for name in curves} == curves
    with Image.open(tmp_path / "out" / "evaluation" / "VerificationBin_det.png") as picture:
        assert min(picture.size) > 300


def test_tinyface(tmp_path: Path) -> None:
    root = tmp_path / "tinyface"
    test = root / "Testing_Set"
    probe_ids, mated_ids = [1, 2, 3, 4, 5, 9], [5, 4, 3, 2, 1, 1]
    probe = write(test / "Probe", [f"{i}_{n}.png" for n, i in enumerate(probe_ids)], probe_ids)
    mated = write(test / "Gallery_Match", [f"{i}_{n}.png" for n, i in enumerate(mated_ids, 10)], mated_ids)
    others = write(test / "Gallery_Distractor", [f"x{n}.png" for n in range(25)], list(range(50, 75)))
    found = evaluate(tmp_path, "TinyFace", **{"DATA.TINYFACE": str(root)})
    features = [embed(images, flip=False) for images in (probe, mated, others)]
    result = closed_set(*features[:2], probe_ids, mated_ids, distractors=features[2])
    assert result.valid.tolist() == [True] * 5 + [False]
    assert found == {f"Rank-{r}": 100 * rate for r, rate in result.rates.items()} | {"metric": found["Rank-1"]}
    kept = json.loads((tmp_path / "out" / "evaluation" / "TinyFace.json").read_text())
    assert kept["TinyFace"]["rank"] == result.rank.tolist()
    assert kept["TinyFace"]["num_gallery"] == 31


def test_ijb(tmp_path: Path) -> None:
    align = pytest.importorskip("qsd_plugin.data.align", reason="alignment is not there yet")
    ijb = write_ijb(tmp_path / "ijb")
    images, points, detected = ijb.images, ijb.points, ijb.detected
    templates, medias, pairs, genuine = ijb.templates, ijb.medias, ijb.pairs, ijb.genuine

    options = {"DATA.IJB": str(tmp_path / "ijb"), "TEST.FLIP.ENABLED": True, "TEST.IJB.NORM": False}
    found = evaluate(tmp_path, "IJB", size=IJB_SIZE, **options)
    aligned = map(align.norm_crop, map(np.asarray, images), points)
    crops = [Image.fromarray(crop) for crop in aligned]
    rates = [f"TAR@FAR=1e-0{power}" for power in (6, 5, 4, 3, 2, 1)]
    weightings = {"norm-weighted (as AdaFace)": True, "unit": False}
    assert list(found) == [f"{rate} {name}" for name in weightings for rate in rates] + ["metric"]
    kept = json.loads((tmp_path / "out" / "evaluation" / "IJB.json").read_text())
    for name, use_norm in weightings.items():
        result = verify_templates(
            embed(crops, flip=False),
            templates,
            medias,
            pairs,
            genuine,
            flipped=embed([crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for crop in crops], flip=False),
            detector_score=detected,
            use_norm=use_norm,
        )
        assert [found[f"{rate} {name}"] for rate in rates] == pytest.approx((100 * result.tar).tolist())
        assert kept[name]["switches"] == f"N{use_norm:d} D1 F1"
        roc = kept[name]["result"]["roc"]
        assert roc["tar"] == pytest.approx(result.roc.tar.tolist())
        assert roc["threshold"][0] is None
        assert roc["threshold"][1:] == pytest.approx(result.roc.threshold[1:].tolist())
    assert found["metric"] == found["TAR@FAR=1e-04 unit"] < 100


def test_eval_only_on_scface(tmp_path: Path) -> None:
    from fastreid.modeling.meta_arch import build_model

    from qsd_plugin.hosts.fastreid import extract, training_stages

    names = [f"{i:03}_{kind}.png" for i in range(1, 5) for kind in ("cam1_1", "cam2_2", "cam5_3", "cam6_1", "frontal")]
    write(tmp_path / "scface", names, [int(name[:3]) for name in names])
    options = {"DATASETS.TESTS": ("SCface",), "DATA.SCFACE": str(tmp_path / "scface")}
    cfg = toy_cfg(tmp_path / "out", **{"MODEL.HEADS.NUM_CLASSES": 2, "MODEL.BACKBONE.PRETRAIN": False, **options})
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    arguments = argparse.Namespace(config_file="", eval_only=True, num_gpus=0, resume=False, opts=[])
    found = training_stages.evaluate(cfg, arguments)
    used = [name for name in names if "cam6" not in name]
    items = [(str(tmp_path / "scface" / name), 0, 0) for name in used]
    results = scface(extract.embed(cfg, extract.load_model(cfg, tmp_path / "model.pth"), items), used)
    rank_1 = [100 * results[distance].rates[1] for distance in (1, 2, 3)]
    assert list(found.values()) == pytest.approx([*rank_1, sum(rank_1) / 3])
    assert list(found) == ["d1 (4.2 m)", "d2 (2.6 m)", "d3 (1.0 m)", "metric"]


def test_experiments_refuse_them_before_training(tmp_path: Path) -> None:
    from qsd_plugin.hosts.fastreid import recipes

    cfg = toy_cfg(tmp_path / "out", **{"DATASETS.TESTS": ("SCface",)})
    with pytest.raises(
        ConfigError, match=r"DATASETS.TESTS of an experiment: got \['SCface'\]; expected person.*train_net.py"
    ):
        recipes.check_final_stage(cfg)


def evaluator(folder: Path) -> tuple[Any, list[str]]:
    from qsd_plugin.hosts.fastreid import protocols

    names = [f"00{i}_{kind}.png" for i in (1, 2, 3) for kind in ("cam1_1", "cam1_2", "cam1_3", "frontal")]
    write(folder / "scface", names, [int(name[:3]) for name in names])
    loader, subject = protocols.build(toy_cfg(folder / "out", **{"DATA.SCFACE": str(folder / "scface")}), "SCface")
    assert pickle.loads(pickle.dumps(loader.dataset))[3]["img_paths"].endswith("001_frontal.png")  # spawned workers
    return subject, names


def test_order_and_repetition_of_batches_do_not_matter(tmp_path: Path) -> None:
    subject, names = evaluator(tmp_path)
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    for rows in ([3, 1, 2], [11, 10, 9, 8, 7, 6], [5, 4, 0, 3]):
        subject.process({"targets": torch.tensor(rows)}, features[rows].half())
    found = subject.evaluate()
    results = scface(features.half().float(), names)
    assert list(found.values())[:3] == [100 * results[distance].rates[1] for distance in (1, 2, 3)]
    subject.reset()
    subject.process({"targets": torch.arange(11)}, features[:11])
    with pytest.raises(DataError, match="SCface: images embedded: got 11; expected all 12"):
        subject.evaluate()


def test_ranks_are_gathered_and_only_the_first_one_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreid.utils import comm

    subject, names = evaluator(tmp_path)
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(2))
    parts = [(rows, features[rows]) for rows in torch.arange(12).split(6)]
    subject.process({"targets": parts[0][0]}, parts[0][1])
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "synchronize", lambda: None)
    monkeypatch.setattr(comm, "gather", lambda own, dst: [own, [parts[1]]])
    found = list(subject.evaluate().values())[:3]
    assert found == [100 * result.rates[1] for result in scface(features, names).values()]
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert subject.evaluate() == {}


def test_other_names_stay_the_host_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreid.engine import DefaultTrainer
    from fastreid.evaluation import ReidEvaluator

    use_market(monkeypatch, write_market(tmp_path / "data", num_ids=2, per_id=2))

    class Trainer(DefaultTrainer):
        @classmethod
        def build_test_loader(cls, cfg: Any, dataset_name: str) -> Any:
            return "own loader", 4

    loader, subject = Trainer.build_evaluator(toy_cfg(tmp_path / "out"), "Market1501")
    assert (loader, type(subject)) == ("own loader", ReidEvaluator)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("VerificationBin", {}, r"DATA.VERIFICATION: got \[\]; expected .bin files"),
        ("VerificationBin", {"DATA.VERIFICATION": ["a/lfw.bin", "b/lfw.bin"]}, "of different names"),
        ("TinyFace", {}, r"DATA.TINYFACE: got ''; expected the test set's folder or \.rec file\. Add DATA.TINYFACE P"),
        ("SCface", {}, "DATA.SCFACE: got ''"),
        ("IJB", {}, "DATA.IJB: got ''"),
    ],
)
def test_missing_keys_are_named(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(tmp_path, name, **options)
