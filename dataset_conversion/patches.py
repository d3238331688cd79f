"""Foreground patches: N crops of a fixed size per case of a raw dataset, each with enough foreground in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk
from jaxtyping import Bool

from nnssl_ext.checkpoints.provenance import patch_name
from nnssl_ext.data.foreground import foreground_mask, lung_mask
from nnssl_ext.data.scans import voxels
from nnssl_ext.dataset_conversion.cases import (
    FOREGROUND_LABELS,
    Crop,
    ImageSource,
    PlannedCase,
    PlannedDataset,
    subject_of,
)
from nnssl_ext.dataset_conversion.raw_dataset import in_parallel
from nnssl_ext.dataset_conversion.reading import read_volume
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json

MANIFEST = "patches.json"
FOLDS = 5  # as nnU-Net's own splits


@dataclass(frozen=True)
class PatchSettings:
    """How to cut.

    Attributes:
        count: crops per case.
        size: of a crop along z, y, x in `unit`.
        unit: "voxels" or "mm" (rounded to each case's voxels).
        min_foreground: share of a crop's voxels that must be foreground; padding counts as background.
        policy: where no crop reaches the share, "strict" calls the case bad, "best-effort" takes the best crop seen,
            "skip" leaves the crop out.
        attempts: draws per crop.
        per_subject: crops per subject at most, None for no cap.
        subject_pattern: regular expression whose match in a case's name is its subject.
        seed: of all draws.
        around: what counts as foreground: the patient ("body"), or the aerated lungs of a chest CT ("lungs").
    """

    count: int
    size: tuple[float, float, float] | tuple[int, int, int]
    unit: Literal["voxels", "mm"] = "voxels"
    min_foreground: float = 0.7
    policy: Literal["strict", "best-effort", "skip"] = "best-effort"
    attempts: int = 50
    per_subject: int | None = None
    subject_pattern: str = ".+"
    seed: int = 0
    around: Literal["body", "lungs"] = "body"

    def __post_init__(self) -> None:
        if not 0 <= self.min_foreground <= 1:
            raise NnsslError(f"--min-foreground {self.min_foreground} is no share", "choose from 0 to 1, e.g. 0.7")
        if min(self.size) <= 0:
            raise NnsslError(f"crop size {self.size} {self.unit} is not positive", "correct --size or --size-mm")


@dataclass(frozen=True)
class Patch:
    """One crop: where it lies (voxels z, y, x), its foreground share, and how many draws it took."""

    crop: Crop
    share: float
    attempts: int


def draw_patches(
    mask: Bool[np.ndarray, "Z Y X"], size: tuple[int, int, int], settings: PatchSettings, rng: np.random.Generator
) -> list[Patch]:
    """Distinct crops around random foreground voxels, moved inside the volume where they fit.

    Along an axis shorter than the crop, the crop is centred and reaches out on both sides.

    Args:
        mask: ``(Z, Y, X)`` foreground, not empty.
        size: of a crop, voxels along z, y, x.
        settings: how many, how full, and what if not.
        rng: all randomness.

    Returns:
        At most `settings.count` crops; fewer where the volume has no more, or crops that fall short are left out.
    """
    centres = np.argwhere(mask)
    shape, extent = np.array(mask.shape), np.array(size)
    lowest, highest = np.minimum(0, (shape - extent) // 2), np.maximum(shape - extent, (shape - extent) // 2)
    taken: set[tuple[int, ...]] = set()
    patches: list[Patch] = []
    for _ in range(settings.count):
        best: Patch | None = None
        for attempt in range(1, settings.attempts + 1):
            lower = np.clip(centres[rng.integers(len(centres))] - extent // 2, lowest, highest)
            if tuple(lower.tolist()) in taken:
                continue
            z, y, x = (slice(max(0, a), a + n) for a, n in zip(lower.tolist(), size, strict=True))
            share = float(mask[z, y, x].sum()) / float(extent.prod())
            if best is None or share > best.share:
                best = Patch(_crop(lower, extent), share, attempt)
            if share >= settings.min_foreground:
                break
        if best is None or (best.share < settings.min_foreground and settings.policy != "best-effort"):
            continue
        taken.add(best.crop.lower)
        patches.append(best)
    return patches


def plan_patches(
    dataset: Path, settings: PatchSettings, *, limit: int | None = None, processes: int = 1
) -> PlannedDataset:
    """The crops of every case of a raw dataset, with its labels (or foreground masks) cropped alike.

    A manifest (`patches.json`: settings, and per crop its source, box, share and draws) and, with two or more
    subjects, `splits_final.json` with all crops of a subject on one side of every fold, go with them.

    Args:
        dataset: a ``DatasetXXX_Name`` folder.
        settings: how to cut.
        limit: the first cases only.
        processes: spawned worker processes; 1 works in this one.

    Raises:
        NnsslError: the dataset has no cases, or the subject pattern does not match. Bad cases are problems of the plan.
    """
    description = read_json(dataset / "dataset.json")
    cases = _cases_of(dataset, description)[:limit]
    masks_are_labels = description["labels"] == FOREGROUND_LABELS
    results = dict(
        in_parallel(partial(_cut, settings=settings, masks_are_labels=masks_are_labels), cases, processes, "cutting")
    )
    planned: list[PlannedCase] = []
    entries: dict[str, dict[str, object]] = {}
    problems: list[NnsslError] = []
    notes: list[str] = []
    per_subject: Counter[str] = Counter()
    for index, case in enumerate(cases):
        found = results[index]
        if isinstance(found, NnsslError):
            problems.append(found)
            continue
        subject = subject_of(case.identifier, settings.subject_pattern)
        room = len(found) if settings.per_subject is None else settings.per_subject - per_subject[subject]
        if len(found) < settings.count:
            notes.append(f"case {case.identifier}: {len(found)} of {settings.count} crops")
        for number, patch in enumerate(found[:room]):
            name = patch_name(case.identifier, number)
            planned.append(_cropped(case, name, patch))
            entries[name] = {"source": case.identifier, "subject": subject, **_told(patch)}
            per_subject[subject] += 1
    return PlannedDataset(
        channel_names=tuple(description["channel_names"].values()),
        cases=tuple(planned),
        labels=dict(description["labels"]),
        problems=tuple(problems),
        notes=tuple(notes),
        description={k: description[k] for k in ("regions_class_order", "licence") if k in description},
        companions=partial(_companions, settings=settings, source=dataset.name, entries=entries),
    )


def _cases_of(dataset: Path, description: dict) -> list[PlannedCase]:
    ending = description["file_ending"]
    channels = range(len(description["channel_names"]))
    cases = []
    for path in sorted((dataset / "imagesTr").glob(f"[!.]*_0000{ending}")):  # macOS leaves ._x
        name = path.name.removesuffix(f"_0000{ending}")
        images = tuple(ImageSource((dataset / "imagesTr" / f"{name}_{c:04d}{ending}",)) for c in channels)
        label = dataset / "labelsTr" / f"{name}{ending}"
        if not label.exists():
            number = int(dataset.name[7:10])
            raise NnsslError(
                f"case {name}: no label {label}", f"for an image-only dataset: nnssl_convert foreground -d {number}"
            )
        modality = description.get("case_modalities", {}).get(name, "")
        cases.append(PlannedCase(name, images, ImageSource((label,)), modality=modality))
    if not cases:
        raise NnsslError(f"no cases in {dataset / 'imagesTr'}", "convert a dataset first")
    return cases


def _cut(case: PlannedCase, settings: PatchSettings, masks_are_labels: bool) -> list[Patch] | NnsslError:
    try:
        image = read_volume(case.channels[0])
        if settings.around == "lungs":
            mask = lung_mask(voxels(image, case.channels[0].path))
        elif masks_are_labels and case.label is not None:
            mask = sitk.GetArrayFromImage(read_volume(case.label)) > 0
        else:
            mask = foreground_mask(voxels(image, case.channels[0].path))
        spacing = image.GetSpacing()[::-1] if settings.unit == "mm" else (1.0, 1.0, 1.0)
        z, y, x = (max(2, round(length / step)) for length, step in zip(settings.size, spacing, strict=True))
        seed = [settings.seed, *case.identifier.encode()]  # a case's crops do not depend on the other cases
        patches = draw_patches(mask, (z, y, x), settings, np.random.default_rng(seed))
        if settings.policy == "strict" and len(patches) < settings.count:
            raise NnsslError(
                f"{case.channels[0].path}: {len(patches)} of {settings.count} crops of {z}x{y}x{x} voxels hold "
                f"{settings.min_foreground:.0%} foreground after {settings.attempts} draws each",
                "lower --min-foreground, --size or --count, or choose --policy best-effort",
            )
        return patches
    except NnsslError as error:
        return NnsslError(f"case {case.identifier}: {error.what}", error.fix)


def _crop(lower: np.ndarray, extent: np.ndarray) -> Crop:
    (a, b, c), (d, e, f) = lower.tolist(), (lower + extent).tolist()
    return Crop((a, b, c), (d, e, f))


def _cropped(case: PlannedCase, name: str, patch: Patch) -> PlannedCase:
    label = replace(case.label, crop=patch.crop) if case.label else None
    channels = tuple(replace(channel, crop=patch.crop) for channel in case.channels)
    return PlannedCase(name, channels, label, f"{patch.share:.0%} foreground", case.modality)


def _told(patch: Patch) -> dict[str, object]:
    return {**asdict(patch.crop), "foreground_share": round(patch.share, 4), "attempts": patch.attempts}


def _companions(
    names: Sequence[str], settings: PatchSettings, source: str, entries: dict[str, dict[str, object]]
) -> dict[str, object]:
    kept = {name: entries[name] for name in names}
    files: dict[str, object] = {MANIFEST: {"source": source, "settings": asdict(settings), "patches": kept}}
    subjects = sorted({str(entry["subject"]) for entry in kept.values()})
    if len(subjects) > 1:
        np.random.default_rng(settings.seed).shuffle(subjects)
        folds = [set(subjects[k :: min(FOLDS, len(subjects))]) for k in range(min(FOLDS, len(subjects)))]
        files["splits_final.json"] = [
            {
                "train": [name for name, entry in kept.items() if entry["subject"] not in fold],
                "val": [name for name, entry in kept.items() if entry["subject"] in fold],
            }
            for fold in folds
        ]
    return files
