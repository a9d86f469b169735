"""Recipes: named stages in folders of their own, skipped when nothing they depend on has changed, resumed when cut off.

Each stage folder holds ``stage.json``: what the stage depends on (config keys, input files by content, a digest of the
data) and whether it finished. A finished stage with equal dependencies is skipped; one that was cut off is resumed; one
whose dependencies differ stops the recipe with a list of what changed, so that no table is made from mixed settings.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from qsd_plugin.core.errors import StageError, did_you_mean
from qsd_plugin.core.files import write_atomically
from qsd_plugin.core.progress import duration

MARKER = "stage.json"
#: The training stage whose network a recipe is for, by ``RECIPE.NAME``.
FINAL_STAGES = {"qsd": "qsd", "qud": "student", "qgface": "qgface", "dil": "stage2"}

Action = Literal["skip", "run", "resume"]


@dataclass(frozen=True)
class Stage:
    """One step of a recipe.

    Args:
        name: Folder name below the recipe's root.
        run: Does the work in the given folder; ``resume`` tells whether an earlier attempt was cut off there.
        keys: Config keys the result depends on, with their values (JSON-serialisable).
        inputs: Files made by earlier stages that this one reads; compared by content.
        data: Digest of the data the stage reads, so that a changed data folder is noticed.
        outputs: Files below the stage's folder that must exist when it has finished.
    """

    name: str
    run: Callable[[Path, bool], None]
    keys: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[Path] = ()
    data: str = ""
    outputs: Sequence[str] = ()

    def dependencies(self) -> dict[str, Any]:
        """What decides whether a finished result is still this stage's result."""
        missing = [str(path) for path in self.inputs if not path.is_file()]
        if missing:
            raise StageError(
                f"Stage {self.name!r} needs a file that is not there",
                value=missing[0],
                remedy="Run the stage that makes it first, or run the recipe without --stage.",
            )
        keys = json.loads(json.dumps(dict(self.keys), default=str))
        inputs = {f"{path.parent.name}/{path.name}": file_digest(path) for path in self.inputs}
        return {"keys": keys, "inputs": inputs, "data": self.data}


def run_recipe(
    stages: Sequence[Stage],
    root: Path,
    *,
    only: str | None = None,
    from_stage: str | None = None,
    accept_stale: bool = False,
    announce: Callable[[str], None] = print,
    on_main: Callable[[Callable[[], Any]], Any] = lambda function: function(),
) -> None:
    """Run the stages in order, skipping what is done.

    Args:
        stages: The recipe.
        root: Folder that holds one folder per stage; created when missing.
        only: Run this stage alone.
        from_stage: Throw away this stage and all later ones, then run them again.
        accept_stale: Keep finished stages even though their dependencies have changed.
        announce: Receives one line per decision.
        on_main: Calls a function in the main process and returns its result on every rank.

    Raises:
        StageError: Unknown stage name, a stale stage, a missing input or a missing output.
    """
    names = [stage.name for stage in stages]
    for chosen in (only, from_stage):
        if chosen is not None and chosen not in names:
            raise StageError("Unknown stage", value=chosen, remedy=did_you_mean(chosen, names))
    redo = set(names[names.index(from_stage) :]) if from_stage else set()
    for stage in stages:
        if only is not None and stage.name != only:
            continue
        folder = root / stage.name
        redo_this = stage.name in redo
        action = on_main(partial(_decide, stage, folder, redo=redo_this, accept_stale=accept_stale))
        if action == "skip":
            announce(f"Stage {stage.name}: finished earlier, skipped ({folder})")
            continue
        announce(f"Stage {stage.name}: {'resuming' if action == 'resume' else 'starting'} ({folder})")
        start = time.monotonic()
        stage.run(folder, action == "resume")
        on_main(partial(_finish, stage, folder))
        announce(f"Stage {stage.name}: done in {duration(time.monotonic() - start)}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    # hashlib.file_digest came with Python 3.11.
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


def _decide(stage: Stage, folder: Path, *, redo: bool, accept_stale: bool) -> Action:
    wanted = stage.dependencies()
    marker = folder / MARKER
    if redo and folder.exists():
        shutil.rmtree(folder)
    if not marker.is_file():
        _write_marker(marker, wanted, finished=False)
        return "run"
    found = json.loads(marker.read_text(encoding="utf-8"))
    changed = _changes(found, wanted)
    if changed and not accept_stale:
        raise StageError(
            f"Stage {stage.name!r} in {folder} was made with other settings: {'; '.join(changed)}",
            remedy=f"Run it again with --from-stage {stage.name}, keep it with --accept-stale, "
            "or choose another OUTPUT_DIR.",
        )
    return "skip" if found["finished"] else "resume"


def _finish(stage: Stage, folder: Path) -> None:
    missing = [name for name in stage.outputs if not (folder / name).exists()]
    if missing:
        raise StageError(
            f"Stage {stage.name!r} ended without its output", value=str(folder / missing[0]), remedy="See its log."
        )
    _write_marker(folder / MARKER, stage.dependencies(), finished=True)


def _write_marker(marker: Path, dependencies: Mapping[str, Any], *, finished: bool) -> None:
    text = json.dumps({**dependencies, "finished": finished, "written": time.strftime("%Y-%m-%dT%H:%M:%S")}, indent=1)
    write_atomically(marker, text.encode())


def _changes(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{key}: {found['keys'].get(key, '(absent)')!r} -> {wanted['keys'].get(key, '(absent)')!r}"
        for key in sorted({*found["keys"], *wanted["keys"]})
        if found["keys"].get(key, "(absent)") != wanted["keys"].get(key, "(absent)")
    ]
    lines += [
        f"input {name} has other content"
        for name in wanted["inputs"]
        if found["inputs"].get(name) != wanted["inputs"][name]
    ]
    if found["data"] != wanted["data"]:
        lines.append("the data folder has other images")
    return lines
