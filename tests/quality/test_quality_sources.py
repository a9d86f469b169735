"""Sources of scores: registry, label files, embedding norms, functions of the user's own."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from qsd_plugin.core.errors import ConfigError, RegistryError
from qsd_plugin.quality import QUALITY_SOURCES, QualityLabels, build_source
from qsd_plugin.quality import sources as module
from qsd_plugin.quality.sources import EmbeddingNorm


def write_labels(path, dataset, scores, names):
    scores = np.array(scores, dtype=np.float64)
    keys = tuple(f"{dataset}/{name}" for name in names)
    QualityLabels(scores, scores, scores, keys, {"dataset": dataset, "scale": "none"}).save(path)
    return path


def with_norms(*norms):
    """Embeddings of the given norms in random directions."""
    directions = torch.nn.functional.normalize(
        torch.randn(len(norms), 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    return directions * torch.tensor(norms)[:, None]


def test_file_source_looks_up_paths_of_several_data_sets(tmp_path):
    files = [
        write_labels(tmp_path / "a.npz", "A", [10, 20, 50], ["1.jpg", "2.jpg", "3.jpg"]),
        write_labels(tmp_path / "b.npz", "B", [7, 3], ["1.jpg", "9.jpg"]),
    ]
    source = build_source("file", files=files, roots=["/data/a", "/data/b"], scale="minmax")
    scores, valid = source({"paths": ["/data/a/2.jpg", "/data/b/1.jpg", "/data/b/9.jpg", "/data/c/9.jpg"]})
    assert scores.tolist() == [25.0, 100.0, 0.0, 0.0]
    assert valid.tolist() == [True, True, True, False]  # 9.jpg of another folder is another image
    assert (scores.dtype, valid.dtype) == (torch.float32, torch.bool)


def test_file_source_falls_back_to_basenames_for_a_single_file(tmp_path):
    file = write_labels(tmp_path / "a.npz", "A", [10, 20], ["1.jpg", "2.jpg"])
    assert build_source("file", files=[file])({"paths": ["/x/2.jpg"]})[0].tolist() == [20.0]


def test_file_source_applies_the_control_to_each_file(tmp_path):
    files = [write_labels(tmp_path / f"{name}.npz", name, [0, 25, 100], ["1", "2", "3"]) for name in "ab"]
    paths = {"paths": [f"{name}/{image}" for name in "ab" for image in "123"]}
    assert build_source("file", files=files, control="reverse")(paths)[0].tolist() == [100.0, 75.0, 0.0] * 2
    shuffled = build_source("file", files=files, control="shuffle", seed=1)(paths)[0]
    assert sorted(shuffled[:3].tolist()) == sorted(shuffled[3:].tolist()) == [0.0, 25.0, 100.0]


def test_file_source_rejects_what_does_not_fit(tmp_path):
    file = write_labels(tmp_path / "a.npz", "A", [10], ["1.jpg"])
    with pytest.raises(
        ConfigError, match=r"QUALITY\.FILES is empty; expected one label file for each of DATASETS\.NAMES"
    ):
        build_source("file", files=[])
    with pytest.raises(ConfigError, match=r"QUALITY\.FILES: got 1; expected one label file for each of 2 data sets"):
        build_source("file", files=[file], roots=["a", "b"])
    with pytest.raises(ConfigError, match=r"Quality source 'file' needs batch\['paths'\]: got \['embeddings'\]"):
        build_source("file", files=[file])({"embeddings": torch.zeros(1, 2)})


def test_norm_scores_follow_the_formula():
    source = EmbeddingNorm(momentum=0.25)
    first, second = [1.0, 2.0, 3.0], [2.0, 2.0, 8.0]
    source({"embeddings": with_norms(*first)})
    scores, valid = source({"embeddings": with_norms(*second)})
    mean = 0.75 * np.mean(first) + 0.25 * np.mean(second)
    std = 0.75 * np.std(first) + 0.25 * np.std(second)
    expected = np.clip(50 + 50 * (np.array(second) - mean) / (3 * std), 0, 100)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5)
    assert scores[2] == 100.0  # beyond three standard deviations
    assert valid.all()
    assert source.batches == 2


def test_norm_statistics_move_in_training_only():
    source = EmbeddingNorm()
    source({"embeddings": with_norms(1.0, 2.0, 3.0)})
    before = copy.deepcopy(source.state_dict())
    with torch.no_grad():
        source({"embeddings": with_norms(50.0, 60.0)})
    scores, valid = source.eval()({"embeddings": with_norms(50.0, 2.0)})
    assert scores.tolist() == pytest.approx([100.0, 50.0])
    assert valid.all()
    assert all(torch.equal(source.state_dict()[name], value) for name, value in before.items())


def test_norm_state_lies_in_buffers_and_resumes():
    source = EmbeddingNorm()
    source({"embeddings": with_norms(1.0, 2.0, 3.0)})
    resumed = EmbeddingNorm()
    resumed.load_state_dict(source.state_dict())
    batch = {"embeddings": with_norms(2.5, 0.5)}
    assert torch.equal(resumed(batch)[0], source(batch)[0])
    assert not list(source.parameters())


def test_norm_scores_are_invalid_before_training():
    assert not EmbeddingNorm().eval()({"embeddings": with_norms(1.0, 2.0)})[1].any()


def test_equal_norms_score_the_middle():
    assert EmbeddingNorm()({"embeddings": torch.eye(3) * 4})[0].tolist() == [50.0, 50.0, 50.0]
    assert EmbeddingNorm()({"embeddings": with_norms(3.0)})[0].tolist() == pytest.approx([50.0])


def test_overflowed_embeddings_are_invalid_and_leave_no_trace():
    poisoned = torch.cat([with_norms(1.0, 2.0, 3.0), torch.full((1, 8), math.inf), torch.full((1, 8), math.nan)])
    source, clean = EmbeddingNorm(), EmbeddingNorm()
    scores, valid = source({"embeddings": poisoned})
    expected, _ = clean({"embeddings": poisoned[:3]})
    assert valid.tolist() == [True, True, True, False, False]
    torch.testing.assert_close(scores[:3], expected)
    assert scores.isfinite().all()
    torch.testing.assert_close(source.std, clean.std)
    untouched = EmbeddingNorm()
    untouched({"embeddings": poisoned[3:]})
    assert untouched.batches == 0


def test_norms_carry_no_gradient_and_are_computed_in_single_precision():
    embeddings = torch.full((2, 8), 300.0, dtype=torch.float16)
    embeddings[1] *= 2  # the squares of both overflow float16
    source = EmbeddingNorm()
    scores, valid = source({"embeddings": embeddings.requires_grad_()})
    assert not scores.requires_grad
    assert valid.all()
    assert source.mean.item() == pytest.approx(450 * math.sqrt(8), rel=1e-5)


def test_norm_statistics_are_those_of_all_ranks(monkeypatch):
    """A second rank is imitated by a reduction that adds its sums."""
    here, there = with_norms(1.0, 2.0), with_norms(5.0, 9.0, 4.0)
    norms = torch.tensor([5.0, 9.0, 4.0], dtype=torch.float64)
    other = torch.stack([torch.tensor(3.0, dtype=torch.float64), norms.sum(), norms.square().sum()])
    monkeypatch.setattr(module, "all_reduce_sum", lambda sums: sums + other)
    split = EmbeddingNorm()
    scores, _ = split({"embeddings": here})
    monkeypatch.undo()
    whole = EmbeddingNorm()
    expected, _ = whole({"embeddings": torch.cat([here, there])})
    torch.testing.assert_close(scores, expected[:2])
    torch.testing.assert_close(split.std, whole.std)


def test_norm_source_rejects_what_does_not_fit():
    with pytest.raises(ConfigError, match=r"embedding_norm: momentum: got 0; expected above 0 and at most 1"):
        EmbeddingNorm(momentum=0)
    with pytest.raises(
        ConfigError, match=r"Quality source 'embedding_norm' needs batch\['embeddings'\]: got \['paths'\]"
    ):
        EmbeddingNorm()({"paths": []})


def test_a_function_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_sharpness.py").write_text("def score(batch):\n    return batch['q'], batch['q'] > 0\n\nLIMIT = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    scores, valid = build_source("import:my_sharpness:score")({"q": torch.tensor([0.0, 5.0])})
    assert (scores.tolist(), valid.tolist()) == ([0.0, 5.0], [False, True])
    with pytest.raises(ConfigError, match=r"my_sharpness has no such function\. Did you mean 'score'"):
        build_source("import:my_sharpness:scores")
    with pytest.raises(ConfigError, match=r"got 3; expected a function \(batch\) -> \(scores \[B\], valid \[B\]\)"):
        build_source("import:my_sharpness:LIMIT")
    with pytest.raises(ConfigError, match=r"got \['scale'\]; expected no options for an imported function"):
        build_source("import:my_sharpness:score", scale="rank")


@pytest.mark.parametrize("name", ["import:", "import:os", "import:os:", "import::path"])
def test_an_incomplete_import_is_explained(name):
    with pytest.raises(ConfigError, match=r"QUALITY\.SOURCE: got 'import:.*expected import:module:function"):
        build_source(name)


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"No module named 'no_such_module_at_all'.*put its folder on PYTHONPATH"):
        build_source("import:no_such_module_at_all:score")


def test_registry():
    assert {"file", "embedding_norm"} <= set(QUALITY_SOURCES)
    with pytest.raises(
        RegistryError, match=r"Unknown quality source: got 'embeding_norm'\. Did you mean 'embedding_norm'"
    ):
        build_source("embeding_norm")
