"""Guidance: functions of the model's outputs, each citing its paper."""

import torch
from torch import Tensor


def classifier_free(e: Tensor, scale: Tensor, unconditional: Tensor, conditional: Tensor) -> Tensor:
    """ẽ = e_u + s (e_c - e_u) for each row of a mixed batch: Ho & Salimans 2022, equation 6 (with s = 1 + w).

    Args:
        e: [rows, …] the model's outputs. Rows of one sample stand together, in any order and number.
        scale: [rows] guidance scale s.
        unconditional, conditional: [rows] where each row's pair stands, counted from the row itself (-1, 0 or 1). A row
            that is its own pair (0, 0) is returned as it is, so that samples without guidance need no second row.
    Returns:
        [rows, …] the guided output, the same for all rows of a sample.
    """
    row = torch.arange(len(e), device=e.device)
    e_u, e_c = e[row + unconditional], e[row + conditional]
    return e_u + over(scale, e) * (e_c - e_u)


def over(scalars: Tensor, x: Tensor) -> Tensor:
    """[rows] shaped to multiply [rows, …]."""
    return scalars.view(-1, *[1] * (x.ndim - 1))
