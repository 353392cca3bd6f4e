"""A container that reads a file of its folder 20 times per second, and what it met."""

from __future__ import annotations

import asyncio
import errno
import secrets
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.t4_agent.podman import Podman

from .stand import CONTENT, FILE

INTERVAL = 0.05
_PROGRAM = Path(__file__).with_name("reading.py")
_LIBRARIES = ("/usr", "/lib", "/lib64")


@dataclass(frozen=True, slots=True)
class Sample:
    """One read: monotonic seconds, and 0 or an errno."""

    begun: float
    ended: float
    number: int

    @property
    def good(self) -> bool:
        return self.number == 0


@dataclass(frozen=True, slots=True)
class Outage:
    """What a reader met after something happened at `since`. `seconds` is None if no read was good any more; `freed` is
    when a read that was under way, or the next one, came back; `errors` counts by the name of the errno.
    """

    seconds: float | None
    failed: int
    freed: float | None
    errors: dict[str, int]


def outage(samples: Sequence[Sample], since: float, until: float = float("inf")) -> Outage:
    """`seconds` runs until the end of the first read that was begun after the last failed one: not until the first good
    one, which may have been followed by others that failed."""
    after = [sample for sample in samples if since <= sample.ended < until]
    bad = [sample for sample in after if not sample.good]
    last = bad[-1].ended if bad else since
    good = next((sample.ended for sample in after if sample.good and sample.begun >= last), None)
    return Outage(
        seconds=None if good is None else good - since,
        failed=len(bad),
        freed=after[0].ended - since if after else None,
        errors=dict(Counter(errno.errorcode.get(sample.number, "wrong length") for sample in bad)),
    )


@dataclass
class Reader:
    """Started by `start`; ends with its container."""

    podman: Podman
    name: str
    log: Path
    pid: int
    samples: list[Sample] = field(default_factory=list)
    _read: int = 0

    @classmethod
    async def start(cls, podman: Podman, place: Path, mount: str, target: str = "/data") -> Reader:
        """`mount` is the argument of podman's --mount; the folder must appear at `target`."""
        place.mkdir(exist_ok=True)
        log = place / f"{secrets.token_hex(4)}.log"
        shutil.copy(_PROGRAM, place / _PROGRAM.name)
        name = await podman.start(
            options=(*_python(podman.rootfs), f"--volume={place}:/log", f"--mount={mount}"),
            command=(
                *(str(_interpreter()), "-I", "-S", f"/log/{_PROGRAM.name}"),
                *(f"{target}/{FILE}", f"/log/{log.name}", str(INTERVAL), str(len(CONTENT))),
            ),
        )
        reader = cls(podman, name, log, await podman.pid(name))
        await reader.good_since(time.monotonic(), 10.0)
        return reader

    def look(self) -> list[Sample]:
        """Everything that was read so far."""
        if self.log.exists():
            with self.log.open() as log:
                log.seek(self._read)
                text = log.read()
            whole = text[: text.rfind("\n") + 1]
            self._read += len(whole)
            for line in whole.splitlines():
                begun, ended, number = line.split()
                self.samples.append(Sample(float(begun), float(ended), int(number)))
        return self.samples

    async def good_since(self, since: float, seconds: float) -> bool:
        """Waits until a read that was begun after `since` is good. False if none is in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            samples = self.look()
            if samples and samples[-1].good and samples[-1].begun >= since:
                return True
            await asyncio.sleep(0.02)
        return False

    async def same_process(self) -> bool:
        return await self.podman.pid(self.name) == self.pid

    async def close(self) -> None:
        await self.podman.remove(self.name)


def _interpreter() -> Path:
    return Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"


def _python(rootfs: Path) -> list[str]:
    """Podman options that give a container this host's Python, read-only."""
    options = []
    for text in (*_LIBRARIES, sys.base_prefix):
        place = Path(text)
        if place.is_symlink():
            inside = rootfs / text.lstrip("/")
            if not inside.is_symlink():
                inside.symlink_to(place.readlink())
        elif place.is_dir() and not (text not in _LIBRARIES and text.startswith("/usr")):
            options.append(f"--volume={text}:{text}:ro")
    return options
