"""Theorem 3 on a toy problem: SGD with gradients whose error is at most eps.

    python examples/sgd_convergence.py [--quick] [--out FOLDER]

The problem. The equilibrium h* = W h* + P theta + x is S (P theta + x) with S = (I - W)^-1. The
risk R(theta) is the mean of ||h* - y||^2 / 2 over 64 pairs (x, y). It is quadratic and strongly
convex. Its gradient, smoothness l, minimum m and noise are known in closed form. theta has half as
many numbers as h, so h* - y does not vanish at the minimum, and SGD with a biased gradient
converges to another point. SGD draws one pair per step, with step sizes eta_n = 1 / (l sqrt(n)), in
32 runs.

What is measured, as the mean over the runs and for every N:

    M_N = E [sum_n eta_n ||grad R(theta_n)||^2 / sum_n eta_n],  n = 1 ... N,

(a) for the exact gradient plus a vector of norm eps in one fixed direction, and (b) for strategies
of this package through `dpp.attach`. In (b), eps is the largest error in any step of any run.

The theorem (Geng et al., NeurIPS 2021, supplement) guarantees M_N = O(eps + log N / sqrt(N)), by

    M_N <= G eps + (R(theta_1) - m) / sum_n eta_n + K sum_n eta_n^2 / sum_n eta_n       (A-41)

with K = l ((G + eps)^2 + 2 M + 2 d eps^2) / 2. Here d is the number of numbers in theta, M is the
trace of the gradient's covariance, and ||grad R(theta_n)|| never exceeds G. This G is computed
before the runs. In the eigenbasis of the Hessian, a step is

    g_j <- g_j - eta_n l_j (g_j + noise_j - error_j)   with   eta_n l_j <= 1.

So |g_j| stays below the larger of its start and |noise_j| + eps.

What the results show. M_N stays below the bound. The bound is loose: after 20,000 steps by a factor
of 5 with eps = 0, and of up to 26 otherwise. There are two reasons. K charges every step with the
largest gradient, and G eps assumes an error that always opposes the largest gradient. Where SGD
settles, the gradient is only as large as the mean error. So M_N levels off at eps^2 in (a), and
lower in (b), where eps is the error of the worst sample. Without an error, M_N falls a little
faster than log N / sqrt(N). Over these steps most of M_N comes from the way from the start, which
falls as 1 / sqrt(N).
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.extras import require
from deq_phantom_plugin._plumbing.output import text_table, write_whole

RUNS = 32
PERTURBATIONS = (0.0, 0.1, 0.3, 1.0)
STRATEGIES = (
    "npg(k=8, lam=1.0)",
    "upg(k=8, lam=0.5)",
    "npg(k=4, lam=1.0)",
    "npg(k=2, lam=1.0)",
    "jfb",
)

Oracle = Callable[[Tensor, Tensor], Tensor]
"""Maps theta, shape (RUNS, d), and one sample's index per run to gradients, shape (RUNS, d)."""


