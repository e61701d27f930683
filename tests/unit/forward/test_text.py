"""Calibration text in the forms that the field has it: conversations, completions, Parquet, URLs, weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import transformers

from moesurgery import open_checkpoint, plan_of
from moesurgery.errors import RecipeError
from moesurgery.fitting.calibration_run import read_calibration
from moesurgery.fitting.collector import collect
from moesurgery.fitting.run_settings import RunSettings
from moesurgery.forward.engine import Engine
from moesurgery.forward.text_documents import Text, text_of
from moesurgery.forward.text_windows import Reading, read_domain
from moesurgery.forward.tokens import Tokens, padded
from tests.conftest import Result
from tests.tokenizer import save_tokenizer

Cli = Callable[..., Result]

# In the manner of Qwen 3, Llama 3.1 and DeepSeek-V3: tools, thoughts cut out of earlier turns, dates, macros.
QWEN = """{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}
{{- messages[0].content + '\\n\\n' }}{%- endif %}{{- '# tools\\n<tools>' }}{%- for tool in tools %}{{- '\\n' }}
{{- tool | tojson }}{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}{%- for message in messages[::-1] %}
{%- set index = (messages|length - 1) - loop.index0 %}{%- if message.role == 'user' %}{%- set ns.last = index %}
{%- break %}{%- endif %}{%- endfor %}{%- for message in messages %}{%- if message.role == 'user' %}
{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}{%- elif message.role == 'assistant' %}
{%- set content = message.content %}{%- if '</think>' in content and loop.index0 < ns.last %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>assistant\\n' + content }}{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + call.function | tojson + '</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>' + message.content }}
{{- '</tool_response><|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA = """{{- bos_token }}{%- if not date_string is defined %}
{%- set date_string = strftime_now('%d %b') %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}
{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start|>system<|end|>\\n\\n' + date_string + '\\n' + system }}{%- if tools is not none %}
{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}{%- endif %}{{- '<|eot|>' }}
{%- for message in messages %}{%- if message.role == 'tool' %}{{- '<|start|>ipython<|end|>\\n\\n' }}
{{- message.content | tojson }}{{- '<|eot|>' }}{%- elif 'tool_calls' in message %}
{%- if not message.tool_calls|length == 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
{{- '<|start|>assistant<|end|>\\n\\n{"name": "' + message.tool_calls[0].function.name + '"}<|eot|>' }}{%- else %}
{{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}"""
DEEPSEEK = """{% macro said(text) %}{{ text | default('') }}{% endmacro %}{{ bos_token }}
{%- for message in messages %}{%- if message['role'] == 'system' %}{{ said(message['content']) }}{%- endif %}
{%- endfor %}{%- for message in messages %}{%- if message['role'] == 'user' %}
{{- '<|user|>' + message['content'] }}{%- elif message['role'] == 'assistant' %}{{- '<|assistant|>' }}
{%- generation %}{{- said(message['content']) + eos_token }}{%- endgeneration %}{%- elif message['role'] == 'tool' %}
{{- '<|tool|>' + message['content'] }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""
TEMPLATES = {"qwen": QWEN, "llama": LLAMA, "deepseek": DEEPSEEK}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "what is 2 + 2?"}, {"role": "assistant", "content": "it is 4."}]},
    {
        "messages": [
            {"role": "system", "content": "be short."},
            {"role": "user", "content": "one  and <two>"},
            {"role": "assistant", "content": "<think>well</think>\nthree"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "<think>so</think>\nthree still"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "add them"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "3, then"},
        ],
        "tools": TOOLS,
    },
]


@pytest.fixture
def chatty(models: Any, tmp_path: Path) -> Callable[[str], Path]:
    """A tiny model with a tokenizer and one of the templates."""

    def make(name: str) -> Path:
        path = tmp_path / name
        shutil.copytree(models("mixtral"), path)
        save_tokenizer(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        tokenizer.add_special_tokens({"eos_token": "?"})
        tokenizer.chat_template = TEMPLATES[name]
        tokenizer.save_pretrained(path)
        return path

    return make


def lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_conversations_are_what_the_models_template_makes_of_them(
    chatty: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    path = chatty(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    reading = Reading(open_checkpoint(path))
    found = [d.ids for d in reading.documents(Text(lines(tmp_path / "c.jsonl", CHATS)))]
    for ids, chat in zip(found, CHATS, strict=True):
        expected = tokenizer.apply_chat_template(chat["messages"], tools=chat.get("tools"), return_dict=False)
        assert ids == expected
        assert len(ids) > 20


def test_other_ways_to_write_a_conversation(chatty: Callable[[str], Path], tmp_path: Path) -> None:
    reading = Reading(open_checkpoint(chatty("qwen")))
    turns = CHATS[0]["messages"]
    forms = [
        CHATS[0],
        {"conversations": [{"from": "human", "value": turns[0]["content"]}, {"from": "gpt", "value": "it is 4."}]},
        {"prompt": turns[:1], "completion": turns[1:]},
    ]
    first, *others = (d.ids for d in reading.documents(Text(lines(tmp_path / "c.jsonl", forms))))
    assert others == [first, first]


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_only_the_assistants_tokens_count(chatty: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Also where the template marks nothing: by what the text was before the answer, and after it."""
    path = chatty(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    reading = Reading(open_checkpoint(path), assistant=True)
    (found,) = reading.documents(Text(lines(tmp_path / "c.jsonl", CHATS[:1])))
    assert found.counted is not None
    said = tokenizer.decode([i for i, c in zip(found.ids, found.counted, strict=True) if c]).replace(" ", "")
    assert said.startswith("itis4.")
    assert "what" not in said
    if name == "deepseek":
        marked = tokenizer.apply_chat_template(
            CHATS[0]["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        assert [int(c) for c in found.counted] == marked["assistant_masks"]


def test_where_the_template_hides_whose_words_are_whose(chatty: Callable[[str], Path], tmp_path: Path) -> None:
    """Thoughts are cut out of earlier turns, so an earlier text is no beginning of the whole."""
    reading = Reading(open_checkpoint(chatty("qwen")), assistant=True)
    with pytest.raises(RecipeError, match=r"c\.jsonl:1: .*does not show which words are the assistant's"):
        list(reading.documents(Text(lines(tmp_path / "c.jsonl", CHATS[1:2]))))


def test_a_completion_and_what_it_counts(chatty: Callable[[str], Path], tmp_path: Path) -> None:
    reading = Reading(open_checkpoint(chatty("qwen")), assistant=True)
    (found,) = reading.documents(Text(lines(tmp_path / "c.jsonl", [{"prompt": "abc", "completion": "de"}])))
    assert found.counted == [False, False, False, False, True, True]  # the first begins the document


def test_what_does_not_count_is_in_no_sum_and_in_the_context(models: Any) -> None:
    """Sums over the second half of a window are those of the whole less those of the first half alone."""
    engine = Engine(plan_of(open_checkpoint(models("mixtral"))))
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(3))
    counted = torch.arange(24).expand(2, 24) >= 12
    part = collect(engine, Tokens(ids, None, counted))
    whole, first = collect(engine, Tokens(ids)), collect(engine, Tokens(ids[:, :12]))
    for where, block in part.blocks.items():
        for name in ("count", "gate_norm", "gram", "probability", "logits", "tokens"):
            expected = whole.blocks[where].total(name) - first.blocks[where].total(name)
            assert block.total(name) == pytest.approx(expected, rel=1e-4, abs=1e-4), name


def test_documents_that_stand_apart_do_not_see_each_other(models: Any) -> None:
    path = models("mixtral")
    sequences = [torch.randint(3, 60, (n,)).tolist() for n in (24, 17, 9, 5)]
    engine = Engine(plan_of(open_checkpoint(path)), keep=0)
    found = engine.logits(padded(sequences))
    for row, ids in enumerate(sequences):
        assert (found[row, : len(ids)] - engine.logits(Tokens(torch.tensor([ids])))[0]).abs().max() < 1e-5


def test_batches_of_short_windows_hold_more_of_them() -> None:
    tokens = padded([[1] * n for n in (16, 16, 8, 8, 4, 4, 4, 4)])
    found = list(tokens.batches(2))
    assert [(first, tuple(part.ids.shape)) for first, part in found] == [(0, (2, 16)), (2, (4, 8)), (6, (2, 4))]
    assert sum(part.count for _, part in found) == tokens.count == 64


def test_windows_of_documents_apart(chatty: Callable[[str], Path], tmp_path: Path) -> None:
    """None is dropped, the longest come first, and one that is longer than a window is cut."""
    reading = Reading(open_checkpoint(chatty("qwen")))
    text = Text(lines(tmp_path / "t.jsonl", [{"text": "a" * n} for n in (3, 20, 7)]))
    found = read_domain(text, reading, 16, apart=True)
    assert found.mask is not None
    assert found.mask.sum(1).tolist() == [16, 8, 5, 4]
    assert found.tokens == 16 + 8 + 5 + 4 - 4


@pytest.mark.parametrize("seed", [None, 3])
def test_windows_that_were_left_out(chatty: Callable[[str], Path], tmp_path: Path, seed: int | None) -> None:
    """Those after a limit are the others, each once; documents that stand apart likewise."""
    reading = Reading(open_checkpoint(chatty("qwen")))
    text = Text(lines(tmp_path / "t.jsonl", [{"text": chr(97 + n) * (n + 5)} for n in range(26)]))
    for apart in (False, True):
        whole = read_domain(text, reading, 16, apart=apart)
        parts = [read_domain(text, reading, 16, 5, seed, skip=skip, apart=apart) for skip in range(0, 50, 5)]
        rows = [tuple(row[:16].tolist()) for part in parts for row in torch.nn.functional.pad(part.windows, (0, 16))]
        assert sorted(rows) == sorted(tuple(row.tolist()) for row in whole.windows)
        assert 0 < len(parts[0].windows) < len(whole.windows)
        assert len(parts[-1].windows) == 0


def test_weights_share_out_the_tokens(chatty: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(chatty("qwen"))
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(letter * 2000)
    given = [f"{tmp_path}/a.txt=3", f"{tmp_path}/b.txt"]
    tokens = read_calibration(RunSettings(16, None, 0), plan_of(checkpoint), given, 320).windows
    kinds = tokens.ids[:, 5].unique(return_counts=True)[1].tolist()
    assert kinds == [15, 5]
    assert text_of("x=y.jsonl") == Text("x=y.jsonl")
    (tmp_path / "c=2").write_text("a")
    assert text_of(f"{tmp_path}/c=2") == Text(f"{tmp_path}/c=2")
    with pytest.raises(RecipeError, match="no positive number"):
        text_of("code.jsonl=0")


def test_a_file_behind_a_url(chatty: Callable[[str], Path], tmp_path: Path, ok: Cli) -> None:
    path = chatty("qwen")
    local = lines(tmp_path / "c.jsonl", CHATS * 5)
    with fsspec.open("memory://sets/c.jsonl", "wb") as file:
        file.write(Path(local).read_bytes())
    found = [ok("perplexity", path, text, "--window", 32, "--json").json for text in (local, "memory://sets/c.jsonl")]
    assert found[0]["domains"][0] == found[1]["domains"][0]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("memory://sets/none.jsonl", "cannot be read"),
        ("none.txt", "cannot be read"),
        ("nothing://x/y.jsonl", "cannot be read"),
    ],
)
def test_files_that_are_not_there(chatty: Callable[[str], Path], cli: Cli, text: str, word: str) -> None:
    result = cli("perplexity", chatty("qwen"), text, "--window", 32)
    assert result.code == 2
    assert word in result.err


def test_parquet_holds_the_same_records(chatty: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow.parquet import write_table

    reading = Reading(open_checkpoint(chatty("qwen")))
    records = [dict(chat) for chat in CHATS[:2]]
    write_table(pyarrow.Table.from_pylist(records), tmp_path / "c.parquet")
    found = [[d.ids for d in reading.documents(Text(str(tmp_path / name)))] for name in ("c.parquet",)]
    expected = [d.ids for d in reading.documents(Text(lines(tmp_path / "c.jsonl", records)))]
    assert found[0] == expected
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(RecipeError, match="cannot be read as Parquet"):
        list(reading.documents(Text(str(tmp_path / "bad.parquet"))))


def test_messages_without_a_template(models: Any, tmp_path: Path, cli: Cli) -> None:
    shutil.copytree(models("mixtral"), tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    result = cli("perplexity", tmp_path / "m", lines(tmp_path / "c.jsonl", CHATS), "--window", 32)
    assert result.code == 2
    assert "has no chat template" in result.err


def test_a_template_cannot_reach_out(chatty: Callable[[str], Path], tmp_path: Path, cli: Cli) -> None:
    path = chatty("qwen")
    (path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    result = cli("perplexity", path, lines(tmp_path / "c.jsonl", CHATS), "--window", 32)
    assert result.code == 2
    assert "c.jsonl:1: the model's chat template refuses it" in result.err


def test_statistics_of_conversations_by_command(chatty: Callable[[str], Path], tmp_path: Path, ok: Cli) -> None:
    path = chatty("llama")
    text = lines(tmp_path / "c.jsonl", CHATS[:1] * 8)
    options = ["--window", 32, "--tokens", 256, "--json", "-o"]
    plain = ok("collect", path, "--text", text, *options, tmp_path / "a", "--apart").json
    counted = ok("collect", path, "--text", text, *options, tmp_path / "b", "--apart", "--assistant-only").json
    assert counted["assistant_only"]
    assert 0 < counted["tokens"] < plain["tokens"] / 3
    assert sum(counted["layers"][0]["experts"]["tokens"]) == 2 * counted["tokens"]
