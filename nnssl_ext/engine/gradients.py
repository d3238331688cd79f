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
    terms = [torch.autograd.grad(part, wanted, retain_graph=True, allow_unused=True) for part in pulling.values()]
    by_parameter = list(zip(*terms, strict=True))
    none = wanted[0].new_zeros(())
    lengths = torch.stack([torch.stack([none if g is None else g.norm() for g in row]) for row in by_parameter])
    # compiled graphs give zeros where nothing is reached; all processes must compare the same parameters
    reached = (cast(Tensor, fabric.all_reduce(lengths, reduce_op="sum")) > 0).all(dim=1).tolist()
    if not any(reached):
        return {}
    # Products of all terms, parameter by parameter: the gradients of a large network are held once, not copied.
    products = lengths.new_zeros(len(terms), len(terms))
    for row, parameter, shared in zip(by_parameter, wanted, reached, strict=True):
        if shared:
            pulls = torch.stack([(torch.zeros_like(parameter) if g is None else g).flatten() for g in row])
            pulls = cast(Tensor, fabric.all_reduce(pulls, reduce_op="mean"))
            products += torch.stack([pulls @ pull for pull in pulls])
    norms = products.diagonal().sqrt()
    shares = (norms / norms.sum()).tolist()
    units = norms.clamp(min=1e-12)
    cosines = (products / units[:, None] / units).tolist()
    names = list(pulling)
    return {
        **{f"grad_share_{name}": share for name, share in zip(names, shares, strict=True)},
        **{f"grad_cosine_{names[a]}_{names[b]}": cosines[a][b] for a, b in combinations(range(len(names)), 2)},
    }
