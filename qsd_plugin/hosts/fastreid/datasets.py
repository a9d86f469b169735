"""Data sets registered in fast-reid: own folders and lists, CUHK03's new protocol, faces, synthetic people and faces.

The host builds a data set from its root folder alone. What else one needs comes from the config in force, which
:func:`using` sets while data sets are built; the plugin's loaders do.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from operator import itemgetter
from pathlib import Path
from typing import Any

from fastreid.data.datasets import DATASET_REGISTRY
from fastreid.data.datasets.bases import ImageDataset
from fastreid.data.datasets.cuhk03 import CUHK03

from qsd_plugin.core.distributed import rank
from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data import synthetic
from qsd_plugin.data.face_lists import read_faces
from qsd_plugin.data.face_records import classes, face_folder
from qsd_plugin.data.items import ImageItem, ImageSplits, listed_root
from qsd_plugin.data.recordio import open_records
from qsd_plugin.data.reid_folders import read_folder
from qsd_plugin.data.reid_lists import read_list
from qsd_plugin.quality.keys import split_record_path

logger = logging.getLogger("fastreid.qsd_plugin.data")

#: A host item: path, identity and camera; the latter two are strings in training sets and integers in test sets.
Item = tuple[str, Any, Any]

#: Environment variable that names the folder for generated data when ``DATA.CACHE`` does not.
CACHE_VARIABLE = "QSD_PLUGIN_CACHE"

_CUHK03_NP_FOLDERS = ("cuhk03-np", "CUHK03-NP", "cuhk03_np")

_config: ContextVar[Any] = ContextVar("config of the data sets being built", default=None)
_told: set[str] = set()


@contextmanager
def using(cfg: Any) -> Iterator[None]:
    """Build data sets inside this block from the config ``cfg``."""
    token = _config.set(cfg)
    try:
        yield
    finally:
        _config.reset(token)


def config_in_force() -> Any:
    """The config set by :func:`using`, or the defaults."""
    from fastreid.config import get_cfg

    return get_cfg() if _config.get() is None else _config.get()


class SplitDataset(ImageDataset):  # type: ignore[misc]
    """A host data set made of :class:`ImageSplits`.

    Identities and cameras get the forms the host expects: names with the data set's in front for training, so that sets
    can be combined, and numbers for testing. Without camera information every image is a camera of its own.

    Args:
        splits: The images.
        kwargs: Of the host's base class, such as ``combineall``.
    """

    def __init__(self, splits: ImageSplits, **kwargs: Any) -> None:
        self.dataset_name = type(self).__name__.lower()
        self.dataset_dir = str(splits.root)
        self._has_cameras = splits.has_cameras
        test = [*splits.query, *splits.gallery]
        identities = {name: number for number, name in enumerate(sorted({item.identity for item in test}))}
        # Number 0 in Market-1501's gallery is everybody who is not searched for: no class to train on (combineall).
        searched = {item.identity for item in splits.query}
        self._junk_pids = [identities[name] for name in identities if name.strip("0") == "" and name not in searched]
        cameras = _cameras(test)
        numbered = [(item.path, identities[item.identity], camera) for item, camera in zip(test, cameras, strict=True)]
        train = [
            (item.path, f"{self.dataset_name}_{item.identity}", f"{self.dataset_name}_{camera}")
            for item, camera in zip(splits.train, _cameras(splits.train), strict=True)
        ]
        super().__init__(train, numbered[: len(splits.query)], numbered[len(splits.query) :], **kwargs)
        for note in splits.notes:
            if note not in _told and rank() == 0:
                _told.add(note)
                logger.info(note)

    def parse_data(self, data: Sequence[Item]) -> tuple[int, int]:
        """Numbers of identities and of (real) cameras, for the host's tables."""
        num_identities, num_cameras = super().parse_data(data)
        return num_identities, num_cameras if self._has_cameras else 0


class ReIDFolder(SplitDataset):
    """Own images in the folder ``DATA.FOLDER``; layouts: :mod:`qsd_plugin.data.reid_folders`."""

    def __init__(self, root: str = "datasets", **kwargs: Any) -> None:
        cfg = config_in_force()
        folder = _required(cfg.DATA.FOLDER, "DATA.FOLDER", "the folder with the images")
        options = _split_options(cfg, Path(folder).expanduser())
        super().__init__(read_folder(folder, **options), **kwargs)


