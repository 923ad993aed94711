"""The adapters of recurrent models on checkouts of the repositories that they are for.

Each model is built by its own code, tiny, in a process of its own. `test_recurrent_repos.py` has
the same on a small repository of ours.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from conftest import DRIVERS, HOSTS
from deq_phantom_plugin.cli import main
from tiny_repository import tree

pytestmark = pytest.mark.hosts

REPOSITORIES = {
    "fixed-point-diffusion-models": ("fpdm",),
    "Attractor": ("attractor", "eqlm"),
    "HRM-Text": ("hrm_text", "hrm_text_trm", "hrm_text_ut", "hrm_text_rins"),
}
NEEDS = {
    "fixed-point-diffusion-models": ("jaxtyping", "numpy", "PIL"),
    "HRM-Text": ("pydantic", "einops", "hydra"),
}
MODELS = [(root, model) for root, models in REPOSITORIES.items() for model in models]
every_model = pytest.mark.parametrize(("repository", "model"), MODELS)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A copy of a repository's text files, patched with npg if asked for; made on demand."""
    made = {}

    def copy(repository, patched=True):
        if not (HOSTS / repository).is_dir():
            pytest.skip(f"no {HOSTS / repository}: put a checkout there, or set DEQ_PHANTOM_HOSTS")
        for package in NEEDS.get(repository, ()):
            pytest.importorskip(package, reason=f"its own files import {package}")
        if (repository, patched) not in made:
            root = tmp_path_factory.mktemp("copy") / repository
            left_out = shutil.ignore_patterns(".git", "__pycache__", "assets", "visuals", "logs")
            shutil.copytree(HOSTS / repository, root, ignore=left_out)
            if patched:
                assert main(["patch", str(root), "--grad", "npg"]) == 0
            made[repository, patched] = root
        return made[repository, patched]

    return copy