@dataclass(frozen=True)
class Toy:
    """A linear equilibrium, for which the risk and its derivatives are known in closed form.

    Attributes:
        weight: W, shape (D, D), with ||W|| = 0.9.
        inject: P, shape (D, d).
        x: inputs, shape (64, D).
        y: targets, shape (64, D).
    """

    weight: Tensor
    inject: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def draw(cls, seed: int = 0, size: int = 12, params: int = 6, samples: int = 64) -> Toy:
        """Return a random problem.

        Args:
            seed: the seed.
            size: D, the size of h.
            params: d, the size of theta.
            samples: the number of pairs (x, y).
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        weight = normal(size, size)
        weight *= 0.9 / torch.linalg.matrix_norm(weight, 2)
        inject = torch.linalg.qr(normal(size, params)).Q
        x, mean = 0.2 * normal(samples, size), normal(size)
        return cls(weight, inject, x, mean + 0.2 * normal(samples, size))

    @cached_property
    def inverse(self) -> Tensor:
        """S = (I - W)^-1."""
        identity = torch.eye(len(self.weight), dtype=torch.float64)
        inverse: Tensor = torch.linalg.inv(identity - self.weight)
        return inverse

    @cached_property
    def jacobian(self) -> Tensor:
        """dh*/dtheta = S P, shape (D, d)."""
        return self.inverse @ self.inject

    @cached_property
    def hessian(self) -> Tensor:
        """The Hessian of R, shape (d, d); it is constant."""
        return self.jacobian.mT @ self.jacobian

    @cached_property
    def smoothness(self) -> float:
        """l, the largest eigenvalue of the Hessian."""
        return float(torch.linalg.eigvalsh(self.hessian)[-1])

    def residuals(self, theta: Tensor) -> Tensor:
        """Return h* - y of all samples for one theta, shape (64, D)."""
        return (self.inject @ theta + self.x) @ self.inverse.mT - self.y

    def risk(self, theta: Tensor) -> float:
        """Return R(theta)."""
        return float(self.residuals(theta).square().sum(1).mean() / 2)

    @cached_property
    def minimiser(self) -> Tensor:
        """The theta at which grad R is zero, shape (d,)."""
        origin = self.residuals(torch.zeros(self.inject.shape[1], dtype=torch.float64))
        minimiser: Tensor = -torch.linalg.solve(self.hessian, self.jacobian.mT @ origin.mean(0))
        return minimiser

    @cached_property
    def start(self) -> Tensor:
        """theta_1, the start of all runs, shape (d,)."""
        return self.minimiser + 1.0

    @cached_property
    def noise(self) -> Tensor:
        """The gradient of each sample minus their mean, shape (64, d); independent of theta."""
        gradients = self.residuals(self.minimiser) @ self.jacobian
        return gradients - gradients.mean(0)

    def gradient(self, theta: Tensor, index: Tensor) -> Tensor:
        """Return the exact gradient of the drawn samples, shape (..., d)."""
        h = (theta @ self.inject.mT + self.x[index]) @ self.inverse.mT
        return (h - self.y[index]) @ self.jacobian

    def perturbed(self, size: float) -> Oracle:
        """Return an oracle whose error is a fixed vector of norm `size`."""
        shift = torch.ones(self.inject.shape[1], dtype=torch.float64)
        shift *= size / torch.linalg.vector_norm(shift)
        return lambda theta, index: self.gradient(theta, index) + shift

    def attached(self, spec: str) -> Oracle:
        """Return an oracle that differentiates through the equilibrium with a strategy."""

        def oracle(theta: Tensor, index: Tensor) -> Tensor:
            theta = theta.detach().requires_grad_()
            injected = theta @ self.inject.mT + self.x[index]
            equilibrium = injected.detach() @ self.inverse.mT
            h = dpp.attach(lambda h: h @ self.weight.mT + injected, equilibrium, spec)
            loss = (h - self.y[index]).square().sum() / 2
            return torch.autograd.grad(loss, theta)[0]

        return oracle


@dataclass(frozen=True)
class Curve:
    """The results of SGD with one oracle.

    Attributes:
        name: the name of the oracle.
        epsilon: the largest error of its gradient in any step of any run.
        measured: M_N for N = 1, 2, ..., the mean over the runs, shape (steps,).
        bound: the right-hand side of (A-41), shape (steps,).
    """

    name: str
    epsilon: float
    measured: Tensor
    bound: Tensor


def descend(toy: Toy, name: str, oracle: Oracle, steps: int, seed: int = 0) -> Curve:
    """Run SGD with an oracle.

    Args:
        toy: the problem.
        name: the name of the oracle.
        oracle: computes the gradients.
        steps: the largest N.
        seed: the seed of the drawn samples, which are the same for all oracles.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(toy.x), (steps, RUNS), generator=generator)
    eta = 1 / (toy.smoothness * torch.arange(1, steps + 1, dtype=torch.float64).sqrt())
    theta = toy.start.repeat(RUNS, 1)
    visited = theta.new_empty(steps, *theta.shape)
    gradients = torch.empty_like(visited)
    for n in range(steps):
        visited[n] = theta
        gradients[n] = oracle(theta, drawn[n])
        theta = visited[n] - eta[n] * gradients[n]

    errors = gradients - toy.gradient(visited, drawn)
    epsilon = float(torch.linalg.vector_norm(errors, dim=2).max())
    squares = ((visited - toy.minimiser) @ toy.hessian).square().sum(2).mean(1)
    return Curve(
        name, epsilon, (eta * squares).cumsum(0) / eta.cumsum(0), upper_bound(toy, epsilon, eta)
    )


