"""What `moesurgery fit` shows: tables, a picture of the front, and the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.budget.budget import Budget
from moesurgery.budget.costs import Cost
from moesurgery.budget.damage import PRICED
from moesurgery.budget.shape import MixtureShape
from moesurgery.cli._console import console, human_bytes, human_count
from moesurgery.cli._pictures import write_picture
from moesurgery.cli._points import Points
from moesurgery.stats.expert_budget import best_allocation, uniform_allocation

if TYPE_CHECKING:
    from moesurgery.fitting.fit_search import Fitted

_MOST_ROWS = 16
_MORE_MEMORY = 1.1
_FRONT = 12  # amounts of memory for which the best shape is predicted
_HEADER = ("shape", "experts", "width", "top-k", "form", "memory", "active", "tok/s")
_SHAPE = tuple(range(1, 4))


def show_shapes(budget: Budget, last: str) -> None:
    """Print what fits, without any text to judge it by, and a `last` line."""
    _say_budget(budget)
    shapes = _thinned(budget.shapes(), _MOST_ROWS)
    rows = [_row(*found) for found in [(budget.original, budget.costs.of(budget.original)), *shapes]]
    rows[0] = ("as it is", *rows[0][1:])
    console.table(_HEADER, rows, right=(1, 2, 3, 5, 6, 7))
    if len(shapes) < (count := len(budget.shapes())):
        console.result(f"{len(shapes)} of {count} shapes that fit and that no other contains; --json has all")
    console.result(last)


def show_fitted(budget: Budget, found: Fitted) -> None:
    """Print what was measured, the winner first, and what more memory and numbers by layer would buy."""
    _say_budget(budget)
    known = [c for c in found.candidates if c.measured is not None or c.repaired is not None]
    known.sort(key=lambda c: (c is not found.winner, c.repaired is None, c.repaired or 0, c.measured or 0))
    rows = [(*_row(c.shape, c.cost), f"{c.predicted:+.4f}", _signed(c.measured), _signed(c.repaired)) for c in known]
    rows[0] = (f"{rows[0][0]} (taken)", *rows[0][1:])
    repair = f"refit {found.repair.kind}" if found.repair else "repaired"
    console.table((*_HEADER, "predicted", "measured", repair), rows, right=(1, 2, 3, 5, 6, 7, 8, 9, 10))
    base, taken = found.heldout.nats["original"], found.heldout.chosen
    assert taken is not None
    low, high = found.heldout.intervals[taken]
    console.result(
        f"loss above the original's {base:.4f} in nats per token, over {found.heldout.tokens:,} held-out tokens;"
        f" 95 % interval of the one taken {low:+.4f} to {high:+.4f}"
    )
    if found.further:
        figures = ", ".join(f"{name} {_signed(x)}" for name, x in sorted(found.further.items(), key=lambda i: i[1]))
        console.result(f"not told apart there, these were measured on {found.further_tokens:,} tokens more: {figures}")
    others = len(found.candidates) - len(known)
    chosen = f"; experts chosen by {found.by}" if found.by else ""
    rest = "every other shape that fits is smaller than one of these"
    if others:
        rest = f"{others} more shapes fit, and are predicted to cost more or nearly the same"
    console.result(f"{rest}{chosen}")
    if more := _with_more(budget, found):
        shape, cost, predicted = more
        console.result(
            f"10 % more memory ({human_bytes(_MORE_MEMORY * budget.limits.memory)}) would buy {shape.name}:"
            f" {human_bytes(cost.memory)}, predicted {predicted:+.4f}"
        )
    for axis, (uniform, best) in _by_layer(budget, found).items():
        less = f"{100 * (1 - best / uniform):.0f} % less" if uniform else "the same"
        console.result(
            f"one number of {axis} for all layers loses {uniform:.4f} of the routed output, summed over layers;"
            f" the best number for each, in the same bytes, {best:.4f}: {less}"
        )
    console.result()


def _say_budget(budget: Budget) -> None:
    limits, cost = budget.limits, budget.costs.of(budget.original)
    stated = [
        f"{human_bytes(limits.memory)}: {human_bytes(cost.kv_bytes)} for the KV cache,"
        f" {human_bytes(max(0, limits.memory - cost.kv_bytes))} for weights"
    ]
    if limits.active is not None:
        stated.append(f"at most {human_count(limits.active)} active parameters")
    if limits.speed is not None:
        stated.append(f"at least {limits.speed:g} tokens per second")
    console.result("; ".join(stated))
    console.result()


def _row(shape: MixtureShape, cost: Cost) -> tuple[str, ...]:
    speed = "-" if cost.tokens_per_second is None else f"{cost.tokens_per_second:.0f}"
    numbers = (str(shape.experts), str(shape.width), str(shape.top_k))
    return (shape.name, *numbers, shape.form, human_bytes(cost.memory), human_count(cost.active), speed)


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _thinned(found: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many entries, evenly spread, the first and the last among them."""
    if len(found) <= most:
        return list(found)
    return [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]


