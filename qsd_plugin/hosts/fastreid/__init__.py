"""fast-reid: importing this package activates the plugin in the host (patches, config keys, registrations).

Activation is explicit and happens once per process, before the host's own modules are used::

    import qsd_plugin.hosts.fastreid  # first line of a training script

or, for a script that is not ours to edit, ``python -m qsd_plugin.run SCRIPT ...``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from pathlib import Path

from qsd_plugin.core.errors import HostError
from qsd_plugin.hosts.fastreid import compat


def _import_host() -> None:
    """Import the host's modules that the rest of the adapter and every training script rely on."""
    with warnings.catch_warnings():
        # The host warns that its compiled ranking is missing; ours takes its place right after this import.
        warnings.filterwarnings("ignore", message="Cython rank evaluation", category=UserWarning)
        for module in ("config", "data", "modeling", "evaluation", "evaluation.rank", "solver", "engine"):
            importlib.import_module(f"fastreid.{module}")


def activate() -> None:
    """Make the host work here and teach it the plugin's methods. Repeated calls do nothing.

    Raises:
        HostError: fast-reid is not installed.
    """
    if importlib.util.find_spec("fastreid") is None:
        raise HostError(
            "fast-reid is not installed",
            remedy="Install it without its outdated dependency pins: pip install --no-deps fastreid==1.4.0",
        )
    # Raised by the host's ToTensor in every worker of every run, and nothing a user could act on.
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated", module=r"fastreid\.")
    compat.install(_import_host)
    from qsd_plugin.hosts.fastreid import register

    register.register_all()


def host_folder() -> Path:
    """Folder of the ``fastreid`` package in use."""
    return Path(str(sys.modules["fastreid"].__file__)).parent


def host_description() -> str:
    """One line saying which fast-reid is loaded and from where."""
    folder = host_folder()
    if folder.parent.name in {"site-packages", "dist-packages"}:
        return f"host: fast-reid {importlib.metadata.version('fastreid')} wheel, {folder}"
    return f"host: fast-reid checkout, {folder}"


activate()
