"""Counts how many vector-Jacobian products each adjoint solver needs, and times the solvers.

    python benchmarks/adjoint_solvers.py [--steps 300] [--out FILE.json]

The default solver of `ift` was chosen by these numbers. The problems are (a) random linear maps of
given spectral radius, with 256 numbers and 8 samples; (b) MDEQ-tiny on scikit-learn's digits, with
one batch of 32, at initialisation and after training with `upg`. Two things are measured for each
solver. The first is the number of products until the worst sample is below a tolerance (`-` if 100
are not enough). The second is the time of a solve, divided by that of as many products alone. Both
times are taken in turn, and the ratio is the median of 5.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.extras import require
from deq_phantom_plugin.adjoint import SOLVERS, Linearization, solve

MAX_VJP = 100
TOLERANCES = (1e-2, 1e-4, 1e-6)


def linear_problem(radius: float, normal: bool, dtype: torch.dtype) -> tuple[Linearization, Tensor]:
    """Return the linearization of h -> h W^T with rho(W) = radius, and a random v.

    Args:
        radius: the spectral radius of W.
        normal: whether W is symmetric; a Gaussian matrix otherwise.
        dtype: the dtype of W, of the state and of v. The last two have the shape (8, 256).
    """
    weight = torch.randn(256, 256, dtype=torch.float64)
    if normal:
        weight = weight + weight.mT
    weight *= radius / torch.linalg.eigvals(weight).abs().max()
    weight = weight.to(dtype)
    state = torch.randn(8, 256, dtype=dtype)
    return Linearization(lambda h: h @ weight.mT, state), torch.randn(8, 256, dtype=dtype)


def mdeq_problem(steps: int, dtype: torch.dtype) -> tuple[Linearization, list[Tensor], float]:
    """Return the linearization of MDEQ-tiny at an equilibrium, v = dL/dh there, and mean rho(J)."""
    from deq_phantom_plugin.adapters.mdeq import MDEQ

    digits = require("sklearn.datasets", "vision").load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    model = MDEQ.from_preset("tiny", in_channels=1, grad="upg", f_solver="fixed_point_iter")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    model = model.to(dtype)
    problem: dict[str, object] = {}

    def capture(func: Callable, equilibrium: object, context: dpp.Context) -> object:
        graph = Linearization(func, equilibrium)

        def adjoint(v: list[Tensor]) -> list[Tensor]:
            problem.update(graph=graph, v=v)
            return v

        return graph.attach(graph.outputs, adjoint)

    dpp.set_grad(model, capture)
    loss = torch.nn.functional.cross_entropy(model(images[:32].to(dtype)), labels[:32])
    loss.backward(retain_graph=True)
    return problem["graph"], problem["v"], float(model.spectral_radius().mean())


def measure(graph: Linearization, v: list[Tensor]) -> dict[str, dict[str, object]]:
    """Return, for each solver, the products to each tolerance and the time over bare products."""
    results: dict[str, dict[str, object]] = {}
    for name in sorted(SOLVERS):
        counts: dict[str, object] = {}
        for tol in TOLERANCES:
            _, solution = solve(graph.vjp, v, solver=name, tol=tol, max_vjp=MAX_VJP, batch_dim=0)
            counts[f"{tol:.0e}"] = solution.n_vjp if solution.converged else None
        ratios = []
        for _ in range(5):
            start = time.perf_counter()
            _, solution = solve(graph.vjp, v, solver=name, tol=1e-12, max_vjp=20, batch_dim=0)
            middle = time.perf_counter()
            for _ in range(solution.n_vjp):
                graph.vjp(v)
            ratios.append((middle - start) / (time.perf_counter() - middle))
        counts["time over bare products"] = round(statistics.median(ratios), 2)
        results[name] = counts
    return results


def main() -> None:
    """Run all problems, print one table per problem, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    everything = {}
    for dtype in (torch.float32, torch.float64):
        for radius in (0.5, 0.9, 0.99, 1.1):
            for normal in (True, False):
                graph, v = linear_problem(radius, normal, dtype)
                kind = "symmetric" if normal else "gaussian"
                everything[f"{kind}, rho={radius}, {dtype}"] = measure(graph, [v])
        for steps in (0, args.steps):
            graph, leaves, rho = mdeq_problem(steps, dtype)
            key = f"mdeq-tiny after {steps} steps, rho={rho:.2f}, {dtype}"
            everything[key] = measure(graph, leaves)
    for title, results in everything.items():
        print(f"\n{title}")
        for name, counts in results.items():
            cells = "  ".join(f"{k}: {'-' if n is None else n}" for k, n in counts.items())
            print(f"  {name:12} {cells}")
    if args.out:
        args.out.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
