"""Gradient and model reports, against dense Jacobians and by what they must say."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deq_phantom_plugin as dpp
from deq_phantom_plugin.cli import main
from deq_phantom_plugin.diagnostics.measure import reference
from deq_phantom_plugin.testing import make_equilibrium

GRADS = [
    "ift(tol=1e-10)",
    "upg(k=9, lam=0.7)",
    "npg(k=9, lam=0.7)",
    "jfb",
    "exact",
    "bptt(steps=3)",
]


def report_on(equilibrium, grads=GRADS, **settings):
    return dpp.gradient_report(
        equilibrium.func,
        equilibrium.state,
        equilibrium.probe,
        equilibrium.params,
        grads,
        **settings,
    )


def by_name(report):
    return {result.strategy.partition("(")[0]: result for result in report.results}


# --- numbers ----------------------------------------------------------------------------------


def test_every_number_of_a_row_is_what_a_dense_computation_gives():
    equilibrium = make_equilibrium([(3, 4)])
    report = report_on(equilibrium)
    jacobian = equilibrium.jacobian()
    h = equilibrium.state.clone().requires_grad_()
    (v,) = torch.autograd.grad(equilibrium.probe(h), h)
    identity = torch.eye(12, dtype=torch.float64)

    def gradient(g):
        image = equilibrium.func(equilibrium.state)
        grads = torch.autograd.grad(image, equilibrium.params, g.view(3, 4))
        return torch.cat([grad.flatten() for grad in grads])

    exact = gradient(torch.linalg.solve(identity - jacobian.mT, v.flatten()))
    damped = 0.7 * jacobian.mT + 0.3 * identity
    g = sum(0.7 * torch.linalg.matrix_power(damped, t) for t in range(9)) @ v.flatten()
    expected = gradient(g)
    row = by_name(report)["npg"]
    assert row.cosine == pytest.approx(float(F.cosine_similarity(expected, exact, dim=0)))
    assert row.relative_error == pytest.approx(float((expected - exact).norm() / exact.norm()))
    assert row.norm == pytest.approx(float(expected.norm()))
    residual = v.flatten() - g + jacobian.mT @ g
    assert row.residual == pytest.approx(float(residual.norm() / v.norm()))
    assert row.damped_radius == pytest.approx(
        float(torch.linalg.eigvals(damped).abs().max()), rel=2e-2
    )
    assert report.radius == pytest.approx(
        float(torch.linalg.eigvals(jacobian).abs().max()), rel=2e-2
    )
    assert report.reference == "exact()"
    assert report.reference_residual < 1e-12
    assert report.reference_norm == pytest.approx(float(exact.norm()))
    assert report.forward_residual < 1e-14
    assert (report.batch_size, report.elements, report.parameters) == (3, 12, 16 + 12)


def test_costs_are_counted_whatever_the_strategy_says_of_itself():
    rows = by_name(report_on(make_equilibrium([(3, 4)])))
    counts = {name: (row.n_evaluations, row.n_vjp) for name, row in rows.items() if name != "ift"}
    assert counts == {
        "upg": (9, 9),
        "npg": (1, 9),
        "jfb": (1, 1),
        "exact": (1, 8),  # a sample has 4 elements; three see whether samples are independent
        "bptt": (3, 3),
    }
    assert rows["ift"].n_evaluations == 1
    assert 4 <= rows["ift"].n_vjp <= 8
    assert all(row.forward_seconds > 0 and row.backward_seconds > 0 for row in rows.values())
    assert rows["upg"].peak_bytes > rows["npg"].peak_bytes > 0


def test_checkpointed_steps_are_evaluated_twice():
    row = report_on(make_equilibrium([(3, 4)]), ["upg(k=4, checkpoint=True)"]).results[0]
    assert (row.n_evaluations, row.n_vjp) == (8, 4)


def test_large_states_get_a_gmres_reference_whose_residual_is_shown(monkeypatch):
    equilibrium = make_equilibrium([(3, 4)])
    dense = report_on(equilibrium)
    monkeypatch.setattr(reference, "_DENSE_COLUMNS", 3)
    report = report_on(equilibrium)
    assert report.reference.startswith("ift(solver='gmres', tol=1e-08")
    assert 0 < report.reference_residual < 1e-8
    for row, other in zip(report.results, dense.results, strict=True):
        assert row.cosine == pytest.approx(other.cosine, abs=1e-7)


def test_a_reference_that_stalls_is_solved_densely_where_that_fits(monkeypatch):
    monkeypatch.setattr(reference, "_DENSE_COLUMNS", 3)
    monkeypatch.setattr(reference, "_REFERENCE_VJPS", 2)
    report = report_on(make_equilibrium([(3, 4)]))
    assert report.reference == "exact()"
    assert report.reference_residual < 1e-12


def test_float32_asks_its_reference_for_no_more_than_float32_has(monkeypatch):
    monkeypatch.setattr(reference, "_DENSE_COLUMNS", 3)
    equilibrium = make_equilibrium([(3, 4)], dtype=torch.float32)
    report = report_on(equilibrium)
    assert "tol=1e-06" in report.reference
    assert report.dtype == "float32"
    assert by_name(report)["exact"].relative_error < 1e-5


def test_any_nesting_and_complex_free_states_are_reported():
    equilibrium = make_equilibrium([(2, 3), (2, 2)], lambda x: {"a": x[0], "b": (x[1],)})
    rows = by_name(report_on(equilibrium, ["ift(tol=1e-12)", "jfb"]))
    assert rows["ift"].relative_error < 1e-10
    assert 0 < rows["jfb"].cosine < 1


def test_nothing_is_added_to_grad():
    equilibrium = make_equilibrium([(3, 4)])
    report_on(equilibrium)
    assert all(param.grad is None for param in equilibrium.params)


# --- advice -----------------------------------------------------------------------------------


def linear_problem(eigenvalues, batch=2):
    """h = W h + u with a symmetric W of these eigenvalues."""
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64)).Q
    weight = (basis @ torch.diag(values) @ basis.mT).requires_grad_()
    inject = torch.randn(batch, len(values), dtype=torch.float64)
    inverse = torch.linalg.inv(torch.eye(len(values), dtype=torch.float64) - weight.detach())
    return lambda h: h @ weight + inject, inject @ inverse, [weight]


def advice(eigenvalues, grads=("jfb",)):
    func, h, params = linear_problem(eigenvalues)
    return dpp.gradient_report(func, h, lambda h: h.square().sum(), params, list(grads))


def test_advice_follows_the_damped_radius_and_not_rho():
    # rho(J) = 1.4 both times; the negative eigenvalue is damped into the unit circle.
    damped, lost = advice([-1.4, 0.2, 0.1]), advice([1.4, 0.2, 0.1])
    assert damped.radius == pytest.approx(1.4, rel=1e-2)
    assert lost.radius == pytest.approx(1.4, rel=1e-2)
    words = " ".join(damped.recommendation)
    assert (radius := min(damped.damped_radii.values())) < 1
    assert re.search(r"Try npg\(k=\d+, lam=0.[56]\)", words)
    spec = re.search(r"npg\(k=\d+, lam=0\.\d+\)", words).group()
    assert advice([-1.4, 0.2, 0.1], [spec]).results[0].relative_error < 0.25
    assert radius == pytest.approx(
        min(
            abs(lam * -1.4 + 1 - lam) if lam > 0.77 else 1 - 0.8 * lam
            for lam in damped.damped_radii
        ),
        abs=0.1,
    )
    words = " ".join(lost.recommendation)
    assert "no damping factor" in words
    assert "Try npg" not in words
    assert min(lost.damped_radii.values()) > 1


def test_advice_names_the_cheapest_that_is_good_enough_and_what_goes_uphill():
    report = advice([1.5, 0.1, 0.0], ["jfb", "ift", "npg(k=40, lam=1.0)"])
    words = " ".join(report.recommendation)
    assert by_name(report)["npg"].cosine < 0
    assert by_name(report)["jfb"].cosine < 0
    assert "Not a descent direction: jfb, npg(k=40, lam=1.0)." in words
    assert "ift is the cheapest" in words


def test_an_unsolved_equilibrium_is_called_one():
    func, h, params = linear_problem([0.5, 0.2])
    report = dpp.gradient_report(func, h + 1, lambda h: h.sum(), params, ["jfb"])
    assert "solved only to a relative residual" in report.recommendation[0]
    assert "tbptt(k='all')" in report.recommendation[0]


def test_samples_that_depend_on_one_another_are_noticed():
    norm = nn.BatchNorm1d(4).double()
    weight = (0.5 * torch.eye(4, dtype=torch.float64)).requires_grad_()
    inject = torch.randn(6, 4, dtype=torch.float64)

    def func(h):
        return torch.tanh(norm(h @ weight + inject))

    h = torch.zeros(6, 4, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(200):
            h = func(h)

    def report_told(batch_dim):
        return dpp.gradient_report(
            func,
            h,
            lambda h: h[:, 0].square().sum(),
            [weight],
            ["exact", "ift(tol=1e-9)"],
            context=dpp.Context(batch_dim=batch_dim),
        )

    report = report_told("auto")
    assert report.samples_are_coupled
    assert report.batch_size is None
    assert "mixes the samples" in report.recommendation[0]
    assert all(row.relative_error < 1e-7 for row in report.results)
    report = report_told(0)
    assert report.samples_are_coupled
    assert "were said to be independent" in report.recommendation[0]
    assert "samples depend on one another" in report.results[0].error
    report = report_told(None)
    assert not report.samples_are_coupled  # nobody said otherwise
    assert report.results[0].relative_error == 0


# --- what cannot be ---------------------------------------------------------------------------


def broken(func, equilibrium, context):
    raise RuntimeError("out of luck")


def breaks_in_backward(func, equilibrium, context):
    h = func(equilibrium)
    h.register_hook(lambda grad: 1 / 0)
    return h


def test_a_strategy_that_fails_has_its_error_in_its_row_and_the_others_report():
    report = report_on(make_equilibrium([(3, 4)]), [broken, "npg", breaks_in_backward, "jfb"])
    errors = [row.error for row in report.results]
    assert errors[0] == "RuntimeError: out of luck"
    assert errors[2] == "ZeroDivisionError: division by zero"
    assert errors[1] is None
    assert errors[3] is None
    assert report.results[0].strategy == "broken"
    assert report.results[3].cosine > 0
    assert "broken failed: RuntimeError: out of luck" in str(report)


def test_a_strategy_that_fails_only_now_and_then_does_not_stop_the_report():
    calls = []

    def now_and_then(func, equilibrium, context):
        calls.append(1)
        if len(calls) > 2:  # in one of the timed runs
            raise RuntimeError("out of luck")
        return func(equilibrium)

    report = report_on(make_equilibrium([(3, 4)]), [now_and_then, "jfb"])
    assert report.results[0].error == "RuntimeError: out of luck"
    assert report.results[0].cosine is None
    assert report.results[1].backward_seconds > 0


def test_where_no_method_can_solve_the_reference_the_error_says_why(monkeypatch):
    def refused(*args):
        raise ValueError("too large")

    monkeypatch.setattr(reference.Problem, "differentiate", refused)
    with pytest.raises(ValueError, match="too large"):
        report_on(make_equilibrium([(3, 4)]), ["jfb"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": lambda h: h}, r"shape \(3, 4\); expected a scalar"),
        ({"loss": lambda h: 1.0}, "returned a float; expected a scalar tensor"),
        ({"loss": lambda h: torch.zeros(())}, "does not depend on the state"),
        ({"params": []}, "params is empty"),
        ({"params": torch.zeros(2, requires_grad=True)}, "params is a Tensor"),
        ({"params": [torch.zeros(2)]}, r"params\[0\], of shape \(2,\), does not require grad"),
        ({"params": ["w"]}, r"params\[0\] is a str"),
        ({"params": [torch.zeros(2, requires_grad=True)]}, "depends on none of the 1 tensors"),
        ({"grads": ["upg", "npq"]}, "unknown strategy 'npq'"),
        ({"grads": []}, "grads is empty"),
        ({"repeats": 0}, "repeats=0"),
        ({"equilibrium": torch.full((3, 4), torch.nan, dtype=torch.float64)}, "NaN or Inf"),
        ({"func": lambda h: h[:2]}, "has shape"),
    ],
)
def test_bad_input_is_named(change, message):
    equilibrium = make_equilibrium([(3, 4)])
    given = {
        "func": equilibrium.func,
        "equilibrium": equilibrium.state,
        "loss": equilibrium.probe,
        "params": equilibrium.params,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        dpp.gradient_report(**given)


# --- models -----------------------------------------------------------------------------------

torchdeq = pytest.importorskip("torchdeq")


class Net(nn.Module):
    """Two equilibria in a row, with what could be left changed: dropout, buffers, a mode."""

    def __init__(self, **settings):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(8, 3)
        self.deqs = nn.ModuleList(
            torchdeq.get_deq(f_tol=1e-12, f_max_iter=200, **settings) for _ in range(2)
        )

    def forward(self, x):
        h = self.dropout(self.encoder(x))
        for layer, deq in zip(self.layers, self.deqs, strict=True):
            (h,), _ = deq(
                lambda z, layer=layer, u=h: torch.tanh(0.4 * layer(z) + u), torch.zeros_like(h)
            )
        return self.head(h)


def net(**settings):
    torch.manual_seed(0)
    return Net(**settings).double(), torch.randn(6, 5, dtype=torch.float64)


def test_every_equilibrium_inside_a_model_is_reported():
    model, x = net(grad=3)
    report = dpp.model_report(model, x, lambda y: y.square().mean(), ["ift(tol=1e-12)", "jfb"])
    assert [r.name for r in report.reports] == ["deqs.0", "deqs.1"]
    for each in report.reports:
        rows = {row.strategy: row for row in each.results}
        assert list(rows) == [
            "torchdeq(grad=3, tau=1.0)",
            "ift(solver='gmres', tol=1e-12, max_iter=50, warm_start=False, higher_order=False)",
            "jfb()",
        ]
        assert (
            rows[
                "ift(solver='gmres', tol=1e-12, max_iter=50, warm_start=False, higher_order=False)"
            ].relative_error
            < 1e-10
        )
        assert rows["jfb()"].cosine < rows["torchdeq(grad=3, tau=1.0)"].cosine < 1
        assert each.nfe > 3
        assert each.forward_residual < 1e-10
    # The second depends on its own layer and on all that lies before it.
    head = sum(p.numel() for p in model.head.parameters())
    everything = sum(p.numel() for p in model.parameters())
    assert report.reports[1].parameters == everything - head


def test_a_model_is_left_as_it_was():
    dpp.enable()
    model, x = net(grad="upg(lam='adaptive')")
    model(x)  # its memories hold something
    model.eval()
    model.encoder.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    dpp.model_report(model, x, lambda y: y.square().mean(), ["jfb"])
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(param.grad is None for param in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_current_method_is_not_reported_twice():
    dpp.enable()
    model, x = net(grad="npg(k=3)")
    report = dpp.model_report(model, x, lambda y: y.mean(), ["jfb", "npg(k=3)"])
    assert [r.strategy for r in report.reports[0].results] == ["jfb()", "npg(k=3, lam=0.5)"]


def test_inputs_can_be_positional_or_named():
    model, x = net(grad=1)
    model.dropout.p = 0.0
    losses = {
        dpp.model_report(model, inputs, lambda y: y.mean(), ["jfb"], repeats=1).loss
        for inputs in (x, (x,), [x], {"x": x})
    }
    assert len(losses) == 1


def test_ift_of_torchdeq_gets_the_gradient_that_comes_in():
    # hook_ift turns dL/dh into g with a hook on the state itself.
    for settings in ({"ift": True}, {"hook_ift": True}):
        model, x = net(b_tol=1e-12, b_max_iter=100, **settings)
        model.dropout.p = 0.0
        report = dpp.model_report(model, x, lambda y: y.square().mean(), ["exact"])
        assert all(row.relative_error < 1e-9 for r in report.reports for row in r.results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": nn.Linear(5, 3).double()}, "no equilibrium found inside Linear"),
        ({"inputs": torch.zeros(6, 4, dtype=torch.float64)}, r"refused its inputs \(\(6, 4\)\)"),
        ({"inputs": torch.zeros(1, 5, dtype=torch.float64)}, r"refused its inputs \(\(1, 5\)\)"),
        ({"inputs": {"y": 3}}, r"refused its inputs \(int\): TypeError"),
        ({"loss": lambda y: y}, r"shape \(6, 3\); expected a scalar"),
        ({"loss": lambda y: torch.zeros(())}, "depends on none of the 2 equilibria"),
        ({"grads": ["upg", "npq"]}, "unknown strategy 'npq'"),
    ],
)
def test_bad_models_and_batches_are_named(change, message):
    model, x = net(grad=1)
    given = {"model": model, "inputs": x, "loss": torch.mean, "grads": ["jfb"], **change}
    before = model.state_dict()
    with pytest.raises(ValueError, match=message):
        dpp.model_report(**given)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_trainable_parameters_is_named():
    model, x = net(grad=1)
    with pytest.raises(ValueError, match="no parameter of Net requires grad"):
        dpp.model_report(model.requires_grad_(False), x, torch.mean, ["jfb"])


# --- what is written --------------------------------------------------------------------------


def test_json_holds_every_number_and_is_json(tmp_path):
    report = report_on(make_equilibrium([(3, 4)]), [broken, "npg"])
    report.save_json(tmp_path / "new" / "report.json")
    text = (tmp_path / "new" / "report.json").read_text()
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["results"][1]["cosine"] == report.results[1].cosine
    assert read["results"][0]["error"] == "RuntimeError: out of luck"
    assert read["damped_radii"]["0.5"] == report.damped_radii[0.5]


def test_a_zero_gradient_is_no_direction(tmp_path):
    equilibrium = make_equilibrium([(3, 4)])
    report = dpp.gradient_report(
        equilibrium.func, equilibrium.state, lambda h: (0 * h).sum(), equilibrium.params, ["npg"]
    )
    assert math.isnan(report.results[0].cosine)
    assert report.recommendation[-1].startswith("The gradient is zero")
    assert report.to_dict()["results"][0]["cosine"] is None


def test_the_page_is_self_contained_and_escapes(tmp_path):
    def named(func, equilibrium, context):
        raise RuntimeError("<script>alert(1)</script>")

    report = report_on(make_equilibrium([(3, 4)]), [named, "npg", "npg(k=2)"])
    report.save_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<script>" not in text
    assert text.count("<img ") == 3
    sources = re.findall(r'(?:src|href)="([^"]{5})', text)
    assert set(sources) == {"data:"}
    assert all(row.strategy in text.replace("&#x27;", "'") for row in report.results[1:])


def test_without_matplotlib_the_page_says_what_to_install(tmp_path, monkeypatch):
    report = report_on(make_equilibrium([(3, 4)]), ["jfb"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "deq-phantom-plugin\[viz\]"'):
        report.save_html(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


TARGET = """
import torch
from torchdeq import get_deq


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.deq = get_deq(f_tol=1e-6)

    def forward(self, x):
        (h,), _ = self.deq(lambda h: torch.tanh(0.3 * self.layer(h) + x), torch.zeros_like(x))
        return h


