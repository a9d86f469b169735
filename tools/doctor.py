#!/usr/bin/env python
"""Says what is installed, which host is loaded and what was repaired in it.

python tools/doctor.py                                   versions, devices, patches
python tools/doctor.py --patches                         the patch table as Markdown, as on the project page
python tools/doctor.py --registry                        everything a config can name
python tools/doctor.py --taps --config-file CONFIG       modules QSD can distil: name, shape, default weight
python tools/doctor.py --run OUTPUT_DIR [KEY VALUE ...]  what went wrong in a run, with figure, limit and next step
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

from qsd_plugin.core.errors import QSDPluginError


def main() -> None:
    """Entry point; exits with 1 when something needs the user's attention."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", action="store_true", help="list registered names")
    parser.add_argument("--patches", action="store_true", help="print the patch table as Markdown")
    parser.add_argument("--taps", action="store_true", help="list the modules QSD can distil in --config-file's model")
    parser.add_argument("--config-file", metavar="FILE", help="config for --taps")
    parser.add_argument("--run", metavar="DIR", help="diagnose the recipe or the single training in this folder")
    parser.add_argument("--json", action="store_true", help="findings of --run as JSON")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for --taps and --run (DATA.ROOT)")
    arguments = parser.parse_args()
    try:
        if arguments.registry:
            show_registries()
        elif arguments.patches:
            print(patch_table())
        elif arguments.taps:
            if not arguments.config_file:
                parser.error("--taps needs --config-file")
            show_taps(Path(arguments.config_file), arguments.opts)
        elif arguments.run:
            sys.exit(show_run(Path(arguments.run), arguments.opts, as_json=arguments.json))
        else:
            sys.exit(show_installation())
    except QSDPluginError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


def show_installation() -> int:
    """Versions, devices and patches; returns 1 when a version or package is not as it should be."""
    from qsd_plugin.report import installation

    print(tabulate(installation.versions(), headers=["package", "version"], tablefmt="simple"))
    print(f"\ndevice: {installation.device()}")
    problems = installation.problems()
    from qsd_plugin.hosts import fastreid as host
    from qsd_plugin.hosts.fastreid import compat

    print(f"{host.host_description()}\n")
    rows = [(patch.row, state, patch.where, patch.symptom, patch.action) for patch, state in compat.status()]
    headers = ["row", "state", "where", "symptom", "what the plugin does"]
    print(tabulate(rows, headers=headers, tablefmt="simple", maxcolwidths=[None, None, 30, 45, 50]))
    for problem in problems:
        print(f"\nATTENTION: {problem}")
    return 1 if problems else 0


def patch_table() -> str:
    """All patches as a Markdown table, whatever this environment needs."""
    from qsd_plugin.hosts.fastreid.compat import TABLE

    cells = [(patch.row, f"`{patch.where}`", patch.symptom, patch.action) for patch in TABLE]
    rows = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in cells]
    head = ["| row | where | without the plugin | with it |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {row} |" for row in rows)])


def show_registries() -> None:
    """Names that ``MODEL.META_ARCHITECTURE``, ``DATASETS.NAMES`` and the other keys accept; the plugin's are marked."""
    from qsd_plugin.hosts import fastreid as host

    host.activate()
    from qsd_plugin.hosts.fastreid.registries import registered_names

    for key, names in registered_names().items():
        print(f"\n{key}")
        for name, ours in names.items():
            print(f"  {name}{'   (qsd_plugin)' if ours else ''}")


def show_taps(config_file: Path, opts: list[str]) -> None:
    """Every module that produced a map or a vector in one training forward, with its default weight in QSD."""
    from qsd_plugin.hosts import fastreid as host

    host.activate()
    from fastreid.config import get_cfg

    from qsd_plugin.hosts.fastreid.registries import list_taps

    cfg: Any = get_cfg()
    cfg.merge_from_file(str(config_file))
    cfg.merge_from_list(opts)
    rows = [(tap.name, "x".join(map(str, tap.shape)), tap.weight) for tap in list_taps(cfg)]
    print(tabulate(rows, headers=["QSD.TAPS name", "shape (batch first)", "default weight"], tablefmt="simple"))


def show_run(folder: Path, opts: list[str], *, as_json: bool) -> int:
    """The doctor's findings on a run; returns 1 when one of them is a problem."""
    from qsd_plugin.hosts import fastreid as host

    host.activate()
    from qsd_plugin.hosts.fastreid.run_checks import diagnose_run
    from qsd_plugin.report import run_doctor

    findings = diagnose_run(folder, opts)
    print((run_doctor.as_json if as_json else run_doctor.as_text)(findings, str(folder)))
    return 1 if run_doctor.worst(findings) == "problem" else 0


if __name__ == "__main__":
    main()
