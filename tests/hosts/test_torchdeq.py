"""The TorchDEQ host: names wherever TorchDEQ takes `grad`, and TorchDEQ itself unharmed."""

from __future__ import annotations

import argparse
import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin.hosts import find_equilibria

torchdeq = pytest.importorskip("torchdeq")
from torchdeq import add_deq_args as add_deq_args_before  # noqa: E402
from torchdeq import get_deq as get_deq_before  # noqa: E402
from torchdeq.core import DEQIndexing as DEQIndexing_before  # noqa: E402
from torchdeq.core import DEQSliced as DEQSliced_before  # noqa: E402

CORES = ["sliced", "indexing"]


class Layer(nn.Module):
    """A contraction on one tensor, or on several of different shapes."""

    def __init__(self, several: bool) -> None:
        super().__init__()
        self.shapes = [(3, 4), (3, 2, 3)] if several else [(3, 4)]
        size = sum(torch.Size(shape[1:]).numel() for shape in self.shapes)
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(0.7 * weight / torch.linalg.matrix_norm(weight, 2))
        inject = torch.randn(3, size, generator=generator, dtype=torch.float64)
        self.inject = nn.Parameter(inject)

    def zeros(self):
        zeros = [torch.zeros(shape, dtype=torch.float64) for shape in self.shapes]
        return zeros if len(zeros) > 1 else zeros[0]

    def forward(self, *state):
        rows = torch.cat([leaf.flatten(1) for leaf in state], dim=1)
        out = torch.tanh(rows @ self.weight.mT + self.inject)
        sizes = [torch.Size(shape[1:]).numel() for shape in self.shapes]
        parts = [p.view(s) for p, s in zip(out.split(sizes, 1), self.shapes, strict=True)]
        return parts if len(parts) > 1 else parts[0]


def run(deq, layer, **kwargs):
    """All outputs, and the gradients of a loss that sees every sampled state."""
    with torch.set_grad_enabled(deq.training):
        outs, info = deq(layer, layer.zeros(), **kwargs)
    flat = [leaf for out in outs for leaf in (out if isinstance(out, list) else [out])]
    if not deq.training:
        return flat, [], info
    loss = sum((i + 1) * (leaf * (1 + leaf)).sum() for i, leaf in enumerate(flat))
    grads = torch.autograd.grad(loss, list(layer.parameters()))
    return flat, list(grads), info


def assert_same(ours, theirs, rtol=1e-6):
    assert len(ours[0]) == len(theirs[0])
    for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        a, b = a.detach(), b.detach()
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= rtol * float(b.abs().max())


# --- parity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("n_states", [1, 3])
@pytest.mark.parametrize("sampling", [{}, {"sup_gap": 2}, {"sup_loc": [1, 3]}, {"sup_loc": [5]}])
@pytest.mark.parametrize("training", [True, False])
def test_upg_is_torchdeqs_phantom_gradient(core, several, n_states, sampling, training):
    layer = Layer(several)
    settings = {"core": core, "n_states": n_states, "f_max_iter": 31, **sampling}
    theirs = torchdeq.get_deq(grad=5, tau=0.5, **settings).train(training)
    dpp.enable()
    ours = torchdeq.get_deq(grad="upg(k=5, lam=0.5)", **settings).train(training)
    assert_same(run(ours, layer), run(theirs, layer), rtol=1e-12)


@pytest.mark.filterwarnings("ignore:the solver of a DEQIndexing stopped early")
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    "settings", [{"indexing": [4, 9]}, {"f_solver": "anderson"}, {"f_solver": "broyden"}]
)
def test_upg_parity_with_other_settings(core, several, settings):
    layer = Layer(several)
    settings = {"core": core, "f_max_iter": 20, **settings}
    theirs = torchdeq.get_deq(grad=3, tau=0.8, **settings)
    dpp.enable()
    ours = torchdeq.get_deq(grad="upg(k=3)", tau=0.8, **settings)
    kwargs = {"solver_kwargs": {"f_max_iter": 12}}
    assert_same(run(ours, layer), run(theirs, layer), rtol=1e-12)
    assert_same(run(ours, layer, **kwargs), run(theirs, layer, **kwargs), rtol=1e-12)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("n_states", [1, 3])
