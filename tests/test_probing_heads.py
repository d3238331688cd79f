"""The heads: each is what its formula says, in voxels and in volumes, and the voxels that teach stand for the cases."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from nnssl_ext.monitors import probe as online
from nnssl_ext.monitors.probe import class_weights, nearest
from nnssl_ext.probing import heads
from nnssl_ext.probing.heads import LinearHead, NonlinearHead, project, soft_dice, teach_linear, teach_nonlinear
from nnssl_ext.probing.run import _everywhere, query_stride
from nnssl_ext.probing.settings import ProbeSettings
from nnssl_ext.probing.table import Table, build_table, draw_voxels
from nnssl_ext.records import Case, Region
from nnssl_ext.registration.extraction import FeatureMap

CPU = torch.device("cpu")
SIZE = (8, 12, 16)
CHANNELS = (3, 5, 4)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pyramid() -> list[FeatureMap]:
    """Three levels with strides 1, 2 and (4, 4, 8)."""
    sizes = (SIZE, (4, 6, 8), (2, 3, 2))
    return [FeatureMap.over(SIZE, noise(c, *n, seed=c)) for c, n in zip(CHANNELS, sizes, strict=True)]


def every_voxel() -> torch.Tensor:
    return torch.cartesian_prod(*map(torch.arange, SIZE))


class TestLevels:
    def test_nearest_is_the_cell_of_the_voxel(self):
        """vox2vec's lookup: voxel // stride, per axis."""
        for level in pyramid():
            stride = torch.tensor(level.stride).long()
            cells = every_voxel() // stride
            expected = level.values[(slice(None), *cells.T)].T
            assert torch.equal(level.at(every_voxel(), "nearest"), expected)

    def test_linear_is_torch_s_own_resizing(self):
        for level in pyramid():
            resized = functional.interpolate(level.values[None], SIZE, mode="trilinear", align_corners=False)[0]
            assert torch.allclose(level.at(every_voxel()), resized.flatten(1).T, atol=1e-5)
            assert torch.allclose(level.on_grid(SIZE), resized, atol=1e-5)


class TestPyramidHeads:
    def heads(self) -> list:
        torch.manual_seed(0)
        return [LinearHead(CHANNELS, 3).eval(), NonlinearHead(CHANNELS, 3, 6).eval()]

    @pytest.mark.parametrize("mode", ["linear", "nearest"])
    def test_layers_before_the_interpolation_change_nothing(self, mode):
        """1x1x1 convolutions at each level's own resolution are those at every voxel."""
        points = every_voxel()
        for head in self.heads():
            voxel_by_voxel = head([level.at(points, mode) for level in pyramid()])
            dense = head.combine([level.at(points, mode) for level in project(head, pyramid())])
            assert torch.allclose(voxel_by_voxel, dense, atol=1e-5)

    def test_the_linear_head_is_vox2vec_s(self):
        """A 1x1x1 convolution per level, nearest upsampling from coarse to fine, and sums."""
        head, levels = self.heads()[0], pyramid()
        logits = None
        for lateral, level in reversed(list(zip(head.laterals, levels, strict=True))):
            mine = functional.conv3d(level.values[None], lateral.weight[:, :, None, None, None], lateral.bias)
            if logits is not None:
                mine = mine + functional.interpolate(logits, mine.shape[2:], mode="nearest")
            logits = mine
        ours = head([level.at(every_voxel(), "nearest") for level in levels])
        assert torch.allclose(ours, logits[0].flatten(1).T, atol=1e-5)

    def test_the_non_linear_head_by_hand(self):
        """Coarse to fine: x = block(x + level), each block x + W relu(norm(W relu(norm(x))))."""
        head, rows = self.heads()[1], [noise(7, c, seed=c) for c in CHANNELS]

        def block(module, x):
            first, second = module.layers[2], module.layers[5]
            scale = (1 + 1e-5) ** -0.5  # fresh running statistics: mean 0, variance 1, eps 1e-5
            return x + second((first((x * scale).relu()) * scale).relu())

        brought = [lateral(row) for lateral, row in zip(head.laterals, rows, strict=True)]
        x = block(head.blocks[2], brought[2])
        x = block(head.blocks[1], x + brought[1])
        x = block(head.blocks[0], x + brought[0])
        assert torch.allclose(head(rows), head.out(x), atol=1e-5)


