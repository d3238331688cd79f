"""How much GPU memory a training step needs, from sizes alone. Loads no torch.

A step holds, per parameter, the fp32 weight, its gradient and AdamW's two moments, and per case every value that autograd
saves for the backward pass. The counts below follow the networks layer by layer (tests compare them with what torch really
saves). "Values" are numbers, not bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BYTES_PER_PARAMETER = {"fp32": 16, "bf16": 18}
"""fp32 weight, gradient, two AdamW moments; under autocast also the weight's bf16 copy."""
BYTES_PER_TEACHER_PARAMETER = 4
"""An EMA teacher holds a weight and neither gradient nor moments."""
BYTES_PER_VALUE = {"fp32": 4.0, "bf16": 2.5}
"""Under autocast most saved values take 2 bytes, the inputs of norms and the residual stream 4: 2.3-2.4 on average as
measured with CPU autocast, a little more with CUDA's, which computes LayerNorm in fp32."""
BYTES_PER_LOGIT = 18
"""Of a prototype: the bf16 logit, its float32 copy and the teacher's float32 target are saved (10 bytes, counted); when the
backward pass begins, float32 and bf16 gradients of the former come to them."""
OVERHEAD_GB = 1.0
"""CUDA context, cuDNN workspaces and allocator slack: our allowance."""
EXTRA_BYTES_PER_PROBABILITY = {"fp32": 0.0, "bf16": 3.5}
"""Swin's attention probabilities take 6 bytes instead of 2.5 under autocast: MONAI adds a float32 bias before the softmax,
whose float32 result and its bf16 copy are both kept (measured)."""
MLP_RATIO = 8 / 3
"""Hidden width of Primus' SwiGLU over its embedding (DNA: 4 * 2 / 3)."""


@dataclass(frozen=True)
class Views:
    """What a method holds in memory beside one network. The default is one view, as in masked autoencoding.

    Attributes:
        global_views, local_views: of the global and of the local crop from each case, with gradient.
        teacher: whether an EMA teacher copies network and heads.
        heads: trained parameters beside the network's.
        logits: prototypes that are compared, of all views and hidden tokens of a case.
    """

    global_views: int = 1
    local_views: int = 0
    teacher: bool = False
    heads: int = 0
    logits: int = 0


@dataclass(frozen=True)
class Cost:
    """What a network costs for one view.

    Attributes:
        parameters: of the whole network.
        values: saved for the backward pass, per case.
        macs: multiply-accumulates of the forward pass, per case.
        probabilities: how many of the values are attention probabilities that autocast keeps twice.
    """

    parameters: int
    values: int
    macs: int
    probabilities: int = 0


def memory_gb(
    cost: Cost, batch_size: int, *, local: Cost | None = None, views: Views = Views(), precision: str = "bf16"
) -> float:
    """Estimated peak of one training step in GB (1e9 bytes).

    Args:
        cost: of the network on one global crop.
        batch_size: cases per step.
        local: of the network on one local crop; needed if the method draws local views.
        views: what the method draws from each case.
        precision: ``fp32``, or ``bf16`` for autocast.
    """

    def saved(view: Cost) -> float:
        return view.values * BYTES_PER_VALUE[precision] + view.probabilities * EXTRA_BYTES_PER_PROBABILITY[precision]

    per_case = views.global_views * saved(cost) + (views.local_views * saved(local) if local else 0)
    per_case += views.logits * BYTES_PER_LOGIT
    per_parameter = BYTES_PER_PARAMETER[precision] + BYTES_PER_TEACHER_PARAMETER * views.teacher
    return OVERHEAD_GB + ((cost.parameters + views.heads) * per_parameter + batch_size * per_case) / 1e9


def largest_batch(fits: Callable[[int], bool], most: int, least: int = 2) -> int:
    """The largest batch size up to `most` that fits, never below `least` (nnU-Net's smallest batch)."""
    return max((size for size in range(least, most + 1) if fits(size)), default=least)


