"""Input that somebody made to do harm: it is used or refused, soon, and nothing else happens.

`DEQ_PHANTOM_CASES` sets how many cases each property tries.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.metadata
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing import entry_points
from deq_phantom_plugin.cli import main
from deq_phantom_plugin.hosts import registry as hosts
from deq_phantom_plugin.patching.adapter import Edit, known_adapters
from deq_phantom_plugin.patching.repository import RECORD, git
from deq_phantom_plugin.patching.rewrite import SeamError, fingerprint, rewrite
from deq_phantom_plugin.strategies import registry
from deq_phantom_plugin.testing import make_equilibrium
from tiny_repository import ADAPTER, checkout, tree

CASES = int(os.environ.get("DEQ_PHANTOM_CASES", 30))
SECONDS = 120  # for one case, on a busy machine; a hang is a failure

# What code does that had better not run. `compile` is what `ast.parse` is made of; the rest of
# compiling ends in `exec`.
FORBIDDEN = ("exec", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "subprocess.Popen")
_watching: list[list[str]] = []


def _audit(event, args):
    if (_watching and event.startswith(FORBIDDEN)) or (
        _watching and event == "open" and isinstance(args[2], int) and args[2] & os.O_CREAT
    ):
        _watching[-1].append(f"{event} {args!r:.200}")


sys.addaudithook(_audit)


@contextmanager
def in_time(seconds=SECONDS):
    """Fail if what is inside takes too long."""

    def late(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def harmless(seconds=SECONDS):
    """Fail also if it runs code, starts a process, or makes a file."""
    _watching.append([])
    try:
        with in_time(seconds):
            yield
    finally:
        seen = _watching.pop()
    assert seen == []


def cases(n=CASES):
    return settings(max_examples=n, suppress_health_check=list(HealthCheck))


def test_the_watch_sees_what_it_is_for(tmp_path):
    for act in (
        lambda: eval("1 + 1"),
        lambda: exec("x = 1"),
        lambda: os.system("true"),
        lambda: subprocess.run(["true"], check=True),
        lambda: (tmp_path / "made").touch(),
    ):
        with pytest.raises(AssertionError), harmless():
            act()
    with pytest.raises(TimeoutError), harmless(seconds=1):
        time.sleep(3)


# --- specs ------------------------------------------------------------------------------------

NAMES = ["bptt", "exact", "guard", "ift", "jfb", "npg", "npg_rr", "reversible", "schedule"]
NAMES += ["shine", "upg"]
CANARY = "__import__('os').system('true')"
FRAGMENTS = [
    *NAMES, "(", ")", "[", "]", "{", "}", "'", '"', "'''", "\\", "\0", "\n", "\r", "\t",
    "\x0c", "#", ",", ":", "=", ":=", "*", "**", "-", "+", "~", "1", "0x", "1e999", "9" * 5000,
    "1j", "k=", "lam=", "steps=", "on_failure=", "fallback(", "b'", "f'{", "\\N{", "\\ud800",
    "\ud800", "\u202e", "\xe9", "lambda:", "not ", "if ", "else ", "for ", "in ", "await ",
    "yield ", "...", "None", "True", CANARY,
    "open('made','w')", "().__class__", "`", "$", "\uff55pg",
    "0" * 300, "1 if 1 else ",
]  # fmt: skip
fragments = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12).map("".join)
repeated = st.builds(
    lambda before, piece, n, after: before + piece * n + after,
    fragments, st.sampled_from(FRAGMENTS), st.integers(0, 3000), fragments,
)  # fmt: skip
called = st.builds("{}({})".format, st.sampled_from(NAMES), fragments | repeated)
texts = st.one_of(st.text(st.characters(), max_size=60), fragments, repeated, called)


def strategy_or_value_error(make: Callable[[], dpp.GradStrategy]) -> None:
    with harmless():
        try:
            strategy = make()
        except ValueError as error:
            assert str(error)  # noqa: PT017
            return
        assert isinstance(strategy, dpp.GradStrategy)
        assert dpp.get_strategy(repr(strategy)) == strategy


@cases()
@given(texts)
def test_any_spec_is_a_strategy_or_a_value_error(text):
    strategy_or_value_error(lambda: dpp.get_strategy(text))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary(max_size=5)
    | st.complex_numbers() | st.sampled_from(NAMES) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
    | st.tuples(inner, inner) | st.dictionaries(st.integers(-1, 3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
arguments = ["k", "lam", "checkpoint", "steps", "beta", "solver", "tol", "max_iter", "warm_start"]
arguments += ["higher_order", "refine", "fallback", "stages", "grad", "on_failure", "forward_tol"]
arguments += ["adjoint_tol", "p", "self", "cls", "__class__", "name"]
configs = st.builds(
    lambda name, rest: {**rest, "name": name},
    st.sampled_from(NAMES) | values,
    st.dictionaries(st.sampled_from(arguments) | st.text(max_size=5), values, max_size=3),
)


@cases()
@given(configs | values)
def test_any_config_is_a_strategy_or_a_value_error(config):
    strategy_or_value_error(lambda: dpp.get_strategy(config))


def deep(n):
    config = leaf = {"name": "guard"}
    for _ in range(n):
        leaf["grad"] = leaf = {"name": "guard"}
    return config


@pytest.mark.parametrize("depth", [3, 100, 300, 1000, 10000])
def test_configs_may_be_nested_deeply(depth):
    strategy_or_value_error(lambda: dpp.get_strategy(deep(depth)))


@cases()
@given(configs | values | st.lists(configs, max_size=2))
def test_torchdeq_takes_any_grad_or_refuses_it(grad):
    torchdeq = pytest.importorskip("torchdeq")
    if isinstance(grad, list | tuple) and all(isinstance(g, int) for g in grad):
        return  # TorchDEQ's own
    if isinstance(grad, int):
        return
    with dpp.enabled("torchdeq"), harmless():
        try:
            deq = torchdeq.get_deq(grad=grad)
        except ValueError:
            return
        assert deq.produce_grad


@cases()
@given(
    st.dictionaries(st.sampled_from([*arguments, "tau", "b_solver", "b_tol", "b_max_iter"]), values)
)
def test_torchdeq_takes_any_settings_or_refuses_them(config):
    torchdeq = pytest.importorskip("torchdeq")
    with dpp.enabled("torchdeq"), harmless():
        try:
            deq = torchdeq.get_deq({**config, "grad": "ift"})
        except ValueError:
            return
        assert deq.produce_grad


# --- entry points -----------------------------------------------------------------------------

MODULE = """
import deq_phantom_plugin as dpp
class Abstract(dpp.GradStrategy): pass
class Raising(dpp.GradStrategy):
    def __init__(self): raise ZeroDivisionError
    def attach(self, func, equilibrium, context): return func(equilibrium)
