"""Teacher probabilities: Sinkhorn-Knopp and the moving centre, alone and over processes."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from nnssl_ext.objectives.centring import TeacherTargets, sinkhorn_knopp


def literal_sinkhorn(logits: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    """SwAV's listing, in float64: rows are prototypes, columns samples."""
    q = np.exp(logits.astype(np.float64).T / temperature)
    q /= q.sum()
    prototypes, samples = q.shape
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True)
        q /= prototypes
        q /= q.sum(axis=0, keepdims=True)
        q /= samples
    return (q * samples).T


@pytest.mark.parametrize(("given", "iterations"), [((1,), 1), ((), 3), ((10,), 10)])  # 3 unless said otherwise
def test_sinkhorn_is_swavs_listing(given, iterations):
    logits = torch.randn(13, 7, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    expected = torch.from_numpy(literal_sinkhorn(logits.numpy(), 0.04, iterations))
    found = sinkhorn_knopp(logits, 0.04, *given)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.sum(1), torch.ones(13))


def test_sinkhorn_equals_an_independent_library():
    swav = pytest.importorskip("lightly.loss.swav_loss")
    logits = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    torch.testing.assert_close(
        sinkhorn_knopp(logits, 0.05), swav.sinkhorn(logits.clone(), iterations=3, epsilon=0.05), rtol=1e-4, atol=1e-7
    )


def test_two_samples_and_two_prototypes_by_hand():
    """exp = [[4, 1], [1, 1]]. Prototype sums 5, 2 -> [[.8, .5], [.2, .5]]; rows sum to 1 by dividing by 1.3 and 0.7."""
    logits = torch.tensor([[math.log(4.0), 0.0], [0.0, 0.0]])
    expected = torch.tensor([[0.8 / 1.3, 0.5 / 1.3], [0.2 / 0.7, 0.5 / 0.7]])
    torch.testing.assert_close(sinkhorn_knopp(logits, 1.0, 1), expected)


def test_in_the_end_every_prototype_has_the_same_share():
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) + 0.5 * torch.arange(8)
    assert logits.softmax(1).mean(0).max() > 0.3
    torch.testing.assert_close(sinkhorn_knopp(logits, 1.0, 100).mean(0), torch.full((8,), 1 / 8), rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_neither_overflow_nor_lose_balance(dtype, size):
    """exp(1 / 0.04) = 7e10 overflows float16; exp(30 / 0.04) overflows float32 too. Row 13 of dino.md."""
    logits = (size * torch.randn(40, 12, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = sinkhorn_knopp(logits, 0.04)  # a head's logits lie within its gain, about 1; 30 is for safety
    assert found.dtype == torch.float32
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found.sum(1), torch.ones(40))
    torch.testing.assert_close(found, sinkhorn_knopp(logits.float(), 0.04))


@pytest.mark.parametrize("lower", [50.0, 85.0, 100.0, 1e4])
def test_prototypes_that_no_sample_comes_near_get_their_share_all_the_same(lower):
    """Half of the prototypes are lower by e^-lower for all samples; one factor for each makes up for that, however small it is."""
    logits = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    shifted = logits.clone()
    shifted[:, :6] -= lower
    torch.testing.assert_close(sinkhorn_knopp(shifted, 1.0), sinkhorn_knopp(logits, 1.0), rtol=2e-3, atol=0)


def test_nothing_hidden_gives_nothing():
    assert sinkhorn_knopp(torch.empty(0, 5), 0.04).shape == (0, 5)
    targets = TeacherTargets(5, "centre")
    assert targets(torch.empty(0, 5), 0.04).shape == (0, 5)
    targets.after_step()
    assert torch.equal(targets.centre, torch.zeros(5))


def test_the_centre_is_subtracted_and_moves_only_after_the_step():
    targets = TeacherTargets(3, "centre", momentum=0.9)
    logits = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 7.0]])
    targets.before_step()
    torch.testing.assert_close(targets(logits, 0.5), (logits / 0.5).softmax(1))
    targets.after_step()
    centre = torch.tensor([0.2, 0.2, 0.5])  # a tenth of the means 2, 2, 5
    torch.testing.assert_close(targets.centre, centre)
    targets.before_step()
    torch.testing.assert_close(targets(logits, 0.5), ((logits - centre) / 0.5).softmax(1))
    targets.after_step()
    torch.testing.assert_close(targets.centre, 0.9 * centre + torch.tensor([0.2, 0.2, 0.5]))


def test_micro_batches_move_the_centre_once_and_broken_steps_not_at_all():
    whole, parts = TeacherTargets(4, "centre"), TeacherTargets(4, "centre")
    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    for targets, batches in ((whole, [logits]), (parts, [logits[:3], logits[3:]])):
        targets.before_step()
        targets(torch.full((2, 4), torch.nan), 1.0)  # this step is skipped
        targets.before_step()
        for batch in batches:
            targets(batch, 1.0)
        targets.after_step()
    torch.testing.assert_close(whole.centre, 0.1 * logits.mean(0))
    torch.testing.assert_close(parts.centre, whole.centre)


def test_crops_of_several_views_are_balanced_together():
    logits = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    found = TeacherTargets(5, "sinkhorn")(logits, 0.1)
    torch.testing.assert_close(found.flatten(0, 1), sinkhorn_knopp(logits.flatten(0, 1), 0.1))


TWO = """
import sys, torch
import torch.distributed as dist
from nnssl_ext.objectives.centring import TeacherTargets, sinkhorn_knopp
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mine = torch.load(f"{folder}/logits.pt").split([7, 2])[rank]
targets = TeacherTargets(5, "centre")
targets.before_step()
targets(mine, 0.04)
targets.after_step()
nothing = sinkhorn_knopp(mine[: 7 - 7 * rank], 0.04)
torch.save([sinkhorn_knopp(mine, 0.04), targets.centre, nothing], f"{folder}/found{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_with_unequal_numbers_of_samples_equal_one(tmp_path):
    """Row 11 of dino.md: the masked tokens of all processes count, however they are spread."""
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    torch.save(logits, tmp_path / "logits.pt")
    both = [subprocess.Popen([sys.executable, "-c", TWO, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    first, second = (torch.load(tmp_path / f"found{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(torch.cat([first[0], second[0]]), sinkhorn_knopp(logits, 0.04))
    for found in (first, second):
        torch.testing.assert_close(found[1], 0.1 * logits.mean(0))
    torch.testing.assert_close(first[2], sinkhorn_knopp(logits[:7], 0.04))  # the other process had none
    assert second[2].shape == (0, 5)
