"""Meshes whose axes behave as this library expects."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes of the given names and lengths, outermost first: `make_mesh({"data": 2, "sequence": 4})`.

    The axes are Auto: the compiler places what is not placed by hand. (`jax.make_mesh` makes them Explicit, which puts
    a sharding into the type of every array.) devices: None takes the first ones there are, in an order that suits
    their interconnect.

    Raises ValueError if there are fewer devices than the axes need.
    """
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes), devices=devices)
