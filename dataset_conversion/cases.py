"""What a source of data plans to convert, before any voxel is read. Sources make these records, one writer takes them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnssl_ext.errors import NnsslError

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
MR = "MRI"  # any channel name but CT gets z-scores in stock nnU-Net; "CT" is matched exactly
CHANNEL_OF_MODALITY = {"ct": "CT", "mr": MR, "mri": MR, "pt": "PET", "pet": "PET"}


Labels = dict[str, int | list[int]]
"""Label name -> value, or the values that make up a region, as in nnU-Net's dataset.json."""

FOREGROUND_LABELS: Labels = {"background": 0, "foreground": 1}


@dataclass(frozen=True)
class Crop:
    """A half-open box of voxels along z, y, x; beyond an image its lowest value is padded, beyond a label 0."""

    lower: tuple[int, int, int]
    upper: tuple[int, int, int]


@dataclass(frozen=True)
class ImageSource:
    """Where one 3D image comes from.

    Attributes:
        files: one file, or the slices of a DICOM series in order.
        volume: index along the fourth axis of a 4D file, None for a 3D one.
        volumes: names of all volumes that the file must hold, in order; () where the source names none.
        crop: the part of it that is wanted, None for all.
    """

    files: tuple[Path, ...]
    volume: int | None = None
    volumes: tuple[str, ...] = ()
    crop: Crop | None = None

    @property
    def path(self) -> Path:
        """The file, or the folder of the series: what to name in messages."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent


@dataclass(frozen=True)
class PlannedCase:
    """One case to write. Without `label`, a foreground mask of the first channel becomes its label.

    `modality` is what the source says of this case, e.g. CT or T1w, or "". Where cases differ in it, dataset.json says so.
    `name` is what the source calls it, before `identifier_of`, or "".
    """

    identifier: str
    channels: tuple[ImageSource, ...]
    label: ImageSource | None = None
    notes: str = ""
    modality: str = ""
    name: str = ""


@dataclass(frozen=True)
class PlannedDataset:
    """All that a source has to say.

    Attributes:
        channel_names: one per channel; they decide nnU-Net's normalisation.
        cases: in the order to be written.
        labels: name -> value; None: labelled, but only the label files know the values.
        problems: bad input met while planning.
        notes: what the user should know, but need not mend.
        description: further entries of dataset.json (licence, reference, ...).
        companions: identifiers of the written cases -> JSON files to lay beside dataset.json.
    """

    channel_names: tuple[str, ...]
    cases: tuple[PlannedCase, ...]
    labels: Labels | None
    problems: tuple[NnsslError, ...] = ()
    notes: tuple[str, ...] = ()
    description: dict[str, Any] = field(default_factory=dict)
    companions: Callable[[Sequence[str]], dict[str, object]] | None = None

    def first(self, count: int) -> PlannedDataset:
        """The first cases only. If there are as many, bad input met while planning is none of theirs, and only noted."""
        chosen = replace(self, cases=self.cases[:count])
        if not self.problems or len(chosen.cases) < count:
            return chosen
        note = f"--limit leaves out {len(self.problems)} bad case(s), e.g. {self.problems[0].what}"
        return replace(chosen, problems=(), notes=(*self.notes, note))


def image_ending(path: Path) -> str | None:
    """The image ending of a visible file, or None."""
    if path.name.startswith("."):
        return None
    return next((ending for ending in IMAGE_ENDINGS if path.name.lower().endswith(ending)), None)


def visible_files(folder: Path) -> tuple[list[Path], list[NnsslError]]:
    """All files below a folder, sorted, and a problem for every sub-folder that cannot be read.

    Hidden files and folders (macOS's ``._x.nii.gz``, ``.git``, ``.snapshots``) are left out. Links to folders are
    followed. Links to files that are not there (git-annex) are among the files, so that reading can name them.

    Raises:
        NnsslError: there is no such folder.
    """
    if not folder.is_dir():
        raise NnsslError(f"{folder} is not a folder", "check the path")
    files: list[Path] = []
    problems: list[NnsslError] = []
    seen: set[str] = set()  # links may lead in circles

    def unreadable(error: OSError) -> None:
        problems.append(
            NnsslError(
                f"{error.filename}: folder cannot be read: {error.strerror}", "make it readable, or move it away"
            )
        )

    starts = [folder]  # links come last: what they lead to is found under its own name if it lies below too
    for start in starts:
        for place, folders, names in os.walk(start, onerror=unreadable):
            real = os.path.realpath(place)
            folders[:] = () if real in seen else sorted(name for name in folders if not name.startswith("."))
            if real not in seen:
                seen.add(real)
                starts += [Path(place, name) for name in folders if os.path.islink(os.path.join(place, name))]
                files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in files if os.path.isfile(path) or not os.path.exists(path)), problems


def stem(path: Path) -> str:
    """File name without image ending."""
    ending = image_ending(path)
    return path.name[: -len(ending)] if ending else path.name


def identifier_of(text: str, path: Path) -> str:
    """A name nnU-Net, shells and file systems take: letters without accents, digits, dot, dash and underscore.

    Args:
        text: the name as it is.
        path: the file or folder that has it, for the message.

    Raises:
        NnsslError: it has neither Latin letters nor digits.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-.")
    if not re.search(r"[A-Za-z0-9]", name):
        raise NnsslError(
            f"{path}: no Latin letter or digit in the name '{text}'",
            f"rename this {'folder' if path.is_dir() else 'file'}: nnU-Net's case names need some",
        )
    return name


def duplicate_name(
    name: str,
    paths: Sequence[Path],
    fix: str = "rename all but one of the files, or leave them out",
    cleaned: bool = False,
) -> NnsslError:
    """The problem of several images that would become one case; `cleaned`: `identifier_of` made their names alike."""
    how = " (the names coincide after cleaning: Latin letters, digits, '.', '-' and '_' stay)" if cleaned else ""
    return NnsslError(f"case {name}: duplicate case name{how}: {', '.join(map(str, paths))}", fix)


def subject_of(case: str, pattern: str) -> str:
    """The subject a case belongs to: the pattern's first group, else its whole match.

    Raises:
        NnsslError: no valid pattern, or no match.
    """
    try:
        match = re.search(pattern, case)
    except re.error as error:
        raise NnsslError(f"--subject-pattern '{pattern}' is no regular expression: {error}", "e.g. '^[^_]+'") from error
    if match is None:
        raise NnsslError(f"--subject-pattern '{pattern}' matches nothing in case '{case}'", "e.g. '^[^_]+'")
    return match[1] if match.groups() else match[0]
