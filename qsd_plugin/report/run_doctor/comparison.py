"""Is the method better than the same fine-tuning without it?"""

from __future__ import annotations

from collections.abc import Iterator

from qsd_plugin.report.run_doctor.findings import Finding, Verdict
from qsd_plugin.report.run_doctor.registry import check
from qsd_plugin.report.run_doctor.run_files import Run, StageFolder

#: Points of mAP that a method may lie below its control before it counts as worse; seeds alone differ by about as much.
WORSE_BY = 1.0
#: Names of the arms that are no method.
CONTROL, BASELINE = "control", "baseline"
_SAME_STEPS = ("SOLVER.BASE_LR", "SOLVER.MAX_EPOCH", "SOLVER.IMS_PER_BATCH", "SOLVER.SCHED", "SOLVER.WARMUP_ITERS")


@check("control")
def control(run: Run) -> Iterator[Finding]:
    """Compare the recipe's last training with the control of the same steps and with the baseline."""
    name = run.recipe_name
    method = run.stage(name)
    if method is None or name != "qsd":  # the others train from scratch: their controls are arms of an experiment
        return
    scores = _scores(run)
    for test, arms in scores.items():
        yield from _against(method, test, arms)
    if not scores:
        sentence, step = "No arm has been evaluated", "Let the recipe run to its end."
        yield Finding("control", name, "unknown", sentence, "no results.json", next_step=step)
    reference = run.stage(CONTROL)
    if reference is None:
        yield Finding(
            "control",
            name,
            "warning",
            "No control was run, so a gain may be the fine-tuning's and not the method's",
            "no stage control",
            "one",
            "Set RECIPE.CONTROL True and give the same command again: finished stages are skipped.",
        )
    else:
        yield _same_steps(method, reference)


def _scores(run: Run) -> dict[str, dict[str, float]]:
    """mAP in percent by test set and arm: the report's, else the host's of each stage (one mean over the test sets)."""
    report = run.stage("report")
    tests = ((report.results if report else None) or {}).get("tests", {})
    if tests:
        return {
            name: {arm: float(groups["all"]["mAP"]) for arm, groups in test["arms"].items() if "all" in groups}
            for name, test in tests.items()
        }
    arms = {
        stage.name: float(stage.results["mAP"]) for stage in run.training if stage.results and "mAP" in stage.results
    }
    return {"the host's evaluation": arms} if arms else {}


def _against(method: StageFolder, test: str, arms: dict[str, float]) -> Iterator[Finding]:
    if method.name not in arms:
        return
    own = arms[method.name]
    step = "See the pairs, the loss and the labels; lower QSD.WEIGHT; repeat with other SEEDs before believing either."
    for other in (CONTROL, BASELINE):
        if other not in arms:
            continue
        gain = own - arms[other]
        worse = gain < -WORSE_BY
        sentence = f"On {test} {method.name} is worse than {other}" if worse else f"On {test}"
        figure = f"mAP {own:.1f}, {other} {arms[other]:.1f} ({gain:+.1f})"
        # The baseline was not trained for these steps: the comparison that counts is the control's.
        verdict: Verdict = "ok" if not worse else "problem" if other == CONTROL or CONTROL not in arms else "warning"
        limit = f"-{WORSE_BY:g}; one seed cannot tell smaller differences"
        yield Finding("control", method.name, verdict, sentence, figure, limit, step if worse else "")


def _same_steps(method: StageFolder, reference: StageFolder) -> Finding:
    differing = [key for key in _SAME_STEPS if method.setting(key) != reference.setting(key)]
    shown = [f"{key} {reference.setting(key)} there, {method.setting(key)} here" for key in differing]
    if method.iterations != reference.iterations and method.iterations and reference.iterations:
        shown.append(f"{reference.iterations} steps there, {method.iterations} here")
    return Finding(
        "control",
        method.name,
        "problem" if shown else "ok",
        "The control was not trained like the method, so the two cannot be compared" if shown else "The control had",
        "; ".join(shown) or f"the same {method.iterations} steps",
        "no difference" if shown else "",
        "Run both again with --from-stage control." if shown else "",
    )
