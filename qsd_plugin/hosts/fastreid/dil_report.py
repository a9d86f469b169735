"""The last stage of the recipe ``dil``: teacher and features of stage 2 on the same images, and what stage 1 renders.

Overall and by thirds of the queries' quality, as :mod:`.report` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsd_plugin.core.distributed import rank as process_rank
from qsd_plugin.core.files import write_atomically
from qsd_plugin.hosts.fastreid import extract
from qsd_plugin.hosts.fastreid.datasets import Item
from qsd_plugin.hosts.fastreid.dil_files import load_stage1
from qsd_plugin.hosts.fastreid.meta_arch.dil_config import build_networks
from qsd_plugin.hosts.fastreid.report import as_table, by_quality, load_test, rank_test
from qsd_plugin.hosts.fastreid.report_frame import environment
from qsd_plugin.methods.dil import Networks
from qsd_plugin.methods.dil.losses import pixel_loss

Arms = Mapping[str, tuple[Any, Path]]


def write_report(cfg: Any, arms: Arms, folder: Path) -> None:
    """Write ``results.json`` and ``results.md`` to ``folder`` and print the latter.

    Args:
        cfg: Stage 2's config: ``DATASETS.TESTS``, ``TEST``, and ``DIL.STAGE1`` for the renderings; empty for none.
        arms: Config and checkpoint of each arm, by name, in the order of the table.
        folder: Where to write.
    """
    from fastreid.data.transforms import build_transforms

    from qsd_plugin.hosts.fastreid.loaders import TestSet

    if process_rank() != 0:
        return
    results: dict[str, Any] = {
        "note": "one seed, no claim",
        "seed": cfg.SEED,
        "environment": environment(),
        "tests": {},
        "reconstruction": {},
    }
    for name in cfg.DATASETS.TESTS:
        test = load_test(cfg, name)
        rows: dict[str, Any] = {}
        images = TestSet([*test.query, *test.gallery], build_transforms(cfg, is_train=False))
        for arm, (own, checkpoint) in arms.items():
            model = extract.load_model(own, checkpoint)
            flip = bool(cfg.TEST.FLIP.ENABLED)
            embeddings = extract.embed_images(own, model, images, title=f"Evaluating {arm}", mirrored=flip)
            query, gallery = embeddings[: len(test.query)], embeddings[len(test.query) :]
            rows[arm] = by_quality(rank_test(test, query, gallery, cfg.TEST.METRIC), test.quality)
        results["tests"][name] = {"quality": test.quality_name, "queries": len(test.query), "arms": rows}
        if cfg.DIL.STAGE1:
            results["reconstruction"][name] = reconstruction(cfg, test.query)
    text = as_table(results) + "".join(
        f"\n{name}: stage 1 renders the queries from their own content and code with a mean error of "
        f"{error['self']:.3f}; the mean query as a constant answer has {error['mean_image']:.3f}, "
        "in standard deviations of a pixel\n"
        for name, error in results["reconstruction"].items()
    )
    write_atomically(folder / "results.json", json.dumps(results, indent=1).encode())
    write_atomically(folder / "results.md", text.encode())
    print(f"\n{text}\nresults.json: {folder}", flush=True)


@torch.no_grad()
def reconstruction(cfg: Any, items: Sequence[Item]) -> dict[str, float]:
    """Mean absolute errors, of normalised pixels, over ``items`` under the test transform.

    Args:
        cfg: Stage 2's config.
        items: Host items.

    Returns:
        ``self``: of an image rendered from its own content and degradation. ``mean_image``: of the mean of all images,
        which a generator that has learnt nothing can reach, too.
    """
    networks = build_networks(cfg)
    load_stage1(networks, Path(cfg.DIL.STAGE1))
    networks = Networks._make(part.to(cfg.MODEL.DEVICE).eval() for part in networks)
    batches = list(_normalised(cfg, items))
    mean = torch.cat(batches).mean(dim=0, keepdim=True)
    errors: dict[str, list[Tensor]] = {"self": [], "mean_image": []}
    for batch in batches:
        images = batch.to(cfg.MODEL.DEVICE)
        content = networks.content_encoder(images, want_identity=False).content
        rendered = networks.generator(content, networks.degradation_encoder(images)).cpu()
        for name, answer in (("self", rendered), ("mean_image", mean.expand_as(batch))):
            errors[name].append(pixel_loss(answer, batch) * len(batch))
    return {name: float(torch.stack(parts).sum() / len(items)) for name, parts in errors.items()}


def _normalised(cfg: Any, items: Sequence[Item]) -> Iterator[Tensor]:
    from fastreid.data.transforms import build_transforms

    from qsd_plugin.hosts.fastreid.loaders import TestSet

    images = TestSet(list(items), build_transforms(cfg, is_train=False))
    mean, std = (torch.tensor(cfg.MODEL[key]).view(3, 1, 1) for key in ("PIXEL_MEAN", "PIXEL_STD"))
    size = int(cfg.TEST.IMS_PER_BATCH)
    for start in range(0, len(images), size):
        stop = min(start + size, len(images))
        yield torch.stack([(images[place]["images"] - mean) / std for place in range(start, stop)])
