"""`moesurgery families`, and the example of docs/families.md: what it says works as it is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moesurgery import count_params, open_checkpoint, recognise
from moesurgery.families import anatomy as anatomy_module
from moesurgery.families import family as words
from moesurgery.families.overview import overview
from moesurgery.families.routing import routing_class
from moesurgery.families.table import FAMILIES
from tests.conftest import ROOT
from tests.headers import header_checkpoint


def test_all_families_are_listed(ok: Any) -> None:
    lines = ok("families").out.splitlines()
    assert {line.split()[0] for line in lines if line} >= {family.name for family in FAMILIES}
    document = ok("families", "--json").json
    assert [f["family"] for f in document["families"]] == [f.name for f in FAMILIES]


def test_one_family_in_full(ok: Any) -> None:
    found = ok("families", "gpt_oss").out
    assert "mlp.experts.gate_up_proj: gate_up [E, H, 2I], gate and up in turn" in found
    assert "mlp.router.bias: router bias" in found
    assert "mlp.gate.tid2eid" in ok("families", "deepseek_v4").out
    assert "self_attention.experts.output_linear: down [E, H, I]" in ok("families", "jetmoe").out
    assert "drop-experts: refused: its router scores pairs of keys" in ok("families", "doge").out


def test_a_model_type_finds_its_family(ok: Any, cli: Any) -> None:
    assert ok("families", "kimi_k2", "--json").json["families"][0]["family"] == "deepseek_v3"
    assert len(ok("families", "bailing_moe", "--json").json["families"]) == 2
    refused = cli("families", "mixtrall")
    assert refused.code == 2
    assert "did you mean 'mixtral'?" in refused.err


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("mixtral", "down-projections"),
        ("deepseek_v3", "config: routed_scaling_factor"),
        ("phimoe", "refused: the code always uses top-2"),
        ("flex_olmo", "top-k only: a factor has no effect"),
    ],
)
def test_where_a_factor_goes(name: str, factor: str) -> None:
    (family,) = (f for f in FAMILIES if f.name == name)
    assert overview(family).factor == factor


def test_the_example_of_the_documentation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    blocks = {kind: re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("json", "text", "python")}
    tapir = eval(blocks["python"], vars(words))
    monkeypatch.setattr(anatomy_module, "by_model_type", lambda name: (tapir,) if name == "tapir" else ())
    shapes: dict[str, list[int]] = {}
    for line in blocks["text"].splitlines():
        name, shape = re.fullmatch(r"(\S+) +(\[[0-9, ]+\])", line).groups()
        names = [name]
        while "[" in names[0]:
            first, last = map(int, re.search(r"\[(\d+)-(\d+)\]", names[0]).groups())
            names = [re.sub(r"\[\d+-\d+\]", str(n), name, count=1) for name in names for n in range(first, last + 1)]
        shapes |= dict.fromkeys(names, json.loads(shape))
    header_checkpoint(tmp_path / "m", json.loads(blocks["json"]), shapes, sparse=True)
    checkpoint = open_checkpoint(tmp_path / "m")
    anatomy = recognise(checkpoint.config, checkpoint.tensors)
    counts = count_params(anatomy, checkpoint.tensors)
    assert counts.unrecognised == []
    assert anatomy.experts == 4
    assert (anatomy.settings.routed_scale_key, routing_class(anatomy.settings)) == (1.5, "A")
    experts, rest = 2 * 4 * (16 * 16 + 16 * 8), 32 * 16 + 2 * (4 * 16 + 16 * 16 + 16 * 8 + 16)
    assert counts.total == experts + rest
    assert counts.active["all"] == experts // 2 + rest
    assert {m.role for b in anatomy.blocks for m in b.members} == {"gate_up", "down", "router", "correction_bias"}
