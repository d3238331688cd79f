"""Batch norm over processes and over some of the rows, against torch's own on the rows that count."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from nnssl_ext.networks.global_batch_norm import GlobalBatchNorm

TWO = """
import sys, torch
import torch.distributed as dist
from nnssl_ext.networks.global_batch_norm import GlobalBatchNorm
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
given = torch.load(f"{folder}/given.pt")
norm = GlobalBatchNorm(5)
norm.load_state_dict(given["state"])
x = given["x"][rank * 3 : rank * 3 + 3].requires_grad_()
valid = given["valid"]
y = norm(x, None if valid is None else valid[rank * 3 : rank * 3 + 3])
(y * given["pull"][rank * 3 : rank * 3 + 3]).sum().backward()
found = {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "state": norm.state_dict()}
torch.save(found, f"{folder}/found{rank}.pt")
dist.destroy_process_group()
"""


# far from 0, sums of squares would lose the variance
@pytest.mark.parametrize(("offset", "left_out"), [(0.0, ()), (100.0, ()), (100.0, (0, 1, 4))])
def test_two_processes_equal_torchs_batch_norm_on_the_whole_batch(tmp_path, offset, left_out):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(5)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias)
    x, pull = torch.randn(6, 5) * torch.tensor([1, 2, 3, 4, 0.1]) + offset, torch.randn(6, 5)
    counts = torch.ones(6, dtype=torch.bool)
    counts[list(left_out)] = False
    pull[~counts] = 0
    given = {"state": norm.state_dict(), "x": x, "pull": pull, "valid": counts if left_out else None}
    torch.save(given, tmp_path / "given.pt")
    both = [subprocess.Popen([sys.executable, "-c", TWO, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    found = [torch.load(tmp_path / f"found{rank}.pt") for rank in (0, 1)]

    norm, x = norm.double(), x.double().requires_grad_()
    y = norm(x[counts])
    (y * pull[counts]).sum().backward()
    near = {"atol": 1e-3, "rtol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(torch.cat([f["y"] for f in found])[counts], y.detach(), **near)
    torch.testing.assert_close(torch.cat([f["x"] for f in found]), x.grad, **near)
    torch.testing.assert_close(found[0]["weight"] + found[1]["weight"], norm.weight.grad, **near)
    for name, value in norm.state_dict().items():
        for f in found:
            torch.testing.assert_close(f["state"][name], value, **near)


def test_alone_and_in_evaluation_it_is_torchs():
    torch.manual_seed(0)
    ours, theirs = GlobalBatchNorm(7), nn.BatchNorm1d(7)
    x = torch.randn(9, 7)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_rows_that_do_not_count_are_normalised_like_the_others_but_leave_no_trace():
    torch.manual_seed(0)
    ours, theirs = GlobalBatchNorm(7), nn.BatchNorm1d(7)
    x, valid = torch.randn(9, 7), torch.arange(9) % 3 > 0
    y = ours(torch.where(valid[:, None], x, 100.0), valid)
    torch.testing.assert_close(y[valid], theirs(x[valid]))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_without_a_row_that_counts_nothing_moves_and_all_stays_finite():
    norm, x = GlobalBatchNorm(4), torch.zeros(3, 4, requires_grad=True)
    norm(x, torch.zeros(3, dtype=torch.bool)).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.equal(norm.running_mean, torch.zeros(4)) and torch.equal(norm.running_var, torch.ones(4))
