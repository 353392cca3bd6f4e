"""Who is not root gets a refusal that says why, and nothing of the node."""

from __future__ import annotations

import pytest

from .host import PLACE, Host, command

pytestmark = pytest.mark.asyncio

MOORING = "/usr/bin/mooring"
AS_USER = ("setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", "--no-new-privs")


@pytest.fixture(autouse=True)
def place(host: Host) -> None:
    """A directory that a user may enter, unlike the scenarios' own."""
    PLACE.chmod(0o711)


async def test_the_agent_does_not_serve_as_a_user(host: Host) -> None:
    config = PLACE / "user.toml"
    config.write_text(
        '[agent]\nid = "user"\nstate-dir = "/tmp/mooring-user/state"\nruntime-dir = "/tmp/mooring-user/run"\n'
        f'[grants]\npublic-key-files = ["{PLACE}/user.pub"]\n'
    )
    (PLACE / "user.pub").write_bytes((host.node.place / "grant.pub").read_bytes())
    for path in (config, PLACE / "user.pub"):
        path.chmod(0o644)
    code, output = await command(*AS_USER, MOORING, "agent", "serve", "--config", str(config))
    assert code not in (0, 1), output
    assert "right to mount" in output
    assert "Traceback" not in output


async def test_the_socket_is_closed_to_others(host: Host) -> None:
    code, output = await command(*AS_USER, MOORING, "mounts", "ls", "--socket", str(host.node.socket))
    assert code != 0
    assert "Traceback" not in output
    places = (host.node.runtime.parent, host.node.runtime, host.node.socket)
    modes = [place.stat().st_mode & 0o777 for place in places]
    try:  # a careless chmod opens the way to it, but not the API
        for place in places:
            place.chmod(0o777)
        code, output = await command(*AS_USER, MOORING, "mounts", "ls", "--socket", str(host.node.socket))
        assert code != 0
        assert "1234" in output or "may not" in output, output
    finally:
        for place, mode in zip(places, modes, strict=True):
            place.chmod(mode)


async def test_a_user_reads_no_credential_and_no_folder(host: Host) -> None:
    spec = await host.attach()
    for place in (host.node.runtime / "creds", spec.source, host.node.state):
        code, output = await command(*AS_USER, "ls", str(place))
        assert code != 0
        assert "Permission denied" in output


async def test_mounting_as_a_user_is_refused(host: Host) -> None:
    keys = ("env", "AWS_ACCESS_KEY_ID=a", "AWS_SECRET_ACCESS_KEY=b")
    mount = (MOORING, "mount", f"s3://{host.folder}", "/mnt", "--endpoint", host.node.endpoint)
    code, output = await command(*AS_USER, *keys, *mount)
    assert code != 0
    assert "right to mount" in output or "/dev/fuse" in output, output
    assert "Traceback" not in output
