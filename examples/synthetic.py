# Longer than 400 lines: one file that can be copied alone, and that begins with what was found.
"""Figure 1 of the supplement: solvers and phantom gradients where ||J|| is close to 1.

    python examples/synthetic.py [--quick] [--out FOLDER]

The setting is that of section 4.1 of Geng et al., NeurIPS 2021, supplement. The equilibrium is
h* = phi(W (h* + u)), found by 100 fixed-point iterations, where W is symmetric with the spectral
norm L_h. The loss is the mean squared error to y, and v = dL/dh* is held fixed. There are 50,000
pairs (u, y) of D = 128 standard normal numbers, in batches of N = 32. Each batch has its own W,
which is drawn once and scaled to every L_h. The exact g solves (I - J^T) g = v densely in float64.
For the N x D matrix g of a batch, six numbers are measured. Each is reported as the median over the
batches, with the 10 % and 90 % quantiles and the worst batch:

    objective         ||(I - J^T) g - v||
    relative error    objective / ||g||
    cosine            to the exact g
    l1                sum of |g|
    cosine of dL/du   of J^T g, to that of the exact g
    l1 / exact        l1, divided by that of the exact g

Step k has used k - 1 products with J^T (k for GMRES, which needs one for its true residual). For
UPG and NPG, k is their own argument, and lam = 0.5. The two agree because phi is linear.

Broyden's method is TorchDEQ's, as in DEQ code throughout. It stores the inverse Jacobian as a sum
of outer products. The Broyden method of this package stores it as a product, and skips updates that
rounding has spoilt. On 16 batches its norms stay within twice the exact one, but its directions are
no better.

The supplement claims that Broyden's method diverges at L_h = 0.9999: more steps do not bring its g
closer, the cosine oscillates and the norm explodes, while the norm of the phantom gradient stays
moderate. The numbers below are those of the figure and of synthetic.csv. Numbers of steps from 14
on depend on rounding, and so on the processor: an earlier run had the same picture, and there the
norm of the worst batch was 14 times as large.

The claim holds for a linear layer whose extreme eigenvalue is +L_h, if the iterates are taken as
they come and the solver runs in float32. In one batch of ten, the cosine falls from 0.89 after 2
steps to 0.16 after 40, and the norm reaches 2.7 times the exact one. The worst batch reaches 2e11
times the exact norm, and one batch of 1563 overflows. The cosine of the median batch is 0.96, 0.43,
0.83, 0.92 and 0.97 after 2, 4, 10, 19 and 40 steps. This batch never solves its system: its
objective is 16 times what it was after one step. Some rows of a batch explode, and they dominate
its norm. The same is seen at 0.999, in fewer batches.

The claim does not hold, or holds only in part,
  - in float64: the cosine falls as far on the way, but it is 0.997 or better after 40 steps in nine
    of ten batches;
  - if the extreme eigenvalue is -L_h, as in half of all draws: the median cosine is 0.99 from 10
    steps on. Single batches still explode (4e6 times the exact norm; one at 0.999 overflows), since
    the other end may be near +L_h;
  - with tanh or relu, whose slopes take the norm of J well below L_h: solved in 7 steps;
  - at L_h = 0.9: solved in 10 steps;
  - for the best iterate of each row, which solvers return: the norm is never above the exact one,
    but the direction is worse still (0.47 after 19 steps);
  - for GMRES, whose objective never rises: 0.999 after 25 steps, exact to rounding after 40.
The cosine of the phantom gradient rises at every step, to 0.988. Its norm is moderate because it is
500 times too small: 40 damped steps add up 20 of the 10,000 terms of the exact gradient.

The whole experiment takes less than an hour on two cores.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.extras import require
from deq_phantom_plugin._plumbing.output import text_table, write_whole
from deq_phantom_plugin.adjoint import solve
from deq_phantom_plugin.adjoint.probe import with_probe

N, D = 32, 128
LEVELS = (0.9, 0.99, 0.999, 0.9999)
STEPS = (1, 2, 3, 4, 5, 7, 10, 14, 19, 25, 32, 40)
METRICS = ("objective", "relative error", "cosine", "l1", "cosine of dL/du", "l1 / exact")
STATISTICS = ("p10", "median", "p90", "worst")
CHUNK = 16  # batches that are computed at once

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
}
METHODS = (
    "broyden",
    "broyden, best kept",  # the best iterate of each row by its residual, as solvers return it
    "upg",
    "npg",
    "gmres",
    "anderson",
    "fixed_point",
)


@dataclass(frozen=True)
class Variant:
    """One choice of the settings that section 4.1 leaves open.

    Attributes:
        activation: the name of phi in `ACTIVATIONS`.
        sign: the sign of the eigenvalue of W that is largest in magnitude.
        dtype: the dtype of the state and of all computations of a method.
        methods: the methods that are run.
    """

    activation: str
    sign: int
    dtype: torch.dtype
    methods: tuple[str, ...] = METHODS[:3]


VARIANTS = {
    "linear, +L, float32": Variant("linear", +1, torch.float32, METHODS),
    "linear, +L, float64": Variant("linear", +1, torch.float64),
    "linear, -L, float32": Variant("linear", -1, torch.float32),
    "tanh, +L, float32": Variant("tanh", +1, torch.float32),
    "relu, +L, float32": Variant("relu", +1, torch.float32),
}
CLAIM = "linear, +L, float32"  # the variant in which the supplement's claim holds


@dataclass(frozen=True)
class Batches:
    """B batches of the synthetic setting, with their equilibria and exact gradients.

    Attributes:
        activation: the name of phi in `ACTIVATIONS`.
        weight: W, shape (B, D, D).
        u: shape (B, N, D).
        y: shape (B, N, D).
    """

    activation: str
    weight: Tensor
    u: Tensor
    y: Tensor

    def func(self, h: Tensor) -> Tensor:
        """Return F(h), shape (B N, D), for h of this shape; each row is a sample."""
        h = h.view_as(self.u) + self.u
        return ACTIVATIONS[self.activation](h @ self.weight.mT).flatten(0, 1)

    @cached_property
    def equilibrium(self) -> Tensor:
        """The state after 100 fixed-point iterations, shape (B N, D)."""
        h = torch.zeros_like(self.u).flatten(0, 1)
        for _ in range(100):
            h = self.func(h)
        return h

    @cached_property
    def v(self) -> Tensor:
        """dL/dh at the equilibrium, with the mean squared error of a batch as L; shape (B N, D)."""
        return 2 * (self.equilibrium - self.y.flatten(0, 1)) / (N * D)

    @cached_property
    def slope(self) -> Tensor:
        """The derivative of phi at the equilibrium in float64, shape (B, N, D)."""
        h = self.equilibrium.view_as(self.u).double() + self.u.double()
        before = (h @ self.weight.double().mT).requires_grad_()
        out = ACTIVATIONS[self.activation](before)
        return torch.autograd.grad(out.sum(), before)[0]

    def transposed_jacobian(self, g: Tensor) -> Tensor:
        """Return J^T g in float64; both have shape (B, N, D)."""
        return (g * self.slope) @ self.weight.double()

    @cached_property
    def exact(self) -> Tensor:
        """The g that solves (I - J^T) g = v, shape (B, N, D), float64."""
        identity = torch.eye(D, dtype=torch.float64)
        v, transposed = self.v.double().view_as(self.u), self.weight.double().mT
        if self.activation == "linear":  # all samples of a batch have the same J
            return torch.linalg.solve(identity - transposed, v.mT).mT
        # J^T = W^T diag(slope): column j of W^T is scaled by the slope of number j of a sample. So
        # there is one system per sample, shape (B, N, D, D).
        systems = identity - transposed[:, None] * self.slope[:, :, None, :]
        return torch.linalg.solve(systems, v)

    def measure(self, g: Tensor) -> Tensor:
        """Return `METRICS` of a g of shape (B N, D) for each batch, shape (6, B)."""
        g = g.double().view_as(self.u)
        image, exact_image = self.transposed_jacobian(g), self.transposed_jacobian(self.exact)
        objective = _norm(g - image - self.v.double().view_as(g))
        l1, exact_l1 = g.abs().sum((1, 2)), self.exact.abs().sum((1, 2))
        return torch.stack(
            [
                objective,
                objective / _norm(g),
                _cosine(g, self.exact),
                l1,
                _cosine(image, exact_image),
                l1 / exact_l1,
            ]
        )

    def part(self, index: int) -> Batches:
        """Return one batch by itself."""
        one = slice(index, index + 1)
        return Batches(self.activation, self.weight[one], self.u[one], self.y[one])


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(1, 2))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2)) / (_norm(a) * _norm(b))


def draw(variant: Variant, level: float, n_batches: int, seed: int = 0) -> Iterator[Batches]:
    """Yield batches, `CHUNK` at once; all variants and levels have the same random numbers.

    Args:
        variant: the variant.
        level: L_h.
        n_batches: the number of batches.
        seed: the seed of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for start in range(0, n_batches, CHUNK):
        # Whole chunks are drawn, so that the first batches do not depend on their number.
        raw, u, y = normal(CHUNK, D, D), normal(CHUNK, N, D), normal(CHUNK, N, D)
        kept = slice(min(CHUNK, n_batches - start))
        weight = (raw + raw.mT) / 2
        ends = torch.linalg.eigvalsh(weight)[:, [0, -1]]
        extreme = ends.gather(1, ends.abs().argmax(1, keepdim=True))[:, :, None]
        weight *= level * variant.sign / extreme
        yield Batches(variant.activation, *(t[kept].to(variant.dtype) for t in (weight, u, y)))


