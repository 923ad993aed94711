"""`deq-phantom patch` changes a repository's files, so that it takes gradient methods by name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_compat, print_shims


def add_to(commands: Any) -> None:
    """Add the command to the commands of a parser."""
    parser = commands.add_parser(
        "patch", help="make an existing repository take gradient methods by name"
    )
    parser.set_defaults(run=_patch)
    add = parser.add_argument
    add("repo", type=Path, metavar="REPO", help="the folder of the repository, or a part of it")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--grad", metavar="SPEC", help="the method that it has by default")
    action.add_argument("--revert", action="store_true", help="restore the files byte for byte")
    action.add_argument(
        "--recover", action="store_true", help="undo a patch or revert that was interrupted"
    )
    add("--dry-run", action="store_true", help="show the changes, write nothing")
    add_compat(parser)


def _patch(args: argparse.Namespace) -> int:
    from ..patching import patch
    from ..patching.repository import check_root, outside_links

    if args.recover or args.revert:
        if args.dry_run or args.compat:
            raise ValueError("--dry-run and --compat go with --grad alone")
        restored = patch.recover(args.repo) if args.recover else patch.revert(args.repo)
        print("\n".join(["restored:", *restored]) if restored else "nothing to restore")
        return 0
    matches, steps, manifest = patch.prepare(args.repo, args.grad, args.compat)
    print("\n".join(f"recognised: {match.project.name}" for match in matches))
    for path in outside_links(check_root(args.repo)):
        print(f"passed over, a link out of the folder: {path}")
    print_shims(manifest["compat"])
    if not steps:
        print(f"already patched with {args.grad}; nothing to change")
        return 0
    print(patch.diff(steps), end="")
    if args.dry_run:
        print(f"dry run: {len(steps)} files would change")
        return 0
    patch.apply(args.repo, steps, manifest)
    print(f"patched {len(steps)} files; the default is {args.grad}, other methods by")
    for match in matches:
        print(f"  {match.project.name}: {match.project.switch}")
    print(f"back: deq-phantom patch {args.repo} --revert")
    return 0
