"""Train the demo model: a Mixtral of 8.2 M parameters, 8 experts, top-2, on the Python standard library.

    python examples/demo/train.py gather CORPUS        # collect the text from the running Python
    python examples/demo/train.py train CORPUS OUT     # train; minutes on a GPU, an hour or two on a CPU

Two domains: `code` is the source of the standard library's modules, `manual` is the language reference
that ships inside it (pydoc_data) and its docstrings. Both are under the PSF License Version 2, a copy of
which lies beside this file. Every twentieth file or docstring is held out and never trained on; a part
of that is shipped as `heldout-*.txt`, the text on which `make demo` measures perplexity.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import sysconfig
import time
from pathlib import Path

SEED = 0
WINDOW = 512
VOCABULARY = 2048
HELD_OUT_EVERY = 20
DOCUMENT_START = "<s>"


def standard_library() -> dict[str, list[str]]:
    """Return the documents of each domain, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: dict[str, list[str]] = {"code": [], "manual": []}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root).parts
        if "site-packages" in inside or inside[0] in ("pydoc_data", "encodings", "lib2to3", "ensurepip"):
            continue
        if "data" in inside or "bad" in path.name:
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        if len(text) < 500:
            continue
        documents["code"].append(text)
        if "test" in inside or "tests" in inside:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring and len(docstring) > 300:
                    documents["manual"].append(docstring)
    topics = ast.parse((root / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    for node in ast.walk(topics):
        if isinstance(node, ast.Dict):
            documents["manual"] += [ast.literal_eval(value) for value in node.values]
    return documents


def gather(corpus: Path) -> None:
    """Write CORPUS/{train,heldout}-{code,manual}.json, lists of documents without duplicates."""
    corpus.mkdir(parents=True, exist_ok=True)
    for domain, documents in standard_library().items():
        documents = list(dict.fromkeys(documents))
        random.Random(SEED).shuffle(documents)
        split = {
            "heldout": documents[::HELD_OUT_EVERY],
            "train": [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY],
        }
        for part, chosen in split.items():
            (corpus / f"{part}-{domain}.json").write_text(json.dumps(chosen))
            print(f"{part} {domain}: {len(chosen)} documents, {sum(map(len, chosen)):,} characters")


def train(corpus: Path, output: Path, steps: int, batch: int) -> None:
    """Train the tokenizer and the model on CORPUS and save them in OUTPUT in bfloat16."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    def read(part: str, domain: str) -> list[str]:
        return json.loads((corpus / f"{part}-{domain}.json").read_text())

    text = {d: read("train", d) for d in ("code", "manual")}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        text["code"] + 3 * text["manual"],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[DOCUMENT_START, "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    start, end = tokenizer.token_to_id(DOCUMENT_START), tokenizer.token_to_id("</s>")

    def tokens(documents: list[str]) -> torch.Tensor:
        flat = [i for e in tokenizer.encode_batch(documents) for i in (start, *e.ids, end)]
        return torch.tensor(flat, dtype=torch.long)

    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    streams = {d: tokens(text[d]).to(device) for d in text}
    heldout = {d: tokens(read("heldout", d))[: 200 * WINDOW].to(device) for d in text}
    print({d: len(s) for d, s in streams.items()}, "training tokens")

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=256,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            router_aux_loss_coef=0.01,
            bos_token_id=start,
            eos_token_id=end,
        )
    ).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = 200

    def rate(step: int) -> float:
        if step < warmup:
            return step / warmup
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    autocast = torch.autocast(device, dtype=torch.bfloat16)

    def loss_on(stream: torch.Tensor) -> float:
        model.eval()
        windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
        with torch.no_grad(), autocast:
            losses = [model(w, labels=w).loss.item() for w in windows.split(32)]
        model.train()
        return sum(losses) / len(losses)

    began = time.time()
    generator = torch.Generator().manual_seed(SEED)
    quota = {"code": batch - batch // 8, "manual": batch // 8}
    offsets = torch.arange(WINDOW, device=device)
    for step in range(1, steps + 1):
        rows = []
        for domain, stream in streams.items():
            starts = torch.randint(len(stream) - WINDOW, (quota[domain],), generator=generator)
            rows.append(stream[starts.to(device)[:, None] + offsets])
        window = torch.cat(rows)
        with autocast:
            loss = model(window, labels=window, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 250 == 0 or step == steps:
            held = {d: round(loss_on(s), 4) for d, s in heldout.items()}
            print(f"step {step} loss {loss.item():.4f} held out {held} {time.time() - began:.0f} s", flush=True)

    model.to(torch.bfloat16).cpu().save_pretrained(output, max_shard_size="6MB")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=DOCUMENT_START, eos_token="</s>").save_pretrained(
        output
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["gather", "train"])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64, help="windows of 512 tokens per step")
    options = parser.parse_args()
    if options.what == "gather":
        gather(options.corpus)
    elif options.output is None:
        parser.error("train needs OUT")
    else:
        train(options.corpus, options.output, options.steps, options.batch)


if __name__ == "__main__":
    main()
