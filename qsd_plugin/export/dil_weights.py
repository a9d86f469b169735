"""DIL's published checkpoints, one file per network and iteration, as one state dict under this plugin's names.

Inside a network the names are the authors' already; what changes is the prefix, and the buffers that their AdaIN layers
carry but never read are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qsd_plugin.core.errors import CheckpointError
from qsd_plugin.export.weights import read_weights

#: Networks of the authors' stage 1, and their names in ``qsd_plugin.methods.dil.Stage1``.
STAGE1 = {
    "E_con": "content_encoder",
    "E_deg": "degradation_encoder",
    "G": "generator",
    "D_real": "real_discriminator",
    "D_deg": "degradation_discriminator",
}
#: Those of stage 2, and their names in ``qsd_plugin.methods.dil.DualBranchReID``.
STAGE2 = {"E_con": "content_encoder", "E_id": "sensitive", "C": "fuse_classifier", "A_deg": "attention"}

#: A name that only this network has.
_SIGNATURES = {
    "E_con": "head.aspp.fuse.conv.weight",
    "E_deg": "conv3_sync.weight",
    "G": "mlp_w1.model.0.fc.weight",
    "D_real": "nets.0.0.conv.weight",
    "D_deg": "nets.0.0.conv.weight",
    "E_id": "model.layer4.0.conv1.weight",
    "C": "add_block.0.weight",
    "A_deg": "latent2weight.weight",
}


def find_dil_file(folder: Path, network: str) -> Path | None:
    """The authors' choice among ``<network>_<iteration>.pt``: the last one by its name; ``best`` comes after digits."""
    files = sorted(folder.glob(f"{network}_*.pt"))
    return files[-1] if files else None


def read_dil_weights(
    folder: Path, names: Mapping[str, str], *, optional: tuple[str, ...] = ("D_real", "D_deg", "A_deg")
) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """The networks of a folder as one state dict.

    Args:
        folder: With the authors' files.
        names: :data:`STAGE1` or :data:`STAGE2`.
        optional: Networks that may be missing: inference needs no discriminators.

    Returns:
        Weights under this plugin's names, and the file of each network that was found.

    Raises:
        CheckpointError: A network is missing, or a file holds another one.
    """
    weights: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    for network, ours in names.items():
        path = find_dil_file(folder, network)
        if path is None:
            if network not in optional:
                raise CheckpointError(
                    f"DIL weights {folder}: network {network}", value="no file", expected=f"{network}_<iteration>.pt"
                )
            continue
        files[network] = path
        weights |= {f"{ours}.{name}": tensor for name, tensor in dil_network(path, network).items()}
    return weights, files


def dil_network(path: Path, network: str) -> dict[str, Tensor]:
    """The entries of one file that the network has here.

    Raises:
        CheckpointError: The file cannot be read or holds another network.
    """
    tensors = read_weights(path).tensors
    if _SIGNATURES[network] not in tensors:
        raise CheckpointError(
            f"DIL weights {path}",
            value=list(tensors)[:3],
            expected=f"the network {network}, with {_SIGNATURES[network]}",
        )
    return {name: tensor for name, tensor in tensors.items() if not _unread(network, name)}


def dil_num_classes(weights: Mapping[str, Tensor]) -> int:
    """Identities that the content encoder's classifier was trained with."""
    return len(weights["content_encoder.classifier.classifier.0.weight"])


def _unread(network: str, name: str) -> bool:
    return network == "G" and name.startswith("dec.res.") and ".norm.running_" in name
