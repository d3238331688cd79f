"""How fast this machine trains, by a measurement of a fraction of a second."""

from __future__ import annotations

import time

EFFICIENCY = {"cpu": 0.5, "cuda": 0.25, "mps": 0.25}
"""Share of the matrix speed that a training step reaches: 0.4-0.7 on one CPU core with the Tiny presets (measured); for
GPUs our guess."""


def device_speed() -> tuple[str, float]:
    """Name of the best device and the FLOP/s that training may reach on it.

    The device multiplies matrices in the precision that training uses (bf16 on CUDA, else fp32).
    """
    import torch

    name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    edge, dtype = (8192, torch.bfloat16) if name == "cuda" else (1024, torch.float32)
    a = torch.randn(edge, edge, device=name, dtype=dtype)

    def seconds() -> float:
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        return time.perf_counter() - start

    seconds()
    fastest = min(seconds() for _ in range(5))
    return name, EFFICIENCY[name] * 2 * edge**3 / fastest