class ReIDList(SplitDataset):
    """Own images in the CSV file ``DATA.LIST``: ``path,pid,camid[,split]``."""

    def __init__(self, root: str = "datasets", **kwargs: Any) -> None:
        cfg = config_in_force()
        file = _required(cfg.DATA.LIST, "DATA.LIST", "a CSV file with the columns path,pid,camid[,split]")
        options = _split_options(cfg, Path(file).expanduser().absolute().parent)
        super().__init__(read_list(file, **options), **kwargs)


class CUHK03Detected(SplitDataset):
    """CUHK03, boxes of the detector, new protocol with 767 training and 700 test identities (Zhong et al., CVPR 2017).

    Read from ``cuhk03-np/detected`` (Market-1501's layout) or, where that is missing, through the host's ``CUHK03``
    from ``cuhk03/cuhk03_release/cuhk-03.mat`` and the protocol's own ``.mat`` files.
    """

    kind = "detected"

    def __init__(self, root: str = "datasets", **kwargs: Any) -> None:
        folders = [Path(root, name, self.kind) for name in _CUHK03_NP_FOLDERS]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder is not None:
            super().__init__(read_folder(folder), **kwargs)
            return
        released = _cuhk03_release(root, labeled=self.kind == "labeled")
        self.dataset_name, self.dataset_dir, self._has_cameras = released.dataset_name, released.dataset_dir, True
        ImageDataset.__init__(self, released.train, released.query, released.gallery, **kwargs)


class CUHK03Labeled(CUHK03Detected):
    """CUHK03, hand-drawn boxes, new protocol; read as ``CUHK03Detected`` is, from ``cuhk03-np/labeled``."""

    kind = "labeled"


class SyntheticPedestrians(SplitDataset):
    """The built-in generator's set for ``DATA.SYNTHETIC``, made on first use and kept in the cache."""

    def __init__(self, root: str = "datasets", **kwargs: Any) -> None:
        cfg = config_in_force()
        spec = synthetic.SyntheticPedestrians(**{key.lower(): value for key, value in cfg.DATA.SYNTHETIC.items()})
        folder = synthetic.build(cache_folder(cfg), spec, workers=os.cpu_count() or 1)
        super().__init__(read_folder(folder), **kwargs)


class FaceDataset(ImageDataset):  # type: ignore[misc]
    """Faces to train on. There are no queries and no gallery: faces are tested by verification, on other sets.

    Identities keep the order of ``identities`` as classes. Faces come from no camera that a filter or a sampler should
    care about: all of them carry the same.

    Args:
        paths: Images.
        identities: Whom each shows; names that sort in the order of the classes.
        root: The data-set folder.
        kwargs: Of the host's base class.
    """

    def __init__(self, paths: Iterable[str], identities: Iterable[str], root: Path, **kwargs: Any) -> None:
        self.dataset_name = type(self).__name__.lower()
        self.dataset_dir = str(root)
        camera = f"{self.dataset_name}_0"
        # One string per identity, not per image: there may be millions.
        names: dict[str, str] = {}
        train = [
            (path, names.setdefault(identity, f"{self.dataset_name}_{identity}"), camera)
            for path, identity in zip(paths, identities, strict=True)
        ]
        super().__init__(train, [], [], **kwargs)

    def parse_data(self, data: Sequence[Item]) -> tuple[int, int]:
        """Numbers of identities and of cameras, which are not known, for the host's tables."""
        return super().parse_data(data)[0], 0


class FaceRecord(FaceDataset):
    """The images of the record file ``DATA.RECORD``, in either layout; paths are ``<file>.rec#<key>``."""

    def __init__(self, root: str = "datasets", **kwargs: Any) -> None:
        cfg = config_in_force()
        file = _required(cfg.DATA.RECORD, "DATA.RECORD", "a .rec file with its .idx beside it")
        reader = open_records(str(Path(file).expanduser().absolute()))
        numbers = classes(reader.image_labels, name=file)
        digits = len(str(int(numbers.max(initial=0))))
        paths = (f"{reader.path}#{key}" for key in reader.image_keys.tolist())
        super().__init__(paths, (f"{number:0{digits}d}" for number in numbers.tolist()), reader.path.parent, **kwargs)


