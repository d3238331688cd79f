"""The online probe tells good features from bad ones, asks about the right voxels, and leaves no trace in the run."""

from types import SimpleNamespace

import blosc2
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from tiny_dataset import CROP, write_dataset
from torch import nn

from nnssl_ext.data.cases import list_cases
from nnssl_ext.errors import NnsslError
from nnssl_ext.monitors import probe as module
from nnssl_ext.monitors.probe import Probe, class_weights, dice, is_labelled, linear, nearest

CPU = torch.device("cpu")


class Levels(nn.Module):
    """Stands for a backbone whose features are a function of the image."""

    network = token_size = None
    channels = strides = decoder_channels = divisor = encoder_prefixes = decoder_prefixes = ()

    def __init__(self, function):
        super().__init__()
        self.function, self.modes = function, []

    def forward_features(self, x):
        self.modes.append(self.training)
        return SimpleNamespace(levels=(self.function(x),))

    def forward_decoder(self, features):
        """Not asked."""


@pytest.fixture
def cases(tmp_path):
    folder = write_dataset(tmp_path) / "tiny_3d_fullres"
    return list_cases(folder, (1.0, 1.0, 1.0))


def test_features_that_hold_the_answer_score_high_and_noise_scores_low(cases):
    """The tiny dataset's label is a threshold of the image."""
    asked = Probe(cases, CROP)
    assert len(asked.teach) == len(asked.score) == 3
    knows = asked.say(Levels(lambda x: torch.cat((x, x**2), dim=1)), CPU)
    torch.manual_seed(0)
    guesses = asked.say(Levels(torch.randn_like), CPU)
    assert min(knows.values()) > 0.9
    assert max(guesses.values()) < 0.6


def test_points_see_their_own_voxel_at_any_stride(cases):
    """Features that are coordinates come back as coordinates: exact on the voxel grid, to half a voxel on a coarser one."""
    asked = Probe(cases, CROP)
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in CROP), indexing="ij")
    fine = torch.stack((z, y, x))[None]
    table, labels = asked._table(asked.teach, Levels(lambda _: fine), CPU)
    points = np.concatenate([crop.points for crop in asked.teach])
    assert np.allclose(table, points, atol=1e-4) and len(labels) == len(points)
    coarse = nn.functional.avg_pool3d(fine, 4)
    table, _ = asked._table(asked.teach, Levels(lambda _: coarse), CPU)
    inner = ((points >= 2) & (points <= 13)).all(axis=1)
    assert np.allclose(table[inner], points[inner], atol=1e-3)


def test_ignored_voxels_neither_teach_nor_are_scored(cases):
    """The tiny dataset's one label, called the ignored one: nothing is left to ask about."""
    assert not Probe(cases, CROP, ignore=1)
    assert all((crop.labels != 2).all() for crop in Probe(cases, CROP, ignore=2).teach)


def test_labels_are_those_under_the_points(cases):
    for crop in Probe(cases, CROP).teach:
        whole = blosc2.open(str(crop.case.folder / f"{crop.case.identifier}_seg.b2nd"))[0]
        places = crop.points + crop.lower
        assert (places >= 0).all() and (places < crop.case.shape).all()
        assert np.array_equal(whole[tuple(places.T)], crop.labels)
        assert len(crop.points) <= module.POINTS // (module.CASES // 2)


def test_the_run_is_not_disturbed(cases):
    backbone = Levels(lambda x: x).train()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    Probe(cases, CROP).say(backbone, CPU)
    assert torch.equal(torch.rand(4), expected)
    assert backbone.training and not any(backbone.modes)


def test_cases_without_foreground_and_damaged_ones(cases):
    path = cases[0].folder / f"{cases[0].identifier}_seg.b2nd"
    path.unlink()
    blosc2.asarray(np.zeros((1, *cases[0].shape), np.int8), urlpath=str(path))
    assert len(Probe(cases, CROP).teach + Probe(cases, CROP).score) == 5
    assert not Probe(cases[:1], CROP)
    path.write_bytes(b"not blosc2")
    with pytest.raises(NnsslError, match=cases[0].identifier):
        Probe(cases, CROP)


def test_classifiers_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.choice(3, size=600, p=(0.8, 0.15, 0.05))
    x = (rng.normal(size=(600, 5)) + 1.5 * np.eye(5)[labels]).astype(np.float32)
    taught, known, asked = torch.tensor(x[:400]), torch.tensor(labels[:400]), torch.tensor(x[400:])
    weights = dict(enumerate(class_weights(known).tolist()))
    total = sum(weights[label] for label in labels[:400])
    oracle = LogisticRegression(C=1 / (module.DECAY * total), class_weight=weights, max_iter=2000).fit(
        x[:400], labels[:400]
    )
    assert (linear(taught, known, asked).numpy() == oracle.predict(x[400:])).mean() > 0.99
    normed = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x[:400], x[400:])]

    def votes(distances):
        return np.exp((1 - distances**2 / 2) / module.TEMPERATURE)  # cosine from Euclidean distance

    plain = KNeighborsClassifier(module.NEIGHBOURS, weights=votes).fit(normed[0], labels[:400])
    share = plain.predict_proba(normed[1]) * class_weights(known).numpy()
    assert (nearest(taught, known, asked).numpy() == share.argmax(axis=1)).mean() > 0.99


def test_dice_by_hand_over_the_classes_that_occur():
    truth = torch.tensor([0, 0, 1, 1, 2, 2])
    answer = torch.tensor([0, 1, 1, 1, 2, 0])
    assert dice(answer, truth) == pytest.approx((2 * 2 / 5 + 2 * 1 / 3) / 2)
    assert np.isnan(dice(answer, torch.zeros(6, dtype=torch.long)))


@pytest.mark.parametrize(
    ("labels", "labelled"),
    [
        ({"background": 0, "liver": 1}, True),
        ({"background": 0, "foreground": 1}, False),  # what nnssl_convert foreground writes
        ({"background": 0}, False),
        ({"background": 0, "foreground": 1, "ignore": 2}, False),
        ({"background": 0, "foreground": 1, "tumour": 2}, True),
    ],
)
def test_label_free_foreground_is_no_label(labels, labelled):
    assert is_labelled({"labels": labels}) == labelled
