"""`deq-phantom patch`, `run` and `doctor`, on a small repository with a seam like the real ones."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deq_phantom_plugin as dpp
from conftest import ROOT
from deq_phantom_plugin.cli import main
from deq_phantom_plugin.patching import Equilibrium, compat, grad_argument, journal, steps
from deq_phantom_plugin.patching import patch as patching
from deq_phantom_plugin.patching.adapter import Adapter, Edit, Project, known_adapters
from deq_phantom_plugin.patching.repository import RECORD, recognise
from deq_phantom_plugin.patching.rewrite import SeamError, fingerprint, rewrite
from tiny_repository import ADAPTER, SEAM, checkout, tree


@pytest.fixture(autouse=True)
def _only_tiny(monkeypatch):
    for module in ("repository", "adapter"):
        monkeypatch.setattr(
            f"deq_phantom_plugin.patching.{module}.known_adapters", lambda: [ADAPTER]
        )


@pytest.fixture
def repo(tmp_path):
    return checkout(tmp_path)


def command(*args):
    """Run the command line in this process; return its exit status."""
    try:
        return main([str(arg) for arg in args])
    except SystemExit as exit_:
        return exit_.code


def git(root, *args):
    user = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(root), *user, *args], check=True)


def python(root, *args):
    return subprocess.run(
        [sys.executable, *args], cwd=root, capture_output=True, text=True, check=False
    )


def gradients(spec):
    """What a strategy gives on the small repository's layer, computed here."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        linear = torch.nn.Linear(4, 4)
        x = torch.randn(3, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    func = lambda z: torch.tanh(0.5 * linear(z) + x)  # noqa: E731
    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(100):
            z = func(z)
    dpp.attach(func, z, spec).square().sum().backward()
    return [p.grad.flatten().tolist() for p in linear.parameters()]


def check_gradient(text, spec):
    got, want = json.loads(text), gradients(spec)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------------- patch


def test_a_patched_repository_takes_the_method_by_name(repo, capsys):
    assert command("patch", repo, "--grad", "npg(k=3)") == 0
    out = capsys.readouterr().out
    assert "recognised: somebody/tiny" in out
    assert "+            new_z = self.equilibrium(func, z)" in out
    assert "-            self.hook = new_z.register_hook(backward_hook)" in out
    check_gradient(python(repo, "train.py").stdout, "npg(k=3)")
    check_gradient(python(repo, "train.py", "--grad", "upg(k=2)").stdout, "upg(k=2)")
    wrong = python(repo, "train.py", "--grad", "upq")
    assert wrong.returncode == 2
    assert "unknown strategy 'upq'" in wrong.stderr
    # Two methods, two gradients: the comparison can tell.
    with pytest.raises(AssertionError):
        check_gradient(python(repo, "train.py").stdout, "jfb")


def test_what_is_not_the_seam_stays_to_the_byte(repo):
    lines = (repo / "model.py").read_text().splitlines()
    begin = lines.index("            z.requires_grad_()")
    end = lines.index("            self.hook = new_z.register_hook(backward_hook)")
    lines[begin : end + 1] = ["            new_z = self.equilibrium(func, z)"]
    hook = lines.index("        self.hook = None  # so that it can be removed")
    made = "        self.equilibrium = deq_phantom_plugin.patching.Equilibrium('upg')"
    lines.insert(hook + 1, made)
    lines.insert(3, "import deq_phantom_plugin.patching")
    command("patch", repo, "--grad", "upg")
    assert (repo / "model.py").read_text() == "\n".join([*lines, ""])


def test_a_dry_run_writes_nothing(repo, capsys):
    before = tree(repo)
    assert command("patch", repo, "--grad", "upg", "--dry-run") == 0
    assert "dry run: 2 files would change" in capsys.readouterr().out
    assert tree(repo) == before


def test_twice_is_once_and_another_spec_takes_its_place(repo, capsys):
    before = tree(repo)
    command("patch", repo, "--grad", "upg")
    once = tree(repo)
    assert command("patch", repo, "--grad", "upg") == 0
    assert "already patched with upg" in capsys.readouterr().out
    assert tree(repo) == once
    assert command("patch", repo, "--grad", "jfb") == 0
    check_gradient(python(repo, "train.py").stdout, "jfb")
    shutil.rmtree(repo / "__pycache__", ignore_errors=True)
    assert command("patch", repo, "--revert") == 0
    assert tree(repo) == before
    assert command("patch", repo, "--revert") == 0
    assert "nothing to restore" in capsys.readouterr().out


def test_git_does_not_see_the_record(repo):
    command("patch", repo, "--grad", "upg")
    status = subprocess.check_output(["git", "-C", repo, "status", "--porcelain"], text=True)
    assert status.split() == ["M", "model.py", "M", "train.py"]


def test_modes_of_files_are_kept(repo):
    (repo / "model.py").chmod(0o751)
    subprocess.run(["git", "-C", repo, "-c", "core.fileMode=false", "status"], check=True)
    subprocess.run(["git", "-C", repo, "config", "core.fileMode", "false"], check=True)
    command("patch", repo, "--grad", "upg")
    assert (repo / "model.py").stat().st_mode & 0o777 == 0o751
    command("patch", repo, "--revert")
    assert (repo / "model.py").stat().st_mode & 0o777 == 0o751


def test_a_folder_without_git(tmp_path):
    root = checkout(tmp_path, git=False)
    before = tree(root)
    assert command("patch", root, "--grad", "upg") == 0
    assert tree(root) != before
    command("patch", root, "--revert")
    assert tree(root) == before


def refused(capsys, repo, *args, status=2):
    """Run a command that is to be refused; return what it says. Nothing may have changed."""
    before = tree(repo)
    assert command(*args) == status
    assert tree(repo) == before
    return capsys.readouterr().err


def test_uncommitted_changes_are_refused(repo, capsys):
    (repo / "model.py").write_text((repo / "model.py").read_text() + "\n# mine\n")
    said = refused(capsys, repo, "patch", repo, "--grad", "upg")
    assert "uncommitted changes" in said
    assert "model.py" in said
    assert "train.py" not in said


def test_changes_elsewhere_are_not(repo):
    (repo / "notes.txt").write_text("mine")
    assert command("patch", repo, "--grad", "upg") == 0


def test_an_unknown_version_of_the_seam_is_refused(repo, capsys):
    text = (repo / "model.py").read_text()
    (repo / "model.py").write_text(text.replace("torch.zeros_like(x)", "torch.ones_like(x)"))
    subprocess.run(
        ["git", "-C", repo, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "2"],
        check=True,
    )
    said = refused(capsys, repo, "patch", repo, "--grad", "upg")
    assert "unknown version" in said
    assert "model.py: Net.forward is" in said
    assert "0000000" in said


def test_comments_and_spacing_make_no_other_version(repo):
    text = (repo / "model.py").read_text()
    changed = text.replace("# the seam", "# other words").replace("func(z)\n", "func( z )\n")
    assert fingerprint(text.encode(), "Net.forward") == fingerprint(changed.encode(), "Net.forward")
    assert fingerprint(text.encode(), "Net.backward") is None
    assert fingerprint(b"def f(:", "f") is None


def test_a_missing_anchor_is_refused(repo, capsys):
    text = (repo / "train.py").read_text()
    (repo / "train.py").write_text(text.replace("args = parser", "options = parser"))
    subprocess.run(
        ["git", "-C", repo, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "2"],
        check=True,
    )
    said = refused(capsys, repo, "patch", repo, "--grad", "upg")
    assert "expected one statement 'args = parser.parse_args()', found 0" in said


@pytest.mark.parametrize("args", [["--grad", "jfb"], ["--revert"]])
def test_a_change_since_the_patch_is_refused(repo, capsys, args):
    command("patch", repo, "--grad", "upg")
    (repo / "train.py").write_text("# mine")
    said = refused(capsys, repo, "patch", repo, *args)
    assert "with upg: train.py. Your" in said
    assert "restore all of model.py, train.py by git and delete .deq-phantom" in said


def test_a_patch_without_its_record_is_refused(repo, capsys):
    command("patch", repo, "--grad", "upg")
    shutil.rmtree(repo / RECORD)
    shutil.rmtree(repo / ".git")
    said = refused(capsys, repo, "patch", repo, "--grad", "upg")
    assert "have parts of one: model.py, train.py" in said


@pytest.mark.parametrize("args", [["--revert"], ["--recover"]])
def test_a_lost_record_is_no_reason_to_say_that_nothing_is_patched(repo, capsys, args):
    command("patch", repo, "--grad", "upg")
    shutil.rmtree(repo / RECORD)
    said = refused(capsys, repo, "patch", repo, *args)
    assert "have parts of one: model.py, train.py. A second patch would mix" in said
    command("doctor", repo)
    assert "have parts of one: model.py, train.py" in capsys.readouterr().out


def test_files_of_ones_own_are_no_parts_of_a_patch(repo):
    (repo / "mine.py").write_text("import deq_phantom_plugin.patching\n")
    assert command("patch", repo, "--grad", "upg") == 0


def test_a_part_of_a_patched_repository_is_refused_by_name(repo, capsys):
    (repo / "inner").mkdir()
    command("patch", repo, "--grad", "upg")
    for args in (["--grad", "jfb"], ["--revert"], ["--recover"]):
        said = refused(capsys, repo, "patch", repo / "inner", *args)
        assert f"is a part of {repo}, which was patched; name that folder" in said
    assert command("doctor", repo / "inner") == 2


def test_a_record_that_is_no_folder_is_refused(repo, tmp_path, capsys):
    (repo / RECORD).write_text("")
    for args in (["--grad", "jfb"], ["--revert"], ["--recover"]):
        assert "is not a folder" in refused(capsys, repo, "patch", repo, *args)
    (repo / RECORD).unlink()
    (tmp_path / "elsewhere").mkdir()
    (repo / RECORD).symlink_to(tmp_path / "elsewhere")
    assert "is not a folder" in refused(capsys, repo, "patch", repo, "--grad", "jfb")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_patch_of_which_a_file_is_missing_does_not_train_with_the_old_method(repo):
    command("patch", repo, "--grad", "upg")
    subprocess.run(["git", "-C", repo, "checkout", "-q", "--", "model.py"], check=True)
    done = python(repo, "train.py")
    assert done.returncode == 1
    assert "Net has no equilibrium whose gradient could be switched" in done.stderr


def test_another_spec_keeps_the_shims(repo, capsys):
    command("patch", repo, "--grad", "upg", "--compat", "numpy")
    once = (repo / "model.py").read_bytes()
    capsys.readouterr()
    assert command("patch", repo, "--grad", "jfb") == 0
    assert "shim numpy:" in capsys.readouterr().out
    assert (repo / "model.py").read_bytes() == once.replace(b"'upg'", b"'jfb'")
    command("patch", repo, "--grad", "jfb", "--compat", "linalg")
    assert b"compat.apply('linalg')" in (repo / "model.py").read_bytes()


def test_a_damaged_record_is_refused(repo, capsys):
    command("patch", repo, "--grad", "upg")
    (repo / RECORD / "manifest.json").write_text("{")
    assert "damaged" in refused(capsys, repo, "patch", repo, "--grad", "upg")
    (repo / RECORD / "manifest.json").write_text("{}")
    assert "damaged" in refused(capsys, repo, "patch", repo, "--revert")


def test_bad_paths_and_specs(repo, tmp_path, capsys):
    assert "there is no" in refused(capsys, repo, "patch", tmp_path / "none", "--grad", "upg")
    assert "is a file" in refused(capsys, repo, "patch", repo / "model.py", "--grad", "upg")
    empty = tmp_path / "empty"
    empty.mkdir()
    said = refused(capsys, repo, "patch", empty, "--grad", "upg")
    assert "somebody/tiny" in said
    assert "deq_phantom_plugin.adapters" in said
    assert "does not parse" in refused(capsys, repo, "patch", repo, "--grad", "upg(k=")
    assert "no argument 'n'" in refused(capsys, repo, "patch", repo, "--grad", "upg(n=3)")
    assert "unknown compatibility shim 'gpu'" in refused(
        capsys, repo, "patch", repo, "--grad", "upg", "--compat", "gpu"
    )
    refused(capsys, repo, "patch", repo)
    refused(capsys, repo, "patch", repo, "--grad", "upg", "--revert")
    refused(capsys, repo, "patch", repo, "--revert", "--dry-run")


def test_symbolic_links_are_not_followed(repo, tmp_path, capsys):
    outside = tmp_path / "outside.py"
    outside.write_bytes((repo / "model.py").read_bytes())
    (repo / "model.py").unlink()
    (repo / "model.py").symlink_to(outside)
    before = outside.read_bytes()
    said = refused(capsys, repo, "patch", repo, "--grad", "upg")
    assert "none of the repositories known" in said
    command("doctor", repo)
    assert "not recognised" in capsys.readouterr().out
    (repo / "copy.py").write_bytes(outside.read_bytes())
    git(repo, "add", "-A")
    git(repo, "commit", "-qm", "2")
    command("patch", repo, "--grad", "upg", "--dry-run")
    assert "passed over, a link out of the folder: model.py" in capsys.readouterr().out
    (repo / "copy.py").unlink()
    (repo / "inner.py").write_bytes(before)
    (repo / "model.py").unlink()
    (repo / "model.py").symlink_to(repo / "inner.py")
    assert "symbolic link" in refused(capsys, repo, "patch", repo, "--grad", "upg")
    assert outside.read_bytes() == before


def test_a_link_to_a_folder_is_not_followed(repo, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "linked").symlink_to(repo, target_is_directory=True)
    assert recognise(tmp_path / "empty") == []


def test_a_file_claimed_twice_is_refused(repo, capsys, monkeypatch):
    other = Project("other/tiny", "", (SEAM.__class__("x", SEAM.marks, ()),))
    both = [ADAPTER, Adapter("other/tiny", (), (other,))]
    monkeypatch.setattr("deq_phantom_plugin.patching.repository.known_adapters", lambda: both)
    said = refused(capsys, repo, "patch", repo, "--grad", "upg")
    assert "claimed by somebody/tiny and other/tiny" in said


def test_the_shipped_adapters_load(monkeypatch):
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {adapter.repository for adapter in known_adapters()}
    assert found == {
        "Gsunshine/phantom_grad",
        "SamsungSAILMontreal/TinyRecursiveModels",
        "SwiftieH/IGNN",
        "UbiquantAI/URM",
        "jacobfa/Attractor",
        "locuslab/EqR",
        "locuslab/deq",
        "locuslab/mdeq",
        "locuslab/torchdeq",
        "lukemelas/fixed-point-diffusion-models",
        "sapientinc/HRM",
        "sapientinc/HRM-Text",
        "seal-rg/recurrent-pretraining",
    }


# ------------------------------------------------------------------- all files or none

WRITES = ("replace", "fsync", "unlink", "rmdir", "mkdir")


def _at_write(number, act):
    """Make the write of that number, and all later ones, call `act` first."""
    count = iter(range(10**6))
    for name in WRITES:
        original = getattr(os, name)

        def wrapped(*args, _original=original, **kwargs):
            if next(count) >= number:
                act()
            return _original(*args, **kwargs)

        setattr(os, name, wrapped)


def _killed(number, action):
    """Whether a process that dies at a write dies in `action`; the parent goes on."""
    child = os.fork()
    if child == 0:
        try:
            _at_write(number, lambda: os._exit(9))
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("start", ["unpatched", "patched"])
@pytest.mark.parametrize("action", ["patch", "revert"])
def test_a_kill_at_every_write(tmp_path, start, action):
    root = checkout(tmp_path, git=False)
    pristine = tree(root)
    number = died = 0
    while True:
        shutil.rmtree(root)
        root = checkout(tmp_path, git=False)
        if start == "patched" or action == "revert":
            _, changes, manifest = patching.prepare(root, "upg")
            patching.apply(root, changes, manifest)
        before = _code(root)
        if action == "patch":
            _, changes, manifest = patching.prepare(root, "jfb")
            act = functools.partial(patching.apply, root, changes, manifest)
        else:
            act = functools.partial(patching.revert, root)
        killed = _killed(number, act)
        if not killed:
            break
        died += 1
        if (root / RECORD / "journal.json").exists():
            with pytest.raises(journal.Interrupted, match="--recover"):
                patching.status(root)
            # So does recovery, at each of its own writes.
            inner = 0
            while _killed(inner, functools.partial(patching.recover, root)):
                inner += 1
            assert _code(root) == before
        else:
            assert _code(root) in (before, pristine if action == "revert" else _code(root))
            patching.recover(root)
            patched = patching.status(root)
            assert (patched is None) == (_code(root) == pristine)
            assert patched is None or patched.changed(root) == []
        # Whatever happened, it can be undone in full.
        patching.revert(root)
        assert tree(root) == pristine
        number += 1
    assert died > 8


def _code(root):
    return {path: content for path, content in tree(root).items() if path.endswith(".py")}


def _full_once(patch, number):
    """Let the write of that number fail; return a list that is filled when it does."""
    count, full = iter(range(10**6)), []

    def limited(original, *args, **kwargs):
        if next(count) == number:
            full.append(number)
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    for name in ("replace", "fsync"):
        patch.setattr(os, name, functools.partial(limited, getattr(os, name)))
    return full


def test_a_full_disk_at_every_write(tmp_path, monkeypatch):
    root = checkout(tmp_path, git=False)
    before = tree(root)
    _, changes, manifest = patching.prepare(root, "upg")
    for number in range(100):
        with monkeypatch.context() as patch:
            full = _full_once(patch, number)
            with contextlib.suppress(OSError):
                patching.apply(root, changes, manifest)
        if not full:  # there were fewer writes
            break
        assert tree(root) == before
    assert number > 5
    assert patching.status(root).grad == "upg"


def test_a_read_only_tree(repo, capsys, monkeypatch):
    def mkdir(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    said = refused(capsys, repo, "patch", repo, "--grad", "upg", status=1)
    assert "Permission denied" in said


def test_recover_without_need(repo, capsys):
    assert command("patch", repo, "--recover") == 0
    assert "nothing to restore" in capsys.readouterr().out
    command("patch", repo, "--grad", "upg")
    once = tree(repo)
    command("patch", repo, "--recover")
    assert tree(repo) == once


# -------------------------------------------------------------------------------- rewrite

line_ends = st.sampled_from(["\n", "\r\n"])
indents = st.sampled_from(["  ", "    ", "\t"])
fillers = st.lists(
    st.sampled_from(
        [
            "",
            "# ünï comment",
            "x = 1",
            "y = 'a\\tb'  # tail  ",
            "if True:\n{i}z = [1,\n  2]",
            "  ",
        ]
    ),
    max_size=5,
)


@st.composite
def sources(draw):
    """A file with the seam `def f: old(...)`, in any style."""
    indent = draw(indents)
    body = [
        f"{indent}a = 1",
        *draw(st.sampled_from([[], [f"{indent}# about it"]])),
        f"{indent}old( 1,2 )",
    ]
    parts = [*draw(fillers), "def f():", *body, *draw(fillers)]
    text = "\n".join(part.replace("{i}", indent) for part in parts)
    text += draw(st.sampled_from(["", "\n", "\n\n"]))
    bom = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    return bom + text.replace("\n", draw(line_ends)).encode(), indent


@given(sources())
def test_only_the_statement_changes(drawn):
    source, indent = drawn
    edits = [Edit("old(1, 2)", "new(3)\nif a:\n    new(4)", "replace", scope="f")]
    edited = rewrite(source, edits)
    end = b"\r\n" if b"\r\n" in source else b"\n"
    i = indent.encode()
    want = end.join([i + b"new(3)", i + b"if a:", i + i + b"new(4)"])
    tail = source.partition(i + b"old( 1,2 )")[2]
    head = source.partition(i + b"old( 1,2 )")[0]
    assert edited.startswith(head + want)
    assert edited.rstrip() == (head + want + tail).rstrip()
    compile(edited, "f.py", "exec")


@given(source=sources(), spec=st.sampled_from(["upg", "npg(k=2)", "upg(k=3, lam=0.4)"]))
def test_patch_then_revert_is_the_identity(tmp_path_factory, source, spec):
    root = tmp_path_factory.mktemp("any")
    (root / "f.py").write_bytes(source[0])
    seam = SEAM.__class__("it", ("old(",), (Edit("old(", "new({grad})", "replace"),))
    adapter = Adapter("any", (), (Project("any", "", (seam,)),))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            "deq_phantom_plugin.patching.repository.known_adapters", lambda: [adapter]
        )
        _, changes, manifest = patching.prepare(root, spec)
        patching.apply(root, changes, manifest)
        assert repr(spec).encode() in (root / "f.py").read_bytes()
        patching.revert(root)
    assert tree(root) == {"f.py": source[0]}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"def f(:", "does not parse"),
        (b"\xff\xfe", "does not parse"),
        (b"old(1)\nold(2)\n", "found 2"),
        (b"new(1)\n", "found 0"),
    ],
)
def test_a_source_that_cannot_be_edited(source, message):
    with pytest.raises(SeamError, match=message):
        rewrite(source, [Edit("old(", "new()")])


