"""The script that drafts a table entry finds what stands in the table."""

from __future__ import annotations

import pytest

from moesurgery.families.table import by_model_type
from tests.draft_family import draft, main

FOUND = ("layouts", "along", "experts_key", "top_k_key", "width_keys")


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "glm4_moe", "olmoe"])
def test_a_draft_is_the_entry(model_type: str) -> None:
    (entry,) = by_model_type(model_type)
    found = draft(model_type)
    assert {key: set(getattr(found, key)) if key == "along" else getattr(found, key) for key in FOUND} == {
        key: set(getattr(entry, key)) if key == "along" else getattr(entry, key) for key in FOUND
    }
    assert set(found.shared) <= set(entry.shared)
    assert bool(found.shared) == (model_type in ("deepseek_v3", "glm4_moe"))


def test_what_names_do_not_tell_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["draft_family", "deepseek_v3"])
    main()
    said = capsys.readouterr().out
    assert "experts_key='n_routed_experts'" in said
    assert "also takes num_local_experts" in said
    assert "norm_topk_prob" in said
