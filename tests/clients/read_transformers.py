"""Read checkpoints with the transformers of the environment that runs this, for `tests/clients/run.py`."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
import transformers
from reading import read_all

transformers.logging.set_verbosity_error()


def logprobs(path: Path, tokens: list[int]) -> numpy.ndarray:
    """Return the log-probabilities [tokens, vocabulary]. Raises ValueError where weights were made up or left out."""
    config = transformers.AutoConfig.from_pretrained(path)
    config._attn_implementation = "eager"
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, config=config, torch_dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report[kind]:
            raise ValueError(f"{kind}: {sorted(map(str, report[kind]))[:3]}")
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([tokens])).logits[0]
    return logits.double().log_softmax(-1).numpy()


if __name__ == "__main__":
    read_all(logprobs, f"transformers {transformers.__version__}")
