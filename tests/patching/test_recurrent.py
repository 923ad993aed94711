"""The adapter of recurrent language models, on a small repository with the seams of the real one.

References are its own code: a caller may say how many evaluations have a graph.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from deq_phantom_plugin.cli import main
from huginn_repository import ADAPTER, RECURRENT
from tiny_repository import checkout, tree

MODELS = ("dynamic", "raven")
every_model = pytest.mark.parametrize("model", MODELS)


@pytest.fixture(autouse=True, scope="module")
def _only_this():
    with pytest.MonkeyPatch.context() as patch:
        for module in ("repository", "adapter"):
            name = f"deq_phantom_plugin.patching.{module}.known_adapters"
            patch.setattr(name, lambda: [ADAPTER])
        yield


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """The repository as it is."""
    return checkout(tmp_path_factory.mktemp("own"), source=RECURRENT)


@pytest.fixture(scope="module")
def patched(_only_this, tmp_path_factory):
    """The repository, patched with tbptt(k=4)."""
    root = checkout(tmp_path_factory.mktemp("patched"), source=RECURRENT)
    assert main(["patch", str(root), "--grad", "tbptt(k=4)"]) == 0
    return root


def job(model, pair=None, **settings):
    return [model, settings, pair]


def trained(root, *jobs):
    """Three steps of each: losses, gradients, what is monitored, and the random state."""
    done = subprocess.run(command(*jobs), cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def command(*jobs):
    return [sys.executable, "train.py", json.dumps(jobs)]


def same(got, want, tol=1e-12):
    """Whether losses and gradients are."""
    pairs = [(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)]
    return all(a == pytest.approx(b, rel=tol, abs=tol) for a, b in pairs if isinstance(a, float))


@every_model
def test_no_method_is_the_repositorys_own_training_bit_for_bit(model, repo, patched):
    noise = {"noise": 0.1} if model == "dynamic" else {}
    cases = [
        (settings, pair)
        for settings in ({}, {"checkpointed": True}, noise)
        for pair in (None, [3, 2], [0, 3])
    ]
    own = trained(repo, *(job(model, pair, **settings) for settings, pair in cases))
    ours = [job(model, pair, grad=None, **settings) for settings, pair in cases]
    *found, named = trained(patched, *ours, job(model, [3, 2]))
    assert found == own
    assert named != own[1]


@every_model
def test_the_default_and_what_the_configuration_names(model, repo, patched):
    wanted = {"tbptt(k=1)": [4, 1], "tbptt(k='all')": [0, 5], "bptt": [0, 5]}
    jobs = [
        job(model, [3, 2], grad=spec, checkpointed=checkpointed)
        for spec in wanted
        for checkpointed in (False, True)
    ]
    default, *found = trained(patched, job(model, [3, 2]), *jobs)
    own, *others = trained(
        repo, job(model, [1, 4]), *(job(model, wanted[j[1]["grad"]]) for j in jobs)
    )
    assert same(default, own)
    assert all(same(a, b) for a, b in zip(found, others, strict=True))
    assert not same(default, found[0])
    assert all(step[-2]["steps"][:2] == [3, 2] for steps in found for step in steps)


@every_model
def test_the_depth_is_its_own_draw(model, repo, patched):
    """Other gradients, at the same depths, with the same random numbers and states."""
    (own,) = trained(repo, job(model))
    assert len({tuple(step[-2]["steps"]) for step in own}) > 1
    specs = ("bptt", "npg", "ift", "jfb", "upg(k=3, lam=1.0)")
    for found in trained(patched, *(job(model, grad=spec) for spec in specs)):
        for ours, theirs in zip(found, own, strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
            assert ours[-2]["steps"] == theirs[-2]["steps"]
            assert ours[-2]["before"] == pytest.approx(theirs[-2]["before"], rel=1e-12)
            assert ours[-1] == theirs[-1]
        assert not same(found, own)


@every_model
def test_the_step_and_the_total_are_told(model, repo, patched):
    """Of three steps two are the first half, by fraction and by number."""
    early, late = trained(repo, job(model, [4, 1]), job(model, [0, 5]))
    specs = [f"schedule({{0: 'tbptt(k=1)', {at}: 'bptt'}})" for at in (2, 0.5)]
    for found in trained(patched, *(job(model, [3, 2], grad=spec) for spec in specs)):
        assert same(found, [*early[:2], late[2]])


def test_in_memory_it_is_the_same(repo, capfd):
    before = tree(repo)
    run = ["run", "--repo", str(repo), "--grad", "tbptt(k=4)", "--", "env", "-C", str(repo)]
    assert main([*run, *command(job("dynamic", [3, 2]))]) == 0
    line = capfd.readouterr().out.strip().splitlines()[-1]
    assert same(json.loads(line)[0], trained(repo, job("dynamic", [1, 4]))[0])
    kept = {path: content for path, content in tree(repo).items() if "__pycache__" not in path}
    assert kept == {path: c for path, c in before.items() if "__pycache__" not in path}


def test_half_a_patch_does_not_train_with_the_old_method(tmp_path):
    root = checkout(tmp_path, source=RECURRENT)
    assert main(["patch", str(root), "--grad", "npg"]) == 0
    file = "recpre/model_dynamic.py"
    subprocess.run(["git", "-C", str(root), "checkout", "-q", "--", file], check=True)
    done = subprocess.run(
        command(job("dynamic")), cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "RecurrentGPT has no equilibrium whose gradient could be switched" in done.stderr


def test_patched_and_back_byte_for_byte(tmp_path):
    root = checkout(tmp_path, source=RECURRENT)
    before = tree(root)
    assert main(["patch", str(root), "--grad", "npg"]) == 0
    after = tree(root)
    assert {path for path in before if after[path] != before[path]} == {
        "recpre/config_dynamic.py",
        "recpre/model_dynamic.py",
        "recpre/raven_config_minimal.py",
        "recpre/raven_modeling_minimal.py",
        "train.py",
    }
    assert main(["patch", str(root), "--revert"]) == 0
    assert tree(root) == before


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("recpre/model_dynamic.py", "offset = 0", "offset = 1"),
        ("recpre/raven_modeling_minimal.py", "xk = x\n", "xk = 2 * x\n"),
        ("recpre/config_dynamic.py", "lockstep_k", "lockstep"),
        ("recpre/raven_config_minimal.py", "super().__init__(**kwargs)", "pass"),
        ("train.py", "def train_step(", "def train_step(*_):\n    pass\n\n\ndef old("),
    ],
)
def test_another_version_is_refused(path, old, new, tmp_path, capsys):
    root = checkout(tmp_path, git=False, source=RECURRENT)
    text = (root / path).read_text()
    assert old in text
    (root / path).write_text(text.replace(old, new))
    before = tree(root)
    with pytest.raises(SystemExit, match="2"):
        main(["patch", str(root), "--grad", "npg"])
    assert tree(root) == before
    said = capsys.readouterr().err
    assert "unknown version" in said
    assert f"  {path}: " in said


def test_a_cache_in_training_is_refused_where_a_gradient_would_fill_it_again(patched):
    code = """
import torch
from recpre.raven_modeling_minimal import RavenConfig, RavenForCausalLM
ids, entries = torch.arange(8).view(2, 4) % 5, []
for grad, training in ((None, True), ("npg", False), ("npg", True)):
    torch.manual_seed(0)
    model, cache = RavenForCausalLM(RavenConfig(grad=grad)).train(training), {}
    try:
        with torch.set_grad_enabled(training):
            model(ids, ids, [2, 2], cache)
    except ValueError as failure:
        print(failure)
    print(len(cache))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=patched, capture_output=True, text=True, check=True
    )
    first, second, said, third = done.stdout.splitlines()
    assert (first, second, third) == ("8", "8", "0")
    assert said.startswith("a cache in training: a strategy evaluates the recurrent block again")
