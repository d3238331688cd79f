"""What monitors are shown of a feature map."""

import pytest
import torch

from nnssl_ext.networks.watched import watched_places


@pytest.mark.parametrize(("batch", "edge", "shape", "step"), [(6, 10, (4, 250, 3), 4), (2, 6, (2, 216, 3), 1)])
def test_the_first_crops_and_evenly_spread_places_are_shown_without_gradient(batch, edge, shape, step):
    features = torch.randn(batch, 3, edge, edge, edge, requires_grad=True)
    shown = watched_places(features)
    assert shown.shape == shape and not shown.requires_grad
    for place in (0, 1, shape[1] - 1):  # C order of the map
        z, rest = divmod(place * step, edge * edge)
        assert torch.equal(shown[1, place], features[1, :, z, rest // edge, rest % edge])