class FaceFolder(FaceDataset):
    """Aligned crops in the folder ``DATA.FOLDER``: ``<identity>/*.jpg``, all of them for training."""

    def __init__(self, root: str = "datasets", **kwargs: Any) -> None:
        folder = Path(_required(config_in_force().DATA.FOLDER, "DATA.FOLDER", "a folder with one folder per identity"))
        faces = [(str(file), name) for name, files in face_folder(folder).items() for file in files]
        super().__init__((path for path, _ in faces), (name for _, name in faces), folder.expanduser(), **kwargs)


class FaceList(FaceDataset):
    """Aligned crops in the CSV file ``DATA.LIST``: ``path,identity``, all of them for training."""

    def __init__(self, root: str = "datasets", **kwargs: Any) -> None:
        file = _required(config_in_force().DATA.LIST, "DATA.LIST", "a CSV file with the columns path,identity")
        paths, names = zip(*read_faces(file), strict=True)
        super().__init__(paths, names, listed_root(Path(file).expanduser().absolute().parent, paths), **kwargs)


class SyntheticFaces(FaceDataset):
    """The training part of the built-in generator's set for ``DATA.FACES``, made on first use and kept in the cache."""

    def __init__(self, root: str = "datasets", **kwargs: Any) -> None:
        from qsd_plugin.data.synthetic.faces import TRAIN

        spec, folder = synthetic_faces(config_in_force())
        samples = [sample for sample in spec.samples() if sample.folder == TRAIN]
        names = (f"{sample.identity:05d}" for sample in samples)
        super().__init__((str(folder / sample.path) for sample in samples), names, folder, **kwargs)


def synthetic_faces(cfg: Any) -> tuple[synthetic.SyntheticFaces, Path]:
    """What ``DATA.FACES`` asks for, and its folder in the cache, where it is made on first use."""
    spec = synthetic.SyntheticFaces(**{key.lower(): value for key, value in cfg.DATA.FACES.items()})
    return spec, synthetic.build_faces(cache_folder(cfg), spec, workers=os.cpu_count() or 1)


def register_datasets() -> None:
    """Register the plugin's data sets in the host, once."""
    persons = (ReIDFolder, ReIDList, CUHK03Detected, CUHK03Labeled, SyntheticPedestrians)
    for data_set in (*persons, FaceRecord, FaceFolder, FaceList, SyntheticFaces):
        if data_set.__name__ not in DATASET_REGISTRY._obj_map:
            DATASET_REGISTRY.register(data_set)


def datasets_root(cfg: Any) -> str:
    """The folder that holds the data sets' own: ``DATA.ROOT``, else what the host took from FASTREID_DATASETS."""
    from fastreid.data import build

    return str(cfg.DATA.ROOT or build._root)


def cache_folder(cfg: Any) -> Path:
    """The folder for generated data."""
    chosen = cfg.DATA.CACHE or os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "qsd_plugin"


def stored_sizes(paths: Iterable[str]) -> Iterator[int]:
    """The size in bytes of the file that holds each image; of a record file it is asked once, not per image."""
    of_record = functools.lru_cache(maxsize=16)(os.path.getsize)
    for path in paths:
        record = split_record_path(path)
        yield of_record(record[0]) if record else os.path.getsize(path)


def training_set(cfg: Any, name: str, **kwargs: Any) -> tuple[Any, list[Item]]:
    """A registered data set and its training items, sorted by path.

    Args:
        cfg: The host's config.
        name: Registered name.
        kwargs: For the data set's constructor, such as ``combineall``.

    Raises:
        RegistryError: No such data set.
        DataError: Its files are missing, or it has no training images.
    """
    with _building(cfg, name) as data_set_class:
        data_set = data_set_class(root=datasets_root(cfg), **kwargs)
        items = _sorted(data_set.train)
    if not items:
        raise _empty(cfg, name, "training images")
    return data_set, items


def test_set(cfg: Any, name: str, **kwargs: Any) -> tuple[Any, list[Item], list[Item]]:
    """A registered data set, its query items and its gallery items, each sorted by path.

    Raises:
        RegistryError: No such data set.
        DataError: Its files are missing, it has no test images, or their identities and cameras are no integers.
    """
    with _building(cfg, name) as data_set_class:
        data_set = data_set_class(root=datasets_root(cfg), **kwargs)
        query, gallery = _sorted(data_set.query), _sorted(data_set.gallery)
    for items, what in ((query, "query images"), (gallery, "gallery images")):
        if not items:
            raise _empty(cfg, name, what)
        if not all(isinstance(number, int) for number in items[0][1:]):
            raise DataError(
                f"Data set {name}: {what}",
                value=items[0],
                expected="(path, identity, camera) with integers for the last two",
                remedy="Only training items carry names.",
            )
    return data_set, query, gallery


