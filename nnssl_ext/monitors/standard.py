"""The monitors of every run; each speaks only about what the method lets it see."""

from __future__ import annotations

from nnssl_ext.contracts import Monitor
from nnssl_ext.monitors.prototypes import PrototypeMonitor
from nnssl_ext.monitors.representation import CollapseMonitor, RepresentationMonitor
from nnssl_ext.monitors.spatial import SpatialMonitor


def standard_monitors() -> list[Monitor]:
    """Fresh monitors, in the order of their columns in the log."""
    return [RepresentationMonitor(), CollapseMonitor(), PrototypeMonitor(), SpatialMonitor()]
