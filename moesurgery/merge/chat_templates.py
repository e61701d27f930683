"""Chat templates: those that recipes know by name, and the ones that models have."""

from __future__ import annotations

import json
from collections.abc import Mapping

from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.filenames import CHAT_TEMPLATE, TOKENIZER_CONFIG
from moesurgery.moe.canonical_names import CanonicalTensors

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] }}"
        "{{ '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] + eos_token }}{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% endif %}{% endfor %}"
    ),
    "alpaca": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{{ '\n' if message['role'] == 'user' else '[|endofturn|]\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
}


def chat_template(wanted: str, models: Mapping[str, CanonicalTensors]) -> str | None:
    """Return the template that a recipe wants: one that is known by name, Jinja, or `auto`, what most models have."""
    if wanted != "auto":
        return TEMPLATES.get(wanted, wanted)
    held = (chat_template_of(parts.plan.checkpoint) for parts in models.values())
    templates = [template for template in held if template is not None]
    return max(templates, key=templates.count) if templates else None


def chat_template_of(checkpoint: Checkpoint) -> str | None:
    """Return a model's chat template, from whichever file holds it."""
    sizes = checkpoint.file_sizes
    if CHAT_TEMPLATE in sizes:
        return checkpoint.source.read(CHAT_TEMPLATE, 0, sizes[CHAT_TEMPLATE]).decode("utf-8", "replace")
    if TOKENIZER_CONFIG in sizes:
        try:
            held = json.loads(checkpoint.source.read(TOKENIZER_CONFIG, 0, sizes[TOKENIZER_CONFIG])).get("chat_template")
        except (ValueError, AttributeError):
            return None
        return held if isinstance(held, str) else None
    return None
