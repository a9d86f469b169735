"""Checks of QUD's own figures: does the student approach its teacher, and does the queue hold embeddings of it."""

from __future__ import annotations

from collections.abc import Iterator

from qsd_plugin.report.run_doctor.findings import Finding, Verdict
from qsd_plugin.report.run_doctor.registry import check
from qsd_plugin.report.run_doctor.run_files import Run, StageFolder

#: A mean cosine that ends below the first must rise by the second over the training; one above has arrived.
LOW_COSINE, SMALL_RISE = 0.5, 0.02
#: Steps after which the figures are first written.
_FIRST = 20


@check("teacher")
def teacher(run: Run) -> Iterator[Finding]:
    """The mean cosine of student and teacher over the training."""
    for stage in _qud_stages(run):
        cosines = stage.series("qud/mean_cosine")
        if len(cosines) < 2:
            yield Finding(
                "teacher",
                stage.name,
                "unknown",
                "metrics.json holds too few figures of QUD",
                f"{stage.iterations} steps",
                f"{2 * _FIRST} steps and two epochs",
                "Let the training go on.",
            )
            continue
        stuck = cosines[-1] < LOW_COSINE and cosines[-1] - cosines[0] < SMALL_RISE
        yield Finding(
            "teacher",
            stage.name,
            "problem" if stuck else "ok",
            "The student does not approach its teacher" if stuck else "The student's mean cosine with its teacher",
            f"from {cosines[0]:.2f} to {cosines[-1]:.2f}",
            f"a rise by {SMALL_RISE:g}, or {LOW_COSINE:g} at the end",
            "See SOLVER.BASE_LR and QUD.WEIGHT, and whether the teacher gets its own size, colours and normalisation "
            "(QUD.TEACHER)."
            if stuck
            else "",
        )


@check("queue")
def queue(run: Run) -> Iterator[Finding]:
    """How much of the queue holds embeddings of the teacher rather than its random start."""
    for stage in _qud_stages(run):
        filled = stage.series("qud/queue_filled")
        if not filled:
            continue
        verdict: Verdict = "ok" if filled[-1] == 1 else "warning"
        yield Finding(
            "queue",
            stage.name,
            verdict,
            "The queue" if verdict == "ok" else "The queue was never filled: most negatives are random directions",
            f"{filled[-1]:.0%} holds embeddings of the teacher",
            "100%",
            "" if verdict == "ok" else "Lower QUD.QUEUE_SIZE, or train for more steps.",
        )


def _qud_stages(run: Run) -> list[StageFolder]:
    """Trainings with QUD, alone or under QSD."""
    return [
        stage
        for stage in run.training
        if "QUD" in (stage.setting("MODEL.META_ARCHITECTURE"), stage.setting("QSD.BASE"))
        and stage.setting("MODEL.META_ARCHITECTURE") in ("QSD", "QUD")
    ]