def _with_more(budget: Budget, found: Fitted) -> tuple[MixtureShape, Cost, float] | None:
    """Return the shape that is predicted best with more memory; None where the model then fits as it is."""
    shapes = dict(budget.shapes(_MORE_MEMORY))
    best = min(shapes, key=found.prediction.of)
    return None if best == budget.original else (best, shapes[best], found.prediction.of(best))


def _by_layer(budget: Budget, found: Fitted) -> dict[str, tuple[float, float]]:
    """Return for each axis that the winner makes smaller the error summed over layers, with one number for all and with
    the best number for each that has the same sum. Neurons go in the steps of the search."""
    curves, shape, own = found.prediction.curves, found.winner.shape, budget.original
    by_layer = {}
    axes = [("experts", curves.experts, shape.experts, own.experts, shape.top_k, 1)]
    if curves.width is not None and len(widths := budget.choices.width) > 1:
        axes.append(("neurons", curves.width, shape.width, own.width, widths[0], widths[-1] - widths[-2]))
    for name, errors, kept, whole, least, step in axes:
        if kept < whole:
            costs = {str(layer): row[::-1][::step].tolist() for layer, row in enumerate(errors)}
            gone, most = (whole - kept) // step, (whole - least) // step
            best = best_allocation(costs, gone * len(costs), most)
            by_layer[name] = (uniform_allocation(costs, gone).cost, best.cost)
    return by_layer


def _front(budget: Budget, found: Fitted) -> list[tuple[MixtureShape, Cost, float]]:
    """Return the shapes that are predicted best for some amounts of memory, from half to all that the model takes."""
    whole = budget.costs.of(budget.original).memory / budget.limits.memory
    best: dict[MixtureShape, tuple[MixtureShape, Cost, float]] = {}
    for i in range(_FRONT):
        shapes = dict(budget.shapes(min(1.0, whole) * 0.6 + i * (whole - 0.6 * min(1.0, whole)) / (_FRONT - 1)))
        if shapes:
            shape = min(shapes, key=found.prediction.of)
            best[shape] = (shape, shapes[shape], found.prediction.of(shape))
    return sorted(best.values(), key=lambda entry: entry[1].memory)


def write_front(path: Path | None, name: str, budget: Budget, found: Fitted | None) -> None:
    """Draw loss against memory where it was measured, else active parameters against memory."""
    if path is None:
        return
    limits = budget.limits
    if found is None:
        points = [(c.memory / 1e9, c.active / 1e9, s.name) for s, c in budget.shapes()]
        panel = Points("What fits", "memory, GB", "active parameters, billions", points, limit=limits.memory / 1e9)
        write_picture(path, f"{name}: what fits", f"{human_bytes(limits.memory)} for weights and KV cache", [panel])
        return
    outcomes = [(c, c.repaired if c.repaired is not None else c.measured) for c in found.candidates]
    points = [(c.cost.memory / 1e9, y, c.shape.name) for c, y in outcomes if y is not None and c is not found.winner]
    won = found.winner.repaired if found.winner.repaired is not None else found.winner.measured
    marked = [(found.winner.cost.memory / 1e9, won or 0.0, found.winner.shape.name)]
    line = [(cost.memory / 1e9, predicted) for _, cost, predicted in _front(budget, found)]
    panel = Points(
        "Line: predicted best for the memory; points: measured",
        "memory, GB",
        "loss above the original's, nats per token",
        points,
        marked,
        line,
        limits.memory / 1e9,
    )
    about = f"{found.heldout.tokens:,} held-out tokens; {human_bytes(limits.memory)} for weights and KV cache"
    write_picture(path, f"{name}: what a budget buys", about, [panel])


def shapes_document(budget: Budget) -> dict[str, Any]:
    """Return as JSON what fits."""
    return {
        "schema_version": 1,
        "fits": False,
        "limits": asdict(budget.limits),
        "original": _entry(budget.original, budget.costs.of(budget.original)),
        "shapes": [_entry(shape, cost) for shape, cost in budget.shapes()],
    }


def document_of(budget: Budget, found: Fitted) -> dict[str, Any]:
    """Return as JSON what was found."""
    more = _with_more(budget, found)
    return {
        "fit": {
            "limits": asdict(budget.limits),
            "original": _entry(budget.original, budget.costs.of(budget.original)),
            "taken": found.winner.shape.name,
            "by": found.by,
            "prices": dict(zip(PRICED, found.prediction.prices, strict=True)),
            "candidates": [
                {
                    **_entry(c.shape, c.cost),
                    "predicted": c.predicted,
                    "measured": c.measured,
                    "repaired": c.repaired,
                }
                for c in found.candidates
            ],
            "with_10_percent_more": None if more is None else {**_entry(more[0], more[1]), "predicted": more[2]},
            "further": {"tokens": found.further_tokens, "increases": dict(found.further)},
            "front": [{**_entry(s, c), "predicted": p} for s, c, p in _front(budget, found)],
            "by_layer": {axis: {"uniform": a, "best": b} for axis, (a, b) in _by_layer(budget, found).items()},
        },
        "heldout": asdict(found.heldout),
    }


def _entry(shape: MixtureShape, cost: Cost) -> dict[str, Any]:
    return {"shape": shape.name, **asdict(shape), **asdict(cost), "memory": cost.memory}
