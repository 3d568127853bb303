"""Linear programmes written in named blocks of variables."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, sparse

Entry = tuple[Int[np.ndarray, "..."], Int[np.ndarray, "..."], "Float[np.ndarray, '...'] | float"]


def numbers(*shape: int) -> Int[np.ndarray, "..."]:
    """Numbers of as many rows as the shape has places, in their order."""
    return np.arange(math.prod(shape)).reshape(shape)


class Blocks:
    """Blocks of variables, one after the other.

    Args:
        shapes: of each block, by name.
    """

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self._columns: dict[str, Int[np.ndarray, "..."]] = {}
        self.variables = 0
        for name, shape in shapes.items():
            self._columns[name] = self.variables + numbers(*shape)
            self.variables += math.prod(shape)

    def __getitem__(self, name: str) -> Int[np.ndarray, "..."]:
        """The columns of a block's variables."""
        return self._columns[name]

    def vector(
        self, others: float = 0.0, **values: Float[np.ndarray, "..."] | float
    ) -> Float[np.ndarray, "variables"]:
        """A number for each variable: by block, and one for those of all other blocks."""
        vector = np.full(self.variables, others)
        for name, value in values.items():
            vector[self[name]] = value
        return vector

    def rows(
        self,
        number: int,
        *entries: Entry,
        most: Float[np.ndarray, "number"] | float = 0.0,
        least: Float[np.ndarray, "number"] | float = -np.inf,
    ) -> optimize.LinearConstraint:
        """Constraints on sums of variables.

        Args:
            number: of rows.
            entries: row numbers, columns and coefficients, which broadcast together.
            most: what each row's sum is at most.
            least: what it is at least.
        """
        row, column, value = (
            np.concatenate([part.ravel() for part in parts])
            for parts in zip(*(np.broadcast_arrays(*entry) for entry in entries), strict=True)
        )
        some = value != 0
        matrix = sparse.csr_array((value[some], (row[some], column[some])), shape=(number, self.variables))
        return optimize.LinearConstraint(matrix, least, most)
