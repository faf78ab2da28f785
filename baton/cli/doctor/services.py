"""Checks of what is beside the machine, or given to it: disk, Redis, clock, the built-in model."""

from __future__ import annotations

from baton.cli.doctor.finding import Finding, fail, ok, warn
from baton.cli.doctor.machine import Machine
from baton.cli.doctor.wanted import Wanted
from baton.errors import ModelLoadError

_GB = 1e9
_DISK_WANTED = 1e9  # bytes/s read: less is hardly sooner than computing a prefix again
_PING_WANTED_S = 0.02
_OFFSET_WANTED_S = 0.1
_DAY_S = 24 * 3600.0
_CERTIFICATE_WANTED_S = 7 * _DAY_S
_CLOCK_MEANS = (
    "start chrony or systemd-timesyncd: spans and logs of several machines are compared by it, and "
    "certificates checked"
)


def disk(machine: Machine, wanted: Wanted) -> Finding | None:
    """None: no NVMe tier is wanted."""
    if not wanted.store_dir:
        return None
    found = machine.probe("disk", wanted.store_dir)
    if isinstance(found, str):
        return fail(found, "make the directory, or let the store's user write there")
    free = (machine.free(wanted.store_dir) or 0) / 2**30
    text = (
        f"{wanted.store_dir} writes {found['write'] / _GB:.1f} and reads "
        f"{found['read'] / _GB:.1f} GB/s in a row, {free:.0f} GiB free"
    )
    if not found["direct"]:
        return warn(f"{text}, through the page cache", "no O_DIRECT here: is this an NVMe disk?")
    if found["read"] < _DISK_WANTED:
        return warn(text, "prefixes come slowly: use local NVMe, not a network or overlay disk")
    return ok(text)


def redis(machine: Machine, wanted: Wanted) -> Finding:
    if not wanted.redis:
        return ok("not asked: one conductor needs none", "several do: check it with --redis URL")
    found = machine.probe("redis")
    if isinstance(found, str):
        return fail(found, _redis_remedy(found))
    text = f"{found['address']} takes reads and writes, {found['ping_s'] * 1e3:.1f} ms away"
    if found["ping_s"] > _PING_WANTED_S:
        return warn(text, "far: conductors ask it before they take over an answer; move it nearer")
    return ok(text)


def _redis_remedy(error: str) -> str:
    said = error.lower()
    if "no module named 'redis'" in said:
        return "pip install 'baton-llm[redis]'"
    if "cannot read" in said:
        return "give a file that this user can read"
    if "alert_certificate_required" in said:
        return "it wants to see a certificate: BATON_REDIS_CERT_FILE and BATON_REDIS_KEY_FILE"
    if "certificate" in said or "ssl" in said:
        return "BATON_REDIS_CA_FILE is for its authority; the certificate must have its host's name"
    if "password" in said or "auth" in said:
        return "set BATON_REDIS_PASSWORD, and BATON_REDIS_USERNAME for a user of its ACL"
    if "permission" in said or "noperm" in said:
        return "let its user reach keys that begin with the prefix (docs: Redis)"
    return "is it running, and reachable from here? A port with TLS needs rediss://"


def certificates(machine: Machine, wanted: Wanted) -> Finding | None:
    """None: there are none."""
    if not wanted.certificates:
        return None
    found = machine.probe("certificates")
    if isinstance(found, str):
        return fail(found, "docs: Security, TLS")
    path, left_s = min(found["left_s"].items(), key=lambda item: float(item[1]))
    if left_s <= 0:
        return fail(f"{path} has ended", "renew it: processes take a new one up by themselves")
    text = f"good for {left_s / _DAY_S:.0f} days"
    if left_s < _CERTIFICATE_WANTED_S:
        return warn(f"{path} is {text}", "renew it: processes take a new one up by themselves")
    return ok(text)


def clock(machine: Machine, wanted: Wanted) -> Finding:
    """Leases and deadlines are measured from each process's start, without it."""
    found, offset = machine.probe("clock"), _offset_from_redis(machine, wanted)
    beside = "" if offset is None else f"{abs(offset) * 1e3:.0f} ms from the clock of Redis"
    if isinstance(found, str):
        kept, state = offset is not None, f"the kernel does not say whether it is kept: {found}"
    elif found["synchronised"]:
        kept, state = True, f"kept in step, at most {found['error_s'] * 1e3:.0f} ms wrong"
    else:
        kept, state = False, "not kept in step with others"
    text = f"{state}; {beside}" if beside else state
    if kept and (offset is None or abs(offset) <= _OFFSET_WANTED_S):
        return ok(text)
    return warn(text, _CLOCK_MEANS)


def _offset_from_redis(machine: Machine, wanted: Wanted) -> float | None:
    found = machine.probe("redis") if wanted.redis else ""
    return None if isinstance(found, str) else found["offset_s"]


def demo_model(machine: Machine, wanted: Wanted) -> Finding:
    from baton.demo import demo_model_path
    from baton.model.spec import load_spec

    try:
        spec = load_spec(demo_model_path())
    except ModelLoadError as error:
        return fail(error.message, "install baton-llm again; its data is incomplete")
    return ok(f"{spec.num_layers} layers, context of {spec.max_model_len} tokens")
