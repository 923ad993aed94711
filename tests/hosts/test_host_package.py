"""The host that docs/howto/host.md writes, installed as a package."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT

FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```\n", re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that the package is installed in."""
    folder = tmp_path_factory.mktemp("fixpoint")
    files = dict(FILE.findall((ROOT / "docs" / "howto" / "host.md").read_text(encoding="utf-8")))
    assert set(files) == {
        "fixpoint/__init__.py",
        "fixpoint_phantom.py",
        "pyproject.toml",
        "test_fixpoint.py",
        "use.py",
    }
    for name, content in files.items():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_text(content, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    target = folder / "site"
    command = [*pip, "--no-build-isolation", "--target", str(target), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


def run(site, *arguments):
    path = os.pathsep.join([str(site), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=site, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_example_runs(site):
    done = run(site, str(site.parent / "source" / "use.py"))
    assert done.returncode == 0, done.stderr


def test_the_host_keeps_the_contract(site):
    done = run(site, "-m", "pytest", "-q", str(site.parent / "source" / "test_fixpoint.py"))
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


def test_doctor_lists_it(site):
    done = run(site, "-m", "deq_phantom_plugin.cli", "doctor")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  fixpoint +1\.4\.0$", done.stdout, re.MULTILINE)


def test_an_unknown_version_is_left_alone(site):
    (info,) = site.glob("fixpoint-*.dist-info")
    metadata = info / "METADATA"
    before = metadata.read_text()
    metadata.write_text(before.replace("Version: 1.4.0", "Version: 2.0"))
    try:
        done = run(
            site,
            "-c",
            "import deq_phantom_plugin as dpp\n"
            "assert 'fixpoint' not in dpp.enable()\n"
            "assert 'fixpoint' in dpp.enable('fixpoint', force=True)\n",
        )
        assert done.returncode == 0, done.stderr
        assert "fixpoint 2.0 is not hooked: this package knows 1.4" in done.stderr
        listed = run(site, "-m", "deq_phantom_plugin.cli", "doctor").stdout
        assert re.search(r"fixpoint +2\.0, unknown to this package: off", listed)
    finally:
        metadata.write_text(before)
