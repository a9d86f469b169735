#!/usr/bin/env python
"""Speed and memory beside an honest baseline in the same process, as paired ratios with 95 % intervals.

python tools/benchmark.py                         everything at the sizes the limits are stated for (an hour or more)
python tools/benchmark.py labels import           some of it
python tools/benchmark.py --pairs 6 --slow-pairs 2 --json out.json
python tools/benchmark.py insightface --host-root CHECKOUT   beside InsightFace's trainer and files
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from qsd_plugin.core.errors import HostError
from qsd_plugin.core.files import write_atomically

IMPORT_LIMIT_S = 0.2


def main() -> None:
    """Run the chosen suites, print one table and write JSON on request; exits with 1 when a limit is not met."""
    suites: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "import": lambda options: import_time(options.pairs),
        "labels": labels,
        "ranking": ranking,
        "qsd": qsd_step,
        "qgface": qgface_step,
        "qud": qud,
        "faces": faces,
        "dil": dil,
        "insightface": insightface,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(suites)} (default: all)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own choice)")
    parser.add_argument("--pairs", type=int, default=30, help="interleaved pairs per item with a limit")
    parser.add_argument("--slow-pairs", type=int, default=6, help="pairs of slow items: without a limit, and dil")
    parser.add_argument(
        "--items",
        default="",
        metavar="TEXT",
        help="only items with this in their name, of suites that can",
    )
    parser.add_argument("--host-root", type=Path, metavar="DIR", help="arcface_torch checkout, for insightface")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    options = parser.parse_args()
    unknown = set(options.suites) - set(suites)
    if unknown:
        parser.error(f"unknown suite {', '.join(sorted(unknown))}; choose from {', '.join(suites)}")
    results: dict[str, Any] = {"machine": machine(), "command": " ".join(sys.argv), "suites": {}}
    for name in options.suites or suites:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results["suites"][name] = suites[name](options)
    print(f"{results['machine']}\n\n{table(results['suites'])}")
    if options.json:
        write_atomically(options.json, json.dumps(results, indent=1).encode())
    sys.exit(any(met(item) is False for suite in results["suites"].values() for item in suite["items"].values()))


def labels(options: argparse.Namespace) -> dict[str, Any]:
    """SDD-FIQA labels of a Market-1501 sized set."""
    _set_threads(options.threads)
    from qsd_plugin.report.benchmarks import labels as suite

    return suite.run(pairs=options.pairs)


def ranking(options: argparse.Namespace) -> dict[str, Any]:
    """Ranking, re-ranking, query expansion and ROC at Market-1501's size."""
    _set_threads(options.threads)
    from qsd_plugin.report.benchmarks import ranking as suite

    return suite.run(pairs=options.pairs, slow_pairs=options.slow_pairs, only=options.items)


def qsd_step(options: argparse.Namespace) -> dict[str, Any]:
    """A training step with QSD beside the host's own, with every kind of pairing."""
    _set_threads(options.threads)
    try:
        from qsd_plugin.hosts.fastreid.benchmarks import qsd_step as suite
    except HostError as error:
        return {"items": {"QSD step": {"skipped": str(error)}}}
    return suite.run(pairs=options.pairs, only=options.items)


def qgface_step(options: argparse.Namespace) -> dict[str, Any]:
    """A training step of QGFace on two views beside a baseline's over the same images."""
    _set_threads(options.threads)
    try:
        from qsd_plugin.hosts.fastreid.benchmarks import qgface_step as suite
    except HostError as error:
        return {"items": {"QGFace step": {"skipped": str(error)}}}
    return suite.run(pairs=options.pairs, only=options.items)


def qud(options: argparse.Namespace) -> dict[str, Any]:
    """QUD's loss and queue in a step, a step with cached teacher embeddings, and the memory of the queue."""
    _set_threads(options.threads)
    from qsd_plugin.report.benchmarks import qud as suite

    return suite.run(pairs=options.pairs)


def dil(options: argparse.Namespace) -> dict[str, Any]:
    """Steps of DIL's two stages beside the same steps module by module: CPU seconds and peak memory."""
    _set_threads(options.threads)
    from qsd_plugin.report.benchmarks import dil as suite

    return suite.run(pairs=options.slow_pairs)


