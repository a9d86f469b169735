"""Packed face sets, SCface's second split and the fusions through the host's evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from face_toy import IJB_SIZE, SIZE, Pooled, embed, evaluate, write, write_ijb
from PIL import Image
from toy import toy_cfg

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data.face_packing import pack_eval
from qsd_plugin.data.scface import scface_split
from qsd_plugin.evaluation.fusion import FUSIONS, fuse
from qsd_plugin.evaluation.identification import by_group, closed_set
from qsd_plugin.hosts.fastreid import protocols
from qsd_plugin.hosts.fastreid.face_tests import TESTS


def write_tinyface(root: Path) -> list[list[Image.Image]]:
    probe_ids, mated_ids = [1, 2, 3, 4, 5, 9], [5, 4, 3, 2, 1, 1]
    return [
        write(root / "Probe", [f"{i}_{n}.png" for n, i in enumerate(probe_ids)], probe_ids),
        write(root / "Gallery_Match", [f"{i}_{n}.png" for n, i in enumerate(mated_ids, 10)], mated_ids),
        write(root / "Gallery_Distractor", [f"x{n}.png" for n in range(25)], list(range(50, 75))),
    ]


def test_packed_sets_score_as_their_folders_do(tmp_path: Path) -> None:
    write_tinyface(tmp_path / "tinyface")
    pack_eval("tinyface", tmp_path / "tinyface", tmp_path / "tinyface.rec", size=SIZE)
    names = [f"{i:03}_{kind}.png" for i in range(1, 6) for kind in ("cam1_1", "cam2_2", "cam5_3", "cam6_1", "frontal")]
    write(tmp_path / "scface", names, [int(name[:3]) for name in names])
    pack_eval("scface", tmp_path / "scface", tmp_path / "scface.rec", size=SIZE)
    for name, key in (("TinyFace", "TINYFACE"), ("SCface", "SCFACE")):
        options = {"TEST.SCFACE.FINE_TUNING": 2}
        folder = evaluate(tmp_path / "a", name, **{f"DATA.{key}": str(tmp_path / key.lower())}, **options)
        record = evaluate(tmp_path / "b", name, **{f"DATA.{key}": str(tmp_path / f"{key.lower()}.rec")}, **options)
        assert record == folder
        assert len(set(record.values())) > 1
    with pytest.raises(DataError, match=r"scface\.rec: got 'scface'; expected tinyface"):
        evaluate(tmp_path, "TinyFace", **{"DATA.TINYFACE": str(tmp_path / "scface.rec")})


def test_packed_ijb_scores_as_its_folder_does(tmp_path: Path) -> None:
    write_ijb(tmp_path / "ijbc", "ijbc")
    pack_eval("ijbc", tmp_path / "ijbc", tmp_path / "ijbc.rec")
    sources = {"IJB": tmp_path / "ijbc", "IJBC": tmp_path / "ijbc.rec"}
    found = [
        evaluate(tmp_path / name, name, size=IJB_SIZE, **{f"DATA.{name}": str(source)})
        for name, source in sources.items()
    ]
    assert found[0] == found[1]
    assert found[0]["metric"] == found[0]["TAR@FAR=1e-04 norm-weighted (as AdaFace)"]
    weightings = [[rate for name, rate in found[0].items() if name.endswith(end)] for end in ("AdaFace)", "unit")]
    assert len(weightings[0]) == len(weightings[1]) == 6
    assert weightings[0] != weightings[1]
    with pytest.raises(DataError, match=r"got 'ijbc'; expected ijbb"):
        evaluate(tmp_path, "IJBB", size=IJB_SIZE, **{"DATA.IJBB": str(tmp_path / "ijbc.rec")})
    with pytest.raises(DataError, match=r"IJB list: got \[\]; expected one file ijbb_name_5pts_score\.txt in"):
        evaluate(tmp_path, "IJBB", size=IJB_SIZE, **{"DATA.IJBB": str(tmp_path / "ijbc")})
    with pytest.raises(ConfigError, match=r"DATA.IJBC: got ''; expected the test set's folder or \.rec file"):
        evaluate(tmp_path, "IJBC", size=IJB_SIZE)


def test_scface_also_without_the_first_fifty_subjects(tmp_path: Path) -> None:
    kinds = ("cam1_1", "cam2_2", "cam5_3", "frontal")
    names = [f"{i:03}_{kind}.png" for i in range(1, 61) for kind in kinds]
    images = write(tmp_path / "scface", names, [int(name[:3]) for name in names])
    found = evaluate(tmp_path, "SCface", **{"DATA.SCFACE": str(tmp_path / "scface")})
    metres = ("d1 (4.2 m)", "d2 (2.6 m)", "d3 (1.0 m)")
    held_out = tuple(f"d{number}, last 10 subjects" for number in (1, 2, 3))
    assert list(found) == [*metres, *held_out, "metric"]
    features = embed(images, flip=False)
    split = scface_split(names)
    rows = {side: np.flatnonzero(getattr(split, f"{side}_ids") > 50) for side in ("probe", "gallery")}
    result = closed_set(
        features[split.probe[rows["probe"]]],
        features[split.gallery[rows["gallery"]]],
        split.probe_ids[rows["probe"]],
        split.gallery_ids[rows["gallery"]],
        ranks=(1,),
    )
    expected = by_group(result, split.distance[rows["probe"]])
    assert result.num_gallery == 10
    assert [found[name] for name in held_out] == [100 * expected[number].rates[1] for number in (1, 2, 3)]
    assert found["metric"] == pytest.approx(np.mean([found[name] for name in metres]))
    kept = json.loads((tmp_path / "out" / "evaluation" / "SCface.json").read_text())
    assert list(kept) == ["SCface", "last 10 subjects"]
    assert [found[name] for name in held_out] != [found[name] for name in metres]
    whole = evaluate(tmp_path, "SCface", **{"DATA.SCFACE": str(tmp_path / "scface"), "TEST.SCFACE.FINE_TUNING": 0})
    assert list(whole) == [*metres, "metric"]


@pytest.mark.parametrize("rule", FUSIONS)
def test_fusions_in_the_host(tmp_path: Path, rule: str) -> None:
    parts = write_tinyface(tmp_path / "tinyface")
    options = {"TEST.FLIP.ENABLED": True, "TEST.FUSION": rule, "DATA.TINYFACE": str(tmp_path / "tinyface")}
    found = evaluate(tmp_path, "TinyFace", **options)
    features = []
    for images in parts:
        mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
        features.append(fuse(embed(images, flip=False), embed(mirrored, flip=False), rule))
    result = closed_set(*features[:2], [1, 2, 3, 4, 5, 9], [5, 4, 3, 2, 1, 1], distractors=features[2])
    assert found == {f"Rank-{r}": 100 * rate for r, rate in result.rates.items()} | {"metric": found["Rank-1"]}
    test = TESTS["TinyFace"](toy_cfg(tmp_path / "out", **options))
    features[1] = features[1][np.argsort([5, 4, 3, 2, 1, 1], kind="stable")]  # as their names sort
    trials = test.trials(torch.from_numpy(np.concatenate(features)))
    assert trials.query.tolist() == [f"Probe/{i}_{n}.png" for n, i in enumerate((1, 2, 3, 4, 5))]
    assert trials.values.mean() == pytest.approx(found["Rank-1"])
    assert test.trial_images is not None
    assert test.trial_images.tolist() == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("rule", ["pre_norm_vector_add", "average"])
def test_the_host_averages_only_what_no_fusion_needs_apart(tmp_path: Path, rule: str) -> None:
    import fastreid.engine.defaults

    probe, mated, others = write_tinyface(tmp_path / "tinyface")
    options = {"TEST.FLIP.ENABLED": True, "TEST.FUSION": rule, "DATA.TINYFACE": str(tmp_path / "tinyface")}
    cfg = toy_cfg(tmp_path / "out", **{"INPUT.SIZE_TEST": [SIZE, SIZE], **options})
    loader, subject = protocols.build(cfg, "TinyFace")
    fastreid.engine.defaults.inference_on_dataset(Pooled(), loader, subject, flip_test=True)
    found = torch.cat([features for _, features in subject._parts]).numpy()
    plain = embed(probe, flip=False)
    count = len(probe) + len(mated) + len(others)
    if rule == "average":
        mirrored = embed([image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in probe], flip=False)
        np.testing.assert_allclose(found[: len(probe)], plain, atol=1e-4)
        np.testing.assert_allclose(found[count : count + len(probe)], mirrored, atol=1e-4)
    else:
        np.testing.assert_allclose(found[: len(probe)], embed(probe, flip=True) / 2, atol=1e-4)
    assert len(found) == count * (2 if rule == "average" else 1)


def test_an_unknown_fusion_is_named(tmp_path: Path) -> None:
    write_tinyface(tmp_path / "tinyface")
    with pytest.raises(ConfigError, match=r"Fusion with the mirror image: got 'averag'\. Did you mean 'average'"):
        evaluate(tmp_path, "TinyFace", **{"DATA.TINYFACE": str(tmp_path / "tinyface"), "TEST.FUSION": "averag"})
