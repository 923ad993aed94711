"""PyTorch's other doors to a gradient: each is right with each strategy, or refused by its name."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import deq_phantom_plugin as dpp
from deq_phantom_plugin.forward import broyden
from deq_phantom_plugin.strategies import npg_rr

TIGHT = "tol=1e-12, max_iter=200"
SPECS = [
    "jfb",
    "upg",
    "upg(k=3, lam=0.7)",
    "upg(k=3, checkpoint=True)",
    "upg(k=3, lam='adaptive')",
    "npg",
    "npg(k=3, lam=0.7)",
    "npg(k=3, lam='adaptive')",
    "npg(k=3, lam=0.7, clip=0.4)",
    "npg_rr",
    *(
        f"ift(solver={solver!r}, {TIGHT})"
        for solver in ("gmres", "bicgstab", "anderson", "broyden", "fixed_point")
    ),
    f"ift(solver='fixed_point', {TIGHT}, clip=9.0)",
    f"ift({TIGHT}, warm_start=True)",
    f"ift({TIGHT}, higher_order=True)",
    "shine",
    "shine(refine=2)",
    "exact",
    "bptt(steps=6)",
    "reversible(steps=3)",
    "guard('upg')",
    f"guard('ift({TIGHT})')",
    "schedule({0: 'upg', 9: 'ift'})",
    f"schedule({{0: 'ift({TIGHT})', 9: 'upg'}})",
]
BATCH, WIDTH = 3, 4


@pytest.fixture(autouse=True)
def _four_terms(monkeypatch):
    """Two doors are to cut the series of `npg_rr` at the same place."""
    monkeypatch.setattr(npg_rr, "draw_terms", lambda p: 4)


class Model:
    """An equilibrium layer whose user solves by a loop of his own."""

    def __init__(self, spec, memory=None, batch_dim="auto"):
        self.spec, self.memory, self.batch_dim = spec, memory, batch_dim
        generator = torch.Generator().manual_seed(1)
        draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
        self.layer = nn.Linear(WIDTH, WIDTH).double()
        self.params = {"weight": 0.3 * draw(WIDTH, WIDTH), "bias": 0.1 * draw(WIDTH)}
        self.x, self.tangent = draw(BATCH, WIDTH), draw(BATCH, WIDTH)
        self.other, self.u = draw(BATCH, WIDTH), draw(BATCH, WIDTH)

    def __call__(self, x, params=None, spec=None):
        params = self.params if params is None else params
        func = lambda h: torch.tanh(functional_call(self.layer, params, (h,)) + x)  # noqa: E731
        spec = self.spec if spec is None else spec
        solver_result = None
        with torch.no_grad():
            if "shine" in spec:
                solver_result = broyden(func, torch.zeros_like(x), tol=1e-13, keep_inverse=True)
                h = solver_result.state
            else:
                h = torch.zeros_like(x)
                for _ in range(9 if "bptt" in spec or "reversible" in spec else 100):
                    h = func(h)
        context = dpp.Context(
            self.batch_dim, solver_result=solver_result, memory=self.memory, step=0
        )
        return dpp.attach(func, h, spec, context)

    def jacobian(self):
        """Of the output by x, from plain reverse mode, a row at a time: the reference."""
        rows = []
        for unit in torch.eye(BATCH * WIDTH, dtype=torch.float64).view(-1, BATCH, WIDTH):
            x = self.x.clone().requires_grad_()
            rows.append(torch.autograd.grad(self(x), x, unit)[0])
        return torch.stack(rows).view(BATCH, WIDTH, BATCH, WIDTH)

    def pushed(self):
        """That, times the tangent."""
        return torch.einsum("abcd,cd->ab", self.jacobian(), self.tangent)

    def pulled(self):
        """u times that; in one pass, since `shine` is not linear in u."""
        x = self.x.clone().requires_grad_()
        return torch.autograd.grad(self(x), x, self.u)[0]


def of_samples(model):
    """The gradients of every sample's loss by the weights, one plain backward pass each."""
    found = []
    for x in model.x:
        weight = model.params["weight"].clone().requires_grad_()
        loss = model(x[None], {**model.params, "weight": weight}).sin().sum()
        found.append(torch.autograd.grad(loss, weight)[0])
    return torch.stack(found)


def by_vmap_of_grad(model):
    loss = lambda params, x: model(x, params).sin().sum()  # noqa: E731
    return vmap(grad(loss), in_dims=(None, 0))(model.params, model.x)["weight"]


def by_vmap_of_rows(model):
    """Each with a batch of one, as models want it."""
    loss = lambda params, x: model(x[None], params).sin().sum()  # noqa: E731
    return vmap(grad(loss), in_dims=(None, 0))(model.params, model.x)["weight"]


