"""``python -m qsd_plugin.run [--host wheel|PATH] SCRIPT [ARGS ...]``: activate the plugin, then run a host's script.

The script is run exactly as ``python SCRIPT ARGS`` would run it, fast-reid's own ``tools/train_net.py`` included.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from qsd_plugin.core.errors import HostError

#: Which host to load: ``wheel`` or the path of a tree that contains ``fastreid/``. Set for child processes.
HOST_VARIABLE = "QSD_PLUGIN_HOST"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, select and activate the host, run the script."""
    parser = argparse.ArgumentParser(prog="python -m qsd_plugin.run", description=__doc__)
    parser.add_argument(
        "--host",
        default=os.environ.get(HOST_VARIABLE),
        help="'wheel', or a folder that contains fastreid/ (default: the tree the script lies in, else the wheel)",
    )
    parser.add_argument("script", help="Python script to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")
    options = parser.parse_args(argv)

    script = Path(options.script)
    if not script.is_file():
        raise HostError("Script", value=str(script), expected="an existing Python file", remedy="Check the path.")
    root = select_host(script, options.host)
    # As `python SCRIPT` would do, with the chosen host in front of everything else.
    sys.path[0] = str(script.resolve().parent)
    if root is not None:
        sys.path.insert(0, str(root))
    sys.argv = [str(script), *options.arguments]

    from qsd_plugin.hosts import fastreid

    if os.environ.get("RANK", "0") == "0":
        print(f"[qsd_plugin] {fastreid.host_description()}", flush=True)
    runpy.run_path(str(script), run_name="__main__")


def select_host(script: Path, choice: str | None) -> Path | None:
    """The tree to import the host from, or ``None`` for the installed wheel.

    Args:
        script: The script to run; without a choice, the nearest folder above it that contains ``fastreid/`` wins.
        choice: ``wheel``, a path, or ``None``.

    Raises:
        HostError: The chosen folder holds no ``fastreid`` package.
    """
    if choice == "wheel":
        root = None
    elif choice:
        root = Path(choice).resolve()
        if not (root / "fastreid" / "__init__.py").is_file():
            raise HostError(
                "Host folder", value=choice, expected="a folder that contains fastreid/", remedy="Or pass --host wheel."
            )
    else:
        folders = script.resolve().parents
        root = next((folder for folder in folders if (folder / "fastreid" / "__init__.py").is_file()), None)
    os.environ[HOST_VARIABLE] = "wheel" if root is None else str(root)
    return root


if __name__ == "__main__":
    main()
