"""The expression of a merge: one tensor of the output, computed from the same tensor of every input."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.arrays import NotFiniteError, rounded
from moesurgery.errors import RefusedError, SurgeryError
from moesurgery.expr.nodes import Expr, Reader, torch_dtype
from moesurgery.merge.compute.backend import Array, NumpyBackend, TorchBackend
from moesurgery.merge.compute.chunks import Chunk, MergeInputs, checked_sums
from moesurgery.merge.compute.method import Method, find_method

if TYPE_CHECKING:
    import numpy as np
    import torch

_DOT_RUN = 4096  # shorter than what BLAS would share out to threads of its own, which are slower here than one

_numpy = NumpyBackend()


class _Memo:
    """What was computed over whole tensors, once for all chunks and threads; not part of the expression."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.act: Callable[[Chunk], Array] | None = None

    def __reduce__(self) -> tuple[type[_Memo], tuple[()]]:
        return type(self), ()


@dataclass(frozen=True)
class MergeExpr(Expr):
    """`method` applied to `models` (and `base`), in float32, rounded once to `dtype`.

    `parameters` are under their recipe names, per-model ones as tuples. `key` is that of the random numbers. `name`
    is for messages. `origin` is the Python file of a method that is not built in. `device`: where torch computes, ""
    for numpy.
    """

    method: str
    models: tuple[Expr, ...]
    base: Expr | None
    parameters: tuple[tuple[str, Any], ...]
    dtype: str
    shape: tuple[int, ...]
    name: str
    key: int = 0
    origin: tuple[str, str] | None = None
    device: str = ""
    _memo: _Memo = field(default_factory=_Memo, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"Merged({self._digest})"

    @cached_property
    def _digest(self) -> str:
        # Where a merge spans many tensors, many expressions refer to it: its text is made once.
        text = repr(
            (self.method, self.models, self.base, self.parameters, self.dtype, self.shape, self.key, self.device)
        )
        return hashlib.sha256(f"{text} {self.origin and self.origin[1]}".encode()).hexdigest()

    @cached_property
    def _method(self) -> Method:
        return find_method(self.method, self.origin)

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return self.models if self.base is None else (*self.models, self.base)

    @cached_property
    def chunk_multiple(self) -> int:
        if self._method.kind == "whole":
            return max(self.numel, 1)
        return self._merge_inputs(None).chunk_multiple  # type: ignore[arg-type]

    @property
    def numpy_only(self) -> bool:
        return not self.device and not self._method.torch and super().numpy_only

    @property
    def memory(self) -> int:
        return max(
            super().memory,
            self._merge_inputs(None).memory,  # type: ignore[arg-type]
            *(expr.memory for expr in self.inputs),
        )

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        return torch.frombuffer(self.raw(start, stop, reader), dtype=torch_dtype(self.dtype))

    def raw(self, start: int, stop: int, reader: Reader) -> memoryview:
        import numpy as np

        backend = self._backend
        parts = [backend.encoded(values, self.dtype) for values in self._computed(start, stop, reader)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.frombuffer(p, np.uint8) for p in parts]).data

    def array(self, start: int, stop: int, reader: Reader) -> np.ndarray:
        import numpy as np

        backend = self._backend
        parts = [
            rounded(backend.to_numpy(values), self.dtype, strict=True) for values in self._computed(start, stop, reader)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _merge_inputs(self, reader: Reader) -> MergeInputs:
        method = self._method
        rows = method.rows or (method.kind == "combination" and self._axis is not None)
        return MergeInputs(self.models, self.base, self.shape, reader, self._backend, rows=rows, key=self.key)

    @property
    def _backend(self) -> NumpyBackend | TorchBackend:
        return TorchBackend(self.device or "cpu") if self.device or self._method.torch else _numpy

    @property
    def _axis(self) -> str | None:
        if self._method.axis is None or len(self.shape) < 2:  # a vector is one row, and has no columns
            return None
        return self._method.axis(dict(self.parameters))

    def _computed(self, start: int, stop: int, reader: Reader) -> Iterator[Array]:
        """Yield elements `start:stop` part by part, flat, not rounded yet."""
        import numpy as np

        inputs = self._merge_inputs(reader)
        try:
            with np.errstate(all="ignore"):
                act = self._action(inputs)
            whole = self._method.kind == "whole"
            for span in ((0, self.numel),) if whole else inputs.spans(start, stop):
                with np.errstate(all="ignore"):  # not around a `yield`, after which the caller's code would run in it
                    values = act(inputs.chunk(*span)).reshape(-1)
                yield values[start:stop] if whole else values
        except NotFiniteError:
            raise  # what writes it names the tensor
        except SurgeryError as error:
            raise type(error)(f"{self.name}: {error.message}", error.hint) from None

    def _action(self, inputs: MergeInputs) -> Callable[[Chunk], Array]:
        """Return what to do with each chunk, after looking over all of the inputs where the method wants that."""
        method, values = self._method, dict(self.parameters)
        if method.kind in ("elementwise", "whole"):
            return lambda chunk: self._called(chunk, values)
        with self._memo.lock:
            if self._memo.act is None:
                if method.kind == "streamed":
                    self._memo.act = method.call(inputs, values=values)
                else:
                    self._memo.act = combine(inputs, lambda gram: method.call(gram, values=values), self._axis)
            return self._memo.act

    def _called(self, chunk: Chunk, values: dict[str, Any]) -> Array:
        method = self._method
        models, base = chunk.models, chunk.base if method.wants_base else None
        if method.kind == "whole":
            models = [model.reshape(self.shape) for model in models]
            base = base.reshape(self.shape) if base is not None else None
        result = method.call(models, *((base,) if method.wants_base else ()), values=values)
        expected = tuple(models[0].shape)
        if tuple(getattr(result, "shape", ())) != expected:
            raise RefusedError(
                f"the method {self.method} returned {list(getattr(result, 'shape', ()))} for {list(expected)}",
                "a merge method returns one tensor of the shape of its inputs",
            )
        return result


def combine(
    inputs: MergeInputs, coefficients: Callable[[np.ndarray], np.ndarray], axis: str | None
) -> Callable[[Chunk], Array]:
    """Return the action of a combination: a weighted sum of the inputs, with weights from their inner products.

    With a base, the inner products are of the differences to it, and the sum of these is added to it. `axis`: one
    set of weights for each row or column, instead of one for the whole tensor.
    """

    def vectors(chunk: Chunk) -> list[Array]:
        return chunk.models if inputs.base is None else chunk.deltas

    def combined(chunk: Chunk, factors: np.ndarray) -> Array:
        total, *others = vectors(chunk)  # used for the last time, so changed in place
        for i, vector in enumerate((total, *others)):
            vector *= (
                float(factors[i]) if factors.ndim == 1 else inputs.backend.from_numpy(_shaped(factors[..., i], axis))
            )
        for vector in others:
            total += vector
        if inputs.base is not None:
            total += chunk.base
        return total

    if axis == "rows":
        return lambda chunk: combined(chunk, coefficients(checked_sums(_gram(inputs, vectors(chunk), -1))))
    gram = inputs.total(lambda chunk: _gram(inputs, vectors(chunk), 0 if axis == "columns" else None))
    factors = coefficients(gram)
    return lambda chunk: combined(chunk, factors)


def _gram(inputs: MergeInputs, vectors: list[Array], axis: int | None) -> np.ndarray:
    """Return the inner products [n, n] in float64, or [rows, n, n] and [columns, n, n] along an axis."""
    import numpy as np

    count = len(vectors)
    products: list[list[Any]] = [[None] * count for _ in range(count)]
    for i in range(count):
        for j in range(i, count):
            product = (
                _inner(vectors[i].reshape(-1), vectors[j].reshape(-1))
                if axis is None
                else inputs.backend.to_numpy((vectors[i] * vectors[j]).sum(axis))
            )
            products[i][j] = products[j][i] = product
    gram = np.array(products, np.float64)
    return gram if axis is None else np.moveaxis(gram, -1, 0)


def _inner(first: Array, second: Array) -> float:
    """Return the inner product: short runs in float32, their sum in float64."""
    import numpy as np

    whole = len(first) // _DOT_RUN * _DOT_RUN
    if not isinstance(first, np.ndarray) or not whole:
        return float(first @ second)
    runs = first[:whole].reshape(-1, 1, _DOT_RUN) @ second[:whole].reshape(-1, _DOT_RUN, 1)
    return float(runs.sum(dtype=np.float64)) + float(first[whole:] @ second[whole:])


def _shaped(factors: np.ndarray, axis: str | None) -> np.ndarray:
    import numpy as np

    return (factors[:, None] if axis == "rows" else factors[None, :]).astype(np.float32)