def by_vmap_and_autograd(model):
    """vmap of the model, and plain reverse mode behind it."""
    weights = model.params["weight"].expand(BATCH, -1, -1).clone().requires_grad_()
    values = vmap(lambda x, weight: model(x, {**model.params, "weight": weight}))(model.x, weights)
    return torch.autograd.grad(values.sin().sum(), weights)[0]


def by_nested_vmap(model):
    loss = lambda x, weight: model(x, {**model.params, "weight": weight}).sin().sum()  # noqa: E731
    twice = vmap(vmap(grad(loss, argnums=1), in_dims=(0, None)), in_dims=(None, 0))
    weights = torch.stack([0.5 * model.params["weight"], model.params["weight"]])
    return twice(model.x, weights)[1]


def by_grad(model):
    return grad(lambda x: (model(x) * model.u).sum())(model.x)


def by_vjp(model):
    return vjp(model, model.x)[1](model.u)[0]


def by_jvp(model):
    return jvp(model, (model.x,), (model.tangent,))[1]


def by_jvp_without_autograd(model):
    with torch.no_grad():
        return jvp(model, (model.x,), (model.tangent,))[1]


def by_linearize(model):
    return linearize(model, model.x)[1](model.tangent)


def by_dual_level(model):
    with fwd.dual_level():
        return fwd.unpack_dual(model(fwd.make_dual(model.x, model.tangent))).tangent


def by_dual_level_without_autograd(model):
    with torch.no_grad():
        return by_dual_level(model)


def by_is_grads_batched(model):
    x = model.x.clone().requires_grad_()
    units = torch.eye(BATCH * WIDTH, dtype=torch.float64).view(-1, BATCH, WIDTH)
    found = torch.autograd.grad(model(x), x, units, is_grads_batched=True)[0]
    return found.view(BATCH, WIDTH, BATCH, WIDTH)


def by_functional_jacobian(model):
    return torch.autograd.functional.jacobian(model, model.x, vectorize=True)


def by_functional_jacobian_forward(model):
    jacobian = torch.autograd.functional.jacobian
    return jacobian(model, model.x, vectorize=True, strategy="forward-mode")


def by_functional_vjp(model):
    return torch.autograd.functional.vjp(model, model.x, model.u)[1]


def by_functional_jvp(model):
    """Two passes of reverse mode, the second through the first."""
    return torch.autograd.functional.jvp(model, model.x, model.tangent)[1]


def by_jacrev(model):
    return jacrev(model)(model.x)


def by_jacfwd(model):
    return jacfwd(model)(model.x)


PER_SAMPLE = [by_vmap_of_grad, by_vmap_of_rows, by_vmap_and_autograd, by_nested_vmap]
# What is found, and whether that is inside torch.func, in forward mode, of many gradients at once,
# or differentiates the backward pass.
DOORS = {
    **dict.fromkeys(PER_SAMPLE, (of_samples, "func")),
    by_grad: (Model.pulled, "func"),
    by_vjp: (Model.pulled, "func"),
    by_jacrev: (Model.jacobian, "func"),
    by_jacfwd: (Model.jacobian, "func"),
    by_jvp: (Model.pushed, "func"),
    by_jvp_without_autograd: (Model.pushed, "func"),
    by_linearize: (Model.pushed, "func"),
    by_functional_jacobian_forward: (Model.jacobian, "func"),
    by_dual_level: (Model.pushed, "forward"),
    by_dual_level_without_autograd: (Model.pushed, "forward"),
    by_is_grads_batched: (Model.jacobian, "many"),
    by_functional_jacobian: (Model.jacobian, "many"),
    by_functional_vjp: (Model.pulled, "plain"),
    by_functional_jvp: (Model.pushed, "twice"),
}


