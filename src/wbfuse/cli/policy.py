"""Which caches a mount gets: the two options, who asks, and what the administrator allows (promise 13).

`allow_wbcache = true` in /etc/wbfuse.toml lets users have the kernel's write-back cache. It is advice that wbfuse
keeps, not a gate of the kernel's: that has none, and protects itself by a strict limit on dirty pages of FUSE mounts.
"""

from __future__ import annotations

import os
import stat
import tomllib

CONFIG = "/etc/wbfuse.toml"


class PolicyError(Exception):
    """What was asked for contradicts itself or is not allowed; one line for the person who asked."""


def wbcache_allowed(path: str = CONFIG) -> bool:
    """Whether the administrator allows it. Raises PolicyError where the file is not root's alone or is not TOML."""
    try:
        with open(path, "rb") as f:
            found = os.fstat(f.fileno())
            if found.st_uid != 0 or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise PolicyError(f"{path}: must be owned and written by root only (chown root, chmod go-w)")
            config = tomllib.load(f)
    except FileNotFoundError:
        return False
    except (OSError, tomllib.TOMLDecodeError) as e:
        raise PolicyError(f"{path}: {e}") from e
    return config.get("allow_wbcache") is True


def choose(policy: str, kernel_cache: str | None, privileged: bool, config: str = CONFIG) -> tuple[str, str | None]:
    """The kernel cache mode to use, and a message where it is less than the default. Raises PolicyError."""
    if policy == "writethrough":
        if kernel_cache == "writeback":
            raise PolicyError("--policy writethrough and --kernel-cache writeback contradict each other; drop one")
        return kernel_cache or "writethrough", None
    if kernel_cache in ("writethrough", "off"):
        return kernel_cache, None
    if privileged or wbcache_allowed(config):
        return "writeback", None
    how = f"an administrator allows it by the line 'allow_wbcache = true' in {config}"
    if kernel_cache == "writeback":
        raise PolicyError(f"the kernel's write-back cache is not allowed to users here; {how}")
    return "writethrough", f"the kernel's cache is write-through on this mount; {how}"
