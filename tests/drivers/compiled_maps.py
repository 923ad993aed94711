"""Gradients of compiled maps against those of the same maps as they were written.

    python compiled_maps.py WHAT BACKEND [free]

WHAT is "fill", which compiles with PyTorch's own settings and takes one gradient by `upg`, so that
a cache on disk holds its backward pass; "model"; or a name in `MAPS`. "free" sets PyTorch's
`donated_buffer = False`. Prints JSON: relative errors, and under "plain" what PyTorch by itself
makes of a second product over a compiled graph: right, wrong or refused.
"""

from __future__ import annotations

import json
import sys
import warnings

import torch
import torch._functorch.config
from torch import nn
from torch.nn.functional import gelu

import deq_phantom_plugin as dpp
from deq_phantom_plugin.diagnostics import measured_inner_product

FALLBACK = "guard('ift(max_iter=1)', on_failure='fallback(\"upg\")', adjoint_tol=1e-6)"
SCHEDULE = "schedule({0: 'upg', 1: 'ift', 2: 'jfb', 3: 'npg'})"
ORDERS = [
    ["upg", "npg", "ift", "upg", "jfb", "npg(k=9)"],
    ["ift", "upg(k=2, checkpoint=True)", "exact", "jfb", "npg_rr", FALLBACK],
    ["reversible(steps=9)", "upg(lam='adaptive')", "bptt(steps=3)", "ift(higher_order=True)"],
]


