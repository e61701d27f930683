"""`moesurgery.calibrate`: an edit by data as a Python function, and what operations declare for it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pytest

from moesurgery import CalibrationOptions, Checkpoint, Plan, apply, calibrate, open_checkpoint, plan_of, write_plan
from moesurgery.errors import OutputError, RecipeError, RefusedError
from moesurgery.fitting.heldout import HeldOutLosses
from moesurgery.fitting.reporter import SILENT, Reporter
from moesurgery.fitting.run_settings import RunSettings
from moesurgery.forward import loss
from moesurgery.forward.batch_passes import Progress
from moesurgery.forward.text_windows import Domain
from moesurgery.plan.plan import Step
from moesurgery.recipe import registry
from moesurgery.recipe.parameters import Param
from moesurgery.recipe.text_needs import NeededStatistics, TextNeeds, Values, Variant
from moesurgery.surgery.choose_experts import CANDIDATES
from tests.conftest import Result
from tests.unit.fitting.test_layer_fit import TEXT
from tests.unit.write.test_write import digest

Cli = Callable[..., Result]


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Any]:
    """Calibration text of 384 tokens and a little to measure on, as token ids."""
    for name, ids in (("text", TEXT[:6]), ("heldout", TEXT[6:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in ids))
    return {"text": [tmp_path / "text.jsonl"], "heldout": [tmp_path / "heldout.jsonl"], "window": 64, "tokens": 384}


def as_arguments(options: dict[str, Any]) -> list[object]:
    """The same options on the command line."""
    arguments: list[object] = []
    for name, value in options.items():
        for single in value if isinstance(value, list) else [value]:
            arguments += [f"--{name}".replace("_", "-"), single]
    return arguments


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a checkpoint is opened, and each operation planned."""
    counts: Counter[str] = Counter()
    opened, edited = Checkpoint.__init__, Plan.edited

    def opening(self: Checkpoint, *args: Any, **kwargs: Any) -> None:
        counts["opened"] += 1
        opened(self, *args, **kwargs)

    def editing(self: Plan, step: Step, **kwargs: Any) -> Plan:
        counts[step.operation] += 1
        return edited(self, step, **kwargs)

    monkeypatch.setattr(Checkpoint, "__init__", opening)
    monkeypatch.setattr(Plan, "edited", editing)
    return counts


@pytest.mark.parametrize(
    ("operation", "parameters", "options"),
    [
        ("rescale", {"top_k": 3, "scale": "measured-expert"}, {}),
        ("drop-experts", {"count": 2, "by": "recon"}, {"refit": "expert"}),
        ("merge-experts", {"to": 6, "router": "lse"}, {}),
    ],
)
def test_it_does_what_the_command_does(
    operation: str,
    parameters: dict[str, Any],
    options: dict[str, Any],
    models: Any,
    tmp_path: Path,
    ok: Cli,
    texts: dict[str, Any],
) -> None:
    """The same checkpoint, byte for byte, the same files beside it, the same figures."""
    path, options = models("mixtral"), texts | options
    out = tmp_path / "run" / "out"
    out.parent.mkdir()
    document = ok(operation, path, *as_arguments({**parameters, **options}), "-o", out, "--json").json
    written = digest(out.parent)
    assert "out.stats.safetensors" in written
    shutil.rmtree(out.parent)
    edited = calibrate(path, operation, parameters, CalibrationOptions(**options), out)
    assert edited.heldout is not None
    assert document["heldout"] == json.loads(json.dumps(asdict(edited.heldout)))
    assert document["heldout"]["nats"] == dict(edited.heldout.nats)
    assert list(document["heldout"]["nats"]) == list(edited.heldout.nats)
    write_plan(edited.plan, out)
    assert digest(out.parent) == written
    plan = plan_of(open_checkpoint(path))  # the steps make it again, without text
    for step in edited.steps:
        plan = apply(plan, step.operation, **step.parameters)
    assert plan == edited.plan


