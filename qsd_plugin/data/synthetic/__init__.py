"""Built-in synthetic data sets, made on the spot from a seed."""

from qsd_plugin.data.synthetic.pedestrians import SyntheticPedestrians
from qsd_plugin.data.synthetic.storage import Truth, build, load_truth

__all__ = ["SyntheticPedestrians", "Truth", "build", "load_truth"]
