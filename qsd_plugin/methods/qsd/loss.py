"""QSD: quality self-distillation between two images of the same identity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.methods.qsd.gate import PairGate, gap_weights, pair_gate
from qsd_plugin.methods.qsd.levels import MAP_NORMS, energy_map, map_levels, vector_levels, with_known_gradient


class QSDResult(NamedTuple):
    """What :class:`QSDLoss` returns; all tensors are 0-d."""

    total: Tensor
    """Weighted sum of the levels, to be added to the host's losses."""
    levels: dict[str, Tensor]
    """Unweighted level losses, attached to the graph like ``total``; detach what is kept for logging."""
    stats: dict[str, Tensor]
    """Detached: the counts ``pairs`` and, adding up to it, ``kept``, ``dropped_low``, ``dropped_high``,
    ``dropped_unsure``, ``ties`` and ``unlabelled``; ``out_of_range``, pairs with a label outside [0, q_max];
    ``empty``, 1 if no pair was kept, else 0; ``mean_gap``; ``teacher_share_1``, the share of kept pairs that stream 1
    teaches; ``range/<level>``, the energy range R of each map level."""


class _PairLabels(NamedTuple):
    """What is known of both members of each pair, [B] each; the fields are arguments of :func:`~.gate.pair_gate`."""

    quality_1: Tensor
    quality_2: Tensor
    valid_1: Tensor | None = None
    valid_2: Tensor | None = None
    spread_1: Tensor | None = None
    spread_2: Tensor | None = None


class _Rows(NamedTuple):
    """What the levels compare, side by side: the columns of all energy maps, then those of all vectors."""

    values: Tensor
    """[B, sum of columns], float32 or float64."""
    maps: dict[str, int]
    """Columns of each map level."""
    vectors: dict[str, int]
    """Columns of each vector level."""


