"""GMRES that keeps its space, from which series and looser solves are read off without products.

What is solved, per sample: (I - J^T) x = v, where x and v have D elements.

1. Arnoldi's iteration (Arnoldi 1951) makes an orthonormal basis V, shape (D, m), of the vectors
   v, J^T v, ..., (J^T)^(m-1) v. It also makes H = V^T J^T V, shape (m, m).
2. A Neumann series of k <= m terms is a combination of these vectors, whatever its damping. So it
   is V y, and y, of shape (m,), follows from H alone: y <- e_0 + ((1 - lam) I + lam H) y, up to a
   factor. A series of more terms is that of H in place of J^T. It is as good an approximation as
   the solution in this space is.
3. Each iterate of GMRES, and so each looser solve, is V y too, with a y from H alone (`gmres`).
4. The eigenvalues of H (Ritz values) are those of J, as far as v sees them.
5. The cosine of V y to the solution x is y . (V^T x) / (|y| |x|), since V is orthonormal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gmres import Basis, gmres
from .progress import Apply, Progress, Solution

LENGTH = 50
"""The largest number of vectors of a space, which is as many as `gmres` keeps."""

_MOST_JUDGED = 128  # samples whose cosines are computed, a small dense problem each
_MOST_RITZ = 32  # samples whose eigenvalues are computed


class KrylovSpace:
    """An adjoint solver, see `SOLVERS`, that can tell afterwards what other methods would find.

    Every sample stops on its own, so that it gets the solution that it would get alone. Where the
    space leaves a residual above the solve's tolerance, `gmres` goes on.

    Args:
        aim: the residual to reach in the space, if it is less than the solve's tolerance.
        length: the largest number of vectors.
        goes_on: whether `gmres` goes on. The residual is told in either case.

    Attributes:
        usable: the samples that can be judged, shape (B,): those whose v is finite and not zero. It
            is empty where the state has no elements.
        columns: D, which bounds every space.
        gap: the true residual less the one that the space computes, shape (B,), at least 0. It is
            due to rounding.
    """

    def __init__(self, aim: float, length: int = LENGTH, goes_on: bool = True) -> None:
        self._aim, self._length, self._goes_on = aim, length, goes_on
        self.usable = torch.zeros(0, dtype=torch.bool, device="cpu")
        self.columns, self.gap = 0, torch.zeros(0, dtype=torch.float64, device="cpu")

    def __call__(self, apply: Apply, rhs: Tensor, tol: float, max_vjp: int) -> Solution:
        """Solve (I - J^T) x = rhs; see `SOLVERS`."""
        if rhs.numel() == 0:
            return gmres(apply, rhs, tol, max_vjp)
        progress = Progress(apply, rhs, tol, max_vjp)
        self._size: Tensor = torch.linalg.vector_norm(rhs, dim=1).cpu().double()
        self.usable, self.columns = self._size > 0, rhs.shape[1]
        length = min(self._length, max_vjp - 1, rhs.shape[1])
        basis = Basis(rhs, length)
        aim = min(self._aim, tol)
        self._build(progress, basis, aim, length)
        self._factorise()
        steps = self.steps_to(aim)
        x = basis.combination(self._iterate(steps).to(rhs))
        rest = rhs - x + progress.apply(x)
        norm = torch.linalg.vector_norm(rest, dim=1)
        self.gap = (norm.cpu().double() - self._residual_after(steps)).clamp(min=0)
        solved, at_rounding = bool((norm <= tol).all()), torch.zeros_like(norm, dtype=torch.bool)
        solution = Solution(x, norm, progress.n_vjp, norm[:, None], solved, at_rounding)
        if self._goes_on and not solution.converged and progress.remaining > 2:
            solution = self._continued(apply, progress, solution, rest, tol)
        self._place(basis, solution.x)
        return solution

    def _build(self, progress: Progress, basis: Basis, tol: float, length: int) -> None:
        """Make V and H, until every sample is solved in the space."""
        rhs, size = progress.rhs, self._size
        tiny, eps = torch.finfo(rhs.dtype).tiny, torch.finfo(rhs.dtype).eps
        norm = torch.linalg.vector_norm(rhs, dim=1, keepdim=True)
        last = basis.append(rhs, norm.clamp(min=tiny), None)
        hessenberg = size.new_zeros(len(size), length + 1, length)
        # u^T (I - H) = 0 with u_0 = 1, and 1 / |u| is the least residual, see `gmres`.
        u = torch.zeros_like(hessenberg[:, :, 0])
        u[:, 0] = 1
        running = self.usable.clone()
        for j in range(length):
            vector = progress.apply(last).clone()
            before = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
            first, second = (torch.cat(basis.subtract_projection(vector), 1) for _ in range(2))
            below = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
            # In an invariant space nothing is left but rounding, which is no direction.
            below = torch.where(below > 10 * eps * before, below, 0)
            column = torch.cat([first + second, below], dim=1).cpu().double()
            progress.check_finite((~column.isfinite().all(dim=1) & self.usable).tolist())
            hessenberg[:, : j + 2, j] = column
            column[:, j] -= 1  # the column of H - I; for u the sign does not matter
            u[:, j + 1] = -(u[:, : j + 1] * column[:, : j + 1]).sum(1) / column[:, j + 1]
            reached = size / torch.linalg.vector_norm(u[:, : j + 2], dim=1)
            running &= (column[:, j + 1] > 0) & ~(reached <= tol)
            u[~running] = 0  # it is not used any more, and may overflow
            self._hessenberg = hessenberg[:, : j + 2, : j + 1]
            if j + 1 == length or progress.remaining < 2 or not bool(running.any()):
                return
            last = basis.append(vector, below.clamp(min=tiny), below == 0)

    def _factorise(self) -> None:
        """Factorise I - H by QR, once for all iterates."""
        rows, columns = self._hessenberg.shape[1:]
        system = torch.eye(rows, columns, dtype=torch.float64, device="cpu") - self._hessenberg
        self._q, self._r = torch.linalg.qr(system)
        self._right = self._q[:, 0]  # Q^T e_0, the right-hand side for a v of norm one
        rest = 1 - self._right.square().cumsum(1)
        self._residual: Tensor = self._size[:, None] * rest.clamp(min=0).sqrt()

    def steps_to(self, tol: float) -> Tensor:
        """Return the number of vectors after which GMRES reaches a residual, shape (B,).

        Where it does not reach it in the space, that is the number of vectors there are, plus one.

        Args:
            tol: the residual.
        """
        above: Tensor = (self._residual > tol).sum(1)
        return 1 + above

    def _residual_after(self, steps: Tensor) -> Tensor:
        """Return the residual after so many vectors, shape (B,); at most after all there are."""
        at = steps.clamp(max=self._residual.shape[1]) - 1
        after: Tensor = self._residual.gather(1, at[:, None]).squeeze(1)
        return after

    def goes_again(self, tol: float) -> Tensor:
        """Return the samples in which a solve to `tol` would go on because of rounding, shape (B,).

        Args:
            tol: the residual that the solve is to reach.
        """
        return self._residual_after(self.steps_to(tol)) + self.gap > tol

    def _iterate(self, steps: Tensor) -> Tensor:
        """Return y, for GMRES's iterates V y after so many vectors, shape (B, m)."""
        columns = torch.arange(self._right.shape[1], device="cpu")
        right = torch.where(columns < steps[:, None], self._right, 0)
        y: Tensor = torch.linalg.solve_triangular(self._r, right[:, :, None], upper=True)
        # Where I - H is singular there is nothing better than v.
        broken = ~y.isfinite().all(dim=1)
        alone = torch.zeros_like(right)
        alone[:, 0] = 1
        iterate: Tensor = self._size[:, None] * torch.where(broken, alone, y.squeeze(2))
        return iterate

    @staticmethod
    def _continued(
        apply: Apply, progress: Progress, found: Solution, rest: Tensor, tol: float
    ) -> Solution:
        """Solve for the rest, in the samples that are not solved yet."""
        done = found.residual <= tol
        more = gmres(apply, rest.masked_fill(done[:, None], 0), tol, progress.remaining - 1)
        x = found.x + more.x
        residual = torch.linalg.vector_norm(progress.rhs - x + apply(x), dim=1)
        # The rest was found, and the sum is as far off as before: that is the rounding of products.
        rounded = ~done & (residual > tol) & ((more.residual <= tol) | more.at_rounding)
        trace = torch.where(done[:, None], found.residual[:, None], more.trace)
        return Solution(
            x,
            residual,
            found.n_vjp + more.n_vjp + 1,
            torch.cat([trace, residual[:, None]], dim=1),
            bool((residual <= tol).all()),
            rounded,
        )

    # --- what can be asked afterwards -------------------------------------------------------------

    def _place(self, basis: Basis, x: Tensor) -> None:
        """Keep the coordinates of the solution in the space, and its norm."""
        self._solution_norm = torch.linalg.vector_norm(x, dim=1).cpu().double()
        self._solution = torch.cat(basis.subtract_projection(x.clone()), dim=1).cpu().double()

    def series(self, lams: Sequence[float], terms: int) -> tuple[Tensor, Tensor]:
        """Judge damped Neumann series: their cosines to the solution, and how long they are.

        Both are of shape (lams, terms, n). Entry k - 1 of a factor is that of k terms. n counts the
        usable samples, at most 128 of them. Lengths are in those of the solution.

        Args:
            lams: the damping factors.
            terms: the largest number of terms.
        """
        at = self._some(_MOST_JUDGED)
        square = self._hessenberg[at, : self._hessenberg.shape[2]]
        factors = torch.tensor(lams, dtype=torch.float64, device="cpu")[:, None, None]
        start = torch.zeros_like(self._solution[at])
        start[:, 0] = 1
        y, cosines, lengths = start.expand(len(lams), *start.shape), [], []
        for _ in range(terms):
            cosines.append(self._cosine(y, at))
            lengths.append(torch.linalg.vector_norm(factors * y, dim=-1))
            image = torch.einsum("bij,lbj->lbi", square, y)
            y = start + (1 - factors) * y + factors * image
        unit = self._size[at] / self._solution_norm[at]
        return torch.stack(cosines, dim=1), unit * torch.stack(lengths, dim=1)

    def iterate_cosines(self, tol: float, most: int) -> Tensor:
        """Return the cosines of GMRES's iterates to the solution, for at most 128 usable samples.

        Args:
            tol: the residual at which GMRES stops.
            most: the number of vectors after which it stops in any case.
        """
        at = self._some(_MOST_JUDGED)
        return self._cosine(self._iterate(self.steps_to(tol).clamp(max=most))[at], at)

    def first_residual(self) -> Tensor:
        """Return the residual of x = v, which is ||J^T v||, shape (B,)."""
        left: Tensor = self._size * torch.linalg.vector_norm(self._hessenberg[:, :, 0], dim=1)
        return left

    def radii(self, lams: Sequence[float]) -> Tensor:
        """Return radii of damped maps, shape (lams, samples), for at most 32 usable samples.

        If J were normal, it would have an eigenvalue within the residual of each Ritz value. So the
        residual is subtracted. A radius of 1 or more is then not there by chance.

        Args:
            lams: the damping factors.
        """
        at = self._some(_MOST_RITZ)
        size = self._hessenberg.shape[2]
        matrix, below = self._hessenberg[at, :size], self._hessenberg[at, size, size - 1]
        values, vectors = torch.linalg.eig(matrix)
        residual = below[:, None] * vectors[:, -1].abs() / torch.linalg.vector_norm(vectors, dim=1)
        found = []
        for lam in lams:
            damped = (lam * values + 1 - lam).abs() - lam * residual
            found.append(damped.amax(dim=1))
        return torch.stack(found)

    def _some(self, most: int) -> Tensor:
        """Return the places of the usable samples, at most `most` of them.

        They are drawn at random, since batches may have a rhythm, as those balanced by class do.
        """
        at = torch.nonzero(self.usable).flatten()
        if len(at) <= most:
            return at
        generator = torch.Generator("cpu").manual_seed(0)
        return at[torch.randperm(len(at), generator=generator, device="cpu")[:most]]

    def _cosine(self, y: Tensor, at: Tensor) -> Tensor:
        """Return the cosines of V y to the solution, for the samples at `at`, shape (..., n)."""
        length = torch.linalg.vector_norm(y, dim=-1) * self._solution_norm[at]
        cosine: Tensor = (y * self._solution[at]).sum(-1) / length
        return cosine.clamp(max=1)  # rounding may exceed 1