@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
def test_ift_is_torchdeqs_implicit_gradient(core, several, n_states, solver):
    """Theirs linearises at F(h*), ours at h*: the same at a tight forward solve."""
    layer = Layer(several)
    settings = {
        "core": core,
        "f_max_iter": 300,
        "f_tol": 1e-12,
        "b_solver": solver,
        "b_max_iter": 200,
        "b_tol": 1e-11,
    }
    # The solve of DEQIndexing is over before the first step that is sampled, so that it hands out
    # one state, the equilibrium. With three TorchDEQ would give it grad=1 then, of the first.
    alone = core == "indexing"
    theirs = torchdeq.get_deq(ift=True, n_states=1 if alone else n_states, **settings)
    dpp.enable()
    # With ift=True TorchDEQ gives the last state the implicit gradient and the others grad=1.
    ours = torchdeq.get_deq(grad=[*[1] * (n_states - 1), "ift"], n_states=n_states, **settings)
    spec = ours.produce_grad[-1].strategy
    # The solver that TorchDEQ takes by default says nothing; ours then takes its own.
    name = dpp.IFT().solver if solver == "fixed_point_iter" else solver
    assert spec == dpp.IFT(solver=name, tol=1e-11, max_iter=200)
    assert_same(run(ours, layer), run(theirs, layer))


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
def test_ift_of_a_small_loss_is_the_small_gradient(solver):
    """TorchDEQ's own is not, see `findings/torchdeq_ift_size_of_the_loss.sh`."""
    dpp.enable()
    layer = Layer(several=False)
    deq = torchdeq.get_deq(grad="ift", f_max_iter=300, f_tol=1e-12, b_solver=solver)
    parameters = list(layer.parameters())

    def gradient(scale):
        h = deq(layer, layer.zeros())[0][-1]
        found = torch.autograd.grad(scale * h.square().sum(), parameters)
        return torch.cat([g.flatten() for g in found])

    whole = gradient(1.0)
    for scale in (1e-4, 1e-8, 1e-12):
        torch.testing.assert_close(gradient(scale) / scale, whole, rtol=1e-9, atol=1e-12)


def test_speedy_lists_without_statistics():
    """`simple_fixed_point_iter` solves on the list itself."""
    layer = Layer(several=True)
    settings = {"f_solver": "simple_fixed_point_iter", "f_max_iter": 30}
    theirs = torchdeq.get_deq(grad=4, tau=0.6, **settings)
    dpp.enable()
    ours = torchdeq.get_deq(grad="upg(k=4, lam=0.6)", **settings)
    assert_same(run(ours, layer), run(theirs, layer), rtol=1e-12)
    tuples = torchdeq.get_deq(grad="npg", **settings)
    outs, _ = tuples(lambda *z: tuple(layer(*z)), tuple(layer.zeros()))
    assert [out.shape for out in outs[-1]] == [(3, 4), (3, 2, 3)]


@pytest.mark.parametrize("spec", ["bptt", "exact", "ift", "jfb", "npg", "upg", dpp.NPG(k=2)])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("several", [False, True])
def test_every_strategy_runs_in_every_core(spec, core, several):
    dpp.enable()
    layer = Layer(several)
    deq = torchdeq.get_deq(core=core, grad=spec, f_tol=1e-9)
    _, grads, _ = run(deq, layer)
    exact = torchdeq.get_deq(core=core, grad="exact", f_tol=1e-9)
    _, want, _ = run(exact, layer)
    for a, b in zip(grads, want, strict=True):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.85


@pytest.mark.parametrize("core", CORES)
def test_one_spec_for_each_sampled_state(core):
    dpp.enable()
    layer = Layer(several=True)
    settings = {"core": core, "n_states": 3, "f_tol": 0.0}  # all three are handed out
    mixed = torchdeq.get_deq(grad=["jfb", 2, {"name": "upg", "k": 3}], **settings)
    same = torchdeq.get_deq(grad=[1, 2, 3], tau=1.0, **settings)
    lam_one = torchdeq.get_deq(grad=["jfb", 2, "upg(k=3, lam=1.0)"], **settings)
    assert_same(run(lam_one, layer), run(same, layer), rtol=1e-12)
    assert mixed.produce_grad[2].strategy == dpp.UPG(k=3, lam=0.5)
    with pytest.raises(ValueError, match="2 entries; expected 1 or 3"):
        torchdeq.get_deq(core=core, n_states=3, grad=["jfb", "upg"])