class Fine(dpp.GradStrategy):
    def attach(self, func, equilibrium, context): return func(equilibrium)
class Host: pass
class Meta(type):
    def __subclasscheck__(cls, other): raise ZeroDivisionError
class Odd(metaclass=Meta): pass
number, text, function, module = 5, "upg", print, dpp
"""
OFFERED = ["Abstract", "Host", "Odd", "number", "text", "function", "module", "missing", "a.b.c"]


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """Install a package by hand, with any lines in its entry_points.txt."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(hosts, "_hosts", dict(hosts._hosts))

    def offer(group, lines, **modules):
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)
            monkeypatch.delitem(sys.modules, name, raising=False)
        info = tmp_path / "hostile-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hostile\nVersion: 1.0\n")
        body = "\n".join([f"[{group}]", *lines, ""])
        (info / "entry_points.txt").write_text(body, "utf-8", "surrogatepass")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()

    return offer


ALL_GROUPS = [entry_points.STRATEGIES, entry_points.HOSTS, entry_points.ADAPTERS]


@pytest.mark.parametrize("group", ALL_GROUPS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_strategy_host_or_adapter_leaves_the_others_alone(offer, group, capsys):
    bodies = {
        "exits": "raise SystemExit(3)",
        "raises": "raise RuntimeError('\\ud800')",
        "unfinished": "def f(:",
        "nul": "x = '\\0'",
        "recursive": "def f(): f()\nf()",
    }
    lines = [f"o{i} = hostile_module:{name}" for i, name in enumerate(OFFERED)]
    lines += [f"{name} = {name}:Fine" for name in bodies]
    lines += [
        "A B = x",
        "../up = ../up:x",
        "é = é:é",
        "__class__ = x:y",
        "upg = hostile_module:Fine",
    ]
    lines += ["no_module = :x", "spaced = a b : c", "torchdeq = hostile_module:number"]
    offer(group, lines, hostile_module=MODULE, **bodies)
    names = dpp.list_strategies()
    assert {*NAMES} <= {*names}
    assert dpp.get_strategy("upg") == dpp.UPG()
    assert len(known_adapters()) >= 5
    assert dpp.set_grad(torch.nn.Linear(1, 1), "upg") == 0
    assert main(["list"]) == 0
    assert "upg(k=5" in capsys.readouterr().out
    if group == entry_points.STRATEGIES:
        for name in [*bodies, "o0", "o2", "o3"]:
            with pytest.raises(ImportError, match=name):
                dpp.get_strategy(name)
    if group == entry_points.HOSTS:
        with pytest.raises(ImportError, match="exits"):
            dpp.enable("exits")
        with pytest.raises(ImportError, match="is no Host"):
            dpp.enable("o3")


def test_a_strategy_that_fails_is_still_listed(offer, capsys):
    offer(entry_points.STRATEGIES, ["bad = hostile_module:Raising"], hostile_module=MODULE)
    assert main(["list"]) == 0
    assert "bad(...)" in capsys.readouterr().out


names_of_points = st.text(st.characters(codec="utf-8"), max_size=15)


@cases()
@given(st.lists(st.tuples(names_of_points, names_of_points), max_size=4), names_of_points)
def test_any_names_of_entry_points(points, asked):
    """Names and values at random, as `importlib.metadata` would hand them over."""
    offered = [
        importlib.metadata.EntryPoint(name, value, entry_points.STRATEGIES)
        for name, value in points
    ]

    def found(group, name=None):
        return [p for p in offered if p.group == group and name in (None, p.name)]

    with pytest.MonkeyPatch.context() as monkeypatch, harmless():
        monkeypatch.setattr(entry_points, "entry_points", found)
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))
        monkeypatch.setattr("warnings.warn", lambda *args, **kwargs: None)
        assert {*NAMES} <= {*dpp.list_strategies()}
        for name in (asked, *(name for name, _ in points)):
            try:
                registry.strategy_class(name)
            except (ImportError, ValueError) as error:
                assert str(error)  # noqa: PT017


