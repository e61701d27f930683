"""Quantised weights that an edit computes on: opened as float32, and stored again in the form that they came in.

Only matrices that the edit changed are quantised again; all others keep their bytes, wherever the edit put them. So an
operation is written for plain weights, and `with_experts_opened` lets it work on quantised ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Literal

from moesurgery.checkpoint.dtypes import BY_CONFIG_NAME, PLAIN_FLOATS, element_count
from moesurgery.errors import RefusedError
from moesurgery.expr.elementwise import cast
from moesurgery.expr.nodes import Expr, Slice, concat, reshape
from moesurgery.expr.tensors import transpose
from moesurgery.families.config_keys import DTYPE_KEYS
from moesurgery.families.quantised import without_quantisation
from moesurgery.plan.dequantise import Dequantised, StoredForm, dequantised
from moesurgery.plan.matrix_origin import Matrix, first_origin, origin_of, traced_matrices
from moesurgery.plan.packed_codes import UnpackedCodes, packed_codes
from moesurgery.plan.plan import Plan
from moesurgery.plan.quantised_tensors import Encoding, OverallScale, QuantisedPart
from moesurgery.plan.side_files import without_quantisation_files

Requantize = Literal["as-source", "none"]
SquaresOf = Callable[[Plan], Mapping[str, Expr]]
# Projections that engines join to one matrix, which has one second scale.
_JOINED = (("gate_proj", "up_proj"), ("w1", "w3"), ("q_proj", "k_proj", "v_proj"))


def opened(plan: Plan, only: Collection[str] | None = None) -> Plan:
    """Return the plan with quantised weights (of `only` these main tensors) as float32; the plan itself without any.

    The config still says how they were quantised. Raises RefusedError for a form that is not known.
    """
    tensors, renamed = dequantised(plan, only=only)
    if all(tensors.get(name) is expr for name, expr in plan.tensors.items()):
        return plan
    old = {new: name for name, new in renamed.items()}
    return replace(plan, tensors=tensors, shard_of={name: plan.shard_of[old.get(name, name)] for name in tensors})


def quantised_experts(plan: Plan) -> set[str]:
    """Return the quantised weights of routed experts, by the names of their main tensors."""
    members = (member for block in plan.anatomy.blocks for member in block.members)
    return {m.name for m in members if m.part and m.stem.main and plan.tensors[m.name].dtype not in PLAIN_FLOATS}


def with_experts_opened(
    plan: Plan, requantize: Requantize, edit: Callable[[Plan], Plan], squares: SquaresOf = lambda opened: {}
) -> Plan:
    """Return `edit(plan)`, the edit seeing the experts' weights as float32, and the result having them as they came.

    With "none" all weights of the model become plain ones of the config's dtype. `squares`: see `written_back`.
    """
    before = opened(plan, None if requantize == "none" else quantised_experts(plan))
    if before is plan:
        return edit(plan)
    return written_back(edit(before), before, requantize, squares(before) if requantize == "as-source" else {})


def written_back(
    edited: Plan, before: Plan, requantize: Requantize = "as-source", squares: Mapping[str, Expr] | None = None
) -> Plan:
    """Return an edited plan with its weights stored in the form that they came in; `before` is the opened plan.

    `squares` [in] or [E, in], by the names of `before`: what squared errors of a matrix are weighed by, such as the
    mean squares of its inputs, where it or what it is nearest to has them. The last step says what was rounded.
    Raises RefusedError where matrices share a scale with such as do not change.
    """
    if requantize == "none":
        return _plain(edited, before)
    stored = _Stored(edited, before, squares or {})
    tensors: dict[str, Expr] = {}
    shard_of: dict[str, str] = {}
    for name in edited.tensors:
        for new, expr in stored.tensors_of(name).items():
            tensors[new], shard_of[new] = expr, edited.shard_of[name]
    step = edited.steps[-1]
    step = replace(
        step,
        notes=(*step.notes, stored.note()),
        report={**step.report, "requantised": dict(stored.rounded)},
    )
    return replace(edited, tensors=tensors, shard_of=shard_of, steps=(*edited.steps[:-1], step))


def was_quantised(plan: Plan) -> bool:
    """Whether an opened plan has weights that were quantised."""
    return any(origin_of(expr) is not None for expr in plan.tensors.values())


def _plain(edited: Plan, before: Plan) -> Plan:
    """Return the plan with weights that were quantised in the dtype that the config names."""
    stated = edited.anatomy.settings.first(DTYPE_KEYS)
    dtype = BY_CONFIG_NAME.get(str(stated), "BF16")
    quantised = {name for name, expr in before.tensors.items() if origin_of(expr) is not None}
    tensors = {
        name: cast(expr, dtype) if name in quantised or first_origin(expr) is not None else expr
        for name, expr in edited.tensors.items()
    }
    files = {**edited.files, **without_quantisation_files(edited.checkpoint, edited.files)}
    step = edited.steps[-1]
    steps = (*edited.steps[:-1], replace(step, parameters={**step.parameters, "requantize": "none"}))
    return replace(edited, tensors=tensors, config=without_quantisation(edited.config), files=files, steps=steps)


class _Stored:
    """The tensors that an edited plan's weights are stored as."""

    def __init__(self, plan: Plan, before: Plan, squares: Mapping[str, Expr]) -> None:
        self.plan, self.before = plan, before
        self._squares = {
            id(origin_of(before.tensors[name])): expr for name, expr in squares.items() if name in before.tensors
        }
        self._forms: dict[str, Dequantised | None] = {}
        self.rounded: Counter[str] = Counter()  # matrices by their form
        self.kept = self.weighed = 0

    def note(self) -> str:
        """Say what is rounded."""
        if not self.rounded:
            return f"no quantised weight changes a byte ({self.kept:,} matrices)"
        what = ", ".join(f"{count:,} in {form}" for form, count in self.rounded.items())
        weighed = f"; scales of {self.weighed:,} by the squares of their inputs" if self.weighed else ""
        return (
            f"matrices that changed are quantised again, each number to the nearest step: {what}{weighed};"
            f" {self.kept:,} keep their bytes"
        )

    @cached_property
    def _matrices(self) -> dict[str, list[Matrix]]:
        """The matrices of each weight that is stored quantised."""
        found = {}
        for name, expr in self.plan.tensors.items():
            form = self._form(name)
            if form is not None:
                found[name] = list(traced_matrices(expr, form if name in self.before.tensors else None))
        return found

    def _form(self, name: str) -> Dequantised | None:
        """Return the weight whose form a tensor takes: that of its name, or the first that it is computed from."""
        if name not in self._forms:
            self._forms[name] = first_origin(self.before.tensors.get(name, self.plan.tensors[name]))
        return self._forms[name]

    def _held(self, name: str) -> StoredForm:
        """Return how a weight that is quantised is stored."""
        form = self._form(name)
        assert form is not None
        assert form.held is not None
        return form.held

    @cached_property
    def _touched(self) -> set[str]:
        """The weights of which a matrix is quantised again: those that engines join to one share a second scale."""
        changed = {name for name, matrices in self._matrices.items() if not all(m.same for m in matrices)}
        return changed | {other for name in changed for other in self._joined(name)}

    def _joined(self, name: str) -> list[str]:
        """Return the weights whose second scale is to be that of `name`."""
        if self._form(name) is None or not self._held(name).overall:
            return []
        return [n for n in joined_with(name) if len(self._matrices.get(n, ())) == len(self._matrices[name])]

    def tensors_of(self, name: str) -> dict[str, Expr]:
        """Return what a tensor of the plan is stored as, by name."""
        expr = self.plan.tensors[name]
        form = self._form(name)
        if form is None:
            return {name: expr}
        matrices = self._matrices[name]
        base = _base(name, self._held(name))
        if name not in self._touched:
            self.kept += len(matrices)
            parts = _unchanged(name, matrices)
        else:
            stacked = len(expr.shape) > 2
            each = [self._quantised(name, form, number, stacked) for number in range(len(matrices))]
            parts = {suffix: concat([part[suffix] for part in each]) for suffix in each[0]}
        return {base + suffix: part for suffix, part in parts.items()}

    def _values(self, name: str, number: int) -> Expr:
        """Return one matrix of a weight as float32 [out, in]."""
        expr = self.plan.tensors[name]
        shape = expr.shape[-2:]
        if len(expr.shape) > 2:
            expr = reshape(Slice(expr, number, number + 1), shape)
        return cast(transpose(expr) if self._held(name).transposed else expr, "F32")

    def _quantised(self, name: str, form: Dequantised, number: int, stacked: bool) -> dict[str, Expr]:
        """Return the tensors of one matrix, by suffix; with a first axis of 1 where they are stacked."""
        matrix, stored = self._matrices[name][number], form.held
        assert stored is not None
        near = matrix.origin
        if matrix.same and near is not None and near.held is not None and not stored.overall:
            self.kept += 1
            return _sliced(name, near, matrix.index)
        self.rounded[str(stored.form)] += 1
        like = near if near is not None and near.held is not None and near.held.form == stored.form else None
        held = _sliced(name, like or form, matrix.index if like is not None else 0)
        old = _old(held, stored, near.shape[-2] if near is not None else 0) if like is not None else {}
        overall: Expr | None = None
        if stored.overall:
            overall = self._overall(name, number, old.get("overall"))
        encoding = Encoding(
            f"{name}[{number}]" if stacked else name,
            self._values(name, number),
            stored.form,
            old.get("scale"),
            old.get("zero"),
            held[stored.columns] if stored.columns else None,
            overall,
            self._weights(near, matrix.index, name, number),
        )
        return {**held, **parts_of(encoding, stored, held)}

    def _weights(self, near: Dequantised | None, index: int, name: str, number: int) -> Expr | None:
        """Return the squares [in] of the inputs of the matrix that a new one is nearest to, where they are known."""
        squares = self._squares.get(id(near)) if near is not None else None
        if squares is None:
            return None
        if len(squares.shape) > 1:
            squares = reshape(Slice(squares, index, index + 1), squares.shape[1:])
        if squares.shape[-1] != self._values(name, number).shape[-1]:
            return None
        self.weighed += 1
        return squares

    def _overall(self, name: str, number: int, old: Expr | None) -> Expr:
        """Return the second scale of a matrix, which those that are joined with it have, too."""
        group = [name, *self._joined(name)]
        form = self._held(name).form
        scales: list[Expr] = []
        for member in group:
            near = self._matrices[member][number]
            if near.origin is not None and near.origin.held is not None and near.origin.held.form == form:
                scales.append(_sliced(member, near.origin, near.index)[near.origin.held.scale])
        values = tuple(self._values(member, number) for member in group)
        return OverallScale(name, values, form, old, tuple(scales) if len(scales) == len(group) else ())