def refused_as(spec, kind):
    """What an error names where a strategy is refused: the table of docs/howto/higher_order.md."""
    name = spec.split("(")[0]
    if name == "schedule":  # in step 0
        return refused_as("upg" if "{0: 'upg'" in spec else "ift", kind)
    if name == "guard":
        inner = "upg" if "upg" in spec else "ift"
        return "guard|ift" if kind == "func" else refused_as(inner, kind)
    refused = {
        "func": name in ("ift", "shine", "reversible") or "adaptive" in spec or "clip" in spec,
        "forward": name in ("ift", "shine") or "clip" in spec,
        "many": name == "reversible",
        "plain": False,
        "twice": name in ("ift", "shine", "exact", "npg", "npg_rr") and "higher" not in spec,
    }[kind]
    if refused and name == "shine" and kind == "func":
        return "shine|forward.broyden"
    return name if refused else None


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize(
    "door",
    [pytest.param(d, marks=pytest.mark.slow if d is by_linearize else ()) for d in DOORS],
    ids=lambda door: door.__name__,
)
@pytest.mark.parametrize("spec", SPECS)
def test_every_door_is_right_or_refused_by_name(spec, door):
    find, kind = DOORS[door]
    name = refused_as(spec, kind)
    if name is not None:
        with pytest.raises(RuntimeError, match=rf"({name}).*(ake|Iterate F|higher_order)"):
            door(Model(spec))
        return
    torch.testing.assert_close(door(Model(spec)), find(Model(spec)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("door", PER_SAMPLE, ids=lambda door: door.__name__)
@pytest.mark.parametrize("spec", ["jfb", "upg", "npg", "exact", "bptt(steps=6)"])
@pytest.mark.parametrize("batch_dim", ["auto", 0, None])
def test_per_sample_gradients_whatever_the_context_says(spec, door, batch_dim):
    if door is not by_vmap_of_rows and batch_dim == 0:
        pytest.skip("a sample has no dimension that counts samples")
    make = lambda: Model(spec, dpp.Memory(), batch_dim)  # noqa: E731
    torch.testing.assert_close(door(make()), of_samples(make()), rtol=1e-9, atol=1e-11)


def test_per_sample_gradients_against_central_differences():
    """Of the limit of many steps, by solves of their own."""
    model = Model("npg(k=80, lam=1.0)")
    direction = torch.linspace(-1, 1, WIDTH**2, dtype=torch.float64).view(WIDTH, WIDTH)
    step = 1e-5

    def losses(sign):
        params = {**model.params, "weight": model.params["weight"] + sign * step * direction}
        return model(model.x, params, "bptt(steps=100)").sin().sum(1)

    want = (losses(1) - losses(-1)) / (2 * step)
    got = torch.einsum("bij,ij->b", by_vmap_of_grad(model), direction)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "door", [hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))]
)
@pytest.mark.parametrize("spec", ["npg", "npg(k=1, lam=1.0)", "npg_rr", "exact"])
def test_second_derivatives_of_a_first_derivative_are_refused(spec, door):
    model = Model(spec)
    with pytest.raises(RuntimeError, match=rf"{spec.split('(')[0]}.*second derivative"):
        door(lambda x: model(x).sum())(model.x)


@pytest.mark.parametrize(
    "door", [hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))]
)
def test_second_derivatives_of_bptt(door):
    model = Model("bptt(steps=6)")
    loss = lambda x: model(x).sum()  # noqa: E731
    want = torch.autograd.functional.hessian(loss, model.x)
    torch.testing.assert_close(door(loss)(model.x), want, rtol=1e-9, atol=1e-12)


def test_parameters_that_require_grad_outside_are_no_second_derivative():
    model = Model("npg")
    want = by_vmap_of_grad(model)
    model.params = {name: p.clone().requires_grad_() for name, p in model.params.items()}
    got = by_vmap_of_grad(model)
    torch.testing.assert_close(got.detach(), want)
    with pytest.raises(RuntimeError, match=r"npg.*second derivative"):
        got.sum().backward()


def test_many_gradients_at_once_can_be_differentiated_again():
    model = Model(f"ift({TIGHT}, higher_order=True)")
    jacobian = lambda x: torch.autograd.functional.jacobian(model, x, True, vectorize=True)  # noqa: E731
    x = model.x.clone().requires_grad_()
    got = torch.autograd.grad(jacobian(x).square().sum(), x)[0]
    reference = Model("bptt(steps=100)")
    want = torch.autograd.functional.jacobian(reference, x, create_graph=True).square().sum()
    torch.testing.assert_close(got, torch.autograd.grad(want, x)[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("spec", ["jfb", "upg", "npg", "ift", "exact", "bptt"])
def test_nested_states_are_refused(spec, layout):
    state = torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(3, 4)], layout=layout)
    with pytest.raises(ValueError, match=r"nested tensor.*dpp.attach.*Pad"):
        dpp.attach(lambda h: h * 0.5, state, spec)


@pytest.mark.parametrize("function", [dpp.jacobian_reg, dpp.spectral_radius])
def test_other_functions_are_refused_by_name(function):
    model = Model("upg")
    func = lambda h: torch.tanh(h @ model.params["weight"].mT + h)  # noqa: E731
    with pytest.raises(RuntimeError, match=function.__name__):
        vmap(lambda h: function(func, h))(model.x)