@pytest.mark.parametrize("core", CORES)
def test_eval_mode_and_no_grad_return_the_equilibrium(core):
    dpp.enable()
    layer = Layer(several=True)
    for spec in ["bptt(steps=2)", "npg", "upg"]:
        deq = torchdeq.get_deq(core=core, grad=spec, f_tol=1e-12, f_max_iter=200)
        with torch.no_grad():
            (out,), _ = deq(layer, layer.zeros())
        with pytest.warns(dpp.AssumptionWarning, match="in evaluation mode"):
            (evaluated,), info = deq.eval()(layer, layer.zeros(), sradius_mode=True)
        assert info["sradius"].shape == (3,)
        for a, b, c in zip(out, evaluated, layer(*evaluated), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(b, c, rtol=1e-10, atol=1e-10)


# --- what the context carries -----------------------------------------------------------------


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("several", [False, True])
def test_bptt_owns_the_solve(core, several):
    dpp.enable()
    layer = Layer(several)
    evaluations = []

    def counted(*state):
        evaluations.append(1)
        return layer(*state)

    deq = torchdeq.get_deq(core=core, grad="bptt(steps=4)", f_max_iter=30)
    (out,), info = deq(counted, layer.zeros())
    assert len(evaluations) == 4
    state = layer.zeros()
    for _ in range(4):
        state = layer(*state) if several else layer(state)
    for a, b in zip(out if several else [out], state if several else [state], strict=True):
        assert torch.equal(a, b)
    assert (info["nstep"] == -1).all()  # TorchDEQ's "not known"


def test_bptt_through_slices_is_bptt_through_all():
    """Each slice goes on from the last one's output, graph and all."""
    dpp.enable()
    layer = Layer(several=False)
    sliced = torchdeq.get_deq(grad="bptt(steps=3)", n_states=2)
    (_, last), _ = sliced(layer, layer.zeros())
    got = torch.autograd.grad(last.square().sum(), layer.weight)
    state = layer.zeros()
    for _ in range(6):
        state = layer(state)
    want = torch.autograd.grad(state.square().sum(), layer.weight)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("core", CORES)
def test_bptt_beside_a_strategy_that_does_not_own_the_solve(core):
    dpp.enable()
    layer = Layer(several=False)
    deq = torchdeq.get_deq(core=core, grad=["bptt(steps=2)", "jfb"], n_states=2, f_tol=1e-30)
    (first, last), _ = deq(layer, layer.zeros())
    torch.testing.assert_close(first, layer(layer(layer.zeros())))
    assert last.shape == first.shape


def test_a_strategy_is_told_what_the_host_knows():
    dpp.enable()
    layer = Layer(several=True)
    told = []

    def spy(func, equilibrium, context):
        told.append(context)
        return func(equilibrium)

    deq = torchdeq.get_deq(grad=spy, f_solver="broyden")
    dpp.set_step(deq, 7)
    start = [torch.full(shape, 0.1, dtype=torch.float64) for shape in layer.shapes]
    deq(layer, start)
    (context,) = told
    assert context.batch_dim == 0
    assert context.current_step == 7
    for a, b in zip(context.initial_state, start, strict=True):
        assert torch.equal(a, b)
    assert context.solver_result["nstep"].shape == (3,)
    assert context.memory is deq.grad_memory[0]


def test_backward_writer_gets_the_solve_of_the_adjoint():
    dpp.enable()
    layer = Layer(several=True)
    infos = []
    deq = torchdeq.get_deq(grad="ift(tol=1e-8)", f_tol=1e-9)
    outs, _ = deq(layer, layer.zeros(), backward_writer=infos.append)
    assert infos == []
    sum(leaf.sum() for leaf in outs[0]).backward()
    (info,) = infos
    assert set(info) >= {"abs_lowest", "rel_lowest", "abs_trace", "rel_trace", "nstep"}
    assert info["rel_lowest"].shape == (3,)
    assert (info["rel_lowest"] <= 1e-8).all()
    assert (info["nstep"] > 2).all()


def test_channels_last_reaches_func_in_backward():
    """TorchDEQ's flat vector forgets it."""
    dpp.enable()
    convs = [nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)]
    seen = []

    def func(*state):
        if torch.is_grad_enabled():
            seen.extend(leaf.is_contiguous(memory_format=torch.channels_last) for leaf in state)
        return [0.3 * torch.tanh(conv(leaf)) for conv, leaf in zip(convs, state, strict=True)]

    start = [torch.zeros(2, 4, 6, 6), torch.zeros(2, 2, 3, 3)]
    start = [leaf.to(memory_format=torch.channels_last) for leaf in start]
    for spec in ["upg(k=3)", "npg", "ift", "bptt(steps=2)"]:
        seen.clear()
        outs, _ = torchdeq.get_deq(grad=spec)(func, start)
        sum(leaf.sum() for leaf in outs[0]).backward()
        assert seen
        assert all(seen), spec


