"""The tokenizer of a merge: its files, and which row of each model's embedding stands for each of its tokens.

tokenizer.json is read and edited as data; no tokenizer library is needed. A union keeps the base's tokens under their
numbers and appends those of the other models, with their merges, so that text of either is encoded as it was in full
words; mergekit appends them as literal words, which byte-level texts never hold.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.arrays import rounded
from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.filenames import OTHER_TOKENIZER_FORMS, TOKENIZER, TOKENIZER_FILES
from moesurgery.checkpoint.strict_json import parse_json, write_json
from moesurgery.errors import RefusedError
from moesurgery.escape import one_line
from moesurgery.expr.nodes import Expr, Reader, Slice, reshape, torch_dtype
from moesurgery.families import components
from moesurgery.merge.align import NeuronStatistics
from moesurgery.merge.compatibility import tokenizers_differ
from moesurgery.merge.recipe.tokenizer_config import TokenizerConfig, TokenSource
from moesurgery.moe.canonical_names import CanonicalTensors

if TYPE_CHECKING:
    import numpy as np
    import torch

_MAX_BYTES = 200_000_000
_MOST_TOKENS = 20_000_000  # a row of an embedding for each


@dataclass(frozen=True)
class Gathered(Expr):
    """Each row the mean of rows of `options`, as `picks` names them by (option, row); zeros where it names none."""

    options: tuple[Expr, ...]
    picks: tuple[tuple[tuple[int, int], ...], ...]
    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def row(self) -> int:
        return self.numel // max(len(self.picks), 1)

    @property
    def chunk_multiple(self) -> int:
        return max(self.row, 1)

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return self.options

    def array(self, start: int, stop: int, reader: Reader) -> np.ndarray:
        import numpy as np

        row = self.row
        chosen = self.picks[start // row : stop // row]
        out = np.zeros((len(chosen), row), np.float32)
        at = 0
        while at < len(chosen):
            count = 1
            if len(chosen[at]) == 1:
                option, first = chosen[at][0]
                while at + count < len(chosen) and chosen[at + count] == ((option, first + count),):
                    count += 1
                expr = self.options[option]
                out[at : at + count] = expr.array(first * row, (first + count) * row, reader).reshape(count, row)
            elif chosen[at]:
                for option, index in chosen[at]:
                    out[at] += self.options[option].array(index * row, (index + 1) * row, reader)
                out[at] /= len(chosen[at])
            at += count
        return rounded(out.reshape(-1), self.dtype, strict=True)

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.array(start, stop, reader)).to(torch_dtype(self.dtype))


def vocabulary(checkpoint: Checkpoint, label: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return a model's tokenizer.json and the number of every token. Raises RefusedError where it has none."""
    if TOKENIZER not in checkpoint.file_sizes:
        raise RefusedError(
            f"{label} has no {TOKENIZER}, so its tokens cannot be matched",
            "save it with a fast tokenizer: it writes one",
        )
    size = checkpoint.file_sizes[TOKENIZER]
    try:
        if size > _MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes, and a tokenizer at most {_MAX_BYTES:,}")
        data = parse_json(checkpoint.source.read(TOKENIZER, 0, size), config=True)
        numbers = _numbers(data)
    except ValueError as error:
        raise RefusedError(f"{TOKENIZER} of {label} is not understood: {error}", "save the tokenizer again") from None
    return data, numbers


def _numbers(data: Any) -> dict[str, int]:
    """Return the number of every token of a tokenizer.json. Raises ValueError where it is of another form."""
    model: Any = data.get("model") if isinstance(data, dict) else None
    if not isinstance(model, dict):
        raise ValueError("it has no object `model`")
    held = model.get("vocab")
    if isinstance(held, dict):
        numbers = dict(held)
    elif isinstance(held, list) and all(isinstance(e, list) and len(e) == 2 and isinstance(e[0], str) for e in held):
        numbers = {piece: i for i, (piece, _) in enumerate(held)}
    else:
        raise ValueError("model.vocab is neither tokens with their numbers nor a list of [token, score]")
    added = data.get("added_tokens")
    for token in [] if added is None else added if isinstance(added, list) else [None]:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise ValueError("added_tokens is not a list of objects with `content` and `id`")
        numbers[token["content"]] = token.get("id")
    wrong = next((t for t, n in numbers.items() if type(n) is not int or not 0 <= n < _MOST_TOKENS), None)
    if wrong is not None:
        raise ValueError(f"the token {one_line(wrong, 80)!r} has the number {one_line(repr(numbers[wrong]), 80)}")
    merges = model.get("merges")
    if merges is not None and not (isinstance(merges, list) and all(map(_is_merge, merges))):
        raise ValueError("model.merges is not a list of pairs")
    return numbers