def test_imports_go_below_docstring_and_future():
    source = b'"""Text."""\nfrom __future__ import annotations\n\nimport os\n'
    assert rewrite(source, [], "import x").splitlines()[2] == b"import x"
    assert rewrite(b"import os\n", [], "import x") == b"import x\nimport os\n"


# ------------------------------------------------------------------------------------ run


def run(repo, *args, options=()):
    """`deq-phantom run`, in this process; its child's output comes back with its status."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(repo)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            quiet = functools.partial(subprocess.Popen, stdout=out, stderr=err)
            monkeypatch.setattr("deq_phantom_plugin.patching.run.subprocess.Popen", quiet)
            status = command("run", *options, "--grad", "npg(k=3)", "--", *args)
            out.seek(0)
            err.seek(0)
            return types.SimpleNamespace(status=status, stdout=out.read(), stderr=err.read())


@pytest.mark.parametrize("how", ["here", "spawn", "worker", "child"])
def test_run_switches_the_method_and_touches_nothing(repo, how):
    before = {p: c for p, c in tree(repo).items() if p.endswith(".py")}
    done = run(repo, sys.executable, "train.py", "--how", how)
    assert done.status == 0, done.stderr
    check_gradient(done.stdout, "npg(k=3)")
    assert {p: c for p, c in tree(repo).items() if p.endswith(".py")} == before
    # And without it the method is the repository's own.
    shutil.rmtree(repo / "__pycache__", ignore_errors=True)
    check_gradient(python(repo, "train.py", "--how", how).stdout, "exact")


def test_run_covers_torchrun(repo):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1"]
    done = run(repo, *launcher, "train.py")
    assert done.status == 0, done.stderr
    check_gradient(done.stdout, "npg(k=3)")


def test_run_covers_a_shell_script(repo):
    (repo / "run.sh").write_text(f"{sys.executable} train.py\n")
    done = run(repo, "bash", "run.sh")
    check_gradient(done.stdout, "npg(k=3)")


@pytest.mark.parametrize("args", [[], ["--grad", "upg"]])
def test_run_wins_over_a_patched_repositorys_own_method(repo, args):
    command("patch", repo, "--grad", "jfb")
    done = run(repo, sys.executable, "train.py", *args)
    assert done.status == 0, done.stderr
    check_gradient(done.stdout, "npg(k=3)")


def test_run_leaves_no_bytecode_of_what_it_patched(repo, monkeypatch):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    (repo / "other.py").write_text("")
    run(repo, sys.executable, "-c", "import model, other")
    assert [path.name[:6] for path in (repo / "__pycache__").iterdir()] == ["other."]


def test_tracebacks_show_the_lines_that_ran(repo):
    done = run(repo, sys.executable, "train.py", "--how", "raise")
    assert done.status == 1
    assert "new_z = self.equilibrium(func, z)" in done.stderr


def test_run_passes_the_exit_status_on(repo, capsys):
    assert run(repo, sys.executable, "train.py", "--how", "exit").status == 7
    assert run(repo, sys.executable, "train.py", "--how", "kill").status == 128 + 15
    assert command("run", "--repo", repo, "--grad", "upg", "--", "no-such-command") == 127
    assert "cannot run no-such-command" in capsys.readouterr().err


def test_run_warns_if_the_seam_was_never_loaded(repo, capsys):
    assert run(repo, sys.executable, "-c", "pass").status == 0
    assert "no changed module was imported (model.py, train.py)" in capsys.readouterr().err


def test_run_refuses_before_anything_starts(repo, tmp_path, capsys):
    touch = ["--", "touch", tmp_path / "started"]
    assert command("run", "--repo", repo, "--grad", "upq", *touch) == 2
    assert command("run", "--repo", tmp_path / "none", "--grad", "upg", *touch) == 2
    assert command("run", "--repo", repo, "--grad", "upg", "--compat", "gpu", *touch) == 2
    assert command("run", "--repo", repo, "--grad", "upg") == 2
    assert "no command" in capsys.readouterr().err
    assert not (tmp_path / "started").exists()


def test_a_module_that_changes_under_a_run_is_refused(repo):
    change = (
        "import pathlib; p = pathlib.Path('model.py'); p.write_text(p.read_text() + '#'); "
        "import model"
    )
    done = run(repo, sys.executable, "-c", change)
    assert done.status == 1
    assert "has changed since" in done.stderr


@pytest.fixture
def started(repo, tmp_path):
    """`deq-phantom run` in a process group of its own, asleep in the script."""
    script = tmp_path / "cli.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from tiny_repository import ADAPTER\n"
        "from deq_phantom_plugin.patching import repository\n"
        "repository.known_adapters = lambda: [ADAPTER]\n"
        "from deq_phantom_plugin.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    args = ["run", "--grad", "upg", "--", sys.executable, "train.py", "--how", "sleep"]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(script), *args],
        cwd=repo,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        # A shell's background jobs, such as CI, ignore it, and so would everything they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == b"ready\n"
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def test_ctrl_c_reaches_the_command(started):
    os.killpg(started.pid, signal.SIGINT)
    _, stderr = started.communicate(timeout=30)
    assert started.returncode in (1, 130)
    assert b"KeyboardInterrupt" in stderr
    assert b"cli.py" not in stderr.replace(b"train.py", b"")


def test_a_schedulers_signal_reaches_the_command(started, tmp_path):
    os.kill(started.pid, signal.SIGTERM)
    started.communicate(timeout=30)  # which the command's end of the pipes would outlast
    assert started.returncode == 128 + signal.SIGTERM
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_sitecustomize_of_the_users_still_runs(repo, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['MINE'] = 'ran'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run(repo, sys.executable, "-c", "import os, model; print(os.environ['MINE'])")
    assert done.stdout == "ran\n", done.stderr


# --------------------------------------------------------------------------------- shims


def shimmed(name, code):
    """Run code in a fresh interpreter, with a shim and without."""
    with_it = f"from deq_phantom_plugin.patching import compat; compat.apply({name!r})\n{code}"
    return [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=False)
        for c in (code, with_it)
    ]


CODE = {
    "adam_atan2": "import torch; from adam_atan2 import AdamATan2; "
    "AdamATan2(torch.nn.Linear(2, 2).parameters(), lr=0.0).step()",
    "cpu": "import torch; torch.set_default_tensor_type('torch.cuda.FloatTensor'); "
    "x = torch.nn.Linear(2, 2).cuda()(torch.ones(1, 2).cuda()); torch.cuda.synchronize(); "
    "assert x.device.type == 'cpu'\n"
    "with torch.device('cuda'): assert torch.zeros(2).device.type == 'cpu'\n"
    "with torch.device('meta'): assert torch.zeros(2).is_meta",
    "flash_attn": "import torch; from flash_attn import flash_attn_func; "
    "x = torch.ones(1, 3, 2, 4); assert torch.equal(flash_attn_func(x, x, x), x)",
    "linalg": "import torch; a, b = 2 * torch.eye(2), torch.ones(2, 1); "
    "assert torch.equal(torch.solve(b, a)[0], b / 2)",
    "load": "import io, torch; f = io.BytesIO(); torch.save(torch.nn.Linear(2, 2), f); f.seek(0); "
    "assert torch.load(f).in_features == 2",
    "numpy": "import numpy as np; assert np.zeros(2, np.int).dtype == int; np.Inf; np.float",
    "torch_sparse": "import torch_sparse",
}


@pytest.mark.parametrize("name", sorted(compat.SHIMS))
def test_a_shim_is_what_makes_old_code_run(name):
    if name in ("cpu",) and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    without, with_it = shimmed(name, CODE[name])
    assert without.returncode != 0
    assert with_it.returncode == 0, with_it.stderr


def test_shims_in_a_run_and_in_a_patch(repo, capsys):
    (repo / "old.py").write_text(
        "import numpy as np\nimport torch_sparse\nimport model\nprint(np.int)\n"
    )
    assert run(repo, sys.executable, "old.py").status == 1
    capsys.readouterr()
    done = run(repo, sys.executable, "old.py", options=["--compat", "numpy,torch_sparse"])
    assert done.stdout == "<class 'int'>\n", done.stderr
    assert "shim numpy:" in capsys.readouterr().err
    (repo / "old.py").write_text(
        "import model\nimport torch_sparse\nimport numpy\nprint(numpy.int)\n"
    )
    assert command("patch", repo, "--grad", "upg", "--compat", "numpy,torch_sparse") == 0
    assert "shim numpy:" in capsys.readouterr().out
    assert python(repo, "old.py").stdout == "<class 'int'>\n"
    assert command("doctor", repo) == 0
    assert "patched with upg, shims numpy, torch_sparse" in capsys.readouterr().out


def test_attention_by_the_shim_is_that_of_a_softmax(monkeypatch):
    """With fewer heads of keys and values than of queries."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.delitem(sys.modules, "flash_attn")
    compat.apply("flash_attn")
    from flash_attn import flash_attn_func

    q = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    k, v = torch.randn(2, 2, 5, 2, 3, dtype=torch.float64)
    keys, values = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) / 3**0.5
    for causal, mask in ((False, 0.0), (True, torch.full((5, 5), -torch.inf).triu(1))):
        want = torch.einsum("bhqk,bkhd->bqhd", (scores + mask).softmax(-1), values)
        got = flash_attn_func(q=q, k=k, v=v, causal=causal)
        torch.testing.assert_close(got, want)
        assert got.is_contiguous()
    with pytest.raises(ValueError, match="causal=True with 5 queries and 4 keys"):
        flash_attn_func(q, k[:, :4], v[:, :4], causal=True)


