from __future__ import annotations

import ctypes

import pytest
import torch

from engines.torch_engine.cpu_library import Activations, Matrix, Workspace, load_library
from engines.torch_engine.cpu_weights import QuantizedMatrix, quantize


def on_grid(num_outputs: int, num_inputs: int, *, lowest: int, highest: int) -> torch.Tensor:
    """A matrix whose groups of 32 inputs are scale * code + offset, as a GGUF file's Q4_1 is, with
    16-bit scales and offsets and codes from `lowest` to `highest`."""
    generator = torch.Generator().manual_seed(3)
    shape = (num_outputs, num_inputs // 32)
    codes = torch.randint(lowest, highest + 1, (*shape, 32), generator=generator)
    scales = (torch.rand(shape, generator=generator) + 0.1).half().float()
    offsets = torch.randn(shape, generator=generator).half().float()
    codes[..., 0] = 0
    return (codes * scales[..., None] + offsets[..., None]).flatten(1)


def multiplied(matrix: QuantizedMatrix, rows: torch.Tensor, num_threads: int = 2) -> torch.Tensor:
    """Return `rows` times the matrix as the kernels compute it."""
    library = load_library()
    num_outputs, num_groups, _ = matrix.codes.shape
    panels = matrix.packed()
    thread_bytes = library.proserve_thread_bytes(num_groups * 32, 16, 1)
    codes = torch.empty(len(rows), num_groups * 32, dtype=torch.int8)
    scales, sums = torch.empty(2, len(rows), num_groups).unbind()
    memory = torch.empty(num_threads, thread_bytes, dtype=torch.uint8)
    work = Workspace(
        activations=Activations(codes.data_ptr(), scales.data_ptr(), sums.data_ptr()),
        thread_memory=memory.data_ptr(),
        thread_bytes=thread_bytes,
        num_threads=num_threads,
    )
    outputs = torch.empty(len(rows), num_outputs)
    structure = Matrix(panels.data_ptr(), num_outputs, num_groups * 32, matrix.bits)
    library.proserve_linear(
        structure, rows.data_ptr(), len(rows), ctypes.byref(work), outputs.data_ptr()
    )
    return outputs


@pytest.mark.parametrize("highest", [15, 11, 1])
def test_a_matrix_that_was_4_bits_once_is_found_again_without_loss(highest: int) -> None:
    """Also where a group uses but a part of its codes. A ten-thousandth of a step is rounding."""
    matrix = on_grid(40, 96, lowest=0, highest=highest)

    quantized = quantize(matrix)

    assert quantized.bits == 4
    torch.testing.assert_close(quantized.dequantized(), matrix, rtol=0, atol=1.1e-4)


def test_a_matrix_that_was_8_bits_around_zero_is_found_again_without_loss() -> None:
    """Q8_0: no offset, codes from -127 to 127."""
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-127, 128, (33, 2, 32), generator=generator)
    codes[..., 0] = 127
    scales = (torch.rand(33, 2, 1, generator=generator) + 0.1).half().float()

    quantized = quantize((codes * scales).flatten(1))

    assert quantized.bits == 8
    torch.testing.assert_close(
        quantized.dequantized(), (codes * scales).flatten(1), rtol=0, atol=1e-5
    )


def test_any_other_matrix_loses_at_most_half_a_step_of_its_range() -> None:
    """255 steps from the lowest to the highest number of a group, and the rounding of 16 bits."""
    matrix = torch.randn(70, 128, generator=torch.Generator().manual_seed(5)) + 0.5

    quantized = quantize(matrix)

    groups = matrix.unflatten(1, (-1, 32))
    step = (groups.amax(2) - groups.amin(2)) / 255
    error = (quantized.dequantized() - matrix).abs().unflatten(1, (-1, 32)).amax(2)
    assert quantized.bits == 8
    assert (error / step).max() < 1.0


def test_equal_numbers_and_zeros_stay_what_they_are() -> None:
    matrix = torch.zeros(32, 64)
    matrix[3] = 0.25

    assert torch.equal(quantize(matrix).dequantized(), matrix)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 13, 100])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_is_that_of_the_rounded_numbers(num_rows: int, bits: int) -> None:
    """77 outputs: the last panel is not full. The inputs are rounded to 127 steps on each side of
    zero; with inputs that are whole numbers from -127 to 127, nothing is lost."""
    if bits == 4:
        quantized = quantize(on_grid(77, 160, lowest=0, highest=15))
    else:
        quantized = quantize(torch.randn(77, 160, generator=torch.Generator().manual_seed(6)))
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(-127, 128, (num_rows, 160), generator=generator).float()
    rows[:, ::32] = 127.0

    outputs = multiplied(quantized, rows)

    assert quantized.bits == bits
    expected = (rows.double() @ quantized.dequantized().double().T).float()
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=2e-2)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_largest_sums_fit(bits: int, sign: float) -> None:
    """Outputs 0 to 32 have the highest code everywhere, or the lowest, against inputs of 127 or
    -127: no sum of 16 bits inside the kernels may overflow."""
    highest = 2**bits - 1
    codes = torch.zeros(66, 2, 32, dtype=torch.uint8)
    codes[:33] = highest
    scales, offsets = torch.ones(66, 2).half(), torch.zeros(66, 2).half()
    quantized = QuantizedMatrix(4 if bits == 4 else 8, codes, scales, offsets)

    outputs = multiplied(quantized, torch.full((7, 64), sign * 127))

    expected = torch.zeros(7, 66)
    expected[:, :33] = sign * 127 * 64 * highest
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("cpu_kernels")
def test_a_row_s_product_does_not_depend_on_its_neighbours_nor_on_threads() -> None:
    quantized = quantize(torch.randn(100, 64, generator=torch.Generator().manual_seed(8)))
    rows = torch.randn(23, 64, generator=torch.Generator().manual_seed(9))

    together = multiplied(quantized, rows)

    for index in range(23):
        assert torch.equal(multiplied(quantized, rows[index : index + 1], 1)[0], together[index])


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_that_is_no_number_makes_its_row_none_and_no_other(bad: float) -> None:
    quantized = quantize(torch.ones(40, 64))
    rows = torch.ones(3, 64)
    rows[1, 40] = bad

    outputs = multiplied(quantized, rows)

    assert outputs[1].isnan().all()
    assert outputs[[0, 2]].isfinite().all()
