"""Adapters of recurrent models, on small repositories with the seams of the real ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import DRIVERS
from deq_phantom_plugin.adapters.repos import (
    jacobfa_attractor,
    lukemelas_fixed_point_diffusion_models,
    sapientinc_hrm_text,
)
from deq_phantom_plugin.cli import main
from recursive_repository import adapted
from tiny_repository import checkout, tree

for package in ("pydantic", "yaml", "numpy"):
    pytest.importorskip(package, reason="the repositories import it")

RECURRENT = Path(__file__).parents[1] / "repositories" / "recurrent"
MODELS = {
    "fpdm": "diffusion",
    "attractor": "attractor",
    "eqlm": "attractor",
    "hrm_text": "hrm_text",
    "hrm_text_trm": "hrm_text",
    "hrm_text_ut": "hrm_text",
    "hrm_text_rins": "hrm_text",
}
ADAPTERS = [
    adapted(module.ADAPTER, RECURRENT / folder)
    for module, folder in (
        (lukemelas_fixed_point_diffusion_models, "diffusion"),
        (jacobfa_attractor, "attractor"),
        (sapientinc_hrm_text, "hrm_text"),
    )
]


@pytest.fixture(autouse=True, scope="module")
def _only_these():
    with pytest.MonkeyPatch.context() as patch:
        for module in ("repository", "adapter"):
            patch.setattr(f"deq_phantom_plugin.patching.{module}.known_adapters", lambda: ADAPTERS)
        yield


@pytest.fixture(scope="module")
def patched(_only_these, tmp_path_factory):
    """The repositories, patched with npg, by name."""
    roots = {}
    for folder in sorted(set(MODELS.values())):
        roots[folder] = checkout(tmp_path_factory.mktemp("patched"), source=RECURRENT / folder)
        assert main(["patch", str(roots[folder]), "--grad", "npg"]) == 0
    return roots


def said(root, driver, *args):
    command = [sys.executable, str(driver), *map(str, args)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))


@pytest.mark.parametrize("model", MODELS)
def test_models(model, patched):
    """No method is their own training bit for bit; others are their own code, told to."""
    original = RECURRENT / MODELS[model]
    driver, checks = DRIVERS / "looped.py", ("own", "unrolled", "special")
    found = said(patched[MODELS[model]], driver, model, original, *checks)
    assert all(found["own"].values()), found["own"]
    assert found["unrolled"].pop("tells apart") > 1e-3
    assert max(found["unrolled"].values()) < 1e-12, found["unrolled"]
    special = found["special"]
    if model == "fpdm":
        assert not any(special.values()), special  # parameters without a gradient under DDP
    elif MODELS[model] == "attractor":
        errors = {name: error for name, (spec, error) in special.items()}
        assert max(errors.values()) < 1e-9, errors
        assert special["onestep, clip=0.1"][0] == "npg(k=2, lam=1.0, clip=0.1)"
    else:
        assert special["keys"]
        assert special["cached"]
        assert special["resumed"]
    if model == "hrm_text":
        assert {ours - theirs for theirs, ours in special["ramp"]} == {0, -1}


def test_in_memory_it_is_the_same(tmp_path, capfd):
    root = checkout(tmp_path, source=RECURRENT / "diffusion")
    driver = [sys.executable, str(DRIVERS / "looped.py"), "fpdm", str(RECURRENT / "diffusion")]
    command = ["--", "env", "-C", str(root), *driver, "in_memory"]
    assert main(["run", "--repo", str(root), "--grad", "tbptt(k=2)", *command]) == 0
    line = capfd.readouterr().out.splitlines()[-1]
    assert json.loads(line.removeprefix("RESULT "))["in_memory"]["tbptt(k=2)"] < 1e-12


def test_the_script_of_diffusion_takes_a_method(patched):
    driver = DRIVERS / "looped_fpdm_train.py"
    theirs = said(RECURRENT / "diffusion", driver)
    own = said(patched["diffusion"], driver, "--grad", "")
    assert [step.pop("step") for step in own] == [[0, 3], [1, 3], [2, 3]]
    assert own == [{"loss": step["loss"], "grads": step["grads"]} for step in theirs]
    default, jfb = (said(patched["diffusion"], driver, *grad) for grad in ([], ["--grad", "jfb"]))
    assert own[0]["grads"] != default[0]["grads"] != jfb[0]["grads"] != own[0]["grads"]


def runs(root, script, arguments):
    """What a script prints for each of some lists of arguments, in one process."""
    path, _, module = script.rpartition("/")
    code = (
        f"import json, sys; sys.path.insert(0, {path!r}); import {module} as script\n"
        "for arguments in json.loads(sys.argv[1]): script.main(*arguments)"
    )
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


LATE = "schedule({0: 'npg', 0.5: 'jfb'})"  # from the half of training on


def test_the_script_of_attractor_takes_a_method(patched):
    (theirs,) = runs(RECURRENT / "attractor", "scripts/train", [[]])
    each = [["null"], [], ["npg"], ["jfb"], [LATE]]
    own, default, npg, jfb, late = runs(patched["attractor"], "scripts/train", each)
    assert own == theirs
    assert own != default == npg != jfb
    assert late[0] == npg[0]
    assert late[1] != npg[1]


def test_the_configuration_of_hrm_text_takes_a_method(patched):
    archs, specs = ("hrm", "trm", "ut", "rins"), ("null", "npg", f'"{LATE}"')
    theirs = runs(RECURRENT / "hrm_text", "pretrain", [[arch] for arch in archs])
    each = [
        [arch, *(f"arch.grad={spec}" for spec in specs[i:][:1])] for arch in archs for i in range(4)
    ]
    found = runs(patched["hrm_text"], "pretrain", each)
    for number, own in enumerate(theirs):
        null, npg, late, default = found[4 * number :][:4]
        assert null == own
        assert own != npg == default
        assert late[:2] == npg[:2]
        assert late[2:] != npg[2:]


@pytest.mark.parametrize("folder", sorted(set(MODELS.values())))
def test_back_byte_for_byte(folder, tmp_path):
    root = checkout(tmp_path, source=RECURRENT / folder)
    before = tree(root)
    for spec in ("npg", "jfb"):
        assert main(["patch", str(root), "--grad", spec]) == 0
    assert main(["patch", str(root), "--revert"]) == 0
    assert tree(root) == before


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("diffusion/models.py", "x = x.detach()", "x = -x.detach()"),
        ("attractor/attractor/models/eqlm/eqlm.py", "return v + step", "return v - step"),
        ("hrm_text/models/baselines/ut_nocarry.py", "i >= self.cycles", "i > self.cycles"),
    ],
)
def test_another_version_is_refused(path, old, new, tmp_path, capsys):
    folder, _, path = path.partition("/")
    root = checkout(tmp_path, source=RECURRENT / folder)
    text = (root / path).read_text()
    assert old in text
    (root / path).write_text(text.replace(old, new))
    user = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(root), *user, "commit", "-qam", "2"], check=True)
    before = tree(root)
    with pytest.raises(SystemExit, match="2"):
        main(["patch", str(root), "--grad", "npg"])
    assert tree(root) == before
    assert f"  {path}: " in capsys.readouterr().err