def _is_merge(merge: Any) -> bool:
    return isinstance(merge, str) or (isinstance(merge, list) and all(isinstance(part, str) for part in merge))


def is_kept(config: TokenizerConfig, models: Mapping[str, CanonicalTensors]) -> bool:
    """Whether a recipe leaves the base's tokenizer as it is though its tokens are not known: all have the same."""
    base, *others = (parts.plan.checkpoint for parts in models.values())
    same = all(tokenizers_differ(base, other) is False for other in others)
    return same and TOKENIZER not in base.file_sizes and not config.tokens and config.multiple is None


def _vocabularies(models: Mapping[str, CanonicalTensors]) -> dict[str, tuple[dict[str, Any], dict[str, int]]]:
    """Return `vocabulary` of each model; one that keeps its tokenizer as another does has that one's."""
    by_model: dict[str, tuple[dict[str, Any], dict[str, int]]] = {}
    for name, parts in models.items():
        checkpoint = parts.plan.checkpoint
        if TOKENIZER in checkpoint.file_sizes:
            by_model[name] = vocabulary(checkpoint, parts.label)
    for name, parts in models.items():
        if name not in by_model:
            like = (n for n in by_model if tokenizers_differ(models[n].plan.checkpoint, parts.plan.checkpoint) is False)
            twin = next(like, None)
            by_model[name] = by_model[twin] if twin is not None else vocabulary(parts.plan.checkpoint, parts.label)
    return {name: by_model[name] for name in models}


