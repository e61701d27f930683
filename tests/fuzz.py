"""Inputs without end for everything that reads what strangers wrote: `python -m tests.fuzz 100000`.

Each reader gets its share: headers, the index, configs and side files, recipes. A reader may refuse in its own words
and nothing else: no other exception, nothing that computes for longer than `SECONDS`, no more memory than `LIMIT`.
"""

from __future__ import annotations

import copy
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from moesurgery.checkpoint.checkpoint import checkpoint_of
from moesurgery.checkpoint.header import scan_header
from moesurgery.checkpoint.scan import scan_checkpoint
from moesurgery.checkpoint.source import LocalSource
from moesurgery.errors import RecipeError, SurgeryError
from moesurgery.recipe.reader import parse_recipe
from moesurgery.validate.check import CHECKS
from moesurgery.validate.check_architecture import check_architecture
from moesurgery.validate.pickle_scan import find_pickle
from moesurgery.validate.report_formats import BY_SUFFIX, FORMATS
from moesurgery.validate.run_checks import validate_checkpoint

LIMIT = 1 << 30  # bytes of address space, the interpreter and its libraries included
SECONDS = 5
ROOT = Path(__file__).parents[1]

HOSTILE = st.sampled_from(
    [
        *(0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**40, -(2**63), 1.5, float("inf"), float("nan"), True, None),
        *(
            "",
            "..",
            "../x",
            "/etc/passwd",
            "a\x00b",
            "\x1b[2J",
            "\ud800",
            "::error::",
            "[/bold]",
            "BF16",
            "F32",
            "x" * 9999,
        ),
        *([], {}, [[]], [0, 0], [0, 8], [2**62, 2**62], [-1], {"": {}}, "config.json", ".", "model.safetensors"),
    ]
)
VALUES = st.recursive(
    HOSTILE | st.integers() | st.text(max_size=8),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v),
)


def header_bytes(table: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(table).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]},
}
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 2,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "vocab_size": 3,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "quantization_config": None,
    "layer_tie_map": None,
    "text_config": None,
    "rope_parameters": {"rope_theta": 1.0},
    "dtype": "float32",
}
TOKENIZER = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "</s>"}]}
TOKENIZER_CONFIG = {"eos_token": "</s>", "chat_template": "{{ messages[0].content }}", "added_tokens_decoder": {}}
RECORD = {"recipe": {"steps": [{"rescale": {"top_k": 1}}]}, "outputs": [{"file": "config.json", "sha256": ""}]}


@st.composite
def replaced(draw: Any, good: Any) -> Any:
    """`good`, with a few of its values, at any depth, replaced, left out, or put under another name."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        place, depth = value, draw(st.integers(0, 3))
        while isinstance(place, dict) and place:
            key = draw(st.sampled_from(sorted(place)))
            if depth == 0 or not isinstance(place[key], dict | list) or not place[key]:
                change = draw(st.integers(0, 5))
                if change == 0:
                    del place[key]
                elif change == 1:
                    place[draw(st.text(max_size=8))] = place.pop(key)
                else:
                    place[key] = copy.deepcopy(draw(VALUES))
                break
            place, depth = place[key], depth - 1
            if isinstance(place, list):
                place[draw(st.integers(0, len(place) - 1))] = copy.deepcopy(draw(VALUES))
                break
    return value


@st.composite
def damaged(draw: Any, good: bytes) -> bytes:
    """`good` with bytes changed, cut out, doubled or put in."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at, much = draw(st.integers(0, len(data))), draw(st.integers(0, 16))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            data[at : at + much] = draw(st.binary(max_size=16))
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = data[at : at + much] * draw(st.integers(1, 50))
        elif at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


HEADERS = (
    st.binary(max_size=200)
    | damaged(header_bytes(GOOD, bytes(16)))
    | st.builds(header_bytes, replaced(GOOD), st.binary(max_size=24))
    | st.builds(header_bytes, VALUES, st.binary(max_size=24), st.none() | st.integers(0, 2**64 - 1))
)


def read_one_header(content: bytes) -> None:
    header = scan_header("x.safetensors", len(content), lambda start, n: content[start : start + n])
    if not any(problem.fatal for problem in header.problems):
        assert sum(t.nbytes for t in header.tensors) + header.data_start == len(content)
    find_pickle(len(content), lambda start, n: content[start : start + n])


