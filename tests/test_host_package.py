"""The host that docs/howto/host.md writes, installed as a package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```\n", re.DOTALL)

MORE = """
import torch
from fixpoint import Equilibrium

import deq_phantom_plugin as dpp
from deq_phantom_plugin.hosts import find_equilibria, host_versions

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
layer, x = torch.nn.Linear(4, 4), torch.randn(3, 4)
model = torch.nn.ModuleDict({"layer": layer, "solve": Equilibrium(300)})
original = Equilibrium.forward


def gradient():
    layer.zero_grad()
    model["solve"](lambda h: torch.tanh(0.3 * layer(h) + x), torch.zeros(3, 4)).sum().backward()
    return layer.weight.grad.clone()


own = gradient()
assert host_versions()["fixpoint"] == ("1.4.0", True)
assert "fixpoint" in dpp.enable()
assert torch.equal(gradient(), own)
found = {}
SPECS = ["jfb", "upg(k=60, lam=0.9)", "npg(k=200, lam=0.9)", "ift(tol=1e-12)", "exact"]
for spec in [*SPECS, "bptt(steps=300)"]:
    assert dpp.set_grad(model, spec) == 1
    found[spec] = gradient()
torch.testing.assert_close(found["jfb"], own)
for spec in list(found)[1:]:
    torch.testing.assert_close(found[spec], found["exact"], rtol=1e-6, atol=1e-9)
assert not torch.allclose(own, found["exact"])
dpp.set_grad(model, "schedule({0: 'jfb', 5: 'exact'})")
dpp.set_step(model, 5)
torch.testing.assert_close(gradient(), found["exact"])
((host, module),) = find_equilibria(model)
solves = []
end = host.observe(module, solves.append)
dpp.disable()
assert Equilibrium.forward is not original  # somebody observes
gradient()
assert [solve.strategy for solve in solves] == [dpp.JFB()]
assert float(solves[0].residual.max()) < 1e-9
end()
assert Equilibrium.forward is original
assert torch.equal(gradient(), own)

dpp.enable()
end = host.observe(module, solves.append)
for spec, nfe in [("upg", 300), ("bptt(steps=9)", 9), ("reversible(steps=7, beta=0.5)", 14)]:
    dpp.set_grad(model, spec)
    gradient()
    solve = solves[-1]
    assert solve.nfe == nfe
    assert float(solve.residual.max()) < 0.1  # 1.0 where it began
    assert spec == "upg" or torch.equal(solve.equilibrium, solve.attached)
end()

class Dropped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.dropout = torch.nn.Linear(4, 4), torch.nn.Dropout(0.3)
        self.norm, self.solve = torch.nn.BatchNorm1d(4), Equilibrium(20)

    def forward(self, x):
        func = lambda h: torch.tanh(0.3 * self.norm(self.layer(self.dropout(h))) + x)
        return self.solve(func, torch.zeros_like(x))


def trained(spec, every=None):
    torch.manual_seed(0)
    model = Dropped()
    dpp.set_grad(model, spec)
    optimizer, logged = torch.optim.SGD(model.parameters(), 0.1), []
    if every:
        dpp.monitor(model, lambda numbers, step: logged.append(step), every=every)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert logged == (list(range(0, 4, every)) if every else [])
    return [*model.state_dict().values(), torch.get_rng_state()]


for spec in ["jfb", "upg", "bptt(steps=3)"]:
    for every in (1, 2):
        plain, watched = trained(spec), trained(spec, every)
        assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that the package is installed in."""
    folder = tmp_path_factory.mktemp("fixpoint")
    files = dict(FILE.findall((ROOT / "docs" / "howto" / "host.md").read_text(encoding="utf-8")))
    assert set(files) == {
        "fixpoint/__init__.py",
        "fixpoint_phantom.py",
        "pyproject.toml",
        "use.py",
    }
    for name, content in files.items():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_text(content, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    target = folder / "site"
    command = [*pip, "--no-build-isolation", "--target", str(target), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


def run(site, *arguments):
    path = os.pathsep.join([str(site), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=site, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_example_runs(site):
    done = run(site, str(site.parent / "source" / "use.py"))
    assert done.returncode == 0, done.stderr


def test_the_host_keeps_the_contract(site):
    done = run(site, "-c", MORE)
    assert done.returncode == 0, done.stderr


def test_doctor_lists_it(site):
    done = run(site, "-m", "deq_phantom_plugin.cli", "doctor")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  fixpoint +1\.4\.0$", done.stdout, re.MULTILINE)


def test_an_unknown_version_is_left_alone(site):
    (info,) = site.glob("fixpoint-*.dist-info")
    metadata = info / "METADATA"
    before = metadata.read_text()
    metadata.write_text(before.replace("Version: 1.4.0", "Version: 2.0"))
    try:
        done = run(
            site,
            "-c",
            "import deq_phantom_plugin as dpp\n"
            "assert 'fixpoint' not in dpp.enable()\n"
            "assert 'fixpoint' in dpp.enable('fixpoint', force=True)\n",
        )
        assert done.returncode == 0, done.stderr
        assert "fixpoint 2.0 is not hooked: this package knows 1.4" in done.stderr
        listed = run(site, "-m", "deq_phantom_plugin.cli", "doctor").stdout
        assert re.search(r"fixpoint +2\.0, unknown to this package: off", listed)
    finally:
        metadata.write_text(before)
