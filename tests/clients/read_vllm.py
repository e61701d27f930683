"""Read checkpoints with vLLM on processors, for `tests/clients/run.py`."""

from __future__ import annotations

import gc
import os

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1")

from pathlib import Path

import numpy
import vllm
from reading import read_all
from vllm.distributed import cleanup_dist_env_and_memory


def logprobs(path: Path, tokens: list[int]) -> numpy.ndarray:
    try:
        return _logprobs(path, tokens)
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()  # its groups are of one model: those of a dense one have no experts


def _logprobs(path: Path, tokens: list[int]) -> numpy.ndarray:
    engine = vllm.LLM(
        str(path), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_logprobs=-1, max_model_len=128
    )
    wanted = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, logprobs=-1, detokenize=False)
    answer = engine.generate([{"prompt_token_ids": tokens}], wanted)[0]
    rows = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
    return numpy.array([[row[token].logprob for token in range(len(row))] for row in rows])


if __name__ == "__main__":
    read_all(logprobs, f"vLLM {vllm.__version__}")
