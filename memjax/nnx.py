"""A bridge to Flax: any memory as an `nnx.Module`, and back.

    from flax import nnx
    import memjax.nnx

    model = memjax.nnx.Module(memory, rngs=nnx.Rngs(0))  # parameters are nnx.Param
    y, state = model(x, model.init_state(batch=2))  # memory.apply, bit for bit
    y, state = model.step(x_t, state)
    memory, params = memjax.nnx.from_module(model)

The state stays an argument and a result. A state that hides in a module is changed by every call, so that reading a
prompt twice, forking it, taking a gradient through a window or beginning a new batch each need a way around the module;
as a value it goes through `nnx.jit` and into a checkpoint like any other tree of arrays. To keep one in a module of
yours all the same: `self.state = nnx.Variable(model.init_state(2))`, with `get_value` and `set_value` around the call.

Only this file imports flax.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Int

from memjax.memory import Flow, How, Memory, check_tree


class Module(nnx.Module):
    """A memory with its parameters.

    memory: the settings, static and hashable. params: the tree of `memory.init`, each leaf an `nnx.Param` with the
    logical axes as `out_sharding` (for `nnx.logical_axis_rules` and `nnx.get_partition_spec`) and the optimizer's group
    as `kind`. Axes are names, not those of a mesh, so nothing is placed when a module is made.
    """

    def __init__(self, memory: Memory, *, rngs: nnx.Rngs | None = None, params: dict | None = None):
        """Parameters drawn by `memory.init` from the stream "params" of rngs, or those given, which are not copied.

        Raises ValueError where not exactly one of the two is given, or params are not those of the memory.
        """
        if (rngs is None) == (params is None):
            given = "neither" if rngs is None else "both"
            raise ValueError(f"Module: {given} of rngs and params given, needs one of them")
        self.memory = memory
        arrays, specs = memory.init(rngs.params()) if rngs is not None else params, memory.param_specs()
        check_tree("memjax.nnx.Module", "params", specs, arrays)

        def param(spec, a):
            return nnx.Param(a, out_sharding=spec.axes, eager_sharding=False, kind=spec.kind)

        self.params = nnx.data(jax.tree.map(param, specs, arrays))

    def __call__(
        self,
        x: Any,
        state: Any = None,
        *,
        ids: Int[Array, "b t"] | None = None,
        valid: Bool[Array, "b t"] | None = None,
        start: Bool[Array, "b t"] | None = None,
        how: How = How(),
    ) -> tuple[Any, Any]:
        """`Memory.apply`: a sequence x [b t d], or token ids [b t] -> y and the new state. None: from the empty one."""
        return self.memory.apply(_arrays(self), self._begin(x, state), x, ids=ids, valid=valid, start=start, how=how)

    def apply_with_aux(
        self,
        x: Any,
        state: Any = None,
        *,
        ids: Int[Array, "b t"] | None = None,
        valid: Bool[Array, "b t"] | None = None,
        start: Bool[Array, "b t"] | None = None,
        how: How = How(),
    ) -> tuple[Any, Any, Any]:
        """`Memory.apply_with_aux`: y, the new state, and a nested dict of auxiliary losses and diagnostics."""
        return self.memory.apply_with_aux(
            _arrays(self), self._begin(x, state), x, ids=ids, valid=valid, start=start, how=how
        )

    def step(
        self,
        x: Any,
        state: Any,
        *,
        ids: Int[Array, " b"] | None = None,
        valid: Bool[Array, " b"] | None = None,
        start: Bool[Array, " b"] | None = None,
        how: How = How(),
    ) -> tuple[Any, Any]:
        """`Memory.step`: one token of decoding, x [b d] or an id [b] -> y and the new state."""
        return self.memory.step(_arrays(self), state, x, ids=ids, valid=valid, start=start, how=how)

    def write(
        self,
        x: Any,
        state: Any,
        *,
        ids: Int[Array, "b t"] | None = None,
        valid: Bool[Array, "b t"] | None = None,
        start: Bool[Array, "b t"] | None = None,
        how: How = How(),
    ) -> tuple[Any, Any]:
        """`Memory.write`: documents into the store -> y and the new state."""
        return self.memory.write(_arrays(self), state, x, ids=ids, valid=valid, start=start, how=how)

    def init_state(self, batch: int) -> Any:
        """The empty memory for `batch` rows."""
        return self.memory.init_state(batch)

    def restart(self, state: Any, batch: int) -> Any:
        """`batch` fresh rows over the same store."""
        return self.memory.restart(state, batch)

    def _begin(self, x: Any, state: Any) -> Any:
        return self.memory.init_state(len(x.x if isinstance(x, Flow) else x)) if state is None else state


def from_module(module: Module) -> tuple[Memory, dict]:
    """The memory and its parameters, the very arrays, as the rest of memjax takes them."""
    return module.memory, _arrays(module)


def _arrays(module: Module) -> dict:
    return jax.tree.map(lambda p: p.get_value(), module.params, is_leaf=lambda p: isinstance(p, nnx.Param))
