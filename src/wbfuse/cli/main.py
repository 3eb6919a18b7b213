"""The entry point: commands and how their errors leave (one line, exit 2 for what was asked wrongly)."""

from __future__ import annotations

import sys

import click

from wbfuse import __version__
from wbfuse.cli.mount import mount
from wbfuse.cli.recover import recover
from wbfuse.cli.status import status
from wbfuse.cli.umount import restart, sync, umount
from wbfuse.cli.volume import check, clone, dump, format_command, gc, load, snapshot


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """A file system with a write-back cache over slow or far stores.

    \b
    wbfuse mount /srv/slow /mnt/fast     serve /srv/slow on /mnt/fast
    wbfuse sync /mnt/fast                make everything durable now
    wbfuse umount /mnt/fast              make everything durable, then unmount
    """


for _command in (mount, umount, sync, status, restart, format_command, clone, snapshot, check, gc, dump, load, recover):
    cli.add_command(_command)


def main() -> None:
    """`wbfuse`. Errors are one line on stderr, without the usage text that says nothing more."""
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as e:
        click.echo(f"wbfuse: {e.format_message()}", err=True)
        sys.exit(e.exit_code)
    except click.Abort:
        click.echo("wbfuse: interrupted", err=True)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
