"""`proserve keys`: makes, lists and revokes the API keys of a clients file."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)

ClientsFile = Annotated[Path, typer.Argument(help="Clients file.", metavar="FILE")]


@app.command()
def add(
    file: ClientsFile,
    client: Annotated[str, typer.Argument(help="Name of the client.", metavar="CLIENT")],
    priority_class: Annotated[
        str | None,
        typer.Option(help="Class of the client, which is made if the file does not have it."),
    ] = None,
    expires_at: Annotated[
        datetime | None, typer.Option(help="The key is refused from then on; UTC.")
    ] = None,
) -> None:
    """Make a key and print it, this once; the file keeps its hash."""
    from orchestrator.command_line.clients_file import add_key

    end = None if expires_at is None else expires_at.replace(tzinfo=UTC)
    if end is not None and end <= datetime.now(UTC):
        raise typer.BadParameter(f"{end} is in the past", param_hint="--expires-at")
    key = add_key(file, client, priority_class=priority_class, expires_at=end)
    print(key.token)
    Console(stderr=True).print(
        f"This is key {key.key_id} of client {client}. It cannot be shown again.",
        highlight=False,
        markup=False,
    )


@app.command("list")
def list_keys(file: ClientsFile) -> None:
    """Show all clients and their keys' ids."""
    from orchestrator.command_line.clients_file import read_clients

    now = datetime.now(UTC)
    table = Table("client", "class", "key", "expires")
    for client in read_clients(file).clients:
        for key in client.keys:
            end = "never" if key.expires_at is None else f"{key.expires_at:%Y-%m-%d %H:%M %Z}"
            text = f"{end} (expired)" if key.has_expired(now) else end
            table.add_row(client.name, client.priority_class, key.key_id, text)
        if not client.keys:
            table.add_row(client.name, client.priority_class, "none", "")
    Console().print(table)


@app.command()
def revoke(
    file: ClientsFile,
    key_id: Annotated[str, typer.Argument(help="The eight letters in the key.", metavar="KEY_ID")],
) -> None:
    """Remove a key; a running router refuses it when it next looks at the file."""
    from orchestrator.command_line.clients_file import revoke_key

    client = revoke_key(file, key_id)
    Console().print(f"revoked key {key_id} of client {client}", highlight=False, markup=False)
