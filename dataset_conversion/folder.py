"""Any folder of NIfTI, NRRD and MetaImage files and DICOM series, labelled or not."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl_ext.dataset_conversion.cases import (
    CHANNEL_OF_MODALITY,
    FOREGROUND_LABELS,
    ImageSource,
    Labels,
    PlannedCase,
    PlannedDataset,
    duplicate_name,
    identifier_of,
    image_ending,
    stem,
    visible_files,
)
from nnssl_ext.dataset_conversion.dicom import find_series
from nnssl_ext.errors import NnsslError

MOST_CHANNELS = 16  # more distinct endings _0000, _0001, ... are numbered cases, not channels


@dataclass(frozen=True)
class _Volume:
    name: str
    source: ImageSource
    modality: str = ""


def plan_folder(
    folder: Path,
    *,
    channels: Sequence[str] = (),
    channel_suffixes: Sequence[str] = (),
    labels: Path | None = None,
    label_suffix: str = "",
    label_names: Sequence[str] = (),
    names: str = "file",
) -> PlannedDataset:
    """Every image file and every folder with a DICOM series, at any depth, becomes a case or a channel of one.

    Args:
        folder: where to look.
        channels: channel names ("CT" for Hounsfield units); may be left out for DICOM, which tells.
        channel_suffixes: endings of names (before ``.nii.gz``) that tell the channels of one case apart. By default
            ``_0000``, ``_0001``, ... if all names end like this.
        labels: folder with one label per case, named as the case; None: unlabelled.
        label_suffix: what label names have after the case's name, e.g. ``_seg``.
        label_names: names of the label values 0, 1, 2, ... (nnU-Net wants the first to be background); by default
            background, label_1, ...
        names: "file" names cases by file (or series folder), "path" by all folders below `folder` too.

    Raises:
        NnsslError: no images, or channel names that are neither given nor told by the files.
    """
    label_files, problems = visible_files(labels) if labels else ([], [])
    volumes, bad = _volumes(folder, labels, label_files, label_suffix, names)
    problems = list({problem.what: problem for problem in problems + bad}.values())  # labels may lie below `folder`
    suffixes = tuple(channel_suffixes) or _numbered_channels([v.name for v in volumes])
    guessed = bool(suffixes) and not channel_suffixes
    way_out = ', or, if the numbers tell cases apart and not channels, set --channel-suffixes ""' if guessed else ""
    groups, ignored, doubled = _grouped(folder, volumes, suffixes, names)
    label_of, doubled_labels = _labels_by_name(labels, label_files, label_suffix, names)
    problems += doubled + doubled_labels
    cases, modalities, used = [], [], set()
    for name, found in groups.items():
        lacking = [suffix for suffix in suffixes if suffix not in found]
        label = label_of.get(name)
        if lacking:
            told = f"case {name}: no channel {', '.join(lacking)} in {folder}"
            problems.append(NnsslError(told, f"add the file{way_out}"))
        elif labels and not label:
            wanted = f"{labels / (name + label_suffix)}.*"
            problems.append(NnsslError(f"case {name}: no label {wanted}", "add it, or set --label-suffix"))
        else:
            members = [found[suffix] for suffix in suffixes or ("",)]
            sources = tuple(volume.source for volume in members)
            kinds = tuple(CHANNEL_OF_MODALITY.get(volume.modality.lower(), volume.modality) for volume in members)
            of_label = ImageSource((label,)) if label else None
            identifier, modality = identifier_of(name, sources[0].path), "+".join(kinds) if all(kinds) else ""
            cases.append(PlannedCase(identifier, sources, of_label, modality=modality, name=name))
            modalities.append(kinds)
            used.add(name)
    if not cases and not problems:
        raise NnsslError(f"no NIfTI, NRRD, MHA or DICOM images in {folder}", "check the path and --channel-suffixes")
    spare = len(set(label_of) - used)
    notes = [f"{spare} label file(s) without an image are left out"] * bool(spare)
    notes += [f"{ignored} file(s) without any of the suffixes {', '.join(suffixes)} are left out"] * bool(ignored)
    channel_names = tuple(channels)
    if cases:  # else the problems say why, and no error about channels should hide them
        channel_names = _channel_names(folder, channels, modalities, len(suffixes) or 1, way_out)
    return PlannedDataset(
        channel_names=channel_names,
        cases=tuple(cases),
        labels=_label_values(labels, label_names),
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _volumes(
    folder: Path, labels: Path | None, label_files: Sequence[Path], label_suffix: str, names: str
) -> tuple[list[_Volume], list[NnsslError]]:
    files, problems = visible_files(folder)
    among_labels = labels is not None and folder.resolve().is_relative_to(labels.resolve())
    if among_labels and not label_suffix:
        raise NnsslError("images and labels lie in one folder", "tell them apart with --label-suffix, e.g. _seg")
    places = {_place(path) for path in label_files}
    if labels:
        files = [p for p in files if _place(p) not in places or (among_labels and not stem(p).endswith(label_suffix))]
    found = [_Volume(_name(path, folder, names), ImageSource((path,))) for path in files if image_ending(path)]
    series, bad = find_series(files)
    for one in series:
        found.append(_Volume(_name(one.folder, folder, names), ImageSource(one.files), one.modality))
    return found, problems + bad


def _place(path: Path) -> Path:
    """Where a file lies, whatever links lead to its folder; a file that is a link lies where the link does."""
    return path.parent.resolve() / path.name


def _name(path: Path, root: Path | None, names: str) -> str:
    if names == "file" or root is None or path == root:
        return stem(Path(os.path.abspath(path)))  # "." has no name
    return "_".join((*path.relative_to(root).parent.parts, stem(path)))


def _numbered_channels(names: list[str]) -> tuple[str, ...]:
    """nnU-Net's own suffixes, if all names carry one and they tell channels, not cases, apart."""
    parts = [re.fullmatch(r"(.+)(_\d{4})", name) for name in names]
    if not names or not all(parts):
        return ()
    cases, suffixes = {p[1] for p in parts if p}, sorted({p[2] for p in parts if p})
    expected = [f"_{channel:04d}" for channel in range(len(suffixes))]
    several_cases = len(cases) > 1 or len(suffixes) == 1
    return tuple(suffixes) if suffixes == expected and len(suffixes) <= MOST_CHANNELS and several_cases else ()