# --- settings ---------------------------------------------------------------------------------


def test_host_settings_are_defaults_of_a_bare_name():
    dpp.enable()

    def strategy(grad, **kwargs):
        return torchdeq.get_deq(grad=grad, **kwargs).produce_grad[0].strategy

    assert strategy("upg") == dpp.UPG(k=5, lam=0.5)
    assert strategy("upg", tau=0.7) == dpp.UPG(k=5, lam=0.7)
    assert strategy("npg(k=9)", tau=0.7) == dpp.NPG(k=9, lam=0.7)
    assert strategy("upg(lam=0.3)", tau=0.7) == dpp.UPG(lam=0.3)
    assert strategy(dpp.UPG(), tau=0.7) == dpp.UPG()
    # TorchDEQ's own defaults, which argparse always sets, say nothing.
    says_nothing = {"tau": 1.0, "b_solver": "fixed_point_iter", "b_max_iter": 40, "b_tol": 1e-6}
    assert strategy("ift", **says_nothing) == dpp.IFT()
    assert strategy("upg", **says_nothing) == dpp.UPG()
    assert strategy("ift", b_solver="broyden") == dpp.IFT(solver="broyden")
    assert strategy("ift", b_solver="anderson", b_max_iter=7, b_tol=1e-3) == dpp.IFT(
        solver="anderson", max_iter=7, tol=1e-3
    )
    assert strategy("ift(tol=1e-9)", b_tol=1e-3) == dpp.IFT(tol=1e-9)
    nested = strategy("schedule({0: 'bptt', 10: 'upg(k=2)'})", tau=0.9)
    assert nested == dpp.Schedule({0: "bptt", 10: "upg(k=2, lam=0.9)"})
    # Arguments of the class itself count like settings in args.
    direct = torchdeq.core.DEQSliced(grad="upg", tau=0.7)
    assert direct.produce_grad[0].strategy == dpp.UPG(lam=0.7)


def test_a_backward_solver_that_only_torchdeq_knows(monkeypatch):
    dpp.enable()
    monkeypatch.setitem(torchdeq.solver._solvers, "newton", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="solver='newton'; expected one of anderson, bicgstab"):
        torchdeq.get_deq(grad="ift", b_solver="newton")
    torchdeq.get_deq(grad="upg", b_solver="newton")  # which solves nothing


@pytest.mark.parametrize("beside", [{"ift": True}, {"hook_ift": True}])
@pytest.mark.parametrize("make", [torchdeq.get_deq, DEQSliced_before, DEQIndexing_before])
def test_ift_beside_a_name_is_an_error(beside, make):
    dpp.enable()
    with pytest.raises(ValueError, match=r"Pass grad alone; .*grad='ift'"):
        make(grad="upg", **beside)


@pytest.mark.parametrize("spec", ["npg", "ift", "exact", "schedule({0: 'upg', 5: 'npg'})"])
@pytest.mark.parametrize("sampling", [{"sup_gap": 1}, {"sup_loc": [1]}])
def test_strategies_without_states_are_refused_by_name(spec, sampling):
    dpp.enable()
    with pytest.raises(ValueError, match=rf"{next(iter(sampling))}=.*{spec[:3]}"):
        torchdeq.get_deq(grad=spec, **sampling)