def upper_bound(toy: Toy, epsilon: float, eta: Tensor) -> Tensor:
    """Return the right-hand side of (A-41) for N = 1 ... len(eta)."""
    ell, dim = toy.smoothness, len(toy.start)
    basis = torch.linalg.eigh(toy.hessian).eigenvectors
    at_start = (toy.hessian @ (toy.start - toy.minimiser) @ basis).abs()
    pull = (toy.noise @ basis).abs().amax(0) + epsilon
    largest = float(torch.linalg.vector_norm(torch.maximum(at_start, pull)))  # G
    covariance = float(toy.noise.square().sum(1).mean())  # M
    k = ell * ((largest + epsilon) ** 2 + 2 * covariance + 2 * dim * epsilon**2) / 2
    gap = toy.risk(toy.start) - toy.risk(toy.minimiser)
    return largest * epsilon + (gap + k * eta.square().cumsum(0)) / eta.cumsum(0)


def experiment(steps: int) -> tuple[list[Curve], list[Curve]]:
    """Return the curves of (a) and of (b)."""
    toy = Toy.draw()
    perturbed = [
        descend(toy, f"exact + {size:g}" if size else "exact", toy.perturbed(size), steps)
        for size in PERTURBATIONS
    ]
    return perturbed, [descend(toy, spec, toy.attached(spec), steps) for spec in STRATEGIES]


def write(perturbed: Sequence[Curve], attached: Sequence[Curve], folder: Path) -> list[Path]:
    """Write sgd_convergence.csv and sgd_convergence.png, and return their paths."""
    matplotlib = require("matplotlib", "viz")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "viz")
    steps = len(perturbed[0].measured)
    shown = sorted({round(steps ** (i / 60)) for i in range(61)})
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["oracle", "epsilon", "N", "measured", "bound"])
    for curve in [*perturbed, *attached]:
        for n in shown:
            values = (curve.measured[n - 1], curve.bound[n - 1])
            writer.writerow([curve.name, f"{curve.epsilon:.6g}", n, *(f"{v:.6g}" for v in values)])

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 6.5), sharey=True)
    panels = {
        "(a) exact gradient plus a vector of norm eps": perturbed,
        "(b) gradients of the package": [perturbed[0], *attached],
    }
    at = torch.tensor(shown) - 1
    rate = torch.tensor(shown).log() / torch.tensor(shown).sqrt()
    rate = torch.where(rate.argmax() <= torch.arange(len(rate)), rate, torch.nan)
    rate *= perturbed[0].measured[-1] / rate[-1]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for color, curve in enumerate(curves):
            label = f"{curve.name}: eps = {curve.epsilon:.1g}"
            axis.plot(shown, curve.measured[at], color=f"C{color}", label=label)
            axis.plot(shown, curve.bound[at], color=f"C{color}", linestyle="--", linewidth=1)
        axis.plot([], [], color="grey", linestyle="--", linewidth=1, label="their bounds (A-41)")
        axis.plot(shown, rate, color="black", linestyle=":", label=r"$\propto\log N/\sqrt{N}$")
        axis.set(xscale="log", yscale="log", xlabel="steps N", title=title)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    axes[0].set_ylabel(r"weighted mean of $\|\nabla R\|^2$")
    figure.suptitle("SGD on approximate gradients: Theorem 3 on a linear equilibrium")
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    pyplot.close(figure)

    paths = [folder / "sgd_convergence.csv", folder / "sgd_convergence.png"]
    for path, content in zip(paths, (rows.getvalue().encode(), image.getvalue()), strict=True):
        write_whole(path, content)
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    """Run both parts, print the last M_N of each oracle, and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1000 steps instead of 20000")
    default = Path(__file__).parent / "figures"
    parser.add_argument("--out", type=Path, default=default, help="folder for the CSV and the PNG")
    args = parser.parse_args(argv)
    try:  # fail before minutes of work, not after them
        require("matplotlib", "viz")
        args.out.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError) as error:
        parser.error(str(error))
    torch.set_num_threads(1)  # the matrices are small
    perturbed, attached = experiment(1000 if args.quick else 20000)
    print(
        text_table(
            ["gradient", "eps", "M_N", "bound"],
            [
                [c.name, f"{c.epsilon:.2g}", f"{c.measured[-1]:.3g}", f"{c.bound[-1]:.3g}"]
                for c in [*perturbed, *attached]
            ],
        )
    )
    for path in write(perturbed, attached, args.out):
        print(path)


if __name__ == "__main__":
    main()
