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
STAGES: Mapping[int, Mapping[str, str]] = {1: STAGE1, 2: STAGE2}
#: Networks that inference does without.
OPTIONAL = ("D_real", "D_deg", "A_deg")

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


def find_dil_files(folder: Path, names: Mapping[str, str], *, optional: tuple[str, ...] = OPTIONAL) -> dict[str, Path]:
    """The file ``<network>_<iteration>.pt`` of each network, all of the last iteration that every one has.

    The authors take the last file of each by its name (``best`` comes after digits). Both stages write ``E_con`` into
    one folder, so that may be stage 2's beside stage 1's generator; here files of different iterations never mix.

    Args:
        folder: With the authors' files.
        names: :data:`STAGE1` or :data:`STAGE2`.
        optional: Networks that may be missing: inference needs no discriminators.

    Raises:
        CheckpointError: A network is missing, no iteration has them all, or stage 2 has overwritten stage 1's files.
    """
    if not folder.is_dir():
        raise CheckpointError("DIL weights", value=str(folder), expected="the authors' folder of outputs")
    found = {network: _iterations(folder, network) for network in {**names, "E_id": "", "C": ""}}
    for network in names:
        if not found[network] and network not in optional:
            raise CheckpointError(
                f"DIL weights {folder}: network {network}", value="no file", expected=f"{network}_<iteration>.pt"
            )
    required = [network for network in names if network not in optional]
    common = set.intersection(*(found[network] for network in required))
    if not common:
        last = {network: f"{network}_{max(found[network])}.pt" for network in required}
        raise CheckpointError(
            f"DIL weights {folder}: files of different trainings",
            value=", ".join(last.values()),
            expected=f"one iteration that {', '.join(required)} all have",
            remedy="The authors' stages write E_con into one folder. Put the files of one stage into its own.",
        )
    iteration = max(common)
    if "E_id" not in names and iteration in found["E_id"] & found["C"]:
        raise CheckpointError(
            f"DIL weights {folder}: both stages have files of iteration {iteration}",
            value=f"G_{iteration}.pt and E_id_{iteration}.pt",
            expected="stage 1 alone: which of them wrote E_con cannot be told",
            remedy="Take the files of stage 1 from before stage 2 ran, in a folder of their own.",
        )
    return {network: folder / f"{network}_{iteration}.pt" for network in names if iteration in found[network]}


def stages_in(folder: Path) -> list[int]:
    """The stages, 1 and 2, of which a folder has every network that inference needs, whatever their iterations."""
    return [
        stage
        for stage, names in STAGES.items()
        if all(_iterations(folder, network) for network in names if network not in OPTIONAL)
    ]


def read_dil_weights(
    folder: Path, names: Mapping[str, str], *, optional: tuple[str, ...] = OPTIONAL
) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """The networks of a folder as one state dict; arguments and errors as of :func:`find_dil_files`.

    Returns:
        Weights under this plugin's names, and the file of each network that was found.

    Raises:
        CheckpointError: A file cannot be read or holds another network.
    """
    files = find_dil_files(folder, names, optional=optional)
    weights = {
        f"{names[network]}.{name}": tensor
        for network, path in files.items()
        for name, tensor in dil_network(path, network).items()
    }
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


def _iterations(folder: Path, network: str) -> set[str]:
    """What stands for the iteration in the names of a network's files."""
    return {path.stem.removeprefix(f"{network}_") for path in folder.glob(f"{network}_*.pt")}


def _unread(network: str, name: str) -> bool:
    return network == "G" and name.startswith("dec.res.") and ".norm.running_" in name
