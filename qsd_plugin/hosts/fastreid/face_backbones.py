"""Face networks as ``MODEL.BACKBONE.NAME``: what the host gets is their embedding, as a map of one position.

Their last layers, a linear layer over the whole map and a batch norm, are the embedding, so the head must neither pool
nor add a neck: ``configs/Base-Face.yml`` holds the settings. Keys below ``backbone.`` are those of the published files.
All see RGB images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.export.ir_weights import IR_DEPTHS, is_ir
from qsd_plugin.export.weights import convert, fit, read_weights, require_complete
from qsd_plugin.hosts.fastreid.compat.backbones import explained
from qsd_plugin.networks.face_shapes import base_channels
from qsd_plugin.networks.ir import IR, IR_UNITS
from qsd_plugin.networks.iresnet import IRESNET_BLOCKS, IResNet
from qsd_plugin.networks.mobilefacenet import MobileFaceNet
from qsd_plugin.networks.mobilefacenet_qud import MobileFaceNetQUD

_PREFIX = "backbone."


class IResNetBackbone(IResNet):
    """IResNet that returns [B, D, 1, 1], as the host's heads expect."""

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to [B, D, 1, 1]."""
        return super().forward(x)[..., None, None]


class IRBackbone(IR):
    """AdaFace's and QGFace's IR that returns [B, D, 1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to [B, D, 1, 1]."""
        return super().forward(x)[..., None, None]


class MobileFaceNetBackbone(MobileFaceNet):
    """arcface_torch's MobileFaceNet that returns [B, D, 1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to [B, D, 1, 1]."""
        return super().forward(x)[..., None, None]


class MobileFaceNetQUDBackbone(MobileFaceNetQUD):
    """QUD's MobileFaceNet that returns [B, D, 1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to [B, D, 1, 1]."""
        return super().forward(x)[..., None, None]


_MOBILE: Mapping[str, Callable[..., nn.Module]] = {
    "mbf": MobileFaceNetBackbone,
    "mbf_large": lambda **sizes: MobileFaceNetBackbone(blocks=(2, 8, 12, 4), scale=4, **sizes),
    "qud": MobileFaceNetQUDBackbone,
}


def register_face_backbones() -> None:
    """Add ``build_iresnet_backbone``, ``build_ir_backbone`` and ``build_mobilefacenet_backbone`` to the host's."""
    from fastreid.modeling.backbones.build import BACKBONE_REGISTRY

    for builder in (build_iresnet_backbone, build_ir_backbone, build_mobilefacenet_backbone):
        BACKBONE_REGISTRY.register(explained(builder, reads_files=True))


def build_iresnet_backbone(cfg: Any) -> nn.Module:
    """IResNet of ``MODEL.BACKBONE.DEPTH`` 18x, 34x, 50x, 100x or 200x.

    Reads ``MODEL.BACKBONE.{DEPTH, FEAT_DIM, WIDTH, DROP_RATIO, NORM, PRETRAIN, PRETRAIN_PATH}``, ``INPUT.SIZE_TRAIN``
    and ``SIZE_TEST``. ``FEAT_DIM`` is a setting here: the length of the embedding. ``PRETRAIN_PATH`` takes a file of
    arcface_torch or QUD, which must fill the network exactly.

    Raises:
        ConfigError: Names the key.
        CheckpointError: The pretrained file is of another network.
    """
    depths = {f"{depth}x": blocks for depth, blocks in IRESNET_BLOCKS.items()}
    blocks = depths[_depth(cfg, depths)]
    return _finish(cfg, IResNetBackbone(blocks, dropout=cfg.MODEL.BACKBONE.DROP_RATIO, **_sizes(cfg)), "arcface")


def build_ir_backbone(cfg: Any) -> nn.Module:
    """IR, the network of AdaFace and QGFace, of ``MODEL.BACKBONE.DEPTH`` 18x, 34x, 50x, 100x or se_50x.

    Reads the keys of :func:`build_iresnet_backbone`. ``PRETRAIN_PATH`` takes a file of the authors, whose network sees
    BGR; it is turned round to see RGB. Their networks were trained with ``DROP_RATIO`` 0.4.

    Raises:
        ConfigError: Names the key.
        CheckpointError: The pretrained file is of another network.
    """
    name = IR_DEPTHS[_depth(cfg, IR_DEPTHS)]
    sizes = {**_sizes(cfg), "dropout": cfg.MODEL.BACKBONE.DROP_RATIO, "excite": name == "ir_se_50"}
    return _finish(cfg, IRBackbone(IR_UNITS[name], **sizes), "adaface")


def build_mobilefacenet_backbone(cfg: Any) -> nn.Module:
    """MobileFaceNet of ``MODEL.BACKBONE.DEPTH`` mbf or mbf_large (arcface_torch's), or qud.

    Reads the keys of :func:`build_iresnet_backbone` but for ``DROP_RATIO``: the network has no dropout.

    Raises:
        ConfigError: Names the key.
        CheckpointError: The pretrained file is of another network.
    """
    depth = _depth(cfg, _MOBILE)
    return _finish(cfg, _MOBILE[depth](**_sizes(cfg)), "qud" if depth == "qud" else "arcface")


def _depth(cfg: Any, known: Mapping[str, Any]) -> str:
    options = cfg.MODEL.BACKBONE
    if options.DEPTH not in known:
        raise ConfigError(
            "MODEL.BACKBONE.DEPTH", value=options.DEPTH, expected=f"one of {', '.join(known)} for {options.NAME}"
        )
    return str(options.DEPTH)


def _sizes(cfg: Any) -> dict[str, Any]:
    height, width = cfg.INPUT.SIZE_TRAIN
    if list(cfg.INPUT.SIZE_TEST) != [height, width]:
        raise ConfigError(
            "INPUT.SIZE_TEST",
            value=list(cfg.INPUT.SIZE_TEST),
            expected=f"INPUT.SIZE_TRAIN {[height, width]}, because the last layer of a face network depends on it",
        )
    base_channels(cfg.MODEL.BACKBONE.WIDTH)  # its error comes before that of any layer
    if cfg.MODEL.BACKBONE.FEAT_DIM < 1:
        raise ConfigError("MODEL.BACKBONE.FEAT_DIM", value=cfg.MODEL.BACKBONE.FEAT_DIM, expected="an integer >= 1")
    return {
        "embedding_dim": cfg.MODEL.BACKBONE.FEAT_DIM,
        "input_size": (height, width),
        "width": cfg.MODEL.BACKBONE.WIDTH,
    }


def _finish(cfg: Any, network: nn.Module, source: str) -> nn.Module:
    options = cfg.MODEL.BACKBONE
    if options.NORM not in ("BN", "syncBN"):
        raise ConfigError("MODEL.BACKBONE.NORM", value=options.NORM, expected=f"BN or syncBN for {options.NAME}")
    if options.PRETRAIN:
        _load(network, options.PRETRAIN_PATH, source)
    if options.NORM == "syncBN":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    return network


def _load(network: nn.Module, path: str, source: str) -> None:
    if not path:
        raise ConfigError(
            "MODEL.BACKBONE.PRETRAIN_PATH",
            value=path,
            expected="a file of face weights, because MODEL.BACKBONE.PRETRAIN is True and none can be downloaded",
            remedy="Name a backbone file of arcface_torch or QUD (build_ir_backbone: of AdaFace or QGFace), or set "
            "MODEL.BACKBONE.PRETRAIN False.",
        )
    title = f"MODEL.BACKBONE.PRETRAIN_PATH {path}"
    tensors = read_weights(Path(path)).tensors
    if source == "adaface" and is_ir(tensors, "qgface"):
        source = "qgface"
    converted = convert(tensors, source, title=title)
    weights = {name: tensor for name, tensor in converted.weights.items() if name.startswith(_PREFIX)}
    result = fit(weights, {f"{_PREFIX}{name}": tensor for name, tensor in network.state_dict().items()})
    require_complete(result, title, converted.network)
    matched = {name.removeprefix(_PREFIX): weights[name] for name in result.matched}
    network.load_state_dict(matched, strict=False)  # all but counters of batches, which old files lack
