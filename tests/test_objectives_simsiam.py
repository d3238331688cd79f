import math

import pytest
import torch
from torch.nn import functional as F

from nnssl_ext.objectives.simsiam import dense_simsiam_loss, look_up, negative_cosine, simsiam_loss


def loop_loss(p1, z1, p2, z2) -> float:
    """Sample by sample, from the paper's text."""

    def d(p, z):
        dot, a, b = 0.0, 0.0, 0.0
        for u, v in zip(p.tolist(), z.tolist(), strict=True):
            dot, a, b = dot + u * v, a + u * u, b + v * v
        return -dot / math.sqrt(a * b)

    pairs = [0.5 * d(p1[i], z2[i]) + 0.5 * d(p2[i], z1[i]) for i in range(len(p1))]
    return sum(pairs) / len(pairs)


def vectors(rows: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return list(torch.randn(4, rows, dim, generator=torch.Generator().manual_seed(seed)).to(dtype))


def test_hand_values():
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    diagonal = torch.tensor([[2.0, 2.0]])
    assert float(simsiam_loss(x, x, x, x)) == pytest.approx(-1)
    assert float(simsiam_loss(x, x, y, y)) == pytest.approx(0)
    assert float(simsiam_loss(x, x, -x, -x)) == pytest.approx(1)
    assert float(simsiam_loss(diagonal, y, x, x)) == pytest.approx(
        -0.5 * math.sqrt(0.5)
    )  # D(p1, z2), and D(p2, z1) = 0


@pytest.mark.parametrize(("rows", "dim"), [(1, 3), (4, 16), (32, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_loops_of_scalars_also_from_bf16(rows, dim, dtype):
    # bf16 inputs are exact numbers too: the arithmetic is in float32
    given = vectors(rows, dim, dtype=dtype)
    assert float(simsiam_loss(*given)) == pytest.approx(loop_loss(*given), abs=1e-6)


def test_equals_lightly():
    lightly = pytest.importorskip("lightly.loss", reason="lightly, an independent implementation, is not installed")
    p1, z1, p2, z2 = vectors(8, 32)
    oracle = lightly.NegativeCosineSimilarity()
    theirs = (oracle(p1, z2) + oracle(p2, z1)) / 2
    assert float(simsiam_loss(p1, z1, p2, z2)) == pytest.approx(float(theirs), abs=1e-6)


def test_symmetric_under_exchange_of_the_views():
    p1, z1, p2, z2 = vectors(6, 8)
    assert float(simsiam_loss(p1, z1, p2, z2)) == pytest.approx(float(simsiam_loss(p2, z2, p1, z1)), abs=1e-7)


def test_targets_get_no_gradient_and_predictions_do():
    p1, z1, p2, z2 = (v.requires_grad_() for v in vectors(6, 8))
    simsiam_loss(p1, z1, p2, z2).backward()
    assert z1.grad is None and z2.grad is None
    assert p1.grad.abs().sum() > 0 and p2.grad.abs().sum() > 0


def test_zero_vectors_stay_finite():
    zero = torch.zeros(2, 4, requires_grad=True)
    loss = negative_cosine(zero, torch.ones(2, 4)).sum()
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(zero.grad).all()


def identity_places(batch: int, size: tuple[int, int, int]) -> torch.Tensor:
    axes = [torch.arange(n, dtype=torch.float32) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).expand(batch, *size, 3)


SIZES = [(3, 4, 5), (1, 4, 5)]  # the second flat, as in 2D


@pytest.mark.parametrize("size", SIZES)
def test_look_up_reads_whole_places_and_interpolates_between_them(size):
    features = torch.randn(2, 6, *size)
    places = identity_places(2, size)
    torch.testing.assert_close(look_up(features, places), features.movedim(1, -1), atol=1e-5, rtol=0)
    between = places[:, :, :-1] + torch.tensor([0.0, 0.25, 0.0])
    wanted = 0.75 * features[:, :, :, :-1] + 0.25 * features[:, :, :, 1:]
    torch.testing.assert_close(look_up(features, between), wanted.movedim(1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_dense_loss_equals_loops_over_the_common_places(size):
    torch.manual_seed(0)
    p1, z1, p2, z2 = torch.randn(4, 2, 6, *size)
    shift = torch.tensor([0, 1, 2])
    here = identity_places(2, size)
    at2, at1 = here + shift, here - shift
    limit = torch.tensor(size)
    valid1, valid2 = ((at >= 0).all(-1) & (at < limit).all(-1) for at in (at2, at1))
    valid1[1], valid2[1] = valid1[1] & (here[1, ..., 1] == 0), valid2[1] & (here[1, ..., 1] == 1)

    def one_way(p, z, at, valid):
        samples = []
        for b in range(2):
            found = [
                -float(
                    F.cosine_similarity(
                        p[(b, slice(None), *place)], z[(b, slice(None), *at[(b, *place)].long())], dim=0
                    )
                )
                for place in map(tuple, valid[b].nonzero().tolist())
            ]
            samples.append(sum(found) / len(found))
        return sum(samples) / 2

    wanted = (one_way(p1, z2, at2, valid1) + one_way(p2, z1, at1, valid2)) / 2
    assert float(dense_simsiam_loss(p1, z1, p2, z2, at2, valid1, at1, valid2)) == pytest.approx(wanted, abs=1e-6)


def test_dense_loss_ignores_what_only_one_view_shows_and_survives_no_overlap():
    p1, z1, p2, z2 = torch.randn(4, 1, 6, 2, 2, 2)
    here = identity_places(1, (2, 2, 2))
    valid = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    assert dense_simsiam_loss(p1, z1, p2, z2, here, valid, here, valid).item() == 0
    valid[0, 0, 0, 0] = True
    given = [t.detach().requires_grad_() for t in (p1, z1, p2, z2)]
    dense_simsiam_loss(*given, here, valid, here, valid).backward()
    assert given[1].grad is None and given[3].grad is None
    reached = given[0].grad.abs().sum(1)[0] > 0
    assert reached.sum() == 1 and bool(reached[0, 0, 0])
