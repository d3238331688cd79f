import math

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnssl_ext.objectives.segmentation import segmentation_loss


def test_equals_nnunets_loss_on_hard_labels():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 5, 6), torch.randint(0, 3, (4, 5, 6))
    nnunets = DC_and_CE_loss(
        {"batch_dice": False, "smooth": 0.0, "do_bg": False, "ddp": False},
        {},
        dice_class=MemoryEfficientSoftDiceLoss,
    )
    expected = nnunets(logits[None], labels[None, None]) + 1  # nnU-Net's Dice loss ends at -1
    shares = torch.stack([labels == 1, labels == 2]).float()
    torch.testing.assert_close(segmentation_loss(logits, shares, torch.ones(4, 5, 6)), expected)


def test_shared_cells_and_weights_by_hand():
    """Two cells: one half a label's, for which the network says 3 : 1; one that does not count."""
    logits = torch.tensor([[math.log(3), -9.0], [0.0, 9.0]]).view(2, 1, 1, 2)
    shares = torch.tensor([0.5, 0.0]).view(1, 1, 1, 2)
    weight = torch.tensor([1.0, 0.0]).view(1, 1, 2)
    entropy = -(0.5 * np.log(0.75) + 0.5 * np.log(0.25))
    dice = 2 * 0.5 * 0.25 / (0.5 + 0.25)
    assert segmentation_loss(logits, shares, weight).item() == pytest.approx(entropy + 1 - dice)


def test_nothing_to_count():
    assert segmentation_loss(torch.zeros(2, 1, 1, 2), torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2)) == 0
