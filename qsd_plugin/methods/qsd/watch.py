"""What is wrong with the pairs of a training, told from the means that a trainer logs now and then.

A step must not wait for the device, so nothing here looks at tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from qsd_plugin.core.errors import LabelError

#: More steps without a kept pair than this share are warned of, once there are at least ``MIN_EMPTY_STEPS``.
MAX_EMPTY_SHARE = 0.01
MIN_EMPTY_STEPS = 5
#: More pairs above the upper bound than this share are warned of.
MAX_HIGH_SHARE = 0.05
#: A mean gap, or a span of labels, below this share of ``q_max`` looks like labels on another scale.
SMALL_SHARE = 0.01

_FATES = {
    "dropped_low": "below the lower bound",
    "dropped_high": "above the upper bound",
    "dropped_unsure": "within the labels' own spread",
    "ties": "tied",
    "unlabelled": "unlabelled",
}


class PairWatch:
    """Reads the statistics of :class:`~.loss.QSDLoss`, averaged over steps, and warns once of each thing that is wrong.

    Args:
        q_max: Upper end of the label range.
    """

    def __init__(self, q_max: float = 100.0) -> None:
        self.q_max = q_max
        self._totals: Counter[str] = Counter()
        self._said: set[str] = set()

    def update(self, means: Mapping[str, float], steps: int) -> list[str]:
        """Take down the means of the last ``steps`` steps.

        Args:
            means: Of the loss's ``stats``, by the same names; others are ignored.
            steps: How many steps they are the means of.

        Returns:
            New warnings, often none.

        Raises:
            LabelError: Labels lay outside [0, q_max].
        """
        period = {name: round(means[name] * steps) for name in (*_FATES, "pairs", "kept", "empty", "out_of_range")}
        if period["out_of_range"]:
            raise LabelError(
                f"Quality labels: {period['out_of_range']} of {period['pairs']} pairs of the last {steps} steps have a "
                "label out of range",
                expected=f"labels in [0, {self.q_max:g}]",
                remedy="Let the quality source return scores on that scale, or rescale the labels (QUALITY.SCALE).",
            )
        self._totals.update(period | {"steps": steps})
        found = self._labels(period, means["mean_gap"], steps) | self._pairs(self._totals)
        new = [text for kind, text in found.items() if kind not in self._said]
        self._said.update(found)
        return new

    def _labels(self, period: Mapping[str, int], mean_gap: float, steps: int) -> dict[str, str]:
        labelled = period["pairs"] - period["unlabelled"]
        if labelled and period["ties"] == labelled:
            return {
                "constant": f"QSD: the labels of all {labelled} labelled pairs of the last {steps} steps are tied. A "
                "source that gives every image the same quality teaches nothing."
            }
        if 0 < mean_gap < SMALL_SHARE * self.q_max:
            return {
                "scale": f"QSD: the mean label gap is {mean_gap:.3g} on a scale from 0 to {self.q_max:g}. If the "
                "labels are on another scale, the upper bound of the gate never acts: rescale them."
            }
        return {}

    def _pairs(self, total: Mapping[str, int]) -> dict[str, str]:
        found = {}
        if total["empty"] >= MIN_EMPTY_STEPS and total["empty"] > MAX_EMPTY_SHARE * total["steps"]:
            fates = ", ".join(f"{total[name]} {text}" for name, text in _FATES.items())
            found["empty"] = (
                f"QSD: {total['empty']} of {total['steps']} steps ({total['empty'] / total['steps']:.1%}) had no pair "
                f"to learn from. Of {total['pairs']} pairs {total['kept']} were kept; {fates}. Look at the labels, "
                "QSD.TAU, QSD.CONFIDENCE and the images per identity in a batch."
            )
        if total["dropped_high"] > MAX_HIGH_SHARE * total["pairs"]:
            found["high"] = (
                f"QSD: the gate's upper bound drops {total['dropped_high']} of {total['pairs']} pairs "
                f"({total['dropped_high'] / total['pairs']:.1%}), those with the clearest difference in quality; usual "
                "are 0 to 4 %. Look at the distribution of the labels (QUALITY.SCALE), or lower QSD.TAU."
            )
        return found
