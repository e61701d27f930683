"""llama.cpp's imatrix files: what llama-imatrix has seen of a model's activations, as far as it tells of experts.

For every weight W the file has the sum of squared inputs of W over the tokens, by column, and how many tokens those
were; for stacked experts both for each expert. So of a block with E experts of I neurons:

    counts [E]              tokens routed to the expert, N_e
    squares [E, I]          sum over these of h^2, the inputs of its down-projection

and with the lengths of the down-projection's columns, sum of |f_e|^2 up to cross terms between neurons.
Files are GGUF (`NAME.in_sum2`, `NAME.counts`) or, before 2025, a format of their own (`.dat`), which holds means and
no counts. Sources: llama.cpp's tools/imatrix and common/imatrix-loader.cpp (September 2026).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moesurgery.checkpoint.arrays import decoded
from moesurgery.checkpoint.dtypes import element_count
from moesurgery.checkpoint.gguf_header import MAGIC, read_gguf_header
from moesurgery.checkpoint.source import LocalSource
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.expr.evaluate import values_of
from moesurgery.families.anatomy import MoeBlock
from moesurgery.moe.neurons import expert_tensors
from moesurgery.plan.dequantise import plain_values
from moesurgery.plan.plan import Plan
from moesurgery.stats.criteria import FLOOR, MeasuredCriterion
from moesurgery.whole_file import whole_file

if TYPE_CHECKING:
    import numpy as np

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
DOWN = "ffn_down_exps"
IMATRIX_CRITERIA: tuple[MeasuredCriterion, ...] = ("ean", "frequency", "man", "msan")  # the first is the default
_MAX_DAT = 4_000_000_000
_MAX_ENTRIES = 1 << 16
_MAX_TEXT = 65_535


@dataclass(frozen=True)
class Imatrix:
    """Sums of squared inputs [E, n] and counts [E] by the name of the weight; E is 1 for what is not stacked.

    `legacy`: counts are not known, and the sums are means.
    """

    sums: Mapping[str, np.ndarray]
    counts: Mapping[str, np.ndarray]
    datasets: Sequence[str] = field(default=())
    chunks: int = 0
    legacy: bool = False


def is_imatrix(path: str | Path) -> bool:
    """Whether a file is an imatrix, by its first bytes or its name."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC or str(path).endswith(".dat")
    except OSError:
        return False


def load_imatrix(path: str | Path) -> Imatrix:
    """Read an imatrix of either format. Raises CheckpointError where it is none, or holds no finite sums."""
    import numpy as np

    source, name = LocalSource(Path(path).absolute().parent), Path(path).name
    try:
        size = Path(path).stat().st_size
        imatrix = _read_gguf(source, name, size) if source.read(name, 0, 4) == MAGIC else _read_dat(source, name, size)
        for weight, sums in imatrix.sums.items():
            if not np.isfinite(sums).all() or (sums < 0).any() or not (imatrix.counts[weight] >= 0).all():
                raise ValueError(f"{weight}: its sums or counts are no finite numbers from 0 on")
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path} cannot be read as an imatrix: {error}", "make it again with llama-imatrix, or download it again"
        ) from None
    return imatrix


def _read_gguf(source: LocalSource, name: str, size: int) -> Imatrix:
    header = read_gguf_header(name, size, lambda start, length: source.read(name, start, length))
    tensors = {info.name: info for info in header.tensors}
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    for info in header.tensors:
        if not info.name.endswith(SUMS):
            continue
        weight = info.name.removesuffix(SUMS)
        seen = tensors.get(weight + COUNTS)
        if seen is None or (info.dtype, seen.dtype) != ("F32", "F32"):
            raise ValueError(f"{weight} has no sums and counts in F32")
        matrices = element_count(seen.shape)  # ggml leaves axes of length 1 out at the end
        if not matrices or (len(info.shape) > 1 and info.shape[0] != matrices) or element_count(info.shape) % matrices:
            raise ValueError(f"{weight} has sums {list(info.shape)} and counts {list(seen.shape)}")
        counts[weight] = decoded(source.read(name, seen.start, seen.nbytes), "F32")
        sums[weight] = decoded(source.read(name, info.start, info.nbytes), "F32").reshape(matrices, -1)
    if not sums:
        raise ValueError("it is a GGUF without sums of squared inputs: a model?")
    datasets, chunks = header.values.get(DATASETS, []), header.values.get(CHUNKS, 0)
    return Imatrix(sums, counts, datasets if isinstance(datasets, list) else [], chunks if type(chunks) is int else 0)


def _read_dat(source: LocalSource, name: str, size: int) -> Imatrix:
    """Read the older format: entries of a name, a number of chunks, and the means of squares times that number."""
    import numpy as np

    if size > _MAX_DAT:
        raise ValueError(f"it has {size:,} bytes, and an imatrix at most {_MAX_DAT:,}")
    data, at = source.read(name, 0, size), 0

    def number() -> int:
        nonlocal at
        at += 4
        return int(struct.unpack_from("<i", data, at - 4)[0])

    def text(length: int) -> bytes:
        nonlocal at
        if not 0 < length <= _MAX_TEXT or at + length > size:
            raise ValueError(f"a name of {length:,} bytes at byte {at:,}")
        at += length
        return data[at - length : at]

    entries = number()
    if not 0 < entries <= _MAX_ENTRIES:
        raise ValueError(f"it says that it has {entries:,} entries")
    sums: dict[str, np.ndarray] = {}
    for _ in range(entries):
        weight = text(number()).decode()
        calls, values = number(), number()
        if values < 1 or at + 4 * values > size:
            raise ValueError(f"{weight} says that it has {values:,} values")
        means = np.frombuffer(data, "<f4", values, at).copy()
        at += 4 * values
        sums[weight] = (means / calls if calls > 0 else means)[None]
    return Imatrix(sums, {weight: np.ones(1, np.float32) for weight in sums}, legacy=True)


