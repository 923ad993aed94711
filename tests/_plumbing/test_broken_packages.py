"""Packages that are there and cannot be imported: said in words, and no harm to the others."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest

from deq_phantom_plugin._plumbing.extras import is_there, require, why_not
from deq_phantom_plugin.hosts import registry as hosts

NMS = "operator torchvision::nms does not exist"


@pytest.fixture
def site(tmp_path):
    """A folder of packages that break: a torchvision for another PyTorch, and what imports it."""
    files = {
        "torchvision": f"raise RuntimeError({NMS!r})",
        "deepinv": "import torchvision",
        "silva_networks": "raise OSError('libgomp.so.1: cannot open shared object file')",
    }
    versions = {"deepinv": "0.5.0", "silva-networks": "1.2.2", "torchvision": "0.1"}
    for name, code in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    for name, version in versions.items():
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / "METADATA").write_text(text)
    return tmp_path


def run(site, code, check=True):
    """What a program prints, with those packages first on its path."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=site,
        check=False,
    )
    assert done.returncode == 0 or not check, done.stderr
    return done.stdout + done.stderr


def test_suites_need_pytest_and_say_so(site):
    code = (
        "import sys, deq_phantom_plugin\n"
        "assert 'pytest' not in sys.modules\n"
        "sys.modules['pytest'] = None\n"
        "import deq_phantom_plugin.testing\n"
    )
    out = run(site, code, check=False)
    assert 'pytest is not installed: pip install "deq-phantom-plugin[testing]"' in out


def test_the_others_are_hooked_and_nothing_is_imported(site):
    code = (
        "import sys, deq_phantom_plugin as dpp\n"
        "print(dpp.enable(), [n for n in sys.modules if n in ('deepinv', 'torchvision')])\n"
    )
    out = run(site, code)
    assert "'deepinv'" in out.partition("]")[0]
    assert out.strip().endswith("[]")


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("deepinv", f"deepinv cannot be imported: RuntimeError: {NMS}; a torchvision that was"),
        ("silva", "silva_networks cannot be imported: OSError: libgomp"),
    ],
)
def test_one_that_is_asked_for_by_name_is_refused(site, host, said):
    code = (
        "import deq_phantom_plugin as dpp\n"
        f"try: dpp.enable({host!r})\n"
        "except ImportError as error: print(error)\n"
    )
    assert f"{host} is not hooked: {said}" in run(site, code)


def test_doctor_says_it(site):
    out = run(site, "from deq_phantom_plugin.cli import main; main(['doctor'])")
    assert "  deepinv         0.5.0, broken" in out
    assert f"broken: deepinv cannot be imported: RuntimeError: {NMS}" in out
    assert "broken: silva_networks cannot be imported: OSError: libgomp" in out


def test_what_needs_transformers_says_what_broke_it(site):
    pytest.importorskip("torchdeq")
    pytest.importorskip("transformers")
    out = run(site, "import deq_phantom_plugin.adapters.transformer", check=False)
    if "Error" in out:  # releases of Transformers that import torchvision wherever it is
        last = out.strip().splitlines()[-1]
        assert last.startswith("ImportError: transformers.modeling_utils cannot be imported")
        assert NMS in last


def test_a_framework_that_breaks_while_it_is_hooked(monkeypatch):
    host = hosts._get("torchdeq")
    if not host.installed():
        pytest.skip("no TorchDEQ")
    others = set(hosts.enable()) - {"torchdeq"}
    hosts.disable()

    def patch(patches):
        raise RuntimeError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(host, "patch", patch)
    with pytest.warns(UserWarning, match="torchdeq is not hooked: RuntimeError: undefined symbol"):
        assert set(hosts.enable()) == others
    hosts.disable()


def test_the_reason_is_the_first_in_a_chain(tmp_path, monkeypatch):
    code = (
        "try:\n    1 / 0\nexcept Exception as error:\n    raise ImportError('see above') from error"
    )
    (tmp_path / "brittle_package.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    said = "brittle_package cannot be imported: ZeroDivisionError: division by zero"
    assert is_there("brittle_package")
    assert why_not("brittle_package") == said
    with pytest.raises(ImportError, match=said):
        require("brittle_package", "text")


def test_a_package_that_is_not_there():
    assert why_not("no_such_package.part") == "no_such_package.part is not installed"
    with pytest.raises(ImportError, match=r"no_such_package is not installed: pip install .*text"):
        require("no_such_package.part", "text")


def test_a_module_made_by_hand(monkeypatch):
    """Its `__spec__` is None, at which `find_spec` raises."""
    monkeypatch.setitem(sys.modules, "deepinv", types.ModuleType("deepinv"))
    assert is_there("deepinv")
    monkeypatch.setitem(sys.modules, "deepinv", None)
    assert not is_there("deepinv")
