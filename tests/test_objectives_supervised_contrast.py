"""The supervised contrast against loops, and over processes."""

import math
import subprocess
import sys

import pytest
import torch

from nnssl_ext.objectives.supervised_contrast import supervised_contrast

LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def by_loops(vectors: list[list[float]], labels: list[int], temperature: float) -> float:
    """Khosla et al., Eq. 2, sample by sample."""

    def similarity(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b) / temperature

    losses = []
    for i, own in enumerate(vectors):
        others = [j for j in range(len(vectors)) if j != i]
        alike = [j for j in others if labels[j] == labels[i]]
        if not alike or len(alike) == len(others):
            continue
        total = sum(math.exp(similarity(own, vectors[j])) for j in others)
        losses.append(-sum(math.log(math.exp(similarity(own, vectors[j])) / total) for j in alike) / len(alike))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_loss_equals_loops(temperature):
    vectors = torch.randn(6, 4, dtype=torch.float64)
    expected = by_loops(vectors.tolist(), LABELS.tolist(), temperature)
    assert float(supervised_contrast(vectors.float(), LABELS, temperature)) == pytest.approx(expected, rel=1e-5)


def test_equal_vectors_score_the_logarithm_of_the_number_of_others():
    assert float(supervised_contrast(torch.ones(6, 4), LABELS, 0.5)) == pytest.approx(math.log(5))


def test_length_of_the_vectors_does_not_matter():
    vectors, scale = torch.randn(6, 4), torch.tensor([0.1, 1, 10, 100, 1000, 3])[:, None]
    expected = supervised_contrast(vectors, LABELS, 0.5)
    torch.testing.assert_close(supervised_contrast(vectors * scale, LABELS, 0.5), expected)


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 1, 2], [4]])
def test_without_a_sample_that_can_be_told_apart_loss_and_gradient_are_0(labels):
    vectors = torch.randn(len(labels), 4, requires_grad=True)
    loss = supervised_contrast(vectors, torch.tensor(labels), 0.5)
    loss.backward()
    assert loss.item() == 0 and vectors.grad.count_nonzero() == 0


def test_clusters_score_lower_and_descent_finds_them():
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    centres = torch.randn(2, 8)
    clustered = centres[labels] + 0.1 * torch.randn(6, 8)
    assert supervised_contrast(clustered, labels, 0.5) < supervised_contrast(torch.randn(6, 8), labels, 0.5)
    vectors = torch.randn(6, 8, requires_grad=True)
    optimizer = torch.optim.Adam([vectors], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        supervised_contrast(vectors, labels, 0.5).backward()
        optimizer.step()
    unit = torch.nn.functional.normalize(vectors.detach(), dim=1)
    cosines = unit @ unit.T
    alike = labels[:, None] == labels
    assert cosines[alike].min() > 0.9 and cosines[~alike].max() < -0.9


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite(kind):
    vectors = (torch.randn(6, 64) * 1000).to(kind).requires_grad_()  # squares beyond half precision
    with torch.autocast("cpu", torch.bfloat16):
        loss = supervised_contrast(vectors, LABELS, 0.01)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(vectors.grad).all()
    torch.testing.assert_close(loss, supervised_contrast(vectors.float(), LABELS, 0.01))


TWO = """
import sys, torch
import torch.distributed as dist
from nnssl_ext.objectives.processes import gather_over_processes
from nnssl_ext.objectives.supervised_contrast import supervised_contrast
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
given = torch.load(f"{folder}/given.pt")
own = slice(rank * 3, rank * 3 + 3)
weight = given["weight"].requires_grad_()
vectors = gather_over_processes(given["x"][own] @ weight)
loss = supervised_contrast(vectors, gather_over_processes(given["labels"][own]), 0.5)
loss.backward()
dist.all_reduce(weight.grad)  # data-parallel training averages
torch.save({"loss": loss.detach(), "gradient": weight.grad / 2}, f"{folder}/found{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_equal_one_with_all_samples(tmp_path):
    x, weight = torch.randn(6, 5), torch.randn(5, 4)
    torch.save({"x": x, "weight": weight, "labels": LABELS}, tmp_path / "given.pt")
    both = [subprocess.Popen([sys.executable, "-c", TWO, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    weight.requires_grad_()
    expected = supervised_contrast(x @ weight, LABELS, 0.5)
    expected.backward()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"found{rank}.pt")
        torch.testing.assert_close(found["loss"], expected.detach())
        torch.testing.assert_close(found["gradient"], weight.grad)