def joined_with(name: str) -> list[str]:
    """Return the names of the weights that engines join with a weight to one matrix."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    group = next((group for group in _JOINED if module in group), ())
    return [name.replace(f".{module}.", f".{other}.") for other in group if other != module]


def _base(name: str, stored: StoredForm) -> str:
    """Return what the names of a weight's tensors begin with, from that of the plain weight."""
    plain = {".weight_packed": ".weight", ".qweight": ".weight", "_blocks": ""}.get(stored.main, stored.main)
    return name.removesuffix(plain)


def _sliced(name: str, origin: Dequantised, index: int) -> dict[str, Expr]:
    """Return the tensors of one matrix of a stored weight by suffix, with a first axis of 1 where it is a stack."""
    assert origin.held is not None
    count = origin.numel // element_count(origin.shape[-2:])
    if len(origin.shape) == 2:
        return dict(origin.held.tensors)
    parts: dict[str, Expr] = {}
    for suffix, expr in origin.held.tensors.items():
        if not expr.shape or expr.shape[0] != count:
            raise RefusedError(
                f"{name}: its {suffix} is one for all experts, which do not change alike",
                "dequantise first with `moesurgery convert --dequantize`",
            )
        parts[suffix] = Slice(expr, index, index + 1)
    return parts


def _unchanged(name: str, matrices: list[Matrix]) -> dict[str, Expr]:
    """Return the stored tensors of a weight of which no matrix changed."""
    origins = {id(m.origin): m.origin for m in matrices}
    (origin, *more) = origins.values()
    assert origin is not None
    assert origin.held is not None
    count = origin.numel // element_count(origin.shape[-2:])
    if not more and [m.index for m in matrices] == list(range(count)):
        return dict(origin.held.tensors)
    each = [_sliced(name, m.origin, m.index) for m in matrices if m.origin is not None]
    return {suffix: concat([part[suffix] for part in each]) for suffix in each[0]}


