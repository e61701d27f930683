"""Statistics of experts: one small file, from which every criterion and factor is computed without running again.

Sums over the calibration tokens, for each MoE block with E experts and hidden size H. g is the weight that
multiplies an expert's output f, after all steps of the router; y is the routed output, the sum of g f over the
chosen experts. All but [E, H] come twice, for even and odd windows ([2, ...]): the difference between the halves
measures noise. Names and shapes:

    tokens [2]              tokens seen
    count, gate, gate2      [2, E]: tokens routed to the expert, sum of g, of g^2
    probability             [2, E]: sum over all tokens of its share of the router's scores
    norm, norm2, gate_norm  [2, E]: sum of |f|, of |f|^2, of g |f|
    peak                    [2, E]: largest absolute value in f
    gram                    [2, E, E]: sum of g_i g_j <f_i, f_j>; its diagonal is the sum of g^2 |f|^2
    pair_norms              [2, E, E]: sum of g_i g_j |f_i| |f_j|
    mass                    [2]: sum of (sum of g)^2
    entropy                 [2]: sum of the entropy of the router's scores, in nats
    logits                  [2, E, E]: sum of z_i z_j over router logits z
    output                  [E, H]: sum of f over the tokens routed to it

and for each other top-k m that was asked for, with the routing at top-k m and y still at the trained one:

    gram@m, gate2@m, mass@m as above, cross@m [2, E]: sum of g_i <f_i, y>

and for each number of experts r that was asked for: recon@r [E], 1 for the r experts to keep (`recon.py`).

With every expert run on every token, which costs E / top-k times as much:

    output_all              [E, H]: sum of f over all tokens, wherever they are routed
    gated_all               [E, H]: sum of p f over all tokens, p the share of the router's scores as in `probability`

With `neurons`, of the I neurons of each expert, h being the input of its down-projection W:

    neuron_saliency         [E, I]: sum of g^2 h_i^2 |W_i|^2, W_i a column of W
    neuron_order            [E, I]: the neurons in the order of their removal (`fitting.neuron_order`)
    neuron_squares          [E, I]: sum of g^2 h_i^2
    neuron_error            [E, I]: sum of g^2 |f - f'|^2, f' being the output without the first 1, 2, ... of these and
                            with the best down-projection

Of prediction (MTP) layers, which are run on the trunk's last hidden states, the same sums but for those of `neurons`;
their tokens are those with a token after them. docs/measure.md has the formulas that use all of this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.gguf_files import MODEL_TYPE
from moesurgery.checkpoint.source import LocalSource
from moesurgery.checkpoint.strict_json import compact_json
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.families.anatomy import Anatomy
from moesurgery.families.tensor_names import find_layer
from moesurgery.stats import entry_rules
from moesurgery.stats.safetensors_file import save_arrays

if TYPE_CHECKING:
    import numpy as np
    import torch

_FORMAT = "moesurgery statistics 1"
SUFFIX = ".safetensors"
NEURONS = ("neuron_saliency", "neuron_order", "neuron_error", "neuron_squares")
WHOLE = frozenset({"output", "output_all", "gated_all", *NEURONS})  # kept once, in float32


def _halved(name: str) -> bool:
    return name not in WHOLE and not name.startswith("recon@")


@dataclass
class BlockStats:
    """The sums of one MoE block; `sums` maps the names above to float64 arrays."""

    where: str
    sums: dict[str, np.ndarray] = field(default_factory=dict)

    def total(self, name: str) -> np.ndarray:
        """Return a sum over both halves (the maximum for `peak`)."""
        values = self.sums[name]
        if not _halved(name):
            return values
        both: np.ndarray = values.max(axis=0) if name == "peak" else values.sum(axis=0)
        return both

    def half(self, half: int) -> BlockStats:
        """Return the block's sums over one half of the tokens."""
        import numpy as np

        zero = np.zeros_like
        return BlockStats(
            self.where,
            {n: np.stack([v[half], zero(v[half])]) if _halved(n) else v for n, v in self.sums.items()},
        )

    @property
    def experts(self) -> int:
        return int(self.sums["count"].shape[-1])


