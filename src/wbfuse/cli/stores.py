"""Options that say how an object store is reached; shared by all commands that open a volume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

_OPTIONS = (
    click.option(
        "--endpoint", metavar="URL", help="S3 or Azure: the server, e.g. http://127.0.0.1:8333; kept in the volume."
    ),
    click.option("--access-key", metavar="ID", help="S3: the access key.  [default: AWS_ACCESS_KEY_ID]"),
    click.option(
        "--secret-key",
        metavar="KEY",
        help="S3: the secret key; anybody here can see it with ps, so better set AWS_SECRET_ACCESS_KEY.",
    ),
    click.option("--profile", metavar="NAME", help="S3: a profile in ~/.aws.  [default: AWS_PROFILE]"),
    click.option(
        "--store-option",
        multiple=True,
        metavar="NAME=VALUE",
        help="Any other option of obstore for this kind of store, e.g. region=eu-west-1.",
    ),
)


def store_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command; give what it gets to `collect_options`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def collect_options(
    endpoint: str | None, access_key: str | None, secret_key: str | None, profile: str | None, more: tuple[str, ...]
) -> dict[str, str]:
    """As obstore names them. Raises UsageError for what is not NAME=VALUE."""
    found = {"endpoint": endpoint, "access_key_id": access_key, "secret_access_key": secret_key, "profile": profile}
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise click.UsageError(f"--endpoint {endpoint}: write it as http://HOST:PORT or https://HOST")
    out = {name: value for name, value in found.items() if value}
    for item in more:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--store-option {item}: write it as NAME=VALUE")
        out[name] = value
    return out
