"""Geometry by numpy on the states themselves, and the largest tensor of a computation."""

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def entropy_rank(values: np.ndarray) -> float:
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def numpy_stats(x: np.ndarray) -> dict[str, float]:
    """All stats from the states themselves: numpy's covariance and SVD, and the full matrix of cosines."""
    x = x.astype(np.float64)
    eigenvalues = np.clip(np.linalg.eigvalsh(np.cov(x.T, bias=True)), 0, None)
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = units @ units.T
    return {
        "effective_rank": entropy_rank(eigenvalues),
        "rankme": entropy_rank(np.linalg.svd(x, compute_uv=False)),
        "participation_ratio": eigenvalues.sum() ** 2 / (eigenvalues**2).sum(),
        "cosine": cosines[~np.eye(len(x), dtype=bool)].mean(),
    }


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that an operator makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result