def gradients(batches: Batches, method: str) -> list[Tensor]:
    """Return the g of a method after each of `STEPS`, each of shape (B N, D); NaN if it failed."""
    if method in ("upg", "npg"):
        return [_attached(batches, f"{method}(k={k}, lam=0.5)") for k in STEPS]
    if method == "gmres":
        return [_solved(batches, method, k)[0] for k in STEPS]
    _, iterates = _solved(batches, method, max(STEPS))
    if len(iterates) < max(STEPS) and len(batches.u) > 1:
        # An overflow in one row ends the solve of all batches. So each batch is solved alone.
        parts = [gradients(batches.part(i), method) for i in range(len(batches.u))]
        return [torch.cat(step) for step in zip(*parts, strict=True)]
    iterates += [torch.full_like(batches.v, torch.nan)] * (max(STEPS) - len(iterates))
    return [iterates[k - 1] for k in STEPS]


def _attached(batches: Batches, spec: str) -> Tensor:
    """Return the g of a strategy."""
    func, (probe,) = with_probe(batches.func, batches.equilibrium)
    attached = dpp.attach(func, batches.equilibrium, spec)
    return torch.autograd.grad(attached, probe, batches.v)[0]


def _solved(batches: Batches, solver: str, steps: int) -> tuple[Tensor, list[Tensor]]:
    """Return the g of a solver, and the vectors that it multiplied with J^T.

    These vectors are its iterates, except for GMRES.
    """
    h = batches.equilibrium.detach().requires_grad_()
    image = batches.func(h)
    seen: list[Tensor] = []

    def vjp(g: Sequence[Tensor]) -> list[Tensor]:
        seen.append(g[0])
        return list(torch.autograd.grad(image, h, g[0], retain_graph=True))

    # Our solvers divide v by the norm of its longest row. For TorchDEQ, each row gets norm one.
    length = torch.linalg.vector_norm(batches.v, dim=1, keepdim=True)
    if solver == "broyden":
        unit = batches.v / length
        torchdeq_solver = require("torchdeq.solver", "torchdeq").get_solver("broyden")
        torchdeq_solver(lambda y: vjp([y])[0] + unit, unit, max_iter=steps - 1, tol=0.0)
        iterates = _nan_once_not_finite(seen)
        return iterates[-1] * length, [x * length for x in iterates]
    try:
        (g,), _ = solve(vjp, [batches.v], solver=solver, tol=0.0, max_vjp=steps, batch_dim=0)
    except dpp.NonFiniteError:
        g = torch.full_like(batches.v, torch.nan)
        seen.pop()  # the iterate whose residual is not finite
    return g, [x * length.amax() for x in seen]