def test_states_of_other_strategies_that_have_them():
    dpp.enable()
    layer = Layer(several=False)
    outs, _ = torchdeq.get_deq(grad="bptt(steps=6)", sup_gap=2)(layer, layer.zeros())
    assert len(outs) == 3
    outs, _ = torchdeq.get_deq(grad="upg(checkpoint=True)", sup_loc=[2])(layer, layer.zeros())
    assert len(outs) == 2


@pytest.mark.parametrize("grad", ["upq", "upg(k=0)", ["upg", "nope"], 2.5, None, {"k": 1}])
def test_bad_grads(grad):
    dpp.enable()
    with pytest.raises(ValueError, match=r"unknown|expected"):
        torchdeq.get_deq(grad=grad)


@pytest.mark.parametrize("form", ["dict", "namespace", "config"])
def test_nothing_is_written_to_args_beyond_what_torchdeq_writes(form):
    from torchdeq.utils.config import DEQConfig

    def make():
        values = {"grad": 5, "tau": 0.5, "core": "indexing", "mine": [1]}
        if form == "dict":
            return values, values
        namespace = argparse.Namespace(**values)
        if form == "namespace":
            return namespace, vars(namespace)
        config = DEQConfig(values)
        return config, values

    theirs, their_values = make()
    torchdeq.get_deq(theirs, f_tol=1e-4)
    dpp.enable()
    ours, our_values = make()
    our_values["grad"] = "upg"
    deq = torchdeq.get_deq(ours, f_tol=1e-4)
    assert our_values == {**their_values, "grad": "upg"}
    # TorchDEQ reads the caller's own settings later on, too.
    our_values["n_states"] = 2
    assert deq.args.get("n_states") == 2


# --- the command line -------------------------------------------------------------------------


@pytest.mark.parametrize("add", [add_deq_args_before, None])
def test_grad_on_the_command_line(add):
    dpp.enable()
    parser = argparse.ArgumentParser()
    (add or torchdeq.utils.add_deq_args)(parser)
    for text, want in {
        "upg": dpp.UPG(),
        "npg(k=9, lam=0.5)": dpp.NPG(9, 0.5),
    }.items():
        args = parser.parse_args(["--grad", text])
        assert args.grad == [text]
        assert get_deq_before(args).produce_grad[0].strategy == want
    args = parser.parse_args(["--grad", "upg", "--tau", "0.8", "--b_max_iter", "9"])
    assert torchdeq.get_deq(args).produce_grad[0].strategy == dpp.UPG(lam=0.8)
    args = parser.parse_args(["--grad", "3", "2", "--n_states", "2"])
    assert args.grad == [3, 2]
    assert parser.parse_args([]).grad == [1]
    assert "--grad" in parser.format_help()


