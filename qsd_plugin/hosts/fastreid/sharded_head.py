"""``MODEL.HEADS.NAME: ShardedEmbeddingHead``: class rows spread over the processes, and sampled.

The host's ``EmbeddingHead`` holds a row for every class in every process, and averages their gradients over all. Here
a process holds and trains its own part of the rows: they stay out of data-parallel training and get a parameter group
of their own behind those of the host, because the host's flat buffers must have the same layout everywhere.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from fastreid.config import configurable
from fastreid.modeling.heads.embedding_head import EmbeddingHead
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qsd_plugin.core.distributed import rank, world_size
from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts.fastreid.compat.patch import Undo, replace, together
from qsd_plugin.hosts.fastreid.compose import base_architecture
from qsd_plugin.hosts.fastreid.registries import is_plugins
from qsd_plugin.methods.margins import ClassShard, ShardedSoftmax, sharded_margin_softmax

#: Entry of a parameter group of the optimizer that holds class rows; checkpoints keep it.
CLASS_ROWS = "class_rows"
_EMBEDDING = "class_embedding"


class ShardedEmbeddingHead(EmbeddingHead):  # type: ignore[misc]
    """``EmbeddingHead`` whose ``weight`` holds the rows of this process's classes only.

    Evaluation is the host's. In training it returns the embeddings, and ``Baseline.losses`` asks :meth:`classify` for
    the loss, which needs all processes. Without classes (evaluation) there is no shard.

    Args:
        num_classes: On all processes together.
        sample_rate: ``MODEL.HEADS.SAMPLE_RATE``.
        seed: Of initial rows and draws.
        arguments: Of ``EmbeddingHead``.

    Raises:
        ConfigError: Fewer classes than processes, or a config that this head cannot serve.
    """

    @configurable  # type: ignore[untyped-decorator]
    def __init__(self, *, num_classes: int, sample_rate: float, seed: int, **arguments: Any) -> None:
        shard = ClassShard(num_classes, rank(), world_size(), sample_rate, seed) if num_classes else None
        super().__init__(num_classes=0 if shard is None else shard.rows, **arguments)
        self._shard = shard
        if shard is not None:
            with torch.no_grad():
                self.weight.copy_(shard.initial_rows(self.weight.shape[1]))

    @property
    def shard(self) -> ClassShard:
        """The classes of this process.

        Raises:
            ConfigError: The head was built without classes.
        """
        if self._shard is None:
            raise ConfigError("MODEL.HEADS.NUM_CLASSES", value=0, expected="the number of identities, in training")
        return self._shard

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """The host's arguments and those of this head."""
        check_config(cfg)
        return {
            **super().from_config(cfg),
            "sample_rate": cfg.MODEL.HEADS.SAMPLE_RATE,
            "seed": max(cfg.SEED, 0),
        }

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Any:
        """Maps [B, C, H, W] to embeddings [B, D], in training inside the dict that the losses take."""
        if not self.training:
            return super().forward(features)
        pooled = self.pool_layer(features)
        embedding = self.bottleneck(pooled)[..., 0, 0]
        return {
            _EMBEDDING: embedding,
            "features": pooled[..., 0, 0] if self.neck_feat == "before" else embedding,
        }

    def classify(self, embedding: Tensor, targets: Tensor, *, step: int) -> ShardedSoftmax:
        """Loss and accuracy of the batch of all processes, see :func:`.sharded_margin_softmax`.

        Args:
            embedding: [B, D].
            targets: [B] int64.
            step: Number of the training step.
        """
        return sharded_margin_softmax(embedding, targets, self.weight, self.shard, self._margin, step=step)

    def _margin(self, cosine: Tensor, local: Tensor) -> Tensor:
        # The host's own layers write into what they are given.
        logits: Tensor = self.cls_layer(cosine if is_plugins(type(self.cls_layer)) else cosine.clone(), local)
        return logits

    def extra_repr(self) -> str:
        """The classes, for ``print(model)``."""
        shard = self._shard
        if shard is None:
            return "no classes"
        return f"classes {shard.start} to {shard.stop - 1} of {shard.num_classes}, sample_rate={shard.sample_rate}"


