"""What a check found, and how findings are told: sentences by stage, worst first, or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Verdict = Literal["ok", "unknown", "warning", "problem"]

_SEVERITY: dict[str, int] = {"ok": 0, "unknown": 1, "warning": 2, "problem": 3}


@dataclass(frozen=True)
class Finding:
    """One answer of the doctor.

    Args:
        check: Name of the check.
        stage: The stage it is about; empty for the run as a whole.
        verdict: ``ok``; ``unknown``: the files do not tell; ``warning``: look at it; ``problem``: the result is not
            what it claims to be.
        sentence: What was found, without a full stop; the figure follows it.
        figure: The measured figure with its unit.
        limit: What would have been accepted; empty where nothing was measured.
        next_step: What to do now; empty where nothing is to be done.
    """

    check: str
    stage: str
    verdict: Verdict
    sentence: str
    figure: str
    limit: str = ""
    next_step: str = ""

    def text(self) -> str:
        """The finding as one sentence and its next step."""
        limit = f" (limit: {self.limit})" if self.limit else ""
        step = f" {self.next_step}" if self.next_step else ""
        return f"{self.sentence}: {self.figure}{limit}.{step}"


def worst(findings: Sequence[Finding]) -> Verdict:
    """The most severe verdict; ``ok`` for none."""
    return max((finding.verdict for finding in findings), key=_SEVERITY.__getitem__, default="ok")


def as_text(findings: Sequence[Finding], title: str) -> str:
    """Sentences grouped by stage, the stage with the worst first; one line when there is nothing to complain about.

    Args:
        findings: In the order of the stages.
        title: What was examined, for the one line.
    """
    stages: dict[str, list[Finding]] = {}
    for finding in findings:
        stages.setdefault(finding.stage, []).append(finding)
    if worst(findings) == "ok":
        parts = [_fine(own, name) for name, own in stages.items()]
        return f"{title}: nothing wrong in {len(findings)} checks. {'. '.join(parts)}."
    ordered = sorted(stages.items(), key=lambda entry: -_SEVERITY[worst(entry[1])])
    return "\n\n".join(_stage_text(name, own) for name, own in ordered)


def as_json(findings: Sequence[Finding], title: str) -> str:
    """All findings and the worst verdict as a JSON object."""
    content = {"run": title, "verdict": worst(findings), "findings": [asdict(finding) for finding in findings]}
    return json.dumps(content, indent=1)


def _stage_text(name: str, findings: Sequence[Finding]) -> str:
    ordered = sorted(findings, key=lambda finding: -_SEVERITY[finding.verdict])
    lines = [f"  {finding.verdict.upper()} {finding.text()}" for finding in ordered if finding.verdict != "ok"]
    fine = [finding for finding in ordered if finding.verdict == "ok"]
    if fine:
        lines.append(f"  {_fine(fine, 'fine')}.")
    return "\n".join([name or "the run as a whole", *lines])


def _fine(findings: Sequence[Finding], title: str) -> str:
    return f"{title or 'run'}: " + "; ".join(f"{finding.check} {finding.figure}" for finding in findings)