def test_bad_grad_on_the_command_line(capsys):
    dpp.enable()
    parser = argparse.ArgumentParser()
    add_deq_args_before(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--grad", "upq"])
    assert "unknown strategy 'upq' (did you mean 'upg'?)" in capsys.readouterr().err


def test_a_script_that_enables_after_its_imports(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import argparse, torch\n"
        "from torchdeq import get_deq\n"
        "from torchdeq.utils import add_deq_args\n"
        "import deq_phantom_plugin as dpp\n"
        "dpp.enable()\n"
        "parser = argparse.ArgumentParser()\n"
        "add_deq_args(parser)\n"
        "deq = get_deq(parser.parse_args())\n"
        "w = torch.tensor(0.5, requires_grad=True)\n"
        "out, info = deq(lambda h: w * h + 1, torch.zeros(2, 1))\n"
        "out[-1].sum().backward()\n"
        "print(deq.produce_grad[0].strategy, w.grad is not None)\n"
    )
    for arguments, want in {
        ("--grad", "upg"): "upg(k=5, lam=0.5, checkpoint=False) True",
        ("--grad", "npg(k=9, lam=0.5)"): "npg(k=9, lam=0.5) True",
    }.items():
        result = subprocess.run(
            [sys.executable, str(script), *arguments], capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == want


# --- enable and disable -----------------------------------------------------------------------


def snapshot():
    from torchdeq import core
    from torchdeq.utils import arg_utils

    return {
        "code": arg_utils.add_deq_args.__code__,
        "parser": dict(vars(arg_utils.add_deq_args)),
        "table": dict(core._core),
        **{
            cls.__name__: dict(vars(cls))
            for cls in (core.DEQBase, DEQSliced_before, DEQIndexing_before)
        },
    }


def test_disable_restores_torchdeq_exactly():
    before = snapshot()
    assert "torchdeq" in dpp.enable()
    assert "torchdeq" in dpp.enable("torchdeq")  # idempotent
    assert snapshot() != before
    dpp.disable()
    assert snapshot() == before
    dpp.disable()
    with pytest.raises(AssertionError):
        torchdeq.get_deq(grad="upg")


def test_enabled_as_a_context():
    before = snapshot()
    with dpp.enabled():
        torchdeq.get_deq(grad="upg")
        with dpp.enabled("torchdeq"):
            pass
        torchdeq.get_deq(grad="upg")  # was enabled outside, and stays
    assert snapshot() == before
    with pytest.raises(ZeroDivisionError), dpp.enabled():
        raise ZeroDivisionError
    assert snapshot() == before


def test_unknown_hosts():
    with pytest.raises(ValueError, match=r"unknown host 'torchdec'.*'torchdeq'"):
        dpp.enable("torchdec")


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(
    "settings", [{"grad": 4, "tau": 0.6}, {"ift": True}, {"grad": [1, 3], "n_states": 2}]
)
def test_integers_and_ift_go_the_old_way_bit_for_bit(core, settings):
    layer = Layer(several=True)
    theirs = torchdeq.get_deq(core=core, **settings)
    want = run(theirs, layer)
    dpp.enable()
    ours = torchdeq.get_deq(core=core, **settings)
    got = run(ours, layer)
    for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(ours.produce_grad, theirs.produce_grad, strict=True):
        assert a.__code__ is b.__code__
    assert list(ours.state_dict()) == list(theirs.state_dict()) == []
    assert not list(ours.children())


def test_references_from_before():
    dpp.enable()
    layer = Layer(several=False)
    for deq in [
        get_deq_before(grad="upg"),
        DEQSliced_before(grad="upg"),
        DEQIndexing_before(grad="upg"),
        DEQSliced_before({"grad": "upg"}),
        DEQSliced_before({"f_tol": 1e-4}, grad="upg"),
    ]:
        assert deq.produce_grad[0].strategy == dpp.UPG()
        run(deq, layer)


def test_subclasses_take_names_too():
    class Mine(DEQSliced_before):
        def __init__(self, args=None, **kwargs):
            super().__init__(args, **kwargs)
            self.mine = True

    torchdeq.register_deq("mine", Mine)
    dpp.enable()
    deq = torchdeq.get_deq(core="mine", grad="npg")
    assert deq.mine
    run(deq, Layer(several=False))
    assert dpp.set_grad(deq, "upg") == 1


def test_models_survive_disable():
    dpp.enable()
    layer = Layer(several=True)
    deq = torchdeq.get_deq(grad="upg")
    want = run(deq, layer)
    owner = torchdeq.get_deq(grad="bptt")
    dpp.disable()
    assert_same(run(deq, layer), want)
    with pytest.raises(RuntimeError, match=r"dpp.enable\(\)"):
        run(owner, layer)


# --- observation ------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"grad": 5, "tau": 0.5},
        {"grad": [2, 3], "n_states": 2},
        {"ift": True},
        {"hook_ift": True},
        {"grad": "npg(k=3)"},
        {"grad": "bptt"},
    ],
)
def test_an_observed_solve_has_all_it_takes_to_do_the_gradient_again(
    core, several, settings, enabled
):
    if isinstance(settings.get("grad"), str) or enabled:
        dpp.enable()
    layer = Layer(several)
    deq = torchdeq.get_deq(core=core, f_tol=1e-13, b_tol=1e-12, f_max_iter=99, **settings)
    unobserved = run(deq, layer)
    seen = []
    host, found = find_equilibria(deq)[0]
    end = host.observe(found, seen.append)
    observed = run(deq, layer)
    (solve,) = seen
    for a, b in zip(observed[0] + observed[1], unobserved[0] + unobserved[1], strict=True):
        assert torch.equal(a, b)

    leaves = solve.equilibrium if several else [solve.equilibrium]
    assert not any(leaf.requires_grad for leaf in leaves)
    v = [torch.linspace(-1, 2, leaf.numel(), dtype=leaf.dtype).view_as(leaf) for leaf in leaves]

    def gradient(attached):
        outputs = attached if several else [attached]
        return torch.autograd.grad(outputs, list(layer.parameters()), v, retain_graph=True)

    outs, _ = deq(layer, layer.zeros())
    context = dpp.Context(initial_state=solve.initial_state)
    again = dpp.attach(solve.func, solve.equilibrium, solve.strategy, context)
    for a, b in zip(gradient(again), gradient(outs[-1]), strict=True):
        if settings.get("n_states") and core == "sliced":
            break  # the graph of one sampled state goes on into the next
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)

    owned = settings.get("grad") == "bptt"
    assert (solve.residual < (1e-2 if owned else 1e-10)).all()
    assert solve.nfe == 10 if owned else 10 < solve.nfe < 99
    end()
    run(deq, layer)
    assert len(seen) == 2


