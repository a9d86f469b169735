"""The recipes of the InsightFace page, as they stand there, on a few small images."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from arcface_runs import losses
from conftest import FAKE, Trainings, imported_host
from faces import PER_CLASS, write_embedder, write_faces

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "projects" / "InsightFace" / "README.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## A recipe per method")[2].partition("\n## ")[0]

#: As many as quality labels need: 24 images of other identities.
CLASSES = 8

#: What makes the first recipe a training of four steps; the data set is another one, and nothing else.
SMALL = f"""
config.num_classes, config.num_image = {CLASSES}, {CLASSES * PER_CLASS}
config.num_epoch, config.batch_size, config.embedding_size, config.num_workers = 1, 8, 16, 0
config.network, config.frequent, config.verbose, config.output = "mbf", 1, 3, "out"
"""


def recipes() -> dict[str, str]:
    """The beginning and every single recipe after it; what precedes a recipe in its block belongs to all of the block.

    Assignments of ``config.qsd_plugin`` exclude each other: each is a recipe.
    """
    beginning, *blocks = re.findall(r"^```py\n(.*?)^```", SECTION, re.M | re.S)
    found = {}
    for block in blocks:
        shared = "".join(line for line in block.splitlines(keepends=True) if not line.startswith("config.qsd_plugin"))
        for line in block.splitlines():
            if line.startswith("config.qsd_plugin"):
                (methods,) = re.findall(r"methods=(\[.*?\])", line)
                found[f"{methods} {len(found)}"] = beginning + shared + line + "\n" + SMALL
    return found


RECIPES = recipes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, host_root: Path) -> Path:
    """The files that the page talks of: faces, an embedding network, and a teacher."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "faces").mkdir()
    write_faces(folder / "faces", classes=CLASSES)
    for name in ("MODEL.onnx", "teacher.onnx"):
        write_embedder(folder / name)
    (folder / "work_dirs" / "r50").mkdir(parents=True)
    with imported_host(host_root):
        from backbones import get_model

        network = get_model("r50", dropout=0.0, fp16=False, num_features=16)
    torch.save(network.state_dict(), folder / "work_dirs" / "r50" / "model.pt")
    return folder


@pytest.fixture(scope="module")
def labels(folder: Path) -> Path:
    """What the page's command for quality labels writes."""
    (command,) = re.findall(r"^python (tools/quality_labels.py .*)$", SECTION, re.M)
    tool, *arguments = shlex.split(command)
    done = subprocess.run(
        [sys.executable, str(ROOT / tool), *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return folder / "labels" / "FaceRecord.npz"


def test_every_method_has_a_recipe() -> None:
    assert len(RECIPES) >= 6
    methods = {name for text in RECIPES for name in re.findall(r'"(\w+)"', text.partition("]")[0])}
    assert methods == {"QSD", "QGFace", "AdaFace", "QUD"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains(name: str, trainings: Trainings, folder: Path, request: pytest.FixtureRequest) -> None:
    recipe = RECIPES[name]
    if "labels/" in recipe:
        assert request.getfixturevalue("labels").is_file()
    if "teacher.onnx" in recipe:
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if trainings.root != FAKE:
        pytest.importorskip("easydict", reason="easydict, which a checkout needs, is not installed")
    config = folder / f"recipe{list(RECIPES).index(name)}.py"
    config.write_text(recipe)
    codes, text = trainings.run(config)
    assert codes == [0], text
    assert len(re.findall("-qsd_plugin  ", text)) == 4, text
    assert losses(text)
    assert "[lfw][3]Accuracy-Flip" in text
    assert (folder / "out" / "model.pt").is_file()
