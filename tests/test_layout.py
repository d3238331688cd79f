"""The folders, the links, the package list and the built wheel say the same (four top-level rooms, one import name)."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
MAPPED: dict[str, str] = SETUPTOOLS["package-dir"]


def rooms_on_disk() -> set[str]:
    """Every folder with an ``__init__.py`` as an installed name; linked rooms count once, under their mapped folder."""
    found = set()
    for name, folder in {"nnssl_ext": "nnssl_ext", **MAPPED}.items():
        for directory, _, files in os.walk(ROOT / folder, followlinks=False):
            if "__init__.py" in files:
                found.add(".".join((name, *Path(directory).relative_to(ROOT / folder).parts)))
    return found


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_every_room_is_packaged():
    assert rooms_on_disk() == set(SETUPTOOLS["packages"])
    assert len(SETUPTOOLS["packages"]) == len(set(SETUPTOOLS["packages"]))


@pytest.mark.parametrize("room", sorted(MAPPED))
def test_links_are_relative_and_lead_to_the_mapped_folder(room):
    link = ROOT.joinpath(*room.split("."))
    if not link.is_symlink():
        pytest.skip(f"{link} was checked out as text: this file system or git setting has no links")
    assert not Path(os.readlink(link)).is_absolute()
    assert link.resolve() == ROOT / MAPPED[room]


def test_wheel_holds_one_import_name_and_the_startup_files(built):
    names = names_in(built.wheel)
    assert len(names) == len(set(names))
    top = {name.split("/")[0] for name in names}
    (metadata,) = [name for name in top if name.endswith(".dist-info")]
    assert top == {"nnssl_ext", "nnssl_ext.pth", "nnssl_ext.start", metadata}


def test_wheel_holds_every_source_and_data_file(built):
    expected = set()
    for name, folder in {"nnssl_ext": "nnssl_ext", **MAPPED}.items():
        for directory, _, files in os.walk(ROOT / folder, followlinks=False):
            for file in files:
                if Path(file).suffix in (".py", ".typed", ".md", ".j2", ".json"):
                    inside = (Path(directory) / file).relative_to(ROOT / folder)
                    expected.add(str(Path(*name.split("."), inside)))
    assert expected <= set(names_in(built.wheel))


def test_wheel_built_from_the_sdist_is_the_same(built):
    assert sorted(names_in(built.wheel_from_sdist)) == sorted(names_in(built.wheel))
    with tarfile.open(built.sdist) as archive:
        assert any(name.endswith("nnssl_ext/_build/backend.py") for name in archive.getnames())


@pytest.mark.parametrize("room", sorted(MAPPED.values()))
def test_rooms_are_hidden_outside_the_checkout(room, tmp_path):
    code = f"import nnssl_ext.{room}, importlib.util, sys; sys.exit(importlib.util.find_spec('{room}') is not None)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
