"""`proserve config`: checks and explains configuration files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check and explain configuration files.", no_args_is_help=True)

KINDS = "deployment, node, router, clients, engine or simulation"
KindOption = Annotated[
    str | None, typer.Option("--kind", help=f"{KINDS}; by default told by the keys.")
]


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="YAML files.", metavar="FILE...")],
    kind: KindOption = None,
) -> None:
    """Report every mistake, each as FILE:LINE:COLUMN; exit status 1 if there is one."""
    from orchestrator.command_line.config_kinds import check_file
    from orchestrator.core.errors import ConfigError

    has_mistakes = False
    for file in files:
        try:
            checked = check_file(file, kind)
        except ConfigError as error:
            has_mistakes = True
            print(error)
        else:
            print(f"{file}: ok ({checked.kind})")
    raise typer.Exit(int(has_mistakes))


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="YAML file.", metavar="FILE")],
    kind: KindOption = None,
) -> None:
    """Print a file as it takes effect, defaults too; comments say where each value comes from."""
    from orchestrator.command_line.config_kinds import check_file
    from orchestrator.command_line.config_show import effective_yaml

    print(effective_yaml(check_file(file, kind)), end="")


@app.command()
def schema(
    kind: Annotated[
        str,
        typer.Argument(help=f"{KINDS}.", metavar="KIND"),
    ],
) -> None:
    """Print the JSON Schema of a kind of file, for editors."""
    from orchestrator.command_line.config_schema import schema_of

    print(schema_of(kind), end="")
