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
    gradients = []
    for part in pulling.values():
        found = torch.autograd.grad(part, wanted, retain_graph=True, allow_unused=True)
        gradients.append([torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)])
    lengths = torch.stack([torch.stack(torch._foreach_norm(row)) for row in gradients])
    # compiled graphs give zeros where nothing is reached; all processes must compare the same parameters
    reached = (cast(Tensor, fabric.all_reduce(lengths, reduce_op="sum")) > 0).all(dim=0).tolist()
    if not any(reached):
        return {}
    vectors = [torch.cat([g.flatten() for g, shared in zip(row, reached, strict=True) if shared]) for row in gradients]
    pulls = torch.stack([cast(Tensor, fabric.all_reduce(vector, reduce_op="mean")) for vector in vectors])
    norms = torch.linalg.vector_norm(pulls, dim=1)
    shares = (norms / norms.sum()).tolist()
    directions = nn.functional.normalize(pulls, dim=1)
    cosines = (directions @ directions.T).tolist()
    names = list(pulling)
    return {
        **{f"grad_share_{name}": share for name, share in zip(names, shares, strict=True)},
        **{f"grad_cosine_{names[a]}_{names[b]}": cosines[a][b] for a, b in combinations(range(len(names)), 2)},
    }