class Map(nn.Module):
    """A contraction whose backward pass, compiled, writes over what the wider layer saved."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)
        self.u = nn.Parameter(torch.randn(5, 8))

    def inner(self, h):
        return torch.tanh(self.b(gelu(self.a(h))) + self.u)

    def forward(self, h):
        return 0.3 * self.inner(h)


def closure(map_, backend):
    return torch.compile(lambda h: map_(h), backend=backend)


def second_copy(map_, backend):
    first, second = closure(map_, backend), closure(map_, backend)
    gradient(first, map_, "upg")
    return second


def wrapped(map_, backend):
    return torch.compile(map_, backend=backend)


def module(map_, backend):
    map_.compile(backend=backend)
    return map_


def inside(map_, backend):
    map_.inner = torch.compile(map_.inner, backend=backend)
    return map_


MAPS = {f.__name__: f for f in (closure, second_copy, wrapped, module, inside)}


def solve(func):
    h = torch.zeros(5, 8)
    with torch.no_grad():
        for _ in range(30):
            h = func(h)
    return h


H = solve(Map())


def gradient(func, params, spec, context=None):
    torch.manual_seed(1)  # npg_rr draws
    params.zero_grad()
    dpp.attach(func, H.clone(), spec, context).square().sum().backward()
    return [p.grad.clone() for p in params.parameters()]


def error(got, want):
    """The relative error of tensors, all together."""
    got, want = (torch.cat([x.detach().flatten() for x in xs]) for xs in (got, want))
    return float((got - want).norm() / want.norm())


def products_without_the_package(func):
    x, v = H.clone().requires_grad_(), torch.ones_like(H)
    y = func(x)
    try:
        first, second = (torch.autograd.grad(y, x, v, retain_graph=True)[0] for _ in range(2))
    except RuntimeError as failure:
        return "refused" if "donated buffers" in str(failure) else str(failure)
    return "right" if error([second], [first]) < 1e-3 else "wrong"


def measured(func, map_):
    """Everything else that differentiates F more than once, as tensors by name."""
    params = [*map_.parameters()]
    torch.manual_seed(0)
    found = {
        "jacobian_reg": torch.autograd.grad(dpp.jacobian_reg(func, H, 2), params),
        "spectral_radius": [dpp.spectral_radius(func, H)],
    }
    loss = dpp.attach(func, H, "ift(higher_order=True, tol=1e-6)").square().sum()
    first = torch.autograd.grad(loss, params, create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    found["second derivative"] = torch.autograd.grad(penalty, params)
    report = dpp.gradient_report(
        func, H, lambda h: h.square().sum(), params, ["upg", "npg", "jfb"], repeats=1,
        second_order=True,
    )  # fmt: skip
    for row in report.results:
        assert row.error is None, row
        numbers = [row.cosine, row.relative_error, row.norm, row.residual]
        found[f"report {row.strategy}"] = [torch.tensor(numbers)]
        if row.second_order_error is not None:
            found[f"second order {row.strategy}"] = [torch.tensor(row.second_order_error)]
    inner = measured_inner_product(func, H, params, "upg", torch.ones_like(H))
    found["inner product"] = [torch.tensor(inner.inner_product)]
    return found


def errors_of_a_map(make, backend):
    plain, map_ = Map(), Map()
    func = make(map_, backend)
    errors = {"solve": error([solve(func)], [H])}
    for i, order in enumerate(ORDERS):
        for j, spec in enumerate(order):
            want = gradient(plain, plain, spec)
            errors[f"{i}.{j} {spec}"] = error(gradient(func, map_, spec), want)
    for step in range(4):
        context = dpp.Context(step=step)
        want = gradient(plain, plain, SCHEDULE, context)
        errors[f"schedule at {step}"] = error(gradient(func, map_, SCHEDULE, context), want)
    want, got = measured(plain, plain), measured(func, map_)
    errors |= {name: error(got[name], want[name]) for name in want}
    return errors, products_without_the_package(func)


class Model(nn.Module):
    """A model on TorchDEQ, with a map as above before F and behind."""

    def __init__(self):
        super().__init__()
        from torchdeq import get_deq

        self.before, self.map, self.behind = Map(), Map(), Map()
        self.deq = get_deq(grad="upg", f_solver="fixed_point_iter", f_max_iter=6, f_tol=0.0)

    def forward(self, x):
        u = self.before(x)
        h = self.deq(lambda h: self.map(h + u), torch.zeros_like(u))[0][-1]
        return self.behind(h)


def errors_of_a_model(backend):
    dpp.enable("torchdeq")
    x, plain, model = torch.ones(5, 8), Model(), Model()
    compiled = torch.compile(model, backend=backend)

    def loss(output):
        return output.square().sum()

    def step(of, run, number):
        dpp.set_step(of, number)
        of.zero_grad()
        loss(run(x)).backward()
        return [p.grad.clone() for p in of.parameters()]

    errors, number = {}, 0
    for spec in ("upg", "npg", "ift", "upg(k=2)", SCHEDULE, "reversible(steps=9)"):
        for of in (plain, model):
            dpp.set_grad(of, spec)
        for _ in range(5):
            want = step(plain, plain, number)
            errors[f"{number} {spec}"] = error(step(model, compiled, number), want)
            number = (number + 1) % 5
    logs: list[dict[str, float]] = [{}, {}]
    for of, run, log in ((plain, plain, logs[0]), (model, compiled, logs[1])):
        dpp.set_grad(of, "upg")
        with dpp.monitor(run, lambda numbers, _, log=log: log.update(numbers), every=1):
            got = step(of, run, 5)
        errors[f"watched {type(run).__name__}"] = error(got, step(plain, plain, 5))
    for name, number in logs[0].items():
        if not name.endswith("cosine"):  # of other gradients, which a warning says
            # The reference's own residual is rounding.
            off = abs(logs[1][name] - number)
            errors[f"monitor {name}"] = off if "residual" in name else off / number
    reports = [dpp.model_report(run, x, loss, ["npg"], repeats=1) for run in (plain, compiled)]
    for want, got in zip(*(report.reports[0].results for report in reports), strict=True):
        assert got.error is None, got
        errors[f"report {got.strategy}"] = abs(got.cosine - want.cosine)
    return errors, products_without_the_package(torch.compile(model.map, backend=backend))


def main(what, backend, *free):
    warnings.simplefilter("ignore")
    if free:
        torch._functorch.config.donated_buffer = False
    if what == "fill":
        for make in (closure, wrapped):
            map_ = Map()
            gradient(make(map_, backend), map_, "upg")
        return
    if what == "model":
        errors, plain = errors_of_a_model(backend)
    else:
        errors, plain = errors_of_a_map(MAPS[what], backend)
    print(json.dumps({"errors": errors, "plain": plain}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
