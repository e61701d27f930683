"""The forward passes of all batches of windows, side by side: each unit is run on all of them before the next unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from moesurgery.errors import RefusedError
from moesurgery.forward.coroutine import Coroutine
from moesurgery.forward.hooks import NO_HOOKS, Hooks
from moesurgery.forward.layer_units import LayerUnit
from moesurgery.forward.tokens import Tokens
from moesurgery.forward.unit_runner import BatchPass, Resume, UnitRunner

Progress = Callable[[int], None]


class BatchPasses:
    """The forward passes of all batches, `windows` in each. Close when done."""

    def __init__(self, runner: UnitRunner, tokens: Tokens, windows: int, hooks: Hooks, resume: Resume | None) -> None:
        self.runner = runner
        self.hooks = hooks
        self.passed = resume.layer if resume else 0  # decoder layers that all batches have completed
        self.passes = [BatchPass(i, first, part) for i, (first, part) in enumerate(tokens.batches(windows))]
        for each in self.passes:
            each.coroutine = Coroutine(partial(runner.forward, each, resume))
        try:
            for each in self.passes:
                each.coroutine.advance()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.passes)

    @property
    def unit(self) -> LayerUnit | None:
        """The unit that all batches are to run next; None when all have finished."""
        waiting = {unit.path: unit for each in self.passes if (unit := each.unit) is not None}
        if len(waiting) > 1:
            raise RefusedError(f"batches take different ways through the model: {', '.join(waiting)}")
        return next(iter(waiting.values()), None)

    @property
    def outputs(self) -> list[Any]:
        """What the last unit returned for each batch."""
        return [each.last for each in self.passes]

    @property
    def resumable(self) -> bool:
        """Whether layers get no argument that earlier layers may have written to."""
        requests = [each.coroutine.request for each in self.passes]
        given = [value for r in requests if r is not None for value in (*r.args, *r.kwargs.values())]
        return all(value is None or not isinstance(value, (dict, list, set)) or not value for value in given)

    def peek(self, hooks: Hooks, count: int | None = None) -> list[Any]:
        """Run the next unit on all batches, or the first `count`, with other hooks, without advancing them, and return
        the unit's output for each."""
        unit = self.unit
        assert unit is not None
        with self.runner.weights.loaded(unit):
            return [self.runner.run_unit(each, hooks) for each in self.passes[:count]]

    def step(self, progress: Progress = lambda count: None) -> None:
        """Run the next unit on all batches, and advance them to the unit after it."""
        unit = self.unit
        assert unit is not None
        with self.runner.weights.loaded(unit):
            self.take((self.runner.run_unit(each, self.hooks) for each in self.passes), progress)

    def take(self, outputs: Iterable[Any], progress: Progress = lambda count: None) -> None:
        """Advance all batches to the unit after the next one, which returned `outputs`, perhaps in another model."""
        unit = self.unit
        assert unit is not None
        for each, output in zip(self.passes, outputs, strict=True):
            each.last = output
            each.coroutine.advance(output)
            if unit.layer is not None:
                progress(each.tokens.count)
        if unit.layer is not None:
            self.passed = unit.layer + 1

    def to_layer(self, layer: int, progress: Progress = lambda count: None) -> None:
        """Run units until decoder layer `layer` is next, or until all layers are done.

        Where several devices hold all layers, batch after batch goes through them, so that the devices work at the
        same time.
        """
        while (unit := self.unit) is not None:
            if unit.layer == layer or self.passed >= len(self.runner.layers):
                return
            if unit.layer is None or not self._held_by_several():
                self.step(progress)
                continue
            for each in self.passes:
                while (unit := each.unit) is not None and unit.layer is not None and unit.layer < layer:
                    with self.runner.weights.loaded(unit):
                        self._advance(each)
                    progress(each.tokens.count)
            self.passed = min(layer, len(self.runner.layers))

    def finish(self, number: int) -> Any:
        """Run one batch to the end and return the model's logits [b, S, V]. Call for each in turn."""
        each = self.passes[number]
        while (unit := each.unit) is not None:
            with self.runner.weights.loaded(unit, pin=True):
                self._advance(each)
        each.last = None
        result, each.coroutine.result = each.coroutine.result, None
        return result

    def logits(self, number: int, windows: int) -> Iterator[tuple[int, Tokens, Any]]:
        """Run one batch, whose layers are done, to the end; yield (first window, tokens, logits [b, S, V]), of at most
        `windows` at a time."""
        each = self.passes[number]
        layers = len(self.runner.layers)
        if windows >= len(each.tokens) or not _is_cut_by_windows(each.last, each.tokens):
            yield each.first, each.tokens, self.finish(number)
            return
        last, each.last = each.last, None
        each.coroutine.close()
        for start in range(0, len(each.tokens), windows):
            part, resume = (
                each.tokens.rows(start, start + windows),
                Resume(layers, [_cut(last, start, start + windows)]),
            )
            rest = BatchPasses(self.runner, part, windows, NO_HOOKS, resume)
            try:
                yield each.first + start, part, rest.finish(0)
            finally:
                rest.passes[0].coroutine.close()

    def close(self) -> None:
        for each in self.passes:
            each.coroutine.close()
        self.runner.weights.unpin()

    def _advance(self, each: BatchPass) -> None:
        each.last = self.runner.run_unit(each, self.hooks)
        each.coroutine.advance(each.last)

    def _held_by_several(self) -> bool:
        resident = self.runner.weights.resident
        return len(self.runner.meta_model.devices) > 1 and all(layer.path in resident for layer in self.runner.layers)


def _is_cut_by_windows(output: Any, tokens: Tokens) -> bool:
    """Whether the first axes of all that a layer returned are windows and positions."""
    parts = output if isinstance(output, tuple) else (output,)
    return all(part is None or tuple(part.shape[:2]) == tuple(tokens.ids.shape) for part in parts)


def _cut(output: Any, start: int, stop: int) -> Any:
    """Return windows `start:stop` of what a layer returned."""
    if isinstance(output, tuple):
        return tuple(_cut(part, start, stop) for part in output)
    return None if output is None else output[start:stop]
