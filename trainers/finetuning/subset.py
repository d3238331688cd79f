"""Subsets of the training cases, for label-efficiency studies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnssl_ext.errors import NnsslError


def training_subset(cases: Sequence[str], count: int, seed: int) -> list[str]:
    """The first `count` of one permutation of `cases`, so that smaller subsets are contained in larger ones.

    The permutation depends on the names and the seed, not on the order in which they are given.

    Raises:
        NnsslError: there are fewer cases than asked for.
    """
    if count > len(cases):
        raise NnsslError(f"train_cases is {count}, but the fold has {len(cases)} training cases", "lower train_cases")
    names = sorted(cases)
    return [names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]]