def faces(options: argparse.Namespace) -> dict[str, Any]:
    """Face records and their index, and ten-fold verification at LFW's size."""
    _set_threads(options.threads)
    from qsd_plugin.report.benchmarks import records, verification

    parts = records.run(pairs=options.pairs), verification.run(pairs=options.pairs)
    joined = {key: {**parts[0][key], **parts[1][key]} for key in ("size", "items")}
    return {**parts[0], **joined}


def insightface(options: argparse.Namespace) -> dict[str, Any]:
    """What the plugin costs arcface_torch's own trainer, and exports beside the checkout's own file in onnxruntime."""
    _set_threads(options.threads)
    from qsd_plugin.hosts.insightface import benchmarks

    try:
        return benchmarks.run(options.host_root, pairs=options.pairs, only=options.items)
    except HostError as error:
        sys.exit(f"HostError: {error}")


def import_time(runs: int) -> dict[str, Any]:
    """Seconds that ``import qsd_plugin`` takes inside a fresh interpreter, and what it drags in."""
    code = (
        "import sys, time; start = time.perf_counter(); import qsd_plugin; took = time.perf_counter() - start\n"
        "print(took, any(name in sys.modules for name in ('torch', 'torchvision', 'fastreid', 'insightface')))"
    )
    command = [sys.executable, "-c", code]
    runs_of = (subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(runs))
    outputs = [done.stdout.split() for done in runs_of]
    took = sorted(float(seconds) for seconds, _ in outputs)
    figures = {"a_seconds": took[len(took) // 2], "seconds_limit": IMPORT_LIMIT_S, "pairs": runs}
    figures["imports_nothing_heavy"] = all(heavy == "False" for _, heavy in outputs)
    return {"items": {"import qsd_plugin": figures}}


def table(suites: dict[str, Any]) -> str:
    """One row per item."""
    rows = []
    for suite in suites.values():
        for name, item in suite["items"].items():
            if "skipped" in item:
                rows.append([name, "skipped", item["skipped"], "", "", "", "", ""])
                continue
            ratio = f"{item['median']:.3g} [{item['low']:.3g}, {item['high']:.3g}]" if "median" in item else ""
            if "above_us" in item:
                ratio += f", {item['above_us']:+.2f} [{item['above_low_us']:.2f}, {item['above_high_us']:.2f}] µs"
            memory = "" if item.get("extra_memory_mib") is None else f"{item['extra_memory_mib']:.0f}"
            if "memory_ratio" in item:
                memory += f" ({item['memory_ratio']:.2f} of {item['plain_memory_mib']:.0f})"
            verdict = {True: "met", False: "NOT MET", None: ""}[met(item)]
            seconds = [f"{item[key]:.3g}" if key in item else "" for key in ("a_seconds", "b_seconds")]
            rows.append([name, *seconds, ratio, _limits(item), verdict, memory, item.get("pairs", "")])
    headers = ["item", "ours s", "baseline s", "ratio [95 %]", "limit", "verdict", "extra MiB", "pairs"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def met(item: dict[str, Any]) -> bool | None:
    """Whether an item keeps all its limits: of the ratio, of the microseconds per part beyond the baseline and of the
    time by the upper bounds of their intervals, and of the memory. ``None`` without limits, or where one is not known.
    """
    bounds = {
        "limit": item.get("high"),
        "above_limit_us": item.get("above_high_us"),
        "seconds_limit": item.get("a_high_seconds", item.get("a_seconds")),
        "memory_limit_mib": item.get("extra_memory_mib"),
        "memory_ratio_limit": item.get("memory_high"),
    }
    kept = [None if bound is None else bool(bound <= item[name]) for name, bound in bounds.items() if name in item]
    if False in kept:
        return False
    return None if None in kept or not kept else True


def _limits(item: dict[str, Any]) -> str:
    """All limits of an item, for the table."""
    forms = {
        "limit": "{}",
        "above_limit_us": "+{} µs",
        "seconds_limit": "{}",
        "memory_limit_mib": "{:.0f} MiB",
        "memory_ratio_limit": "{} of memory",
    }
    return ", ".join(form.format(item[name]) for name, form in forms.items() if name in item)


def machine() -> str:
    """Processor, cores and versions."""
    import numpy
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = f"torch {torch.__version__}, numpy {numpy.__version__}, python {platform.python_version()}"
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads; {versions}"


def _set_threads(threads: int) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
