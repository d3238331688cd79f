import pytest
import torch
from torch import nn

from nnssl_ext.networks.simsiam_heads import predictor, projector


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
