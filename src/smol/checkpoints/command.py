"""The command line of ``src/checkpoints.py``: rows, as a table for people or JSON for programs."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smol.checkpoints.replicas import RemoteRuns, Replicas
from smol.checkpoints.retention import Retention, is_pinned, pin, unpin
from smol.checkpoints.store import CheckpointInfo, FsspecStore, read_manifest, verify_files
from smol.errors import UserError, nearest, one_line
from smol.paths import find, is_url, resolve

HELP = """Look at the checkpoints of a run, and take care of them.

RUN is a run's folder, such as runs/stage1, or the URL or folder of its store, such as
s3://bucket/runs/stage1. KEY is a checkpoint's name or its beginning, a step, or "latest".
With --store the copies of a run's folder in the store are looked at too."""


class Checkpoints:
    """The checkpoints of one run: its folder, its store, or both.

    Args:
        run: A run's folder, or the URL or folder of its store.
        remote: Where the checkpoints of all runs are safe; None to look at ``run`` alone.
        options: Of the file system of ``run``, where that is a URL.
        cache: Local folder for downloads, where ``run`` is a URL.
    """

    def __init__(
        self,
        run: str,
        remote: RemoteRuns | None = None,
        options: dict[str, Any] | None = None,
        cache: str | Path | None = None,
    ):
        self.name = run
        if is_url(run):
            self.stores = {"store": FsspecStore(run, cache, options)}
        else:
            folder = Path(find(run))
            inner = folder / "checkpoints"
            if not folder.is_dir() and remote is None:
                raise UserError(f"{run} is not there; expected a run's folder or a store's URL")
            local = FsspecStore(inner if inner.is_dir() or remote else folder)
            self.stores = {"local": local}
            if remote is not None:
                self.stores["store"] = remote.of(folder.absolute().name, cache or inner)
        self.replicas = Replicas(*self.stores.values())
        self.infos = self.replicas.list()
        self._keys = {
            name: {info.key for info in store.list()} for name, store in self.stores.items()
        }

    def choose(self, name: str) -> CheckpointInfo:
        """The checkpoint of a name, its beginning, a step, or ``latest``."""
        if not self.infos:
            raise UserError(f"{self.name} holds no checkpoint")
        if name == "latest":
            return self.infos[-1]
        found = [
            info
            for info in self.infos
            if (name.isdigit() and info.manifest.step == int(name)) or info.key.startswith(name)
        ]
        if len(found) == 1:
            return found[0]
        keys = [info.key for info in self.infos]
        if found:
            raise UserError(f"{name} is one of {', '.join(i.key for i in found)}; say which")
        raise UserError(f"{self.name} holds no checkpoint {name}.{nearest(name, keys)}")

    def copies(self, info: CheckpointInfo) -> dict[str, FsspecStore]:
        """The stores that have it, by name: ``local``, ``store``."""
        return {name: s for name, s in self.stores.items() if info.key in self._keys[name]}

    def row(self, info: CheckpointInfo) -> dict[str, Any]:
        """A line of the table."""
        manifest, copies = info.manifest, self.copies(info)
        return {
            "key": info.key,
            "lineage": manifest.lineage,
            "step": manifest.step,
            "tokens": manifest.tokens,
            "bytes": manifest.bytes,
            "created": manifest.created,
            "where": "+".join(copies),
            "pinned": any(is_pinned(store, info.key) for store in copies.values()),
            "parent": manifest.parent,
        }

    def verify(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Read every copy, and say what is wrong with it; without names, of all checkpoints.

        A copy whose manifest is damaged, which no other command sees, is one too.
        """
        marked = {name: set(store.marked()) for name, store in self.stores.items()}
        unseen = sorted(set().union(*marked.values()) - {info.key for info in self.infos})
        if names:
            keys = [name if name in unseen else self.choose(name).key for name in names]
        else:
            keys = [info.key for info in self.infos] + unseen
        rows = []
        for key in keys:
            row: dict[str, Any] = {"key": key}
            for name, store in self.stores.items():
                if key in marked[name]:
                    row[name] = _state(store, key)
            rows.append(row)
        return rows

    def prune(self, retention: Retention, dry_run: bool) -> list[dict[str, Any]]:
        """Remove what the rule lets go from each store."""
        rows = []
        parents = {info.manifest.parent for info in self.infos[-1:]}  # it may be resumed from
        for name, store in self.stores.items():
            infos = [info for info in self.infos if info.key in self._keys[name]]

            def is_kept(info: CheckpointInfo) -> bool:
                pinned = any(is_pinned(copy, info.key) for copy in self.copies(info).values())
                return info.key in parents or pinned

            for info in retention.removable(infos, store.is_sound, is_kept):
                rows.append({"key": info.key, "step": info.manifest.step, "removed from": name})
                if not dry_run:
                    store.delete(info)
        return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 after a mistake, 1 if one is damaged."""
    args = _parser().parse_args(arguments)
    try:
        rows, status = _run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # every file system has errors of its own
        print(f"error: {args.run}: {one_line(error)}", file=sys.stderr)
        return 2
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return status


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("run", metavar="RUN", help="a run's folder, or the URL of its store")
    common.add_argument("--store", help="the store of all runs, as the callback has it")
    common.add_argument(
        "--storage_options", type=json.loads, metavar="JSON", help="of the store's file system"
    )
    common.add_argument("--json", action="store_true", help="print JSON")
    parser = argparse.ArgumentParser(
        prog="checkpoints.py",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str, *keys: str, **kwargs: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, parents=[common])
        for key in keys:
            command.add_argument(key, metavar="KEY", **kwargs)
        return command

    add("list", "what there is")
    add("verify", "read everything and compare it with the manifests", "key", nargs="*")
    add("pin", "keep checkpoints, whatever the rotation says", "key", nargs="+")
    add("unpin", "let the rotation have them again", "key", nargs="+")
    prune = add("prune", "remove the old ones by the rotation's rule; not while the run trains")
    prune.add_argument("--keep", type=int, default=2, help="newest verified ones, 2")
    prune.add_argument("--keep_every", type=int, help="those at multiples of so many steps stay")
    prune.add_argument("--dry_run", action="store_true", help="only say what would go")
    restore = add("restore", "download and verify", "key", nargs="?", default="latest")
    restore.add_argument(
        "--to", metavar="FOLDER", help="where to put it; as a rule into the run's folder"
    )
    export = add("export", "write a Hugging Face folder", "key", nargs="?", default="latest")
    export.add_argument("--to", required=True, metavar="FOLDER", help="new folder")
    export.add_argument("--tokenizer", help="folder of the tokenizer; a run knows its own")
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    return parser


def _run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    remote = None if args.store is None else RemoteRuns(args.store, args.storage_options)
    to = None if args.command != "restore" or args.to is None else resolve(args.to)
    there = Checkpoints(args.run.rstrip("/"), remote, args.storage_options, to)
    if args.command == "list":
        return [there.row(info) for info in there.infos], 0
    if args.command == "prune":
        return there.prune(Retention(args.keep, args.keep_every), args.dry_run), 0
    if args.command == "restore":
        return [_restore(there, there.choose(args.key), to)], 0
    if args.command == "export":
        return [_export(there, there.choose(args.key), args)], 0
    if args.command == "verify":
        rows = there.verify(args.key)
        return rows, int(any(set(row.values()) - {row["key"], "whole"} for row in rows))
    infos = [there.choose(key) for key in args.key]
    for info in infos:
        for store in there.copies(info).values():
            (pin if args.command == "pin" else unpin)(store, info.key)
    return [there.row(info) for info in infos], 0


def _restore(there: Checkpoints, info: CheckpointInfo, to: Path | None) -> dict[str, Any]:
    if to is None:
        if "local" not in there.stores:
            raise UserError(f"{there.name} is a URL; say where to put it: --to FOLDER")
        to = Path(there.stores["local"].root)
    folder = there.replicas.fetch(info)
    if folder.parent != to:
        FsspecStore(to).upload(folder, info.key, info.manifest)
        folder = to / info.key
    return {"key": info.key, "step": info.manifest.step, "to": str(folder)}


def _state(store: FsspecStore, key: str) -> str:
    """``whole``, or what is wrong with a copy."""
    folder = f"{store.root}/{key}"
    try:
        verify_files(store.fs, folder, read_manifest(store.fs, folder))
    except UserError as error:
        return str(error)
    return "whole"


def _export(there: Checkpoints, info: CheckpointInfo, args: Any) -> dict[str, Any]:
    import torch

    from smol.checkpoints.huggingface import export_decoder
    from smol.runs import tokenizer_of

    tokenizer = args.tokenizer and find(args.tokenizer)
    if tokenizer is None and not is_url(args.run):
        tokenizer = tokenizer_of(find(args.run))
    dtype = getattr(torch, args.dtype) if args.dtype else None
    target = resolve(args.to)
    export_decoder(there.replicas.fetch(info), target, tokenizer, dtype)
    return {"key": info.key, "step": info.manifest.step, "to": str(target)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as columns for people."""
    if not rows:
        return "nothing"
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(name, row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    lines = [names, *cells]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(name: str, value: Any) -> str:
    if name == "bytes":
        return f"{value / 1e6:,.1f} MB"
    if isinstance(value, bool):
        return "yes" if value else ""
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