class QSDLoss(nn.Module):
    """Pull the features of the worse image of a pair to those of the better one, at several depths.

    ``L = sum_l w_l L_l`` over the kept pairs of :func:`~.gate.pair_gate`; 4-D taps are maps
    (:func:`~.levels.map_levels`), 2-D taps are vectors (:func:`~.levels.vector_levels`). Quality decides which image
    teaches and whether the pair counts; how much only with ``gap_power``. The teacher's taps get exactly zero gradient;
    they are the same network's unless ``teacher_taps`` come from another one, e.g. a moving average. Without a kept
    pair every level is a zero that is attached to the graph.

    Across ranks: reduces statistics. With a process group up, gate, levels and ``stats`` are those of the whole batch,
    equal on every rank; the gradient of ``total`` is this rank's part times the number of ranks, so that averaged
    gradients equal those of one process on the whole batch. Every rank must make the call, even without a pair.

    Precision: an fp32 island (autocast off, taps cast to float32; float64 stays). Nothing waits for the device.

    Args:
        level_weights: Weight w_l >= 0 of each level; the keys are the names of the taps.
        tau: Gate threshold, in [0, 1).
        q_max: Upper end of the label range, which starts at 0.
        map_distance: ``"l2"`` or ``"l1"`` between energy maps.
        scale_grad: Whether gradient flows through the energy range R of a map level: ``"attached"`` (authors') or
            ``"detached"``.
        map_norm: ``None`` (authors'), or energy maps of unit length (``"l2"``) or of root mean square 1 (``"rms"``);
            :func:`~.levels.energy_map` tells what that does to the size of the level.
        missing: ``"exclude"`` pairs with a missing label from the mean gap, or count them as a ``"tie"`` (authors').
        gap_power: Kept pairs weigh ``gap^gap_power``, scaled to mean 1 over the batch; >= 0. 0 (authors'): all alike.
        confidence: A pair is dropped if its gap is below ``confidence`` standard deviations of the difference of its
            labels, for which the call is given their spreads; >= 0. 0 (authors'): none is.
        compat_empty_test: Reproduce the authors' empty-batch test, which loses valid batches whose stream-1 labels
            are all 0.

    Raises:
        ConfigError: An option is out of its range; on call, the taps do not fit the levels or each other.

    Source: Ou et al., "Refining Uncertain Features With Self-Distillation for Face Recognition and Person
    Re-Identification", IEEE TMM 2024, doi 10.1109/TMM.2024.3358697.

    Example:
        >>> loss = QSDLoss({"layer4": 1.0, "embedding": 1.0})
        >>> result = loss(taps_1, taps_2, quality_1, quality_2)
        >>> result.total.backward()
    """

    def __init__(
        self,
        level_weights: Mapping[str, float],
        *,
        tau: float = 0.3,
        q_max: float = 100.0,
        map_distance: str = "l2",
        scale_grad: str = "attached",
        map_norm: str | None = None,
        missing: str = "exclude",
        gap_power: float = 0.0,
        confidence: float = 0.0,
        compat_empty_test: bool = False,
    ) -> None:
        super().__init__()
        _check_choice("map_distance", map_distance, ("l2", "l1"))
        _check_choice("scale_grad", scale_grad, ("attached", "detached"))
        _check_choice("missing", missing, ("exclude", "tie"))
        if map_norm is not None:
            _check_choice("map_norm", map_norm, MAP_NORMS)
        if not 0 <= tau < 1:
            raise ConfigError("QSD tau", value=tau, expected="a number in [0, 1)")
        if not 0 < q_max < math.inf:
            raise ConfigError("QSD q_max", value=q_max, expected="the positive upper end of the label range")
        for option, value in (("gap_power", gap_power), ("confidence", confidence)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"QSD {option}", value=value, expected="a finite number >= 0")
        if not level_weights:
            raise ConfigError("QSD level_weights", value={}, expected="at least one level and its weight")
        for name, weight in level_weights.items():
            if not 0 <= weight < math.inf:
                raise ConfigError(f"QSD weight of level {name!r}", value=weight, expected="a finite number >= 0")
        self.level_weights = dict(level_weights)
        self.tau = tau
        self.q_max = q_max
        self.map_distance = map_distance
        self.scale_grad = scale_grad
        self.map_norm = map_norm
        self.missing = missing
        self.gap_power = gap_power
        self.confidence = confidence
        self.compat_empty_test = compat_empty_test

    def forward(
        self,
        taps_1: Mapping[str, Tensor],
        taps_2: Mapping[str, Tensor],
        quality_1: Tensor,
        quality_2: Tensor,
        valid_1: Tensor | None = None,
        valid_2: Tensor | None = None,
        spread_1: Tensor | None = None,
        spread_2: Tensor | None = None,
        teacher_taps_1: Mapping[str, Tensor] | None = None,
        teacher_taps_2: Mapping[str, Tensor] | None = None,
    ) -> QSDResult:
        """The loss of B pairs; row i of both streams shows the same identity.

        Args:
            taps_1: Stream 1 (anchors): one tensor per level, [B, C, H, W] or [B, D].
            taps_2: Stream 2 (partners), same shapes.
            quality_1: Labels of stream 1, [B], in [0, q_max], higher is better.
            quality_2: Labels of stream 2.
            valid_1: Which labels of stream 1 exist, [B] bool; default: all.
            valid_2: Likewise for stream 2.
            spread_1: Standard deviations of the labels of stream 1, [B], NaN where unknown; for ``confidence``.
            spread_2: Likewise for stream 2.
            teacher_taps_1: What stream 1 teaches with, from another network, shapes as ``taps_1``; default: ``taps_1``.
            teacher_taps_2: Likewise for stream 2.

        Raises:
            ConfigError: A level has no tap, a tap no level, or shapes do not fit.
        """
        batch = _batch_size(quality_1, quality_2, valid_1, valid_2, spread_1, spread_2)
        streams = [taps for taps in (taps_1, taps_2, teacher_taps_1, teacher_taps_2) if taps is not None]
        for taps in streams:
            self._check_taps(taps, batch)
        for name in self.level_weights:
            shapes = [tuple(taps[name].shape) for taps in streams]
            if len(set(shapes)) > 1:
                raise ConfigError(f"QSD tap {name!r}", value=tuple(shapes), expected="the same shape in both streams")
        with _fp32_island(taps_1):
            gate = self._gate(_PairLabels(quality_1, quality_2, valid_1, valid_2, spread_1, spread_2))
            first_teaches = gate.teacher_1[:, None]
            rows_1, rows_2 = self._rows(taps_1), self._rows(taps_2)
            students = rows_1._replace(values=torch.where(first_teaches, rows_2.values, rows_1.values))
            with torch.no_grad():
                values_1 = rows_1.values if teacher_taps_1 is None else self._rows(teacher_taps_1).values
                values_2 = rows_2.values if teacher_taps_2 is None else self._rows(teacher_taps_2).values
                teachers = torch.where(first_teaches, values_1, values_2)
            return self._distil(gate, students, teachers)

    def in_batch(
        self,
        taps: Mapping[str, Tensor],
        quality: Tensor,
        pairs: tuple[Tensor, Tensor],
        valid: Tensor | None = None,
        spread: Tensor | None = None,
        teacher_taps: Mapping[str, Tensor] | None = None,
    ) -> QSDResult:
        """The loss of pairs within one batch: equals ``forward`` on gathered rows, at the cost of one stream.

        Args:
            taps: One tensor per level, [B, C, H, W] or [B, D].
            quality: Labels, [B], in [0, q_max], higher is better.
            pairs: Row indices of both members, [P] each, e.g. from :func:`~.pairing.inbatch_pairs`; may be empty.
            valid: Which labels exist, [B] bool; default: all.
            spread: Standard deviations of the labels, [B], NaN where unknown; for ``confidence``.
            teacher_taps: What the images teach with, from another network, shapes as ``taps``; default: ``taps``.

        Raises:
            ConfigError: A level has no tap, a tap no level, or shapes do not fit.
        """
        batch = _batch_size(quality, valid, spread)
        for each in (taps,) if teacher_taps is None else (taps, teacher_taps):
            self._check_taps(each, batch)
        of_pairs = (None if x is None else x.index_select(0, i) for x in (quality, valid, spread) for i in pairs)
        with _fp32_island(taps):
            gate = self._gate(_PairLabels(*of_pairs))  # type: ignore[arg-type]
            rows = self._rows(taps)
            students = rows._replace(values=_take(rows.values, torch.where(gate.teacher_1, pairs[1], pairs[0])))
            with torch.no_grad():
                values = rows.values if teacher_taps is None else self._rows(teacher_taps).values
                teachers = values.index_select(0, torch.where(gate.teacher_1, *pairs))
            return self._distil(gate, students, teachers)

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        options = ["level_weights", "tau", "q_max", "map_distance", "scale_grad", "map_norm", "missing"]
        options += ["gap_power", "confidence"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options)

    def _gate(self, labels: _PairLabels) -> PairGate:
        return pair_gate(
            **labels._asdict(),
            tau=self.tau,
            q_max=self.q_max,
            missing=self.missing,
            confidence=self.confidence,
            compat_empty_test=self.compat_empty_test,
        )

    def _distil(self, gate: PairGate, students: _Rows, teachers: Tensor) -> QSDResult:
        counts = gate.counts()
        taught_by_1, pairs = counts.pop("taught_by_1"), counts["kept"]
        stats = counts | {"mean_gap": gate.mean_gap, "teacher_share_1": taught_by_1 / pairs.clamp(min=1)}
        stats["empty"] = (pairs == 0).float()
        weight = gap_weights(gate, pairs, self.gap_power) if self.gap_power else None
        map_sizes, vector_sizes = list(students.maps.values()), list(students.vectors.values())
        kinds = [sum(map_sizes), sum(vector_sizes)]
        maps, vectors = students.values.split_with_sizes(kinds, 1)
        map_teachers, vector_teachers = teachers.split_with_sizes(kinds, 1)
        values, gradients = list[Tensor](), list[Tensor]()
        if map_sizes:
            value, gradients, ranges = map_levels(
                maps,
                map_teachers,
                map_sizes,
                gate.keep,
                pairs,
                distance=self.map_distance,
                scale_grad=self.scale_grad,
                weight=weight,
            )
            values.append(value)
            stats |= {f"range/{name}": r for name, r in zip(students.maps, ranges.unbind(), strict=True)}
        if vector_sizes:
            value, of_vectors = vector_levels(vectors, vector_teachers, vector_sizes, gate.keep, pairs, weight)
            values.append(value)
            gradients += of_vectors
        levels = with_known_gradient(torch.cat(values), students.values, gradients)
        names = [*students.maps, *students.vectors]
        by_name = dict(zip(names, levels.unbind(), strict=True))
        # Filled one by one: a list of numbers would be copied to a GPU, which the host has to wait for.
        weights = torch.stack([levels.new_full((), self.level_weights[name]) for name in names])
        return QSDResult((levels * weights).sum(), {name: by_name[name] for name in self.level_weights}, stats)

    def _rows(self, taps: Mapping[str, Tensor]) -> _Rows:
        """[B, H W] energy maps and [B, D] vectors, in float32 or float64."""
        rows = {name: taps[name] for name in self.level_weights}
        rows = {name: x if x.dtype == torch.float64 else x.float() for name, x in rows.items()}
        maps = {name: energy_map(x, self.map_norm).flatten(1) for name, x in rows.items() if x.dim() == 4}
        vectors = {name: x for name, x in rows.items() if x.dim() == 2}
        values = torch.cat([*maps.values(), *vectors.values()], 1)
        return _Rows(values, *({name: x.shape[1] for name, x in kind.items()} for kind in (maps, vectors)))

    def _check_taps(self, taps: Mapping[str, Tensor], batch: int) -> None:
        for name in taps:
            if name not in self.level_weights:
                raise ConfigError("QSD tap without a level", value=name, remedy=did_you_mean(name, self.level_weights))
        for name in self.level_weights:
            if name not in taps:
                raise ConfigError(
                    f"QSD level {name!r} has no tap",
                    value=sorted(taps),
                    expected="one tap per level",
                    remedy="Was its module called in the forward pass? A network that loops over the blocks of a stage "
                    "never calls the stage itself: tap its last block.",
                )
            shape = tuple(taps[name].shape)
            if len(shape) not in (2, 4) or shape[0] != batch:
                raise ConfigError(
                    f"QSD tap {name!r}",
                    value=shape,
                    expected=f"[{batch}, C, H, W] or [{batch}, D]",
                    remedy="Lay transformer tokens out with tokens_to_map." if len(shape) == 3 else "",
                )


def _check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(
            f"QSD {option}",
            value=value,
            expected=f"one of {', '.join(map(repr, choices))}",
            remedy=did_you_mean(str(value), choices),
        )


def _batch_size(quality: Tensor, *others: Tensor | None) -> int:
    shapes = [tuple(x.shape) for x in (quality, *others) if x is not None]
    if quality.dim() != 1 or len(set(shapes)) != 1:
        raise ConfigError("QSD labels and validity masks", value=shapes, expected="one vector of length B each")
    return quality.shape[0]


def _fp32_island(taps: Mapping[str, Tensor]) -> torch.autocast:
    return torch.autocast(next(iter(taps.values())).device.type, enabled=False)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    # Rows that occur in several pairs gather gradients. On a GPU only x[index] adds them in a fixed order; on a CPU
    # index_select does, too, and is several times faster.
    return rows.index_select(0, index) if rows.device.type == "cpu" else rows[index]