# --- checkpoints ------------------------------------------------------------------------------

tensors = st.sampled_from(
    [
        torch.tensor(3), torch.tensor(-3), torch.tensor(2.5), torch.tensor(float("nan")),
        torch.tensor(float("inf")), torch.tensor(1j), torch.tensor([1, 2]), torch.empty(0),
        torch.tensor(True), torch.zeros(2, 3), torch.full((2, 3), float("nan")),
        torch.full((2, 3), 1e38), torch.full((2, 3), -1e300, dtype=torch.float64),
        torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.complex64),
        torch.zeros(2, 3).to_sparse(), torch.zeros(3, 2), torch.zeros(2, 3, device="meta"),
        torch.zeros(2, 3, dtype=torch.float16), torch.zeros(1).expand(2, 3),
        torch.quantize_per_tensor(torch.zeros(2, 3), 1.0, 0, torch.qint8),
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        torch.zeros(2, 3, requires_grad=True), torch.tensor(2**62),
    ]
)  # fmt: skip
kept_values = tensors | st.none() | st.text(max_size=5) | st.integers() | st.floats()
kept_values |= st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=2), st.none())
kept_keys = st.sampled_from(["step", "warm_start.adjoint_0", "warm_start.", "warm_start", "x", ""])
kept_keys |= st.text(max_size=5)
held = st.dictionaries(st.text(max_size=3) | st.integers(), kept_values, max_size=3)
parts = st.sampled_from(["warm_starts", "histories", "failures", "step", "x"])
states = st.dictionaries(kept_keys, kept_values, max_size=4)
PROBLEM = make_equilibrium([(2, 3)], dtype=torch.float32)


def gradient(memory, spec):
    context = dpp.Context(memory=memory)
    loss = PROBLEM.linear_loss(dpp.attach(PROBLEM.func, PROBLEM.state, spec, context))
    return torch.autograd.grad(loss, PROBLEM.params)


