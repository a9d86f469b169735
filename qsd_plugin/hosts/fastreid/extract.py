"""Embeddings of image lists by a host model, and building that model from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsd_plugin.core.progress import progress
from qsd_plugin.networks.taps import TapRecorder

Items = Sequence[tuple[str, Any, Any]]


def load_model(cfg: Any, checkpoint: Path) -> nn.Module:
    """The model of ``cfg`` with the weights of ``checkpoint``, built as by the host's ``--eval-only``, in eval mode."""
    from fastreid.modeling.meta_arch import build_model
    from fastreid.utils.checkpoint import Checkpointer

    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.BACKBONE.PRETRAIN = False
    for key in ("TEACHER", "STAGE1", "BANK"):
        if "DIL" in cfg:
            cfg.DIL[key] = ""  # files that a training starts from
    model: nn.Module = build_model(cfg)
    Checkpointer(model).load(str(checkpoint))
    return model.eval()


def embed(
    cfg: Any, model: nn.Module, items: Items, *, title: str = "Embedding images", tap: str | None = None
) -> torch.Tensor:
    """Evaluation embeddings of images, in the order of ``items``. No global random stream is drawn from.

    Args:
        cfg: The host's config; decides size, normalisation and batch.
        model: A host model in eval mode.
        items: Host items ``(path, pid, camid)``.
        title: For the progress line.
        tap: Return the output of this module, flattened, instead of the model's.

    Returns:
        [N, D] float32 on the CPU, not normalised.
    """
    from fastreid.data.transforms import build_transforms

    # A class of ours: a spawned worker must not unpickle one of the host's before the plugin is activated in it.
    from qsd_plugin.hosts.fastreid.loaders import TestSet

    images = TestSet(list(items), build_transforms(cfg, is_train=False))
    return embed_images(cfg, model, images, title=title, tap=tap)


def embed_images(
    cfg: Any, model: nn.Module, images: Any, *, title: str, tap: str | None = None, mirrored: bool = False
) -> torch.Tensor:
    """:func:`embed` for a data set whose samples hold ``images``; ``mirrored``: the mean with the mirror image's."""
    return torch.cat(list(_parts(cfg, model, images, title=title, tap=tap, mirrored=mirrored)))


def embedding_stream(cfg: Any, model: nn.Module, items: Items, *, title: str) -> Iterator[torch.Tensor]:
    """:func:`embed` a batch at a time, [B, D] each, for lists whose embeddings need not be held at once."""
    from fastreid.data.transforms import build_transforms

    from qsd_plugin.hosts.fastreid.loaders import TestSet

    return _parts(cfg, model, TestSet(list(items), build_transforms(cfg, is_train=False)), title=title)


@torch.no_grad()
def _parts(
    cfg: Any, model: nn.Module, images: Any, *, title: str, tap: str | None = None, mirrored: bool = False
) -> Iterator[torch.Tensor]:
    from fastreid.data.build import fast_batch_collator

    loader: Any = torch.utils.data.DataLoader(
        images,
        batch_size=cfg.TEST.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=fast_batch_collator,
        generator=torch.Generator(),  # else starting the loader draws the workers' seed from the global stream
    )
    device = next(model.parameters()).device
    with TapRecorder(model, [tap] if tap else []) as recorded:
        for batch in progress(loader, title):
            pixels = batch["images"].to(device)
            output = model({"images": pixels})
            if mirrored:
                output = (output + model({"images": pixels.flip(3)})) / 2
            yield (recorded[tap].flatten(1) if tap else output).float().cpu()
