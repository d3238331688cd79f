"""``nnssl_doctor``: is this environment ready? Says what to do where it is not."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from nnssl_ext.cli._run import run

COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def main() -> None:
    """Entry point; the exit code is 0 when nothing fails, else 1."""
    run(_main)


def _main() -> int:
    parser = argparse.ArgumentParser(
        prog="nnssl_doctor",
        description="Check the nnU-Net hook, versions, devices, threads and folders. Exit code 0 only when healthy.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    as_json = parser.parse_args().json

    from rich.console import Console

    from nnssl_ext.nnunet_plugin.health import checks

    console = Console(soft_wrap=True, highlight=False)  # long lines stay whole, so that they can be copied
    findings = []
    for check in checks():
        findings.append(check)
        if not as_json:
            console.print(f"[{COLOURS[check.status]}]{check.status:5}[/] {check.name:30}", end="")
            console.print(check.says, markup=False)
            if check.fix and check.status != "ok":
                console.print(f"{'':36}-> {check.fix}", markup=False)
    failed = sum(check.status == "fail" for check in findings)
    if as_json:
        print(json.dumps({"healthy": not failed, "checks": [asdict(check) for check in findings]}, indent=2))
    else:
        console.print(f"{failed} problem(s) to mend" if failed else "healthy")
    return 1 if failed else 0