def check_config(cfg: Any) -> None:
    """Refuse what goes with ``ShardedEmbeddingHead`` in no number of processes, or not in this one.

    Raises:
        ConfigError: Names the key.
    """
    from fastreid.modeling.meta_arch import Baseline
    from fastreid.modeling.meta_arch.build import META_ARCH_REGISTRY

    model = cfg.MODEL
    if not 0 < model.HEADS.SAMPLE_RATE <= 1:
        raise ConfigError("MODEL.HEADS.SAMPLE_RATE", value=model.HEADS.SAMPLE_RATE, expected="above 0, up to 1")
    if tuple(model.LOSSES.NAME) != ("CrossEntropyLoss",):
        raise ConfigError(
            "MODEL.LOSSES.NAME",
            value=tuple(model.LOSSES.NAME),
            expected="('CrossEntropyLoss',), the only loss that ShardedEmbeddingHead serves",
        )
    if model.LOSSES.CE.EPSILON != 0:
        raise ConfigError(
            "MODEL.LOSSES.CE.EPSILON",
            value=model.LOSSES.CE.EPSILON,
            expected="0 with ShardedEmbeddingHead, which has no label smoothing",
        )
    if model.HEADS.CLS_LAYER == "Linear":
        raise ConfigError(
            "MODEL.HEADS.CLS_LAYER",
            value="Linear",
            expected="a layer that takes cosines, such as ArcFaceStraightThrough, with ShardedEmbeddingHead",
        )
    name = base_architecture(cfg)
    if getattr(META_ARCH_REGISTRY.get(name), "losses", None) is not Baseline.losses:
        raise ConfigError(
            "MODEL.META_ARCHITECTURE",
            value=name,
            expected="Baseline, or QSD on top of it, with ShardedEmbeddingHead",
            remedy=f"{name} needs the logits of all classes: use EmbeddingHead.",
        )
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if world_size() > 1 and clip.ENABLED and clip.CLIP_TYPE == "norm":
        raise ConfigError(
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
            value="norm",
            expected="value with ShardedEmbeddingHead in several processes, each of which knows a part of the norm",
        )


def sharded_head(model: Any) -> ShardedEmbeddingHead | None:
    """The sharded head of a model that is built for training, with or without a data-parallel wrapper."""
    head = getattr(getattr(model, "module", model), "heads", None)
    return head if isinstance(head, ShardedEmbeddingHead) and len(head.weight) else None


def install() -> Undo:
    """Register the head, let ``Baseline`` take its loss from it, and keep its rows apart in every ``DefaultTrainer``.

    The trainer builds its optimizer right before it wraps the model for data-parallel training.
    """
    from fastreid.engine.defaults import DefaultTrainer
    from fastreid.modeling.heads.build import REID_HEADS_REGISTRY
    from fastreid.modeling.meta_arch import Baseline
    from fastreid.utils.events import get_event_storage

    REID_HEADS_REGISTRY.register(ShardedEmbeddingHead)
    host_losses, host_build = Baseline.losses, DefaultTrainer.build_optimizer.__func__

    @functools.wraps(host_losses)
    def losses(self: Any, outputs: dict[str, Tensor], gt_labels: Tensor) -> dict[str, Tensor]:
        if _EMBEDDING not in outputs:
            return host_losses(self, outputs, gt_labels)  # type: ignore[no-any-return]
        storage = get_event_storage()
        loss, accuracy = self.heads.classify(outputs[_EMBEDDING], gt_labels, step=storage.iter)
        storage.put_scalar("cls_accuracy", accuracy)
        return {"loss_cls": loss * self.loss_kwargs["ce"]["scale"]}

    @functools.wraps(host_build)
    def build_optimizer(cls: type, cfg: Any, model: nn.Module) -> tuple[Any, Any]:
        head = sharded_head(model)
        if head is None:
            return host_build(cls, cfg, model)  # type: ignore[no-any-return]
        leave_out_of_data_parallel(model)
        return _with_own_group(functools.partial(host_build, cls, cfg, model), head.weight)

    return together(
        replace(Baseline, "losses", losses), replace(DefaultTrainer, "build_optimizer", classmethod(build_optimizer))
    )


def leave_out_of_data_parallel(model: nn.Module) -> None:
    """Make ``DistributedDataParallel(model)`` neither broadcast nor average the class rows.

    Raises:
        ConfigError: Several processes, and more than one sharded head.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, ShardedEmbeddingHead)]
    if world_size() > 1 and len(names) > 1:
        raise ConfigError(
            "QSD.EMA.ENABLED" if "qsd_teacher.heads" in names else "ShardedEmbeddingHead",
            value=names,
            expected="one head with class rows, in several processes",
            remedy="Use EmbeddingHead, or one process.",
        )
    leave_out: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    leave_out(model, [f"{name}.weight" for name in names])


def _with_own_group(build: Any, rows: nn.Parameter) -> tuple[Any, Any]:
    """What the host's ``build_optimizer`` returns, the rows in a group of their own with the host's settings."""
    from fastreid.solver import build as host

    own: list[dict[str, Any]] = []
    host_groups = host.get_default_optimizer_params

    @functools.wraps(host_groups)
    def other_groups(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        groups = host_groups(*args, **kwargs)
        own.extend(group for group in groups if group["params"][0] is rows)
        return [group for group in groups if group["params"][0] is not rows]

    undo = replace(host, "get_default_optimizer_params", other_groups)
    try:
        optimizer, parameters = build()
    finally:
        undo()
    for group in own:
        optimizer.add_param_group({**group, CLASS_ROWS: True})
    return optimizer, parameters
