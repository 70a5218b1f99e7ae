"""The leading directions of several updates, against dense second moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nora_diffusion.training.bases.moments import Learned, learned_pairs

D_OUT, D_IN = {"a": 9, "b": 6}, {"a": 7, "b": 10}


def random_subject(seed: int, k: int = 2, scale: float = 1.0) -> dict[str, Learned]:
    g = torch.Generator().manual_seed(seed)
    return {
        path: Learned(
            torch.randn(k, D_IN[path], generator=g), scale * torch.randn(D_OUT[path], k, generator=g),
            torch.randn(k, D_IN[path], generator=g),
        )
        for path in D_OUT
    }  # fmt: skip


def leading(moment: Tensor, r: int) -> Tensor:
    """The projection onto the ``r`` leading eigenvectors."""
    vectors = torch.linalg.eigh(moment).eigenvectors[:, -r:]
    return vectors @ vectors.T


def norm(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack([part.norm() for part in parts.values()]).norm()


def test_pairs_are_the_leading_eigenvectors_of_the_second_moments() -> None:
    subjects, r = [random_subject(seed, scale=10.0**seed) for seed in range(3)], 3
    pairs = learned_pairs(subjects, dict.fromkeys(D_OUT, r))
    for path in D_OUT:
        left, right = torch.zeros(D_OUT[path], D_OUT[path]).double(), torch.zeros(D_IN[path], D_IN[path]).double()
        for subject in subjects:
            dense = {p: (u.up @ u.down).double() for p, u in subject.items()}
            moved = {p: (u.up @ (u.down - u.start)).double() for p, u in subject.items()}
            left += dense[path] @ dense[path].T / norm(dense) ** 2
            right += moved[path].T @ moved[path] / norm(moved) ** 2
        down, up = (factor.double() for factor in pairs[path])
        torch.testing.assert_close(up @ up.T, leading(left, r), atol=1e-5, rtol=0)
        torch.testing.assert_close(down.T @ down, leading(right, r), atol=1e-5, rtol=0)
        torch.testing.assert_close(down @ down.T, torch.eye(r).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("subjects", [2, 5])
def test_a_common_subspace_is_recovered(subjects: int) -> None:
    """All subjects learn within two input and two output directions; their random starts lie anywhere."""
    g = torch.Generator().manual_seed(0)
    inputs, outputs = (torch.linalg.qr(torch.randn(d, 2, generator=g)).Q for d in (20, 15))

    def subject() -> dict[str, Any]:
        start = torch.randn(4, 20, generator=g)
        moved = torch.randn(4, 2, generator=g) @ inputs.T
        return {"a": Learned(start + moved, outputs @ torch.randn(2, 4, generator=g), start)}

    down, up = learned_pairs([subject() for _ in range(subjects)], {"a": 2})["a"]
    torch.testing.assert_close(down.T @ down, inputs @ inputs.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(up @ up.T, outputs @ outputs.T, atol=1e-5, rtol=0)