class TestTeaching:
    def voxels(self, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
        rng = np.random.default_rng(seed)
        labels = rng.choice(3, size=500, p=(0.6, 0.3, 0.1))
        x = (rng.normal(size=(500, 6)) + 1.2 * np.eye(6)[labels]).astype(np.float32)
        return [torch.tensor(x[:, :2]), torch.tensor(x[:, 2:])], torch.tensor(labels)

    def test_linear_agrees_with_scikit_learn(self):
        rows, labels = self.voxels()
        importance = torch.tensor([0.5, 1.0, 3.0])
        x = torch.cat(rows, dim=1).numpy()
        total = float(importance[labels].sum())
        oracle = LogisticRegression(
            C=1 / (online.DECAY * total), class_weight=dict(enumerate(importance.tolist())), max_iter=5000, tol=1e-8
        ).fit(x, labels)
        head = teach_linear(rows, labels, importance)
        assert np.abs(head(rows).softmax(dim=1).numpy() - oracle.predict_proba(x)).max() < 0.01
        assert all(lateral.bias is None for lateral in head.laterals[1:])

    def test_the_non_linear_head_learns_what_is_not_linear(self):
        """Exclusive or of two levels."""
        rng = np.random.default_rng(0)
        x = torch.tensor(rng.normal(size=(4000, 2)).astype(np.float32))
        labels = (x[:, 0] * x[:, 1] > 0).long()
        rows, even = [x[:, :1], x[:, 1:]], torch.ones(2)
        settings = ProbeSettings(iterations=400, batch_size=256, width=16)
        state = torch.get_rng_state()
        head = teach_nonlinear(rows, labels, even, even, settings, seed=1)
        assert torch.equal(state, torch.get_rng_state())
        test = torch.tensor(rng.normal(size=(1000, 2)).astype(np.float32))
        truth = (test[:, 0] * test[:, 1] > 0).long()
        asked = [test[:, :1], test[:, 1:]]
        assert (head(asked).argmax(dim=1) == truth).float().mean() > 0.9
        linear = teach_linear(rows, labels, even)
        assert (linear(asked).argmax(dim=1) == truth).float().mean() < 0.65
        again = teach_nonlinear(rows, labels, even, even, settings, seed=1)
        assert torch.equal(again(asked), head(asked))

    def test_the_non_linear_head_minds_importance_in_one_loss_and_numbers_in_the_other(self, monkeypatch):
        """And its rate falls along half of a cosine."""
        weights, counts, rates = [], [], []
        cross_entropy, dice, step = functional.cross_entropy, heads.soft_dice, torch.optim.Adam.step

        def seen_cross_entropy(*arguments, weight=None):
            weights.append(weight)
            return cross_entropy(*arguments, weight=weight)

        monkeypatch.setattr(functional, "cross_entropy", seen_cross_entropy)
        monkeypatch.setattr(heads, "soft_dice", lambda *a: counts.append(a[2]) or dice(*a))
        monkeypatch.setattr(
            torch.optim.Adam, "step", lambda adam: rates.append(adam.param_groups[0]["lr"]) or step(adam)
        )
        importance, represents = torch.tensor([0.5, 2.0]), torch.tensor([30.0, 1.0])
        settings = ProbeSettings(iterations=4, batch_size=8, width=4, lr=0.1)
        teach_nonlinear([noise(20, 3)], torch.arange(20) % 2, importance, represents, settings, 0)
        assert len(weights) == len(counts) == 4
        assert all(torch.equal(weight, importance) for weight in weights)
        assert all(torch.equal(count, represents) for count in counts)
        assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])

    def test_dice_makes_the_non_linear_head_prefer_the_foreground(self):
        """Of voxels that all look alike, half of each class, cross-entropy alone would call one half either class."""
        rows, labels, even = [torch.zeros(400, 1)], torch.arange(400) % 2, torch.ones(2)
        settings = ProbeSettings(iterations=200, batch_size=200, width=4, lr=0.01)
        head = teach_nonlinear(rows, labels, even, even, settings, 0)
        assert head([torch.zeros(1, 1)]).softmax(1)[0, 1] > 0.53

    def test_soft_dice_by_hand(self):
        """Two classes; each background voxel stands for 3, each foreground voxel for 1."""
        probabilities = torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.9, 0.1]])
        labels = torch.tensor([1, 1, 0])
        both, sums = 0.8 + 0.4, (0.8 + 0.4 + 3 * 0.1) + 2
        found = soft_dice(probabilities, labels, torch.tensor([3.0, 1.0]))
        assert float(found) == pytest.approx(2 * both / sums)
        assert float(soft_dice(probabilities, torch.zeros(3, dtype=torch.long), torch.ones(2))) == 1

    def test_soft_dice_of_a_draw_is_that_of_all_voxels(self):
        """Drawn by class, weighted by what they stand for: the same Dice in the mean of many draws."""
        rng = np.random.default_rng(0)
        labels = torch.tensor(rng.choice(3, size=20000, p=(0.9, 0.07, 0.03)))
        probabilities = torch.tensor(rng.dirichlet((2, 1, 1), 20000).astype(np.float32))
        whole = float(soft_dice(probabilities, labels, torch.ones(3)))
        draws = []
        for _ in range(30):
            chosen = np.concatenate([rng.permutation(np.flatnonzero(labels == k))[:400] for k in range(3)])
            represents = labels.bincount() / 400.0
            draws.append(float(soft_dice(probabilities[chosen], labels[chosen], represents)))
        assert np.mean(draws) == pytest.approx(whole, rel=0.02)
        assert abs(float(soft_dice(probabilities[chosen], labels[chosen], torch.ones(3))) / whole - 1) > 0.2