def _nan_once_not_finite(iterates: Sequence[Tensor]) -> list[Tensor]:
    """Return iterates in which a row is NaN from its first overflow on."""
    failed, found = torch.zeros(len(iterates[0]), 1, dtype=torch.bool), []
    for x in iterates:
        failed = failed | ~torch.isfinite(x).all(dim=1, keepdim=True)
        found.append(torch.where(failed, torch.nan, x))
    return found


def best_kept(batches: Batches, iterates: Sequence[Tensor]) -> list[Tensor]:
    """Return, after each iterate, the best iterate so far of every row, by its residual."""
    best, smallest, kept = iterates[0], torch.inf, []
    for g in iterates:
        x = g.double().view_as(batches.u)
        residual = torch.linalg.vector_norm(
            x - batches.transposed_jacobian(x) - batches.v.double().view_as(x), dim=2
        ).flatten()
        better = residual < smallest
        best = torch.where(better[:, None], g, best)
        smallest = torch.where(better, residual, smallest)
        kept.append(best)
    return kept


def run(name: str, level: float, n_batches: int, seed: int = 0) -> dict[str, Tensor]:
    """Run all methods of a variant at one L_h.

    Returns:
        For each method, `METRICS` of every batch after each of `STEPS`, shape
        (steps, 6, n_batches). "exact" is one of the methods, with a single step.
    """
    torch.set_num_threads(1)  # the matrices are small, and several levels run at the same time
    variant = VARIANTS[name]
    chunks: dict[str, list[Tensor]] = {method: [] for method in ("exact", *variant.methods)}
    for batches in draw(variant, level, n_batches, seed):
        found: dict[str, list[Tensor]] = {"exact": [batches.exact]}
        for method in variant.methods:
            if method == "broyden, best kept":
                found[method] = best_kept(batches, found["broyden"])
            else:
                found[method] = gradients(batches, method)
        for method, steps in found.items():
            chunks[method].append(torch.stack([batches.measure(g) for g in steps]))
    return {method: torch.cat(parts, dim=2) for method, parts in chunks.items()}


