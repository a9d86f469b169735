"""The data set ``LowLightFolder``: dark and normal images for DIL's stage 1, all of them for training."""

from __future__ import annotations

from typing import Any

from fastreid.data.datasets import DATASET_REGISTRY
from fastreid.data.datasets.bases import ImageDataset

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.data.low_light import read_low_light
from qsd_plugin.hosts.fastreid.datasets import config_in_force

#: Camera numbers: what ``DIL.PAIRS.DEGRADED_CAMERAS`` of low-light data names is the second.
NORMAL, DARK = 0, 1


class LowLightFolder(ImageDataset):  # type: ignore[misc]
    """The folder ``DATA.FOLDER`` in LOL's or EnlightenGAN's layout; see :mod:`qsd_plugin.data.low_light`.

    Normal images are of camera 0, dark ones of camera 1. An identity is a scene: of paired folders both images of a
    name, otherwise every image.

    Raises:
        ConfigError: ``DATA.FOLDER`` is empty.
    """

    def __init__(self, root: str = "datasets", **kwargs: Any) -> None:
        folder = config_in_force().DATA.FOLDER
        if not folder:
            raise ConfigError(
                "DATA.FOLDER", value=folder, expected="the folder with dark and normal images, for LowLightFolder"
            )
        images = read_low_light(folder)
        self.dataset_name, self.dataset_dir = type(self).__name__.lower(), str(images.root)
        train = []
        for camera, files in ((NORMAL, images.normal), (DARK, images.low)):
            for path in files:
                scene = path.stem if images.paired else f"{camera}_{path.relative_to(images.root).as_posix()}"
                train.append((str(path), f"{self.dataset_name}_{scene}", f"{self.dataset_name}_{camera}"))
        super().__init__(train, [], [], **kwargs)


def install() -> None:
    """Register the data set in the host, once."""
    if LowLightFolder.__name__ not in DATASET_REGISTRY._obj_map:
        DATASET_REGISTRY.register(LowLightFolder)