def said(driver, root, *args, prefix=()):
    """What a driver says in the folder of a repository."""
    command = [*prefix, sys.executable, str(DRIVERS / driver), *map(str, args)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.fixture(scope="module")
def results(copies):
    """What the driver says of each model, all checks in one process."""
    found = {}

    def result(repository, model):
        if model not in found:
            checks = ["own", "unrolled", "implicit", "tools", "special"]
            if repository == "HRM-Text":
                checks += ["compiled", "configured"]
            original = HOSTS / repository
            found[model] = said("looped.py", copies(repository), model, original, *checks)
        return found[model]

    return result


@pytest.fixture
def found(repository, model, results):
    return results(repository, model)


@every_model
def test_no_method_is_the_repositorys_own_training_bit_for_bit(found):
    same = found["own"]
    assert len(same) >= 8
    assert all(same.values()), same


@every_model
def test_more_of_the_loop_is_its_own_code_told_to(found):
    errors = dict(found["unrolled"])
    assert errors.pop("tells apart") > 1e-2
    assert max(errors.values()) < 1e-9, errors


@every_model
def test_implicit_gradients_against_dense_jacobians(found):
    errors = dict(found["implicit"])
    assert errors.pop("tells apart") > 1e-2
    assert max(errors.values()) < 1e-9, errors


@every_model
def test_schedules_monitors_and_reports(found):
    tools = found["tools"]
    assert max(error for name, error in tools.items() if name.startswith("schedule")) < 1e-9
    for name, value in tools.items():
        if name.startswith("monitored"):
            measured = {each.rpartition("/")[2] for each in value}
            assert measured >= {"cosine", "forward_residual", "nfe", "spectral_radius"}
        if name.startswith("reported"):  # two calls; the method in force and three others
            assert [len(report) for report in value] == [4, 4]


@every_model
def test_in_memory(repository, model, copies, capfd):
    root = copies(repository, patched=False)
    before = tree(root)
    spec = {"Attractor": "upg(k=3, lam=1.0)", "HRM-Text": "tbptt(k=2)"}.get(
        repository, "tbptt(k=2)"
    )
    if model == "hrm_text":
        spec = "tbptt(k=3)"
    driver = [sys.executable, str(DRIVERS / "looped.py"), model, str(HOSTS / repository)]
    command = ["--", "env", "-C", str(root), *driver, "in_memory"]
    assert main(["run", "--repo", str(root), "--grad", spec, *command]) == 0
    line = next(x for x in capfd.readouterr().out.splitlines() if x.startswith("RESULT "))
    assert json.loads(line.removeprefix("RESULT "))["in_memory"][spec] < 1e-9
    after = {path: content for path, content in tree(root).items() if "__pycache__" not in path}
    assert after == {path: content for path, content in before.items() if path in after}


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_patched_again_and_back_byte_for_byte(repository, copies, tmp_path):
    root = tmp_path / repository
    shutil.copytree(copies(repository, patched=False), root)
    before = tree(root)
    for spec in ("npg", "ift"):
        assert main(["patch", str(root), "--grad", spec]) == 0
    assert main(["patch", str(root), "--revert"]) == 0
    assert tree(root) == before


@pytest.mark.parametrize(
    ("repository", "path", "old", "new"),
    [
        ("fixed-point-diffusion-models", "models.py", "x = x.detach()", "x = 1.0 * x.detach()"),
        (
            "fixed-point-diffusion-models",
            "models.py",
            "x = forward_pass(x)",
            "x = -forward_pass(x)",
        ),
        ("Attractor", "attractor/models/attractor/attractor.py", "u = Jv + v", "u = Jv - v"),
        ("Attractor", "attractor/models/eqlm/eqlm.py", "u = Jv + v", "u = Jv - v"),
        ("HRM-Text", "models/baselines/ut_nocarry.py", "i >= self.cycles", "i > self.cycles"),
        ("HRM-Text", "models/baselines/hrm_nocarry_bp_warmup.py", "bp_steps - 1)", "bp_steps)"),
    ],
)
def test_another_version_is_refused(repository, path, old, new, copies, tmp_path, capsys):
    root = tmp_path / repository
    shutil.copytree(copies(repository, patched=False), root)
    text = (root / path).read_text()
    assert old in text
    (root / path).write_text(text.replace(old, new))
    before = tree(root)
    with pytest.raises(SystemExit, match="2"):
        main(["patch", str(root), "--grad", "npg"])
    assert tree(root) == before
    assert f"  {path}: " in capsys.readouterr().err


def test_every_parameter_has_a_gradient_under_ddp(results):
    missing = results("fixed-point-diffusion-models", "fpdm")["special"]
    assert len(missing) == 14
    assert not any(missing.values()), missing


def test_the_training_script_of_fixed_point_diffusion(copies):
    repository = "fixed-point-diffusion-models"
    theirs = said("looped_fpdm_train.py", copies(repository, patched=False))
    root = copies(repository)
    assert [step.pop("step") for step in theirs] == [None] * 3
    own = said("looped_fpdm_train.py", root, "--grad", "")
    assert [step.pop("step") for step in own] == [[0, 3], [1, 3], [2, 3]]
    assert own == theirs
    default = said("looped_fpdm_train.py", root)
    assert default == said("looped_fpdm_train.py", root, "--grad", "npg")
    assert [step["grads"] for step in default] != [step["grads"] for step in own]


@pytest.mark.parametrize("model", ["attractor", "eqlm"])
def test_the_names_of_attractor_are_ours(results, model):
    for name, (spec, error) in results("Attractor", model)["special"].items():
        one_step = name.startswith(("onestep", "frozen"))
        assert spec.startswith("npg(k=2, lam=1.0" if one_step else "ift(solver="), name
        assert error < (1e-14 if one_step else 1e-10), (name, error)


@pytest.mark.parametrize("model", REPOSITORIES["HRM-Text"])
def test_caches_checkpoints_and_the_compiler_of_hrm_text(results, model):
    found = results("HRM-Text", model)
    for what in ("keys", "cached", "resumed"):
        assert found["special"][what], what
    assert max(found["compiled"].values()) < 1e-5, found["compiled"]
    assert found["configured"] == ["npg(k=5, lam=0.5)", "jfb()", "own", "tbptt(k=2)"]


def test_a_ramp_beside_the_warm_up_of_hrm_text(results):
    """Theirs counts steps from 1, ours from 0."""
    rows = results("HRM-Text", "hrm_text")["special"]["ramp"]
    theirs, ours = zip(*rows, strict=True)
    assert (theirs[0], theirs[-1]) == (ours[0], ours[-1]) == (2, 5)
    assert {b - a for a, b in rows} == {0, -1}
    assert theirs.index(5) == 39  # at their 40th of 200 steps, a fifth
    assert ours.index(5) == 40  # a step later
