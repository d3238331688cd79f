"""Every command ends with a message and an exit code that scripts can rely on."""

import subprocess
import sys

import pytest

from nnssl_ext.cli import benchmark, probe, register
from nnssl_ext.cli._run import out_of_memory, run
from nnssl_ext.errors import NnsslError


def ending(main) -> object:
    with pytest.raises(SystemExit) as end:
        run(main)
    return end.value.code


def fail_with(error: BaseException):
    def main() -> None:
        raise error

    return main


def test_success_and_own_exit_codes_pass_through():
    assert ending(lambda: None) == 0
    assert ending(lambda: 1) == 1


def test_user_error_is_two_lines_on_stderr(capsys):
    assert ending(fail_with(NnsslError("case 7 holds NaN", "mask it"))) == 2
    assert capsys.readouterr() == ("", "error: case 7 holds NaN\n  -> mask it\n")


def test_interrupt():
    assert ending(fail_with(KeyboardInterrupt())) == 130


PRINT = "from nnssl_ext.cli._run import run; run(lambda: print('line\\n' * 100_000))"
OTHER_PIPE = """
import os
from nnssl_ext.cli._run import run
def main():
    reading, writing = os.pipe()
    os.close(reading)
    os.write(writing, b"lost")
run(main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="shells without head")
def test_output_that_nobody_reads_to_its_end_is_no_error():
    writer = subprocess.Popen([sys.executable, "-c", PRINT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "line\n"
    writer.stdout.close()
    assert writer.stderr.read() == "" and writer.wait() == 141


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no way to tell the two apart")
def test_another_pipe_that_breaks_is_a_defect():
    found = subprocess.run([sys.executable, "-c", OTHER_PIPE], capture_output=True, text=True, check=False)
    assert found.returncode == 1 and "BrokenPipeError" in found.stderr


def test_debug_keeps_the_traceback(monkeypatch):
    monkeypatch.setenv("NNSSL_EXT_DEBUG", "1")
    with pytest.raises(NnsslError):
        run(fail_with(NnsslError("what", "fix")))


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


def test_a_real_failed_allocation_names_the_setting(capsys):
    torch = pytest.importorskip("torch")
    assert ending(lambda: torch.empty(2**60)) == 2  # more than any address space holds
    assert "--batch_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "flag"),
    [(register.main, "--features.memory_gib"), (probe.main, "--voxels"), (benchmark.main, "--batch_size")],
)
def test_running_out_of_memory_names_a_flag_that_the_command_has(main, flag, monkeypatch, capsys):
    def full() -> None:
        raise MemoryError

    monkeypatch.setattr(sys, "argv", ["command", "throughput"])
    monkeypatch.setattr(sys.modules[main.__module__], "_main", full)
    with pytest.raises(SystemExit):
        main()
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried to allocate 2 GiB", "MPS backend out of memory (MPS ...)"])
def test_device_memory(text):
    assert "--batch_size" in str(out_of_memory(RuntimeError(text)))


def test_python_memory_and_unrelated_errors():
    assert "MemoryError" in str(out_of_memory(MemoryError()))
    assert out_of_memory(RuntimeError("sizes of tensors must match")) is None
    assert out_of_memory(ValueError("out of memory")) is None


def test_importing_it_loads_no_torch():
    code = "import sys, nnssl_ext.cli._run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
