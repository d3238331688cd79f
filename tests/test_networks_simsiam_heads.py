import subprocess
import sys

import pytest
import torch
from torch import nn

from nnssl_ext.networks.simsiam_heads import GlobalBatchNorm, predictor, projector


def test_layout_is_the_papers():
    head, top = projector(320, 2048), predictor(2048, 512)
    linears = [m for m in head if isinstance(m, nn.Linear)]
    norms = [m for m in head if isinstance(m, nn.BatchNorm1d)]
    assert [(m.in_features, m.out_features) for m in linears] == [(320, 2048), (2048, 2048), (2048, 2048)]
    assert [norm.affine for norm in norms] == [True, True, False]
    assert isinstance(head[-1], nn.BatchNorm1d) and sum(isinstance(m, nn.ReLU) for m in head) == 2
    linears = [m for m in top if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == [(2048, 512), (512, 2048)]
    assert linears[-1].bias is not None and isinstance(top[-1], nn.Linear)
    assert sum(isinstance(m, nn.BatchNorm1d) for m in top) == 1


def test_same_parameters_as_lightly():
    heads = pytest.importorskip("lightly.models.modules.heads", reason="lightly is not installed")
    for ours, theirs in (
        (projector(48, 64), heads.SimSiamProjectionHead(48, 64, 64)),
        (predictor(64, 16), heads.SimSiamPredictionHead(64, 16, 64)),
    ):
        theirs.layers.load_state_dict(ours.state_dict())
        x = torch.randn(8, next(ours.parameters()).shape[1])
        torch.testing.assert_close(ours(x), theirs(x))


def test_projections_have_mean_0_and_variance_1_over_the_batch():
    z = projector(12, 32)(torch.randn(64, 12))
    torch.testing.assert_close(z.mean(0), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(0, unbiased=False), torch.ones(32), atol=1e-2, rtol=0)


TWO = """
import sys, torch
import torch.distributed as dist
from nnssl_ext.networks.simsiam_heads import GlobalBatchNorm
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
given = torch.load(f"{folder}/given.pt")
norm = GlobalBatchNorm(5)
norm.load_state_dict(given["state"])
x = given["x"][rank * 3 : rank * 3 + 3].requires_grad_()
y = norm(x)
(y * given["pull"][rank * 3 : rank * 3 + 3]).sum().backward()
found = {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "state": norm.state_dict()}
torch.save(found, f"{folder}/found{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("offset", [0.0, 100.0])  # far from 0, sums of squares would lose the variance
def test_two_processes_equal_torchs_batch_norm_on_the_whole_batch(tmp_path, offset):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(5)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias)
    x, pull = torch.randn(6, 5) * torch.tensor([1, 2, 3, 4, 0.1]) + offset, torch.randn(6, 5)
    torch.save({"state": norm.state_dict(), "x": x, "pull": pull}, tmp_path / "given.pt")
    both = [subprocess.Popen([sys.executable, "-c", TWO, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    found = [torch.load(tmp_path / f"found{rank}.pt") for rank in (0, 1)]

    norm, x = norm.double(), x.double().requires_grad_()
    y = norm(x)
    (y * pull).sum().backward()
    near = {"atol": 1e-3, "rtol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(torch.cat([f["y"] for f in found]), y.detach(), **near)
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
