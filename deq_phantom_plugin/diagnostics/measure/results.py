"""The numbers of a report, as dataclasses. `show` prints and draws them."""

from __future__ import annotations

from dataclasses import dataclass

from ...strategies.candidates import Candidate

COMPARABLE = 1e-2
"""The largest residual of a reference with which others are compared. A solve in 16 bits can reach
it."""


@dataclass(frozen=True)
class StrategyResult:
    """The gradient of one strategy: how good it is, and what it costs.

    Attributes:
        strategy: the strategy, as a spec with all its arguments.
        cosine: the cosine of dL/dtheta to the reference's.
        relative_error: ||dL/dtheta - reference|| / ||reference||.
        norm: ||dL/dtheta||.
        residual: ||v - (I - J^T) g|| / ||v|| at h*, of the g behind the gradient.
        forward_seconds: the median time to attach the strategy to the solved equilibrium.
        backward_seconds: the median time from dL/dh to dL/dtheta.
        time_spread: the longest of the timed runs, forward and backward, over the shortest.
        n_evaluations: the number of calls of F. Those of the solve count only if the strategy owns
            it.
        n_vjp: the number of backward passes through F, with the one to the parameters.
        peak_bytes: the most memory that the strategy held, forward and backward, above what was
            there before.
        damped_radius: rho(lam J + (1 - lam) I), the largest of the batch; None for a strategy
            without a fixed `lam`.
        second_order_error: the relative error of a second derivative of L. None unless it was asked
            for, and the strategy has one.
        error: what went wrong, in words. Then all numbers above are None.
        label: the spec as it was typed, for tables and figures.
    """

    strategy: str
    cosine: float | None = None
    relative_error: float | None = None
    norm: float | None = None
    residual: float | None = None
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    time_spread: float | None = None
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
    """The numbers on one equilibrium: its state, the reference gradient, and every strategy.

    Attributes:
        name: the name of the equilibrium.
        batch_size: the number of samples; None where they are one coupled system.
        elements: the number of elements of the state, all samples together.
        parameters: the number of elements of the parameters that F depends on.
        dtype: the dtype of the state.
        device: the device of the state.
        forward_residual: ||F(h) - h|| / ||F(h)||, the whole batch together.
        nfe: the evaluations of F that the solve took; None where not known.
        batch_dim: what the context says about samples, see `Context.batch_dim`.
        samples_are_coupled: whether F mixes the samples along that dimension.
        map_difference: ||F(h) - F(h)|| / ||F(h)|| of two evaluations at the same state; zero where
            rounding can account for it.
        map_reasons: what in F draws at random or updates buffers, if there is a difference.
        reference: the method of the reference gradient, as a spec.
        reference_residual: ||v - (I - J^T) g|| / ||v|| of the reference itself.
        reference_norm: ||dL/dtheta|| of the reference.
        radius: rho(J), the largest of the batch.
        damped_radii: rho(lam J + (1 - lam) I) for each lam, the largest of the batch.
        results: one per strategy.
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
    """What `tune` chose at one equilibrium of a model.

    Attributes:
        name: the name of the equilibrium.
        samples: the number of samples that were judged, all batches together.
        spec: the spec of the chosen strategy, to copy.
        cosine: the cosine of its g to the reference's that at least 90 % of the samples reach; None
            where there was no reference to compare with.
        cost: the cost of the backward pass in evaluations of F, where a backward pass through F
            counts as two. None where it was not measured.
        why: the reason of the choice, in words.
        candidates: the methods that may be taken, judged; empty where there was no reference.
    """

    name: str
    samples: int
    spec: str
    cosine: float | None
    cost: float | None
    why: str
    candidates: list[Candidate]