class TestVoxelsThatTeach:
    def region(self, seed: int = 0) -> Region:
        rng = np.random.default_rng(seed)
        labels = rng.choice(4, size=SIZE, p=(0.9, 0.06, 0.0, 0.04)).astype(np.int16)
        case = Case("a", Path(), 1, SIZE, (1.0, 1.0, 1.0))
        return Region(rng.normal(size=(1, *SIZE)).astype(np.float32), (0, 0, 0), case, labels)

    def test_half_are_background_and_classes_share_the_rest(self):
        labels = self.region().labels
        points, values = draw_voxels(labels, 60, None, np.random.default_rng(1))
        assert np.array_equal(np.bincount(values, minlength=4), [30, 15, 0, 15])
        assert len(np.unique(points, axis=0)) == 60 and np.array_equal(labels[tuple(points.T)], values)

    def test_ignored_voxels_neither_teach_nor_count(self):
        region = self.region()
        table = self.table([region], ignore=3)
        assert 3 not in table.labels and table.population[3] == 0
        assert table.population.sum() == (region.labels != 3).sum()

    def table(self, regions: list[Region], ignore: int | None = None, voxels: int = 400) -> Table:
        def describe(volume):
            return [FeatureMap.over(SIZE, torch.cat((volume, volume**2)))]

        settings = ProbeSettings(voxels=voxels)
        return build_table(regions, len(regions), 4, ignore, describe, settings, 0, CPU)

    def test_rows_are_the_standardised_features_of_their_voxels(self):
        table = self.table([self.region(0), self.region(1)])
        assert torch.allclose(table.rows[0].mean(dim=0), torch.zeros(2), atol=1e-5)
        assert torch.allclose(table.rows[0].std(dim=0), torch.ones(2), atol=1e-5)
        raw = table.rows[0] * table.std[0] + table.mean[0]
        assert torch.allclose(raw[:, 1], raw[:, 0] ** 2, atol=1e-4)
        volume = FeatureMap.over(SIZE, torch.stack([raw[0]] * 2, dim=1)[:, :, None, None].expand(2, 2, 1, 1))
        standardised = table.standardise([volume])[0].at(torch.zeros(1, 3, dtype=torch.long))
        assert torch.allclose(standardised[0], table.rows[0][0], atol=1e-4)

    def test_counting_undoes_the_draw(self):
        """A class counts with the square root of its share of all voxels, as if drawn evenly and then weighted."""
        table = self.table([self.region()])
        counted = table.labels.bincount(minlength=4) * table.importance
        share = (table.population / table.population.sum()).sqrt()
        assert torch.allclose(counted / counted.sum(), share / share.sum(), atol=1e-6)
        assert table.importance[2] == 0 and table.represents[2] == 0
        assert torch.allclose(table.represents * table.labels.bincount(minlength=4), table.population.float())
        even = torch.tensor([0, 0, 0, 1])
        assert torch.allclose(class_weights(even), class_weights(even, torch.tensor([3, 1])))


class TestEveryVoxel:
    def test_in_chunks_and_on_a_grid(self):
        size = (5, 6, 7)
        volume = torch.arange(5 * 6 * 7).view(size)

        def lookup(points):
            return volume[tuple(points.T)]

        assert torch.equal(_everywhere(lookup, size, 16, 1, CPU), volume)
        coarse = _everywhere(lookup, size, 16, 3, CPU)
        z, y, x = (np.minimum(np.arange(n) // 3 * 3 + 1, n - 1) for n in size)  # middles of cells of 3
        assert np.array_equal(coarse.numpy(), volume.numpy()[np.ix_(z, y, x)])
        assert query_stride((35, 51, 35)) == 1 and query_stride((200, 200, 200)) == 4

    def test_neighbours_vote_with_the_importance_they_are_given(self):
        keys = torch.tensor([[1.0, 0.0], [1.0, 0.01], [1.0, 0.02]])
        labels, asked = torch.tensor([0, 0, 1]), torch.tensor([[1.0, 0.0]])
        assert nearest(keys, labels, asked, torch.tensor([1.0, 1.0])).item() == 0
        assert nearest(keys, labels, asked, torch.tensor([1.0, 3.0])).item() == 1
