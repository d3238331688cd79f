"""From the training log to sentences: what goes wrong, since when, the evidence, and what to do.

The rules are data (`nnssl_ext.monitors.rules`): ranges of logged and derived figures that must hold for some epochs. A
finding never stops a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nnssl_ext.monitors.derived import Row, with_trends

Severity = Literal["warning", "alarm"]


@dataclass(frozen=True)
class Rule:
    """When a finding holds, and what to say.

    Attributes:
        name: short, unique.
        severity: ``alarm`` = this run will not give useful features as it is; ``warning`` = look at it.
        when: figure -> the range (inclusive) that it lies in. A row that lacks one of them is passed over, so figures may
            be logged every few epochs only.
        says: the evidence, a format string over the latest row's figures.
        remedy: what to check or change.
        source: where the rule and its numbers come from.
        lasting: rows in a row, up to the latest, in which it must hold.
        early: rows after which it is told as a warning already; healthy runs may pass through such a state.
        after: optimiser steps of the run before which no row counts.
    """

    name: str
    severity: Severity
    when: Mapping[str, tuple[float, float]]
    says: str
    remedy: str
    source: str
    lasting: int = 3
    early: int | None = None
    after: int = 0


@dataclass(frozen=True)
class Finding:
    """A rule that holds now.

    Attributes:
        rule: its name.
        severity: see `Rule`.
        step: the optimiser step at whose log row it began to hold.
        evidence: a sentence with the figures.
        remedy: what to check or change.
    """

    rule: str
    severity: Severity
    step: int
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.severity} since step {self.step}: {self.evidence} -> {self.remedy}"


def diagnose(rows: Sequence[Row], rules: Sequence[Rule]) -> list[Finding]:
    """What holds at the end of a training log, alarms first, in the order of the rules.

    Args:
        rows: of ``training_log.csv``: one per epoch, with ``step``.
        rules: e.g. `nnssl_ext.monitors.rules.RULES`.
    """
    rows = with_trends(rows)
    found = [finding for rule in rules if (finding := _holds(rule, rows)) is not None]
    return sorted(found, key=lambda finding: finding.severity != "alarm")


def _holds(rule: Rule, rows: Sequence[Row]) -> Finding | None:
    since, lasted, latest = 0, 0, None
    for row in reversed(rows):
        if row["step"] < rule.after:
            break
        if any(math.isnan(row.get(name, math.nan)) for name in rule.when):
            continue
        if not all(low <= row[name] <= high for name, (low, high) in rule.when.items()):
            break
        since, lasted, latest = int(row["step"]), lasted + 1, latest or row
    if latest is None or lasted < (rule.early or rule.lasting):
        return None
    severity: Severity = rule.severity if lasted >= rule.lasting else "warning"
    return Finding(rule.name, severity, since, rule.says.format_map(latest), rule.remedy)
