"""Stands in for the package of this name, which the host needs."""

from configs.base import Config as EasyDict

__all__ = ["EasyDict"]
