"""Settings as flags: ``-h`` says of every one what it is."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import docstring_parser
import pytest

from nnssl_ext.catalogue import load_method, pretraining_methods
from nnssl_ext.cli._settings import describe_each, settings_from_flags
from nnssl_ext.probing.settings import ProbeSettings
from nnssl_ext.registration.pipeline import PairSettings
from nnssl_ext.trainers.finetuning.settings import FinetuneSettings


@dataclass(frozen=True)
class Inner:
    """Of one part.

    Attributes:
        low, high: what is
            between them.
    """

    low: int = 1
    high: int = 2


@dataclass(frozen=True)
class Outer:
    """Of the whole.

    Attributes:
        first, second, third: numbers.
        inner: the part.
    """

    first: int = 1
    second: int = 2
    third: int = 3
    inner: Inner = field(default_factory=Inner)


def test_settings_that_are_described_together_are_described_each(capsys):
    with pytest.raises(SystemExit):
        settings_from_flags(Outer(), ["-h"], "program")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for number, name in enumerate(("first", "second", "third"), start=1):
        assert f"--{name} INT numbers. (default: {number})" in shown
    for number, name in enumerate(("low", "high"), start=1):
        assert f"--inner.{name} INT what is between them. (default: {number})" in shown
    assert settings_from_flags(Outer(), ["--inner.high", "7", "--third", "5"], "program") == Outer(
        third=5, inner=Inner(high=7)
    )


def undescribed(settings: Any, prefix: str = "") -> Iterator[str]:
    described = {entry.arg_name for entry in docstring_parser.parse(type(settings).__doc__).params}
    for each in fields(settings):
        if each.name not in described:
            yield prefix + each.name
        value = getattr(settings, each.name)
        if is_dataclass(value):
            yield from undescribed(value, f"{prefix}{each.name}.")


@pytest.mark.parametrize(
    "settings",
    [
        *(load_method(name).settings_type for name in pretraining_methods()),
        FinetuneSettings,
        PairSettings,
        ProbeSettings,
    ],
    ids=lambda kind: kind.__name__,
)
def test_no_setting_is_left_undescribed(settings):
    default = settings()
    describe_each(default)
    assert not list(undescribed(default))
