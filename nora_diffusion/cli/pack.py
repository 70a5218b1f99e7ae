"""``nora-diffusion pack``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "pack many subjects with one shared basis into one file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of this command and their flags."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, text in (("create", "pack adapters"), ("add", "add adapters to a pack")):
        sub = verbs.add_parser(verb, help=text, description=text)
        sub.add_argument("pack", help="file that ends in .nora_pack.safetensors")
        sub.add_argument("adapters", nargs="+", metavar="[NAME=]ADAPTER", help="adapter folder, file or PACK#NAME")
    sub = verbs.add_parser("list", help="list the subjects of a pack", description="list the subjects of a pack")
    sub.add_argument("pack")
    sub.add_argument("--json", action="store_true", help="everything, as JSON")
    sub = verbs.add_parser(
        "extract", help="write one subject as an adapter", description="write one subject as an adapter"
    )
    sub.add_argument("pack")
    sub.add_argument("name")
    sub.add_argument("out", help="folder for the adapter")
    sub = verbs.add_parser("remove", help="remove subjects", description="remove subjects from a pack")
    sub.add_argument("pack")
    sub.add_argument("names", nargs="+", metavar="NAME")


def run(values: argparse.Namespace) -> None:
    """Run the verb and print the result."""
    if values.verb == "list":
        _list(values)
        return
    named = _named(values) if values.verb in ("create", "add") else []
    # Here, since it imports torch, which lists and mistakes do not need.
    from ..formats import pack_writing
    from ..formats.packs import list_pack

    if values.verb == "extract":
        print(pack_writing.extract_from_pack(values.pack, values.name, values.out))
        return
    if values.verb == "remove":
        file = pack_writing.remove_from_pack(values.pack, values.names)
    else:
        verb = pack_writing.create_pack if values.verb == "create" else pack_writing.add_to_pack
        file = verb(values.pack, named)
    count = len(list_pack(file))
    print(f"{file}: {count} {'subject' if count == 1 else 'subjects'}, {file.stat().st_size:,} bytes")


def _named(values: argparse.Namespace) -> list[tuple[str, str]]:
    """Names and paths of the adapters; a name may be empty. Raises :class:`UserError` for what is not an adapter."""
    from ..formats.adapter_file import inspect_adapter, is_basis_folder
    from ..formats.packs import pack_path
    from ..generation.addresses import split_label

    pack_path(values.pack)
    pairs = [split_label(text) for text in values.adapters]
    named = [(name, path) for name, path in pairs if name or not is_basis_folder(Path(path))]
    for _, path in named:
        inspect_adapter(path, hashed=False)
    return named


def _list(values: argparse.Namespace) -> None:
    from dataclasses import asdict

    from ..formats.packs import list_pack

    infos = list_pack(values.pack)
    if values.json:
        print(json.dumps([asdict(info) for info in infos], indent=2))
        return
    print(f"{'name':<24} {'trigger':<12} {'class':<12} {'method':<28} {'bytes':>9}  license")
    for info in infos:
        name = info.path.rpartition("#")[2]
        method = f"{info.method}, {info.ranks}"
        print(f"{name:<24} {info.trigger:<12} {info.class_word:<12} {method:<28} {info.bytes:>9,}  {info.license}")
