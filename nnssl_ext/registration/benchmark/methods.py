"""What is compared: features with our solver, and classical registrations, all behind one function."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nnssl_ext.checkpoints.provenance import Run, runs_behind
from nnssl_ext.checkpoints.source import with_local_files
from nnssl_ext.errors import NnsslError
from nnssl_ext.plans import configuration_of
from nnssl_ext.registration.benchmark import classical
from nnssl_ext.registration.encoder import read_source
from nnssl_ext.registration.features import (
    RANDOM,
    FeatureSource,
    Intensity,
    digests_of,
    file_of,
    files_of,
    load_features,
    parts_of,
    split_level,
)
from nnssl_ext.registration.images import Scan
from nnssl_ext.registration.pipeline import (
    DescribedPair,
    PairSettings,
    Registration,
    deform_pair,
    describe_pair,
    solve_pair,
)
from nnssl_ext.registration.solver import Field, SolverSettings

STRENGTHS = (0.2, 0.6, 1.8, 5.4, 16.0)
"""λ tried on development pairs. With features of one scale (`SolverSettings.rescale`), 0.3 to 5 spans SDlogJ of about 0.5 to 0.1
on hippocampus pairs (reference measurements with MIND)."""

NETWORK_KEYS = ("architecture", "patch_size", "spacing", "normalization_schemes", "use_mask_for_norm")
PLANS_KEYS = ("transpose_forward", "foreground_intensity_properties_per_channel")

Solve = Callable[[float | None], Registration]
"""Registers a prepared pair with a strength of regularisation."""


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: of the row.
        features: as ``nnssl_register -c`` takes them, or a name of `classical.CLASSICAL`.
        seeds: of random weights; figures are averaged over them.
        control: name of the method that is the same with random weights, if it takes part.
    """

    name: str
    features: str
    seeds: tuple[int, ...] = (0,)
    control: str = ""

    @property
    def is_classical(self) -> bool:
        return self.features in classical.CLASSICAL

    @property
    def strengths(self) -> tuple[float, ...]:
        """Regularisations to try on development pairs; empty where there is nothing to choose."""
        return classical.CLASSICAL[self.features].strengths if self.is_classical else STRENGTHS

    @property
    def parts(self) -> list[str]:
        """The features that are fused."""
        return parts_of(self.features)

    @property
    def files(self) -> list[Path]:
        """Checkpoints and plans that it reads."""
        return files_of(self.features)

    @property
    def checkpoints(self) -> list[Path]:
        """Those of trained networks."""
        named = (file_of(part) for part in self.parts if not part.startswith(RANDOM))
        return [path for path in named if path.is_file()]

    def digest(self) -> dict[str, Any]:
        """What its figures depend on beside settings: names, and the content of files."""
        return {"features": self.features, "files": digests_of(self.features)}


def parse_methods(texts: Sequence[str]) -> list[Method]:
    """Methods from ``NAME=FEATURES`` or ``FEATURES``.

    Raises:
        NnsslError: a name used twice, one that is no file name, or classical methods in a fusion.
    """
    methods: list[Method] = []
    for text in texts:
        name, equals, features = text.partition("=")
        method = Method(name if equals else _short(text), with_local_files(features if equals else text))
        if method.name in {other.name for other in methods}:
            raise NnsslError(f"two methods are called '{method.name}'", "name them: NAME=FEATURES")
        if not method.name or method.name.startswith(".") or set(method.name) & set('/\\:*?"<>|'):
            raise NnsslError(f"'{method.name}' cannot be a folder's name", "name the method: NAME=FEATURES")
        fused = set(method.parts) & set(classical.CLASSICAL) if len(method.parts) > 1 else ()
        if fused:
            raise NnsslError(f"{', '.join(fused)} are methods of their own", "fuse mind, intensity and networks only")
        methods.append(method)
    return methods


def with_controls(methods: Sequence[Method], seeds: int, identity: Callable[[Path], str]) -> list[Method]:
    """The methods and, for those with trained networks, the same networks with random weights.

    Args:
        seeds: random networks per control; 0 adds none.
        identity: checkpoint -> what its untrained network depends on. Checkpoints that agree in it share one control.
    """
    if not seeds:
        return list(methods)
    found: list[Method] = []
    controls: dict[tuple[str, ...], Method] = {}
    for method in methods:
        identities = {path: identity(path) for path in method.checkpoints}
        if not identities:
            found.append(method)
            continue
        key = tuple(_control_key(part, identities) for part in method.parts)
        if key not in controls:
            texts = (_untrained(part) if Path(split_level(part)[0]) in identities else part for part in method.parts)
            controls[key] = Method(f"random weights of {method.name}", "+".join(texts), tuple(range(seeds)))
        found.append(replace(method, control=controls[key].name))
    return found + list(controls.values())


def load(method: Method, settings: PairSettings, seed: int, device: torch.device) -> tuple[FeatureSource, ...]:
    """What describes the scans; networks come into memory here.

    Raises:
        NnsslError: a package or a file that the method needs is missing, or the file is none.
    """
    if method.is_classical:
        classical.CLASSICAL[method.features].check()
        return (Intensity(),)
    return load_features(method.features, device, settings.features, seed)


def prepare(
    method: Method,
    settings: PairSettings,
    sources: Sequence[FeatureSource],
    fixed: Scan,
    moving: Scan,
    device: torch.device,
) -> Solve:
    """Do what does not depend on the strength of regularisation."""
    if not method.is_classical:
        pair = describe_pair(fixed, moving, sources, settings, device)
        return lambda strength: deform_pair(pair, lambda: _deform(pair, settings.solver, strength))
    chosen = classical.CLASSICAL[method.features]
    pair = describe_pair(fixed, moving, sources, replace(settings, init=chosen.init or settings.init, weights=None))
    return lambda strength: deform_pair(pair, lambda: chosen.solve(pair, strength))


def untrained_identity(path: Path) -> str:
    """What the random-weight control of a checkpoint depends on: network, labels told, and preprocessing.

    Raises:
        NnsslError: no checkpoint.
    """
    source = read_source(path)
    configuration = configuration_of(source.plans, source.configuration)
    depends = {key: configuration.get(key) for key in NETWORK_KEYS} | {key: source.plans.get(key) for key in PLANS_KEYS}
    return hashlib.sha256(json.dumps([depends, source.classes], sort_keys=True).encode()).hexdigest()


def pretrained_on(method: Method) -> list[Run]:
    """What the method's checkpoints were trained on, from the settings files of their runs, where they are."""
    return [run for path in method.checkpoints for run in runs_behind(path)[0]]


def _deform(pair: DescribedPair, solver: SolverSettings, strength: float | None) -> Field:
    if strength is not None:
        solver = replace(solver, regularisation=strength, sdlogj=None)
    return solve_pair(pair, solver)


def _control_key(part: str, identities: dict[Path, str]) -> str:
    file, level = split_level(part)
    return f"{identities.get(Path(file)) or file}@{level}"


def _untrained(part: str) -> str:
    return RANDOM + part


def _short(text: str) -> str:
    """A name for features that came without one: files by their folder's and own name."""
    names = []
    for part in parts_of(text):
        path = Path(part.removeprefix(RANDOM))
        name = f"{path.parent.name} {path.name}".strip()
        names.append(f"random {name}" if part.startswith(RANDOM) else name)
    return "+".join(names)
