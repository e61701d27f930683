"""The public Python API, pinned."""

from __future__ import annotations

import moesurgery


def test_exported_names() -> None:
    assert sorted(moesurgery.__all__) == sorted(
        [
            "__version__",
            "Anatomy",
            "CalibrationOptions",
            "Checkpoint",
            "Param",
            "Plan",
            "Recipe",
            "SurgeryError",
            "WriteOptions",
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
    )
    for name in moesurgery.__all__:
        assert getattr(moesurgery, name) is not None


def test_every_public_thing_says_what_it_is() -> None:
    for name in moesurgery.__all__:
        if name != "__version__":
            assert (getattr(moesurgery, name).__doc__ or "").strip(), name
