"""Adapters of recursive models, on a small repository with the seams of the real ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from conftest import DRIVERS
from deq_phantom_plugin.cli import main
from deq_phantom_plugin.patching.adapter import Edit
from deq_phantom_plugin.patching.rewrite import SeamError
from deq_phantom_plugin.patching.settings import insert
from recursive_repository import ADAPTERS, MODELS, RECURSIVE
from tiny_repository import checkout, tree

pytest.importorskip("pydantic", reason="settings of the models are pydantic's")
pytest.importorskip("yaml", reason="the repository's script reads yaml")


@pytest.fixture(autouse=True, scope="module")
def _only_these():
    with pytest.MonkeyPatch.context() as patch:
        for module in ("repository", "adapter"):
            patch.setattr(f"deq_phantom_plugin.patching.{module}.known_adapters", lambda: ADAPTERS)
        yield


@pytest.fixture(scope="module")
def patched(_only_these, tmp_path_factory):
    """The repository, patched with npg."""
    root = checkout(tmp_path_factory.mktemp("patched"), source=RECURSIVE)
    assert main(["patch", str(root), "--grad", "npg"]) == 0
    return root


@pytest.fixture
def repo(tmp_path):
    return checkout(tmp_path, source=RECURSIVE)


def result(text):
    line = next(line for line in text.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def compared(model, root, check):
    """What the driver says of a patched model and the file it was made from."""
    command = [sys.executable, str(DRIVERS / "recursive.py"), model, str(RECURSIVE), check]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return result(done.stdout)


def trained(root, *args):
    done = subprocess.run(
        [sys.executable, "pretrain.py", *args],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("model", MODELS)
def test_no_method_is_the_repositorys_own_training_bit_for_bit(model, patched):
    found = compared(model, patched, "own")
    assert all(found.values()), found


@pytest.mark.parametrize("model", MODELS)
def test_more_of_the_loop_is_its_own_code_without_no_grad(model, patched):
    found = compared(model, patched, "unrolled")
    assert found.pop("tells apart") > 1e-4
    assert max(found.values()) < 1e-12, found


def test_in_memory_it_is_the_same(repo, capfd):
    driver = [sys.executable, str(DRIVERS / "recursive.py"), "trm", str(RECURSIVE), "in_memory"]
    command = ["--", "env", "-C", str(repo), *driver]
    assert main(["run", "--repo", str(repo), "--grad", "tbptt(k=2)", *command]) == 0
    assert result(capfd.readouterr().out)["tbptt(k=2)"] < 1e-12


def test_the_configuration_takes_a_method(patched, repo):
    """As it is in the file, and on the command line; the training step is told."""
    for arch in ("arch=trm", "arch=hrm", "arch=urm", "arch=eqr"):
        assert trained(patched, arch) == trained(patched, arch, "arch.grad=npg")
        own = trained(repo, arch)
        assert trained(patched, arch, "arch.grad=null") == own
        longer = trained(patched, arch, "arch.grad=tbptt(k=2)")
        assert longer[0][0] == own[0][0]  # the loss
        assert longer != own != trained(patched, arch)
        schedule = "schedule({0: 'tbptt(k=1)', 1: 'tbptt(k=2)'})"
        late = trained(patched, arch, f'arch.grad="{schedule}"')
        assert late == [own[0], *longer[1:]]
    done = subprocess.run(
        [sys.executable, "pretrain.py", "arch=trm", "arch.grad=npg"],
        cwd=repo,
        capture_output=True,
        check=False,
    )
    assert b"Could not override 'arch.grad'" in done.stderr


def test_half_a_patch_does_not_train_with_the_old_method(repo):
    assert main(["patch", str(repo), "--grad", "npg"]) == 0
    subprocess.run(["git", "-C", str(repo), "checkout", "-q", "--", "models"], check=True)
    command = [sys.executable, "pretrain.py", "arch=trm"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ACTLossHead has no equilibrium whose gradient could be switched" in done.stderr


def test_lines_of_a_configuration_and_back_byte_for_byte(repo):
    before = tree(repo)
    assert main(["patch", str(repo), "--grad", "schedule({0: 'jfb', 9: 'npg'})"]) == 0
    after = tree(repo)
    line = b"grad: \"schedule({0: 'jfb', 9: 'npg'})\""
    for name in ("trm", "hrm", "eqr", "urm"):
        path = f"config/arch/{name}.yaml"
        anchor = b"L_cycles: 2  # steps of the latents\n"
        assert after[path] == before[path].replace(anchor, anchor + line + b"\n")
    last = "config/arch/trm_hier6.yaml"  # ends without an end of line
    assert after[last] == before[last] + b"\r\n" + line
    assert main(["patch", str(repo), "--grad", "jfb"]) == 0
    assert b'grad: "jfb"' in (repo / last).read_bytes()
    assert main(["patch", str(repo), "--revert"]) == 0
    assert tree(repo) == before


def test_lines_in_windows_endings():
    edit = Edit("L_cycles:", "grad: {grad}")
    assert (
        insert(b"a: 1\r\nL_cycles: 2\r\nb: 3", [edit])
        == b"a: 1\r\nL_cycles: 2\r\ngrad: {grad}\r\nb: 3"
    )
    for rest in (b"", b"\n  # so many\n", b"---\n", b"  \nb: 3\n"):
        assert insert(b"L_cycles: 2\n" + rest, [edit]) == b"L_cycles: 2\ngrad: {grad}\n" + rest


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (b"L_cycles: 2\ngrad: upg\n", "has a key 'grad' already"),
        (b'L_cycles: 2\n"grad" : null\n', "has a key 'grad' already"),
        (b"L_cycles: 2\nL_cycles: 3\n", "expected one line 'L_cycles:', found 2"),
        (b"arch:\n  L_cycles: 2\n", "expected one line 'L_cycles:', found 0"),
        (b"L_cycles:\n  2\n", "the value of 'L_cycles:' goes on in the next line"),
        (b"L_cycles:\n- 2\n", "the value of 'L_cycles:' goes on in the next line"),
    ],
)
def test_another_configuration_is_refused(source, said):
    with pytest.raises(SeamError, match=said):
        insert(source, [Edit("L_cycles:", "grad: x")])
    assert insert(b"L_cycles: 2\nupgrad: 1\n", [Edit("L_cycles:", "grad: x")]).count(b"\n") == 3


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("models/recursive_reasoning/trm.py", "H_cycles - 1", "H_cycles - 2"),
        ("models/recursive_reasoning/trm_singlez.py", "it = 0", "it = 1"),
        ("models/recursive_reasoning/trm_hier6.py", "sum(z_L)", "sum(z_L[:3])"),
        ("models/hrm/hrm_act_v1.py", "step + 1", "step + 2"),
        ("models/urm/urm.py", "H_cycles - 1", "H_cycles - 2"),
        ("models/eqr.py", "H_cycles - 1", "H_cycles - 2"),
        ("models/eqr.py", 'forward_dtype: str = "bfloat16"', "dtype: str"),
        ("config/arch/urm.yaml", "hidden_size", "grad: 1\nhidden_size"),
    ],
)
def test_another_version_is_refused(repo, path, old, new, capsys):
    text = (repo / path).read_text()
    assert old in text
    (repo / path).write_text(text.replace(old, new))
    user = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(repo), *user, "commit", "-qam", "2"], check=True)
    before = tree(repo)
    with pytest.raises(SystemExit, match="2"):
        main(["patch", str(repo), "--grad", "npg"])
    assert tree(repo) == before
    said = capsys.readouterr().err
    assert "unknown version" in said
    assert f"  {path}: " in said


def test_what_a_run_has_saved_of_code_and_configuration_is_no_part_of_it(repo):
    saved = repo / "runs" / "all_config.yaml"
    saved.parent.mkdir()
    saved.write_text("arch:\n  name: urm.urm@URM\n  L_cycles: 2\n")
    for folder in ("outputs/first/code", "checkpoints/first"):
        shutil.copytree(repo / "models", repo / folder / "models")
        shutil.copytree(repo / "config", repo / folder / "config")
    before = tree(repo)
    assert main(["patch", str(repo), "--grad", "npg"]) == 0
    kept = ("runs", "outputs", "checkpoints")
    assert before.items() >= {p: c for p, c in tree(repo).items() if p.startswith(kept)}.items()
    assert main(["patch", str(repo), "--grad", "jfb"]) == 0
