"""``config.qsd_plugin``: which methods an arcface_torch run uses, and their options, each with unit and range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from qsd_plugin.core.errors import ConfigError, did_you_mean

#: The key of the host's config that everything below lies under.
KEY = "qsd_plugin"
METHODS = ("QSD", "QGFace", "AdaFace", "QUD")
#: Options by which other trainers change a method from epoch to epoch; refused wherever they turn up.
PHASES = (
    *("start_epoch", "stop_epoch", "warmup_epochs", "contrast_start_epoch", "contrast_stop_epoch"),
    *("threshold_warmup_epochs", "freeze_epochs", "queue_grow_epochs"),
)

T = TypeVar("T")


@dataclass(frozen=True)
class AdaFaceOptions:
    """``adaface``: the margin that follows the norm of the embedding (Kim et al., CVPR 2022)."""

    # m, on angle and cosine. >= 0.
    margin: float = 0.4
    # Concentration of the margin scaler. > 0.
    h: float = 0.333
    # s. > 0.
    scale: float = 64.0
    # Weight of the new batch in the norm statistics (t_alpha). Above 0, up to 1.
    momentum: float = 0.01
    # exact: the margin is differentiated (AdaFace's program). straight_through: as arcface_torch does with ArcFace's.
    gradient: str = "exact"


@dataclass(frozen=True)
class QSDOptions:
    """``qsd``: quality self-distillation between two images of an identity (Ou et al., TMM 2024)."""

    # What an image is paired with. identity: another image of the same person. degraded: a degraded view of itself.
    partner: str = "identity"
    # Where quality comes from. file: labels. norm: length of the embedding among its moving mean and deviation, 0-100.
    quality: str = "file"
    # Label file (tools/quality_labels.py); keys such as train#17 for records. With quality="file".
    labels: str = ""
    # none | minmax | rank: scale of the labels, fitted to the file. minmax: 0 to 100.
    label_scale: str = "minmax"
    # none | shuffle | reverse: scientific controls.
    control: str = "none"
    # Smallest share of training images that must have a label. 0 to 1.
    min_coverage: float = 0.99
    # Factor of the whole term. >= 0.
    weight: float = 1.0
    # official | legacy | author_demo | recommended: level weights and options of the loss.
    preset: str = "official"
    # Weight of each level by module path; "" is the embedding. {}: the levels of the network with the preset's weights.
    levels: dict[str, float] = field(default_factory=dict)
    # Gate threshold tau. 0 <= tau < 1.
    tau: float = 0.3
    # Which images the softmax sees: anchor (official), or both of a pair (twice the batch).
    classify: str = "anchor"


@dataclass(frozen=True)
class TeacherOptions:
    """``qud.teacher``: the frozen network whose embeddings are learned. ``network`` and ``weights``, or ``onnx``."""

    # A name that the host's get_model knows, such as "r50".
    network: str = ""
    # Its state dict: model.pt of a run, or a published backbone.
    weights: str = ""
    # An ONNX file instead.
    onnx: str = ""
    # ONNX only. Side of its images in pixels; 0: what the file says.
    size: int = 0
    # ONNX only. Subtracted from pixel values 0 to 255; 0 if the model normalises by itself.
    mean: float = 127.5
    # ONNX only. Divides what is left. > 0; 1 if the model normalises by itself.
    std: float = 127.5
    # ONNX only. RGB | BGR.
    colour: str = "RGB"


@dataclass(frozen=True)
class QUDOptions:
    """``qud``: distillation with a queue of teacher embeddings (Kolf et al., BMVC 2024)."""

    # The teacher, see TeacherOptions.
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    # qud | soft (SEED) | mse | cosine.
    loss: str = "qud"
    # Entries of the queue (n); at least the images of a step on all processes. The paper's is 1024.
    queue_size: int = 1024
    # tau. > 0; the paper's is 0.1.
    temperature: float = 0.1
    # Factor of the term. >= 0.
    weight: float = 1.0
    # False: the term is the only one, and there are no class rows, unless another method needs them. True: add the
    # host's margin softmax.
    classify: bool = False


@dataclass(frozen=True)
class QGFaceOptions:
    """``qgface``: margin for good images, contrast for poor ones (Song and Wang, arXiv 2312.17494)."""

    # b: quality below which an image is contrasted instead of classified. 0 to 1; 0: no gate.
    threshold: float = 0.2
    # lambda, factor of the contrastive loss. >= 0.
    contrast_weight: float = 1.0
    # figure (the README's, recommended) | code_default: settings of the contrastive branch.
    profile: str = "figure"
    # Slots of the queue; at least two per image of a step on all processes.
    queue_size: int = 8192
    # Move entries along with their class centres: one reduction of the queue's size per step between processes.
    compensate: bool = True
    # m, on angle and cosine. >= 0.
    margin: float = 0.4
    # Concentration of the margin scaler. > 0.
    h: float = 0.333
    # s. > 0.
    scale: float = 64.0
    # Weight of the new batch in the norm statistics. Above 0, up to 1.
    momentum: float = 0.01
    # exact | straight_through, as in AdaFaceOptions.
    gradient: str = "exact"
    # Of the degraded view: probabilities of a crop, of photometric changes, of a rotation. 0 to 1.
    crop_probability: float = 0.2
    photometric_probability: float = 0.2
    rotation_probability: float = 0.0


@dataclass(frozen=True)
class Options:
    """``config.qsd_plugin`` as a whole."""

    # Any of METHODS; empty: plain arcface_torch.
    methods: tuple[str, ...] = ()
    # Of the host's own ArcFace margin. straight_through (the host's) | exact (its derivative, as in the paper).
    margin_gradient: str = "straight_through"
    adaface: AdaFaceOptions = field(default_factory=AdaFaceOptions)
    qsd: QSDOptions = field(default_factory=QSDOptions)
    qud: QUDOptions = field(default_factory=QUDOptions)
    qgface: QGFaceOptions = field(default_factory=QGFaceOptions)

    @property
    def paired(self) -> str:
        """What each image is loaded with: ``identity``, ``degraded``, or nothing (``""``)."""
        if "QGFace" in self.methods:
            return "degraded"
        return self.qsd.partner if "QSD" in self.methods else ""

    @property
    def classified(self) -> bool:
        """Whether there is a softmax over classes."""
        return self.methods != ("QUD",) or self.qud.classify


def read_section(kind: type[T], given: Mapping[str, Any], where: str) -> T:
    """Options of a kind out of a config's dict, numbers and names of the right type.

    Raises:
        ConfigError: An option is unknown (the nearest names are suggested), of another type, or changes with time.
    """
    known = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in PHASES:
            raise ConfigError(
                f"{where} {name}",
                value=value,
                expected="settings that hold from the first step to the last",
                remedy="arcface_torch fixes the graph at its first step (static graph): a method cannot start, stop or "
                "thaw later. Train two runs, the second from the first one's model.pt.",
            )
        if name not in known:
            raise ConfigError(f"{where}: unknown option", value=name, remedy=did_you_mean(str(name), known))
        values[name] = _value(getattr(kind(), name), value, f"{where} {name}")
    return kind(**values)


def _value(default: Any, value: Any, where: str) -> Any:
    if hasattr(default, "__dataclass_fields__"):
        if not isinstance(value, Mapping):
            raise ConfigError(where, value=value, expected="dict(...)")
        return read_section(type(default), value, where)
    if isinstance(default, bool) or not isinstance(default, int | float):
        expected: Any = Mapping if isinstance(default, dict) else type(default)
        right = isinstance(value, expected)
        name = {Mapping: "dict", tuple: "list"}.get(expected, getattr(expected, "__name__", ""))
    else:
        whole = isinstance(default, int)
        right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        name = "whole number" if whole else "number"
    if not right:
        raise ConfigError(where, value=value, expected=f"a {name}")
    return dict(value) if isinstance(default, dict) else value