def load_and_go_on(path):
    """Load a checkpoint over a memory that holds something, and take a step with what it holds."""
    memory = dpp.Memory()
    model = torch.nn.ModuleDict({"memory": memory})
    memory.step = 4
    memory.keep("adjoint_0", torch.zeros(2, 3))
    before = memory.state_dict()
    kept = dpp.memory_state_dict(memory)[""]["warm_starts"]["adjoint_0"]
    try:
        model.load_state_dict(torch.load(path, weights_only=True), strict=False)
    except RuntimeError as error:
        assert "memory." in str(error)  # noqa: PT017
        after = memory.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert dpp.memory_state_dict(memory)[""]["warm_starts"]["adjoint_0"] is kept
    goes_on(memory)
    return memory


def goes_on(memory):
    """Take a step with what a memory holds."""
    assert repr(memory)
    assert list(memory.state_dict()) == ["step"]
    warm = "ift(warm_start=True, tol=1e-6)"
    later = "npg" if (memory.step or 0) >= 3 else "ift(tol=1e-6)"
    for spec, same in ((warm, "ift(tol=1e-6)"), (f"schedule({{0: {warm!r}, 3: 'npg'}})", later)):
        pairs = zip(gradient(memory, spec), gradient(None, same), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Where to save one; what PyTorch imports late has been imported."""
    path = tmp_path_factory.mktemp("hostile") / "model.pt"
    torch.save({"memory.step": torch.tensor(7), "memory.warm_start.x": torch.ones(2)}, path)
    assert load_and_go_on(path).step == 7
    return path


@cases()
@given(states)
@example({"step": torch.tensor(-1)})
@example({"step": torch.tensor(2.6, dtype=torch.bfloat16)})
@example({"step": "7"})
@example({"step": torch.tensor(float("nan"))})
@example({"step": torch.tensor(2), "warm_start.adjoint_0": "x"})
@example({"warm_start.adjoint_0": torch.full((2, 3), float("nan"))})
@pytest.mark.filterwarnings("ignore")
def test_any_checkpoint_loads_or_is_refused(checkpoint, state):
    torch.save({f"memory.{key}": value for key, value in state.items()}, checkpoint)
    with harmless():
        load_and_go_on(checkpoint)


@cases()
@given(st.dictionaries(parts, held | kept_values, max_size=3) | kept_values)
@example({"warm_starts": {"adjoint_0": torch.zeros(2, 3).to_sparse()}})
@example({"warm_starts": {"adjoint_0": torch.full((2, 3), float("nan"))}})
@example({"histories": {"x": {"a": [1, (2.0, None)]}}, "failures": {"forward": 2}})
@pytest.mark.filterwarnings("ignore")
def test_anything_that_was_kept_loads_or_is_refused(checkpoint, state):
    memory = dpp.Memory()
    memory.keep("adjoint_0", torch.zeros(2, 3))
    model = torch.nn.ModuleDict({"memory": memory})
    before = dpp.memory_state_dict(model)
    torch.save({"memory": state}, checkpoint)
    with harmless():
        try:
            dpp.load_memory_state_dict(model, torch.load(checkpoint, weights_only=True))
        except ValueError as error:
            assert "memory" in str(error)  # noqa: PT017
            after = dpp.memory_state_dict(model)["memory"]
            assert after["warm_starts"]["adjoint_0"] is before["memory"]["warm_starts"]["adjoint_0"]
        goes_on(memory)


@pytest.mark.parametrize(
    "step",
    [
        "7",
        b"7",
        None,
        True,
        float("nan"),
        float("inf"),
        -float("inf"),
        1j,
        [1, 2],
        2**63,
        torch.tensor([1, 2]),
        torch.tensor([1]),
        torch.tensor(float("nan")),
        torch.tensor(True),
        torch.tensor(1j),
        torch.tensor(1.0, device="meta"),
        torch.empty(0),
    ],
    ids=repr,
)
def test_a_step_that_is_none_is_named_and_changes_nothing(step):
    memory = dpp.Memory()
    memory.step = 4
    with pytest.raises(RuntimeError, match=r"step is .*; expected a whole number of at least 0"):
        memory.load_state_dict({"step": step})
    assert memory.step == 4


def test_code_in_a_checkpoint_is_refused(checkpoint):
    class Bomb:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"memory.step": Bomb()}, checkpoint)
    with harmless(), pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_and_go_on(checkpoint)


# --- repositories -----------------------------------------------------------------------------


@pytest.fixture
def only_tiny(monkeypatch):
    monkeypatch.setattr("deq_phantom_plugin.patching.repository.known_adapters", lambda: [ADAPTER])


@pytest.fixture
def repo(tmp_path, only_tiny):
    root = tmp_path / "inside"
    root.mkdir()
    return checkout(root)


def command(*args):
    """Run the command line; return its status. Any error but a message is a failure."""
    with in_time():
        try:
            return main([str(arg) for arg in args])
        except SystemExit as exit_:
            return exit_.code


def everything(folder):
    """All that is in a folder, links as links."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


NASTY = ["new\nline.py", "tab\t.py", " .py", "-rf.py", ":(exclude)*.py", "*.py", "a'b\".py", "é.py"]
NASTY += ["$(touch made).py", "`touch made`.py", "\x1b[2J.py", "\u202e.py", "..py", "-.py", "%s.py"]


@pytest.mark.parametrize("name", [*NASTY, os.fsdecode(b"\xff.py")])
@pytest.mark.parametrize("with_git", [True, False])
@pytest.mark.usefixtures("only_tiny")
def test_names_of_files(tmp_path, name, with_git, capsys):
    root = checkout(tmp_path, git=False)
    (root / "model.py").rename(root / name)
    if with_git:
        for args in (["init", "-q"], ["add", "-A"]):
            subprocess.run(["git", "-C", root, *args], check=True)
        user = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", root, *user, "commit", "-qm", "1"], check=True)
    before = tree(root)
    assert command("patch", root, "--grad", "upg") == 0
    assert tree(root)[name] != before[name]
    assert command("patch", root, "--revert") == 0
    assert tree(root) == before
    if with_git:
        (root / name).write_bytes(before[name] + b"# mine\n")
        assert command("patch", root, "--grad", "upg") == 2
        assert "uncommitted changes" in capsys.readouterr().err


def test_what_is_in_the_way(repo, tmp_path):
    """Folders named like files, links that lead round or out, pipes, a file of a terabyte."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "model.py").write_bytes((repo / "model.py").read_bytes())
    (repo / "folder.py").mkdir()
    (repo / "folder.py" / "x.py").write_bytes(b"\xff\xfe\0")
    (repo / "round.py").symlink_to("round.py")
    (repo / "a.py").symlink_to("b.py")
    (repo / "b.py").symlink_to("a.py")
    (repo / "self").symlink_to(".", target_is_directory=True)
    (repo / "out").symlink_to(outside, target_is_directory=True)
    (repo / "out.py").symlink_to(outside / "model.py")
    (repo / "zero.py").symlink_to("/dev/zero")
    (repo / "gone.py").symlink_to("nowhere")
    os.mkfifo(repo / "pipe.py")
    with open(repo / "huge.py", "wb") as stream:
        stream.truncate(2**40)
    (repo / "bom.py").write_bytes(b"\xef\xbb\xbf" + b"x = 1\n")
    before = {**everything(outside)}
    pristine = {name: (repo / name).read_bytes() for name in ("model.py", "train.py")}
    for args in (["--grad", "upg", "--dry-run"], ["--grad", "upg"], ["--grad", "jfb"]):
        assert command("patch", repo, *args) == 0
    assert command("doctor", repo) == 0
    assert (repo / "model.py").read_bytes() != pristine["model.py"]
    assert command("patch", repo, "--revert") == 0
    assert pristine == {name: (repo / name).read_bytes() for name in pristine}
    assert everything(outside) == before


@pytest.mark.parametrize(
    "source",
    [
        "x = " + "-" * 900 + "1", "x = " + "-" * 60000 + "1", "x = " + "+".join(["1"] * 2000),
        "x = a" + ".b" * 5000, "x = a" + "()" * 100000, "x = " + "(" * 5000 + ")" * 5000,
        "if a: pass\n" + "elif a: pass\n" * 3000, "x = " + "lambda:" * 3000 + "1",
        "# coding: utf-16\nx = 1", "# coding: hex\nx = 1", "# coding: undefined\nx = 1",
        "x = '\0'", "x = " + "1" * 5000, "def f(:", "\x1a",
    ],
    ids=lambda source: repr(source[:12]),
)  # fmt: skip
def test_sources_that_are_no_easy_read(repo, source, capsys):
    with open(repo / "model.py", "a") as stream:
        stream.write(f"\n{source}\n")
    subprocess.run(["git", "-C", repo, "add", "-A"], check=True)
    user = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", repo, *user, "commit", "-qm", "2"], check=True)
    before = tree(repo)
    status = command("patch", repo, "--grad", "upg")
    assert status in (0, 2)
    if status == 2:
        assert "unknown version" in capsys.readouterr().err
        assert tree(repo) == before


@cases()
@given(st.binary(max_size=80) | texts.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_rewritten_or_refused(source):
    source = source + b"\nanchor = 1\n"
    with harmless():
        fingerprint(source, "Net.forward")
        try:
            new = rewrite(source, [Edit("anchor = 1", "anchor = 2")])
        except SeamError:
            return
    assert new.count(b"anchor = 2") >= 1


# What git would run by the configuration of a repository, on looking at a file that has changed.
PROGRAMS = {
    "core.fsmonitor": "touch {made}",
    "filter.x.clean": "touch {made}; cat",
    "filter.x.process": "touch {made}",
    "filter.x.required": "true",
    "core.hooksPath": "{folder}",
    "core.pager": "touch {made}",
    "core.sshCommand": "touch {made}",
    "diff.external": "touch {made}",
    "core.editor": "touch {made}",
    "alias.status": "!touch {made}",
    "alias.ls-files": "!touch {made}",
}


def poisoned(root, tmp_path):
    """Give a repository a configuration whose programs leave a trace; return the trace."""
    made, folder = tmp_path / "made", tmp_path / "hooks"
    folder.mkdir()
    for hook in ("post-index-change", "fsmonitor-watchman", "query-watchman"):
        (folder / hook).write_text(f"#!/bin/sh\ntouch '{made}'\n")
        (folder / hook).chmod(0o755)
    for key, value in PROGRAMS.items():
        value = value.format(made=made, folder=folder)
        subprocess.run(["git", "-C", root, "config", key, value], check=True)
    (root / ".git" / "info" / "attributes").write_text("*.py filter=x diff=x\n")
    return made


def test_git_runs_no_program_that_a_repository_names(repo, tmp_path, capsys):
    made = poisoned(repo, tmp_path)
    # As it would without our care: the trace works.
    os.utime(repo / "model.py", (1, 1))
    subprocess.run(["git", "-C", repo, "status"], capture_output=True, check=False)
    assert made.exists()
    made.unlink()
    os.utime(repo / "model.py", (2, 2))
    assert command("doctor", repo) == 0
    assert command("patch", repo, "--grad", "upg", "--dry-run") == 0
    (repo / "mine.py").write_text("import deq_phantom_plugin.patching\n")
    assert command("patch", repo, "--grad", "upg") == 0
    assert command("patch", repo, "--revert") == 0
    (repo / "model.py").write_bytes((repo / "model.py").read_bytes() + b"# mine\n")
    assert command("patch", repo, "--grad", "upg") == 2
    assert "uncommitted changes" in capsys.readouterr().err
    assert not made.exists()


def test_git_that_does_not_answer(repo, monkeypatch):
    (repo / ".git" / "config").unlink()
    os.mkfifo(repo / ".git" / "config")
    monkeypatch.setattr("deq_phantom_plugin.patching.repository._PATIENCE", 0.5)
    with in_time(), pytest.raises(ValueError, match="git does not answer"):
        git(repo, "status")


# --- records of a patch -----------------------------------------------------------------------


def record(**changes):
    """A record that would restore files, as a repository could bring one along."""
    return {"grad": "upg", "compat": [], "projects": [], "originals": {}, "digests": {}, **changes}


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def field_in(folder):
    """Make a repository with ways out of it, and something outside to be careful of."""
    root = folder / "inside" / "tiny"
    (root / RECORD).mkdir(parents=True)
    (folder / "victim.py").write_bytes(b"precious\n")
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "victim.py").write_bytes(b"precious\n")
    (root / "model.py").write_bytes(b"mine\n")
    (root / "link.py").symlink_to(folder / "victim.py")
    (root / "out").symlink_to(folder / "elsewhere", target_is_directory=True)
    (root / ".git").mkdir()
    (root / ".git" / "config").write_bytes(b"precious\n")
    (root / ".git" / "x.py").write_bytes(b"precious\n")
    return root


@pytest.fixture
def field(tmp_path, only_tiny):
    return field_in(tmp_path)


def ways_out(folder):
    ways = [
        "../../victim.py",
        "link.py",
        "out/victim.py",
        ".git/config",
        ".git/x.py",
        "",
        ".",
        "..",
    ]
    ways += [str(folder / "victim.py"), "./../../victim.py", "model.py/../../../victim.py"]
    ways += ["out/../model.py", "nowhere/../../../victim.py", "\0", "a\0.py", "/dev/null"]
    ways += ["..", "x" * 5000, f"{RECORD}/x.py", ".venv/x.py", "__pycache__/x.py", "model.txt"]
    return ways


@pytest.mark.parametrize("action", ["--revert", "--recover"])
def test_a_record_leads_nowhere_else(field, tmp_path, action):
    for way in ways_out(tmp_path):
        old = b"precious\n"
        manifest = record(originals={way: encoded(b"bad")}, digests={way: digest(old)})
        name = "manifest.json" if action == "--revert" else "journal.json"
        if action == "--recover":
            manifest = {"files": {way: encoded(b"bad")}, "manifest": None}
        (field / RECORD).mkdir(exist_ok=True)
        (field / RECORD / name).write_text(json.dumps(manifest))
        before = everything(tmp_path)
        status = command("patch", field, action)
        after = everything(tmp_path)
        assert status == 2, way
        assert after == before, way


@pytest.mark.parametrize("name", ["manifest.json", "journal.json"])
@pytest.mark.parametrize("kind", ["link", "loop", "folder", "pipe", "zero"])
def test_a_record_that_is_no_file(field, tmp_path, name, kind):
    path = field / RECORD / name
    if kind == "link":
        (tmp_path / "real.json").write_text(json.dumps(record()))
        path.symlink_to(tmp_path / "real.json")
    elif kind == "loop":
        path.symlink_to(name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    for args in (["--revert"], ["--recover"], ["--grad", "upg"]):
        assert command("patch", field, *args) == 2
    assert command("doctor", field) == 0
    assert (field / "model.py").read_bytes() == b"mine\n"


def test_nothing_is_written_through_links_in_a_record(repo, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious\n")
    (repo / RECORD).mkdir()
    names = [".gitignore", "manifest.json", "journal.json", "old", "new.0", "new.1"]
    for name in [*(f"{name}.part" for name in names), ".gitignore", "old", "new.0", "new.1"]:
        (repo / RECORD / name).symlink_to(victim)
    (repo / RECORD / "new.folder").mkdir()
    before = tree(repo)["model.py"]
    assert command("patch", repo, "--grad", "upg") == 0
    assert command("patch", repo, "--revert") == 0
    assert victim.read_bytes() == b"precious\n"
    assert tree(repo)["model.py"] == before


told = [encoded(b"bad"), digest(b"mine\n"), "model.py", "../../victim.py", "out/victim.py"]
json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(told),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(told[2:]) | st.text(max_size=4), inner),
    max_leaves=5,
)  # fmt: skip
keys = st.sampled_from(["grad", "compat", "projects", "originals", "digests", "files", "manifest"])
manifests = (
    json_like
    | st.dictionaries(keys, json_like).map(lambda changes: record(**changes))
    | st.dictionaries(keys, json_like)
).map(lambda found: json.dumps(found).encode())
manifests |= st.binary(max_size=40) | st.just(b"[" * 100000) | st.just(b'{"a":' * 100000)


@cases()
@given(manifests, st.sampled_from(["manifest.json", "journal.json"]))
def test_any_record_restores_or_is_refused(tmp_path_factory, content, name):
    folder = tmp_path_factory.mktemp("field")
    root = field_in(folder)
    (root / RECORD / name).write_bytes(content)
    for args in (["--revert"], ["--recover"]):
        assert command("patch", root, *args) in (0, 2)
    for victim in ("victim.py", "elsewhere/victim.py", "inside/tiny/.git/config"):
        assert (folder / victim).read_bytes() == b"precious\n"
    assert {path.name for path in folder.iterdir()} == {"victim.py", "elsewhere", "inside"}
    assert [path.name for path in (folder / "elsewhere").iterdir()] == ["victim.py"]
