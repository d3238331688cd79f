"""The one writer: planned cases -> a validated nnU-Net raw dataset, whole or not at all."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from nnssl_ext.dataset_conversion.cases import Labels, PlannedCase, PlannedDataset, duplicate_name
from nnssl_ext.dataset_conversion.one_case import ENDING, CheckedCase, Places, checked
from nnssl_ext.dataset_conversion.whole_folder import whole_folder
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import write_json

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Converted:
    """The outcome of a conversion: the checked cases in order, all problems, the labels for dataset.json."""

    cases: tuple[CheckedCase, ...]
    problems: tuple[NnsslError, ...]
    labels: Labels


def convert(
    planned: PlannedDataset, target: Path, *, dry_run: bool = False, skip_bad: bool = False, processes: int = 1
) -> Converted:
    """Check every planned case and write the good ones as the raw dataset `target` (``.../DatasetXXX_Name``).

    Args:
        planned: what to convert.
        target: the folder to come into being; nothing is there before all of it is.
        dry_run: check everything, write nothing; problems are returned instead of raised.
        skip_bad: convert the rest if some cases are bad.
        processes: spawned worker processes; 1 works in this one.

    Raises:
        NnsslError: bad cases (all of them, one message), no case left, the target is taken or cannot be written.
    """
    if target.exists():
        raise NnsslError(f"{target} exists already", "choose another -d or --name, or remove that folder")
    if dry_run:
        return check_all(planned, Places(), processes)
    with whole_folder(target) as building:
        images, labels = building / "imagesTr", building / "labelsTr"
        images.mkdir()
        labels.mkdir()
        converted = check_all(planned, Places(images, labels), processes)
        good = [case.identifier for case in converted.cases if case.problem is None]
        if converted.problems and not (skip_bad and good):
            raise told_together(converted.problems)
        if not good:
            raise NnsslError("there are no cases to convert", "check the path and the choice of files")
        write_json(building / "dataset.json", dataset_json(planned, converted.labels, target, good))
        for name, content in (planned.companions(good) if planned.companions else {}).items():
            write_json(building / name, content)
    return converted


def told_together(problems: Sequence[NnsslError]) -> NnsslError:
    """One error that holds all of them."""
    told = "\n".join(f"  {n}. {problem.what}\n     -> {problem.fix}" for n, problem in enumerate(problems, 1))
    return NnsslError(
        f"{len(problems)} case(s) cannot be converted, so nothing was written:\n{told}",
        "mend the files as said above, or convert the rest with --skip-bad",
    )


def dataset_json(planned: PlannedDataset, labels: Labels, target: Path, cases: Sequence[str]) -> dict[str, object]:
    """The content of nnU-Net's dataset.json for these cases; with ``case_modalities``, case -> modality, where they differ."""
    written = set(cases)
    modalities = {
        case.identifier: case.modality for case in planned.cases if case.modality and case.identifier in written
    }
    return {
        "name": target.name.partition("_")[2],
        **planned.description,
        "channel_names": {str(c): name for c, name in enumerate(planned.channel_names)},
        "labels": labels,
        "numTraining": len(cases),
        "file_ending": ENDING,
        "converted_by": "nnssl_ext",
        **({"case_modalities": modalities} if len(set(modalities.values())) > 1 else {}),
    }


def in_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], processes: int, doing: str
) -> Iterator[tuple[int, Result]]:
    """(index, result) of `work` on every item as they come, with a progress bar; spawned workers if `processes` > 1.

    Raises:
        NnsslError: a worker process died.
    """
    with tqdm(total=len(items), desc=doing, unit="case", disable=not items) as bar:
        if processes <= 1 or len(items) <= 1:
            for index, item in enumerate(items):
                yield index, work(item)
                bar.update()
            return
        workers = min(processes, len(items))
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
            indices = {pool.submit(work, item): index for index, item in enumerate(items)}
            try:
                for done in as_completed(indices):
                    yield indices[done], done.result()
                    bar.update()
            except BrokenProcessPool as error:
                raise NnsslError(
                    "a worker process was killed, likely for lack of memory", "use fewer: -np 1"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and do not outlive it if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def check_all(planned: PlannedDataset, places: Places, processes: int) -> Converted:
    """Check (and write, where there are places) all cases; those of one name are a problem each and stay out."""
    uses = Counter(case.identifier for case in planned.cases)
    unique = [case for case in planned.cases if uses[case.identifier] == 1]
    work = partial(checked, labels=planned.labels, places=places)
    results = dict(in_parallel(work, unique, processes, "converting" if places.labels else "checking"))
    cases = tuple(results[index] for index in sorted(results))
    problems = (*planned.problems, *_duplicates(planned.cases), *(c.problem for c in cases if c.problem))
    return Converted(cases, problems, _labels(planned, cases))


def _duplicates(cases: Sequence[PlannedCase]) -> list[NnsslError]:
    alike: dict[str, list[PlannedCase]] = {}
    for case in cases:
        alike.setdefault(case.identifier, []).append(case)
    return [
        duplicate_name(name, [case.channels[0].path for case in same], cleaned=len({case.name for case in same}) > 1)
        for name, same in alike.items()
        if len(same) > 1
    ]


def _labels(planned: PlannedDataset, cases: Sequence[CheckedCase]) -> Labels:
    """nnU-Net wants consecutive values, so unnamed labels are named up to the highest that occurs."""
    if planned.labels is not None:
        return planned.labels
    highest = max((value for case in cases for value in case.values), default=0)
    return {"background": 0, **{f"label_{value}": value for value in range(1, max(1, highest) + 1)}}
