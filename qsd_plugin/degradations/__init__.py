"""Image degradations with a severity, drawn from explicit generators and replayable bit for bit."""

from qsd_plugin.degradations.operations import DEGRADATIONS, apply, names, replay

__all__ = ["DEGRADATIONS", "apply", "names", "replay"]
