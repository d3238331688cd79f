"""NT-Xent against loops, against vox2vec's formula as published, and against values known beforehand."""

import math

import pytest
import torch
from torch.nn import functional as F

from nnssl_ext.objectives.nt_xent import _row_losses, nt_xent


def embeddings(cases: int, pairs: int, dim: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = (F.normalize(torch.randn(cases, pairs, dim, generator=generator), dim=-1) for _ in range(2))
    return first, second


def everything(first: torch.Tensor) -> torch.Tensor:
    return torch.ones(first.shape[:2], dtype=torch.bool)


def by_loops(first: list, second: list, temperature: float) -> float:
    """2N-way NT-Xent of one case, one exponential after the other."""
    vectors = [*first, *second]
    n, total = len(first), 0.0
    for i, anchor in enumerate(vectors):
        similar = [math.exp(sum(a * b for a, b in zip(anchor, other, strict=True)) / temperature) for other in vectors]
        total -= math.log(similar[(i + n) % (2 * n)] / (sum(similar) - similar[i]))
    return total / (2 * n)


def as_published(e1: torch.Tensor, e2: torch.Tensor, temperature: float) -> torch.Tensor:
    """(L1 + L2) / 2 with S11, S12 and S22, their diagonals removed."""
    s11, s12, s22 = e1 @ e1.T / temperature, e1 @ e2.T / temperature, e2 @ e2.T / temperature
    s11.fill_diagonal_(-torch.inf)
    s22.fill_diagonal_(-torch.inf)
    l1 = (torch.cat((s11, s12), 1).logsumexp(1) - s12.diag()).mean()
    l2 = (torch.cat((s12.T, s22), 1).logsumexp(1) - s12.diag()).mean()
    return (l1 + l2) / 2


@pytest.mark.parametrize(("cases", "pairs"), [(1, 2), (2, 5), (3, 17)])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_it_equals_loops_and_the_published_formula(cases, pairs, temperature):
    first, second = embeddings(cases, pairs)
    found = nt_xent(first, second, everything(first), temperature).item()
    loops = [
        by_loops(a.double().tolist(), b.double().tolist(), temperature) for a, b in zip(first, second, strict=True)
    ]
    published = [as_published(a, b, temperature).item() for a, b in zip(first, second, strict=True)]
    assert found == pytest.approx(sum(loops) / cases, rel=1e-5)
    assert found == pytest.approx(sum(published) / cases, rel=1e-5)


def test_values_worked_out_by_hand():
    # two orthogonal pairs: partner e^1, two others e^0 at temperature 1
    first = torch.eye(2)[None]
    assert nt_xent(first, first, everything(first), 1.0).item() == pytest.approx(math.log((math.e + 2) / math.e))
    alone = first[:, :1]  # one pair has no negatives
    assert nt_xent(alone, alone, everything(alone), 0.1).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("pairs", [1, 3, 50])
def test_equal_embeddings_cost_ln_of_all_others(pairs):
    same = F.normalize(torch.ones(1, pairs, 4), dim=-1)
    assert nt_xent(same, same, everything(same), 0.1).item() == pytest.approx(math.log(2 * pairs - 1), abs=1e-5)


def test_equal_embeddings_at_the_papers_size():
    same = F.normalize(torch.ones(1, 2 * 10_240, 2), dim=-1)
    some_rows = _row_losses(same, everything(same), 10_230, 10_250, 0.1)
    torch.testing.assert_close(some_rows, torch.full((1, 20), 9.927), atol=5e-4, rtol=0)


def test_pairs_that_do_not_count_are_as_if_not_there():
    first, second = embeddings(2, 9)
    valid = everything(first)
    valid[0, [1, 4, 8]] = valid[1, :7] = False
    found = nt_xent(first, second, valid, 0.1)
    alone = [as_published(first[b, valid[b]], second[b, valid[b]], 0.1) for b in range(2)]
    torch.testing.assert_close(found, torch.stack(alone).mean())


def test_without_a_valid_pair_loss_and_gradient_are_zero():
    first, second = (vectors.requires_grad_() for vectors in embeddings(1, 4))
    loss = nt_xent(first, second, ~everything(first), 0.1)
    loss.backward()
    assert loss.item() == 0 and not first.grad.any() and not second.grad.any()


def test_the_batch_is_the_mean_of_its_cases():
    first, second = embeddings(3, 6)
    each = [nt_xent(first[i : i + 1], second[i : i + 1], everything(first[:1]), 0.1) for i in range(3)]
    torch.testing.assert_close(nt_xent(first, second, everything(first), 0.1), torch.stack(each).mean())


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_rows_in_turn_give_the_same_loss_and_gradient(rows):
    results = []
    for size in (10**6, rows):
        first, second = (vectors.requires_grad_() for vectors in embeddings(2, 13))
        valid = everything(first)
        valid[1, 3:6] = False
        loss = nt_xent(first, second, valid, 0.1, rows=size)
        loss.backward()
        results.append((loss, first.grad, second.grad))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(whole, parts)


def test_rows_in_turn_hold_a_part_of_the_matrix_only():
    first, second = (vectors.requires_grad_() for vectors in embeddings(1, 64))
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        nt_xent(first, second, everything(first), 0.1, rows=8)
    assert max(held) < 128 * 128 / 4


def test_it_is_computed_in_float32_under_autocast():
    first, second = embeddings(1, 30)
    exact = nt_xent(first, second, everything(first), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(nt_xent(first, second, everything(first), 0.1), exact)