def test_a_model_is_opened_once_and_edited_once(
    models: Any, tmp_path: Path, ok: Cli, texts: dict[str, Any], counted: Counter[str]
) -> None:
    path, arguments = models("mixtral"), as_arguments(texts | {"refit": "scalar"})
    ok("drop-experts", path, "--experts", "0,5", *arguments, "-o", tmp_path / "a")
    assert counted == {"opened": 1, "drop-experts": 1, "refit": 1}
    counted.clear()
    ok("drop-experts", path, "--count", 2, "--by", "reap-sum", *arguments, "-o", tmp_path / "b")
    # Once more before the model runs, with experts drawn by lot: what is impossible whichever they are.
    assert counted == {"opened": 1, "drop-experts": 2, "refit": 1}
    counted.clear()
    stats = tmp_path / "b.stats.safetensors"
    options = ("--group", "msmoe", "--stats", stats, *as_arguments(texts)[2:6])
    ok("merge-experts", path, "--to", 7, *options, "-o", tmp_path / "c")
    assert counted == {"opened": 1, "merge-experts": 1, "drop-experts": 1}


def test_a_plan_is_taken_as_it_is(models: Any, tmp_path: Path, texts: dict[str, Any], counted: Counter[str]) -> None:
    plan = apply(plan_of(open_checkpoint(models("mixtral"))), "drop-experts", experts=[3])
    counted.clear()
    options = CalibrationOptions(**texts)
    edited = calibrate(plan, "drop-experts", {"experts": [0]}, options, tmp_path / "out")
    assert counted == {"drop-experts": 1}
    assert edited.plan.anatomy.experts == 6
    assert [step.operation for step in edited.plan.steps] == ["drop-experts", "drop-experts"]
    assert edited.heldout is not None
    assert edited.heldout.nats.keys() == {"original", "drop-experts"}