def test_observation_is_for_training_and_takes_names_of_arguments():
    layer, seen = Layer(several=False), []
    deq = torchdeq.get_deq(core="sliced", grad=2)
    host, found = find_equilibria(deq)[0]
    host.observe(found, seen.append)
    with torch.no_grad():
        deq(layer, layer.zeros())
    deq.eval()
    deq(layer, layer.zeros())
    assert seen == []
    deq.train()
    dpp.enable()
    dpp.set_grad(deq, "upg")
    deq(func=layer, z_star=layer.zeros())
    assert [repr(solve.strategy) for solve in seen] == ["upg(k=5, lam=0.5, checkpoint=False)"]


# --- models -----------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, n=2, **settings) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(several=False) for _ in range(n))
        self.deqs = nn.ModuleList(torchdeq.get_deq(**settings) for _ in range(n))

    def forward(self):
        total = 0.0
        for layer, deq in zip(self.layers, self.deqs, strict=True):
            outs, _ = deq(layer, layer.zeros())
            total = total + outs[-1].square().sum()
        return total


def strategies_of(model):
    return [deq.produce_grad[0].strategy for deq in model.deqs]


def test_set_grad_switches_every_equilibrium_mid_training():
    dpp.enable()
    model = Model(grad="upg")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for spec in ["upg", "npg(k=3)", dpp.IFT(), "bptt(steps=3)", "schedule({0: 'jfb', 9: 'npg'})"]:
        assert dpp.set_grad(model, spec) == 2
        assert strategies_of(model) == [dpp.get_strategy(spec)] * 2
        dpp.set_step(model, 3)
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    with pytest.warns(UserWarning, match="no equilibrium found inside Linear"):
        assert dpp.set_grad(nn.Linear(2, 2), "upg") == 0


def test_set_grad_on_models_made_before_enable():
    model = Model(grad=3, tau=0.7)
    assert dpp.set_grad(model, "upg(k=3)") == 2
    assert strategies_of(model) == [dpp.UPG(k=3, lam=0.7)] * 2
    torch.manual_seed(0)
    assert model().requires_grad
    assert dpp.set_grad(model, 2) == 2
    with pytest.raises(AttributeError):
        strategies_of(model)


def test_set_grad_changes_all_or_nothing():
    dpp.enable()
    model = Model(grad="upg")
    model.deqs[1] = torchdeq.get_deq(grad="upg", sup_gap=2)
    with pytest.raises(ValueError, match="sup_gap"):
        dpp.set_grad(model, "npg")  # fits the first, not the second
    assert strategies_of(model) == [dpp.UPG()] * 2
    with pytest.raises(ValueError, match="unknown strategy"):
        dpp.set_grad(model, "nope")
    assert strategies_of(model) == [dpp.UPG()] * 2


