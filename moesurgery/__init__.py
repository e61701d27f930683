"""Surgery on Mixture-of-Experts checkpoints in Hugging Face format.

The public Python API; everything heavy is imported when first used.

    import moesurgery
    plan = moesurgery.plan_of(moesurgery.open_checkpoint("model/"))
    plan = moesurgery.apply(plan, "rescale", top_k=3)
    moesurgery.write_plan(plan, "model-top3/")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "Checkpoint": "moesurgery.checkpoint.checkpoint",
    "open_checkpoint": "moesurgery.checkpoint.checkpoint",
    "Anatomy": "moesurgery.families.anatomy",
    "recognise": "moesurgery.families.anatomy",
    "Plan": "moesurgery.plan.plan",
    "plan_of": "moesurgery.plan.plan",
    "apply": "moesurgery.surgery.operation",
    "operation": "moesurgery.surgery.operation",
    "Recipe": "moesurgery.recipes",
    "load_recipe": "moesurgery.recipes",
    "WriteOptions": "moesurgery.write.job",
    "write_plan": "moesurgery.write.job",
    "count_params": "moesurgery.measure.params",
    "SurgeryError": "moesurgery.errors",
}
__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from moesurgery.checkpoint.checkpoint import Checkpoint, open_checkpoint
    from moesurgery.errors import SurgeryError
    from moesurgery.families.anatomy import Anatomy, recognise
    from moesurgery.measure.params import count_params
    from moesurgery.plan.plan import Plan, plan_of
    from moesurgery.recipes import Recipe, load_recipe
    from moesurgery.surgery.operation import apply, operation
    from moesurgery.write.job import WriteOptions, write_plan


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'moesurgery' has no attribute {name!r}")
