"""The noticeboard: what agents tell Redis about their nodes, by name of key. One place for those who write and those
who read.

    mooring:agents                                 sorted set: agent ids, scored by their last report (epoch seconds)
    mooring:agent:{agent}                          hash: the node; outlives the agent by `retention`
    mooring:mounts:{agent}:{volume}                set: mount keys of a volume on a node
    mooring:mount:{agent}:{key}                    hash: one mount
    mooring:attachments:{agent}:{volume}           set: {session}:{folder} of a volume on a node
    mooring:attachment:{agent}:{session}:{folder}  hash: one attachment (folder: 32 hex digits)
    mooring:events                                 stream: what happened to mounts, on all nodes, oldest first

Everything but the first and the last is renewed at each heartbeat, in one transaction with the events since the one
before, and has a time to live: mounts and attachments vanish after `ttl` seconds without a report, and are as old as
the report of their node. The hash of the node stays for `retention` seconds, so that a node which went away is seen to
be away. All its times to live start at the report, so its rest tells the age of the report by the clock of Redis,
whatever the clocks of the nodes say.

No id holds a colon (`core.ids`), so the names cannot be confused. Nothing here is a secret, and nothing is the only
copy: losing it all loses no fact.
"""

from __future__ import annotations

from enum import StrEnum

AGENTS = "mooring:agents"
EVENTS = "mooring:events"

# About 3 MiB in Redis; at one event a second, the last three hours.
MAX_EVENTS = 10_000


class AgentState(StrEnum):
    """What an agent says of itself with its last word."""

    RUNNING = "running"
    STOPPED = "stopped"


def agent(agent_id: str) -> str:
    return f"mooring:agent:{agent_id}"


def mounts(agent_id: str, volume: str) -> str:
    return f"mooring:mounts:{agent_id}:{volume}"


def mount(agent_id: str, key: str) -> str:
    return f"mooring:mount:{agent_id}:{key}"


def attachments(agent_id: str, volume: str) -> str:
    return f"mooring:attachments:{agent_id}:{volume}"


def attachment_member(session: str, folder: str) -> str:
    return f"{session}:{folder}"


def attachment(agent_id: str, member: str) -> str:
    return f"mooring:attachment:{agent_id}:{member}"
