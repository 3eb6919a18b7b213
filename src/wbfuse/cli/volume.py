"""Commands that make and keep volumes."""

from __future__ import annotations

import click

from wbfuse.cli.stores import collect_options, store_options
from wbfuse.cli.units import SIZE, show_size
from wbfuse.store.contract import SourceError


@click.command("format")
@click.argument("meta")
@click.option(
    "--data", required=True, metavar="URL", help="Where bytes go: file:///DIR, s3://BUCKET/PREFIX, gs://, az://."
)
@click.option("--pack-size", type=SIZE, default="16MiB", show_default=True, help="The largest object.")
@click.option(
    "--compress", type=click.Choice(["none", "zstd", "lz4"]), default="none", show_default=True, help="Of every frame."
)
@store_options
def format_command(
    meta: str, data: str, pack_size: int, compress: str, endpoint: str | None, access_key: str | None,
    secret_key: str | None, profile: str | None, store_option: tuple[str, ...],
) -> None:  # fmt: skip
    """Make an empty volume: its names and maps in the database META, its bytes in immutable objects under --data.

    META is sqlite:///PATH (one host) or postgresql://USER@HOST/DATABASE (many). The object store is tried out first
    and refused where it does not keep what a volume rests on. Secrets are not kept: give them again when mounting, or
    in the environment.
    """
    from wbfuse.store.volume import format_volume

    try:
        options = collect_options(endpoint, access_key, secret_key, profile, store_option)
        made = format_volume(meta, data, options, pack_size, compress)
    except SourceError as e:
        raise click.UsageError(str(e)) from e
    click.echo(f"volume {made['uuid']}: packs of {show_size(pack_size)} in {data}")
    click.echo(f"mount it with: wbfuse mount {meta} MOUNTPOINT")
