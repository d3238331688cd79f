"""Labelled pairs to select settings on, and others to report: no case is on both sides."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json
from nnssl_ext.registration.batch import PairFiles

NUMBER, SECOND_NUMBER = re.compile(r"_\d{4}$"), re.compile(r"(?<=_\d{4})_\d{4}$")


@dataclass(frozen=True)
class LabelledPair:
    """Two scans whose labels, landmarks or both say how well they are registered.

    Attributes:
        name: ``moving_to_fixed``.
        cases: identifiers of the fixed and the moving case.
        files: scans, labels, masks.
        fixed_landmarks, moving_landmarks: CSV files without a header, a point per line: voxel x, y, z, counted as in the file.
        ignore: label of voxels that nothing is known about.
    """

    name: str
    cases: tuple[str, str]
    files: PairFiles
    fixed_landmarks: Path | None = None
    moving_landmarks: Path | None = None
    ignore: int | None = None

    @property
    def landmarks(self) -> dict[str, Path]:
        """Role -> file, for the roles that have one."""
        return {key: path for key, path in asdict(self).items() if key.endswith("landmarks") and path}

    def as_json(self) -> dict[str, Any]:
        """Plain strings, and the label to ignore."""
        plain = self.files.as_json() | {key: str(path) for key, path in self.landmarks.items()}
        return {key: value for key, value in (plain | {"ignore": self.ignore}).items() if value is not None}


@dataclass(frozen=True)
class Split:
    """Pairs for selecting settings, and pairs for reporting.

    Attributes:
        about: one sentence on where they come from.

    Raises:
        NnsslError: a case is in both, or there are no pairs.
    """

    development: tuple[LabelledPair, ...]
    test: tuple[LabelledPair, ...]
    about: str

    def __post_init__(self) -> None:
        if shared := sorted(cases_of(self.development) & cases_of(self.test)):
            raise NnsslError(
                f"cases {', '.join(shared)} are in development and in test pairs", "leave them out of one of the two"
            )
        for name, pairs in (("development", self.development), ("test", self.test)):
            if not pairs:
                raise NnsslError(f"no {name} pairs: {self.about}", "give at least two cases for each part")


def cases_of(pairs: Iterable[LabelledPair]) -> set[str]:
    """Identifiers of all cases that take part."""
    return {case for pair in pairs for case in pair.cases}


def split_cases(names: Sequence[str], development: int, test: int, seed: int | None) -> tuple[list[str], list[str]]:
    """Development and test cases, each sorted by name.

    Args:
        names: of all labelled cases.
        seed: of the draw; None: the last `test` cases by name are for testing, those before them for development.

    Raises:
        NnsslError: not enough cases.
    """
    if development + test > len(names) or min(development, test) < 2:
        raise NnsslError(
            f"{development} development and {test} test cases of {len(names)} labelled ones",
            "give each part at least two cases, and no more than there are",
        )
    ordered = sorted(names)
    if seed is not None:
        ordered = [ordered[place] for place in np.random.default_rng(seed).permutation(len(ordered))]
    return sorted(ordered[-test - development : -test]), sorted(ordered[-test:])


def dataset_pairs(folder: Path, development: int, test: int, seed: int | None) -> Split:
    """Pairs from a labelled nnU-Net raw dataset: in each part, consecutive cases by name, fixed i with moving i + 1.

    Args:
        folder: ``DatasetXXX_Name`` with ``dataset.json``, ``imagesTr`` and ``labelsTr``. The first channel is registered. The
            label that ``dataset.json`` calls ``ignore`` is no structure.
        development, test: numbers of cases; k cases give k - 1 pairs.
        seed: see `split_cases`.

    Raises:
        NnsslError: no labelled nnU-Net dataset, or too few cases.
    """
    dataset = read_json(folder / "dataset.json")
    ending, ignore = dataset.get("file_ending", ".nii.gz"), dataset.get("labels", {}).get("ignore")
    labels = {path.name.removesuffix(ending): path for path in sorted((folder / "labelsTr").glob(f"*{ending}"))}
    images = {name: folder / "imagesTr" / f"{name}_0000{ending}" for name in labels}
    names = [name for name in labels if images[name].is_file()]
    if not names:
        raise NnsslError(f"{folder} has no case with image and label", "give a labelled nnU-Net raw dataset")

    def pair(fixed: str, moving: str) -> LabelledPair:
        files = PairFiles(images[fixed], images[moving], fixed_labels=labels[fixed], moving_labels=labels[moving])
        return LabelledPair(f"{moving}_to_{fixed}", (fixed, moving), files, ignore=ignore)

    for_selection, for_report = split_cases(names, development, test, seed)
    drawn = "the last ones by name" if seed is None else f"drawn with seed {seed}"
    return Split(
        _consecutive(for_selection, pair),
        _consecutive(for_report, pair),
        f"{folder.name}: {development} development and {test} test cases of {len(names)}, {drawn}; consecutive cases are pairs",
    )


def learn2reg_pairs(path: Path, development: int, test: int) -> Split:
    """Pairs from the JSON of a Learn2Reg task. For testing: those of ``registration_test`` whose labels or landmarks are there
    (the challenge keeps most), else those of ``registration_val``. For development: ``training_paired_images``, else consecutive
    cases of ``training`` by name; without the subjects of the test pairs.

    Labels, masks and landmarks are the files of the same name in ``labels*``, ``masks*`` and ``landmarks*`` (or
    ``keypoints*``) beside ``images*``. The number at a file's end is a time point or channel, what precedes it the subject;
    unless that would leave one subject alone, as with ``Task_0005.nii.gz``.

    Args:
        development, test: pairs at most; the last development pairs and the first test pairs are taken.

    Raises:
        NnsslError: no such JSON, an entry that names no files, or no labelled pairs.
    """
    content = read_json(path)
    if not isinstance(content, dict) or "training" not in content:
        raise NnsslError(f"{path} is no Learn2Reg task", "give its JSON, with training and registration_val")
    images = sorted(_images(path, content["training"]))
    parts = {
        part: _listed(path, content, part)
        for part in ("registration_test", "registration_val", "training_paired_images")
    }
    stems = {
        _stem(Path(name)) for name in (*images, *(name for each in parts.values() for pair in each for name in pair))
    }
    several = len({NUMBER.sub("", stem) for stem in stems}) > 1

    def subject(image: str) -> str:
        return (NUMBER if several else SECOND_NUMBER).sub("", _stem(Path(image)))

    def pair(fixed: str, moving: str) -> LabelledPair:
        return _beside(path.parent / fixed, path.parent / moving, (subject(fixed), subject(moving)))

    def judged(pairs: Iterable[tuple[str, str]]) -> list[LabelledPair]:
        return [each for names in pairs if _judged(each := pair(*names))]

    tested = (judged(parts["registration_test"]) or judged(parts["registration_val"]))[:test]
    taken = cases_of(tested)
    left = [image for image in images if subject(image) not in taken]
    training = judged(parts["training_paired_images"]) or judged(pairwise(left))
    chosen = [each for each in training if not taken & set(each.cases)][-development:]
    about = f"{content.get('name', path.stem)}: {len(chosen)} training pairs for development, {len(tested)} pairs for testing"
    return Split(tuple(chosen), tuple(tested), about)


def _images(path: Path, training: Any) -> list[str]:
    """Names of files in the part ``training``: a list, or one for each kind of scan."""
    if isinstance(training, dict):
        training = [
            entry for entries in training.values() for entry in (entries if isinstance(entries, list) else [entries])
        ]
    found = []
    for entry in training if isinstance(training, list) else [training]:
        name = entry.get("image") if isinstance(entry, dict) else entry
        if not isinstance(name, str):
            raise NnsslError(f"{path}: training has the entry {entry}", 'write "FILE" or {"image": "FILE"}')
        found.append(name)
    return found


def _listed(path: Path, content: dict[str, Any], part: str) -> list[tuple[str, str]]:
    """Names of the files, fixed and moving, of every pair in a part."""
    entries = content.get(part) or []
    found = []
    for entry in entries if isinstance(entries, list) else [entries]:
        names = [entry.get("fixed"), entry.get("moving")] if isinstance(entry, dict) else entry
        match names:
            case [str(fixed), str(moving)]:
                found.append((fixed, moving))
            case _:
                raise NnsslError(
                    f"{path}: {part} has the entry {entry}",
                    'write {"fixed": "FILE", "moving": "FILE"} or ["FIXED FILE", "MOVING FILE"]',
                )
    return found


def _consecutive(names: Sequence[str], pair: Callable[[str, str], LabelledPair]) -> tuple[LabelledPair, ...]:
    return tuple(pair(fixed, moving) for fixed, moving in pairwise(names))


def _judged(pair: LabelledPair) -> bool:
    """Whether anything tells how well the pair is registered."""
    labels = pair.files.fixed_labels and pair.files.moving_labels
    return bool(labels or pair.fixed_landmarks)


def _beside(fixed: Path, moving: Path, subjects: tuple[str, str]) -> LabelledPair:
    def both(kind: str, suffix: str | None = None) -> tuple[Path, Path] | tuple[None, None]:
        a, b = (_sibling(path, kind, suffix) for path in (fixed, moving))
        return (a, b) if a.is_file() and b.is_file() else (None, None)

    landmarks = both("landmarks", ".csv")
    files = PairFiles(fixed, moving, *both("masks"), *both("labels"))
    name = f"{_stem(moving)}_to_{_stem(fixed)}"
    points = landmarks if landmarks[0] else both("keypoints", ".csv")
    return LabelledPair(name, subjects, files, *points)


def _sibling(image: Path, kind: str, suffix: str | None) -> Path:
    folder = image.parent.parent / image.parent.name.replace("images", kind)
    return folder / (image.name if suffix is None else _stem(image) + suffix)


def _stem(path: Path) -> str:
    return path.name.split(".")[0]
