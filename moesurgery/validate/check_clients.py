"""K: whether the program that is to read the checkpoint does, and computes what transformers 5 does."""

from __future__ import annotations

from moesurgery.checkpoint.filenames import CONFIG
from moesurgery.families.client_limits import awkward_numbers, moe_shape
from moesurgery.families.clients import CLIENTS, Wants, language_part
from moesurgery.plan.plan import plan_of
from moesurgery.surgery.client_form import lacks_head, obstacles, zero_gates
from moesurgery.surgery.convert import unread_layout
from moesurgery.validate.check import NotChecked, Outcome, and_more, check, finding
from moesurgery.validate.context import Context

_CODES = ("K01", "K02", "K03", "K04", "K05", "K06", "K07")


@check(*_CODES)
def read_by_client(subject: Context) -> Outcome:
    """What the client of --for cannot read, would misread, or would stop at."""
    if subject.client is None:
        return
    client = CLIENTS[subject.client]
    if not isinstance(subject.config.get("model_type"), str):
        yield NotChecked(_CODES, "config.json names no model_type")
        return
    plan = plan_of(subject.checkpoint)
    hint = f"`moesurgery convert --for {client.name}` writes it so"
    wrong = obstacles(client, plan, subject.config)
    for reason in wrong:
        yield finding("K01", f"{client.name} ({client.version}): {reason}", CONFIG)
    if wrong:
        return  # its other wishes concern a form that it reads
    if subject.anatomy.blocks and subject.anatomy.family is not None:
        shape = moe_shape(subject.anatomy)
        for rule in awkward_numbers(client.name, shape):
            yield finding("K07", rule.warning_for(shape), CONFIG, hint=rule.source)
    wants = Wants(subject.config, (client,))
    if subject.anatomy.blocks and client.name in unread_layout(plan):
        name = subject.anatomy.blocks[0].members[0].name
        yield finding("K02", f"{client.name} reads this type's published layout alone", tensor=name, hint=hint)
    rope = client.rope_of(subject.config)
    if rope:
        here = language_part(subject.config)
        lacking = [key for key, value in rope.items() if here.get(key) is None and value is not None]
        yield finding("K03", f"{client.name} looks for {', '.join(lacking)}, and takes a default", CONFIG, hint=hint)
    if keys := client.keys_of(subject.config):
        yield finding("K04", f"{client.name} needs {', '.join(keys)}", CONFIG, hint=hint)
    if lacks_head(wants, subject.tensors):
        yield finding("K05", f"{client.name} has no head without lm_head.weight in this type", CONFIG, hint=hint)
    if gates := zero_gates(client, subject.config, plan.tensors):
        message = f"{client.name} divides by this gate, which is zero for every token{and_more(gates)}"
        yield finding("K06", message, tensor=gates[0], hint=hint)
