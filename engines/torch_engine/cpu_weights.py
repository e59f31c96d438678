"""Matrices in 4 or 8 bits, in groups of 32 inputs, as native/linear.h reads them.

    weight = scale * code + offset      a scale and an offset of 16 bits for each output and group

A matrix that was 4 or 8 bits once, as those of a GGUF file are, is found on its own grid again and
loses nothing; any other one gets the 8 bits that suit it best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

GROUP_INPUTS = 32
PANEL_OUTPUTS = 32
_STEP_INPUTS = 4
_NUM_STEPS = GROUP_INPUTS // _STEP_INPUTS

# Weights of a grid were multiplied out in float32: they miss it by their rounding, no more. In
# steps of the grid.
_GRID_TOLERANCE = 1e-4
# A group need not use its grid's lowest and highest code: 15 steps from one to the other, or fewer.
_MOST_CODES_4_BITS = 15
_OUTPUTS_PER_PASS = 4096


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """Codes and grid of a matrix of (num_outputs, num_inputs)."""

    bits: Literal[4, 8]
    codes: torch.Tensor  # (num_outputs, num_groups, 32), uint8
    scales: torch.Tensor  # (num_outputs, num_groups), float16
    offsets: torch.Tensor  # (num_outputs, num_groups), float16

    def dequantized(self) -> torch.Tensor:
        """Return the matrix that is computed with, float32."""
        scales, offsets = self.scales.float()[..., None], self.offsets.float()[..., None]
        matrix: torch.Tensor = (self.codes.float() * scales + offsets).flatten(1)
        return matrix

    def packed(self) -> torch.Tensor:
        """Return the panels, (num_panels, num_groups, bytes), uint8; zeros fill the last one."""
        num_outputs = len(self.codes)
        num_panels = -(-num_outputs // PANEL_OUTPUTS)

        def panels(values: torch.Tensor) -> torch.Tensor:
            padded = values.new_zeros(num_panels * PANEL_OUTPUTS, *values.shape[1:])
            padded[:num_outputs] = values
            by_panel: torch.Tensor = padded.unflatten(0, (num_panels, PANEL_OUTPUTS))
            return by_panel.transpose(1, 2)

        # (panels, groups, outputs, 32) -> (panels, groups, steps, outputs, 4)
        codes = panels(self.codes).unflatten(3, (_NUM_STEPS, _STEP_INPUTS)).transpose(2, 3)
        if self.bits == 4:
            low, high = codes.chunk(2, dim=2)
            codes = low | (high << 4)
        halves = torch.stack((panels(self.scales), panels(self.offsets)), dim=2)
        grid = halves.contiguous().view(torch.uint8).flatten(2)
        return torch.cat((grid, codes.flatten(2)), dim=2).contiguous()


def quantize(matrix: torch.Tensor) -> QuantizedMatrix:
    """Return a float32 matrix in 4 bits if its numbers lie on such grids, else in 8.

    The number of inputs is a multiple of 32.
    """
    parts = [_quantize_part(part) for part in matrix.split(_OUTPUTS_PER_PASS)]
    if any(part.bits == 8 for part in parts):
        pairs = zip(parts, matrix.split(_OUTPUTS_PER_PASS), strict=True)
        parts = [p if p.bits == 8 else _in_8_bits(_groups(m)) for p, m in pairs]
    return QuantizedMatrix(
        bits=parts[0].bits,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        offsets=torch.cat([part.offsets for part in parts]),
    )


def _quantize_part(matrix: torch.Tensor) -> QuantizedMatrix:
    groups = _groups(matrix)
    return _on_4_bit_grid(groups) or _in_8_bits(groups)


def _groups(matrix: torch.Tensor) -> torch.Tensor:
    groups: torch.Tensor = matrix.unflatten(1, (-1, GROUP_INPUTS))
    return groups


def _on_4_bit_grid(groups: torch.Tensor) -> QuantizedMatrix | None:
    """Return the 4-bit form of (num_outputs, num_groups, 32), if it has one without loss."""
    lowest, highest = groups.aminmax(dim=2)
    offsets = lowest.to(torch.float16)
    if not torch.equal(offsets.float(), lowest):
        # A group that does not use code 0 has no offset to be read off.
        return None
    scales = torch.zeros_like(offsets)
    is_open = torch.ones_like(lowest, dtype=torch.bool)
    for num_steps in range(_MOST_CODES_4_BITS, 0, -1):
        candidates = ((highest - lowest) / num_steps).to(torch.float16)
        is_found = is_open & (_distance(groups, candidates, lowest) <= _GRID_TOLERANCE)
        scales[is_found] = candidates[is_found]
        is_open &= ~is_found
        if not is_open.any():
            break
    else:
        return None
    return QuantizedMatrix(4, _codes(groups, scales, offsets, most=15), scales, offsets)


def _distance(groups: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return how far each group's numbers are from a grid at most, in steps of it."""
    steps = (groups - offsets[..., None]) / _divisors(scales)[..., None]
    return (steps - steps.round()).abs_().amax(dim=2)


def _in_8_bits(groups: torch.Tensor) -> QuantizedMatrix:
    # Q8_0's grid goes through 0 and has the same length on both sides.
    largest = groups.abs().amax(dim=2)
    scales = (largest / 127).to(torch.float16)
    offsets = scales * -128
    if _distance(groups, scales, torch.zeros_like(largest)).max() > _GRID_TOLERANCE:
        lowest, highest = groups.aminmax(dim=2)
        offsets = lowest.to(torch.float16)
        scales = ((highest - offsets.float()) / 255).to(torch.float16)
    return QuantizedMatrix(8, _codes(groups, scales, offsets, most=255), scales, offsets)


def _codes(
    groups: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, *, most: int
) -> torch.Tensor:
    steps = (groups - offsets.float()[..., None]) / _divisors(scales)[..., None]
    return steps.round_().clamp_(0, most).to(torch.uint8)


def _divisors(scales: torch.Tensor) -> torch.Tensor:
    """Return the scales, but 1 for a group of equal numbers, whose codes are all 0."""
    return torch.where(scales == 0, 1.0, scales.float())