def _old(held: Mapping[str, Expr], stored: StoredForm, outputs: int) -> dict[str, Expr]:
    """Return the scales and zero points of one stored matrix in the order of [out, in]."""
    old = {"scale": transpose(held[stored.scale]) if stored.scale == ".scales" else held[stored.scale]}
    if stored.zero == ".qzeros":
        old["zero"] = transpose(UnpackedCodes(held[stored.zero], stored.form.bits, stored.order))
    elif stored.zero:
        unpacked = UnpackedCodes(transpose(held[stored.zero]), stored.form.bits)
        old["zero"] = Slice(transpose(unpacked), 0, outputs)
    if stored.overall:
        old["overall"] = held[stored.overall]
    return old


def parts_of(encoding: Encoding, stored: StoredForm, like: Mapping[str, Expr]) -> dict[str, Expr]:
    """Return the tensors of an encoded matrix by suffix, of the shapes and dtypes of `like`."""
    form = stored.form
    codes: Expr = QuantisedPart(encoding, "codes")
    scale: Expr = QuantisedPart(encoding, "scale")
    main = like[stored.main]
    if form.bits < 8 or main.dtype == "I32":
        if stored.main != ".qweight":
            codes = packed_codes(codes, form.bits, main.dtype)
        elif stored.order:
            codes = packed_codes(transpose(codes), form.bits, main.dtype, stored.order)
        else:
            codes = transpose(packed_codes(codes, form.bits, main.dtype))
    parts = {stored.main: codes, stored.scale: transpose(scale) if stored.scale == ".scales" else scale}
    if stored.zero:
        zero = transpose(QuantisedPart(encoding, "zero"))
        zero = packed_codes(zero, form.bits, like[stored.zero].dtype, stored.order)
        parts[stored.zero] = zero if stored.zero == ".qzeros" else transpose(zero)
    if stored.overall and encoding.overall is not None:
        parts[stored.overall] = encoding.overall
    return {suffix: reshape(part, like[suffix].shape) for suffix, part in parts.items()}
