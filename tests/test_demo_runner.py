"""Steps are run once, in order, side by side where asked, and fail with a remedy."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from nnssl_ext.demo.runner import Runner, Step
from nnssl_ext.errors import NnsslError


class Steps:
    """Shell steps that append their name to a file, so their order can be read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.trace = folder, folder / "trace"

    def make(self, name: str, script: str = "true", **environment: str) -> Step:
        product = self.folder / name
        command = ("sh", "-c", f"echo {name} >> {self.trace} && {script} && touch '{product}'")
        return Step(name, command, (product,), environment)

    def run(self, *chains: list[Step], side_by_side: int = 1, **environment: str) -> str:
        said = io.StringIO()
        Runner(self.folder, environment, Console(file=said, width=200)).run(*chains, side_by_side=side_by_side)
        return said.getvalue()

    @property
    def order(self) -> list[str]:
        order = self.trace.read_text().split() if self.trace.exists() else []
        self.trace.unlink(missing_ok=True)
        return order


@pytest.fixture
def steps(tmp_path):
    return Steps(tmp_path)


def test_steps_run_once(steps):
    chain = [steps.make("a"), steps.make("b"), steps.make("c")]
    said = steps.run(chain)
    assert steps.order == ["a", "b", "c"] and all(name in said for name in "abc")
    assert "kept" in steps.run(chain) and steps.order == []


def test_what_changed_and_what_follows_is_repeated(steps):
    a, b, c = (steps.make(name) for name in "abc")
    steps.run([a, b, c])
    assert steps.order == ["a", "b", "c"]
    steps.run([a, steps.make("b", "echo another"), c])
    assert steps.order == ["b", "c"]
    (steps.folder / "a").unlink()
    steps.run([a, steps.make("b", "echo another"), c])
    assert steps.order == ["a", "b", "c"]


def test_what_follows_a_repeated_step_is_repeated_even_after_an_interruption(steps):
    steps.run([steps.make("a"), steps.make("b")])
    assert steps.order == ["a", "b"]
    steps.run([steps.make("a", "echo changed")])  # and here the power failed
    steps.run([steps.make("a", "echo changed"), steps.make("b")])
    assert steps.order == ["a", "b"]


def test_chains_depend_on_earlier_calls(steps):
    def both(first: Step) -> None:
        runner = Runner(steps.folder, {}, Console(file=io.StringIO()))
        runner.run([first])
        runner.run([steps.make("b")], [steps.make("c")])

    both(steps.make("a"))
    assert steps.order == ["a", "b", "c"]
    both(steps.make("a", "echo changed"))
    assert steps.order == ["a", "b", "c"]


def test_products_are_cleared_before_a_step(steps):
    (steps.folder / "a").mkdir()
    (steps.folder / "a" / "left").touch()
    steps.run([steps.make("a")])
    assert (steps.folder / "a").is_file()


def test_variables_reach_the_command(steps, monkeypatch):
    monkeypatch.setenv("OUTER", "outer")
    steps.run([steps.make("a", 'echo "$OUTER $COMMON $OWN"', OWN="own")], COMMON="common")
    assert "outer common own" in (steps.folder / "logs" / "a.log").read_text()


def test_a_failure_says_what_and_how_to_repeat(steps):
    failing = steps.make("b: two", "echo 'the reason' >&2 && exit 7", OWN="x y")
    with pytest.raises(NnsslError) as caught:
        steps.run([steps.make("a"), failing, steps.make("c")], COMMON="1")
    assert "'b: two' ended with exit code 7" in caught.value.what and "the reason" in caught.value.what
    assert "export COMMON=1" in caught.value.fix and f"OWN='x y' {'sh -c'}" in caught.value.fix
    assert steps.order == ["a", "b:", "two"]
    steps.run([steps.make("a"), steps.make("b: two"), steps.make("c")])
    assert steps.order == ["b:", "two", "c"]  # "a" was kept


def test_side_by_side_saves_time_and_a_failure_stops_the_other(steps):
    start = time.monotonic()
    steps.run([steps.make("a", "sleep 1")], [steps.make("b", "sleep 1")], side_by_side=2)
    assert time.monotonic() - start < 1.8
    steps.order  # noqa: B018 (clears the trace)
    start = time.monotonic()
    slow = Step("slow", ("sleep", "30"), ())
    with pytest.raises(NnsslError, match="'c' ended"):
        steps.run([slow, steps.make("d")], [steps.make("c", "sleep 0.3; exit 1")], side_by_side=2)
    assert time.monotonic() - start < 10
    assert steps.order == ["c"]


def test_unknown_programs_are_named(steps):
    with pytest.raises(NnsslError, match="nnssl_no_such_command"):
        steps.run([Step("a", ("nnssl_no_such_command",), ())])
