"""Image degradations with a severity, drawn from explicit generators and replayable bit for bit."""

from qsd_plugin.degradations import dil_functions, face_functions  # they register what the methods use
from qsd_plugin.degradations.operations import DEGRADATIONS, apply, draw, names, replay

__all__ = ["DEGRADATIONS", "apply", "dil_functions", "draw", "face_functions", "names", "replay"]
