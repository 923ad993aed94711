"""Coverage-guided fuzzing of what reads foreign input: `make fuzz`.

    python tests/fuzz/fuzz.py spec|record|repository -max_total_time=120

Anything but the errors that are documented is a finding; so is a process, a file outside the
folder, or code that runs. Other options are libFuzzer's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["deq_phantom_plugin"]):
    import deq_phantom_plugin as dpp
    from deq_phantom_plugin.patching import patch, repository, rewrite
    from deq_phantom_plugin.strategies import registry
from tiny_repository import ADAPTER, SEAM, TINY

FORBIDDEN = ("exec", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "subprocess.Popen")
watched = False


def _audit(event: str, args: object) -> None:
    if watched and event.startswith(FORBIDDEN):
        os.write(2, f"forbidden: {event} {args!r:.200}\n".encode())
        os.abort()


def fuzz_spec(data: bytes) -> None:
    """A spec is a strategy that its `repr` parses back to, or a `ValueError`."""
    global watched
    text = data.decode("utf-8", "surrogateescape" if len(data) % 2 else "replace")
    watched = True
    try:
        strategy = dpp.get_strategy(text)
    except ValueError:
        return
    finally:
        watched = False
    assert isinstance(strategy, dpp.GradStrategy)
    assert dpp.get_strategy(repr(strategy)) == strategy


FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
ROOT = FOLDER / "inside" / "repository"
RECORD = ROOT / repository.RECORD


def _fresh() -> None:
    shutil.rmtree(FOLDER)
    RECORD.mkdir(parents=True)
    (FOLDER / "victim.py").write_bytes(b"precious")
    (ROOT / "model.py").write_bytes(b"mine")
    (ROOT / "out").symlink_to(FOLDER)
    (ROOT / "link.py").symlink_to(FOLDER / "victim.py")


def fuzz_record(data: bytes) -> None:
    """`--revert` and `--recover` of any record restore inside the repository, or refuse."""
    _fresh()
    name = "journal.json" if data[:1] < b"\x80" else "manifest.json"
    content = data[1:]
    if len(data) % 3 == 0:  # a record that is whole but for what it says of one file
        path, _, text = content.decode("utf-8", "replace").partition("\n")
        files = {path: text}
        told = {"files": files, "manifest": None, "originals": files, "digests": files}
        content = json.dumps({"grad": "", "compat": [], "projects": [], **told}).encode()
    (RECORD / name).write_bytes(content)
    for action in (patch.revert, patch.recover):
        with contextlib.suppress(ValueError, OSError):
            action(ROOT)
    assert (FOLDER / "victim.py").read_bytes() == b"precious"
    assert sorted(os.listdir(FOLDER)) == ["inside", "victim.py"]
    assert os.listdir(FOLDER / "inside") == ["repository"]


def fuzz_repository(data: bytes) -> None:
    """A model whose source is changed in one place is recognised or not, patched or refused."""
    _fresh()
    shutil.rmtree(RECORD)
    source = (TINY / "model.py").read_bytes()
    place = int.from_bytes(data[:2], "little") % (len(source) + 1)
    length = data[2] if len(data) > 2 else 0
    (ROOT / "model.py").write_bytes(source[:place] + data[3:] + source[place + length :])
    before = (ROOT / "model.py").read_bytes()
    for mark in ("Net.forward", "Net.__init__"):
        rewrite.fingerprint(before, mark)
    with contextlib.suppress(rewrite.SeamError):
        rewrite.rewrite(before, SEAM.edits[:1])
    with contextlib.suppress(ValueError):
        _, steps, manifest = patch.prepare(ROOT, "upg")
        patch.apply(ROOT, steps, manifest)
    with contextlib.suppress(ValueError):
        patch.revert(ROOT)
    assert (ROOT / "model.py").read_bytes() == before
    assert (FOLDER / "victim.py").read_bytes() == b"precious"


HARNESSES = {"spec": fuzz_spec, "record": fuzz_record, "repository": fuzz_repository}
FILES = {"model.py": "bWluZQ==", "../../victim.py": "YmFk"}
RECORDS = [
    {"files": FILES, "manifest": None},
    {"originals": FILES, "digests": FILES, "grad": "upg", "compat": [], "projects": []},
]
SEEDS = {
    "spec": [
        *(repr(dpp.get_strategy(name)).encode() for name in ("upg", "ift", "guard", "npg_rr")),
        b"schedule({0: 'bptt(steps=5)', 9: \"guard('ift')\"})",
        b"upg(k=__import__('os').getpid(), lam=[1, {2: (3, None)}, 0x1F, 1e9, -1j, b'', f'{x}'])",
    ],
    "record": [bytes([0x30 + 0x80 * i]) + json.dumps(r).encode() for i in (0, 1) for r in RECORDS]
    + [b"0out/victim.py\nYmFk", b"\xb0../../victim.py\nYmFk"],
    "repository": [b"\0\0\0", b"\0\1\5z = f(x)\n", b"\x40\2\0    self.hook = None\n"],
}

if __name__ == "__main__":
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in HARNESSES:
        sys.exit(f"expected one of {', '.join(HARNESSES)}")
    warnings.simplefilter("ignore")
    registry.list_strategies()
    repository.known_adapters = lambda: [ADAPTER]
    repository.git = patch.git = lambda *args: None  # no process for each case
    _fresh()
    fuzz_repository(b"\0\0\0")  # imports all there is
    sys.addaudithook(_audit)
    seeds = Path(tempfile.mkdtemp(prefix="seeds-"))
    for number, seed in enumerate(SEEDS[name]):
        (seeds / str(number)).write_bytes(seed)
    atheris.Setup([sys.argv[0], *sys.argv[1:], str(seeds)], HARNESSES[name])
    atheris.Fuzz()