@dataclass
class Stats:
    """Statistics of all MoE blocks of a model, and what they were collected on.

    `ffns` has, by module, those of the neurons of shared experts and dense FFNs, each as of a block of one expert.
    `prediction` has those of the MoE blocks of prediction (MTP) layers, as far as they were run.
    """

    blocks: dict[str, BlockStats]
    about: dict[str, Any]
    sha256: str = ""  # of the file that they were read from
    ffns: dict[str, BlockStats] = field(default_factory=dict)
    prediction: dict[str, BlockStats] = field(default_factory=dict)

    @property
    def with_prediction(self) -> dict[str, BlockStats]:
        """The statistics of all MoE blocks that were run, prediction layers last."""
        return {**self.blocks, **self.prediction}

    @property
    def top_k(self) -> int:
        return int(self.about["top_k"])

    @property
    def top_ks(self) -> list[int]:
        """The other numbers of active experts for which there are sums."""
        return [int(k) for k in self.about["other_top_k"]]

    @property
    def recon(self) -> list[int]:
        """The numbers of experts to keep for which there is a choice by reconstruction."""
        return [int(r) for r in self.about.get("recon", ())]

    @property
    def unread(self) -> dict[str, str]:
        """The MoE blocks that have no statistics, each with the reason why."""
        return dict(self.about.get("unread", {}))

    @property
    def every_expert(self) -> bool:
        """Whether every expert was run on every token: `output_all` and `gated_all` are there."""
        return bool(self.about.get("every_expert"))

    @property
    def neurons(self) -> bool:
        """Whether there are sums of the neurons of each expert: `NEURONS`."""
        return bool(self.about.get("neurons"))

    def renamed(self, anatomy: Anatomy) -> Stats:
        """Return the statistics under the names that a GGUF has for the layers of the model that it was made from.

        They are themselves for every other model.
        """
        if not anatomy.model_type.startswith(MODEL_TYPE) or str(self.about["model_type"]).startswith(MODEL_TYPE):
            return self
        names = {block.layer: block.where for block in reversed(anatomy.blocks)}  # main layers come first, and win

        def renamed(where: str) -> str:
            layer = find_layer(f"{where}.")
            return names.get(layer[1], where) if layer is not None else where

        def all_renamed(blocks: Mapping[str, BlockStats]) -> dict[str, BlockStats]:
            return {renamed(where): BlockStats(renamed(where), block.sums) for where, block in blocks.items()}

        blocks, prediction = all_renamed(self.blocks), all_renamed(self.prediction)
        if len(blocks) != len(self.blocks):
            return self  # two stacks of layers: `check` says what does not fit
        about = {**self.about, "model_type": anatomy.model_type, "blocks": list(blocks), "prediction": list(prediction)}
        about["unread"] = {renamed(where): reason for where, reason in self.unread.items()}
        return Stats(blocks, about, self.sha256, prediction=prediction)

    def check(self, anatomy: Anatomy, operation: str) -> None:
        """Raise RefusedError where the statistics are those of another model."""
        blocks = {block.where: block.experts for block in anatomy.main_blocks if block.where not in self.unread}
        collected = {where: block.experts for where, block in self.blocks.items()}
        predicted = {block.where: block.experts for block in anatomy.blocks if block.where in self.prediction}
        problem = None
        if anatomy.model_type != self.about["model_type"]:
            problem = f"this is a {anatomy.model_type}, they were collected on a {self.about['model_type']}"
        elif blocks.keys() != collected.keys():
            where = next(iter(blocks.keys() ^ collected.keys()))
            problem = f"{where} is in {'the model' if where in blocks else 'the statistics'} only"
        elif other := [w for w, n in (blocks | predicted).items() if n != self.with_prediction[w].experts]:
            seen = self.with_prediction[other[0]].experts
            problem = f"{other[0]} has {(blocks | predicted)[other[0]]} experts, the statistics have {seen}"
        elif anatomy.settings.top_k != self.top_k:
            problem = f"the model routes to {anatomy.settings.top_k} experts, the statistics saw {self.top_k}"
        if problem:
            raise RefusedError(
                f"{operation}: the statistics belong to another model: {problem}",
                "collect them again with `moesurgery collect`",
            )

    def check_finite(self, source: str) -> None:
        """Raise RefusedError where a sum is NaN or infinite: nothing can be decided by it."""
        import numpy as np

        for where, block in {**self.with_prediction, **self.ffns}.items():
            for name, values in block.sums.items():
                if not np.isfinite(values).all():
                    raise RefusedError(
                        f"{source}: {name} of {where} holds numbers that are not finite: the model computes NaN or"
                        " infinity on this text",
                        "`moesurgery validate --level values` finds bad weights; collect again when they are mended",
                    )

    def save(self, path: Path) -> Path:
        """Write `path.safetensors` and, for reading, `path.json`; return the former.

        Raises RefusedError where a sum is not finite.
        """
        import numpy as np

        self.check_finite(str(path))

        target = path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)
        arrays = {
            f"{where}/{name}": np.ascontiguousarray(values, np.float32 if name in WHOLE else np.float64)
            for where, block in {**self.with_prediction, **self.ffns}.items()
            for name, values in block.sums.items()
        }
        save_arrays(target, arrays, {"about": compact_json(self.about), "format": _FORMAT})
        return target