def test_the_optimizer_of_the_shim(monkeypatch):
    """Against its recursion for one number, with decoupled weight decay."""
    monkeypatch.setitem(sys.modules, "adam_atan2", None)
    monkeypatch.delitem(sys.modules, "adam_atan2")
    compat.apply("adam_atan2")
    from adam_atan2 import AdamATan2

    p = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    other = torch.nn.Parameter(torch.ones(3))  # without a gradient, as an unused layer
    optimizer = AdamATan2([p, other], lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    x, m, v = 2.0, 0.0, 0.0
    for t in range(1, 5):
        grad = 3 * x**2 - t
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
        step = math.atan2(m / (1 - 0.9**t), math.sqrt(v / (1 - 0.95**t)))
        x = x * (1 - 0.1 * 0.5) - 0.1 * step
        optimizer.zero_grad()
        (p**3 - t * p).backward()
        optimizer.step()
        assert p.item() == pytest.approx(x, rel=1e-12)
    assert torch.equal(other, torch.ones(3))


def test_a_package_that_is_there_has_no_stand_in(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("flash_attn_func = 'its own'")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    compat.apply("flash_attn")
    import flash_attn

    assert flash_attn.flash_attn_func == "its own"
    monkeypatch.delitem(sys.modules, "flash_attn")


@pytest.mark.parametrize("name", ["patch", "run"])
def test_shims_are_listed(name, capsys):
    assert command(name, "--compat", "help") == 0
    out = capsys.readouterr().out
    assert all(f"shim {name}: " in out for name in compat.SHIMS)


def test_an_unknown_shim():
    with pytest.raises(ValueError, match="unknown compatibility shim 'gpu'"):
        compat.apply("gpu")


# --------------------------------------------------------------------------------- doctor


def test_doctor(repo, tmp_path, capsys):
    assert command("doctor", repo) == 0
    out = capsys.readouterr().out
    assert f"torch             {torch.__version__}" in out
    assert "somebody/tiny (known: 0000000)" in out
    assert "model.py: the layer" in out
    assert "not patched" in out
    assert "upg             built in" in out
    command("patch", repo, "--grad", "npg(k=3)")
    (repo / "train.py").write_text("")
    capsys.readouterr()
    command("doctor", repo)
    out = capsys.readouterr().out
    assert "patched with npg(k=3)" in out
    assert "changed since: train.py" in out
    git(repo, "checkout", "-q", "--", ".")
    shutil.rmtree(repo / RECORD)
    (repo / "train.py").write_text((repo / "train.py").read_text() + "# mine")
    command("doctor", repo)
    assert "uncommitted changes" in capsys.readouterr().out
    text = (repo / "model.py").read_text()
    (repo / "model.py").write_text(text.replace("torch.zeros_like(x)", "torch.ones_like(x)"))
    git(repo, "commit", "-qam", "2")
    command("doctor", repo)
    assert "unknown version" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    command("doctor", tmp_path / "empty")
    assert "not recognised" in capsys.readouterr().out
    assert command("doctor", tmp_path / "none") == 2


def test_doctor_says_what_is_missing(monkeypatch, capsys):
    from importlib.metadata import PackageNotFoundError

    from deq_phantom_plugin.patching import doctor

    def version(name):
        if name == "torchdeq":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)
    command("doctor")
    out = capsys.readouterr().out
    assert 'missing: torchdeq: pip install "deq-phantom-plugin[torchdeq]"' in out


# ---------------------------------------------------------------- what patched code uses


class Layer(torch.nn.Module):
    def __init__(self, grad):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.equilibrium = Equilibrium(grad)

    def forward(self, x, step=None):
        func = lambda z: torch.tanh(0.5 * self.linear(z) + x)  # noqa: E731
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(100):
                z = func(z)
        return self.equilibrium(func, z, step=step)


def test_an_equilibrium_is_found_switched_and_reported():
    model = Layer("upg")
    assert dpp.set_grad(model, "jfb") == 1
    assert model.equilibrium.grad == dpp.JFB()
    report = dpp.model_report(
        model, torch.randn(3, 4), lambda out: out.square().sum(), ["jfb", "ift"]
    )
    assert "jfb" in str(report)
    with pytest.raises(ValueError, match="unknown strategy"):
        Equilibrium("upq")


def test_an_equilibrium_adds_one_number_to_the_state_dict_all_through_training():
    model, x = Layer("upg"), torch.randn(3, 4)
    keys = ["linear.weight", "linear.bias", "equilibrium.memory.step"]
    assert list(model.state_dict()) == keys
    for step, grad in enumerate(["jfb", "ift(warm_start=True)", "guard('upg')"]):
        dpp.set_grad(model, grad)
        dpp.set_step(model, step)
        model(x).square().sum().backward()
        assert list(model.state_dict()) == keys
        assert model.state_dict()[keys[-1]] == step
    # A checkpoint from before the patch fits the patched model, also strictly.
    model.load_state_dict({key: model.state_dict()[key] for key in keys[:2]})


def test_a_schedule_follows_the_step_that_the_model_tells():
    model = Layer("schedule({0: 'jfb', 10: 'upg(k=2, lam=1.0)'})")
    x = torch.randn(3, 4)
    for step, spec in ((3, "jfb"), (10, "upg(k=2, lam=1.0)")):
        model.zero_grad()
        model(x, step).square().sum().backward()
        got = model.linear.weight.grad.clone()
        other = Layer(spec)
        other.load_state_dict(model.state_dict())
        other(x).square().sum().backward()
        torch.testing.assert_close(got, other.linear.weight.grad)


def test_outside_training_it_is_the_equilibrium():
    model = Layer("upg").eval()
    with pytest.warns(dpp.AssumptionWarning, match="in evaluation mode"):
        out = model(torch.randn(3, 4))
    assert not out.requires_grad


@pytest.mark.parametrize("grad", ["bptt(steps=5)", "reversible(steps=5)", "upg"])
def test_without_autograd_it_is_the_equilibrium_in_training_too(grad):
    equilibrium = Equilibrium(grad).train()
    with torch.no_grad():
        out = equilibrium(lambda h: 0.5 * h + 3.5, torch.full((1, 3), 7.0))
    assert torch.equal(out, torch.full((1, 3), 7.0))


def test_bptt_begins_where_the_solve_began():
    model = Layer("bptt(steps=3)").double()
    x = torch.randn(3, 4, dtype=torch.float64)
    out = model(x)
    z = torch.zeros_like(x)
    for _ in range(3):
        z = torch.tanh(0.5 * model.linear(z) + x)
    torch.testing.assert_close(out, z)


def test_the_deq_zoos_own_ift_still_means_itself():
    import argparse

    from torchdeq.utils import add_deq_args

    from deq_phantom_plugin.patching import default_grad

    with dpp.enabled("torchdeq"):
        parser = argparse.ArgumentParser()
        add_deq_args(parser)
        default_grad(parser, "npg")
        assert parser.parse_args([]).grad == ["npg"]
        for option in ("--ift", "--hook_ift"):
            args = parser.parse_args([option])
            assert args.grad == [1]
            assert vars(args)[option.strip("-")] is True
        assert parser.parse_args(["--grad", "3", "--ift"]).grad == [3]
        assert parser.parse_args(["--ift", "--grad", "upg"]).grad == ["upg"]


def test_steps_and_arguments():
    assert steps(7) == 7
    assert steps("upg(k=3)") == 3
    assert steps("ift") == 1
    assert steps("tbptt(k='poisson(8)')") == 8  # the mean, as in evaluation
    assert steps("ramp('upg', {'k': (2, 5)}, until=0.2)") == 2
    assert steps("schedule({0: \"guard('npg(k=4)')\", 0.5: 'upg'})") == 4
    with pytest.raises(ValueError, match=r"k='all' of tbptt\(k='all'\): the script needs a number"):
        steps("tbptt('all')")
    assert grad_argument("upg(k=3)") == "upg(k=3)"
    with pytest.raises(Exception, match="unknown strategy"):
        grad_argument("upq")
