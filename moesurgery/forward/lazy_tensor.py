"""Checkpoint tensors that are not read yet, in a form that transformers' weight conversions accept.

transformers describes how a checkpoint's tensors become a module's parameters (one tensor per expert into one
stacked parameter, for example) by operations on tensors. Run on `LazyTensor`s, stacking and joining build
expressions, so that a whole layer of experts is then read straight into the one parameter that holds it. Any
other operation falls back to real tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from moesurgery.expr.nodes import Concat, Expr, Slice, concat, reshape, stack, torch_dtype
from moesurgery.expr.tensors import concat_last, slice_last, transpose
from moesurgery.forward.layer_loading import Loader

if TYPE_CHECKING:
    import torch


class LazyTensor:
    """An expression that can be used as a tensor in `torch.stack`, `torch.cat`, `torch.chunk` and `torch.transpose`."""

    def __init__(self, expr: Expr, loader: Loader) -> None:
        self.expr = expr
        self.loader = loader

    @property
    def shape(self) -> torch.Size:
        import torch

        return torch.Size(self.expr.shape)

    @property
    def ndim(self) -> int:
        return len(self.expr.shape)

    def contiguous(self) -> LazyTensor:
        return self

    def __getitem__(self, index: Any) -> Any:
        """Return whole entries of the first axis as an expression; anything else of the real values."""
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(self.expr.shape[0])
            if stop > start:
                return LazyTensor(Slice(self.expr, start, stop), self.loader)
        return self.real()[index]

    def real(self) -> torch.Tensor:
        """Return the values in their own dtype."""
        import torch

        out = torch.empty(self.expr.shape, dtype=torch_dtype(self.expr.dtype))
        self.loader.fill([(out, self.expr)])
        return out

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.real(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        symbolic = _SYMBOLIC.get(function.__name__)
        symbolic_result = symbolic(*args, **kwargs) if symbolic else None
        return symbolic_result if symbolic_result is not None else function(*_real(args), **_real(kwargs))


def _real(value: Any) -> Any:
    if isinstance(value, LazyTensor):
        return value.real()
    if isinstance(value, (list, tuple)):
        return type(value)(_real(v) for v in value)
    if isinstance(value, dict):
        return {k: _real(v) for k, v in value.items()}
    return value


def _exprs(tensors: Any) -> list[Expr] | None:
    """Return the expressions of a list of lazy tensors that agree in dtype; None for anything else."""
    if not isinstance(tensors, (list, tuple)) or not all(isinstance(t, LazyTensor) for t in tensors):
        return None
    exprs = [t.expr for t in tensors]
    return exprs if len({e.dtype for e in exprs}) == 1 else None


def _stack(tensors: Any, dim: int = 0) -> LazyTensor | None:
    exprs = _exprs(tensors)
    return LazyTensor(stack(exprs), tensors[0].loader) if exprs and dim == 0 else None


def _cat(tensors: Any, dim: int = 0) -> LazyTensor | None:
    exprs = _exprs(tensors)
    if not exprs:
        return None
    rank = len(exprs[0].shape)
    dim %= rank
    if dim == 0:
        return LazyTensor(concat(exprs), tensors[0].loader)
    if dim == rank - 1 and rank > 1:
        return LazyTensor(concat_last(exprs), tensors[0].loader)
    if dim != 1:
        return None
    # [E, I, H] and [E, I, H] into [E, 2I, H]: expert by expert, the rows of each one after the other.
    joined = concat([_entry(expr, e) for e in range(exprs[0].shape[0]) for expr in exprs])
    return LazyTensor(
        reshape(joined, (exprs[0].shape[0], sum(e.shape[1] for e in exprs), *exprs[0].shape[2:])), tensors[0].loader
    )


def _entry(expr: Expr, index: int) -> Expr:
    """Return one entry of the first axis, without that axis."""
    if isinstance(expr, Concat) and len(expr.parts) == expr.shape[0]:
        return reshape(expr.parts[index], expr.shape[1:])
    return reshape(Slice(expr, index, index + 1), expr.shape[1:])


def _chunk(tensor: Any, chunks: int, dim: int = 0) -> tuple[LazyTensor, ...] | None:
    if not isinstance(tensor, LazyTensor):
        return None
    expr = tensor.expr
    size = expr.shape[dim]
    if size % chunks:
        return None
    step = size // chunks
    cuts = [(i * step, (i + 1) * step) for i in range(chunks)]
    if dim % tensor.ndim == 0:
        return tuple(LazyTensor(Slice(expr, a, b), tensor.loader) for a, b in cuts)
    if dim % tensor.ndim == tensor.ndim - 1:
        return tuple(LazyTensor(slice_last(expr, a, b), tensor.loader) for a, b in cuts)
    return None


def _transpose(tensor: Any, dim0: int, dim1: int) -> LazyTensor | None:
    if not isinstance(tensor, LazyTensor) or {dim0 % tensor.ndim, dim1 % tensor.ndim} != {
        tensor.ndim - 1,
        tensor.ndim - 2,
    }:
        return None
    return LazyTensor(transpose(tensor.expr), tensor.loader)


_SYMBOLIC: dict[str, Callable[..., Any]] = {"stack": _stack, "cat": _cat, "chunk": _chunk, "transpose": _transpose}
