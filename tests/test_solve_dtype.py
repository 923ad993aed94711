"""`solve_dtype`: where users name it, and that gradients and residuals stay the model's own."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torchdeq import get_deq

import deq_phantom_plugin as dpp
from conftest import evaluate
from deq_phantom_plugin.adapters.mdeq import MDEQ
from deq_phantom_plugin.adapters.transformer import (
    DEQTransformerConfig,
    DEQTransformerForCausalLM,
)
from deq_phantom_plugin.hosts.own import Own

FAST = ["anderson_fast", "broyden_fast", "fixed_point_fast"]
SPECS = ["upg(k=5, lam=0.8)", "npg(k=4, lam=1.0)", "ift(tol=1e-6)", "jfb", "exact"]


def low():
    """Whether F is evaluated under autocast."""
    return torch.is_autocast_enabled("cpu")


class Model(nn.Module):
    """A layer's equilibrium, and what its evaluations ran under: (autograd, autocast).

    Args:
        make: makes the equilibrium: a function of F and the start.
    """

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.seen = nn.Linear(16, 16), []
        nn.init.orthogonal_(self.inner.weight, 0.6)
        self.deq = make()

    def forward(self, x, **options):
        def func(h):
            self.seen.append((torch.is_grad_enabled(), low()))
            return torch.tanh(self.inner(h) + x)

        out = self.deq(func, torch.zeros_like(x), **options)
        return out if isinstance(out, torch.Tensor) else out[0][-1]

    def residual(self, x, h):
        with torch.no_grad():
            image = torch.tanh(self.inner(h) + x)
        return (image - h).norm(dim=1) / image.norm(dim=1)

    def exact(self, x, spec):
        """The gradient of the strategy in float64, at an equilibrium by 500 iterations."""
        twin = copy.deepcopy(self).double()
        x = x.double()
        func = lambda h: torch.tanh(twin.inner(h) + x)  # noqa: E731
        with torch.no_grad():
            h = torch.zeros_like(x)
            for _ in range(500):
                h = func(h)
        dpp.attach(func, h, spec).square().sum().backward()
        return twin.inner.weight.grad


def equilibrium(solver, **options):
    return lambda: dpp.Equilibrium(solver, tol=1e-6, max_iter=60, **options)


def torchdeq(solver, **options):
    settings = {"f_solver": solver, "f_tol": 1e-6, "f_max_iter": 60, "f_stop_mode": "rel"}
    return lambda: get_deq({**settings, **options})


MAKERS = {
    **{f"own {name}": (equilibrium, name) for name in ("anderson", "broyden", "fixed_point")},
    **{f"torchdeq {name}": (torchdeq, name) for name in FAST},
}


@pytest.fixture(autouse=True)
def hooked():
    with dpp.enabled("torchdeq"):
        yield


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("maker", sorted(MAKERS))
def test_the_gradient_is_that_of_the_full_solve(maker, spec):
    make, solver = MAKERS[maker]
    x = torch.randn(6, 16)
    model = Model(make(solver, grad=spec, solve_dtype="bfloat16"))
    model(x).square().sum().backward()
    want = model.exact(x, spec)
    assert (model.inner.weight.grad - want).norm() / want.norm() < 1e-4
    assert (False, True) in model.seen
    assert (True, True) not in model.seen  # no graph in 16 bits


@pytest.mark.parametrize("maker", sorted(MAKERS))
def test_evaluation_mode_solves_alike(maker):
    make, solver = MAKERS[maker]
    model, x = Model(make(solver, solve_dtype="bfloat16")).eval(), torch.randn(6, 16)
    with torch.no_grad():
        h = model(x)
    assert model.residual(x, h).max() < 1.1e-6
    assert (False, True) in model.seen
    assert model.seen[-1] == (False, False)


def test_what_an_equilibrium_tells_of_its_solve():
    model = Model(equilibrium("broyden", grad="npg", solve_dtype="bfloat16"))
    x, told = torch.randn(6, 16), []
    Own().observe(model.deq, told.append)
    h = model(x).detach()
    last, nfe = model.deq.last, int(model.deq.last.nfe)
    torch.testing.assert_close(last.residual, model.residual(x, h), rtol=1e-2, atol=2e-7)
    assert torch.equal(told[0].residual, last.residual)
    assert told[0].nfe == nfe
    assert model.seen[nfe - 1] == (False, False)
    assert not any(autograd for autograd, _ in model.seen[:nfe])
    assert model.seen[nfe][0] or model.seen[nfe:] == []


def test_an_equilibrium_says_when_it_stops_short_of_a_tolerance_that_16_bits_reached():
    """F of which autocast makes a map that is at its equilibrium anywhere."""
    deq = dpp.Equilibrium("broyden", grad="jfb", max_iter=3, tol=1e-4, solve_dtype="bfloat16")
    layer = nn.Linear(4, 4)
    nn.init.orthogonal_(layer.weight, 0.95)
    with pytest.warns(dpp.ConvergenceWarning, match="above tol=0.0001"):
        deq(lambda h: h * 1 if low() else layer(h) + 1, torch.zeros(2, 4))
    assert deq.last.residual.min() > 1e-4


@pytest.mark.parametrize("maker", ["own broyden", "torchdeq broyden_fast"])
def test_copies_pickles_and_state_dicts(maker):
    make, solver = MAKERS[maker]
    plain = make(solver, grad="jfb")()
    model = make(solver, grad="jfb", solve_dtype="bfloat16")()
    assert plain.state_dict().keys() == model.state_dict().keys()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.solve_dtype == "bfloat16"
    model.load_state_dict(plain.state_dict())
    old = pickle.loads(pickle.dumps(plain))
    del old.__dict__["solve_dtype"]
    again = pickle.loads(pickle.dumps(old))
    out = again(lambda h: 0.5 * torch.tanh(h) + 1, torch.zeros(2, 3))
    assert (out if isinstance(out, torch.Tensor) else out[0][-1]).shape == (2, 3)


@pytest.mark.parametrize("maker", ["own anderson", "torchdeq anderson_fast"])
def test_it_is_switched_on_a_model(maker):
    make, solver = MAKERS[maker]
    model, x = Model(make(solver)), torch.randn(6, 16)
    for dtype in (None, "bfloat16", None, torch.float16):
        model.seen.clear()
        model.deq.solve_dtype = dtype
        model(x)
        assert ((False, True) in model.seen) == (dtype is not None)


def test_in_one_call_of_torchdeq():
    model, x = Model(torchdeq("broyden_fast")), torch.randn(6, 16)
    model(x, solver_kwargs={"solve_dtype": "bfloat16"})
    assert (False, True) in model.seen
    model.seen.clear()
    model(x)
    assert (False, True) not in model.seen
    model = Model(torchdeq("broyden_fast", solve_dtype="bfloat16"))
    model(x, solver_kwargs={"solve_dtype": None})
    assert (False, True) not in model.seen


@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("solver", FAST)
def test_torchdeqs_cores_and_statistics(core, solver):
    x = torch.randn(6, 16)
    model = Model(torchdeq(solver, core=core, grad="upg", solve_dtype="bfloat16"))
    plain = Model(torchdeq(solver, core=core, grad="upg"))
    found = []
    for which in (model, plain):
        which.deq.register_forward_hook(lambda module, args, out: found.append(out))
        which(x)
    for name in ("abs_lowest", "rel_lowest", "abs_trace", "rel_trace", "nstep"):
        assert found[0][1][name].shape == found[1][1][name].shape
    torch.testing.assert_close(found[0][0][-1], found[1][0][-1], rtol=1e-4, atol=1e-5)


def test_sampled_states_of_torchdeq():
    x = torch.randn(6, 16)
    settings = {"n_states": 2, "grad": "upg", "solve_dtype": "bfloat16"}
    model = Model(torchdeq("anderson_fast", core="sliced", **settings))
    model(x)  # two solves, each with an end
    assert (False, True) in model.seen
    model = Model(torchdeq("anderson_fast", core="indexing", **settings))
    with pytest.raises(ValueError, match=r"solve_dtype='bfloat16' with sample_at=\[30, 60\]"):
        model(x)


@pytest.mark.parametrize("solver", ["broyden", "anderson", "fixed_point_iter"])
def test_torchdeqs_own_solvers_are_refused(solver):
    said = f"solve_dtype='bfloat16' with f_solver={solver!r}; expected one of anderson_fast, "
    with pytest.raises(ValueError, match=said):
        torchdeq(solver, solve_dtype="bfloat16")()
    model, x = Model(torchdeq(solver)), torch.randn(6, 16)
    with pytest.raises(ValueError, match="solve_dtype='bfloat16' with f_solver="):
        model(x, solver_kwargs={"solve_dtype": "bfloat16"})
    model.deq.solve_dtype = "bfloat16"
    for mode in (True, False):
        with pytest.raises(ValueError, match="solve_dtype='bfloat16' with f_solver="):
            model.train(mode)(x)


@pytest.mark.parametrize("wrong", ["bf16", 16, torch.float32])
def test_what_is_no_dtype_to_solve_in(wrong):
    said = r"solve_dtype=.*expected None .*'bfloat16', 'float16'"
    for make in (equilibrium("broyden", solve_dtype=wrong), torchdeq(FAST[0], solve_dtype=wrong)):
        with pytest.raises(ValueError, match=said):
            make()
    deq = dpp.Equilibrium()
    deq.solve_dtype = wrong
    with pytest.raises(ValueError, match=said):
        deq(torch.cos, torch.zeros(2, 3))


def test_where_an_equilibrium_has_no_solve_to_lower():
    with pytest.raises(ValueError, match="solve_dtype='bfloat16' beside a function as solver"):
        dpp.Equilibrium(lambda func, h: func(h), solve_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"steps=3 beside .*solve_dtype='bfloat16'"):
        dpp.Equilibrium(steps=3, solve_dtype="bfloat16")
    deq = dpp.Equilibrium("broyden", grad="shine", solve_dtype="bfloat16")
    with pytest.raises(ValueError, match="solve_dtype=None for shine"):
        deq(lambda h: 0.5 * torch.tanh(h) + 1, torch.zeros(2, 3))


def test_a_strategy_that_owns_the_solve_stays_in_full_precision():
    model = Model(equilibrium("broyden", grad="bptt(steps=6)", solve_dtype="bfloat16"))
    model(torch.randn(6, 16)).sum().backward()
    assert not any(lowered for _, lowered in model.seen)


# --- adapters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", FAST)
def test_an_mdeq(solver):
    settings = {"f_solver": solver, "f_max_iter": 12, "f_tol": 1e-6}
    model = MDEQ.from_preset("tiny", grad="jfb", solve_dtype="bfloat16", **settings)
    seen = []
    model.layer.register_forward_pre_hook(lambda *_: seen.append((torch.is_grad_enabled(), low())))
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    nfe = int(model.last.nfe)
    assert seen == [(False, False), *[(False, True)] * (nfe - 2), (False, False), (True, False)]
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_an_mdeq_tells_its_own_residual():
    settings = {"f_solver": "broyden_fast", "f_max_iter": 12, "f_tol": 1e-6}
    model = MDEQ.from_preset("tiny", solve_dtype="bfloat16", **settings).eval()
    evaluate(model, torch.randn(2, 3, 8, 8))
    last = model.last
    func = model.equilibrium_func(last.injection, last.shared)
    with torch.no_grad():
        h, image = (
            torch.cat([leaf.flatten(1) for leaf in state], dim=1)
            for state in (last.equilibrium, func(last.equilibrium))
        )
    own = (image - h).norm(dim=1) / image.norm(dim=1)
    torch.testing.assert_close(last.residual, own, rtol=1e-4, atol=0)


def test_an_mdeq_as_published_names_the_solvers_that_can():
    with pytest.raises(ValueError, match="solve_dtype='bfloat16' with f_solver='broyden'"):
        MDEQ.from_preset("tiny", solve_dtype="bfloat16")


def transformer(**settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 16, "num_attention_heads": 2}
    config = DEQTransformerConfig(
        **sizes, intermediate_size=32, f_tol=1e-4, f_max_iter=60, **settings
    )
    return DEQTransformerForCausalLM(config)


def casts_of(model, ids):
    """Whether evaluations of the block ran under autocast."""
    seen = []
    handle = model.model.block.register_forward_pre_hook(lambda module, args: seen.append(low()))
    out = model(ids, labels=ids)
    handle.remove()
    return out, seen


def test_a_transformer(tmp_path):
    ids, found = torch.randint(31, (2, 7)), []
    for dtype in (None, "bfloat16"):
        model = transformer(f_solver="anderson_fast", solve_dtype=dtype).train()
        out, seen = casts_of(model, ids)
        out.loss.backward()
        assert any(seen) == (dtype is not None)
        assert out.equilibrium_info.residual.max() < 1e-4
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (found[1] - found[0]).norm() < 2e-3 * found[0].norm()
    model.save_pretrained(tmp_path)
    assert DEQTransformerForCausalLM.from_pretrained(tmp_path).config.solve_dtype == "bfloat16"
    model.config.solve_dtype = None  # from the next forward pass on
    assert not any(casts_of(model, ids)[1])
    assert "solve_dtype" not in model.config.to_diff_dict()


def test_what_a_transformers_config_refuses():
    with pytest.raises(ValueError, match="solve_dtype='bfloat16' with f_solver='anderson'"):
        transformer(solve_dtype="bfloat16")
    config = transformer(f_solver="anderson_fast").config
    for wrong in ("bf16", torch.bfloat16, 16):
        with pytest.raises(ValueError, match="solve_dtype="):
            config.solve_dtype = wrong
    model = transformer(f_solver="anderson_fast", solve_dtype="bfloat16")
    model.config.f_solver = "anderson"
    with pytest.raises(ValueError, match="solve_dtype='bfloat16' with f_solver='anderson'"):
        model(torch.randint(31, (2, 7)))


def test_a_transformer_in_16_bits_has_nothing_to_lower():
    model = transformer(f_solver="anderson_fast", solve_dtype="bfloat16").bfloat16().eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(casts_of(model, torch.randint(31, (2, 7)))[1])
