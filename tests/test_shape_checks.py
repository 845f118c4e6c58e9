"""The tests' own check of shapes: of inner functions too, whose check is made once."""

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from shape_checks import checked
from torch import Tensor


def summed(wide, returns):
    """An inner function of one name whose signature, and whose answer, differ from call to call."""
    takes = Float[Tensor, "a b c"] if wide else Float[Tensor, "a b"]

    @jaxtyping.jaxtyped(typechecker=checked)
    def inner(x: takes, y: Float[Tensor, "b"]) -> Float[Tensor, "a"]:
        return returns(x, y)

    return inner


def test_an_inner_function_is_checked_each_time_it_is_made():
    x, y = torch.ones(3, 2), torch.ones(2)
    for _ in range(2):
        assert summed(False, lambda x, y: x @ y)(x, y).tolist() == [2, 2, 2]
        with pytest.raises(jaxtyping.TypeCheckError, match="parameters"):
            summed(False, lambda x, y: x @ y)(x, torch.ones(3))
        with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
            summed(False, lambda x, y: x)(x, y)
        # another signature under the same name
        with pytest.raises(jaxtyping.TypeCheckError, match="parameters"):
            summed(True, lambda x, y: x @ y)(x, y)
        assert summed(True, lambda x, y: x[:, 0, 0])(x[:, :, None], y).tolist() == [1, 1, 1]
