"""The leading eigenvalue of J, per sample, from products with J^T."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract.errors import NonFiniteError
from .packing import Packing
from .progress import Apply


@dataclass(frozen=True)
class LeadingEigenvalue:
    """An estimate of the eigenvalue of largest modulus.

    Attributes:
        radius: its modulus, shape (B,).
        vector: the real part of its Ritz vector, of norm one, shape (B, D). It is a good start for
            another search.
        residual: ||J^T y - theta y|| / |theta| of the Ritz pair (theta, y), shape (B,).
        n_vjp: the number of products.
    """

    radius: Tensor
    vector: Tensor
    residual: Tensor
    n_vjp: int


def leading_eigenvalue(
    apply: Apply, start: Tensor, *, tol: float, max_vjp: int, basis: int
) -> LeadingEigenvalue:
    """Find the eigenvalue of largest modulus by restarted Arnoldi iteration.

    Source: Saad 1980, "Variations on Arnoldi's method for computing eigenelements of large
    unsymmetric matrices". It is power iteration that keeps its last `basis` vectors, for as many
    products. Plain power iteration and Rayleigh quotients swing forever between the eigenvalues of
    a complex pair, of a pair of opposite sign, or of a cluster. Here these are eigenvalues of the
    small matrix like any other.

    Args:
        apply: x -> J^T x, on rows of shape (B, D).
        start: the vectors to start from, shape (B, D). No row is zero.
        tol: the Ritz residual to reach in every sample.
        max_vjp: the largest number of products.
        basis: the number of vectors that are kept.

    Raises:
        NonFiniteError: if a product is NaN or infinite.
    """
    vector = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)
    n_vjp = 0
    while True:
        length = min(basis, start.shape[1], max_vjp - n_vjp)
        vectors, hessenberg, below = _arnoldi(apply, vector, length)
        n_vjp += length
        if not torch.isfinite(hessenberg).all():
            raise NonFiniteError(
                f"a vector-Jacobian product became NaN or infinite within {n_vjp} products of the "
                "search for the leading eigenvalue: the derivative of F is not finite at this "
                "state. Look in F for a division, a root or a logarithm at zero, or an overflow"
            )
        values, coordinates = torch.linalg.eig(hessenberg)
        leading = values.abs().argmax(dim=1)
        radius = values.abs().gather(1, leading[:, None]).squeeze(1)
        ritz = coordinates.gather(2, leading[:, None, None].expand(-1, length, 1)).squeeze(2)
        residual = below * ritz[:, -1].abs()
        residual = torch.where(residual > 0, residual / radius, 0)
        real = (ritz.real[:, None] @ vectors).squeeze(1)
        imaginary = (ritz.imag[:, None] @ vectors).squeeze(1)
        # The phase of an eigenvector is arbitrary. The larger of its two parts is the safer start.
        norms = [torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in (real, imaginary)]
        vector = torch.where(norms[0] >= norms[1], real, imaginary)
        vector = vector / torch.maximum(*norms)
        if n_vjp >= max_vjp or (residual <= tol).all():
            return LeadingEigenvalue(radius, vector, residual, n_vjp)


def _arnoldi(apply: Apply, start: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return an orthonormal basis Q, H = Q^T J^T Q, and the norm of the last product outside of Q.

    Their shapes are (B, n, D), the vectors as rows, (B, n, n) and (B,), with n = `length`.
    """
    batch, size = start.shape
    vectors = start.new_zeros(batch, length + 1, size)
    hessenberg = start.new_zeros(batch, length, length)
    vectors[:, 0] = start
    below = start.new_zeros(batch)
    for j in range(length):
        image = apply(vectors[:, j])
        scale = torch.linalg.vector_norm(image, dim=1)
        for _ in range(2):
            part = (vectors[:, : j + 1] @ image[:, :, None]).squeeze(2)
            image = image - (part[:, None] @ vectors[:, : j + 1]).squeeze(1)
            hessenberg[:, : j + 1, j] += part
        below = torch.linalg.vector_norm(image, dim=1)
        # In an invariant space nothing is left but rounding, which is no direction.
        below = torch.where(below > 10 * torch.finfo(image.dtype).eps * scale, below, 0)
        if j + 1 < length:
            hessenberg[:, j + 1, j] = below
        vectors[:, j + 1] = torch.where(
            (below > 0)[:, None], image / torch.where(below > 0, below, 1)[:, None], 0
        )
    return vectors[:, :length], hessenberg, below


def random_start(packing: Packing) -> Tensor:
    """Return Gaussian rows, shape (B, D): the same each time, and off the global generator."""
    generator = torch.Generator("cpu").manual_seed(0)
    size = packing.rows, packing.columns
    start = torch.randn(size, generator=generator, dtype=packing.dtype, device="cpu")
    return start.to(packing.device)
