"""What every command does around its work: turn what the user can mend into one message and an exit code."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn

from nnssl_ext.errors import NnsslError

USER_ERROR = 2
INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 + SIGINT and + SIGPIPE, as shells count

# What torch's CUDA, MPS and CPU allocators say; the CUDA one raises a subclass of RuntimeError.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


LESS_MEMORY = (
    "lower --batch_size first; if one sample is too much, plan smaller crops: "
    "nnUNetv2_plan_experiment -d DATASET -pl PLANNER -gpu_memory_target GB (global_crop and local_crop follow), "
    "or choose a smaller planner"
)


def run(main: Callable[[], int | None], less_memory: str = LESS_MEMORY) -> NoReturn:
    """Call `main` and leave the process with its exit code (None is 0); `less_memory` is what to do where memory runs out.

    A `NnsslError` is printed to stderr and ends with code 2, running out of memory likewise; Ctrl-C ends with 130, output that
    nobody reads any more (``| head``) with 141. Any other exception is a defect of ours and keeps its traceback, as everything
    does under ``NNSSL_EXT_DEBUG=1``.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_closed():  # but a pipe to another process
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        code = PIPE_CLOSED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except Exception as error:
        told = error if isinstance(error, NnsslError) else out_of_memory(error, less_memory)
        if told is None or os.environ.get("NNSSL_EXT_DEBUG") == "1":
            raise
        print(f"error: {told}", file=sys.stderr)
        code = USER_ERROR
    sys.exit(code)


def _output_is_closed() -> bool:
    """Whether nobody reads stdout any more; Windows has no way to ask."""
    if not hasattr(select, "poll"):
        return True
    asked = select.poll()
    asked.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in asked.poll(0))


def out_of_memory(error: BaseException, less_memory: str = LESS_MEMORY) -> NnsslError | None:
    """The message for a computer or device that ran out of memory; None where `error` says something else."""
    text = str(error)
    refused = isinstance(error, RuntimeError) and any(words in text.lower() for words in OUT_OF_MEMORY)
    if not (refused or isinstance(error, MemoryError)):
        return None
    first_line = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return NnsslError(f"out of memory: {first_line}", less_memory)
