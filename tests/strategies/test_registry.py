"""Names, specs, registration and entry points."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deq_phantom_plugin as dpp
from deq_phantom_plugin.strategies import registry

BUILT_IN = [
    "auto",
    "bptt",
    "exact",
    "guard",
    "ift",
    "jfb",
    "npg",
    "npg_rr",
    "ramp",
    "reversible",
    "schedule",
    "shine",
    "tbptt",
    "upg",
]


@pytest.fixture
def clean_registry(monkeypatch):
    """Registrations of a test end with it."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


# --- specs ------------------------------------------------------------------------------------

lams = st.floats(0, 1, exclude_min=True) | st.just("adaptive")
leaves = st.one_of(
    st.just(dpp.JFB()),
    st.just(dpp.Exact()),
    st.builds(dpp.UPG, st.integers(1, 10**9), lams, st.booleans()),
    st.builds(dpp.NPG, st.integers(1, 10**9), lams),
    st.builds(dpp.NPGRR, st.floats(0, 1, exclude_min=True, exclude_max=True), lams),
    st.builds(dpp.BPTT, st.integers(1, 10**9)),
    st.builds(
        dpp.Reversible,
        st.integers(1, 10**9),
        st.floats(0, 2, exclude_min=True, exclude_max=True).filter(lambda beta: beta != 1),
    ),
    st.builds(
        dpp.IFT,
        st.sampled_from(["gmres", "anderson", "broyden", "bicgstab", "fixed_point"]),
        st.floats(0, 1e300, exclude_min=True),
        st.integers(1, 10**9),
    ),
)
strategies = leaves | st.builds(
    lambda first, rest: dpp.Schedule({0: first, **rest}),
    leaves,
    st.dictionaries(st.integers(1, 10**9), leaves, max_size=3),
)


@given(strategies)
def test_repr_parses_back(strategy):
    again = dpp.get_strategy(repr(strategy))
    assert again == strategy
    assert type(again) is type(strategy)
    assert hash(again) == hash(strategy)


@given(st.text(max_size=40))
def test_any_text_parses_or_is_a_value_error(text):
    try:
        strategy = dpp.get_strategy(text)
    except ValueError:
        return
    assert isinstance(strategy, dpp.GradStrategy)


literals = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
identifiers = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).filter(
    lambda name: (
        name not in {"and", "as", "if", "in", "is", "or", "not", "for", "def", "del", "try"}
        and not __import__("keyword").iskeyword(name)
    )
)


@given(
    identifiers, st.lists(literals, max_size=2), st.dictionaries(identifiers, literals, max_size=3)
)
def test_parse_spec_returns_the_literals(name, args, kwargs):
    inside = [repr(arg) for arg in args] + [f"{key}={value!r}" for key, value in kwargs.items()]
    assert registry.parse_spec(f" {name}({', '.join(inside)}) ") == (name, args, kwargs)


def test_every_form_of_spec():
    want = dpp.UPG(k=3, lam=0.7)
    assert dpp.get_strategy("upg(k=3, lam=0.7)") == want
    assert dpp.get_strategy("upg(3, 0.7)") == want
    assert dpp.get_strategy({"name": "upg", "k": 3, "lam": 0.7}) == want
    assert dpp.get_strategy(want) is want
    assert dpp.get_strategy("upg") == dpp.get_strategy(dpp.UPG) == dpp.UPG(k=5, lam=0.5)
    assert dpp.get_strategy("upg()") == dpp.UPG()


