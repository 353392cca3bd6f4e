"""The main job: one folder's whole life through the public APIs, on the running stack, with every byte checked.

    create a folder -> upload a model directory -> bind an existing bucket directory read-only with its own key
    -> plan a session -> the agent attaches both -> a container reads, checks, writes and is refused
    -> end the session -> what it wrote is in S3 -> nothing is left

Only what an operator has before Mooring comes is made without it: the objects of the bucket directory that is bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..client.agent import AgentClient
from ..client.manager import Folder, ManagerClient, MountAsked, SessionPlan
from ..client.transfer import TransferClient
from ..core.errors import IntegrityError, MooringError, MountError, MountFailed, NoSpace, NotFound
from ..core.ids import AccessMode, VFolderID
from ..core.logs import get_logger
from ..core.secrets import write_private
from ..core.wire import BindSpec, S3Credential
from ..s3 import Endpoint, S3Client
from ..s3.scoped import ScopedIssuer
from . import samples
from .configs import AGENT_ID, VOLUME
from .endpoints import Endpoints
from .process import finish
from .residue import mounts_below, processes_naming
from .samples import MIB, SampleTree
from .sessions import SessionCommand, SessionResult, SessionRunner
from .stack import Dataset
from .state import StateDirectory, disk_error

log = get_logger(__name__)

UID = GID = 1000
SEED = 20221
SESSION_DEADLINE_SECONDS = 300.0
GONE_DEADLINE_SECONDS = 15.0
CLEANUP_DEADLINE_SECONDS = 60.0
COPY_BYTES = 32 * MIB
BIG_VARIABLE = "MOORING_JOB_BIG_BYTES"  # for tests of the tests; not documented
LOW_DISK_BYTES = 32 * MIB

MODEL_TARGET = "/home/work/model"
DATA_TARGET = "/home/work/datasets"
RESULTS = "results"
CHECKED = f"{RESULTS}/checked.txt"
COPIED = f"{RESULTS}/nested/größe + 50%.bin"
EMPTY = f"{RESULTS}/empty.txt"
WHO = f"{RESULTS}/who.txt"
_SPLIT = "-- checked --"
_UNDO_ORDER = ("session", "data", "model", "credential", "dataset")

# Runs in a busybox shell as uid 1000. Each line before the split is "name value"; after it follows the text of CHECKED.
_SCRIPT = f"""
cd {MODEL_TARGET} || exit 20
echo "model_files $(find . -type f | wc -l)"
echo "data_files $(find {DATA_TARGET} -type f | wc -l)"
sha256sum -c {samples.SUMS} >/tmp/checked 2>/tmp/problems
echo "model_status $?"
(cd {DATA_TARGET} && sha256sum -c {samples.SUMS}) >>/tmp/checked 2>>/tmp/problems
echo "data_status $?"
echo "model_sums $(sha256sum <{samples.SUMS})"
echo "data_sums $(sha256sum <{DATA_TARGET}/{samples.SUMS})"
mkdir -p {RESULTS}/nested || exit 21
cat /tmp/checked >{CHECKED} || exit 22
head -c $COPY_BYTES "{samples.BIG}" >"{COPIED}" || exit 23
: >{EMPTY} || exit 24
echo "$(id -u):$(id -g)" >{WHO} || exit 25
echo "who $(cat {WHO})"
refused() {{
    name=$1; shift
    if ("$@") >/dev/null 2>/tmp/refusal; then echo "$name written"; return; fi
    echo "$name refused $(tail -n 1 /tmp/refusal)"
}}
create() {{ echo x >"{DATA_TARGET}/forbidden.txt"; }}
append() {{ echo x >>"{DATA_TARGET}/{samples.SUMS}"; }}
refused create create
refused append append
refused mkdir mkdir {DATA_TARGET}/forbidden
refused remove rm {DATA_TARGET}/{samples.SUMS}
refused rename mv {DATA_TARGET}/{samples.SUMS} {DATA_TARGET}/moved
echo "{_SPLIT}"
cat /tmp/checked
cat /tmp/problems >&2
"""
_REFUSALS = ("create", "append", "mkdir", "remove", "rename")
_REFUSED_WORDS = ("Read-only file system", "Permission denied")


@dataclass(slots=True)
class JobResult:
    """What the job found. `bytes` counts what was read and checked inside the session."""

    ok: bool = False
    files_checked: int = 0
    bytes: int = 0
    sha256_mismatches: int = 0
    write_refused_on_read_only: bool = False
    written_files_verified: int = 0
    runtime: str = ""
    runtime_reason: str = ""
    read_only_credential: str = ""
    residue: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:  # Any: JSON
        return {
            "ok": self.ok,
            "files_checked": self.files_checked,
            "bytes": self.bytes,
            "sha256_mismatches": self.sha256_mismatches,
            "write_refused_on_read_only": self.write_refused_on_read_only,
            "written_files_verified": self.written_files_verified,
            "runtime": self.runtime,
            "runtime_reason": self.runtime_reason,
            "read_only_credential": self.read_only_credential,
            "residue": self.residue,
            "timings": self.timings,
        }


@dataclass(slots=True)
class _Made:
    """What this run has made and must take away, also after it was killed (kept in STATE/data/job.json)."""

    file: Path
    names: dict[str, str] = field(default_factory=dict)

    def note(self, kind: str, name: str) -> None:
        """Called before the thing is made."""
        self.names[kind] = name
        try:
            write_private(self.file, json.dumps(self.names).encode())
        except OSError as err:
            raise disk_error(err, str(self.file)) from None

    @classmethod
    def left(cls, file: Path) -> _Made | None:
        """What a killed run noted, if there was one."""
        try:
            data = json.loads(file.read_bytes())
            return cls(file, {str(kind): str(name) for kind, name in data.items()})
        except (OSError, ValueError, AttributeError):
            return None


def big_bytes() -> int:
    return int(os.environ.get(BIG_VARIABLE) or samples.BIG_BYTES)


def disk_needed(embedded_s3: bool) -> int:
    """Bytes of the state directory's disk that the job takes at its peak: source or driver's temporary copy, and S3."""
    size = big_bytes() + 20 * MIB
    return size * 2 + min(COPY_BYTES, size) if embedded_s3 else size


class MainJob:
    """Runs the job once on a running stack. `run` cleans up after itself, also when cancelled."""

    def __init__(
        self,
        state: StateDirectory,
        endpoints: Endpoints,
        dataset: Dataset,
        runner: SessionRunner,
        say: Callable[[str], None] = lambda _: None,
        no_mounts: MountError | None = None,
    ) -> None:
        """`no_mounts`: why this machine cannot mount; then everything but the session is done."""
        self._no_mounts = no_mounts
        self._state, self._endpoints, self._dataset, self._runner, self._say = state, endpoints, dataset, runner, say
        self._made = _Made(state.data_dir / "job.json")
        self._scratch = state.run_dir / "job"
        self._result = JobResult()
        self._binds: list[BindSpec] = []
        self._stage = ""
        self._manager = ManagerClient(endpoints.manager.url, endpoints.manager.token)
        self._transfers = TransferClient(self._manager)
        self._agent = AgentClient(endpoints.agent.socket)
        self._endpoint = Endpoint(endpoints.s3.url, endpoints.s3.region)
        self._admin = S3Credential(access_key=endpoints.s3.access_key, secret_key=endpoints.s3.secret_key)
        self._s3 = S3Client(self._endpoint, self._admin)
        self._identities_before: set[str] = set()

    async def run(self) -> JobResult:
        """Raises the error of the step that failed; its detail names the stage."""
        begin = time.monotonic()
        try:
            left = _Made.left(self._made.file)
            if left is not None:
                await self._clean(left)
            await self._run()
        except MooringError as err:
            raise self._explained(err) from err
        finally:
            await finish(self._end())
        self._result.timings["job"] = round(time.monotonic() - begin, 2)
        self._result.ok = not self._result.residue and self._no_mounts is None
        return self._result

    def _explained(self, err: MooringError) -> MooringError:
        """A full disk shows as an error of whoever met it first; say the cause instead."""
        info = os.statvfs(self._state.path)
        if info.f_bavail * info.f_frsize < LOW_DISK_BYTES and not isinstance(err, NoSpace):
            full = NoSpace(
                f"The disk of {self._state.path} is full, so the job failed at: {self._stage} ({err.message})",
                hint="Free space there, or choose another disk with --state DIR.",
            )
            full.__cause__ = err
            err = full
        err.detail.setdefault("stage", self._stage)
        return err

    @contextmanager
    def _timed(self, name: str, sentence: str) -> Iterator[None]:
        self._stage = name
        self._say(sentence)
        begin = time.monotonic()
        yield
        self._result.timings[name] = round(time.monotonic() - begin, 2)

    async def _run(self) -> None:
        tag = uuid.uuid4().hex[:8]
        model_dir, data_dir = self._scratch / "model", self._scratch / "dataset"
        with self._timed("generate", "making a model directory and a dataset"):
            model = await _in_thread(samples.write_tree, model_dir, samples.model_files(SEED, big_bytes()))
            data = await _in_thread(samples.write_tree, data_dir, samples.dataset_files(SEED))
        with self._timed("seed_dataset", "putting the dataset into a bucket, as its owner would have"):
            await self._seed(data_dir, data)
        with self._timed("create_folder", "creating a folder"):
            name = f"job-{tag}-model"
            self._made.note("model", name)
            folder = await self._manager.create_folder(name, VOLUME)
        with self._timed("upload", f"uploading {len(model.files)} files, {model.bytes / MIB:.0f} MiB"):
            report = await self._transfers.upload_tree(folder.id, model_dir)
            report.raise_first()
            if report.sha256 != model.digests:
                raise IntegrityError("The upload read other bytes than were written into the model directory.")
        await _in_thread(shutil.rmtree, self._scratch, True)  # its place on the disk is needed below
        with self._timed("bind_folder", "binding the bucket directory read-only, with its own key"):
            bound = await self._bind(tag)
        if self._no_mounts is not None:
            self._result.runtime, self._result.runtime_reason = "none", self._no_mounts.message
            return
        choice = await self._runner.choose()
        self._result.runtime, self._result.runtime_reason = choice.runtime.value, choice.reason
        self._identities_before = await self._s3_identities()
        with self._timed("plan_session", "planning the session"):
            plan = await self._plan(tag, folder, bound)
        with self._timed("attach", "attaching both folders"):
            self._binds = [await self._agent.attach(mount.grant) for mount in plan.mounts]
        before = await self._listing()
        with self._timed("session", f"running the session ({choice.runtime.value})"):
            answer = await self._session()
        checked = self._judge(answer, model, data)
        with self._timed("end_session", "ending the session"):
            await self._end_session(plan.session_id)
        with self._timed("verify", "reading back what the session wrote"):
            await self._verify(folder, checked)
            if await self._listing() != before:
                raise IntegrityError("The read-only folder is not what it was before the session.")

    async def _seed(self, root: Path, tree: SampleTree) -> None:
        self._made.note("dataset", self._dataset.prefix)
        if self._dataset.limited:
            await self._s3.create_bucket(self._dataset.bucket)
        for path in tree.files:
            body = await _in_thread((root / path).read_bytes)
            await self._s3.put(self._dataset.bucket, self._dataset.prefix + path, body)

    async def _bind(self, tag: str) -> Folder:
        name = f"job-{tag}-data"
        self._made.note("credential", name)
        own = self._dataset.credential
        stored = await self._manager.create_credential(name, own.access_key, own.secret_key)
        self._result.read_only_credential = (
            "its own, limited to reading that bucket" if self._dataset.limited else "the operator's own key"
        )
        self._made.note("data", name)
        return await self._manager.bind_folder(
            name,
            VOLUME,
            self._dataset.bucket,
            prefix=self._dataset.prefix,
            read_only=True,
            credential_id=stored.id,
        )

    async def _plan(self, tag: str, folder: Folder, bound: Folder) -> SessionPlan:
        session = f"job-{tag}"
        self._made.note("session", session)
        mounts = [
            MountAsked(folder=folder.id, mode=AccessMode.READ_WRITE, target=MODEL_TARGET),
            MountAsked(folder=bound.id, mode=AccessMode.READ_ONLY, target=DATA_TARGET),
        ]
        return await self._manager.create_session(AGENT_ID, mounts, session_id=session, uid=UID, gid=GID)

    async def _session(self) -> SessionResult:
        command = SessionCommand(
            argv=["/bin/sh", "-c", _SCRIPT.replace("$COPY_BYTES", str(self._copy_bytes))],
            binds=self._binds,
            uid=UID,
            gid=GID,
            deadline=SESSION_DEADLINE_SECONDS,
        )
        return await self._runner.run(command)

    @property
    def _copy_bytes(self) -> int:
        return min(COPY_BYTES, big_bytes())

    def _judge(self, answer: SessionResult, model: SampleTree, data: SampleTree) -> str:
        """Compares what the session said with what is true; returns the text that it wrote into CHECKED."""
        if answer.exit_code != 0:
            words = (answer.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise MountFailed(
                f"The command in the session ended with exit code {answer.exit_code}: {words[:300]}",
                hint="Look at the mounts in the agent's log.",
            )
        head, _, checked = answer.stdout.partition(f"{_SPLIT}\n")
        said = dict(line.partition(" ")[::2] for line in head.splitlines())
        good = sum(line.endswith(": OK") for line in checked.splitlines())
        expected = len(model.files) + len(data.files) - 2  # the lists do not name themselves; they are compared below
        lists = (said.get("model_sums", "").split(" ")[0] == model.digests[samples.SUMS]) + (
            said.get("data_sums", "").split(" ")[0] == data.digests[samples.SUMS]
        )
        self._result.files_checked = good + lists
        self._result.bytes = model.bytes + data.bytes
        self._result.sha256_mismatches = expected - good + 2 - lists
        if self._result.sha256_mismatches:
            bad = [line for line in checked.splitlines() if not line.endswith(": OK")]
            raise IntegrityError(
                f"{self._result.sha256_mismatches} files in the session differ from what was uploaded.",
                detail={"lines": bad[:10] + answer.stderr.strip().splitlines()[:10]},
            )
        counts = (said.get("model_files", "").strip(), said.get("data_files", "").strip())
        if counts != (str(len(model.files)), str(len(data.files))):
            raise IntegrityError(
                f"The session saw {counts[0]} and {counts[1]} files, not {len(model.files)} and {len(data.files)}."
            )
        if said.get("who") != f"{UID}:{GID}":
            raise MountFailed(f"The command in the session ran as {said.get('who')!r}, not as {UID}:{GID}.")
        answers = {name: said.get(name, "not tried") for name in _REFUSALS}
        self._result.write_refused_on_read_only = all(
            text.startswith("refused ") and text.endswith(_REFUSED_WORDS) for text in answers.values()
        )
        if not self._result.write_refused_on_read_only:
            raise IntegrityError("The read-only folder took a write.", detail={"tried": answers})
        return checked

    async def _end_session(self, session_id: str) -> None:
        """Detaches, takes the mounts down, ends the session; then looks for what should be gone."""
        await self._agent.detach_session(session_id)
        await self._agent.gc(0)
        await self._manager.delete_session(session_id)
        end = time.monotonic() + GONE_DEADLINE_SECONDS
        # The driver's process ends a moment after its mount is gone, and nothing tells us when.
        while (left := await self._left(session_id)) and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        self._result.residue = left

    async def _left(self, session_id: str) -> list[str]:
        runtime = self._state.agent_runtime_dir
        left = [f"mount {mount.path}" for mount in mounts_below(runtime) if mount.is_fuse]
        left += [f"bind {mount.path}" for mount in mounts_below(runtime / "ses" / session_id)]
        left += [f"process {pid} ({name})" for pid, name in processes_naming(runtime).items() if name == "s3fs"]
        left += [f"attachment {item.vfid}" for item in await self._agent.attachments() if item.session_id == session_id]
        left += [f"mount {item.key} is {item.state}" for item in await self._agent.mounts()]
        for base, _, names in os.walk(runtime / "creds"):
            left += [f"credential file {Path(base) / name}" for name in names]
        with contextlib.suppress(NotFound):
            left.append(f"session {(await self._manager.session(session_id)).session_id}")
        left += [f"S3 credential {name}" for name in await self._s3_identities() - self._identities_before]
        return left

    async def _s3_identities(self) -> set[str]:
        """The limited identities that exist on the embedded server; elsewhere others may make some meanwhile."""
        if not self._endpoints.s3.embedded:
            return set()
        async with ScopedIssuer(self._endpoint, self._admin) as issuer:
            return set(await issuer.identities())

    async def _verify(self, folder: Folder, checked: str) -> None:
        """Reads each written file twice: by the client API, and straight from S3."""
        expected = {
            CHECKED: hashlib.sha256(checked.encode("utf-8", "surrogateescape")).hexdigest(),
            EMPTY: hashlib.sha256(b"").hexdigest(),
            WHO: hashlib.sha256(f"{UID}:{GID}\n".encode()).hexdigest(),
            COPIED: await _in_thread(_head_digest, self._copy_bytes),
        }
        target = self._scratch / "read-back"
        prefix = VFolderID.parse(folder.vfid).managed_prefix
        for path, digest in expected.items():
            got = await self._transfers.download_file(folder.id, path, target, checksum=True)
            if got.sha256 != digest:
                raise IntegrityError(f"{path!r}, which the session wrote, has other bytes by the client API.")
            async with await self._s3.get(self._endpoints.s3.bucket, prefix + path) as stream:
                direct = hashlib.sha256()
                async for chunk in stream.chunks():
                    direct.update(chunk)
            if direct.hexdigest() != digest:
                raise IntegrityError(f"{path!r}, which the session wrote, has other bytes in S3.")
            self._result.written_files_verified += 1

    async def _listing(self) -> dict[str, tuple[int, str]]:
        found: dict[str, tuple[int, str]] = {}
        async for page in self._s3.list(self._dataset.bucket, self._dataset.prefix):
            found |= {item.key: (item.size, item.etag) for item in page.objects}
        return found

    # --- the end ------------------------------------------------------------------------------------------------------

    async def _end(self) -> None:
        begin = time.monotonic()
        try:
            async with asyncio.timeout(CLEANUP_DEADLINE_SECONDS):
                await self._clean(self._made)
        except TimeoutError:
            log.warning("the job's clean-up did not end in time; the next start goes on with it")
        finally:
            self._transfers.close()
            for service in (self._manager, self._agent, self._s3):
                await service.close()
            await _in_thread(shutil.rmtree, self._scratch, True)
        self._result.timings["clean_up"] = round(time.monotonic() - begin, 2)

    async def _clean(self, made: _Made) -> None:
        """Takes away what a run made. What cannot be taken away now stays noted, and the next start tries again."""
        failed = False
        for kind in _UNDO_ORDER:
            if (name := made.names.get(kind)) is None:
                continue
            try:
                await self._undo(kind, name)
            except NotFound:
                pass
            except MooringError as err:
                failed = True
                log.warning("the job could not take away what it made", kind=kind, error=str(err))
        if not failed:
            made.file.unlink(missing_ok=True)

    async def _undo(self, kind: str, name: str) -> None:
        if kind == "session":
            if self._no_mounts is None:
                await self._agent.detach_session(name)
                await self._agent.gc(0)
            await self._manager.delete_session(name)
        elif kind in ("data", "model"):
            await self._manager.delete_folder(name)
        elif kind == "credential":
            await self._forget_credential(name)
        elif kind == "dataset":
            await self._remove_objects(name)

    async def _forget_credential(self, name: str) -> None:
        page = await self._manager.credentials_page(limit=1000)
        for item in page.items:
            if item.name == name:
                await self._manager.delete_credential(item.id)

    async def _remove_objects(self, prefix: str) -> None:
        async for page in self._s3.list(self._dataset.bucket, prefix):
            await self._s3.delete_many(self._dataset.bucket, [item.key for item in page.objects])


def _head_digest(size: int) -> str:
    big = next(file for file in samples.model_files(SEED, big_bytes()) if file.path == samples.BIG)
    digest, left = hashlib.sha256(), size
    for block in big.blocks():
        digest.update(block[:left])
        left -= len(block[:left])
        if left == 0:
            break
    return digest.hexdigest()


async def _in_thread(function: Callable[..., Any], *args: Any) -> Any:  # Any: whatever the function takes and gives
    return await asyncio.to_thread(function, *args)