def save_imatrix(
    path: Path, sums: Mapping[str, tuple[np.ndarray, np.ndarray]], datasets: Sequence[str], chunks: int, chunk_size: int
) -> None:
    """Write sums [E, n] and counts [E] by the name of the weight, as llama-imatrix does: llama-quantize reads them.

    Raises RefusedError without the package gguf, and OutputError where the file cannot be written.
    """
    import numpy as np

    try:
        from gguf import GGUFWriter
    except ImportError:
        raise RefusedError(
            "an imatrix is written with the package gguf, which is not installed", 'pip install "moesurgery[gguf]"'
        ) from None
    with whole_file(path) as new:
        writer = GGUFWriter(new, "")
        writer.add_string("general.type", "imatrix")
        writer.add_array(DATASETS, list(datasets))
        writer.add_uint32(CHUNKS, chunks)
        writer.add_uint32(CHUNK_SIZE, chunk_size)
        for weight, (squares, counts) in sums.items():
            writer.add_tensor(weight + SUMS, np.ascontiguousarray(squares, np.float32))
            writer.add_tensor(weight + COUNTS, np.ascontiguousarray(counts.reshape(-1, 1), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def weight_name(block: MoeBlock) -> str:
    """Return the name of a block's down-projections in an imatrix."""
    return f"blk.{block.layer}.{DOWN}.weight"


def block_sums(imatrix: Imatrix, block: MoeBlock) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the sums of squared activations [E, I] of a block's neurons, and its counts [E]; None where not known.

    Then the sums are means. Raises RefusedError where the imatrix lacks the block, or has another number of experts.
    """
    weight = weight_name(block)
    if weight not in imatrix.sums:
        raise RefusedError(
            f"the imatrix has no {weight}", "it belongs to another model, or to one without experts there"
        )
    sums, counts = imatrix.sums[weight], imatrix.counts[weight]
    if imatrix.legacy and sums.shape[1] % block.experts == 0:
        return sums.reshape(block.experts, -1), None
    if len(sums) != block.experts:
        raise RefusedError(
            f"{block.where} has {block.experts} experts, the imatrix {len(sums)}", "it is another model's"
        )
    return sums, counts


def neuron_scores(imatrix: Imatrix, plan: Plan, block: MoeBlock) -> np.ndarray:
    """Return for every neuron [E, I] of a block the sum over its tokens of h^2 times its down-projection's column^2.

    Reads the down-projections. Raises RefusedError where the imatrix does not fit them.
    """
    import numpy as np

    squares, _ = block_sums(imatrix, block)
    lengths = np.stack([_column_squares(plan, block, expert) for expert in range(block.experts)])
    if lengths.shape != squares.shape:
        raise RefusedError(
            f"{block.where} has {lengths.shape[1]} neurons to an expert, the imatrix {squares.shape[1]}",
            "it is another model's",
        )
    return np.asarray(squares * lengths)


def _column_squares(plan: Plan, block: MoeBlock, expert: int) -> np.ndarray:
    """Return the sums of squares [I] of the columns of one expert's down-projection."""
    import numpy as np

    tensors = {member.name: plain_values(plan, member.name) for member in block.named("down") if member.stem.main}
    parts = [
        (member, expr)
        for member, expr in expert_tensors(block, {**plan.tensors, **tensors}, expert)
        if member.role == "down" and member.stem.main
    ]
    ((member, expr),) = parts
    values = values_of(expr)
    assert member.part is not None
    return np.asarray(np.square(values, dtype=np.float64).sum(axis=0 if member.part.order == "oi" else 1))


def imatrix_scores(imatrix: Imatrix, plan: Plan, block: MoeBlock, by: str) -> list[float]:
    """Return a score for each expert of a block; higher is more worth keeping.

    `frequency` is N_e, `msan` the mean of |f_e|^2, `man` its root, `ean` N_e times that. Raises RefusedError for other
    criteria, and for `frequency` and `ean` where the file has no counts.
    """
    import numpy as np

    if by not in IMATRIX_CRITERIA:
        raise RefusedError(
            f"an imatrix does not say what {by} needs",
            f"it gives {', '.join(IMATRIX_CRITERIA)}; `moesurgery collect` on the safetensors model gives all",
        )
    _, counts = block_sums(imatrix, block)
    if counts is None and by in ("frequency", "ean"):
        raise RefusedError(
            f"this imatrix is of the older format, which has no counts for {by}", "use --by msan, or make a new one"
        )
    if by == "frequency":
        assert counts is not None
        return [float(n) for n in counts]
    total = neuron_scores(imatrix, plan, block).sum(axis=1)
    mean = total if counts is None else total / np.maximum(counts, FLOOR)
    if by == "ean":
        assert counts is not None
        return np.sqrt(counts * total).tolist()  # type: ignore[no-any-return]
    return (mean if by == "msan" else np.sqrt(mean)).tolist()  # type: ignore[no-any-return]