def network_cost(architecture: Mapping[str, Any], size: Sequence[int], channels: int, classes: int) -> Cost:
    """Cost of the network of a plans' ``architecture`` on an input of `size` voxels (z, y, x)."""
    name = architecture["network_class_name"].rsplit(".", 1)[-1]
    formula = {
        "SegmentationPrimus": primus_cost,
        "ResidualEncoderUNet": resenc_cost,
        "SegmentationSwinUNETR": swin_cost,
    }[name]
    return formula(architecture["arch_kwargs"], size, channels, classes)


def primus_cost(arch: Mapping[str, Any], size: Sequence[int], channels: int, classes: int) -> Cost:
    """`SegmentationPrimus` on all tokens, decoder with deep supervision included.

    Args:
        arch: its arguments as the plans name them; ``decoder_widths`` must be given.
    """
    width, depth = arch["embed_dim"], arch["eva_depth"]
    hidden = int(width * MLP_RATIO)
    inner, scaled = bool(arch.get("scale_attn_inner", True)), arch.get("init_values", 0.1) is not None
    strides, widths = arch["strides"][1:], arch["decoder_widths"]
    token = math.prod(math.prod(stride) for stride in strides)
    patch_tokens = math.prod(arch["input_shape"]) // token
    tokens = math.prod(size) // token
    prefix = arch.get("num_register_tokens", 0) + int(arch.get("class_token", False))
    sequence = tokens + prefix

    weights = 4 * width * width + 3 * width * hidden  # q, k, v, projection; gate, value, output
    biases = 3 * width + 2 * hidden + width
    norms = 2 * width * (3 if inner else 2) + 2 * hidden
    block = weights + biases + norms + (2 * width if scaled else 0)
    stem = channels * token * width + width
    parameters = stem + (patch_tokens + prefix) * width + depth * block + 2 * width

    # norm 1 in/out, rotated q and k, v, attention out (by head, by token), its norm, norm 2 in/out, LayerScale's two inputs;
    # gate, its SiLU, value, product, its norm; mean and deviation of each norm; attention's log-sum per head
    saved = (9 + inner + 2 * scaled) * width + 5 * hidden + 2 * (3 + inner) + arch["eva_numheads"]
    values = channels * math.prod(size) + sequence * (depth * saved + 2 * width + 2) + tokens * width
    macs = sequence * depth * weights + depth * 2 * sequence * sequence * width + tokens * channels * token * width

    voxels, before = tokens, width
    for stride, after in zip(reversed(strides), widths, strict=True):
        taps = math.prod(stride)
        parameters += before * after * taps + after + 2 * after + after * classes + classes
        macs += voxels * before * after * taps
        voxels *= taps
        values += voxels * (3 * after + 2)  # the norm's input, mean and deviation; the GELU's input and output
        macs += voxels * after * classes
        before = after
    return Cost(parameters, values, macs)


