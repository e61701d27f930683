"""Surgery on Mixture-of-Experts checkpoints in Hugging Face format.

The public Python API. Importing it changes nothing outside itself, and imports everything heavy when first used.

    import moesurgery
    plan = moesurgery.plan_of(moesurgery.open_checkpoint("model/"))
    plan = moesurgery.apply(plan, "rescale", top_k=3)
    moesurgery.write_plan(plan, "model-top3/")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moesurgery._version import __version__

__all__ = [
    "Anatomy",
    "CalibrationOptions",
    "Checkpoint",
    "Param",
    "Plan",
    "Recipe",
    "SurgeryError",
    "WriteOptions",
    "__version__",
    "apply",
    "calibrate",
    "count_params",
    "load_merge_recipe",
    "load_recipe",
    "merge_method",
    "open_checkpoint",
    "operation",
    "plan_of",
    "recognise",
    "register_tied_models",
    "write_plan",
]

_HOME = {
    "Anatomy": "moesurgery.families.anatomy",
    "CalibrationOptions": "moesurgery.fitting.calibrate",
    "Checkpoint": "moesurgery.checkpoint.checkpoint",
    "Param": "moesurgery.recipe.parameters",
    "Plan": "moesurgery.plan.plan",
    "Recipe": "moesurgery.recipe.reader",
    "SurgeryError": "moesurgery.errors",
    "WriteOptions": "moesurgery.write.write_plan",
    "apply": "moesurgery.recipe.registry",
    "calibrate": "moesurgery.fitting.calibrate",
    "count_params": "moesurgery.count.params",
    "load_merge_recipe": "moesurgery.merge.merge_recipe",
    "load_recipe": "moesurgery.recipe.reader",
    "merge_method": "moesurgery.merge.compute.method",
    "open_checkpoint": "moesurgery.checkpoint.checkpoint",
    "operation": "moesurgery.recipe.registry",
    "plan_of": "moesurgery.plan.plan",
    "recognise": "moesurgery.families.recognition",
    "register_tied_models": "moesurgery.tied.registration",
    "write_plan": "moesurgery.write.write_plan",
}

if TYPE_CHECKING:
    from moesurgery.checkpoint.checkpoint import Checkpoint, open_checkpoint
    from moesurgery.count.params import count_params
    from moesurgery.errors import SurgeryError
    from moesurgery.families.anatomy import Anatomy
    from moesurgery.families.recognition import recognise
    from moesurgery.fitting.calibrate import CalibrationOptions, calibrate
    from moesurgery.merge.compute.method import merge_method
    from moesurgery.merge.merge_recipe import load_merge_recipe
    from moesurgery.plan.plan import Plan, plan_of
    from moesurgery.recipe.parameters import Param
    from moesurgery.recipe.reader import Recipe, load_recipe
    from moesurgery.recipe.registry import apply, operation
    from moesurgery.tied.registration import register_tied_models
    from moesurgery.write.write_plan import WriteOptions, write_plan


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'moesurgery' has no attribute {name!r}")
