"""What the frozen encoder knows, asked now and then of a few labelled cases: Dice of a linear and of a kNN classifier of
voxels, beside that of the same network with random weights. A falling pretraining loss is no proxy for it (dino.md 4).

Half of the cases teach, the others are scored. Classes are told apart at voxels on a regular grid; features are read
there from all encoder levels by linear interpolation. kNN follows DINO (Caron et al., arXiv:2104.14294, App. E): cosine
similarity, 20 neighbours, weights exp(similarity / .07); the linear probe is logistic regression. Both count a voxel by
the inverse square root of its class' frequency: Dice wants rare structures called at probabilities below one half.
Hippocampus, Primus with 4-voxel tokens: .12 with random weights, .27 after MAE; unweighted .00 and .03 (measured).
Labels never reach the training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import blosc2
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nnssl_ext.contracts import Backbone
from nnssl_ext.data.cases import damaged
from nnssl_ext.data.regions import read_region
from nnssl_ext.records import Case, Size
from nnssl_ext.registration.extraction import FeatureMap

CASES = 16
"""Labelled cases, half of them to teach; forward passes through them take seconds on a CPU."""
POINTS = 8192
"""At most so many voxels teach, and so many are scored, of all cases together; kNN compares each with each."""
MARGIN = 0.25
"""They lie on a grid over the box of the foreground, widened on each side by this share of its length; our choice."""
NEIGHBOURS, TEMPERATURE = 20, 0.07
DECAY = 1e-3
"""Weight of half the squared weights in the logistic regression, on standardised features; our choice."""


@dataclass(frozen=True)
class ProbeCase:
    """One labelled crop: where it lies, and the label at some of its voxels.

    Attributes:
        case: what to read.
        lower: case voxel of the crop's first voxel; it may be negative where the case is smaller than the crop.
        points: ``(N, 3)`` voxels z, y, x of the crop.
        labels: ``(N,)`` 0 = background.
    """

    case: Case
    lower: Size
    points: Int[np.ndarray, "N 3"]
    labels: Int[np.ndarray, " N"]


class Probe:
    """The labelled crops of a run, chosen once.

    Args:
        cases: candidates; those whose segmentation holds no foreground are passed over.
        size: voxels of the crops z, y, x, centred on the foreground.
        ignore: label of voxels that do not count, if there is one.
    """

    def __init__(self, cases: Sequence[Case], size: Size, ignore: int | None = None) -> None:
        chosen = [cases[i] for i in np.linspace(0, len(cases) - 1, min(CASES, len(cases))).round().astype(int)]
        found = [crop for case in chosen if (crop := _labelled_crop(case, size, ignore)) is not None]
        self.size = size
        self.teach, self.score = found[::2], found[1::2]

    def __bool__(self) -> bool:
        """Whether there is something to teach and to score."""
        return bool(self.teach and self.score)

    @torch.no_grad()
    def say(self, backbone: Backbone, device: torch.device) -> dict[str, float]:
        """``probe_dice`` and ``knn_dice``: Dice over all scored voxels, mean over the classes that occur among them.

        The backbone is left in the mode it was in; no random number of the run is used.
        """
        assert isinstance(backbone, nn.Module)
        was_training = backbone.training
        backbone.eval()
        taught, truth = self._table(self.teach, backbone, device)
        asked, expected = self._table(self.score, backbone, device)
        backbone.train(was_training)
        mean, std = taught.mean(dim=0), taught.std(dim=0).clamp(min=1e-6)
        taught, asked = (taught - mean) / std, (asked - mean) / std
        answers = {"probe_dice": linear(taught, truth, asked), "knn_dice": nearest(taught, truth, asked)}
        return {name: dice(answer, expected) for name, answer in answers.items()}

    def _table(
        self, crops: Sequence[ProbeCase], backbone: Any, device: torch.device
    ) -> tuple[Float[Tensor, "N C"], Int[Tensor, " N"]]:
        rows = []
        for crop in crops:
            voxels = torch.from_numpy(_read(crop, self.size))[None].to(device)
            points = torch.from_numpy(crop.points).to(device)
            levels = backbone.forward_features(voxels).levels
            rows.append(torch.cat([FeatureMap.over(self.size, level[0]).at(points) for level in levels], dim=1))
        labels = np.concatenate([crop.labels for crop in crops])
        return torch.cat(rows), torch.from_numpy(labels).to(device)


def linear(taught: Float[Tensor, "N C"], labels: Int[Tensor, " N"], asked: Float[Tensor, "M C"]) -> Int[Tensor, " M"]:
    """The classes that a logistic regression gives to `asked`. Features are standardised."""
    weight, bias = fit_linear(taught, labels, class_weights(labels))
    return (asked @ weight + bias).argmax(dim=1)


def fit_linear(
    taught: Float[Tensor, "N C"], labels: Int[Tensor, " N"], importance: Float[Tensor, " K"]
) -> tuple[Float[Tensor, "C K"], Float[Tensor, " K"]]:
    """Weights and biases of a logistic regression on standardised features.

    Args:
        importance: what a voxel of each class counts.
    """
    weight = torch.zeros(taught.shape[1], len(importance), device=taught.device, requires_grad=True)
    bias = torch.zeros(len(importance), device=taught.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (
            functional.cross_entropy(taught @ weight + bias, labels, weight=importance)
            + 0.5 * DECAY * weight.square().sum()
        )
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def nearest(
    taught: Float[Tensor, "N C"],
    labels: Int[Tensor, " N"],
    asked: Float[Tensor, "M C"],
    importance: Float[Tensor, " K"] | None = None,
) -> Int[Tensor, " M"]:
    """The classes that the weighted nearest neighbours among `taught` give to `asked`.

    Args:
        importance: what a voxel of each class counts; `class_weights` of the labels if None.
    """
    keys, queries = functional.normalize(taught, dim=1), functional.normalize(asked, dim=1)
    similarity, place = (queries @ keys.T).topk(min(NEIGHBOURS, len(keys)), dim=1)
    counts = class_weights(labels) if importance is None else importance
    votes = torch.zeros(len(asked), len(counts), device=asked.device)
    votes.scatter_add_(1, labels[place], (similarity / TEMPERATURE).exp() * counts[labels[place]])
    return votes.argmax(dim=1)


def class_weights(labels: Int[Tensor, " N"], population: Int[Tensor, " K"] | None = None) -> Float[Tensor, " K"]:
    """What a voxel of each class counts: the inverse square root of its class' frequency; 0 for one that does not occur.

    Args:
        population: voxels per class where `labels` were not drawn evenly from them: classes then count as if they were.
    """
    drawn = labels.bincount(minlength=0 if population is None else len(population))
    share = drawn / len(labels)
    if population is None:
        return torch.where(share > 0, share.clamp(min=1e-9).rsqrt(), 0.0)
    true = population / population.sum()
    return torch.where(drawn > 0, true.sqrt() / share.clamp(min=1e-9), 0.0)


def dice(answer: Int[Tensor, " M"], truth: Int[Tensor, " M"]) -> float:
    """Mean Dice over the foreground classes that occur in `truth`."""
    scores = []
    for label in truth.unique().tolist():
        if label > 0:
            both = ((answer == label) & (truth == label)).sum()
            scores.append(float(2 * both / ((answer == label).sum() + (truth == label).sum())))
    return sum(scores) / len(scores) if scores else float("nan")


LABEL_FREE = "a foreground mask made without labels does not count"
RENAME = "take a labelled data set; where 'foreground' is a label of yours, give it another name in dataset.json"


def is_labelled(dataset_json: dict[str, Any]) -> bool:
    """Whether a dataset has labels beyond the label-free foreground that `nnssl_convert` writes for image-only data."""
    return set(dataset_json.get("labels", {})) - {"background", "ignore"} not in (set(), {"foreground"})


def _labelled_crop(case: Case, size: Size, ignore: int | None = None) -> ProbeCase | None:
    """The crop around the middle of a case's foreground, with voxels on a grid over the foreground's box and a margin."""
    segmentation = _segmentation(case)
    inside = np.argwhere((segmentation > 0) & (segmentation != ignore))
    if not len(inside):
        return None
    start, end = inside.min(axis=0), inside.max(axis=0) + 1
    room = np.array(case.shape) - size
    lower = np.where(room >= 0, np.clip((start + end - size) // 2, 0, np.maximum(room, 0)), room // 2)
    margin = np.ceil(MARGIN * (end - start)).astype(int)
    start = np.maximum(start - margin, np.maximum(lower, 0))
    end = np.minimum(end + margin, np.minimum(lower + size, case.shape))
    stride = 1
    while np.prod(-(-(end - start) // stride)) > POINTS // (CASES // 2):
        stride += 1
    axes = (np.arange(a, b, stride) for a, b in zip(start, end, strict=True))
    places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    places = places[segmentation[tuple(places.T)] != ignore]
    labels = np.maximum(segmentation[tuple(places.T)], 0).astype(np.int64)  # -1: outside nnU-Net's nonzero mask
    return ProbeCase(case, (int(lower[0]), int(lower[1]), int(lower[2])), places - lower, labels)


def _segmentation(case: Case) -> Int[np.ndarray, "Z Y X"]:
    path = case.folder / f"{case.identifier}_seg.b2nd"
    try:
        return np.asarray(blosc2.open(urlpath=str(path), mode="r")[0])
    except Exception as error:  # blosc2 raises bare RuntimeErrors
        raise damaged(case.folder, f"{case.identifier}_seg", error) from error


def _read(crop: ProbeCase, size: Size) -> Float[np.ndarray, "C Z Y X"]:
    """The crop's voxels, zero outside the case."""
    lower = np.array(crop.lower)
    start, end = np.maximum(lower, 0), np.minimum(lower + size, crop.case.shape)
    region = read_region(crop.case, tuple(start.tolist()), tuple(end.tolist()))
    voxels = np.zeros((crop.case.channels, *size), np.float32)
    voxels[(slice(None), *(slice(a, b) for a, b in zip(start - lower, end - lower, strict=True)))] = region.voxels
    return voxels
