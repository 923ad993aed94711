"""Advice that follows from the numbers of a report, in sentences.

First come doubts about the numbers themselves, then damping, then the methods that were measured.
"""

from __future__ import annotations

import math

from ...inspection import REMEDY, in_words
from ...strategies.measurement import POOR_REFERENCE
from ..measure.results import Measurement, StrategyResult

_GOOD_COSINE = 0.99
_AS_CHEAP = 1.1  # the ratio of times up to which two methods count as equally fast
_POOR_SOLVE = 1e-2
_MANY_STEPS = 40


def recommend(report: Measurement) -> list[str]:
    """Return sentences that follow from the numbers of a report.

    Whether damping helps is judged by the measured radii of lam J + (1 - lam) I for several lam,
    and never by rho(J). Damping brings an eigenvalue of -1.4 into the unit circle, and never one of
    1.4.
    """
    if report.map_difference > 0:  # then each number belongs to another map, and advises nothing
        return _caveats(report)
    sentences = [*_caveats(report), _about_damping(report)]
    if report.reference_norm == 0:
        sentences.append("The gradient is zero here, so directions cannot be compared.")
        return sentences
    if not report.reference_is_good:
        return sentences
    return [*sentences, *_about_results(report)]


def _caveats(report: Measurement) -> list[str]:
    """Return what makes the numbers doubtful: of the map, of the solve, or of the reference."""
    found = []
    random = report.map_difference > 0
    if random:  # then residuals say nothing about solves or precision
        found.append(
            f"F is not deterministic: {in_words(report.map_difference, report.map_reasons)}. "
            "So F has no equilibrium, and every number here belongs to another draw of F. "
            f"{REMEDY}"
        )
    if report.forward_residual > _POOR_SOLVE and not random:
        found.append(
            f"The equilibrium is solved only to a relative residual of "
            f"{report.forward_residual:.1e}. So every gradient here, also the reference, is taken "
            "at a point that is not h*. Tighten the forward solve first. A loop that is short by "
            "design, as that of a recursive model, need not come near h*. Compare its gradients "
            "with tbptt(k='all'), which is backpropagation through the loop."
        )
    if report.samples_are_coupled and report.batch_dim == "auto":
        found.append(
            "F mixes the samples of a batch (batch normalisation, attention over the batch, nodes "
            "of a graph?). So the reference and every method here treat the batch as one system, "
            "as with batch_dim=None."
        )
    elif report.samples_are_coupled:
        found.append(
            "F mixes the samples of a batch (batch normalisation?), which were said to be "
            "independent. The reference treats the batch as one system. Methods that solve each "
            "sample by itself, such as ift and exact, are off. Use a norm without batch "
            "statistics, or batch_dim=None in the context."
        )
    if not (report.reference_residual <= POOR_REFERENCE or random):
        meaning = (
            "cosines and errors compare with a gradient that is not exact"
            if report.reference_is_good
            else "it is not the exact gradient, so the others are not compared with it"
        )
        found.append(
            f"The reference itself has a residual of {report.reference_residual:.1e}: {meaning}. "
            "Float64 helps, or a better conditioned F."
        )
    return found


def _about_damping(report: Measurement) -> str:
    """Return whether damping helps, and which lam and k to try."""
    lam, radius = min(report.damped_radii.items(), key=lambda item: item[1])
    plain = f"rho(dF/dh) is {report.radius:.3g}"
    if radius >= 1:
        return (
            f"{plain}, and no damping factor brings the map's radius below 1 (lowest: "
            f"{radius:.4f} at lam={lam:g}), as an eigenvalue lies at or beyond 1. So "
            "phantom gradients get worse with every step here. Use ift, or few steps, and "
            "regularise with dpp.jacobian_reg."
        )
    steps = 1 if radius < 1e-3 else max(1, math.ceil(math.log(0.1) / math.log(radius)))
    told = f"{plain}; with lam={lam:g} the damped map's radius is {radius:.3g}"
    if steps > _MANY_STEPS:
        return (
            f"{told}. That is close to 1: a phantom gradient may need up to {steps} steps to come "
            "within 10 % of the exact one. Compare ift, or regularise with dpp.jacobian_reg."
        )
    return (
        f"{told}, the lowest of all lam. A phantom gradient of k steps then has a relative error "
        f"of about {radius:.2g}^k, which is 10 % or less at k={steps}. Try "
        f"npg(k={steps}, lam={lam:g}), or upg for robustness."
    )


def _about_results(report: Measurement) -> list[str]:
    """Return which methods point uphill, and which is the cheapest that is good enough."""
    usable = [r for r in report.results if r.cosine is not None and not math.isnan(r.cosine)]
    if not usable:
        return ["No method gave a gradient."]
    found = []
    uphill = [r.label for r in usable if _cosine(r) <= 0]
    if uphill:
        found.append(f"Not a descent direction: {', '.join(uphill)}.")
    good = [r for r in usable if _cosine(r) >= _GOOD_COSINE]
    if not good:
        best = max(usable, key=_cosine)
        found.append(
            f"None of the methods measured reaches a cosine of {_GOOD_COSINE}; the best is "
            f"{best.label} with {_cosine(best):.3f}."
        )
        return found
    fastest = min(map(_seconds, good))
    # Times this near to one another may come out the other way round in the next report.
    cheapest = max((r for r in good if _seconds(r) <= _AS_CHEAP * fastest), key=_cosine)
    text = (
        f"Of the methods measured, {cheapest.label} is the cheapest with a cosine of at least "
        f"{_GOOD_COSINE}: {_cosine(cheapest):.4f} in {1e3 * _seconds(cheapest):.3g} ms"
    )
    best = max(usable, key=_cosine)
    if best is not cheapest and _seconds(best) > _AS_CHEAP * _seconds(cheapest):
        text += (
            f", {_seconds(best) / _seconds(cheapest):.1f} times as fast as the most accurate, "
            f"{best.label} ({_cosine(best):.4f})"
        )
    return [*found, text + "."]


def _cosine(result: StrategyResult) -> float:
    return -1.0 if result.cosine is None else result.cosine


def _seconds(result: StrategyResult) -> float:
    return (result.forward_seconds or 0.0) + (result.backward_seconds or 0.0)
