"""Bad methods, spaces and hyperparameters: one line that names the right one."""

import pytest

from enmp_jax import merges
from enmp_jax.errors import UserError
from enmp_jax.lora import stack_adapters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "tise"}, "unknown merge method 'tise': did you mean 'ties'?"),
        ({"method": "ties", "space": "knot"}, "did you mean 'knots'?"),
        ({"method": "ties", "densty": 0.2}, "did you mean 'density'?"),
        ({"method": "sum", "density": 0.2}, "merge method 'sum' has no hyperparameter 'density'"),
        ({"method": "ties", "density": 0.0}, "density is 0.0: it must be above 0 to 1"),
        ({"method": "ties", "density": "x"}, "density must be a number"),
        ({"method": "ties", "density": float("nan")}, "density is nan"),
        ({"method": "dare", "drop_rate": 1.0}, "from 0 and below 1"),
        ({"method": "lego", "clusters": 2.5}, "clusters must be a whole number"),
        ({"method": "lego", "space": "core"}, "lego makes no sense in core space"),
        ({"method": "iso_cts", "space": "knots"}, "makes no sense"),
        ({"method": "iso", "isotropize": True}, "isotropic already"),
        ({"method": "sum", "task_weights": (1.0, float("inf"))}, "finite numbers"),
    ],
)
def test_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        merges.make(**arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_task_weights_of_another_number_of_tasks() -> None:
    import numpy as np

    stack = stack_adapters({"a": {"x.0.q": (np.ones((1, 3)), np.ones((2, 1)))}})
    with pytest.raises(UserError, match="give one number a task, 1, not 2"):
        merges.make("sum", task_weights=(1.0, 2.0)).prepare(stack)


def test_dashes_are_underscores() -> None:
    merges.make("dare-ties", drop_rate=0.5)
