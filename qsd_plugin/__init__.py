"""Quality-aware training methods for fast-reid and InsightFace. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
