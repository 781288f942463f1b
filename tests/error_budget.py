"""The one tolerance of this project: an error budget in units of what eager PyTorch loses in the same dtype.

max|ours - reference| <= m * max|eager - reference|,     reference in float64, m = 2 forward, 5 backward
"""

import torch
from torch import Tensor

FORWARD, BACKWARD = 2.0, 5.0


def max_error(x: Tensor, reference: Tensor) -> float:
    """max|x - reference| in float64; NaN anywhere gives NaN."""
    if x.shape != reference.shape:
        raise AssertionError(f"shape {tuple(x.shape)} where the reference has {tuple(reference.shape)}")
    if x.numel() == 0:
        return 0.0
    return (x.detach().double() - reference.detach().double().to(x.device)).abs().max().item()


def assert_within_budget(ours: Tensor, eager: Tensor, reference: Tensor, m: float, name: str = "output") -> float:
    """Fail unless ours is within m times eager's own error; returns the ratio (at most m).

    One rounding of the largest reference value is the least budget: eager may happen to be exact.
    """
    if ours.dtype != eager.dtype:
        raise AssertionError(f"{name}: dtype {ours.dtype} where eager has {eager.dtype}")
    error = max_error(ours, reference)
    largest = reference.detach().abs().max().item() if reference.numel() else 0.0
    budget = max(max_error(eager, reference), torch.finfo(eager.dtype).eps / 2 * largest)
    if not error <= m * budget:  # written so that NaN fails
        raise AssertionError(f"{name}: error {error:.3e} exceeds {m} x {budget:.3e} (eager's own error)")
    return error / budget if budget else 0.0
