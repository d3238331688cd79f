"""Many pairs from a CSV: resumable, and no pair ends the batch."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from glob import escape
from pathlib import Path
from typing import Any, get_args

from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, sha256_of, write_json
from nnssl_ext.registration.affine import Start
from nnssl_ext.registration.outputs import DISPLACEMENT, MEASURES, TRANSFORM, WARPED

FAILURES = "failures.json"


@dataclass(frozen=True)
class PairFiles:
    """The files of one pair; masks and labels may be missing."""

    fixed: Path
    moving: Path
    fixed_mask: Path | None = None
    moving_mask: Path | None = None
    fixed_labels: Path | None = None
    moving_labels: Path | None = None
    init: str | None = None

    def as_json(self) -> dict[str, str | None]:
        """Plain strings."""
        return {name: None if value is None else str(value) for name, value in asdict(self).items()}

    def paths(self) -> dict[str, Path]:
        """Role -> file, for the roles that have one."""
        given = {role: value for role, value in asdict(self).items() if value is not None}
        return {role: Path(value) for role, value in given.items() if value not in get_args(Start)}


HEADERS = (".mhd", ".nhdr", ".hdr")
"""Endings of files whose voxels are in another file of the same name."""


def sums_of(paths: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of each file, and of its voxels where they are in another; those that cannot be read are named by whoever needs
    them."""
    found = {}
    for role, path in paths.items():
        files = sorted(path.parent.glob(f"{escape(path.stem)}.*")) if path.suffix in HEADERS else [path]
        with suppress(OSError):
            found[role] = " ".join(sha256_of(file) for file in files)
    return found


COLUMNS = ("name", *(field.name for field in fields(PairFiles)))


def read_pairs(path: Path) -> dict[str, PairFiles]:
    """Name -> pair, from a CSV with a header: ``fixed`` and ``moving``, and as needed the other `COLUMNS`.

    Paths are relative to the CSV, also that of a transform in ``init``. Without a name, a pair is called after its files. Lines
    without any value are skipped.

    Raises:
        NnsslError: no CSV, unknown, missing or repeated columns, no fixed or moving scan, two pairs of one name, or one that
            names no folder.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise NnsslError(f"{path}: {error}", "give a CSV file with the columns fixed and moving") from error
    unknown = sorted(set(columns) - set(COLUMNS))
    if unknown or not {"fixed", "moving"} <= set(columns):
        raise NnsslError(
            f"{path}: columns {', '.join(columns) or 'none'}",
            f"needed are fixed and moving, known besides: {', '.join(sorted(set(COLUMNS) - {'fixed', 'moving'}))}",
        )
    if repeated := sorted({column for column in columns if columns.count(column) > 1}):
        raise NnsslError(f"{path}: more than one column {', '.join(repeated)}", "leave one of each")
    pairs: dict[str, PairFiles] = {}
    for number, row in rows:
        given = {key: value.strip() for key, value in row.items() if key and value and value.strip()}
        if not given:
            continue
        if "fixed" not in given or "moving" not in given:
            raise NnsslError(f"{path}, line {number}: no fixed or no moving scan", "complete or delete the line")
        files = {key: path.parent / value for key, value in given.items() if key not in ("name", "init")}
        name = given.get("name") or f"{_stem(files['moving'])}_to_{_stem(files['fixed'])}"
        if name in pairs or name in (".", "..", FAILURES) or set(name) & set("/\\"):
            raise NnsslError(
                f"{path}, line {number}: '{name}' is no new folder name", "give each pair a name of its own"
            )
        init = given.get("init")
        if init is not None and init not in get_args(Start):
            init = str(path.parent / init)
        pairs[name] = PairFiles(**files, init=init)
    if not pairs:
        raise NnsslError(f"{path} lists no pairs", "add a line per pair below the header")
    return pairs


def run_batch(
    pairs: dict[str, PairFiles],
    output: Path,
    request: Callable[[PairFiles], dict[str, Any]],
    register: Callable[[PairFiles, Path], object],
    say: Callable[[str], None],
) -> dict[str, str]:
    """Register every pair into a folder of its own, unless it is there from an earlier run with the same request.

    Args:
        request: what a pair's measures say was asked for.
        register: registers one pair into a folder.
        say: takes one line per pair.

    Returns:
        Name -> what went wrong, for the pairs that failed; also written to ``failures.json``.
    """
    failures: dict[str, str] = {}
    for number, (name, files) in enumerate(pairs.items(), start=1):
        try:
            if _done(output / name, request(files)):
                say(f"{number}/{len(pairs)} {name}: done before")
                continue
            register(files, output / name)
            say(f"{number}/{len(pairs)} {name}: done")
        except Exception as error:  # noqa: BLE001 the others must go on, whatever it was
            failures[name] = str(error) if isinstance(error, NnsslError) else f"{type(error).__name__}: {error}"
            say(f"{number}/{len(pairs)} {name}: FAILED: {failures[name]}")
    write_json(output / FAILURES, failures)
    return failures


def _done(folder: Path, request: dict[str, Any]) -> bool:
    if not all((folder / name).is_file() for name in (DISPLACEMENT, TRANSFORM, WARPED)):
        return False
    try:
        found = read_json(folder / MEASURES)
    except NnsslError:
        return False
    return isinstance(found, dict) and found.get("request") == request


def _stem(path: Path) -> str:
    return path.name.split(".")[0]