@pytest.mark.filterwarnings("ignore:h is no equilibrium")
def test_a_callable_is_a_spec():
    def mine(func, equilibrium, context):
        assert context.batch_dim == 0
        return func(equilibrium)

    weight = torch.tensor(2.0, requires_grad=True)
    out = dpp.attach(lambda h: h * weight, torch.ones(2), grad=mine)
    assert torch.autograd.grad(out.sum(), weight)[0] == 2
    with pytest.raises(ValueError, match=re.escape("(func, equilibrium, context)")):
        dpp.get_strategy(lambda func: func)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("upq", "unknown strategy 'upq' .did you mean 'upg'.*'bptt', 'exact', 'guard', 'ift'"),
        ("UPG", "unknown strategy 'UPG' .did you mean 'upg'"),
        ("nothing_like_it", "there are 'auto'"),
        ("upg(kk=3)", "upg has no argument 'kk' .did you mean 'k'.*it takes k=5, lam=0.5"),
        ("upg(5, 0.5, False, 3)", "too many positional"),
        ("upg(3, k=4)", "multiple values"),
        ("upg(k=3, k=4)", "gives 'k' twice"),
        ("upg(lam=1" + "0" * 400 + ")", "number in .0, 1"),
        ("upg(k=0x1" + "0" * 16 + ")", "k=18446744073709551616; expected a whole number"),
        ("upg(k=" + "+".join(["x"] * 900) + ")", "not a literal"),
        ("upg(k=" + "not " * 900 + "1)", "not a literal"),
        ("jfb(k=1)", "jfb has no argument 'k'; it takes no arguments"),
        ("schedule", "missing a required argument: 'stages'"),
        ("upg(", "does not parse"),
        ("", "does not parse"),
        ("upg; npg", "does not parse"),
        ("upg + npg", "does not parse"),
        ("dpp.upg(k=1)", "does not parse"),
        ("upg(**{'k': 1})", "unpacks"),
        ("upg(*[1])", "not a literal"),
        ("upg(k=__import__('os').getpid())", "not a literal"),
        ("upg(k=open)", "'open' in the spec .* is not a literal"),
        ("upg(k=1 if True else 2)", "not a literal"),
        ("(" * 500 + ")" * 500, "does not parse"),
        ({"k": 3}, "names no strategy"),
        ({"name": "upg", "kk": 3}, "no argument 'kk'"),
        ({"name": "upg", 3: 3}, "names no strategy"),
        (5, "5 is no spec of a strategy"),
        (None, "None is no spec"),
        (["upg"], "is no spec"),
    ],
)
def test_invalid_specs(spec, match):
    with pytest.raises(ValueError, match=match):
        dpp.get_strategy(spec)


def test_a_spec_inside_itself_is_refused():
    spec = {"name": "guard"}
    spec["grad"] = spec
    with pytest.raises(ValueError, match="nested too deeply"):
        dpp.get_strategy(spec)