def model_header() -> bytes:
    """A whole Mixtral of one layer, in 32-bit floats."""
    shapes = {"model.embed_tokens.weight": [3, 2], "lm_head.weight": [3, 2], "model.norm.weight": [2]}
    layer = "model.layers.0."
    shapes |= {f"{layer}self_attn.{p}_proj.weight": [2, 2] for p in "qkvo"}
    shapes |= {f"{layer}{norm}_layernorm.weight": [2] for norm in ("input", "post_attention")}
    shapes[f"{layer}block_sparse_moe.gate.weight"] = [2, 2]
    for e in range(2):
        shapes |= {f"{layer}block_sparse_moe.experts.{e}.{w}.weight": [4, 2] for w in ("w1", "w3")}
        shapes[f"{layer}block_sparse_moe.experts.{e}.w2.weight"] = [2, 4]
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return header_bytes(table, bytes(range(1, 101)) * (at // 100 + 1))[: at + 8 + len(json.dumps(table))]


MODEL = model_header()
SHARD = "model-00001-of-00001.safetensors"
NAMES = [n for n in json.loads(MODEL[8 : 8 + int.from_bytes(MODEL[:8], "little")]) if n != "__metadata__"]
INDEX = {"metadata": {"total_size": len(MODEL)}, "weight_map": dict.fromkeys(NAMES, SHARD)}


def as_bytes(good: dict[str, Any]) -> st.SearchStrategy[bytes]:
    text = json.dumps(good).encode()
    return damaged(text) | replaced(good).map(lambda v: json.dumps(v).encode("utf-8", "replace"))


FILES = st.one_of(
    st.tuples(st.just("config.json"), as_bytes(CONFIG)),
    st.tuples(st.just("model.safetensors.index.json"), as_bytes(INDEX)),
    st.tuples(st.just(SHARD), damaged(MODEL)),
    st.tuples(st.just("tokenizer.json"), as_bytes(TOKENIZER)),
    st.tuples(st.just("tokenizer_config.json"), as_bytes(TOKENIZER_CONFIG)),
    st.tuples(st.just("moesurgery.json"), as_bytes(RECORD)),
    st.tuples(st.just("chat_template.jinja"), damaged(b"{% for m in messages %}{{ m['content'] | trim }}{% endfor %}")),
)
_SCRATCH = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
FOLDER = Path(_SCRATCH.name)


def read_a_checkpoint(changes: list[tuple[str, bytes]]) -> None:
    """Everything that is read without torch: the openers of all commands, and all levels but `forward`."""
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors.index.json": json.dumps(INDEX).encode()}
    files |= {SHARD: MODEL, "tokenizer.json": json.dumps(TOKENIZER).encode()}
    for file, content in {**files, **dict(changes)}.items():
        (FOLDER / file).write_bytes(content)
    with suppress(SurgeryError):
        checkpoint_of(scan_checkpoint(LocalSource(FOLDER)))
    report = validate_checkpoint(FOLDER, level="values")
    for form in (*FORMATS.values(), *BY_SUFFIX.values()):
        assert all(c.isprintable() or c in "\n\t" for c in form(report))
    for file, _ in changes:
        (FOLDER / file).unlink(missing_ok=True)


RECIPES = [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))]
TEXTS = st.one_of(
    st.sampled_from(RECIPES).flatmap(damaged),
    st.text(alphabet="&*!|>-?:,[]{}#'\"\\ \n\tabc01.e~=<%@`", max_size=120).map(str.encode),
    VALUES.map(lambda v: json.dumps({"model": ".", "steps": [{"rescale": v}]}).encode("utf-8", "replace")),
    st.binary(max_size=80),
)


def read_a_recipe(content: bytes) -> None:
    with suppress(RecipeError):
        parse_recipe(content.decode("utf-8", "surrogateescape"), "fuzz.yaml")


TARGETS: dict[str, tuple[Callable[[Any], None], st.SearchStrategy[Any], float]] = {
    "header": (read_one_header, HEADERS, 0.45),
    "checkpoint": (read_a_checkpoint, st.lists(FILES, min_size=1, max_size=2), 0.1),
    "recipe": (read_a_recipe, TEXTS, 0.45),
}


def main(count: int, *targets: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    # Building model classes is transformers' own affair, and far too slow to be done so often.
    CHECKS[:] = [check for check in CHECKS if check.function is not check_architecture]
    for name in targets or TARGETS:
        target, inputs, share = TARGETS[name]
        start = time.monotonic()
        done = 0

        @settings(
            max_examples=int(count * share),
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs)
        def run(value: Any) -> None:
            nonlocal done
            done += 1
            before = time.process_time()
            target(value)  # noqa: B023 - it runs before the loop goes on
            assert time.process_time() - before < SECONDS

        run()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{name}: {done} inputs, {time.monotonic() - start:.0f} s, peak {peak:.0f} MB", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
