"""The adapters of recursive models on checkouts of the repositories that they are for.

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

REPOSITORIES = {
    "TinyRecursiveModels": ("trm", "trm_singlez", "trm_hier6", "trm_hrm"),
    "EqR": ("eqr", "eqr_trm"),
    "URM": ("urm", "urm_trm", "urm_hrm"),
    "HRM": ("hrm",),
}
NEEDS = {"EqR": ("colorama",), "TinyRecursiveModels": ("einops",), "URM": ("einops",)}
MODELS = [(root, model) for root, models in REPOSITORIES.items() for model in models]
SHIMS = "flash_attn,adam_atan2"

every_model = pytest.mark.parametrize(("repository", "model"), MODELS)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A copy of a repository's text files, patched with npg if asked for; made on demand."""
    made = {}

    def copy(repository, patched=True):
        if not (HOSTS / repository).is_dir():
            pytest.skip(f"no {HOSTS / repository}: put a checkout there, or set DEQ_PHANTOM_HOSTS")
        for package in ("pydantic", *NEEDS.get(repository, ())):
            pytest.importorskip(package, reason=f"its own files import {package}")
        if (repository, patched) not in made:
            root = tmp_path_factory.mktemp("copy") / repository
            left_out = shutil.ignore_patterns(".git", "__pycache__", "kaggle", "assets")
            shutil.copytree(HOSTS / repository, root, ignore=left_out)
            if patched:
                assert main(["patch", str(root), "--grad", "npg", "--compat", SHIMS]) == 0
            made[repository, patched] = root
        return made[repository, patched]

    return copy


def compared(model, root, original, check, prefix=()):
    """What the driver says of a patched model and the file it was made from."""
    driver = [sys.executable, str(DRIVERS / "recursive.py"), model, str(original), check]
    done = subprocess.run([*prefix, *driver], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.fixture
def found(repository, model, copies):
    return lambda check: compared(model, copies(repository), HOSTS / repository, check)


@every_model
def test_no_method_is_the_repositorys_own_training_bit_for_bit(found):
    same = found("own")
    assert set(same) > {"float32", "float64", "bfloat16"}
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
    # One for each equilibrium; in each the method in force and the three that were asked for.
    assert [len(report) for report in result["reported"]] == [4, 4]


@every_model
def test_one_graph_for_the_compiler_where_the_original_is(found):
    result = found("compiled")
    for name, of in result.items():
        assert isinstance(of, list), (name, of)
        assert of[0] < 1e-5  # the gradient, uncompiled
        assert of[1] == result["original"][1]  # graphs, while the step that is told goes on


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_in_memory_it_is_the_same(repository, copies):
    root = copies(repository, patched=False)
    run = [sys.executable, "-m", "deq_phantom_plugin.cli", "run", "--repo", str(root)]
    prefix = [*run, "--grad", "tbptt(k=2)", "--compat", SHIMS, "--"]
    model = REPOSITORIES[repository][0]
    assert compared(model, root, HOSTS / repository, "in_memory", prefix)["tbptt(k=2)"] < 1e-9


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_patched_and_back_byte_for_byte(repository, copies, tmp_path):
    root = tmp_path / repository
    shutil.copytree(copies(repository, patched=False), root)
    before = tree(root)
    assert main(["patch", str(root), "--grad", "upg(k=2, lam=0.5)"]) == 0
    changed = {path for path, content in tree(root).items() if before.get(path) != content}
    changed = {path for path in changed if not path.startswith(".deq-phantom")}
    assert "pretrain.py" in changed
    assert sum(path.startswith("config/arch/") for path in changed) == {"EqR": 2, "HRM": 1}.get(
        repository, 3 if repository == "URM" else 4
    )
    for path in changed:
        if path.endswith(".py"):
            compile((root / path).read_bytes(), path, "exec")
    assert main(["patch", str(root), "--revert"]) == 0
    assert tree(root) == before


@pytest.mark.parametrize(
    ("repository", "path", "old", "new"),
    [
        ("TinyRecursiveModels", "recursive_reasoning/trm.py", "H_cycles-1)", "H_cycles-2)"),
        ("TinyRecursiveModels", "recursive_reasoning/trm_singlez.py", "_cycles-1)", "_cycles-2)"),
        ("TinyRecursiveModels", "recursive_reasoning/trm_hier6.py", "H_cycles-1)", "H_cycles-2)"),
        ("TinyRecursiveModels", "recursive_reasoning/hrm.py", "H_cycles - 1", "H_cycles - 2"),
        ("EqR", "eqr.py", "H_cycles - 1", "H_cycles - 2"),
        ("EqR", "trm.py", "H_cycles - 1", "H_cycles - 2"),
        ("URM", "urm/urm.py", "H_cycles - 1", "H_cycles - 2"),
        ("URM", "trm/trm.py", "H_cycles-1)", "H_cycles-2)"),
        ("URM", "hrm/hrm_act_v1.py", "H_cycles - 1", "H_cycles - 2"),
        ("HRM", "hrm/hrm_act_v1.py", "H_cycles - 1", "H_cycles - 2"),
    ],
)
def test_another_version_is_refused(repository, path, old, new, copies, tmp_path, capsys):
    root = tmp_path / repository
    shutil.copytree(copies(repository, patched=False), root)
    file = root / "models" / path
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    before = tree(root)
    with pytest.raises(SystemExit, match="2"):
        main(["patch", str(root), "--grad", "npg"])
    assert tree(root) == before
    said = capsys.readouterr().err
    assert "unknown version" in said
    assert f"  models/{path}: " in said


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_hydra_takes_a_method(repository, copies):
    hydra = pytest.importorskip("hydra", reason="their scripts are configured by it")
    arch = {"EqR": "eqr", "HRM": "hrm_v1", "URM": "urm"}.get(repository, "trm")
    for spec in ("npg", "null", '"tbptt(k=2)"'):
        with hydra.initialize_config_dir(str(copies(repository) / "config"), version_base=None):
            overrides = [f"arch={arch}", f"arch.grad={spec}"]
            config = hydra.compose("cfg_pretrain", overrides=overrides)
        assert config.arch.grad == (None if spec == "null" else spec.strip('"'))
    with hydra.initialize_config_dir(str(copies(repository) / "config"), version_base=None):
        assert hydra.compose("cfg_pretrain", overrides=[f"arch={arch}"]).arch.grad == "npg"
    original = copies(repository, patched=False)
    with (
        hydra.initialize_config_dir(str(original / "config"), version_base=None),
        pytest.raises(Exception, match=r"Could not override 'arch\.grad'"),
    ):
        hydra.compose("cfg_pretrain", overrides=[f"arch={arch}", "arch.grad=npg"])