def statistics(values: Tensor) -> Tensor:
    """Return `STATISTICS` over batches, shape (steps, 6, 4), of values (steps, 6, n_batches).

    A solve that failed is NaN and does not count.
    """
    inner = torch.nanquantile(values, torch.tensor([0.1, 0.5, 0.9], dtype=values.dtype), dim=2)
    smallest = torch.where(values.isnan(), torch.inf, values).amin(2)
    largest = torch.where(values.isnan(), -torch.inf, values).amax(2)
    is_cosine = torch.tensor([metric.startswith("cosine") for metric in METRICS])
    worst = torch.where(is_cosine, smallest, largest)
    return torch.cat([inner.permute(1, 2, 0), worst[:, :, None]], dim=2)


Results = dict[tuple[str, float], dict[str, Tensor]]
"""Maps the name of a variant and L_h to the result of `run`."""


def experiment(pairs: int, names: Sequence[str], workers: int) -> Results:
    """Run variants at all `LEVELS`, in several processes.

    Args:
        pairs: the number of pairs (u, y), rounded up to whole batches of N.
        names: the names of the variants.
        workers: the number of processes.
    """
    jobs = [(name, level) for name in names for level in LEVELS]
    with ProcessPoolExecutor(workers) as pool:
        futures = [pool.submit(run, name, level, -(-pairs // N)) for name, level in jobs]
        return {job: future.result() for job, future in zip(jobs, futures, strict=True)}


def write(results: Results, folder: Path) -> list[Path]:
    """Write synthetic.csv and synthetic.png, and return their paths."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    columns = [f"{metric}: {statistic}" for metric in METRICS for statistic in STATISTICS]
    rows.writerow(["variant", "L_h", "method", "step", "batches", "failed", *columns])
    for (name, level), methods in results.items():
        for method, values in methods.items():
            failed = values[:, 0].isnan().sum(1).tolist()
            steps = [""] if method == "exact" else STEPS
            for i, step in enumerate(steps):
                numbers = [f"{x:.4g}" for x in statistics(values)[i].flatten().tolist()]
                rows.writerow([name, level, method, step, values.shape[2], failed[i], *numbers])
    image = plot(results)
    paths = [folder / "synthetic.csv", folder / "synthetic.png"]
    for path, content in zip(paths, (text.getvalue().encode(), image), strict=True):
        write_whole(path, content)
    return paths


def plot(results: Results) -> bytes:
    """Return the 4 x 4 figure as PNG: the variant of the claim, and Broyden's method in others."""
    require("matplotlib", "viz")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 14), layout="constrained")
    axes = figure.subplots(4, len(LEVELS), sharex=True)
    colors = dict(zip(METHODS, ("C3", "C1", "C0", "black", "C5", "C6", "C7"), strict=True))
    others = dict(zip((v for v in VARIANTS if v != CLAIM), ("C8", "C2", "C4", "C9"), strict=True))
    for column, level in enumerate(LEVELS):
        for row, metric in enumerate(METRICS[:4]):
            axis = axes[row, column]
            for name in dict.fromkeys(variant for variant, _ in results):
                methods = results[name, level]
                if name != CLAIM:
                    median = statistics(methods["broyden"])[:, row, 1]
                    label = f"broyden: {name}"
                    axis.plot(STEPS, median, "--", color=others[name], label=label)
                    continue
                for method in VARIANTS[name].methods:
                    low, median, high, _ = statistics(methods[method])[:, row].T
                    style = ":" if method == "npg" else "-"  # it lies on upg
                    color = colors[method]
                    axis.plot(STEPS, median, style, color=color, linewidth=2, label=method)
                    if method in ("broyden", "upg"):
                        axis.fill_between(STEPS, low, high, color=color, alpha=0.15)
                if metric == "l1":
                    exact = float(statistics(methods["exact"])[0, row, 1])
                    axis.axhline(exact, color="0.4", linestyle="-.", label="exact")
            axis.set_xscale("log")
            axis.set_xticks(STEPS, [str(s) if s not in (3, 5, 25) else "" for s in STEPS])
            axis.minorticks_off()
            if metric == "cosine":
                axis.set_ylim(-0.25, 1.05)
            else:
                axis.set_yscale("log")
            axis.grid(alpha=0.3)
            if row == 0:
                axis.set_title(f"$L_h$ = {level}")
            if column == 0:
                axis.set_ylabel({"l1": "L1 norm"}.get(metric, metric))
            if row == 3:
                axis.set_xlabel("solver steps, or k")
    handles, labels = axes[3, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7)
    batches = next(iter(results.values()))["exact"].shape[2]
    figure.suptitle(
        f"{CLAIM} (solid; medians of {batches} batches of {N} x {D}, bands from 10 % to 90 %), "
        "and Broyden's method in other settings (dashed)"
    )
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def summary(results: Results) -> str:
    """Return a table for the largest L_h: the cosine after some steps, and the l1 norm."""
    lines = []
    for (name, level), methods in results.items():
        if level != max(LEVELS):
            continue
        for method in VARIANTS[name].methods:
            values = statistics(methods[method])
            at = [STEPS.index(step) for step in (2, 10, 19, 40)]
            cosines = [f"{values[i, 2, 1]:.3f}" for i in at]
            norms = [f"{values[-1, 5, i]:.3g}" for i in (1, 3)]
            lines.append([name, method, *cosines, *norms])
    header = ["variant", "method", *(f"cos at {k}" for k in (2, 10, 19, 40))]
    return text_table([*header, "l1 / exact at 40", "worst"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment, print a summary, and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="500 pairs instead of 50000")
    add("--pairs", type=int, help="how many pairs, rounded up to whole batches of 32")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (one per core)")
    default = Path(__file__).parent / "figures"
    add("--out", type=Path, default=default, help="folder for the CSV and the PNG")
    args = parser.parse_args(argv)
    pairs = args.pairs if args.pairs is not None else 500 if args.quick else 50_000
    if pairs < 1 or args.workers < 1:
        parser.error(f"--pairs {pairs} --workers {args.workers}: expected 1 or more of each")
    try:  # fail before minutes of work, not after them
        require("matplotlib", "viz")
        args.out.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError) as error:
        parser.error(str(error))
    results = experiment(pairs, args.variants, args.workers)
    print(summary(results))
    for path in write(results, args.out):
        print(path)


if __name__ == "__main__":
    main()