def test_the_same_choice_is_measured_once(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two criteria that choose alike have one loss; another choice has its own."""
    measured: list[int] = []
    losses_of_several = loss.losses_of_several

    def counting(groups: Any, *given: Any) -> Any:
        measured.append(len(groups[0]))
        return losses_of_several(groups, *given)

    monkeypatch.setattr(loss, "losses_of_several", counting)
    plan = plan_of(open_checkpoint(models("mixtral")))
    dropped = {name: apply(plan, "drop-experts", experts=[e]) for name, e in (("a", 0), ("b", 0), ("c", 1))}
    domain = Domain("text", TEXT[6:])
    outcome = HeldOutLosses(RunSettings(window=64), [domain], SILENT)
    outcome.add({"original": plan, **dropped})
    nats = outcome.outcome("a").nats
    assert measured == [3]
    assert list(nats) == ["original", "a", "b", "c"]
    assert nats["a"] == nats["b"] != nats["c"]
    outcome.add({"a": plan, "d": dropped["c"], "e": apply(plan, "drop-experts", experts=[2])})
    assert measured == [3, 1]
    assert outcome.outcome("a").nats == {**nats, "d": nats["c"], "e": outcome.found["e"].nats}


def test_the_best_of_several_criteria_is_taken(
    models: Any, tmp_path: Path, texts: dict[str, Any], ok: Cli, counted: Counter[str]
) -> None:
    """What each costs is what `perplexity` says of it when it is written, and the least of them is the edit."""
    path = models("qwen2_moe")
    document = ok(
        "drop-experts", path, "--count", 3, *as_arguments(texts), "--refit", "expert", "-o", tmp_path / "out", "--json"
    ).json
    assert counted["drop-experts"] == 1 + len(CANDIDATES)  # once before the model runs
    held_out = document["heldout"]
    nats = held_out["nats"]
    chosen = held_out["chosen"]
    assert list(nats) == ["original", *CANDIDATES, f"{chosen}, refit expert"]
    assert nats[chosen] == min(nats[by] for by in CANDIDATES)
    record = json.loads((tmp_path / "out" / "moesurgery.json").read_text())
    assert record["recipe"]["steps"][0]["drop-experts"]["by"] == chosen
    candidates = record["steps"][0]["report"]["candidates"]
    assert candidates["nats"] == {name: nats[name] for name in ("original", *CANDIDATES)}
    assert candidates["intervals"] == {by: held_out["intervals"][by] for by in CANDIDATES}
    assert f"{chosen} costs least" in (tmp_path / "out" / "README.md").read_text()
    stats = tmp_path / "out.stats.safetensors"
    for by in CANDIDATES:
        ok("drop-experts", path, "--count", 3, "--by", by, "--stats", stats, "-o", tmp_path / by)
        options = ["--window", 64, "--limit", 20, "--json"]
        measured = ok("perplexity", tmp_path / by, texts["heldout"][0], *options).json
        assert measured["domains"][0]["nats"] == pytest.approx(nats[by], abs=1e-5)
        low, high = held_out["intervals"][by]
        assert low <= nats[by] - nats["original"] <= high
    shown = ok("drop-experts", path, "--count", 3, *as_arguments(texts), "-o", tmp_path / "other").out
    assert f"{chosen} (taken)" in shown
    alone = apply(plan_of(open_checkpoint(path)), "drop-experts", count=3, stats=str(stats)).steps[0]
    assert alone.parameters["by"] == "reap-sum"
    unmeasured = CalibrationOptions(**{**texts, "heldout": None}, no_heldout=True)
    assert (
        calibrate(path, "drop-experts", {"count": 3}, unmeasured, tmp_path / "un").plan.steps[0].parameters["by"]
        == "reap-sum"
    )


def test_the_best_rule_is_taken(models: Any, tmp_path: Path, texts: dict[str, Any]) -> None:
    path, options = models("mixtral"), CalibrationOptions(**texts)
    edited = calibrate(path, "rescale", {"top_k": 3, "scale": "auto"}, options, tmp_path / "out")
    assert edited.heldout is not None
    rules = {name: n for name, n in edited.heldout.nats.items() if name != "original"}
    assert rules.keys() == {"none", "norm", "router", "gate", "norm-matched", "measured", "measured-expert"}
    assert edited.heldout.chosen == min(rules, key=lambda rule: rules[rule])
    assert edited.steps[0].parameters["scale"] == edited.heldout.chosen
    plan = plan_of(open_checkpoint(path))
    assert apply(plan, "rescale", top_k=3, scale="auto").steps[0].report["rule"] == "router"
    stats = edited.steps[0].parameters["stats"]
    assert apply(plan, "rescale", top_k=3, scale="auto", stats=stats).steps[0].report["rule"] == "measured-expert"


@pytest.mark.parametrize(("kind", "asked", "made"), [("all", None, 2), ("down", None, 1), ("all", 1, 1)])
def test_how_often_a_repair_goes_over_the_experts(
    models: Any, tmp_path: Path, texts: dict[str, Any], kind: str, asked: int | None, made: int
) -> None:
    options = CalibrationOptions(**texts, refit=kind, sweeps=asked, ridge=1.0)
    calibrate(plan_of(open_checkpoint(models("mixtral"))), "drop-experts", {"count": 1}, options, tmp_path / "out")
    assert json.loads((tmp_path / "out.refit" / "refit.json").read_text())["sweeps"] == made


def test_without_text_it_is_apply(models: Any, tmp_path: Path) -> None:
    plan = plan_of(open_checkpoint(models("mixtral")))
    edited = calibrate(plan, "rescale", {"top_k": 1})
    assert edited.plan == apply(plan, "rescale", top_k=1)
    assert edited.heldout is None
    assert not list(tmp_path.iterdir())


def test_messages_and_progress_go_to_callbacks(
    models: Any, tmp_path: Path, texts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    notes: list[str] = []
    shares: dict[str, float] = {}

    @contextmanager
    def progress(what: str, total: int) -> Iterator[Progress]:
        shares[what] = 0

        def advance(count: int) -> None:
            shares[what] += count / total

        yield advance

    options = CalibrationOptions(**texts, refit="scalar")
    reporter = Reporter(notes.append, progress)
    calibrate(models("mixtral"), "merge-experts", {"to": 6}, options, tmp_path / "out", reporter=reporter)
    assert [note.split()[0] for note in notes] == ["statistics", "how", "the"]
    assert shares == {what: pytest.approx(1) for what in ("collecting", "fitting groups", "refitting", "measuring")}
    calibrate(models("mixtral"), "merge-experts", {"to": 6}, options, tmp_path / "out", reporter=reporter)
    assert all("used again" in note for note in notes[3:])
    calibrate(models("mixtral"), "merge-experts", {"to": 6}, options, tmp_path / "out")
    assert capsys.readouterr() == ("", "")


def test_what_is_refused(models: Any, tmp_path: Path, texts: dict[str, Any], counted: Counter[str]) -> None:
    path = models("mixtral")
    for operation, parameters, changes, message in (
        ("drop-experts", {"cuont": 1}, {}, "no parameter 'cuont'"),
        ("drop-experts", {"count": "two"}, {}, "count"),
        ("drop-expert", {"count": 1}, {}, "no operation"),
        ("drop-experts", {"count": 1}, {"refit": "most"}, "expected one of"),
        ("drop-experts", {"count": 1}, {"ridge": -1}, "not negative"),
        ("drop-experts", {"count": 1}, {"window": 0}, "2 or more"),
        ("drop-experts", {"count": 1}, {"text": texts["text"][0]}, "expected a list"),
        ("drop-experts", {"count": 1}, {"dtype": "int8"}, "int8"),
        ("drop-experts", {"count": 1}, {"text": None, "refit": "down"}, "needs text"),
        ("add-expert", {"source": str(path), "experts": [0]}, {}, "is not calibrated on text"),
    ):
        with pytest.raises(RecipeError, match=message):
            calibrate(path, operation, parameters, CalibrationOptions(**texts | changes), tmp_path / "out")
    with pytest.raises(RefusedError, match="0 experts would be left"):
        calibrate(path, "drop-experts", {"count": 8}, CalibrationOptions(**texts), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    calibrate(path, "drop-experts", {"count": 1}, CalibrationOptions(**texts), tmp_path / "out")
    other = CalibrationOptions(**texts | {"tokens": 64})
    with pytest.raises(OutputError, match="tokens 384, now 64"):
        calibrate(path, "drop-experts", {"count": 1}, other, tmp_path / "out")
    calibrate(path, "drop-experts", {"count": 1}, other, tmp_path / "out", force=True)


def test_text_of_one_window_leaves_none_to_calibrate_on(
    models: Any, tmp_path: Path, cli: Cli, ok: Cli, texts: dict[str, Any]
) -> None:
    (tmp_path / "short.jsonl").write_text(json.dumps(TEXT[0, :70].tolist()))
    command = ["drop-experts", models("mixtral"), "--count", 1, "--text", tmp_path / "short.jsonl", "--window", 64]
    result = cli(*command, "-o", tmp_path / "out")
    assert result.code == 2
    assert "has one window of 64 tokens" in result.err
    assert "--no-heldout" in result.err
    ok(*command, "-o", tmp_path / "out", "--no-heldout")


@pytest.fixture
def declared() -> Iterator[Callable[[TextNeeds], None]]:
    """Register an operation `louder` that takes statistics, with what it needs of text."""

    def register(needs: TextNeeds) -> None:
        @registry.operation("louder", text=needs)
        def louder(
            plan: Plan,
            *,
            factor: Annotated[float, Param("on what the experts add")] = 1.0,
            stats: Annotated[str | None, Param("statistics", reads="file")] = None,
        ) -> Plan:
            """Scale what the experts add."""
            return apply(plan, "rescale", top_k=2, scale=factor)

    yield register
    del registry._registered["louder"]


def test_an_operation_declares_what_it_needs_of_text(
    models: Any, tmp_path: Path, texts: dict[str, Any], declared: Callable[[TextNeeds], None]
) -> None:
    from moesurgery.stats.statistics_file import load_stats

    def statistics(plan: Plan, values: Values) -> NeededStatistics | None:
        return NeededStatistics(top_k=[3], keep=[7]) if values["factor"] != 1 else None

    def variants(plan: Plan, values: Values) -> list[Variant]:
        return [
            Variant("as asked", "louder", values),
            Variant("fewer", "drop-experts", {"count": 1}),
            Variant("none left", "drop-experts", {"count": 8}, "dropping all"),
        ]

    declared(TextNeeds(statistics, variants=variants, repair="scalar", named_by="factor"))
    notes: list[str] = []
    options = CalibrationOptions(**texts)
    edited = calibrate(
        models("mixtral"), "louder", {"factor": 1.5}, options, tmp_path / "out", reporter=Reporter(notes.append)
    )
    assert edited.heldout is not None
    assert list(edited.heldout.nats) == ["original", "as asked", "fewer", "1.5, refit scalar"]
    assert any(note.startswith("dropping all is not measured: drop-experts: 0 experts") for note in notes)
    stats = load_stats(edited.steps[0].parameters["stats"])
    assert (stats.top_ks, stats.recon, stats.every_expert) == ([3], [7], False)
    calibrate(models("mixtral"), "louder", {"factor": 1.0}, options, tmp_path / "none")
    assert not (tmp_path / "none.stats.safetensors").exists()


def test_an_operation_that_declares_nothing_has_the_usual_statistics(
    models: Any, tmp_path: Path, texts: dict[str, Any], declared: Callable[[TextNeeds], None]
) -> None:
    declared(TextNeeds())
    edited = calibrate(models("mixtral"), "louder", {}, CalibrationOptions(**texts), tmp_path / "out")
    assert edited.steps[0].parameters == {"stats": str(tmp_path / "out.stats.safetensors")}
    assert edited.heldout is not None
    assert edited.heldout.nats.keys() == {"original", "louder"}
