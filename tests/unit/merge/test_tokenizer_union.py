"""The tokenizer of a merge: whose tokens there are, and where each row of the embedding comes from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.conftest import Result
from tests.golden.models import HIDDEN, config, tensors
from tests.tiny import read_config, read_tensors

Cli = Callable[..., Result]
Merge = Callable[..., dict[str, torch.Tensor]]
ROWS = ("model.embed_tokens.weight", "lm_head.weight")


def bpe(text: str, size: int, special: list[str]) -> transformers.PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [text] * 5, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two Llamas whose rows are numbered: 0, 1, 2… with three of padding, and 100, 101…"""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tokenizers")
    tokenizers = (
        bpe("abc abd abc abe abc", 16, ["<s>", "</s>"]),
        bpe("xyz xya abc xyb xyz", 18, ["<s>", "</s>", "<|im_start|>"]),
    )
    tokenizers[1].chat_template = "{{ 'from b' }}"
    for name, tokenizer, first, padding in (("a", tokenizers[0], 0, 3), ("b", tokenizers[1], 100, 0)):
        path = folder / name
        tokenizer.save_pretrained(path)
        count = len(tokenizer) + padding
        held = tensors("llama", 0, 1)
        for row in ROWS:
            held[row] = (first + torch.arange(count).float())[:, None].repeat(1, HIDDEN)
        save_file(held, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({**config("llama", 1), "vocab_size": count}))
    return folder / "a", folder / "b"


@pytest.fixture
def merge(ok: Cli, pair: tuple[Path, Path], tmp_path: Path) -> Merge:
    def run(more: str, *, method: str = "linear", parameters: str = "weight: 1") -> dict[str, torch.Tensor]:
        head = f"models: [{{model: {pair[0]}}}, {{model: {pair[1]}}}]"
        text = f"{head}\nbase_model: {pair[0]}\nmerge_method: {method}\n"
        (tmp_path / "r.yaml").write_text(text + f"parameters: {{{parameters}}}\n{more.replace('B', str(pair[1]))}\n")
        ok("merge", tmp_path / "r.yaml", "-o", tmp_path / "out", "--force")
        return read_tensors(tmp_path / "out")

    return run


def vocabulary(path: Path) -> dict[str, int]:
    return transformers.AutoTokenizer.from_pretrained(path).get_vocab()


def check_rows(found: dict[str, torch.Tensor], out: Path, pair: tuple[Path, Path]) -> None:
    """Each token's row is the mean of the rows of the models that have it."""
    a, b = (vocabulary(path) for path in pair)
    for token, number in vocabulary(out).items():
        rows = [first + v[token] for first, v in ((0, a), (100, b)) if token in v]
        for name in ROWS:
            assert found[name][number].tolist() == pytest.approx([sum(rows) / len(rows)] * HIDDEN), token