def build():
    return Net(), torch.randn(3, 4), torch.mean


def pair():
    return Net(), torch.randn(3, 4)
"""


def test_the_command_reports_on_a_users_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torch.py").write_text(TARGET.replace("import torch\n", "import torch.nn\n", 1))
    (tmp_path / "torch.py").unlink()
    (tmp_path / "mine.py").write_text(TARGET)
    assert main(["report", "mine.py:build", "--grad", "ift", "npg(k=3)", "--repeats", "1"]) == 0
    shown = capsys.readouterr().out
    assert "npg(k=3) " in shown
    assert "torchdeq(grad=1, tau=1.0)" in shown
    names = {path.name for path in (tmp_path / "runs" / "report").iterdir()}
    assert names == {"report.json", "report.html"}
    assert main(["report", "mine:build", "--grad", "jfb", "--out", "other"]) == 0
    assert (tmp_path / "other" / "report.html").exists()


def test_the_command_takes_a_model_whose_constructor_takes_a_name(tmp_path, monkeypatch, capsys):
    from torchdeq import get_deq

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "named.py").write_text(TARGET.replace("get_deq(", "get_deq(grad='upg', "))
    assert main(["report", "named.py:build", "--grad", "jfb", "--repeats", "1"]) == 0
    assert "\nupg " in capsys.readouterr().out
    with pytest.raises(AssertionError):  # TorchDEQ's own: nothing is enabled any more
        get_deq(grad="upg")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mine.py", "expected FILE.py:FUNCTION"),
        ("nowhere.py:build", "there is no file nowhere.py"),
        ("nowhere_at_all:build", "there is no module nowhere_at_all"),
        ("mine.py:none", "has no function none"),
        ("mine.py:pair", "returned a tuple of 2; expected (model, inputs, loss)"),
    ],
)
def test_the_command_names_what_it_cannot_load(tmp_path, monkeypatch, capsys, target, message):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(TARGET)
    with pytest.raises(SystemExit) as stopped:
        main(["report", target])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_browser_shows_the_page_and_fetches_nothing(tmp_path):
    browser = next(filter(None, map(shutil.which, ["chromium", "google-chrome", "chrome"])), None)
    if browser is None:
        pytest.skip("needs Chromium on the PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    model, x = net(grad=3)
    long = f"schedule({{{', '.join(f'{i}: {chr(39)}npg(k={i + 1}){chr(39)}' for i in range(9))}}})"
    report = dpp.model_report(model, x, lambda y: y.square().mean(), ["ift", "upg", long, broken])
    report.save_html(tmp_path / "report.html")
    errors, requests = [], []
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        view = chromium.new_page(viewport={"width": 1400, "height": 900})
        view.on("console", lambda message: errors.append(message.text))
        view.on("pageerror", lambda error: errors.append(str(error)))
        view.on("request", lambda request: requests.append(request.url))
        view.goto((tmp_path / "report.html").as_uri())
        images = view.locator("img")
        assert images.count() == 6
        for index in range(images.count()):
            assert images.nth(index).is_visible()
            assert images.nth(index).evaluate("image => image.naturalWidth") > 100
            assert images.nth(index).bounding_box()["width"] > 100
        assert view.locator("td.error").count() == 2
        # All columns are in sight, and a figure has the size that its text was set for.
        assert view.evaluate("document.documentElement.scrollWidth") <= 1400
        for box in view.locator(".scroll").all():
            assert box.evaluate("box => box.scrollWidth - box.clientWidth") <= 0
        assert images.first.evaluate("image => image.width / image.naturalWidth") > 0.95
        tops = [images.nth(index).bounding_box()["y"] for index in range(3)]
        assert tops[0] == tops[1] == tops[2]
        chromium.close()
    assert errors == []
    assert [url for url in requests if not url.startswith("data:")] == [
        (tmp_path / "report.html").as_uri()
    ]
