"""Brain Imaging Data Structure: ``sub-*/[ses-*/]{anat,ct,pet}/sub-…_<suffix>.nii[.gz]`` (bids-specification.readthedocs.io)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnssl_ext.dataset_conversion.cases import (
    FOREGROUND_LABELS,
    MR,
    ImageSource,
    PlannedCase,
    PlannedDataset,
    identifier_of,
    image_ending,
    stem,
    visible_files,
)
from nnssl_ext.errors import NnsslError, unknown_name

DATATYPES = {"anat": MR, "ct": "CT", "pet": "PET"}  # the 3D ones; func, dwi and perf are time series
NO_IMAGES = ("mask", "defacemask", "dseg", "probseg")


def plan_bids(
    root: Path, *, suffixes: Sequence[str] = (), together: bool = False, channels: Sequence[str] = ()
) -> PlannedDataset:
    """The 3D images of a BIDS tree, unlabelled; derivatives are left out.

    Args:
        root: the folder with the ``sub-*`` folders.
        suffixes: which images, e.g. T1w; all by default.
        together: the suffixes are the channels of one case per session; else every image is a case.
        channels: channel names, to overrule those that data type and suffix tell.

    Raises:
        NnsslError: no such images, an unknown suffix, or cases of several modalities.
    """
    found: dict[str, list[Path]] = {}
    problems: list[NnsslError] = []
    for subject in sorted(path for path in root.glob("sub-*") if path.is_dir()):
        files, unreadable = visible_files(subject)
        problems += unreadable
        for path in files:
            ending = image_ending(path)
            suffix = stem(path).rpartition("_")[2]
            if ending in (".nii", ".nii.gz") and path.parent.name in DATATYPES and suffix not in NO_IMAGES:
                found.setdefault(suffix, []).append(path)
    if problems and not found:
        raise problems[0]
    if not found:
        raise NnsslError(
            f"no sub-*/{{{','.join(DATATYPES)}}}/*.nii[.gz] in {root}",
            "give the root of a BIDS tree, or use nnssl_convert folder",
        )
    for suffix in suffixes:
        if suffix not in found:
            raise unknown_name(f"BIDS suffix (in {root})", suffix, found)
    if together:
        return _together(root, found, suffixes, channels, problems)
    paths = sorted(path for suffix in suffixes or found for path in found[suffix])
    kinds = sorted({DATATYPES[path.parent.name] for path in paths})
    if len(kinds) > 1 and not channels:
        raise NnsslError(f"{root} mixes modalities: {' and '.join(kinds)}", "convert them one by one with --suffixes")
    cases = tuple(
        PlannedCase(identifier_of(stem(path), path), (ImageSource((path,)),), modality=_modality(path), name=stem(path))
        for path in paths
    )
    return PlannedDataset(_named(channels, kinds), cases, FOREGROUND_LABELS, tuple(problems))


def _together(
    root: Path,
    found: dict[str, list[Path]],
    suffixes: Sequence[str],
    channels: Sequence[str],
    unreadable: Sequence[NnsslError],
) -> PlannedDataset:
    if len(suffixes) < 2:
        raise NnsslError("--together needs at least two --suffixes", f"choose from {', '.join(sorted(found))}")
    sessions: dict[str, dict[str, list[Path]]] = {}
    for suffix in suffixes:
        for path in found[suffix]:
            session = "_".join(path.parent.parent.relative_to(root).parts)
            sessions.setdefault(session, {}).setdefault(suffix, []).append(path)
    cases, problems = [], list(unreadable)
    for session, images in sorted(sessions.items()):
        amount = {suffix: len(images.get(suffix, [])) for suffix in suffixes}
        if set(amount.values()) == {1}:
            sources = tuple(ImageSource((images[suffix][0],)) for suffix in suffixes)
            cases.append(PlannedCase(identifier_of(session, sources[0].path), sources, name=session))
        else:
            told = ", ".join(f"{count} {suffix}" for suffix, count in amount.items())
            problems.append(
                NnsslError(
                    f"case {session}: {told} image(s) where one of each is needed in {root}", "choose other --suffixes"
                )
            )
    kinds = [_modality(found[suffix][0]) for suffix in suffixes]
    return PlannedDataset(_named(channels, kinds), tuple(cases), FOREGROUND_LABELS, tuple(problems))


def _modality(path: Path) -> str:
    """What an image shows: of MR the sequence, which is its suffix."""
    kind = DATATYPES[path.parent.name]
    return stem(path).rpartition("_")[2] if kind == MR else kind


def _named(channels: Sequence[str], told: Sequence[str]) -> tuple[str, ...]:
    if channels and len(channels) not in (1, len(told)):
        raise NnsslError(f"{len(channels)} channel names for {len(told)} channel(s)", "give one name per channel")
    return tuple(channels or told)