def test_the_bases_tokens_keep_their_rows_and_padding(merge: Merge, pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = merge("tokenizer_source: base")
    assert vocabulary(tmp_path / "out") == vocabulary(pair[0])
    check_rows(found, tmp_path / "out", pair)
    count = len(vocabulary(pair[0]))
    assert found[ROWS[0]].shape[0] == read_config(tmp_path / "out")["vocab_size"] == count + 3
    assert found[ROWS[0]][-1].tolist() == [count + 2] * HIDDEN  # mergekit drops padding rows: its issue 425


def test_a_union_encodes_the_words_of_both(merge: Merge, pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = merge("tokenizer_source: union")
    a, b, union = (vocabulary(path) for path in (*pair, tmp_path / "out"))
    assert union.keys() == a.keys() | b.keys()
    assert all(union[token] == number for token, number in a.items())
    assert found[ROWS[0]].shape[0] == read_config(tmp_path / "out")["vocab_size"] == len(union)
    check_rows(found, tmp_path / "out", pair)
    merged, first, second = (transformers.AutoTokenizer.from_pretrained(p) for p in (tmp_path / "out", *pair))
    for tokenizer, text in ((first, "abc abd abe"), (second, "xyz xya xyb<|im_start|>")):
        assert merged.tokenize(text) == tokenizer.tokenize(text)
    assert merged.decode(merged.encode(" xyz abc")) == " xyz abc"


def test_a_union_of_unigram_tokenizers_is_warned_of(pair: tuple[Path, Path], ok: Cli, tmp_path: Path) -> None:
    """Every token is there, with its row; how text is cut depends on scores that two models gave apart."""
    for path, pieces in zip(pair, (["<unk>", "▁ab", "c"], ["<unk>", "▁ab", "xy"]), strict=True):
        shutil.copytree(path, tmp_path / path.name)
        model = models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0)
        Tokenizer(model).save(str(tmp_path / path.name / "tokenizer.json"))
    a, b = (tmp_path / path.name for path in pair)
    text = (
        f"models: [{{model: {a}}}, {{model: {b}}}]\nbase_model: {a}\nmerge_method: linear\nparameters: {{weight: 1}}\n"
    )
    (tmp_path / "r.yaml").write_text(text + "tokenizer_source: union\n")
    assert "r.yaml:5: a union of Unigram tokenizers" in ok("merge", tmp_path / "r.yaml", "-o", tmp_path / "out").err
    found = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    assert [piece for piece, _ in found] == ["<unk>", "▁ab", "c", "xy"]


@pytest.mark.parametrize("name", ["B", "model:B"])
def test_another_models_tokenizer(name: str, merge: Merge, pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = merge(f"tokenizer_source: {name}", method="slerp", parameters="t: 1")
    b = vocabulary(pair[1])
    assert vocabulary(tmp_path / "out") == b
    assert found[ROWS[0]][:, 0].tolist() == [100 + i for i in range(len(b))]


def test_single_tokens_and_padding(merge: Merge, pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = (vocabulary(path) for path in pair)
    found = merge("""\
tokenizer:
  source: base
  pad_to_multiple_of: 8
  tokens:
    "<|im_start|>": {source: B}
    "<|new|>": {source: {kind: zero}}
    "<|named|>": {source: {kind: model_token, model: B, token: "xyz"}}
    "<|numbered|>": {source: {kind: model_token, model: B, token_id: 3}}
    "a": {source: B, force: true}
    "b": {source: B}
""")
    union = vocabulary(tmp_path / "out")
    rows = found[ROWS[0]][:, 0]
    # mergekit averages the first with row 14 of A, which is padding and stands for no token.
    assert float(rows[union["<|im_start|>"]]) == 100 + b["<|im_start|>"]
    assert float(rows[union["<|new|>"]]) == 0
    assert float(rows[union["<|named|>"]]) == 100 + b["xyz"]
    assert float(rows[union["<|numbered|>"]]) == 103
    assert float(rows[union["a"]]) == 100 + b["a"]
    assert float(rows[union["b"]]) == (a["b"] + 100 + b["b"]) / 2
    assert len(rows) % 8 == 0
    assert len(rows) - len(union) < 8
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("abc<|new|>") == ["abc", "<|new|>"]


@pytest.mark.parametrize(
    ("wish", "expected"),
    [("auto", "from b"), ("chatml", "<|im_start|>user\nhello<|im_end|>\n"), ("\"{{ 'mine' }}\"", "mine")],
)
def test_chat_templates(wish: str, expected: str, merge: Merge, tmp_path: Path) -> None:
    merge(f"tokenizer_source: base\nchat_template: {wish}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == expected


@pytest.mark.parametrize("name", ["llama3", "mistral", "alpaca", "exaone"])
def test_known_templates_hold_what_was_said(name: str, merge: Merge, tmp_path: Path) -> None:
    merge(f"tokenizer_source: base\nchat_template: {name}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "dear"}]
    text = tokenizer.apply_chat_template(said, tokenize=False)
    assert text.index("hello") < text.index("dear")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", "give `tokenizer_source:`"),
        ("tokenizer: {source: union, token: {}}", "unknown key 'token': did you mean 'tokens'"),
        ("tokenizer: {source: union, tokens: {x: {source: {kind: nil}}}}", "one of zero, model_token"),
        ("tokenizer: {source: base, tokens: {x: {source: B}}}\ntokenizer_source: base", "not both"),
        ("tokenizer: {source: base, tokens: {nowhere: {source: B}}}", "r.yaml:4: the token 'nowhere' is not in the"),
        (
            "tokenizer: {source: base, tokens: {x: {source: {kind: model_token, model: B, token_id: 99}}}}",
            "r.yaml:4: the token 'x' takes row 99 of b, which has 18",
        ),
        (
            "tokenizer: {source: base, tokens: {x: {source: {kind: model_token, model: B}}}}",
            "r.yaml:4: model_token takes the model and either token or token_id",
        ),
        (
            "tokenizer: {source: base, tokens: {a: {source: B, force: 1}}}",
            "r.yaml:4: force is 1, expected true",
        ),
    ],
)
def test_what_is_wrong(more: str, message: str, pair: tuple[Path, Path], cli: Cli, tmp_path: Path) -> None:
    text = f"models: [{{model: {pair[0]}}}, {{model: {pair[1]}}}]\nmerge_method: linear\nparameters: {{weight: 1}}\n"
    (tmp_path / "r.yaml").write_text(text + more.replace("B", str(pair[1])) + "\n")
    result = cli("merge", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert result.code == 2
    assert message in result.err


def with_rows(model: Path, out: Path, rows: int) -> Path:
    """Copy a model whose embedding and head have `rows` rows, fewer than its tokenizer has tokens."""
    from safetensors.torch import save_file

    shutil.copytree(model, out)
    held = {name: t[:rows].clone() if name in ROWS else t for name, t in read_tensors(model).items()}
    save_file(held, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    return out


@pytest.mark.parametrize("source", ["union", "base", "other"])
def test_tokens_without_a_row_in_any_model_are_not_made_up(
    pair: tuple[Path, Path], tmp_path: Path, cli: Cli, source: str
) -> None:
    """As where a pad token was added to a tokenizer and the embedding was never made larger."""
    a, b = pair
    count = len(vocabulary(b))
    short = with_rows(b, tmp_path / "short", count - 2)
    base, other = (short, a) if source == "base" else (a, short)
    wish = {"union": "union", "base": "base", "other": str(short)}[source]
    text = f"models: [{{model: {base}}}, {{model: {other}}}]\nbase_model: {base}\nmerge_method: linear\n"
    (tmp_path / "r.yaml").write_text(f"{text}parameters: {{weight: 1}}\ntokenizer_source: {wish}\n")
    result = cli("merge", tmp_path / "r.yaml", "-o", tmp_path / "out")
    lost = sorted(
        token for token, number in vocabulary(b).items() if number >= count - 2 and token not in vocabulary(a)
    )
    assert lost
    assert result.code == 2
    message = " ".join(result.err.split())
    assert "r.yaml:5: the token" in message
    assert any(repr(token) in message for token in lost)
    assert "has a row in no model's embedding: it would be made up" in message
    assert "{source: {kind: zero}}" in message
    assert not (tmp_path / "out").exists()
    # Said where the rows come from, it is written.
    tokens = "".join(f"    {json.dumps(token)}: {{source: {{kind: zero}}}}\n" for token in lost)
    wanted = f"tokenizer:\n  source: {wish}\n  tokens:\n{tokens}"
    (tmp_path / "r.yaml").write_text(f"{text}parameters: {{weight: 1}}\n{wanted}")
    result = cli("merge", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert result.code == 0, result.err
    numbers = vocabulary(tmp_path / "out")
    for name in ROWS:
        for token in lost:
            assert not read_tensors(tmp_path / "out")[name][numbers[token]].any()


def test_rows_of_padding_are_said(pair: tuple[Path, Path], tmp_path: Path, ok: Cli) -> None:
    text = f"models: [{{model: {pair[0]}}}, {{model: {pair[1]}}}]\nbase_model: {pair[0]}\nmerge_method: linear\n"
    text += "parameters: {weight: 1}\ntokenizer: {source: union, pad_to_multiple_of: 64}\n"
    (tmp_path / "r.yaml").write_text(text)
    ok("merge", tmp_path / "r.yaml", "-o", tmp_path / "out")
    numbers, rows = vocabulary(tmp_path / "out").values(), read_tensors(tmp_path / "out")[ROWS[0]].shape[0]
    held = read_tensors(pair[0])[ROWS[0]].shape[0]
    made = sum(number not in numbers for number in range(held, rows))
    (note,) = json.loads((tmp_path / "out/moesurgery.json").read_text())["steps"][-1]["notes"]
    assert note == f"{made} rows of the embedding that stand for no token are the mean of the base's rows"
