"""``nnssl_inspect``: what is in a checkpoint of ours, of nnssl (OpenMind) or of nnU-Net, without running code from it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nnssl_ext.cli._console import console
from nnssl_ext.cli._run import run


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="nnssl_inspect",
        description="Say what is in a checkpoint of nnssl-ext, nnssl (OpenMind) or nnU-Net. Nothing in the file is executed.",
    )
    p.add_argument(
        "checkpoint", type=Path, help="e.g. checkpoint_final.pth, an exported folder, or hf:OWNER/NAME[@REVISION]"
    )
    p.add_argument("--json", action="store_true", help="print everything as JSON")
    p.add_argument("--keys", action="store_true", help="also list every weight with shape and type")
    return p


def main() -> None:
    """Entry point of ``nnssl_inspect``."""
    run(_main)


def _main() -> int:
    args = parser().parse_args()
    from nnssl_ext.checkpoints.io import load_checkpoint
    from nnssl_ext.checkpoints.source import name_of
    from nnssl_ext.checkpoints.summary import summarise

    content = load_checkpoint(args.checkpoint)
    summary = summarise(content, name_of(args.checkpoint))
    if args.keys:
        summary["keys"] = {
            key: f"{'x'.join(map(str, value.shape)) or 'scalar'} {str(value.dtype).removeprefix('torch.')}"
            for key, value in content["network_weights"].items()
        }
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        _show(summary)
    return 0


def _show(summary: dict[str, Any]) -> None:
    from rich.table import Column, Table

    out = console()
    long = {"modules", "citations", "keys", "parameters", "tensors", "names", "architecture"}
    counts = f"{summary['parameters']:,} parameters in {summary['tensors']} tensors under {summary['names']} names"
    out.print(f"network: {_network(summary['architecture'])}\nweights: {counts}", markup=False)
    for name, value in summary.items():
        if name not in long and value not in (None, {}, []):
            out.print(
                f"{name.replace('_', ' ')}: {value if isinstance(value, str) else json.dumps(value)}", markup=False
            )
    modules = Table(Column("module", overflow="fold"), "names", "tensors", "parameters", "of these not pretrained")
    for name, counts in summary["modules"].items():
        modules.add_row(name, *(f"{counts[c]:,}" for c in ("names", "tensors", "parameters", "not_pretrained")))
    out.print(modules)
    for key, shape in summary.get("keys", {}).items():
        out.print(f"{key}  {shape}", markup=False)
    for citation in summary["citations"]:
        papers = citation.get("apa_citations") or citation.get("bibtex_citations") or []
        out.print(
            f"cite for {citation.get('type', '?')} {citation.get('name', '?')}:", *papers, sep="\n  ", markup=False
        )


def _network(architecture: dict[str, Any] | None) -> str:
    """One line: class and the arguments that set its size."""
    if not architecture:
        return "not said in the file"
    name = architecture.get("network_class_name") or architecture["arch_class_name"]
    kwargs = architecture.get("arch_kwargs") or {}
    telling = ("embed_dim", "eva_depth", "eva_numheads", "features_per_stage", "n_blocks_per_stage", "strides")
    return f"{name} " + ", ".join(f"{key} {kwargs[key]}" for key in telling if key in kwargs)
