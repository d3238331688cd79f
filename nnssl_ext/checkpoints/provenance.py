"""Which cases a checkpoint has learned from. Shared files do not name cases; the settings of the run beside them do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_ext.checkpoints.schema import kind_of
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json

SETTINGS = "settings.json"
_PATCH = re.compile(r"_p\d{3,}$")


def patch_name(case: str, number: int) -> str:
    """What the n-th crop of a case is called as a case of its own; who learns from it has seen the case."""
    return f"{case}_p{number:03d}"


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        dataset: its name.
        cases: as they are called there.
        labelled: whether it saw their labels too.
    """

    dataset: str
    cases: frozenset[str]
    labelled: bool = False

    @property
    def seen(self) -> frozenset[str]:
        """Its cases, and those that they are crops of."""
        return self.cases | {_PATCH.sub("", case) for case in self.cases}


@dataclass(frozen=True)
class TrainingCases:
    """What is known of a checkpoint's training data.

    Attributes:
        runs: those that are recorded, the latest first.
        unrecorded: one sentence for each part of the training whose cases are not.
    """

    runs: tuple[Run, ...]
    unrecorded: tuple[str, ...] = ()

    @property
    def seen(self) -> frozenset[str]:
        """All recorded cases, and those that they are crops of."""
        return frozenset().union(*(run.seen for run in self.runs))

    @property
    def seen_with_labels(self) -> frozenset[str]:
        """Those of which a run saw the labels."""
        return frozenset().union(*(run.seen for run in self.runs if run.labelled))


def training_cases(path: Path, content: Mapping[str, Any]) -> TrainingCases:
    """The cases behind a checkpoint: of its run and of those that it started from, or of nnssl's listing inside the file.

    Args:
        path: of the checkpoint; a run's settings lie beside it.
        content: what was read from it.
    """
    kind = kind_of(content, path.name)
    if kind == "nnssl":
        listing = (content.get("init_args") or {}).get("pretrain_json")
        names = frozenset(_image_names(listing))
        if not names:
            return TrainingCases((), (f"{path.name} does not list the images it learned from",))
        return TrainingCases((Run("the images that the checkpoint lists", names),))
    if kind == "nnunet":
        return TrainingCases((), (f"{path.name} does not say which cases nnU-Net trained it on",))
    data = content["nnssl_ext"]["data"]
    runs, missing = runs_behind(path, str(data.get("dataset", "")))
    unrecorded = [f"no {SETTINGS} beside {each} says which cases it learned from" for each in missing]
    if path in missing:
        unrecorded[0] += f" ({data.get('cases', '?')} cases of {data.get('dataset', 'an unnamed dataset')})"
    return TrainingCases(tuple(runs), tuple(unrecorded))


def runs_behind(path: Path, dataset: str = "") -> tuple[list[Run], list[Path]]:
    """A checkpoint's run and those that it started from, the latest first.

    Args:
        dataset: which the settings beside `path` must be about, if given.

    Returns:
        The runs, and the checkpoints without settings beside them.
    """
    runs: list[Run] = []
    visited: set[Path] = set()
    following: Path | None = path
    while following is not None:
        # A relative path of an earlier run was relative to wherever that run was started.
        lost = following in visited or (runs and not following.is_absolute())
        settings = None if lost else _settings(following)
        if settings is None or (not runs and dataset not in ("", settings["dataset"])):
            return runs, [following]
        visited.add(following)
        labelled = bool((settings.get("settings") or {}).get("labels"))
        runs.append(Run(settings["dataset"], frozenset(settings["cases"]), labelled))
        earlier = (settings.get("run") or {}).get("pretrained_weights")
        following = Path(earlier) if earlier else None
    return runs, []


def _settings(checkpoint: Path) -> dict[str, Any] | None:
    try:
        content = read_json(checkpoint.parent / SETTINGS)
    except NnsslError:
        return None
    return content if isinstance(content, dict) and {"dataset", "cases"} <= content.keys() else None


def _image_names(listing: Any) -> Iterator[str]:
    """Case names as nnU-Net would give them, of the files in nnssl's listing."""
    if isinstance(listing, Mapping):
        for key, value in listing.items():
            if key == "image_path" and isinstance(value, str):
                yield re.sub(r"(_\d{4})?(\.[A-Za-z][\w]*)+$", "", re.split(r"[\\/]", value)[-1])
            else:
                yield from _image_names(value)
    elif isinstance(listing, list | tuple):
        for value in listing:
            yield from _image_names(value)
