"""Run doctor: what went wrong in a finished or broken training run, read from the files it left.

A check is a function from a :class:`Run` to findings, registered with :func:`check`; a method adds its own in a module
of its own, imported here. :func:`diagnose` runs them all. Checks that need the host's model or images are registered
by ``qsd_plugin.hosts.fastreid.run_checks``.
"""

from qsd_plugin.report.run_doctor import (
    comparison,
    contrast,
    degradation,
    distillation,
    labels,
    norms,
    settings,
    teacher,
    training,
)
from qsd_plugin.report.run_doctor.findings import Finding, Verdict, as_json, as_text, worst
from qsd_plugin.report.run_doctor.registry import CHECKS, Check, check, diagnose
from qsd_plugin.report.run_doctor.run_files import Run, StageFolder, open_run

__all__ = [
    "CHECKS",
    "Check",
    "Finding",
    "Run",
    "StageFolder",
    "Verdict",
    "as_json",
    "as_text",
    "check",
    "comparison",
    "contrast",
    "degradation",
    "diagnose",
    "distillation",
    "labels",
    "norms",
    "open_run",
    "settings",
    "teacher",
    "training",
    "worst",
]
