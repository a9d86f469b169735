"""InsightFace: the arcface_torch trainer of a user's checkout, and the runtime (``runtime``, ``packaging``).

Importing this changes nothing and loads no host.

``tools/train_arcface.py --host-root CHECKOUT CONFIG`` trains with the methods of ``config.qsd_plugin``. Where the
checkout runs as it is, a config of its own may do the same::

    from qsd_plugin.hosts.insightface import activate
    activate()
"""

from __future__ import annotations

from pathlib import Path

#: To be put on PYTHONPATH for the config-only route where mxnet cannot be imported: holds a stand-in of that name.
STANDINS = Path(__file__).parent / "standins"


def activate() -> None:
    """Teach a running, unmodified ``train_v2.py`` the methods of ``config.qsd_plugin``; for its config file.

    The trainer imports its config before it uses the names that are replaced: ``get_model``, ``get_dataloader`` and
    ``PartialFC_V2`` of its ``__main__``. Repeated calls do nothing.

    Raises:
        HostError: No ``train_v2.py`` of a known layout is running.
    """
    from qsd_plugin.hosts.insightface.launcher import activate_in_main

    activate_in_main()
