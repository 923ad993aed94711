"""The numbers of a report, without a word on them."""

from __future__ import annotations

from dataclasses import dataclass

from ...strategies.candidates import Candidate

COMPARABLE = 1e-2
"""Residual of a reference up to which others are compared with it at all; 16 bits reach it."""


@dataclass(frozen=True)
class StrategyResult:
    """What one strategy's gradient was, and what it cost.

    Attributes:
        strategy: the strategy, as a spec with all its arguments.
        cosine: of dL/dtheta to the reference's.
        relative_error: ||dL/dtheta - reference|| / ||reference||.
        norm: ||dL/dtheta||.
        residual: ||v - (I - J^T) g|| / ||v|| of the g behind it, at h*.
        forward_seconds: median time to attach it to the solved equilibrium.
        backward_seconds: median time from dL/dh to dL/dtheta.
        n_evaluations: calls of F, the solve not counted unless the strategy owns it.
        n_vjp: backward passes through F, the one to the parameters included.
        peak_bytes: most memory it held, forward and backward, above what was there before.
        damped_radius: rho(lam J + (1 - lam) I), the largest of the batch, where it has a `lam`.
        second_order_error: relative error of a second derivative of L, where that was asked for
            and the strategy has one.
        error: what went wrong, and then all numbers above are None.
        label: the spec as it was typed, for tables and figures.
    """

    strategy: str
    cosine: float | None = None
    relative_error: float | None = None
    norm: float | None = None
    residual: float | None = None
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    n_evaluations: int | None = None
    n_vjp: int | None = None
    peak_bytes: int | None = None
    damped_radius: float | None = None
    second_order_error: float | None = None
    error: str | None = None
    label: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.strategy)


@dataclass(frozen=True)
class Measurement:
    """An equilibrium, the reference gradient there, and what every strategy does.

    Attributes:
        name: of the equilibrium.
        batch_size: samples; None where they are one coupled system.
        elements: of the state, all samples together.
        parameters: elements of the parameters that F depends on.
        dtype: of the state.
        device: of the state.
        forward_residual: ||F(h) - h|| / ||F(h)||, the whole batch together.
        nfe: evaluations of F that the solve took; None where not known.
        batch_dim: what the context says of samples, see `Context.batch_dim`.
        samples_are_coupled: whether F mixes the samples along that dimension.
        map_difference: ||F(h) - F(h)|| / ||F(h)|| of two evaluations at the same state, zero where
            rounding can account for it.
        map_reasons: what in F draws at random or updates buffers, where there is a difference.
        reference: the method of the reference gradient.
        reference_residual: ||v - (I - J^T) g|| / ||v|| of the reference itself.
        reference_norm: ||dL/dtheta|| of the reference.
        radius: rho(J), the largest of the batch.
        damped_radii: rho(lam J + (1 - lam) I) for each lam, the largest of the batch.
        results: one a strategy.
    """

    name: str
    batch_size: int | None
    elements: int
    parameters: int
    dtype: str
    device: str
    forward_residual: float
    nfe: int | None
    batch_dim: int | str | None
    samples_are_coupled: bool
    map_difference: float
    map_reasons: list[str]
    reference: str
    reference_residual: float
    reference_norm: float
    radius: float
    damped_radii: dict[float, float]
    results: list[StrategyResult]

    @property
    def reference_is_good(self) -> bool:
        """Whether the reference is near enough to the exact gradient to compare others with it."""
        return self.reference_residual <= COMPARABLE


@dataclass(frozen=True)
class TunedEquilibrium:
    """What was found at one equilibrium of a model.

    Attributes:
        name: of the equilibrium.
        samples: that were looked at, all batches together.
        spec: of the strategy, to copy.
        cosine: of its g to the reference's, which at least 90 % of the samples reach; None where
            there was no reference to compare with.
        cost: evaluations of F that it counts as beside the solve, a backward pass as two.
        why: in words.
        candidates: the methods, judged; none where there was no reference.
    """

    name: str
    samples: int
    spec: str
    cosine: float | None
    cost: float | None
    why: str
    candidates: list[Candidate]
