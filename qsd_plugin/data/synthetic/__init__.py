"""Built-in synthetic data sets, made on the spot from a seed."""

from qsd_plugin.data.synthetic.face_storage import FaceTruth, build_faces, load_face_truth
from qsd_plugin.data.synthetic.faces import SyntheticFaces
from qsd_plugin.data.synthetic.pedestrians import SyntheticPedestrians
from qsd_plugin.data.synthetic.storage import Truth, build, load_truth

__all__ = [
    "FaceTruth",
    "SyntheticFaces",
    "SyntheticPedestrians",
    "Truth",
    "build",
    "build_faces",
    "load_face_truth",
    "load_truth",
]
