"""Every command line in a block of README.md and docs/ runs, on small models in the place of those that it names."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moesurgery.cli._app import app
from moesurgery.recipe.registry import BUILT_IN
from tests.conftest import DEMO, ROOT, Result

Cli = Callable[..., Result]
Models = Callable[..., Path]
GENERATED = ("cli.md", "codes.md", "pairs.md", "family-table.md", "merge-methods.md")
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in GENERATED)]
LINE = re.compile(r"^(?:\s{4,}|\$ )(moesurgery [^\n]+)$", re.MULTILINE)
SMALL = ["--window", "64", "--limit", "1"]


def commands() -> list[tuple[str, str]]:
    return [(page.name, line) for page in PAGES for line in LINE.findall(page.read_text())]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages name."""
    import transformers

    from moesurgery.cli import main
    from tests.commands.test_drop_experts import with_prediction_layer
    from tests.tiny import save_tiny

    folder = tmp_path_factory.mktemp("docs")

    def run(*arguments: object) -> None:
        assert main([str(word) for word in arguments]) == 0, arguments

    for name in ("Mixtral-8x7B-v0.1", "base", "MODEL"):
        shutil.copytree(DEMO, folder / name)
    run("rescale", DEMO, "--top-k", 3, "-o", folder / "Mixtral-8x7B-v0.1-rescale-k3", "-q")
    run("rescale", DEMO, "--top-k", 2, "--scale", 1.1, "-o", folder / "math", "-q")
    run("rescale", DEMO, "--top-k", 2, "--scale", 0.9, "-o", folder / "code", "-q")
    run("tie-blocks", DEMO, "-o", folder / "TIED", "-q")
    run("extract-lora", folder / "base", folder / "math", "--rank", 1, "-o", folder / "lora", "-q")
    torch_config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(torch_config).save_pretrained(folder / "dense")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder / "two-layers", save_original_format=True)
    save_tiny("deepseek_v3", folder / "lost", fused=False, dtype="float32")
    with_prediction_layer(folder / "lost", folder / "predicting")
    (folder / "text.txt").write_text((ROOT / "examples/demo/heldout-code.txt").read_text()[:40_000])
    (folder / "merge.yaml").write_text(
        f"merge_method: linear\nmodels:\n- model: {folder}/base\n  parameters: {{weight: 0.5}}\n"
        f"- model: {folder}/math\n  parameters: {{weight: 0.3}}\n"
        f"- model: {folder}/code+{folder}/lora\n  parameters: {{weight: 0.2}}\n"
    )
    (folder / "upcycle.yaml").write_text(f"model: {folder}/dense\nsteps:\n- upcycle: {{experts: 4}}\n")
    sources = f"- source_model: {folder}/dense\n" * 2
    (folder / "mergekit-moe.yaml").write_text(
        f"base_model: {folder}/dense\ngate_mode: random\ndtype: float32\nexperts:\n{sources}"
    )
    run("merge", folder / "merge.yaml", "-o", folder / "merged", "-q")
    run(
        "collect", DEMO, "--neurons", "--text", folder / "text.txt", "--tokens", 256, "--window", 64, "-o", folder / "S"
    )
    return folder


def words_of(page: str, line: str) -> list[str]:
    """Return the words of a command line with small models, files and amounts of text in place of what it names."""
    words = shlex.split(line, comments=True)[1:]
    dense = words[0] == "upcycle"
    names = {
        "MODEL": "dense"
        if dense
        else "predicting"
        if words[0] == "mtp"
        else "two-layers"
        if "{0: [3], 1: [6]}" in words
        else "MODEL",
        "F": "text.txt",
        "FILE": "text.txt",
        "BASE": "base",
        "FINETUNE": "lost",
        "TUNED": "math",
        "OTHER": "math",
        "STOCK": "stock",
        "recipe.yaml": "upcycle.yaml" if dense else "merge.yaml",
        **dict.fromkeys(("mine.jsonl", "other.jsonl"), "text.txt"),
        **({"48": "6"} if words[0] == "drop-experts" else {}),
        **({"128": "16"} if words[0] == "slim-experts" else {}),
        **({"OUT": "math", "50": "1"} if words[0] == "compare" else {}),
        **(dict.fromkeys(("MODEL", "BASE"), "predicting") if words[0] == "mtp" else {}),
    }
    words = ["Mixtral-8x7B-v0.1" if word.startswith("hf://") else names.get(word, word.rstrip("/")) for word in words]
    if "checkpoint-500=./math/final" in words:  # as in docs/validate.md, with folders that are here
        words = ["validate", "merged", *(w for n in ("base", "code", "lora") for w in ("--against", f"./{n}"))]
        words += ["--against", "math=./math"]
    if words[0] in BUILT_IN or words[0] in ("run", "mtp"):
        words.append("--dry-run")
    if "--text" not in words:
        return words
    tokens = [] if words[0] in ("compare", "perplexity") else ["--tokens", "256"]
    return [*words, *SMALL, *tokens, *(["--new-tokens", "4"] if "--generate" in words else [])]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda text: text.removeprefix("moesurgery ")[:60])
def test_a_command_of_the_pages_runs(
    cli: Cli, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str, line: str
) -> None:
    monkeypatch.chdir(workshop)
    words = words_of(page, line)
    if "-o" in words:
        words[words.index("-o") + 1] = str(tmp_path / "out")
    elif words[0] in ("slim-experts", "merge-experts"):  # what is fitted is kept beside the output, and is of one edit
        words += ["-o", str(tmp_path / "out")]
    result = cli(*words)
    assert result.code == (1 if words[0] == "diff" else 0), result.err + result.out
    if promised := re.search(r"# writes \./(\S+)", line):
        assert f"would write {promised[1]}" in result.out


def test_commands_are_found_on_the_pages() -> None:
    found = commands()
    assert len(found) > 30
    assert {page for page, _ in found} >= {"README.md", "surgery.md", "upcycle.md", "merge.md", "validate.md"}


def test_every_command_in_running_text_exists() -> None:
    known = {command.name for command in app().registered_commands} | {group.name for group in app().registered_groups}
    for page in PAGES:
        for name in re.findall(r"`moesurgery ([a-z][\w-]+)", page.read_text()):
            assert name in known, (page.name, name)
