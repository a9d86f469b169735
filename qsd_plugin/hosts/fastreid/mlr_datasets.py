"""Person sets of two resolutions in the host: ``MLRMarket1501``, ``MLRCUHK03``, ``MLRVIPeR`` and ``CAVIAR``.

Folders are looked for under the data root, by any of the names in use; ``tools/build_data.py mlr`` makes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from fastreid.data.datasets import DATASET_REGISTRY

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.mlr_folders import DEGRADED, read_mlr
from qsd_plugin.hosts.fastreid.datasets import SplitDataset

#: What a query is compared with: every gallery image, or one drawn of each person.
ALL, SINGLE = "all", "single"


class MLRDataset(SplitDataset):
    """A set whose camera 0 is the degraded domain: those images to train on, as queries; the others as gallery.

    Args:
        root: The folder that holds the data sets.
        kwargs: Of the host's base class.

    Raises:
        DataError: None of :attr:`folders` is there, or it is not an MLR set.
    """

    #: Names that the folder may have.
    folders: ClassVar[tuple[str, ...]]
    #: :data:`ALL` or :data:`SINGLE`: the protocol of papers on this set.
    gallery_protocol: ClassVar[str]
    #: Cameras of the degraded domain, as the host's items number them.
    degraded_cameras: ClassVar[tuple[int, ...]] = (int(DEGRADED),)

    def __init__(self, root: str = "datasets", **kwargs: Any) -> None:
        found = [Path(root, name) for name in self.folders if Path(root, name).is_dir()]
        if len(found) != 1:
            raise DataError(
                f"Data set {type(self).__name__}",
                value=[folder.name for folder in found] or f"none of {', '.join(self.folders)}",
                expected=f"one of these folders in {Path(root).absolute()}",
                remedy="Name the folder that holds it in DATA.ROOT or FASTREID_DATASETS, or make it: "
                f"python tools/build_data.py mlr SOURCE {Path(root, self.folders[0])}"
                if not found
                else "Rename or remove the others.",
            )
        super().__init__(read_mlr(found[0]), **kwargs)


class MLRMarket1501(MLRDataset):
    """Market-1501, one camera shrunk; queries are compared with the whole gallery, as with Market-1501."""

    folders = ("mlr_market", "MLR-Market-1501", "MLR_Market_1501", "MLR-Market1501", "mlr_market1501")
    gallery_protocol = ALL


class MLRCUHK03(MLRDataset):
    """CUHK03, one camera of each pair shrunk: 1,367 people to train on and 100 to test, single-shot."""

    folders = ("mlr_cuhk03", "MLR-CUHK03", "MLR_CUHK03")
    gallery_protocol = SINGLE


class MLRVIPeR(MLRDataset):
    """VIPeR, one camera shrunk: 316 people each, two images of everybody, single-shot."""

    folders = ("mlr_viper", "MLR-VIPeR", "MLR_VIPeR")
    gallery_protocol = SINGLE


class CAVIAR(MLRDataset):
    """CAVIAR, of low resolution by nature: 25 people each, ten near and ten far images of everybody, single-shot."""

    folders = ("caviar", "CAVIAR", "CAVIAR4REID_mlr")
    gallery_protocol = SINGLE


def register() -> None:
    """Register these sets in the host, once."""
    for data_set in (MLRMarket1501, MLRCUHK03, MLRVIPeR, CAVIAR):
        if data_set.__name__ not in DATASET_REGISTRY._obj_map:
            DATASET_REGISTRY.register(data_set)


def degraded_cameras(cfg: Any) -> frozenset[str]:
    """Cameras of the degraded domain of ``DATASETS.NAMES``, as training items name them; empty where no set says so."""
    return frozenset(f"{name.lower()}_{camera}" for name in cfg.DATASETS.NAMES for camera in degraded_cameras_of(name))


def degraded_cameras_of(name: str) -> tuple[int, ...]:
    """Numbers of the cameras of the degraded domain of a registered set; none where it does not say so."""
    return tuple(getattr(DATASET_REGISTRY.get(name), "degraded_cameras", ()))


def gallery_protocol(name: str) -> str:
    """:data:`ALL` or :data:`SINGLE`: what papers on the test set ``name`` compare a query with; of others ``ALL``."""
    return str(getattr(DATASET_REGISTRY._obj_map.get(name), "gallery_protocol", ALL))