_ABOUT = {
    "model_type": entry_rules.A_TEXT,
    "top_k": entry_rules.COUNT,
    "other_top_k": entry_rules.listed(entry_rules.COUNT),
    "blocks": entry_rules.listed(entry_rules.A_TEXT),
}
_ALSO = {
    "recon": entry_rules.listed(entry_rules.COUNT),
    "unread": entry_rules.mapping_to(entry_rules.A_TEXT),
    "every_expert": entry_rules.SWITCH,
    "neurons": entry_rules.SWITCH,
    "ffns": entry_rules.listed(entry_rules.A_TEXT),
    "prediction": entry_rules.listed(entry_rules.A_TEXT),
    "text": entry_rules.FILES,
}
_MAX_BYTES = 8_000_000_000  # of a file: 60 layers of 512 experts, at ten numbers of active ones
# The shape of each sum, H being any size.
_SHAPES: dict[str, tuple[str | int, ...]] = {
    **dict.fromkeys(("tokens", "mass", "entropy"), (2,)),
    **dict.fromkeys(("count", "gate", "gate2", "probability", "norm", "norm2", "gate_norm", "peak", "cross"), (2, "E")),
    **dict.fromkeys(("gram", "pair_norms", "logits"), (2, "E", "E")),
    **dict.fromkeys(("output", "output_all", "gated_all"), ("E", "H")),
    **dict.fromkeys(NEURONS, ("E", "I")),
    "recon": ("E",),
}
_LATER = ("norm2", "pair_norms", "neuron_squares")  # sums that older files are without


def load_stats(path: str | Path) -> Stats:
    """Read a statistics file.

    Raises CheckpointError where it is none, or where a sum is missing or no sum, RefusedError where one is not finite.
    """
    from safetensors import safe_open

    blocks: dict[str, BlockStats] = {}
    try:
        if (size := Path(path).stat().st_size) > _MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes, and statistics at most {_MAX_BYTES:,}")
        source, held = LocalSource(Path(path).absolute().parent), Path(path).name
        source.hold(held, Path(path).stat())
        sha256 = digest(path)
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CheckpointError(f"{path} holds no statistics", "make them with `moesurgery collect`")
            about = entry_rules.read_document(metadata.get("about", ""), _ABOUT, _ALSO)
            for key in file.keys():  # noqa: SIM118 - no mapping
                where, _, name = key.rpartition("/")
                blocks.setdefault(where, BlockStats(where)).sums[name] = file.get_tensor(key)
        source.check(held)
        prediction = about.get("prediction", ())
        if odd := sorted(blocks.keys() ^ {*about["blocks"], *about.get("ffns", ()), *prediction}):
            raise ValueError(f"{odd[0]!r} is in its {'tensors' if odd[0] in blocks else 'list of blocks'} only")
        for where in about["blocks"]:
            _check_block(blocks[where], about)
        for where in prediction:
            _check_block(blocks[where], {**about, "neurons": False})
        for where in about.get("ffns", ()):
            _check_sums(blocks[where], _there(blocks[where], NEURONS), 1)
    except CheckpointError:
        raise
    except OSError as error:
        longer = f"{path}.safetensors"
        hint = f"name {longer}" if Path(longer).is_file() else "make them with `moesurgery collect`"
        raise CheckpointError(f"{path} cannot be read as statistics: {error.strerror or error}", hint) from None
    except Exception as error:  # safetensors raises various exceptions for damaged files
        reason = f"{path} cannot be read as statistics: {error}"
        raise CheckpointError(reason, "make them again with `moesurgery collect`") from None
    ffns = {where: blocks[where] for where in about.get("ffns", ())}
    by_list = [{where: blocks[where] for where in names} for names in (about["blocks"], prediction)]
    stats = Stats(by_list[0], about, sha256, ffns, by_list[1])
    stats.check_finite(str(path))
    return stats


