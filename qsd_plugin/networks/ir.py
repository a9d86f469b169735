"""IR, the residual network of AdaFace and QGFace, under AdaFace's names, so that published weights load strictly.

Shapes: B images, C channels, H x W grid, D embedding. Against IResNet (:mod:`~qsd_plugin.networks.iresnet`): where a
block keeps its channels the shortcut is a subsampling without weights, and the embedding's batch norm has neither scale
nor shift. Published weights expect BGR images.
Source: Kim et al., "AdaFace", CVPR 2022; Song and Wang, "QGFace", arXiv 2312.17494; Deng et al., "ArcFace", CVPR 2019.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qsd_plugin.networks.face_shapes import InputSize, base_channels, grid, height_width, require_size

#: Units of the four stages by the name of the network.
IR_UNITS: Mapping[str, tuple[int, int, int, int]] = {
    "ir_18": (2, 2, 2, 2),
    "ir_34": (3, 4, 6, 3),
    "ir_50": (3, 4, 14, 3),
    "ir_101": (3, 13, 30, 3),
    "ir_se_50": (3, 4, 14, 3),
}


class SqueezeExcite(nn.Module):
    """Weigh the channels of a map by what is in it (Hu et al., CVPR 2018).

    Args:
        channels: Of the map.
        reduction: Factor between them and the hidden layer.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to the same."""
        weight = self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        weighed: Tensor = x * torch.sigmoid(weight)
        return weighed


class IRUnit(nn.Module):
    """BN, 3x3, BN, PReLU, 3x3, BN with the stride in the second kernel and no activation behind the sum.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output; other than ``in_channels`` brings a projection on the shortcut.
        stride: 1 or 2.
        excite: Squeeze-excite at the end of the residual branch.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, *, excite: bool = False) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module
        if in_channels == channels:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut_layer = nn.Sequential(projection, nn.BatchNorm2d(channels))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        if excite:
            self.res_layer.append(SqueezeExcite(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
        total: Tensor = self.res_layer(x) + self.shortcut_layer(x)
        return total


class IR(nn.Module):
    """IR of any depth, width and input size.

    ``body`` is one list of units; the embedding is the output of ``output_layer``, whose last part is a batch norm
    without scale and shift. Its length tells quality: heads take it apart with
    :func:`~qsd_plugin.methods.qgface.unit_and_norm`. The layers from the flattened map on compute in the precision of
    their parameters, outside autocast. Across ranks: plain; batch norms are converted with
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``.

    Args:
        units: Units of the four stages, see :data:`IR_UNITS`.
        embedding_dim: D.
        input_size: Pixels, or (height, width); only the size of the linear layer depends on it.
        width: Factor on all channels but D: 1 is the published network.
        dropout: Probability in front of the linear layer, in [0, 1).
        excite: Squeeze-excite in every unit.

    Raises:
        ConfigError: An impossible width or size; in forward, images of another size.
    """

    def __init__(
        self,
        units: Sequence[int],
        *,
        embedding_dim: int = 512,
        input_size: InputSize = 112,
        width: float = 1.0,
        dropout: float = 0.4,
        excite: bool = False,
    ) -> None:
        super().__init__()
        self.input_size = height_width(input_size)
        self.units = tuple(units)
        channels = base_channels(width)
        last = 8 * channels
        rows, columns = grid(self.input_size)
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.PReLU(channels)
        )
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(last),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(last * rows * columns, embedding_dim),
            nn.BatchNorm1d(embedding_dim, affine=False),
        )
        body: list[nn.Module] = []
        before = channels
        for stage, count in enumerate(units):
            after = channels * 2**stage
            body.append(IRUnit(before, after, stride=2, excite=excite))
            body += [IRUnit(after, after, stride=1, excite=excite) for _ in range(count - 1)]
            before = after
        self.body = nn.Sequential(*body)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W], -1 to 1, to embeddings [B, D], not normalised."""
        require_size(x, self.input_size)
        x = self.body(self.input_layer(x))
        norm, dropout, flatten, linear, last = self.output_layer
        x = flatten(dropout(norm(x)))
        with torch.autocast(x.device.type, enabled=False):
            embedding: Tensor = last(linear(x.to(next(linear.parameters()).dtype)))
        return embedding


def ir_18(embedding_dim: int = 512, *, width: float = 1.0, input_size: InputSize = 112, dropout: float = 0.4) -> IR:
    """24.0 M parameters. Arguments as for :class:`IR`."""
    return _ir("ir_18", embedding_dim, width, input_size, dropout)


def ir_34(embedding_dim: int = 512, *, width: float = 1.0, input_size: InputSize = 112, dropout: float = 0.4) -> IR:
    """34.1 M parameters. Arguments as for :class:`IR`."""
    return _ir("ir_34", embedding_dim, width, input_size, dropout)


def ir_50(embedding_dim: int = 512, *, width: float = 1.0, input_size: InputSize = 112, dropout: float = 0.4) -> IR:
    """43.6 M parameters. Arguments as for :class:`IR`."""
    return _ir("ir_50", embedding_dim, width, input_size, dropout)


def ir_101(embedding_dim: int = 512, *, width: float = 1.0, input_size: InputSize = 112, dropout: float = 0.4) -> IR:
    """AdaFace's ``ir_101``, QGFace's ``ir100``: 65.2 M parameters. Arguments as for :class:`IR`."""
    return _ir("ir_101", embedding_dim, width, input_size, dropout)


def ir_se_50(embedding_dim: int = 512, *, width: float = 1.0, input_size: InputSize = 112, dropout: float = 0.4) -> IR:
    """:func:`ir_50` with squeeze-excite: 43.8 M parameters. Arguments as for :class:`IR`."""
    return _ir("ir_se_50", embedding_dim, width, input_size, dropout)


def _ir(name: str, embedding_dim: int, width: float, input_size: InputSize, dropout: float) -> IR:
    return IR(
        IR_UNITS[name],
        embedding_dim=embedding_dim,
        width=width,
        input_size=input_size,
        dropout=dropout,
        excite=name == "ir_se_50",
    )
