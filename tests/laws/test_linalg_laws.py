"""Solves with symmetric positive matrices: right, in place, and in more precision where float32 has no factor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flatq.errors import NumericsError
from flatq.linalg import damped, factor_, inverse, ridged_factor


def gram(size: int, condition: float, seed: int = 0) -> Tensor:
    """Symmetric positive with eigenvalues from 1 down to 1 / condition, float64."""
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()).Q
    return basis * torch.logspace(0, -float(torch.tensor(condition).log10()), size).double() @ basis.T


@pytest.mark.parametrize("size", [1, 2, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_inverse_times_its_matrix_is_the_identity(size: int, dtype: torch.dtype) -> None:
    c = gram(size, 100.0).to(dtype)
    found, shift = inverse(c, 0.01)
    product = found.double() @ (c.double() + shift * torch.eye(size).double())
    torch.testing.assert_close(product, torch.eye(size).double(), rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-9)


def test_a_factor_is_made_in_place() -> None:
    work, _ = damped(gram(20, 10.0), 0.1)
    place, expected = work.data_ptr(), torch.linalg.cholesky(work)
    factor = factor_(work)
    assert factor.data_ptr() == place
    torch.testing.assert_close(factor, expected)


def test_what_float32_cannot_factor_is_inverted_in_float64() -> None:
    twins = torch.ones(2, 2)  # two channels that always agree, and a ridge that float32 cannot add to 1
    found, shift = inverse(twins, 1e-9)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.linalg.inv(twins.double() + shift * torch.eye(2).double()))


def test_what_is_not_positive_is_told() -> None:
    with pytest.raises(NumericsError):
        inverse(-torch.eye(3), 0.0)


def test_a_matrix_of_zeros_is_shifted_by_one() -> None:
    found, shift = inverse(torch.zeros(3, 3), 0.01)
    assert shift == 1
    torch.testing.assert_close(found, torch.eye(3))


def test_a_gram_that_rounding_pushed_below_zero_gets_the_least_ridge_that_helps() -> None:
    c = gram(16, 100.0)
    lowest = float(torch.linalg.eigvalsh(c)[0])
    c = c - (lowest + 3e-5 * c.diagonal().mean()) * torch.eye(16)  # now reaches 3e-5 of the mean below zero
    factor, shift = ridged_factor(c, 1e-6)
    assert shift == pytest.approx(1e-4 * float(c.diagonal().mean()))
    torch.testing.assert_close(factor @ factor.T, c + shift * torch.eye(16))
    with pytest.raises(NumericsError):
        ridged_factor(-torch.eye(3), 1e-6)
