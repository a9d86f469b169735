"""Finds the shipped configs, in a clone and in an installed wheel alike."""

from __future__ import annotations

from pathlib import Path

from qsd_plugin.core.errors import ConfigError, did_you_mean


def get_config_file(name: str) -> str:
    """Path of a shipped config.

    Args:
        name: Path below ``projects/``, for example ``QSD/market.yml``.

    Raises:
        ConfigError: No such config; the message suggests the nearest one.
    """
    folder = projects_folder()
    path = folder / name
    if not path.is_file():
        raise ConfigError("Unknown config", value=name, remedy=did_you_mean(name, list_configs()))
    return str(path)


def list_configs() -> list[str]:
    """All shipped configs, as :func:`get_config_file` takes them."""
    folder = projects_folder()
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.yml"))


def projects_folder() -> Path:
    """The ``projects`` folder: inside the package in a wheel, at the top of the clone otherwise."""
    packaged = Path(__file__).parent / "projects"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "projects"
