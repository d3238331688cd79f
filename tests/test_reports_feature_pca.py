"""Colours of features: equal places look equal, in every map, and colours reach the page."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from nnssl_ext.reports.feature_pca import WINDOW, pca_rgb
from nnssl_ext.reports.pictures import draw_planes


def test_colours_are_scikit_learn_s_components_up_to_their_sign():
    torch.manual_seed(0)
    features = torch.randn(2, 8, 4, 5, 6) * torch.arange(8, 0, -1).view(1, 8, 1, 1, 1)
    (colours,) = pca_rgb([features], [(4, 5, 6)])
    table = features.movedim(1, -1).flatten(0, -2).numpy()
    scores = PCA(3).fit_transform(table)
    low, high = np.quantile(scores, WINDOW, axis=0)
    up = 255 * np.clip((scores - low) / (high - low), 0, 1)
    drawn = colours.movedim(1, -1).flatten(0, -2).numpy().astype(float)
    for c in range(3):
        assert min(np.abs(drawn - up)[:, c].max(), np.abs(drawn - (255 - up))[:, c].max()) < 1.5


def test_one_tissue_has_one_colour_in_all_maps_and_sizes():
    torch.manual_seed(0)
    tissues = torch.randn(5, 16)
    a, b = torch.randint(5, (1, 4, 4, 4)), torch.randint(5, (1, 2, 2, 2))
    colours = pca_rgb([tissues[a].movedim(-1, 1), tissues[b].movedim(-1, 1)], [(8, 8, 8), (8, 4, 2)])
    assert [tuple(c.shape) for c in colours] == [(1, 3, 8, 8, 8), (1, 3, 8, 4, 2)]
    seen: dict[int, set] = {}
    for labels, colour in ((a, colours[0]), (b, colours[1])):
        enlarged = torch.nn.functional.interpolate(labels[:, None].float(), colour.shape[2:])[0, 0].int()
        for label, rgb in zip(enlarged.flatten().tolist(), colour[0].flatten(1).T.tolist(), strict=True):
            seen.setdefault(label, set()).add(tuple(rgb))
    assert all(len(s) == 1 for s in seen.values())
    assert len(set.union(*seen.values())) == len(seen)


@pytest.mark.parametrize("channels", [1, 2, 7])
def test_collapsed_features_are_one_colour_and_few_channels_suffice(channels):
    constant = torch.full((1, channels, 3, 3, 3), 0.3) + 1e-7 * torch.randn(1, channels, 3, 3, 3)
    (colours,) = pca_rgb([constant.bfloat16()], [(6, 6, 6)])
    assert len(colours.unique()) == 1
    (varied,) = pca_rgb([torch.randn(1, channels, 3, 3, 3)], [(6, 6, 6)])
    assert len(varied.unique()) > 5


def test_bytes_of_three_channels_are_drawn_in_colour_and_intensities_are_not(tmp_path):
    grey = np.random.default_rng(0).random((1, 6, 8, 10)).astype(np.float32)
    red = np.zeros((3, 6, 8, 10), np.uint8)
    red[0] = 255
    for name, volume in {"rgb": red, "channels": red.astype(np.float32)}.items():
        draw_planes({"crop": grey, "features": volume}, tmp_path / f"{name}.png", (1.0, 1.0, 1.0))
    pictures = {n: np.asarray(Image.open(tmp_path / f"{n}.png").convert("RGB")) for n in ("rgb", "channels")}
    assert (pictures["rgb"] == (255, 0, 0)).all(-1).sum() > 10_000
    assert np.ptp(pictures["channels"], axis=2).max() == 0
    assert pictures["channels"].shape[0] > 2.5 * pictures["rgb"].shape[0]  # three channels: three times the rows