def dataset_folder(cfg: Any, name: str) -> Path:
    """The folder that the keys of a data set's quality labels are relative to."""
    with _building(cfg, name) as data_set_class:
        data_set = data_set_class(root=datasets_root(cfg))
        paths = [
            os.path.abspath(item[0]) for part in (data_set.train, data_set.query, data_set.gallery) for item in part
        ]
    for folder in (getattr(data_set, "data_dir", None), getattr(data_set, "dataset_dir", None), datasets_root(cfg)):
        if folder and all(path.startswith(os.path.join(os.path.abspath(folder), "")) for path in paths):
            return Path(folder)
    return Path(os.path.commonpath(paths))


def dataset_roots(cfg: Any) -> dict[str, Path]:
    """:func:`dataset_folder` of every training set, by its name, in the order of ``DATASETS.NAMES``."""
    return {name: dataset_folder(cfg, name) for name in cfg.DATASETS.NAMES}


@contextmanager
def _building(cfg: Any, name: str) -> Iterator[Any]:
    """The class registered as ``name``; what it raises inside the block becomes an error that says where data goes."""
    data_set_class = DATASET_REGISTRY.get(name)
    try:
        with using(cfg):
            yield data_set_class
    except (RuntimeError, AssertionError, OSError) as error:
        raise DataError(
            f"Data set {name}",
            value=str(error) or repr(error),
            expected=f"its folder in {os.path.abspath(datasets_root(cfg))}",
            remedy="Name the folder that holds the data sets in DATA.ROOT or FASTREID_DATASETS. "
            "Your own images are read by ReIDFolder and ReIDList.",
        ) from error


def _cameras(items: Sequence[ImageItem]) -> list[int]:
    """Camera numbers; every image has its own where no cameras are known."""
    if any(item.camera is None for item in items):
        return list(range(len(items)))
    names = sorted({str(item.camera) for item in items}, key=lambda name: (len(name), name))
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers[str(item.camera)] for item in items]


def _sorted(items: Sequence[Item]) -> list[Item]:
    return sorted(items, key=itemgetter(0))


def _split_options(cfg: Any, folder: Path) -> dict[str, Any]:
    return {
        "test_fraction": cfg.DATA.TEST_FRACTION,
        "split_seed": cfg.DATA.SPLIT_SEED,
        "split_folders": [folder, Path(cfg.OUTPUT_DIR or ".")],
    }


def _required(value: str, key: str, expected: str) -> str:
    if not value:
        raise ConfigError(key, value=value, expected=expected, remedy=f"Add it to the command line: {key} PATH")
    return value


def _cuhk03_release(root: str, *, labeled: bool) -> Any:
    try:
        return CUHK03(root=root, cuhk03_labeled=labeled)
    except RuntimeError as error:
        raise DataError(
            "CUHK03 is not there",
            value=str(error),
            expected=f"{_CUHK03_NP_FOLDERS[0]} (CUHK03-NP's layout) or cuhk03/cuhk03_release/cuhk-03.mat and "
            f"cuhk03/cuhk03_new_protocol_config_*.mat in {os.path.abspath(root)}",
            remedy="Name the folder that holds it in DATA.ROOT or FASTREID_DATASETS.",
        ) from error
    except ImportError as error:
        raise DataError(
            "CUHK03's .mat release has to be unpacked first, which needs a package that is not installed",
            value=error.name,
            expected="h5py, imageio and scipy",
            remedy="Install them (pip install h5py imageio scipy), or put the data in the layout of CUHK03-NP: "
            "cuhk03-np/{detected,labeled}/{bounding_box_train,query,bounding_box_test}.",
        ) from error


def _empty(cfg: Any, name: str, what: str) -> DataError:
    return DataError(
        f"Data set {name} has no {what}",
        value=os.path.abspath(datasets_root(cfg)),
        expected="a data folder with images",
        remedy="Check the folder (DATA.ROOT, FASTREID_DATASETS) and that its archive is unpacked. "
        "Some of the host's sets are for training only.",
    )
