"""The registry of checks, and running them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from qsd_plugin.core.errors import QSDPluginError
from qsd_plugin.core.registry import Registry
from qsd_plugin.report.run_doctor.findings import Finding
from qsd_plugin.report.run_doctor.run_files import Run

#: A check yields its findings; it yields nothing about stages that are none of its business.
Check = Callable[[Run], Iterable[Finding]]

CHECKS: Registry[Check] = Registry("check of the run doctor")


def check(name: str) -> Callable[[Check], Check]:
    """Decorator that registers a check.

    Raises:
        RegistryError: The name is taken by another check.
    """
    return CHECKS.register(name)


def diagnose(run: Run) -> list[Finding]:
    """The findings of every registered check, in the order of the run's stages.

    A file that cannot be read makes that check's answer ``unknown``; the others still give theirs.
    """
    findings: list[Finding] = []
    for name in CHECKS:
        findings += _made(name, run)
    order = ["", *(stage.name for stage in run.stages)]
    return sorted(findings, key=lambda finding: order.index(finding.stage) if finding.stage in order else 0)


def _made(name: str, run: Run) -> list[Finding]:
    try:
        return list(CHECKS.get(name)(run))
    except QSDPluginError as error:
        return [Finding(name, "", "unknown", f"The check {name} could not be made", str(error).rstrip("."))]
