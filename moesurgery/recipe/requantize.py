"""The parameter of operations that compute on experts: what becomes of weights that were quantised."""

from __future__ import annotations

from typing import Annotated

from moesurgery.plan.requantise import Requantize
from moesurgery.recipe.parameters import Param

WrittenBack = Annotated[
    Requantize,
    Param(
        "quantised weights that change are stored again in the form that they came in (as-source), or the whole model"
        " as plain weights (none)"
    ),
]
