"""The projection head of DINO (arXiv:2104.14294, Sec. 3.1 and App. C), for crops and for tokens."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


@dataclass(frozen=True)
class HeadSettings:
    """Size of a `DINOHead`; the defaults are those of DINO, DINOv2 and 3DINO.

    Attributes:
        prototypes: K, outputs.
        hidden: width of the two hidden layers.
        bottleneck: width of the l2-normalised vector that is compared with the prototypes.
    """

    prototypes: int = 65_536
    hidden: int = 2048
    bottleneck: int = 256


class DINOHead(nn.Module):
    """Layer normalisation, three linear layers with GELU between, l2 normalisation, and one cosine per prototype, times a
    trainable gain.

    DINO's features come out of a layer normalisation; pooled ones do not, and are so short that the layers' biases would drown
    them within a few steps of Adam, after which all crops look the same. Hence the one at the entry.

    Args:
        channels: of the backbone's features.
    """

    def __init__(self, channels: int, settings: HeadSettings) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, settings.hidden),
            nn.GELU(),
            nn.Linear(settings.hidden, settings.hidden),
            nn.GELU(),
            nn.Linear(settings.hidden, settings.bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        last = nn.Linear(settings.bottleneck, settings.prototypes, bias=False)
        self.last_layer = weight_norm(last)
        self.last_layer.parametrizations.weight.original0.data.fill_(1.0)  # the gains

    def forward(self, features: Float[Tensor, "*shape C"]) -> Float[Tensor, "*shape K"]:
        """Logits, about cosines at the start."""
        # 1e-6, not torch's 1e-12, which is 0 in float16: a zero vector would become NaN
        return self.last_layer(F.normalize(self.mlp(self.norm(features)), dim=-1, eps=1e-6))
