"""Every command ends with a message and an exit code that scripts can rely on."""

import subprocess
import sys

import pytest

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
