"""What a temperature means for a queue of given size: where the pull towards the teacher fades.

Closed forms for negatives in random directions, whose cosine has mean 0 and variance 1/D. Symbols: n entries in the
queue, D embedding size, tau temperature. Source: derived from Eq. 2 of Kolf et al., "QUD", BMVC 2024.
"""

from __future__ import annotations

import math

from qsd_plugin.core.errors import ConfigError

#: Half-saturation cosine of the paper's setting (temperature 0.1, 1024 entries of 512 numbers).
PAPER_COSINE = 0.70
#: Below this half-saturation cosine the pull fades early: the paper's weakest row, temperature 0.06, has 0.43.
LOW_COSINE = 0.5


def half_saturation_cosine(temperature: float, size: int, dim: int) -> float:
    """Cosine between student and teacher at which the pull has fallen to one half, ``tau ln(n e^(1 / (2 D tau^2)))``.

    There the positive's probability is 1/2. Above 1 the pull never fades, and the loss acts like a cosine regression.

    Args:
        temperature: tau > 0.
        size: n >= 1.
        dim: D >= 1.

    Raises:
        ConfigError: An argument is out of range.
    """
    check_temperature(temperature)
    _check_sizes(size, dim)
    return temperature * math.log(size) + 1 / (2 * dim * temperature)


def temperature_for(cosine: float, size: int, dim: int) -> float:
    """The temperature whose :func:`half_saturation_cosine` is ``cosine``; of the two, the one that grows with it.

    Args:
        cosine: At least ``sqrt(2 ln(n) / D)``, the smallest there is.
        size: n >= 2.
        dim: D >= 1.

    Raises:
        ConfigError: No temperature has that half-saturation cosine, or an argument is out of range.
    """
    _check_sizes(size, dim, smallest=2)
    smallest = _smallest_cosine(size, dim)
    if not smallest <= cosine < math.inf:
        raise ConfigError(
            f"QUD half-saturation cosine for a queue of {size} entries of {dim} numbers",
            value=cosine,
            expected=f"at least {smallest:.3f}",
        )
    # tau ln n + 1 / (2 D tau) = c is quadratic in tau.
    return (cosine + math.sqrt(max(cosine**2 - smallest**2, 0.0))) / (2 * math.log(size))


def loss_floor(temperature: float, size: int, dim: int) -> float:
    """The loss of a student that equals its teacher, ``log(1 + n e^(1 / (2 D tau^2)) e^(-1 / tau))``.

    Args:
        temperature: tau > 0.
        size: n >= 1.
        dim: D >= 1.

    Raises:
        ConfigError: An argument is out of range.
    """
    exponent = (half_saturation_cosine(temperature, size, dim) - 1) / temperature
    return max(exponent, 0.0) + math.log1p(math.exp(-abs(exponent)))


def temperature_note(temperature: float, size: int, dim: int) -> str:
    """One line for the log of a run: the half-saturation cosine, and what is odd about it.

    Args:
        temperature: tau > 0.
        size: n >= 1.
        dim: D >= 1.

    Raises:
        ConfigError: An argument is out of range.
    """
    cosine = half_saturation_cosine(temperature, size, dim)
    text = f"QUD: temperature {temperature:g}, queue {size} x {dim}: half-saturation cosine {cosine:.2f}"
    if LOW_COSINE <= cosine < 1:
        return f"{text}."
    text += (
        ": the pull towards the teacher never fades, much like a plain cosine loss."
        if cosine >= 1
        else ": the pull fades while the student is still far from its teacher."
    )
    if size < 2 or _smallest_cosine(size, dim) > PAPER_COSINE:
        return text
    advised = temperature_for(PAPER_COSINE, size, dim)
    return f"{text} The paper's setting has {PAPER_COSINE:.2f}, here that is temperature {advised:.3g}."


def check_temperature(temperature: float, name: str = "temperature") -> None:
    """Refuse a temperature that is not a positive number.

    Raises:
        ConfigError: It is not.
    """
    if not 0 < temperature < math.inf:
        raise ConfigError(f"QUD {name}", value=temperature, expected="a finite number above 0")


def _smallest_cosine(size: int, dim: int) -> float:
    return math.sqrt(2 * math.log(size) / dim)


def _check_sizes(size: int, dim: int, smallest: int = 1) -> None:
    if size < smallest or dim < 1:
        raise ConfigError("QUD queue size and dimension", value=(size, dim), expected=f"at least {smallest} and 1")
