"""Every command of an installed moesurgery, run outside the checkout: `python -I tests/smoke.py MODEL FOLDER`.

`make package` runs it with the wheel and with the sdist, each installed where nothing else of this repository is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def run(folder: Path, *arguments: object) -> str:
    """Run one command in `folder` and return what it prints; end with its error where it fails."""
    command = [str(Path(sys.executable).with_name("moesurgery")), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr}")
    return done.stdout


def main(model: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    import moesurgery
    from moesurgery.cli._app import app
    from moesurgery.cli._shipped_recipes import shipped_recipes

    installed = Path(moesurgery.__file__)
    assert "site-packages" in installed.parts, f"{installed} is the checkout, not the installed package"
    typer_app = app()
    commands = [command.name for command in typer_app.registered_commands]
    assert len(commands) > 20, commands
    for name in [*commands, *(group.name for group in typer_app.registered_groups)]:
        assert run(folder, name, "--help").strip(), name
    names = list(shipped_recipes())
    assert len(names) > 20, names
    listed = run(folder, "recipes", "ls").split()
    for name in names:
        assert name in listed, name
        assert run(folder, "recipes", "show", name).strip(), name
    assert json.loads(run(folder, "count-params", model, "--json"))["total_params"] > 0
    run(folder, "rescale", model, "--top-k", 3, "-o", folder / "top3", "--force", "--validate")
    run(folder, "validate", folder / "top3", "--level", "config")
    print(f"{len(commands)} commands and {len(names)} recipes of {installed.parent}: 1 passed, 0 failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