class MergedTokenizer:
    """The tokenizer that `config` makes of those of `models`, the first of which is the base."""

    def __init__(self, config: TokenizerConfig, models: Mapping[str, CanonicalTensors]) -> None:
        self.config, self.models = config, models
        self.base = next(iter(models))
        vocabularies = _vocabularies(models)
        self.numbers = {name: numbers for name, (_, numbers) in vocabularies.items()}
        vocabulary_model = config.source if config.source not in ("base", "union") else self.base
        self.data, self.vocabulary_model = copy.deepcopy(vocabularies[vocabulary_model][0]), vocabulary_model
        self.tokens = dict(self.numbers[vocabulary_model])
        self.added = False
        self.rescored = False  # pieces of two Unigram models stand side by side, scored apart
        if config.source == "union":
            for name in models:
                self._join(vocabularies[name][0], self.numbers[name], models[name].label)
        for token in config.tokens:
            if token not in self.tokens:
                self._add(token, special=True)
        rows = 1 + max(self.tokens.values(), default=-1)
        if not self.added and config.source in ("base", self.base):
            rows = max(rows, self._rows_of(models[self.base]))  # padding rows stay
        self.rows = -(-rows // config.multiple) * config.multiple if config.multiple else rows

    def _rows_of(self, parts: CanonicalTensors) -> int:
        """Return how many rows a model's embedding has; 0 where there is none."""
        sizes = (
            parts.plan.tensors[name].shape[0]
            for name, component in parts.anatomy.component.items()
            if component == components.EMBEDDING and len(parts.plan.tensors[name].shape) == 2
        )
        return max(sizes, default=0)

    @property
    def padding(self) -> int:
        """How many rows stand for no token and for no row of the base: they are made, as the mean of its rows."""
        held, tokens = self._rows_of(self.models[self.base]), set(self.tokens.values())
        return sum(number not in tokens for number in range(held, self.rows))

    def is_vocabulary(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a tensor of the base has a row for each token."""
        parts = self.models[self.base]
        if parts.anatomy.component.get(name) not in (components.EMBEDDING, components.HEAD) or not shape:
            return False
        return shape[0] == self._rows_of(parts)

    def _join(self, data: dict[str, Any], numbers: Mapping[str, int], label: str) -> None:
        """Append what another tokenizer has and this one has not: pieces, merges, added tokens."""
        ours, theirs = self.data["model"], data["model"]
        if ours.get("type") != theirs.get("type"):
            raise RefusedError(
                f"the tokenizers are of different kinds, {ours.get('type')} and {theirs.get('type')} ({label}):"
                " they have no union",
                "use `tokenizer_source: base`, or one model's",
            )
        added = {token["content"]: token for token in data.get("added_tokens") or ()}
        for token in sorted(numbers, key=numbers.__getitem__):
            if token in self.tokens:
                continue
            if token in added:
                self._add(token, special=bool(added[token].get("special")), like=added[token])
            elif isinstance(ours["vocab"], dict):
                self.added = True
                ours["vocab"][token] = self.tokens[token] = self._next()
            else:
                self._piece(token, theirs)
        if isinstance(ours.get("merges"), list):
            seen = {_pair(merge) for merge in ours["merges"]}
            ours["merges"] += [merge for merge in theirs.get("merges") or () if _pair(merge) not in seen]

    def _piece(self, token: str, theirs: Mapping[str, Any]) -> None:
        """Append a piece of a Unigram model: its number is its place, so added tokens must not stand behind."""
        ours = self.data["model"]["vocab"]
        if self._next() != len(ours):
            self._add(token, special=False)
            return
        self.added = self.rescored = True
        self.tokens[token] = len(ours)
        ours.append(next([piece, score] for piece, score in theirs["vocab"] if piece == token))

    def _add(self, token: str, *, special: bool, like: Mapping[str, Any] | None = None) -> None:
        self.added = True
        number = self.tokens[token] = self._next()
        if isinstance(self.data["model"]["vocab"], dict):  # else the library numbers them after all of the model's
            self.data["model"]["vocab"][token] = number
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
        self.data.setdefault("added_tokens", []).append({**plain, **(like or {}), "id": number, "content": token})

    def _next(self) -> int:
        return 1 + max(self.tokens.values(), default=-1)

    def files(self) -> dict[str, bytes | None]:
        """Return the side files that differ from the base's, None for those that go."""
        files: dict[str, bytes | None] = {}
        held = self.models[self.vocabulary_model].plan.checkpoint
        if self.vocabulary_model != self.base:
            for file in TOKENIZER_FILES:
                size = held.file_sizes.get(file)
                files[file] = held.source.read(file, 0, size) if size is not None else None
        if self.added:
            files[TOKENIZER] = write_json(self.data).encode()
            files.update(dict.fromkeys(OTHER_TOKENIZER_FORMS))
        base = self.models[self.base].plan.checkpoint.file_sizes
        return {file: data for file, data in files.items() if data is not None or file in base}

    def resized(self, inputs: Mapping[str, Expr]) -> dict[str, Expr]:
        """Return a tensor of all models with the rows that the merged tokenizer wants."""
        names = list(inputs)
        options = [inputs[name] for name in names]
        base = names.index(self.base) if self.base in inputs else 0
        options.append(Slice(NeuronStatistics(_matrix(inputs[names[base]])), 0, 1))
        text_of = {number: token for token, number in self.tokens.items()}
        resized: dict[str, Expr] = {}
        for i, name in enumerate(names):
            picks = tuple(self._picks(text_of.get(n), n, i, names, options, base) for n in range(self.rows))
            expr = inputs[name]
            resized[name] = Gathered(tuple(options), picks, expr.dtype, (self.rows, *expr.shape[1:]))
        return resized

    def _picks(
        self, token: str | None, number: int, which: int, names: Sequence[str], options: Sequence[Expr], base: int
    ) -> tuple[tuple[int, int], ...]:
        """Return where row `number` of model `which` comes from."""
        if token is None:  # padding: the base's where it has some, else the mean of its rows
            return ((base, number),) if number < options[base].shape[0] else ((len(names), 0),)
        source = self.config.tokens.get(token)
        own = self.numbers[names[which]].get(token)
        if own is not None and own >= options[which].shape[0]:
            own = None
        if own is not None and not (source is not None and source.force):
            return ((which, own),)
        if source is not None:
            return self._stated_row(token, source, names, options)
        rows = [
            (j, n)
            for j, name in enumerate(names)
            if (n := self.numbers[name].get(token)) is not None and n < options[j].shape[0]
        ]
        if not rows:
            raise RefusedError(
                f"the token {token!r} (number {number} of the merged tokenizer) has a row in no model's embedding: it"
                " would be made up",
                "say where its row comes from, under `tokenizer: tokens:`, as in"
                f" `{json.dumps(token)}: {{source: {{kind: zero}}}}`, or take the tokenizer of another model",
            )
        return tuple(rows)

    def _stated_row(
        self, token: str, source: TokenSource, names: Sequence[str], options: Sequence[Expr]
    ) -> tuple[tuple[int, int], ...]:
        if source.model is None:
            return ()
        label = self.models[source.model].label
        if source.model not in names:
            raise RefusedError(
                f"the token {token!r} takes a row of {label}, which is not merged", "list it under `models:` too"
            )
        which = names.index(source.model)
        number = source.number if source.number is not None else self.numbers[source.model].get(source.token or token)
        if number is None:
            raise RefusedError(f"the token {source.token or token!r} is not in the tokenizer of {label}")
        if not 0 <= number < options[which].shape[0]:
            raise RefusedError(
                f"the token {token!r} takes row {number} of {label}, which has {options[which].shape[0]}"
            )
        return ((which, number),)


def _pair(merge: Any) -> tuple[str, ...]:
    return tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)


def _matrix(expr: Expr) -> Expr:
    return expr if len(expr.shape) == 2 else reshape(expr, (expr.shape[0], expr.numel // max(expr.shape[0], 1)))