def stats_for(path: str | Path, anatomy: Anatomy, operation: str) -> Stats:
    """Read the statistics of a model, or those of the model that a GGUF was made from.

    Raises what `load_stats` does, and RefusedError where they belong to another model.
    """
    stats = load_stats(path).renamed(anatomy)
    stats.check(anatomy, operation)
    return stats


def _check_block(block: BlockStats, about: Mapping[str, Any]) -> None:
    """Raise ValueError where the sums of a block are not those listed in the file's metadata."""
    sums = block.sums
    names = ["count"] + [name for name in _SHAPES if name not in WHOLE and name not in ("cross", "recon")] + ["output"]
    names += [f"{name}@{k}" for k in about["other_top_k"] for name in ("gram", "gate2", "mass", "cross")]
    names += [f"recon@{r}" for r in about.get("recon", ())]
    names += ["output_all", "gated_all"] if about.get("every_expert") else []
    names += NEURONS if about.get("neurons") else []
    experts = sums["count"].shape[-1] if "count" in sums and sums["count"].ndim == 2 else 0
    _check_sums(block, _there(block, names), experts)


def _there(block: BlockStats, names: Sequence[str]) -> list[str]:
    """Return the sums that a block must have: all but those that older files are without."""
    return [name for name in dict.fromkeys(names) if name in block.sums or name not in _LATER]


def _check_sums(block: BlockStats, names: Sequence[str], experts: int) -> None:
    """Raise ValueError where one of the sums `names` is missing, or not of the shape that it has for `experts`."""
    where, sums = block.where, block.sums
    for name in names:
        if name not in sums:
            raise ValueError(f"{where} has no {name}")
        values, wanted = sums[name], _SHAPES[name.partition("@")[0]]
        shape = tuple(experts if size == "E" else size for size in wanted)
        fits = len(shape) == values.ndim and all(b in ("H", "I", a) for a, b in zip(values.shape, shape, strict=True))
        if not fits or not experts or values.dtype.kind != "f":
            shown = " x ".join(map(str, wanted))
            raise ValueError(f"{where}: {name} is {values.dtype} {list(values.shape)}, expected floats {shown}")


def digest(path: str | Path) -> str:
    """Return the SHA-256 of a file, as provenance records it."""
    value = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value.update(block)
    return value.hexdigest()


def empty_sums(experts: int, hidden: int, others: list[int], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return zeros of all names, as torch tensors in float64."""
    import torch

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(2, *shape, dtype=torch.float64, device=device)

    per_expert = ("count", "gate", "gate2", "probability", "norm", "norm2", "gate_norm", "peak")
    sums: dict[str, Any] = {name: zeros(experts) for name in per_expert}
    sums |= {"tokens": zeros(), "mass": zeros(), "entropy": zeros()}
    sums |= {name: zeros(experts, experts) for name in ("gram", "pair_norms", "logits")}
    sums["output"] = torch.zeros(experts, hidden, dtype=torch.float64, device=device)
    for k in others:
        sums |= {f"gram@{k}": zeros(experts, experts), f"gate2@{k}": zeros(experts)}
        sums |= {f"mass@{k}": zeros(), f"cross@{k}": zeros(experts)}
    return sums


def as_numpy(sums: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return sums that were made on a device as arrays of the same shapes and dtypes."""
    return {name: values.cpu().numpy() for name, values in sums.items()}