def resenc_cost(arch: Mapping[str, Any], size: Sequence[int], channels: int, classes: int) -> Cost:
    """nnU-Net's ``ResidualEncoderUNet`` with deep supervision, basic blocks, instance norm and in-place LeakyReLU."""
    parameters = values = macs = 0
    extent, skips = list(size), []

    def convolution(before: int, after: int, kernel: Sequence[int]) -> None:
        """With its norm, whose input is saved."""
        nonlocal parameters, values, macs
        taps = math.prod(kernel)
        parameters += before * after * taps + after * (3 if arch["conv_bias"] else 2)
        macs += math.prod(extent) * before * after * taps
        values += math.prod(extent) * after

    features = arch["features_per_stage"]
    kernels = [_triple(k) for k in arch["kernel_sizes"]]
    strides = [_triple(s) for s in arch["strides"]]
    values += channels * math.prod(size)
    convolution(channels, features[0], kernels[0])
    values += math.prod(extent) * features[0]  # LeakyReLU
    before = features[0]
    for after, kernel, stride, blocks in zip(features, kernels, strides, arch["n_blocks_per_stage"], strict=True):
        extent = [-(-edge // s) for edge, s in zip(extent, stride, strict=True)]
        for block in range(blocks):
            convolution(before, after, kernel)
            convolution(after, after, kernel)
            values += 2 * math.prod(extent) * after  # the two LeakyReLUs
            if block == 0 and before != after:
                if math.prod(stride) > 1:
                    values += math.prod(extent) * before  # pooled shortcut
                parameters += before * after + 2 * after  # a 1x1x1 convolution without bias, and its norm
                macs += math.prod(extent) * before * after
                values += math.prod(extent) * after
            before = after
        skips.append((after, list(extent)))
    for stage in range(len(features) - 2, -1, -1):
        after, extent = skips[stage]
        taps = math.prod(strides[stage + 1])
        parameters += before * after * taps + after
        macs += math.prod(extent) * before * after
        values += math.prod(extent) * 2 * after  # upsampled and skip, concatenated
        for index in range(_nth(arch["n_conv_per_stage_decoder"], len(features) - 2 - stage)):
            convolution(2 * after if index == 0 else after, after, kernels[stage])
            values += math.prod(extent) * after
        parameters += after * classes + classes
        macs += math.prod(extent) * after * classes
        before = after
    return Cost(parameters, values, macs)


def swin_cost(arch: Mapping[str, Any], size: Sequence[int], channels: int, classes: int) -> Cost:
    """`SegmentationSwinUNETR` with deep supervision, by MONAI 1.6's layers."""
    width, window = arch["feature_size"], arch["window_size"]
    voxels, extent = math.prod(size), [edge // 2 for edge in size]
    tokens = math.prod(extent)
    parameters, macs = 8 * channels * width + width, tokens * 8 * channels * width  # patches of 2 voxels
    values, probabilities = (
        channels * voxels + tokens * (2 * width + 2),
        0,
    )  # the image; the first map's norm, in and out
    for stage, (depth, heads) in enumerate(zip(arch["depths"], arch["num_heads"], strict=True)):
        dim = width * 2**stage
        edges = [min(window, edge) for edge in extent]
        seen = math.prod(edges)
        padded = math.prod(math.ceil(edge / w) * w for edge, w in zip(extent, edges, strict=True))
        # norms; q, k, v, projection; MLP of 4 times the width; bias per relative place and head
        parameters += depth * (
            4 * dim + 4 * dim * dim + 4 * dim + 8 * dim * dim + 5 * dim + (2 * window - 1) ** 3 * heads
        )
        macs += depth * (padded * 4 * dim * dim + 2 * padded * seen * dim + tokens * 8 * dim * dim)
        # both norms' input, deviations and the second's output; the MLP's hidden layer before and after its GELU; windows,
        # their q, k, v and the attention's output; int64 indices of the bias
        values += depth * (tokens * (11 * dim + 4) + padded * 5 * dim + 2 * seen * seen)
        probabilities += depth * heads * padded * seen
        extent = [edge // 2 for edge in extent]
        tokens = math.prod(extent)
        parameters += 16 * dim + 16 * dim * dim  # merging: 8 neighbours to twice the width, normed
        macs += tokens * 16 * dim * dim
        values += tokens * (16 * dim + 2 + 4 * dim + 2)  # norm and reduction; the map's norm, in and out

    def block(before: int, after: int, extent: int) -> None:
        """Two convolutions of 3x3x3 with norms and LeakyReLUs, and a 1x1x1 shortcut where the width changes."""
        nonlocal parameters, values, macs
        taps = 27 * (before + after) + (before if before != after else 0)
        parameters += taps * after
        macs += extent * taps * after
        values += extent * after * (5 if before != after else 4)

    block(channels, width, voxels)
    for stage in range(3):
        block(width * 2**stage, width * 2**stage, voxels // 8 ** (stage + 1))
    before = 16 * width
    block(before, before, voxels // 8**5)
    for stage, after in zip((4, 3, 2, 1, 0), (8 * width, 4 * width, 2 * width, width, width), strict=True):
        places = voxels // 8**stage
        parameters += 8 * before * after + after * classes + classes
        macs += places * (before * after + after * classes)
        values += places * 2 * after  # upsampled and skip, concatenated
        block(2 * after, after, places)
        before = after
    return Cost(parameters, values + probabilities, macs, probabilities)


def _triple(value: int | Sequence[int]) -> list[int]:
    return [value] * 3 if isinstance(value, int) else list(value)


def _nth(value: int | Sequence[int], index: int) -> int:
    return value if isinstance(value, int) else value[index]