def _grouped(
    root: Path, volumes: list[_Volume], suffixes: Sequence[str], names: str
) -> tuple[dict[str, dict[str, _Volume]], int, list[NnsslError]]:
    """case name -> suffix -> volume; how many volumes have none of the suffixes; duplicate names."""
    found: dict[str, dict[str, list[_Volume]]] = {}
    ignored = 0
    for volume in volumes:
        suffix = next((s for s in sorted(suffixes, key=len, reverse=True) if volume.name.endswith(s)), None)
        if suffixes and suffix is None:
            ignored += 1
        else:
            name = volume.name.removesuffix(suffix or "")
            found.setdefault(name, {}).setdefault(suffix or "", []).append(volume)
    groups, problems = {}, []
    for name, by_suffix in found.items():
        doubles = [volume.source.path for same in by_suffix.values() if len(same) > 1 for volume in same]
        if doubles:
            problems.append(duplicate_name(name, doubles, _apart(doubles, root, names)))
        else:
            groups[name] = {suffix: same[0] for suffix, same in by_suffix.items()}
    return groups, ignored, problems


def _apart(paths: Sequence[Path], root: Path | None, names: str) -> str:
    """How to tell files of one name apart."""
    inner = [folder for path in paths for folder in path.parents if root in folder.parents]
    of_labels = [folder for folder in inner if folder.name.lower().startswith("labels")]
    if of_labels:
        return f"label maps are no images: set --labels {of_labels[0]}, or give the folder of the images alone"
    return "rename the files" + (", or name cases by their folders with --names path" if names == "file" else "")


def _labels_by_name(
    labels: Path | None, files: Sequence[Path], suffix: str, names: str
) -> tuple[dict[str, Path], list[NnsslError]]:
    """case name -> label file, and duplicate names."""
    found: dict[str, list[Path]] = {}
    for path in filter(image_ending, files):
        name = _name(path, labels, names)
        if name.endswith(suffix):
            found.setdefault(name[: len(name) - len(suffix)], []).append(path)
    problems = [
        duplicate_name(f"{name} (label)", paths, _apart(paths, None, names))
        for name, paths in found.items()
        if len(paths) > 1
    ]
    return {name: paths[0] for name, paths in found.items() if len(paths) == 1}, problems


def _channel_names(
    folder: Path, given: Sequence[str], modalities: list[tuple[str, ...]], count: int, way_out: str
) -> tuple[str, ...]:
    if given:
        if len(given) != count:
            raise NnsslError(
                f"{len(given)} channel name(s) ({', '.join(given)}) for {count} channel(s) per case in {folder}",
                f"give one name per channel with --channels{way_out}",
            )
        return tuple(given)
    kinds = set(modalities)
    if len(kinds) > 1:
        told = " and ".join(sorted("+".join(kind) or "unknown" for kind in kinds))
        raise NnsslError(f"{folder} mixes modalities: {told}", "convert them one by one, or name all with --channels")
    only = kinds.pop() if kinds else ("",)
    if not all(only):
        raise NnsslError(
            f"the files in {folder} do not tell their modality, on which normalisation depends",
            "name the channels: --channels CT (Hounsfield units), --channels MRI, or one name per channel",
        )
    return only


def _label_values(labels: Path | None, names: Sequence[str]) -> Labels | None:
    if labels is None:
        return FOREGROUND_LABELS
    return {name if value else "background": value for value, name in enumerate(names)} or None
