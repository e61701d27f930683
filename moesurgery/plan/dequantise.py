"""Dequantise weights, a few rows at a time; and what they are stored as, for those that are quantised again.

FP8 with one scale per tensor, channel or block (floats, or powers of two as E8M0); MXFP4 and FP4 (OCP
Microscaling Formats 1.0: two 4-bit floats per byte, low nibble first, one exponent per 32 values); NVFP4 (the
same with FP8 scales per 16 values and a scale of these, by which ModelOpt multiplies and compressed-tensors
divides); integers of compressed-tensors, packed or plain, with zero points and an order of inputs or without; GPTQ
(words along the inputs, zero points less one unless the format is gptq_v2) and AWQ (words along the outputs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.dtypes import BLOCKS, PLAIN_FLOATS
from moesurgery.errors import RefusedError
from moesurgery.expr.elementwise import cast
from moesurgery.expr.nodes import Expr, Reader, Slice, evaluated
from moesurgery.expr.tensors import function_name, transpose
from moesurgery.families.quantised import (
    AWQ_ORDER,
    COMPANIONS,
    QuantTensor,
    bits_that_fit,
    method,
    packed_bits,
    quantisation_config,
    split_name,
)
from moesurgery.plan.code_values import float_values, fp4_values, integer_values, packed_values
from moesurgery.plan.packed_codes import UnpackedCodes
from moesurgery.plan.plan import Plan
from moesurgery.plan.quantised_form import EXPONENTS, Form, Numbers

if TYPE_CHECKING:
    import torch

_FP8 = frozenset({"F8_E4M3", "F8_E5M2"})


class UnknownFormError(RefusedError):
    """A quantised form that is not read here."""


@dataclass(frozen=True)
class StoredForm:
    """What matrices are stored as: the form, and all of their tensors by what their names end in.

    `main` is the ending of the codes, `scale`, `zero`, `columns` and `overall` those of the tensors of these kinds, ""
    for one that there is not. `order` is that of codes in a word. `transposed`: the plain weights are
    [in, out].
    """

    form: Form
    tensors: Mapping[str, Expr]
    main: str
    scale: str
    zero: str = ""
    columns: str = ""
    overall: str = ""
    order: tuple[int, ...] = ()
    transposed: bool = False


@dataclass(frozen=True)
class Dequantised(Expr):
    """The values of quantised matrices [..., out, in], in float32.

    Each of `parts` is an expression and the number of output rows that share a row of it: 1 for the stored
    weights, the height of a block for block scales, `out` for one row per matrix, 0 for one for all matrices.
    `function(width, *rows, **parameters)` takes those rows as matrices, one row per output row, and returns [rows, in].
    `held` says what they are stored as.
    """

    function: Callable[..., Any]
    parts: tuple[tuple[Expr, int], ...]
    shape: tuple[int, ...]
    parameters: tuple[tuple[str, Any], ...] = field(default=())
    held: StoredForm | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return f"Dequantised({function_name(self.function)}, {self.parts!r}, {self.shape!r}, {self.parameters!r})"

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return "F32"

    @property
    def chunk_multiple(self) -> int:
        out, width = self.shape[-2:]
        if any(expr.chunk_multiple != 1 for expr, _ in self.parts):
            return max(out * width, 1)
        rows = math.lcm(*(share for _, share in self.parts if 1 <= share < out), 1) if self._even else out
        return rows * width

    @property
    def _even(self) -> bool:
        """Whether blocks end where matrices end."""
        out = self.shape[-2]
        return math.prod(self.shape[:-2]) == 1 or all(out % share == 0 for _, share in self.parts if share)

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return tuple(expr for expr, _ in self.parts)

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        out, width = self.shape[-2:]
        first, last = start // width, stop // width
        chunks = []
        while first < last:
            matrix, row = divmod(first, out)
            until = min(out, row + last - first)
            rows = [self._rows(expr, share, matrix, row, until, reader) for expr, share in self.parts]
            chunks.append(self.function(width, *rows, **dict(self.parameters)).reshape(-1))
            first += until - row
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def _rows(self, expr: Expr, share: int, matrix: int, row: int, until: int, reader: Reader) -> torch.Tensor:
        """Return the rows of a part that belong to output rows `row:until` of one matrix."""
        import torch

        out = self.shape[-2]
        per_matrix = -(-out // share) if share else 0
        width = expr.numel // (math.prod(self.shape[:-2]) * per_matrix) if share else expr.numel
        first, last = (row // share, -(-until // share)) if share else (0, 1)
        at = matrix * per_matrix
        values = evaluated(expr, (at + first) * width, (at + last) * width, reader).view(last - first, width)
        if share == 1:
            return values
        return values[torch.arange(row, until) // share - first] if last - first > 1 else values


def dequantised(
    plan: Plan, dtype: str = "F32", only: Container[str] | None = None
) -> tuple[dict[str, Expr], dict[str, str]]:
    """Return the plan's tensors with all quantised weights as plain floats of `dtype`, without their companions.

    Tensors that are plain floats stay as they are, and so do weights whose main tensor is not among `only`. Second, the
    new name of each main tensor whose name changed.
    Raises RefusedError for an unsupported form.
    """
    names = plan.tensors
    stems = {name: split_name(name, names.__contains__, lambda n: names[n].dtype) for name in names}
    companions: dict[str, list[tuple[QuantTensor, Expr]]] = {}  # by the name without suffix
    for name, stem in stems.items():
        if stem.companion is not None:
            companions.setdefault(stem.base, []).append((stem.companion, names[name]))
    if not companions:
        return dict(names), {}
    tensors: dict[str, Expr] = {}
    renamed: dict[str, str] = {}
    for name, expr in names.items():
        stem = stems[name]
        if only is not None and (name if stem.companion is None else stem.base + stem.companion.of) not in only:
            tensors[name] = expr
            continue
        if stem.companion is not None:
            continue
        beside = companions.get(stem.base, [])
        if not beside or stem.bias or expr.dtype in PLAIN_FLOATS:
            tensors[name] = expr
            continue
        plain = stem.base + {".weight_packed": ".weight", ".qweight": ".weight", "_blocks": ""}.get(
            stem.suffix, stem.suffix
        )
        tensors[plain] = cast(_values(_Weight(name, expr, stem.suffix, beside, plan.config)), dtype)
        if plain != name:
            renamed[name] = plain
    return tensors, renamed


def plain_values(plan: Plan, name: str) -> Expr:
    """Return one weight of a plan as plain floats. Raises RefusedError for an unsupported quantised form."""
    expr = plan.tensors[name]
    if expr.dtype in PLAIN_FLOATS:
        return expr
    if expr.dtype in BLOCKS:
        return cast(expr, "F32")
    stem = split_name(name, plan.tensors.__contains__, lambda n: plan.tensors[n].dtype)
    beside = [
        (companion, plan.tensors[stem.base + companion.suffix])
        for companion in COMPANIONS
        if stem.base + companion.of == name and stem.base + companion.suffix in plan.tensors
    ]
    return _values(_Weight(name, expr, stem.suffix, beside, plan.config))


@dataclass(frozen=True)
class _Weight:
    """A quantised tensor and its companions (scales, zero points, …)."""

    name: str
    expr: Expr
    suffix: str
    beside: list[tuple[QuantTensor, Expr]]
    config: Mapping[str, Any]

    @property
    def tensors(self) -> dict[str, Expr]:
        """All of its tensors by what their names end in."""
        return {self.suffix: self.expr, **{c.suffix: e for c, e in self.beside}}

    def of_kind(self, kind: str, rank: int) -> Expr | None:
        return next((e for c, e in self.beside if c.kind == kind and c.rank == rank), None)

    def named(self, suffix: str) -> Expr | None:
        return next((e for c, e in self.beside if c.suffix == suffix), None)

    @property
    def has_offsets(self) -> bool:
        """Whether there are zero points or an order of columns."""
        return any(c.suffix.endswith(("zero_point", "qzeros", "g_idx")) for c, _ in self.beside)

    def refused(self, why: str = "") -> UnknownFormError:
        form = method(self.config) or self.expr.dtype
        return UnknownFormError(
            f"{self.name} is stored as {form}{why}, which is not dequantised here",
            "dequantise it first with the tool that made it; FP8, MXFP4, NVFP4, integers of compressed-tensors,"
            " GPTQ and AWQ are read as they are",
        )


def _values(weight: _Weight) -> Expr:
    """Return the expression of the values of one quantised tensor."""
    expr = weight.expr
    scale, over, under = weight.of_kind("scale", 1), weight.of_kind("scale", 0), weight.of_kind("divisor", 0)
    if scale is None or any(c.suffix.startswith((".SCB", ".weight.", ".biases")) for c, _ in weight.beside):
        raise weight.refused()
    if weight.suffix == ".qweight":
        return _of_words(weight)
    if expr.dtype == "I32" and weight.suffix == ".weight_packed":
        return _of_packed(weight, scale)
    if weight.has_offsets:
        raise weight.refused()
    if expr.dtype in _FP8 and over is None and under is None:
        numbers: Numbers = "e4m3" if expr.dtype == "F8_E4M3" else "e5m2"
        return _scaled(weight, float_values, expr.shape, scale, numbers)
    if expr.dtype == "I8" and scale.dtype not in EXPONENTS:
        return _scaled(weight, float_values, expr.shape, scale, "int", 8)
    if expr.dtype not in ("U8", "I8") or (weight.suffix == "" and over is not None):
        raise weight.refused()
    if weight.suffix == "_blocks":
        shape = (*expr.shape[:-2], expr.shape[-2] * expr.shape[-1] * 2)
        values = _scaled(weight, fp4_values, shape, scale, "e2m1", 4)
        assert isinstance(values, Dequantised)
        assert values.held is not None
        return transpose(replace(values, held=replace(values.held, transposed=True)))  # gpt-oss: plain [E, in, out]
    return _scaled(weight, fp4_values, _wider(expr, 2), scale, "e2m1", 4, over=over, under=under)


def _of_packed(weight: _Weight, scale: Expr) -> Expr:
    """Return the values of integers that compressed-tensors packed along the inputs."""
    expr = weight.expr
    fitting = bits_that_fit(weight.config, expr.shape, scale.shape)
    bits = min(fitting, default=3)
    if len(fitting) > 1 or 32 % bits:
        raise weight.refused(" with bits that its shape does not tell")
    if not weight.has_offsets:
        return _scaled(
            weight, packed_values, _wider(expr, 32 // bits), scale, "int", bits, parameters=(("bits", bits),)
        )
    zero, columns = weight.named(".weight_zero_point"), weight.named(".weight_g_idx")
    codes = UnpackedCodes(expr, bits)
    if len(codes.shape) != 2:
        raise weight.refused(f" with shape {list(expr.shape)}")
    zeros = None
    if zero is not None:
        zeros = Slice(transpose(UnpackedCodes(transpose(zero), bits)), 0, codes.shape[0])
    return _of_integers(weight, codes, scale, zeros, columns, bits)


def _of_words(weight: _Weight) -> Expr:
    """Return the values of GPTQ and AWQ as [out, in]."""
    qweight, scales = weight.expr, weight.named(".scales")
    zeros, columns, bits = weight.named(".qzeros"), weight.named(".g_idx"), packed_bits(weight.config)
    settings = quantisation_config(weight.config)
    if scales is None or zeros is None or 32 % bits or len(qweight.shape) != 2 or len(scales.shape) != 2:
        raise weight.refused(f" of {bits} bits")
    awq = qweight.shape[1] != scales.shape[1]
    if awq and (bits != 4 or str(settings.get("version", "gemm")).lower() != "gemm"):
        raise weight.refused(f" of {bits} bits, version {settings.get('version')}")
    order = AWQ_ORDER if awq else ()
    codes = transpose(UnpackedCodes(qweight, bits, order)) if awq else UnpackedCodes(transpose(qweight), bits)
    less = 0 if awq or settings.get("checkpoint_format") == "gptq_v2" else 1
    unpacked = transpose(UnpackedCodes(zeros, bits, order))
    fixed = settings.get("sym") is True
    return _of_integers(weight, codes, transpose(scales), unpacked, columns, bits, order=order, less=less, fixed=fixed)


def _of_integers(
    weight: _Weight,
    codes: Expr,
    scale: Expr,
    zeros: Expr | None,
    columns: Expr | None,
    bits: int,
    *,
    order: tuple[int, ...] = (),
    less: int = 0,
    fixed: bool = False,
) -> Expr:
    """Return the values of codes [out, in] with scales and zero points [out, in / wide]."""
    out, width = codes.shape
    groups = scale.shape[1]
    if scale.shape[0] != out or width % groups or (zeros is not None and zeros.shape != scale.shape):
        raise weight.refused(f" with scales {list(scale.shape)} for {[out, width]}")
    parts = [(codes, 1), (scale, 1), *((e, share) for e, share in ((zeros, 1), (columns, 0)) if e is not None)]
    form = Form("int", bits, 1, width // groups, scale.dtype, zeros=zeros is not None, less=less, fixed=fixed)
    ends = weight.tensors
    stored = StoredForm(
        form,
        weight.tensors,
        weight.suffix,
        next(s for s in (".scales", ".weight_scale") if s in ends),
        next((s for s in (".qzeros", ".weight_zero_point") if s in ends), ""),
        "" if columns is None else next(s for s in (".g_idx", ".weight_g_idx") if s in ends),
        order=order,
    )
    parameters = (("wide", width // groups), ("middle", form.middle), ("zeros", zeros is not None), ("less", less))
    return Dequantised(integer_values, tuple(parts), (out, width), parameters, stored)


def _wider(expr: Expr, times: int) -> tuple[int, ...]:
    return (*expr.shape[:-1], expr.shape[-1] * times)


def _scaled(
    weight: _Weight,
    function: Callable[..., Any],
    shape: tuple[int, ...],
    scale: Expr,
    numbers: Numbers,
    bits: int = 8,
    *,
    over: Expr | None = None,
    under: Expr | None = None,
    parameters: tuple[tuple[str, Any], ...] = (),
) -> Expr:
    """Return `function` of the weights and the scales that belong to each row of them."""
    if len(shape) < 2:
        raise weight.refused(f" with shape {list(weight.expr.shape)}")
    tall, wide = _block(weight, shape, scale)
    parts = [(weight.expr, 1), (scale, tall)]
    overall = over if over is not None else under
    if overall is not None:
        if overall.numel not in (1, math.prod(shape[:-2])):
            raise weight.refused(f" with scales of scales {list(overall.shape)}")
        parts.append((overall, 0 if overall.numel == 1 else shape[-2]))
    if under is not None:
        parameters = (*parameters, ("divide", True))
    form = Form(
        numbers,
        bits,
        tall or shape[-2],
        wide,
        scale.dtype,
        powers=quantisation_config(weight.config).get("scale_fmt") == "ue8m0",
        signed=weight.expr.dtype == "I8" and numbers == "int",
        overall="" if overall is None else "times" if under is None else "over",
    )
    ends = {id(expr): c.suffix for c, expr in weight.beside}
    stored = StoredForm(
        form,
        weight.tensors,
        weight.suffix,
        ends[id(scale)],
        overall="" if overall is None else ends[id(overall)],
    )
    return Dequantised(function, tuple(parts), shape, (*parameters, ("wide", wide)), stored)


def _block(weight: _Weight, shape: tuple[int, ...], scale: Expr) -> tuple[int, int]:
    """Return how many rows and columns of a matrix share one scale; 0 rows where all matrices share it."""
    lead, (out, width) = shape[:-2], shape[-2:]
    if scale.numel == 1:
        return 0, width
    rest = scale.shape[len(lead) :]
    if scale.shape[: len(lead)] != lead or len(rest) > 2:
        raise weight.refused(f" with scales {list(scale.shape)} for {list(shape)}")
    rows, columns = (*rest, 1, 1)[:2] if rest else (1, 1)
    stated = quantisation_config(weight.config).get("weight_block_size")
    pair = stated if isinstance(stated, (list, tuple)) and len(stated) == 2 else (None, None)
    sizes = []
    for size, count, given in ((out, rows, pair[0]), (width, columns, pair[1])):
        if type(given) is int and given > 0 and -(-size // given) == count:
            sizes.append(min(given, size))
        elif count and size % count == 0:
            sizes.append(size // count)
        else:
            raise weight.refused(f" with scales {list(scale.shape)} for {list(shape)}")
    return sizes[0], sizes[1]
