"""SEMANTICS 5: no secret in logs."""

import io
import json
import logging
import subprocess
import sys

import pytest

from storage_proxy.core import logs
from storage_proxy.core.secrets import Secret

VALUE = "hunter2hunter2"


@pytest.fixture
def stream() -> io.StringIO:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    out = io.StringIO()
    logs.configure(component="test", json=True, stream=out)
    yield out
    root.handlers[:] = before
    root.setLevel(level)


def test_secrets_do_not_reach_the_log(stream: io.StringIO) -> None:
    log = logs.get_logger("a")
    log.info("x", key=Secret(VALUE), nested={"secret_key": VALUE, "list": [Secret(VALUE)]})
    log.info(f"GET /download?token={VALUE}&x=1")
    log.info("url", url=f"http://h/b?X-Amz-Signature={VALUE}&X-Amz-Credential={VALUE}")
    log.info("db", url=f"postgresql://user:{VALUE}@host/name")
    log.info("headers", headers={"Authorization": f"AWS4 {VALUE}", "password": VALUE})
    logging.getLogger("foreign").error("token=%s", VALUE)
    try:
        raise RuntimeError(f"password={VALUE}")
    except RuntimeError:
        log.exception("failed")
    text = stream.getvalue()
    assert VALUE not in text
    assert len(text.splitlines()) == 7


def test_ids_that_sound_secret_stay_readable(stream: io.StringIO) -> None:
    logs.get_logger("a").info("x", credential_id="c-1", key_file="/etc/key", token_purpose="upload")
    line = json.loads(stream.getvalue())
    assert (line["credential_id"], line["key_file"], line["token_purpose"]) == ("c-1", "/etc/key", "upload")
    assert (line["component"], line["level"], line["logger"]) == ("test", "info", "a")


def test_lines_carry_the_request_id(stream: io.StringIO) -> None:
    token = logs.request_id.set(None)
    try:
        given = logs.new_request_id("abcdef-123456")
        logs.get_logger("a").info("x")
        made = logs.new_request_id("no good\n")
    finally:
        logs.request_id.reset(token)
    assert given == "abcdef-123456"
    assert len(made) == 32
    assert json.loads(stream.getvalue())["request_id"] == "abcdef-123456"


_ELSEWHERE = f"""
import logging, sys
logging.basicConfig(stream=sys.stdout, level="INFO", format="%(levelname)s %(name)s %(message)s")
from storage_proxy.core import logs
log = logs.get_logger("a.b")
log.debug("not wanted")
log.info("100% mounted", key="k", secret_key="{VALUE}", url="http://h/?token={VALUE}")
log.warning("%s is not %s", "this", "formatted")
try:
    raise RuntimeError("password={VALUE}")
except RuntimeError:
    log.exception("failed", place="here")
"""


def test_in_another_program_they_are_ordinary_log_lines() -> None:
    result = subprocess.run([sys.executable, "-c", _ELSEWHERE], capture_output=True, text=True, timeout=60, check=True)
    lines = result.stdout.splitlines()
    assert result.stderr == ""
    assert lines[0] == "INFO a.b 100% mounted key=k secret_key=********** url=http://h/?token=**********"
    assert lines[1] == "WARNING a.b this is not formatted"
    assert lines[2] == "ERROR a.b failed place=here"
    assert lines[-1] == "RuntimeError: password=**********"
    assert VALUE not in result.stdout
