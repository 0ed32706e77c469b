"""Calls of enmp_jax check arguments and answers against their annotations, shapes and dtypes included."""

import dataclasses
import functools
import inspect

import jax
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# an int is a float, as static type checkers have it
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install():
    """Have every function and dataclass of enmp_jax checked. Goes before its first import."""
    install_import_hook("enmp_jax", "type_checks.checked")


def checked(function):
    """The function, its arguments checked when called.

    The annotations of a pytree are those of its arrays on a device. The same class also holds axes,
    shardings, abstract shapes and copies on the host, which JAX makes: those are let through.
    """
    check = _check(function)
    if function.__name__ != "__init__":
        return check
    signature = inspect.signature(function)

    @functools.wraps(function)
    def init(self, *args, **kwargs):
        if hasattr(type(self), "_flax_dataclass"):
            given = signature.bind(self, *args, **kwargs).arguments
            data = [f.name for f in dataclasses.fields(self) if f.metadata.get("pytree_node", True)]
            leaves = jax.tree.leaves([given.get(name) for name in data])
            if not all(isinstance(leaf, jax.Array) for leaf in leaves):
                return None
        return check(self, *args, **kwargs)

    return init
