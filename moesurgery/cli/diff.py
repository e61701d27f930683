"""`moesurgery diff`: what differs between two checkpoints."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.checkpoint.strict_json import ascii_json
from moesurgery.cli._common_options import Json, Picture, Quiet
from moesurgery.cli._console import console
from moesurgery.cli._exit_codes import ANSWER_IS_NO
from moesurgery.cli._pictures import Heatmap, Panel, check_picture, write_picture
from moesurgery.escape import one_line
from moesurgery.families.tensor_names import name_template
from moesurgery.validate.difference import Difference, TensorDifference, diff_checkpoints

_SHOWN = 40


def diff_command(
    a: Annotated[str, typer.Argument(help="A checkpoint folder, a GGUF file, hf://org/name[@revision], or a URL.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    each: Annotated[bool, typer.Option("--each", help="A line for every tensor, not for every kind.")] = False,
    picture: Picture = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what differs between two checkpoints, tensor by tensor and in config.json.

    Exits 1 where they differ. Streams both; values are compared over what is finite in both.
    """
    console.quiet = quiet
    check_picture(picture)
    first, second = open_checkpoint(a), open_checkpoint(b)
    with console.progress("comparing", first.stored_bytes) as watch:
        diff = diff_checkpoints(first, second, watch.progress)
    if picture is not None:
        title = f"{first.source.name} and {second.source.name}: what differs"
        write_picture(picture, title, f"{len(diff.tensors)} tensors differ, {diff.equal} are equal", _panels(diff))
    if as_json:
        console.json(_document(first.source.identity, second.source.identity, diff))
    else:
        _show(diff, each)
    if not diff.same:
        raise typer.Exit(ANSWER_IS_NO)


def _panels(found: Difference) -> list[Panel]:
    """Return the relative distances by layer and kind of tensor: the largest of each."""
    worst: dict[tuple[str, int], float] = {}
    for tensor in found.tensors:
        template, numbers = name_template(tensor.name)
        if tensor.distance is not None:
            kind = template.partition("layers.#.")[2] if "layers.#." in template else template
            place = (kind.removesuffix(".weight"), numbers[0] if numbers and "layers.#." in template else -1)
            worst[place] = max(worst.get(place, 0.0), tensor.distance.relative)
    kinds, layers = list(dict.fromkeys(kind for kind, _ in worst)), sorted({layer for _, layer in worst})
    values = [[worst.get((kind, layer)) for layer in layers] for kind in kinds]
    names = ["–" if layer < 0 else str(layer) for layer in layers]
    title = "Relative distance |a - b| / |a|, the largest of each kind (not measured: equal, or of another shape)"
    return [Heatmap(title, kinds, names, values, across="layer")] if worst else []


def _show(found: Difference, each: bool) -> None:
    if found.same:
        console.result(f"the same: {found.equal} tensors and the config")
        return
    for key, before, after in found.config:
        console.result(
            one_line(f"config.json: {key}: {ascii_json(before, indent=None)} -> {ascii_json(after, indent=None)}")
        )
    if found.tensors:
        groups: dict[tuple[str, str], list[TensorDifference]] = {}
        for tensor in found.tensors:
            name = tensor.name if each else name_template(tensor.name)[0]
            groups.setdefault((tensor.kind, name), []).append(tensor)
        rows = [_row(kind, name, tensors) for (kind, name), tensors in groups.items()]
        left_out = len(rows) - _SHOWN
        header = ("tensors", "", "how many", "before", "after", "max |a-b|", "relative", "cosine")
        console.table(header, rows if each else rows[:_SHOWN], right=(2, 5, 6, 7))
        if left_out > 0 and not each:
            console.result(f"… and {left_out} more kinds (--each shows all)")
    console.result(f"{len(found.tensors)} tensors differ, {found.equal} are equal")


def _row(kind: str, name: str, tensors: list[TensorDifference]) -> tuple[str, ...]:
    """One line for tensors of one kind: the worst of their distances."""
    distances = [t.distance for t in tensors if t.distance is not None]
    forms = [{_form(form) for form in (getattr(t, side) for t in tensors)} for side in ("before", "after")]
    shown = [next(iter(form)) if len(form) == 1 else "various" for form in forms]
    numbers = ("", "", "")
    if distances:
        relative, cosine = max(d.relative for d in distances), min(d.cosine for d in distances)
        numbers = (f"{max(d.largest for d in distances):.4g}", f"{relative:.3e}", f"{cosine:.6f}")
    return one_line(name, 120), kind, str(len(tensors)), *shown, *numbers


def _form(form: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{form[0]} {list(form[1])}" if form is not None else ""


def _document(a: str, b: str, found: Difference) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return value if value == value and abs(value) != float("inf") else None

    def entry(tensor: TensorDifference) -> dict[str, Any]:
        result: dict[str, Any] = {"name": tensor.name, "kind": tensor.kind}
        for side, form in (("before", tensor.before), ("after", tensor.after)):
            result[side] = {"dtype": form[0], "shape": list(form[1])} if form is not None else None
        if (distance := tensor.distance) is not None:
            result["max_abs"] = distance.largest
            result["relative"] = number(distance.relative)
            result["cosine"] = distance.cosine
            result["not_finite"] = distance.not_finite
        return result

    return {
        "schema_version": 1,
        "a": a,
        "b": b,
        "same": found.same,
        "equal": found.equal,
        "config": [{"key": key, "before": before, "after": after} for key, before, after in found.config],
        "tensors": [entry(tensor) for tensor in found.tensors],
    }
