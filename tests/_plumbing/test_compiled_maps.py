"""Compiled maps with PyTorch's default settings: gradients, counts, reports, threads, chance."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from test_compile import SPECS, Hosted, OwnLoop, gradients
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import deq_phantom_plugin as dpp
from conftest import DRIVERS
from deq_phantom_plugin._plumbing.calls import Calls
from deq_phantom_plugin._plumbing.compilation import as_written, eager
from deq_phantom_plugin.draws import SameDraws

DRIVER = DRIVERS / "compiled_maps.py"
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))),
    reason="Inductor compiles for the CPU with a C++ compiler, and there is none",
)


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    counters.clear()
    with dpp.enabled("torchdeq"):
        yield
    torch._dynamo.reset()


@pytest.fixture
def x():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(2))


class Counting:
    """A backend that counts how often its graphs run."""

    def __init__(self):
        self.runs = self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


class Wide(nn.Module):
    """A contraction with a wider layer inside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)
        self.u = nn.Parameter(torch.randn(5, 8))

    def forward(self, h):
        return 0.3 * torch.tanh(self.b(F.gelu(self.a(h))) + self.u)


def solved(func):
    h = torch.zeros(5, 8)
    with torch.no_grad():
        for _ in range(30):
            h = func(h)
    return h


def warned(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# --- in processes of their own ---------------------------------------------------------------


def driven(cache, *arguments):
    """Run the driver, with Inductor's cache in a folder."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(DRIVER), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else None


def assert_right(found, size):
    wrong = {name: error for name, error in found["errors"].items() if not error < 1e-4}
    assert not wrong
    assert len(found["errors"]) >= size


def test_a_compiled_map_is_right_in_any_order(tmp_path):
    found = driven(tmp_path, "closure", "aot_eager")
    assert_right(found, 30)
    assert found["plain"] == "refused"  # or nothing is donated, and nothing was shown


@pytest.mark.slow
@pytest.mark.parametrize("what", ["second_copy", "wrapped", "module", "inside"])
def test_any_compiled_map_is_right_in_any_order(what, tmp_path):
    found = driven(tmp_path, what, "aot_eager")
    assert_right(found, 30)
    assert found["plain"] == "refused"


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("cache", ["empty", "filled"])
@pytest.mark.parametrize("what", ["closure", "second_copy", "wrapped", "module", "inside"])
def test_caches_on_disk_change_no_gradient(what, cache, tmp_path):
    if cache == "filled":
        driven(tmp_path, "fill", "inductor")
    found = driven(tmp_path, what, "inductor")
    assert_right(found, 30)
    assert found["plain"] != "right"


@pytest.mark.slow
@needs_compiler
def test_code_that_another_process_has_compiled_is_no_harm_where_pytorch_does_not_refuse(tmp_path):
    # With what PyTorch's error advises, see findings/compiled_backward_donated_cache.sh.
    driven(tmp_path, "fill", "inductor")
    assert_right(driven(tmp_path, "closure", "inductor", "free"), 30)


@pytest.mark.slow
@needs_compiler
def test_a_model_that_is_compiled_as_a_whole_with_inductor(tmp_path):
    for _ in range(2):  # the second from the cache of the first
        assert_right(driven(tmp_path, "model", "inductor"), 39)
    assert_right(driven(tmp_path, "model", "inductor", "free"), 39)


@pytest.mark.slow
def test_a_model_that_is_compiled_as_a_whole(tmp_path):
    assert_right(driven(tmp_path, "model", "aot_eager"), 39)


# --- what stays compiled ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "runs"),
    [
        ("upg", 5),
        ("upg(k=3, lam=0.9)", 3),
        ("upg(k=2, checkpoint=True)", 4),
        ("jfb", 1),
        ("bptt(steps=4)", 4),
        ("npg", 0),
        ("ift", 0),
    ],
)
def test_the_solve_and_single_passes_stay_compiled(spec, runs):
    map_, backend = Wide(), Counting()
    func = torch.compile(lambda h: map_(h), backend=backend)
    h = solved(func)
    assert backend.runs == 30
    for _ in range(2):
        backend.runs = 0
        dpp.attach(func, h, spec).square().sum().backward()
        assert backend.runs == runs
    assert backend.graphs <= 3  # without autograd, with it, and with an input that has a graph


def test_code_around_eager_code_is_compiled_again():
    backend = Counting()
    func = torch.compile(lambda h: h.cos(), backend=backend)
    as_written(func)(torch.ones(3))
    assert backend.runs == 0
    with pytest.raises(ZeroDivisionError), eager():
        raise ZeroDivisionError
    func(torch.ones(3))
    assert backend.runs == 1


def test_threads_do_not_end_each_others_eager_code():
    backend = Counting()
    func = torch.compile(lambda h: h.sin(), backend=backend)
    func(torch.ones(3))
    inside, left = threading.Event(), threading.Event()

    def first():
        with eager():
            inside.set()
            left.wait(60)
            func(torch.ones(3))

    def second():
        inside.wait(60)
        with eager():
            pass
        left.set()

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert backend.runs == 1
    func(torch.ones(3))
    assert backend.runs == 2


@pytest.mark.parametrize("spec", ["npg", "ift", "ift(higher_order=True)", "reversible(steps=3)"])
def test_a_compiler_that_has_given_up(spec, x, caplog):
    """Past its limit the compiler runs a function as it is, but still compiles what that calls."""
    plain, model = OwnLoop(spec), OwnLoop(spec)
    compiled = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1), caplog.at_level(logging.WARNING):
        for n in (5, 3, 4, 2):
            torch.testing.assert_close(gradients(compiled, x[:n]), gradients(plain, x[:n]))
    assert not [text for text in warned(caplog) if "saved_tensors" in text]


@pytest.mark.parametrize("spec", ["upg", "npg", "ift", "ift(higher_order=True)", "jfb"])
def test_a_compiled_training_step(spec, x):
    plain, model = OwnLoop(spec), OwnLoop(spec)

    def step():
        model(x).sum().backward()

    gradients(plain, x)
    torch.compile(step, backend="eager")()
    got = [p.grad for p in model.parameters()]
    torch.testing.assert_close(got, [p.grad for p in plain.parameters()])


# --- what is counted, and what changes -------------------------------------------------------


def test_a_count_compiles_nothing_anew():
    calls = Calls()

    def counted(h):
        calls.note()
        return h.cos(), calls.of_solve()

    func = torch.compile(counted, backend="eager")
    func(torch.ones(3))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert [int(func(torch.ones(3))[1]) for _ in range(12)] == list(range(2, 14))
    assert not calls.by_solver()
    with torch.no_grad():
        func(torch.ones(3))
    assert calls.by_solver()
    assert calls.of_solve() == 1  # what was called with autograd came after the solver


def small_mdeq(grad):
    from deq_phantom_plugin.adapters.mdeq import MDEQ, MDEQConfig

    config = MDEQConfig(
        (8, 8), (2, 4), 16, f_max_iter=6, groups=4, expansion=2, f_solver="fixed_point_iter"
    )
    regularizer = dpp.JacobianRegularization(0.1, increment=0.01, interval=1)

    def loss(run, x):
        logits, penalty = run(x, jac_reg=regularizer)
        return logits.square().sum() + penalty

    model = MDEQ(config, grad=grad, f_tol=0.0)
    return model, loss, lambda: torch.randn(2, 3, 8, 8), lambda: model.last.nfe


def small_language_model(grad):
    transformer = pytest.importorskip("deq_phantom_plugin.adapters.transformer")
    model = transformer.DEQTransformerForCausalLM(
        transformer.DEQTransformerConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2, grad=grad,
            f_solver="fixed_point_iter", f_max_iter=6, f_tol=0.0, jac_reg_weight=0.1,
            jac_reg_increment=0.1, jac_reg_interval=1,
        )
    )  # fmt: skip
    infos = []

    def loss(run, tokens):
        output = run(tokens, labels=tokens)
        infos.append(output.equilibrium_info)
        return output.loss

    return model, loss, lambda: torch.randint(32, (2, 7)), lambda: infos[-1].nfe


def small_layer(grad):
    transformer = pytest.importorskip("deq_phantom_plugin.adapters.transformer")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2,
        num_hidden_layers=1, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformer.deq_from_layer(
        LlamaDecoderLayer(config, 0), grad=grad, f_solver="fixed_point_iter", f_max_iter=6, f_tol=0
    )
    return (
        model,
        lambda run, x: run(x).square().sum(),
        lambda: torch.randn(2, 7, 16),
        lambda: model.last.nfe,
    )


@pytest.mark.slow
@pytest.mark.parametrize("make", [small_mdeq, small_language_model, small_layer])
@pytest.mark.parametrize(
    ("spec", "watched"), [("upg", False), ("schedule({0: 'upg', 2: 'npg', 5: 'upg'})", True)]
)
def test_models_are_not_compiled_anew(make, spec, watched):
    """Steps, evaluations and what a monitor counts change all the time."""
    model, loss, batch, nfe = make(spec)
    compiled, logged = torch.compile(model, backend="eager"), []
    monitor = dpp.monitor(compiled, lambda _, step: logged.append(step), every=1)
    if not watched:
        monitor.remove()

    def step(number):
        dpp.set_step(model, number)
        model.train()
        loss(compiled, batch()).backward()
        assert nfe() == 6
        model.eval()
        with torch.no_grad():
            loss(compiled, batch())

    for number in range(3):
        step(number)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(3, 8):
            step(number)
    assert logged == (list(range(8)) if watched else [])
    monitor.remove()


@pytest.mark.slow
def test_a_graph_network_is_not_compiled_anew():
    ignn = pytest.importorskip("deq_phantom_plugin.adapters.ignn")
    torch.manual_seed(0)
    conv = ignn.IGNNConv(4, 4, lambda_pf=2.0)
    edges = torch.tensor([[0, 1, 2, 3, 4, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 0, 1, 2, 3, 4]])
    features = torch.randn(5, 4)
    run = torch.compile(conv, backend="eager")

    def step():
        run(features, edges).sum().backward()
        assert conv.equilibrium.nfe == want

    conv(features, edges)
    want = conv.equilibrium.nfe
    assert want > 1

    step(), step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            step()


@pytest.mark.parametrize("spec", ["schedule({0: 'upg', 3: 'npg(k=2)', 5: 'jfb'})"])
def test_a_step_that_is_set_reaches_compiled_code(spec, x):
    plain, model = OwnLoop(spec), OwnLoop(spec)
    compiled = torch.compile(model, backend="eager")
    found = []
    for step in (0, 1, 3, 4, 5, 0):
        for of in (plain, model):
            dpp.set_step(of, step)
        found.append(gradients(compiled, x))
        torch.testing.assert_close(found[-1], gradients(plain, x), rtol=0, atol=0)
    assert not torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[2][0], found[4][0])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_strategy_that_is_switched_reaches_compiled_code(way, x):
    plain, model = Hosted("upg"), Hosted("upg")
    compiled = model
    if way == "wrapped":
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    specs = ["upg", "upg(k=3)", "upg(k=3, lam=0.7)", "npg", "jfb", "ift", "npg(k=2)", 3, 4, "upg"]
    for spec in specs:
        assert dpp.set_grad(compiled, spec) == dpp.set_grad(plain, spec) == 1
        torch.testing.assert_close(gradients(compiled, x), gradients(plain, x), rtol=0, atol=0)


# --- what is measured ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", ["F", pytest.param("wrapped", marks=pytest.mark.slow),
            pytest.param("in place", marks=pytest.mark.slow)]
)  # fmt: skip
@pytest.mark.parametrize("seen", ["from the start", "in the middle"])
def test_a_monitor_of_a_compiled_model_sees_what_that_of_the_model_sees(way, seen, x):
    def run(way):
        torch._dynamo.reset()
        model, log = Hosted("upg(k=2)"), []
        compiled = model
        if way == "wrapped":
            compiled = torch.compile(model, backend="aot_eager")
        elif way == "in place":
            model.compile(backend="aot_eager")
        elif way == "F":
            model.inner.compile(backend="aot_eager")
        steps = range(2 if seen == "from the start" else 4)
        for step in steps:
            if step == steps[-2]:
                dpp.monitor(compiled, lambda numbers, step: log.append((step, numbers)), every=1)
            dpp.set_step(model, step)
            got = gradients(compiled, x)
        return log, got

    want, gradient = run("as it is")
    said = pytest.warns(dpp.AssumptionWarning, match="F captures what compiled code returned")
    with contextlib.nullcontext() if way == "F" else said:
        got, compiled = run(way)
    torch.testing.assert_close(compiled, gradient)
    assert [step for step, _ in got] == [step for step, _ in want] != []
    for (_, numbers), (_, like) in zip(got, want, strict=True):
        # In a model that is compiled as a whole the cosine may be of other gradients.
        assert numbers.keys() == like.keys()
        for name in like:
            if way == "F" or not name.endswith("cosine"):
                assert numbers[name] == pytest.approx(like[name], rel=1e-3, abs=1e-5)


def test_gradients_behind_compiled_code_are_refused():
    map_, stem = Wide(), nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 8))
    u = torch.compile(stem, backend="aot_eager")(torch.randn(5, 4))

    def func(h):
        return map_(h + 0.1 * u)

    h, loss = solved(func), lambda h: h.square().sum()
    with pytest.raises(ValueError, match="compiled code, which can be differentiated once"):
        dpp.gradient_report(func, h, loss, [*map_.parameters(), *stem.parameters()])
    report = dpp.gradient_report(func, h, loss, [*map_.parameters()], ["upg"], repeats=1)
    assert report.results[0].cosine > 0.9


# --- chance ----------------------------------------------------------------------------------


def test_a_compiled_map_that_draws_draws_the_same_everywhere():
    """Compiled code makes other numbers of the same random state."""

    def others(graph, inputs):
        def run(*args):
            torch.rand(())
            return graph.forward(*args)

        return run

    def dropped(h):
        return F.dropout(torch.tanh(h), 0.5)

    h = torch.randn(4, 6)
    compiled = torch.compile(dropped, backend=others)
    torch.manual_seed(3)
    want = dropped(h)
    torch.manual_seed(3)
    assert not torch.equal(compiled(h), want)
    torch.manual_seed(3)
    same = SameDraws(compiled)
    for image in (same(h), same(h), as_written(same)(h)):
        torch.testing.assert_close(image, want, rtol=0, atol=0)


@pytest.mark.parametrize("spec", SPECS)
def test_compiled_models_give_no_warning(spec, x, recwarn, caplog):
    model = OwnLoop(spec)
    with caplog.at_level(logging.WARNING):
        compiled = torch.compile(model, backend="eager")
        for n in (5, 5, 4, 5):
            gradients(compiled, x[:n])
    assert not [str(warning.message) for warning in recwarn]
    assert not warned(caplog)
