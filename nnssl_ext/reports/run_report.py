"""A run as one HTML page: what was found, the curves, what the method sees, the figures, the settings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from nnssl_ext.files import read_json
from nnssl_ext.monitors.diagnosis import Finding
from nnssl_ext.reports.curves import read_log
from nnssl_ext.reports.page import Code, Picture, Section, Table, write_page


def write_run_report(output: Path, findings: Sequence[Finding]) -> None:
    """Write ``report.html`` into a run's folder from the files that lie there.

    Args:
        output: holds ``training_log.csv``, ``progress.png``, ``settings.json`` and pictures.
        findings: of the log as it is now.

    Raises:
        NnsslError: one of the files is missing or damaged.
    """
    log = read_log(output / "training_log.csv")
    settings = read_json(output / "settings.json")
    pictures = sorted(output.glob("reconstruction_*.png"))  # numbers sort before "final"
    shown = [pictures[0], pictures[-1]] if len(pictures) > 1 else pictures
    rows = [(name, float(values[0]), float(values[-1])) for name, values in log.items() if not math.isnan(values[-1])]
    sections = [
        Section("Diagnosis", [_told(findings)]),
        Section("Curves", [Picture(output / "progress.png", "one point per epoch")]),
        Section("Pictures", [Picture(png, png.stem) for png in shown] or ["None drawn yet."]),
        Section("Figures", [Table(("figure", "first epoch", "latest epoch"), rows)]),
        Section("Settings", [Code(json.dumps(settings, indent=2), summary="settings.json")]),
    ]
    write_page(output / "report.html", f"{settings['method']} on {settings['dataset']}", sections)


def _told(findings: Sequence[Finding]) -> str | Table:
    if not findings:
        return "No finding: nothing in the log speaks for a collapse, a broken setting or a diverging run."
    rows = [(f.severity, f.rule, f.step, f.evidence, f.remedy) for f in findings]
    return Table(("", "finding", "since step", "evidence", "what to do"), rows)
