"""How strongly, and how much against each other, the terms of a loss pull on what they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import cast

import torch
from jaxtyping import Float
from lightning_fabric import Fabric
from torch import Tensor, nn


def compare_gradients(
    fabric: Fabric, parts: Mapping[str, Float[Tensor, ""]], parameters: Iterable[nn.Parameter]
) -> dict[str, float]:
    """Compare the gradients of a loss's weighted terms on those parameters that every term reaches.

    Under data parallelism the gradients are means over processes, as the optimiser's are. The graph stays usable, and no
    parameter's ``grad`` is touched.

    Args:
        fabric: the processes.
        parts: terms that add up to the loss; those without gradient are left out.
        parameters: where to look.

    Returns:
        ``grad_share_<term>``: norm of the term's gradient over the sum of all terms' norms. ``grad_cosine_<a>_<b>``: cosine
        of two terms' gradients. Empty when fewer than two terms have a gradient, or when they share no parameter.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    pulling = {name: part for name, part in parts.items() if part.requires_grad}
    if len(pulling) < 2:
        return {}
    gradients = [torch.autograd.grad(p, wanted, retain_graph=True, allow_unused=True) for p in pulling.values()]
    shared = [row for row in zip(*gradients, strict=True) if all(g is not None for g in row)]
    if not shared:
        return {}
    vectors = [torch.cat([gradient.flatten() for gradient in column]) for column in zip(*shared, strict=True)]
    pulls = torch.stack([cast(Tensor, fabric.all_reduce(vector, reduce_op="mean")) for vector in vectors])
    norms = torch.linalg.vector_norm(pulls, dim=1)
    shares = (norms / norms.sum()).tolist()
    cosines = (nn.functional.normalize(pulls, dim=1) @ nn.functional.normalize(pulls, dim=1).T).tolist()
    names = list(pulling)
    return {
        **{f"grad_share_{name}": share for name, share in zip(names, shares, strict=True)},
        **{f"grad_cosine_{names[a]}_{names[b]}": cosines[a][b] for a, b in combinations(range(len(names)), 2)},
    }