@pytest.mark.parametrize("spec", ["upg", "npg(lam='adaptive')", "schedule({0: 'bptt', 5: 'ift'})"])
def test_models_are_copied_and_pickled(spec):
    dpp.enable()
    model = Model(grad=spec)
    dpp.set_step(model, 5)
    model().backward()
    want = model().detach()
    for twin in [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]:
        assert strategies_of(twin) == strategies_of(model)
        torch.testing.assert_close(twin().detach(), want)
        # Not the same memory: a copy goes its own way.
        dpp.set_step(twin, 9)
        assert model.deqs[0].grad_memory[0].step == 5


# --- schedules --------------------------------------------------------------------------------

SCHEDULE = "schedule({0: 'bptt(steps=2)', 3: 'jfb', 5: 'ift'})"


def evaluations_of(deq, layer):
    """How often F is evaluated under autograd, which tells the strategies apart."""
    calls = []

    def func(*state):
        calls.append(torch.is_grad_enabled())
        return layer(*state)

    deq(func, layer.zeros())
    return sum(calls), len(calls)


def test_schedule_switches_by_step_not_by_calls():
    dpp.enable()
    layer = Layer(several=False)
    deq = torchdeq.get_deq(grad=SCHEDULE)
    for step in [0, 2, 3, 4, 5, 100]:
        dpp.set_step(deq, step)
        for _ in range(3):  # gradient accumulation: three forward passes a step
            under_grad, total = evaluations_of(deq, layer)
        assert under_grad == (2 if step < 3 else 1)
        assert (total == 2) == (step < 3)


def test_schedule_is_saved_and_resumed_with_the_model():
    dpp.enable()
    model = Model(grad=SCHEDULE)
    added = {f"deqs.{i}.grad_memory.0.step" for i in range(len(model.deqs))}
    assert set(model.state_dict()) - set(Model(grad=1).state_dict()) == added
    dpp.set_step(model, 4)
    model().backward()
    saved = model.state_dict()
    assert set(saved) - set(Model(grad=1).state_dict()) == added
    resumed = Model(grad=SCHEDULE)
    resumed.load_state_dict(saved)
    assert [deq.grad_memory[0].step for deq in resumed.deqs] == [4, 4]
    assert evaluations_of(resumed.deqs[0], resumed.layers[0])[0] == 1
    # Older checkpoints, which know no step, load strictly as well.
    older = {key: value for key, value in saved.items() if "grad_memory" not in key}
    resumed.load_state_dict(older)
    assert resumed.deqs[0].grad_memory[0].step is None


def test_schedule_resumes_through_a_file(tmp_path):
    dpp.enable()
    model = Model(grad="schedule({0: 'npg(lam=\"adaptive\")', 9: 'ift'})")
    dpp.set_step(model, 4)
    model().backward()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    resumed = Model(grad="schedule({0: 'npg(lam=\"adaptive\")', 9: 'ift'})")
    resumed.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    for one in (model, resumed):
        one.zero_grad()
        one().backward()
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_schedule_that_is_not_told_the_step_warns_once():
    dpp.enable()
    layer = Layer(several=False)
    deq = torchdeq.get_deq(grad=SCHEDULE)
    with pytest.warns(dpp.AssumptionWarning, match=r"dpp.set_step\(model, step\)") as record:
        counts = [evaluations_of(deq, layer)[0] for _ in range(3)]
    assert counts == [2, 2, 2]
    assert len(record) == 1


@pytest.mark.parametrize("step", [-1, 1.5, "3", True, None])
def test_set_step_takes_whole_numbers(step):
    with pytest.raises(ValueError, match="expected a whole number of at least 0"):
        dpp.set_step(nn.Linear(1, 1), step)


@pytest.mark.parametrize(
    ("stages", "match"),
    [
        ({5: "upg"}, "step 0"),
        ({}, "step 0"),
        ({0: "upg", -1: "npg"}, "-1"),
        ({0: "upg", 1.5: "npg"}, "1.5"),
        ({0: "nope"}, "unknown strategy 'nope'"),
        ("upg", "expected a dict"),
        (3, "expected a dict"),
    ],
)
def test_bad_schedules(stages, match):
    with pytest.raises(ValueError, match=match):
        dpp.Schedule(stages)
