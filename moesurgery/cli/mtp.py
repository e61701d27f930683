"""`moesurgery mtp drop`, `extract` and `graft`: the operations on layers for multi-token prediction."""

from __future__ import annotations

import typer

from moesurgery.cli._help import command_class, in_words
from moesurgery.cli._operations import command_for
from moesurgery.recipe.registry import BUILT_IN, MTP_VERBS, find_operation

mtp_app = typer.Typer(
    help="Prediction (MTP) layers: leave them out, take them out as a draft, put them back.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for _name in BUILT_IN:
    if _name.startswith(MTP_VERBS):
        _found = find_operation(_name)
        mtp_app.command(_name.removeprefix(MTP_VERBS), cls=command_class(_found.parameters))(
            in_words(command_for(_found))
        )
