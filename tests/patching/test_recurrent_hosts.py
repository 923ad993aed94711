"""The adapter and the host of Huginn's models, on a checkout of the repository that they are for.

Each model is built by its own code, tiny, with its own loss, in a process of its own.
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

NAME = "recurrent-pretraining"
ORIGINAL = HOSTS / NAME
every_model = pytest.mark.parametrize("model", ["dynamic", "raven"])


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A copy of the repository's text files, patched with npg if asked for; made on demand."""
    if not ORIGINAL.is_dir():
        pytest.skip(f"no {ORIGINAL}: put a checkout there, or set DEQ_PHANTOM_HOSTS")
    pytest.importorskip("transformers", reason="its own files import transformers")
    made = {}

    def copy(patched=True):
        if patched not in made:
            root = tmp_path_factory.mktemp("copy") / NAME
            left_out = shutil.ignore_patterns(".git", "__pycache__", "*.ipynb", "*.png")
            shutil.copytree(ORIGINAL, root, ignore=left_out)
            if patched:
                assert main(["patch", str(root), "--grad", "npg"]) == 0
            made[patched] = root
        return made[patched]

    return copy


def driven(driver, *arguments, cwd, prefix=()):
    """What a driver says."""
    command = [*prefix, sys.executable, str(DRIVERS / f"{driver}.py"), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.fixture
def found(model, copies):
    return lambda check: driven("recurrent", model, str(ORIGINAL), check, cwd=copies())


@pytest.fixture
def remote(copies, tmp_path):
    copies(patched=False)
    return lambda check: driven("remote_code", str(ORIGINAL), check, cwd=tmp_path)


@every_model
def test_no_method_is_the_repositorys_own_training_bit_for_bit(found):
    same = found("own")
    assert len(same) > 60
    assert all(same.values()), same


@every_model
def test_more_of_the_loop_is_its_own_code_without_no_grad(found):
    errors = found("unrolled")
    assert errors.pop("tells apart") > 1e-2
    assert max(errors.values()) < 1e-9, errors


@every_model
def test_implicit_gradients_against_dense_jacobians(found):
    errors = found("implicit")
    assert errors.pop("tells apart") > 1e-2
    assert max(errors.values()) < 1e-9, errors


@every_model
def test_schedules_monitors_and_reports(found):
    result = found("tools")
    assert result["schedule at 0"] < 1e-9
    assert result["schedule at 10"] < 1e-9
    names = {name.rpartition("/")[2] for name in result["monitored"]}
    assert names >= {"cosine", "forward_residual", "nfe", "spectral_radius"}
    assert [len(report) for report in result["reported"]] == [4]  # the method in force, and three


@pytest.mark.parametrize("model", ["raven"])
def test_generation_with_a_cache(found):
    result = found("generation")
    assert all(result.values()), result


@every_model
def test_in_memory_it_is_the_same(model, copies):
    root = copies(patched=False)
    run = [sys.executable, "-m", "deq_phantom_plugin.cli", "run", "--repo", str(root)]
    prefix = [*run, "--grad", "tbptt(k=4)", "--"]
    result = driven("recurrent", model, str(ORIGINAL), "in_memory", cwd=root, prefix=prefix)
    assert result["tbptt(k=4)"] < 1e-9


def test_patched_and_back_byte_for_byte(copies, tmp_path):
    root = tmp_path / NAME
    shutil.copytree(copies(patched=False), root, ignore=shutil.ignore_patterns("__pycache__"))
    before = tree(root)
    assert main(["patch", str(root), "--grad", "upg(k=2, lam=0.5)"]) == 0
    after = tree(root)
    changed = {path for path, content in before.items() if after[path] != content}
    assert changed == {
        "recpre/config_dynamic.py",
        "recpre/model_dynamic.py",
        "recpre/raven_config_minimal.py",
        "recpre/raven_modeling_minimal.py",
        "train.py",
    }
    for path in changed:
        compile(after[path], path, "exec")
    assert main(["patch", str(root), "--revert"]) == 0
    assert tree(root) == before


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("recpre/model_dynamic.py", "step + offset)", "step)"),
        ("recpre/raven_modeling_minimal.py", "return self.transformer.ln_f(x), n", "return x, n"),
        ("recpre/config_dynamic.py", "lockstep_k: bool", "lockstep: bool"),
    ],
)
def test_another_version_is_refused(path, old, new, copies, tmp_path, capsys):
    root = tmp_path / NAME
    shutil.copytree(copies(patched=False), root, ignore=shutil.ignore_patterns("__pycache__"))
    file = root / path
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    before = tree(root)
    with pytest.raises(SystemExit, match="2"):
        main(["patch", str(root), "--grad", "npg"])
    assert tree(root) == before
    said = capsys.readouterr().err
    assert "unknown version" in said
    assert f"  {path}: " in said


# --- loaded by trust_remote_code ------------------------------------------------------------------


def test_remote_code_switches_and_is_restored(remote):
    result = remote("switched")
    assert all(result.values()), result


def test_remote_code_named_in_its_configuration(remote):
    result = remote("named_in_the_config")
    assert all(result.values()), result


def test_remote_code_with_schedules_monitors_and_reports(remote):
    result = remote("tools")
    names = {name.rpartition("/")[2] for name in result.pop("monitored")}
    assert names >= {"cosine", "forward_residual", "nfe", "spectral_radius"}
    assert len(result.pop("reported")) == 3
    assert all(result.values()), result


def test_remote_code_of_another_version_is_refused(remote):
    said = remote("another_version")["said"]
    assert len(said) == 3
    assert all("an unknown version; known are" in each for each in said), said
