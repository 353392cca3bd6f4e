"""The result of `bench.mounts` as lines for people."""

from __future__ import annotations

from typing import Any

Spread = dict[str, float | None]


def table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [f"{machine['cpus']} x {machine['model']}, {machine['memory_gib']} GiB, Linux {machine['kernel']}"]
    for name, write in _WRITERS.items():
        if name in result:
            lines += ["", *write(result[name])]
    if result["left_over"]:
        lines += ["", f"LEFT OVER: {', '.join(result['left_over'])}"]
    return "\n".join(lines)


def _crash(found: dict[str, Any]) -> list[str]:
    lines = [f"kill -9 of the mount process, reader at {found['reads_per_second']} Hz (load {found['load']})"]
    ours = next(each["until_reads_ms"]["median"] for each in found["targets"])
    for each in found["targets"]:
        median = each["until_reads_ms"]["median"]
        if each["recovered"] < each["crashes"]:
            value = f"never again ({each['recovered']} of {each['crashes']} recovered)"
        else:
            value = f"{_times(each['until_reads_ms'], 'ms')}, failed reads {_plain(each['failed_reads'])}"
            value += f", {median / ours:.2f} x the first" if each is not found["targets"][0] else ""
        errors = ", ".join(f"{name} {count}" for name, count in sorted(each["errors"].items()))
        restarted = "" if each["same_container_process"] else ", CONTAINER RESTARTED"
        lines.append(f"  {each['name']:28} {value}{restarted} [{errors}]")
    lines.append(
        f"  the agent's part: {_times(found['agent_says_ms'], 'ms')}, of it until the new process was checked "
        f"{_times(found['of_it_until_staged_ms'], 'ms')}"
    )
    return lines


def _stop(found: dict[str, Any]) -> list[str]:
    peer = found["peer_blocked_for_s"]
    return [
        f"SIGSTOP of the mount process (load {found['load']})",
        f"  reader freed                 {_times(found['reader_freed_s'], 's')}",
        f"  reads succeed again          {_times(found['until_reads_s'], 's')} "
        f"({found['recovered']} of {found['stops']})",
        f"  shell loop                   {'freed by itself' if peer is None else f'still blocked after {peer} s'}",
    ]


def _many(found: dict[str, Any]) -> list[str]:
    by_hand, last = found["by_hand"], found["idle"][-1]
    each = last["processes"]["pss_mib"] / found["mounts"]
    lines = [
        f"{found['mounts']} mounts, one after the other (load {found['load']})",
        f"  attach                       {_times(found['attach_ms'], 'ms')}, {found['attach_total_s']} s in all, "
        f"{found['attach_to_mount_by_hand']} x s3fs by hand",
        f"  first and last tenth         {found['attach_first_tenth_ms']} ms, {found['attach_last_tenth_ms']} ms",
        f"  s3fs by hand                 {_times(by_hand['mount_ms'], 'ms')}, {by_hand['total_s']} s in all, "
        f"PSS {by_hand['pss_mib']} MiB",
        f"  detach with unmount          {_times(found['detach_ms'], 'ms')}, {found['detach_total_s']} s in all",
        f"  memory of the mounts         PSS {last['processes']['pss_mib']} MiB, {each:.2f} MiB each",
    ]
    lines += [
        f"  idle with {cost['mounts']:4} mounts        agent {cost['agent_percent']} % of a core, "
        f"PSS {cost['agent']['pss_mib']} MiB, RSS {cost['agent']['rss_mib']} MiB; "
        f"all mount processes {cost['mounts_percent']} %"
        for cost in found["idle"]
    ]
    lines += [
        f"  container start              {_times(value, 'ms')} with {mounts} mounts"
        for mounts, value in found["container_start_ms"].items()
        if value["median"] is not None
    ]
    return lines


def _herd(found: dict[str, Any]) -> list[str]:
    return [
        f"{found['sessions']} sessions attach one folder at the same instant (load {found['load']})",
        f"  one alone                    {_times(found['alone_ms'], 'ms')}",
        f"  until all are ready          {_times(found['all_ready_ms'], 'ms')}, mounts made: {found['mounts_made']}",
    ]


def _churn(found: dict[str, Any]) -> list[str]:
    return [
        f"{found['wanted_per_second']:g} sessions per second attach and detach one folder (load {found['load']})",
        f"  achieved                     {found['achieved_per_second']} per second for {found['seconds']} s, "
        f"failed: {found['failed']}, mounts made: {found['mounts_made']}, left: {found['attachments_left']}",
        f"  attach                       {_times(found['attach_ms'], 'ms')}",
        f"  detach                       {_times(found['detach_ms'], 'ms')}",
        f"  CPU of the agent             {found['agent_cpu_ms_each']} ms for both",
    ]


def _restart(found: dict[str, Any]) -> list[str]:
    return [
        f"{found['restarts']} restarts of the agent under {found['containers']} reading containers "
        f"(load {found['load']})",
        f"  failed reads                 {found['failed_reads']} of {found['reads']}, longest time between two "
        f"{found['longest_between_reads_ms']} ms",
        *(f"  {name} until answers       {_times(value, 'ms')}" for name, value in found["until_answers_ms"].items()),
        f"  mounts untouched             {'yes' if found['mounts_live_on'] else 'NO'}",
    ]


def _times(value: Spread, unit: str) -> str:
    return f"median {value['median']} {unit}, worst {value['worst']} {unit}"


def _plain(value: Spread) -> str:
    return f"{value['median']:g} (worst {value['worst']:g})"


_WRITERS = {"crash": _crash, "stop": _stop, "many": _many, "herd": _herd, "churn": _churn, "restart": _restart}