def test_nothing_is_evaluated(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(ValueError, match="not a literal"):
        dpp.get_strategy(f"upg(k=open({str(target)!r}, 'w'))")
    assert not target.exists()


def test_defaults_fill_what_the_spec_leaves_out():
    defaults = {"lam": 0.7, "tol": 1e-3}
    assert dpp.get_strategy("upg", defaults) == dpp.UPG(lam=0.7)
    assert dpp.get_strategy("upg(lam=0.2)", defaults) == dpp.UPG(lam=0.2)
    assert dpp.get_strategy("upg(3, 0.2)", defaults) == dpp.UPG(k=3, lam=0.2)
    assert dpp.get_strategy("ift", defaults) == dpp.IFT(tol=1e-3)
    assert dpp.get_strategy("jfb", defaults) == dpp.JFB()
    assert dpp.get_strategy(dpp.UPG(), defaults) == dpp.UPG()
    nested = dpp.get_strategy("schedule({0: 'bptt', 9: 'upg'})", defaults)
    assert nested == dpp.Schedule({0: "bptt", 9: "upg(lam=0.7)"})
    assert dpp.get_strategy("upg") == dpp.UPG()  # and are gone afterwards


# --- registration -----------------------------------------------------------------------------


def test_built_ins_are_listed():
    assert dpp.list_strategies() == BUILT_IN


@pytest.mark.usefixtures("clean_registry")
def test_register():
    @dpp.register_strategy("twice")
    @dataclass(frozen=True, repr=False)
    class Twice(dpp.GradStrategy):
        """JFB, scaled."""

        factor: float = 2.0

        def attach(self, func, equilibrium, context):
            return self.factor * func(equilibrium)

    assert dpp.list_strategies() == sorted([*BUILT_IN, "twice"])
    strategy = dpp.get_strategy("twice(factor=3)")
    assert strategy == Twice(3)
    assert dpp.get_strategy(repr(strategy)) == strategy
    with pytest.raises(ValueError, match=r"'twice' is registered already, .*Twice; pass replace"):
        dpp.register_strategy("twice")(Twice)
    with pytest.raises(ValueError, match="'upg' is registered already"):
        dpp.register_strategy("upg")

    @dpp.register_strategy("twice", replace=True)
    class Thrice(Twice):
        pass

    assert isinstance(dpp.get_strategy("twice"), Thrice)


@pytest.mark.parametrize("name", ["", "Mine", "my-method", "1st", "a b", None, 3])
def test_names_are_lower_case_identifiers(name):
    with pytest.raises(ValueError, match="lower-case identifier"):
        dpp.register_strategy(name)


@pytest.mark.usefixtures("clean_registry")
def test_only_strategies_are_registered():
    with pytest.raises(TypeError, match="GradStrategy"):
        dpp.register_strategy("number")(int)
    assert "number" not in dpp.list_strategies()


# --- entry points -----------------------------------------------------------------------------

STRATEGY = """
from dataclasses import dataclass
import deq_phantom_plugin as dpp

@dataclass(frozen=True, repr=False)
class Its(dpp.GradStrategy):
    '''One step, scaled.'''
    scale: float = 4.0

    def attach(self, func, equilibrium, context):
        return self.scale * func(equilibrium)
"""


@pytest.fixture
def install(tmp_path, monkeypatch, clean_registry):
    """Install a package with entry points, by pip, for the length of a test."""

    def install(name: str, modules: dict[str, str], entry_points: str) -> None:
        source, target = tmp_path / f"{name}-src", tmp_path / name
        source.mkdir()
        for module, text in modules.items():
            (source / f"{module}.py").write_text(textwrap.dedent(text))
        (source / "pyproject.toml").write_text(
            f'[build-system]\nrequires = ["setuptools"]\n'
            f'build-backend = "setuptools.build_meta"\n'
            f'[project]\nname = "{name}"\nversion = "1.0"\n'
            f'[project.entry-points."deq_phantom_plugin.strategies"]\n{entry_points}\n'
            f"[tool.setuptools]\npy-modules = {sorted(modules)}\n"
        )
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        command += ["--no-build-isolation", "--target", str(target), str(source)]
        subprocess.run(command, check=True, capture_output=True)
        monkeypatch.syspath_prepend(str(target))
        for module in modules:
            monkeypatch.delitem(sys.modules, module, raising=False)

    return install


def test_a_strategy_from_another_package(install):
    install("itspackage", {"its_module": STRATEGY}, 'its_name = "its_module:Its"')
    assert "its_module" not in sys.modules
    assert dpp.get_strategy("upg") == dpp.UPG()
    assert "its_module" not in sys.modules  # lazy

    import torchdeq

    dpp.enable()
    deq = torchdeq.get_deq(grad="its_name", f_max_iter=60)
    weight = torch.tensor(0.5, requires_grad=True)
    (out,), _ = deq(lambda h: weight * h + 1, torch.zeros(2, 1))
    torch.testing.assert_close(out, torch.full((2, 1), 8.0), rtol=1e-2, atol=0)
    (grad,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(grad, torch.tensor(16.0), rtol=1e-2, atol=0)

    assert dpp.list_strategies() == sorted([*BUILT_IN, "its_name"])
    strategy = dpp.get_strategy("its_name(scale=2.0)")
    assert repr(strategy) == "its_name(scale=2.0)"
    assert dpp.get_strategy(repr(strategy)) == strategy


STEPS = """
from dataclasses import dataclass
import deq_phantom_plugin as dpp

@dataclass(frozen=True, repr=False)
class Steps(dpp.GradStrategy):
    '''Backpropagation through some steps, scaled.'''
    k: int = 40
    scale: float = 1.0

    def attach(self, func, equilibrium, context):
        h = equilibrium
        for _ in range(self.k):
            h = func(h)
        leaves, structure = dpp.contract.state.flatten(h)
        scaled = [x.detach() + self.scale * (x - x.detach()) for x in leaves]
        return dpp.contract.state.unflatten(scaled, structure)
"""

SUITE = """
from deq_phantom_plugin.testing import StrategySuite
class TestMine(StrategySuite):
    spec, exact = "its_name(scale={scale})", {exact}
"""


@pytest.mark.parametrize(
    ("scale", "exact", "right"), [(1.0, 1e-6, True), (2.0, 1e-6, False), (-1.0, None, False)]
)
def test_another_package_tests_its_strategy_by_three_lines(install, tmp_path, scale, exact, right):
    install("itspackage", {"its_module": STEPS}, 'its_name = "its_module:Steps"')
    (tmp_path / "test_its.py").write_text(SUITE.format(scale=scale, exact=exact))
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "test_its.py"]
    if not right:  # the rest of the suite would only take time
        command += ["-k", "test_the_gradient"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "itspackage")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == (not right), done.stdout
    assert right or "FAILED test_its.py::TestMine::test_the_gradient[tensor]" in done.stdout
    assert " skipped" not in done.stdout


def test_broken_entry_points_are_isolated(install):
    install(
        "mixed",
        {
            "good_module": STRATEGY,
            "raising_module": "raise RuntimeError('its GPU library is missing')",
        },
        'good = "good_module:Its"\n'
        'raising = "raising_module:Its"\n'
        'absent = "no_such_module:Its"\n'
        'misnamed = "good_module:Missing"\n'
        'wrong = "good_module:dataclass"\n',
    )
    with pytest.warns(UserWarning, match="entry point") as record:
        assert dpp.list_strategies() == sorted([*BUILT_IN, "good"])
    text = "\n".join(str(warning.message) for warning in record)
    for name, reason in {
        "raising": "its GPU library is missing",
        "absent": "No module named 'no_such_module'",
        "misnamed": "Missing",
        "wrong": "not a subclass",
    }.items():
        assert any(name in line and reason in line for line in text.splitlines()), (name, text)
    assert isinstance(dpp.get_strategy("good"), dpp.GradStrategy)
    assert dpp.get_strategy("upg") == dpp.UPG()
    with pytest.raises(ImportError, match=r"raising.*RuntimeError: its GPU library is missing"):
        dpp.get_strategy("raising")
    with pytest.raises(ImportError, match=r"absent.*no_such_module"):
        dpp.get_strategy("absent(k=1)")
    with pytest.raises(ImportError, match=r"wrong.*not a subclass"):
        dpp.get_strategy("wrong")


def test_a_package_that_also_decorates(install):
    text = STRATEGY.replace("@dataclass", "@dpp.register_strategy('both')\n@dataclass", 1)
    install("decorating", {"both_module": text}, 'both = "both_module:Its"')
    assert dpp.get_strategy("both") == dpp.get_strategy("both(scale=4.0)")
    assert dpp.list_strategies().count("both") == 1


def test_a_built_in_name_is_not_taken_over(install):
    install("rival", {"rival_module": STRATEGY}, 'upg = "rival_module:Its"')
    assert dpp.get_strategy("upg") == dpp.UPG()
    assert dpp.list_strategies() == BUILT_IN


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda h: h[:2], r"returned shape \(2, 3\), torch.float32; expected \(4, 3\)"),
        (lambda h: h.double(), r"returned shape \(4, 3\), torch.float64; expected"),
        (lambda h: None, "returned None; expected a tensor"),
        (lambda h: (h, h), "returned the structure"),
    ],
)
def test_what_is_no_state_is_refused_with_the_strategys_name(returned, message):
    def mine(func, equilibrium, context):
        return returned(func(equilibrium))

    with pytest.raises(ValueError, match=f"mine.*{message}"):
        dpp.attach(lambda h: 0.5 * h, torch.zeros(4, 3), mine)
