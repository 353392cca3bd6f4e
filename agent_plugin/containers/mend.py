"""Repairing the folders of containers that do not hear of a new mount: those bound without `rslave`.

A replacement that is stacked on a dead mount reaches a container by propagation, if its runtime was told to bind with
`rslave`. For all others the agent goes there: it clones the new mount and puts the clone, from inside the mount
namespace of the container, on top of the dead one. Neither the container nor its runtime take part, and paths,
read-only and the user namespace stay as they were. From then on the folder is a slave of the mount here, so that the
next repair arrives by itself.

The work is done by a program of its own (`_mender.py`) with one disposable child per folder: a process cannot change
its namespace while it has threads, and a dead file system may hold up whoever walks into it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from storage_proxy.core.logs import get_logger

from ..kernel import Attribute, MountEntry, read_mountinfo
from ..kernel.abandon import off_loop
from ..kernel.namespaces import Holder, holders

log = get_logger(__name__)

_PROGRAM = Path(__file__).with_name("_mender.py")
_ROUNDS = 3  # a container may start, end or be reached by propagation while we look
_STEPS = {
    "source": "the new mount could not be copied",
    "enter": "its namespace could not be entered",
    "changed": "its mount point is not what it was",
    "move": "the mount could not be put there",
    "fork": "no process could be started for it",
}


@dataclass(frozen=True, slots=True)
class Mended:
    """One folder of one container (mount namespace). `error` says why it is still dead; None: it works again."""

    namespace: int
    pid: int  # the oldest process of the container, as this host counts
    target: str  # the mount point as the container sees it
    error: str | None = None


async def mend(old_devices: Collection[str], source: Path, *, deadline: float = 5.0) -> list[Mended]:
    """Puts the mount at `source` in place of those of `old_devices` ("major:minor"), wherever a container sees one.

    Call it after `source` was stacked on everything here: what propagation has reached is left alone. Returns one
    result per folder that had to be repaired; containers that ended meanwhile are not in it. Takes at most about
    `deadline` seconds. Idempotent. Raises `DeadlineExceeded` if the tables of the containers cannot be read in time.
    """
    end = asyncio.get_running_loop().time() + deadline
    done: dict[tuple[int, str], Mended] = {}
    for _ in range(_ROUNDS):
        left = max(end - asyncio.get_running_loop().time(), 0.5)
        found = await off_loop("a look at the containers' mounts", left, lambda: _dead(old_devices))
        jobs = [(holder, entry) for holder, entry in found if _retry(done.get((holder.namespace, entry.mount_point)))]
        if not jobs:
            break
        answers = await _run(jobs, source, max(end - asyncio.get_running_loop().time(), 0.5))
        for number, (holder, entry) in enumerate(jobs):
            step, code = answers.get(number, ("timeout", 0))
            place = (holder.namespace, entry.mount_point)
            if step == "gone":
                done.pop(place, None)
            else:
                done[place] = Mended(holder.namespace, holder.pid, entry.mount_point, _error(step, code, deadline))
    for result in done.values():
        if result.error is None:
            log.info("repaired the folder of a container", pid=result.pid, target=result.target)
        else:
            log.warning(
                "the folder of a container is not repaired", pid=result.pid, target=result.target, error=result.error
            )
    return list(done.values())


def _dead(devices: Collection[str]) -> list[tuple[Holder, MountEntry]]:
    """What containers see of these devices. Without peers of our own mounts (copies of this namespace that share with
    it): what is stacked here reaches them, and what would be stacked there would appear here.
    """
    found = [(holder, entry) for holder in holders(devices) for entry in holder.seen()]
    if not found:
        return []
    ours = {tag for entry in read_mountinfo() if entry.device in devices for tag in _groups(entry)}
    return [(holder, entry) for holder, entry in found if ours.isdisjoint(_groups(entry))]


def _groups(entry: MountEntry) -> set[str]:
    return {tag for tag in entry.tags if tag.startswith("shared:")}


def _retry(before: Mended | None) -> bool:
    """Whatever was only overtaken by a change is worth another look; a refusal will be one again."""
    return before is None or (before.error is not None and before.error.startswith(_STEPS["changed"]))


def _error(step: str, code: int, deadline: float) -> str | None:
    if step == "done":
        return None
    if step == "timeout":
        return f"the kernel did not answer within {deadline:g} s"
    return f"{_STEPS.get(step, step)}: {os.strerror(code)}"


async def _run(jobs: list[tuple[Holder, MountEntry]], source: Path, deadline: float) -> dict[int, tuple[str, int]]:
    """Step and errno of each job that answered in time."""
    lines = [
        f"{number} {holder.pid} {holder.started} {entry.mount_id} {int(_attributes(entry))}"
        f" {os.fsencode(_inside(source, entry.root)).hex()} {os.fsencode(entry.mount_point).hex()}\n"
        for number, (holder, entry) in enumerate(jobs)
    ]
    answers: dict[int, tuple[str, int]] = {}
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(_PROGRAM), f"{deadline:.3f}"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={"PATH": os.defpath},
            start_new_session=True,
        )
    except OSError as err:
        return dict.fromkeys(range(len(jobs)), ("fork", err.errno or 0))
    stdin, stdout = process.stdin, process.stdout
    if stdin is None or stdout is None:
        raise RuntimeError("the mender has no pipes")
    try:
        async with asyncio.timeout(deadline):
            stdin.write("".join(lines).encode())
            with contextlib.suppress(ConnectionError):
                await stdin.drain()
            stdin.close()
            while line := await stdout.readline():
                number, step, code = line.decode().split()
                answers[int(number)] = (step, int(code))
            await process.wait()
    except TimeoutError:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        # A child that hangs has the other end of the pipe; our end closes here.
        process._transport.close()  # type: ignore[attr-defined]  # asyncio offers no public way to let go of it
    return answers


def _inside(source: Path, root: str) -> Path:
    """Where a bind of the directory `root` of the dead file system comes from now."""
    return source / root.lstrip("/")


def _attributes(entry: MountEntry) -> Attribute:
    """What the old mount was restricted to, that the new one must not be less."""
    names = {"ro": Attribute.RDONLY, "nosuid": Attribute.NOSUID, "nodev": Attribute.NODEV, "noexec": Attribute.NOEXEC}
    found = Attribute.NONE
    for name, attribute in names.items():
        if name in entry.options:
            found |= attribute
    return found
