"""Theorem 3, on examples/sgd_convergence.py."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from conftest import load_example

STEPS = 2000


example = load_example("sgd_convergence")


@pytest.fixture(scope="module")
def toy():
    return example.Toy.draw()


@pytest.fixture(scope="module")
def perturbed(toy):
    """Curves by the norm of the perturbation."""
    sizes = (0.0, 0.03, 0.1, 0.3, 1.0)
    return {s: example.descend(toy, f"{s}", toy.perturbed(s), STEPS) for s in sizes}


@pytest.fixture(scope="module")
def attached(toy):
    """Curves of NPG by its number of terms, and one of UPG."""
    specs = {k: f"npg(k={k}, lam=1.0)" for k in (1, 2, 4, 8)} | {"upg": "upg(k=6, lam=0.5)"}
    return {
        key: example.descend(toy, spec, toy.attached(spec), STEPS) for key, spec in specs.items()
    }


def late(curve) -> float:
    """The weighted mean over the last three quarters of the steps: what M_N levels off at."""
    eta = torch.arange(1, STEPS + 1, dtype=torch.float64).rsqrt().cumsum(0)
    n = STEPS // 4
    total = curve.measured * eta
    return float((total[-1] - total[n]) / (eta[-1] - eta[n]))


# --- what the bound rests on ------------------------------------------------------------------


def test_the_closed_forms_are_those_of_autograd(toy):
    theta = toy.start.clone().requires_grad_()
    h = torch.zeros(64, 12, dtype=torch.float64)
    for _ in range(400):
        h = h @ toy.weight.mT + toy.inject @ theta + toy.x
    risk = (h - toy.y).square().sum(1).mean() / 2
    assert toy.risk(toy.start) == pytest.approx(risk.item())
    (gradient,) = torch.autograd.grad(risk, theta)
    torch.testing.assert_close(gradient, toy.hessian @ (toy.start - toy.minimiser))
    # Single samples: unbiased, with noise that does not depend on theta.
    each = toy.gradient(toy.start.expand(64, -1), torch.arange(64))
    torch.testing.assert_close(each.mean(0), gradient)
    torch.testing.assert_close(each - gradient, toy.noise)
    assert torch.linalg.eigvalsh(toy.hessian)[0] > 0.1  # strongly convex


def test_attached_oracles_are_the_packages_gradients(toy):
    theta = toy.start.repeat(example.RUNS, 1)
    index = torch.arange(example.RUNS)
    exact = toy.gradient(theta, index)
    torch.testing.assert_close(toy.attached("exact")(theta, index), exact)
    torch.testing.assert_close(toy.attached("npg(k=200, lam=1.0)")(theta, index), exact)
    h = (theta @ toy.inject.mT + toy.x[index]) @ toy.inverse.mT
    torch.testing.assert_close(toy.attached("jfb")(theta, index), (h - toy.y[index]) @ toy.inject)


def test_epsilon_is_the_error_that_was_made(toy, perturbed, attached):
    for size, curve in perturbed.items():
        assert curve.epsilon == pytest.approx(size, abs=1e-12)
    errors = [attached[k].epsilon for k in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1
    assert errors[-1] < 0.05


# --- what it says -----------------------------------------------------------------------------


def test_the_mean_stays_below_the_bound_for_every_n(perturbed, attached):
    for curve in [*perturbed.values(), *attached.values()]:
        assert (curve.measured <= curve.bound).all()
    # It is a bound, not a formula: loose even without an error, but not empty.
    ratio = perturbed[0.0].bound / perturbed[0.0].measured
    assert ratio.min() > 1
    assert ratio.max() < 10


def test_the_bound_is_a_41_written_out(toy):
    """With a = eta_1, one step: G eps + (R(theta_1) - m) / a + K a."""
    eta = torch.tensor([0.25], dtype=torch.float64)
    basis = torch.linalg.eigh(toy.hessian).eigenvectors
    start = (basis.mT @ toy.hessian @ (toy.start - toy.minimiser)).abs()
    for epsilon in (0.0, 0.5):
        g = torch.maximum(start, (toy.noise @ basis).abs().max(0).values + epsilon).norm()
        m = toy.noise.square().sum() / 64
        k = toy.smoothness * ((g + epsilon) ** 2 + 2 * m + 12 * epsilon**2) / 2
        gap = toy.risk(toy.start) - toy.risk(toy.minimiser)
        wanted = g * epsilon + gap / 0.25 + k * 0.25
        assert float(example.upper_bound(toy, epsilon, eta)) == pytest.approx(float(wanted))


def test_the_bound_on_the_gradient_is_never_exceeded(toy):
    """G is claimed for every run, not for their mean: the worst sample at every step."""
    epsilon = 0.5
    basis = torch.linalg.eigh(toy.hessian).eigenvectors
    eigenvalues = torch.linalg.eigvalsh(toy.hessian)
    g = (basis.mT @ toy.hessian @ (toy.start - toy.minimiser)).abs()
    pull = (toy.noise @ basis).abs().amax(0) + epsilon
    limit = torch.maximum(g, pull)
    for n in range(1, STEPS + 1):
        step = eigenvalues / (toy.smoothness * n**0.5)
        g = (1 - step) * g + step * pull
        assert (g <= limit * (1 + 1e-12)).all()


def test_without_error_it_falls_as_log_n_over_sqrt_n(perturbed):
    n = torch.arange(30, STEPS, dtype=torch.float64)
    rate = (n.log() / n.sqrt()).log()
    measured = perturbed[0.0].measured[30 - 1 : STEPS - 1].log()
    design = torch.stack([rate, torch.ones_like(rate)], dim=1)
    power = float(torch.linalg.lstsq(design, measured[:, None]).solution[0])
    assert power > 1  # measured: 1.5; the way from the start falls as 1 / sqrt(N)


def test_with_an_error_it_levels_off_at_a_level_that_grows_with_it(perturbed):
    floors = {size: late(curve) - late(perturbed[0.0]) for size, curve in perturbed.items()}
    # grad R = -shift is where SGD settles: the level is eps^2, below the theorem's G eps.
    assert floors[0.1] == pytest.approx(0.01, rel=0.2)
    assert floors[0.3] == pytest.approx(0.09, rel=0.1)
    assert floors[1.0] == pytest.approx(1.0, rel=0.05)
    assert floors[0.03] < floors[0.1]
    # Over the last decade, the exact gradient's mean falls threefold, this one hardly.
    assert perturbed[0.0].measured[-1] < 0.4 * perturbed[0.0].measured[STEPS // 10]
    assert perturbed[1.0].measured[-1] > 0.8 * perturbed[1.0].measured[STEPS // 10]


def test_more_terms_of_the_series_level_off_lower(toy, perturbed, attached):
    floors = {key: late(curve) - late(perturbed[0.0]) for key, curve in attached.items()}
    assert floors[1] > 3 * floors[2] > 9 * floors[4] > 27 * abs(floors[8])
    assert attached[8].measured[-1] == pytest.approx(float(perturbed[0.0].measured[-1]), rel=0.01)
    # Where P^T S_k^T (mean residual) = 0 the biased gradient settles, grad R is not zero.
    for k in (1, 2):
        series = sum(torch.linalg.matrix_power(toy.weight, t) for t in range(k)) @ toy.inject
        origin = toy.residuals(torch.zeros_like(toy.start)).mean(0)
        settled = -torch.linalg.solve(series.mT @ toy.jacobian, series.mT @ origin)
        floor = float((toy.hessian @ (settled - toy.minimiser)).square().sum())
        assert floors[k] == pytest.approx(floor, rel=0.15)
    assert floors[1] < attached[1].epsilon ** 2


# --- the command ------------------------------------------------------------------------------


def test_the_quick_run_writes_its_figure_and_its_numbers(tmp_path, capsys):
    figures = tmp_path / "new" / "figures"
    example.main(["--quick", "--out", str(figures)])
    assert sorted(path.name for path in figures.iterdir()) == [
        "sgd_convergence.csv",
        "sgd_convergence.png",
    ]
    image = (figures / "sgd_convergence.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert image.rstrip().endswith(b"IEND\xaeB`\x82")
    rows = list(csv.DictReader((figures / "sgd_convergence.csv").read_text().splitlines()))
    oracles = {row["oracle"] for row in rows}
    assert set(example.STRATEGIES) < oracles
    assert len(oracles) == len(example.STRATEGIES) + len(example.PERTURBATIONS)
    assert {int(row["N"]) for row in rows if row["oracle"] == "jfb"} >= {1, 1000}
    assert all(0 < float(row["measured"]) < float(row["bound"]) for row in rows)
    printed = capsys.readouterr().out
    assert "npg(k=8, lam=1.0)" in printed
    assert str(figures / "sgd_convergence.png") in printed


def test_bad_arguments_are_told_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "experiment", lambda steps: pytest.fail("work was done"))
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "folder"):
        with pytest.raises(SystemExit, match="2"):
            example.main(["--out", str(out)])
        assert str(file) in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        example.main(["--steps", "many"])
    assert "unrecognized arguments" in capsys.readouterr().err


def test_the_figure_in_the_repository_is_of_this_experiment():
    rows = list(
        csv.DictReader(
            (Path(example.__file__).parent / "figures/sgd_convergence.csv").read_text().splitlines()
        )
    )
    toy = example.Toy.draw()
    curve = example.descend(toy, "exact", toy.perturbed(0.0), 100)
    found = {int(row["N"]): float(row["measured"]) for row in rows if row["oracle"] == "exact"}
    assert max(found) == 20000
    bounds = {int(row["N"]): float(row["bound"]) for row in rows if row["oracle"] == "exact"}
    for n in [n for n in found if n <= 100]:
        assert bounds[n] == pytest.approx(float(curve.bound[n - 1]), rel=1e-4)
