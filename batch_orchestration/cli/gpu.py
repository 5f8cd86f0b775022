"""`gpu`: the readings of the devices, and whether an engine may be started on them."""

import click
import msgspec
from rich.table import Table

from batch_orchestration.cli.context import Context, json_option, open_context, person, print_json
from batch_orchestration.cli.escaping import say
from batch_orchestration.cli.tables import table
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.fences import clear_fence, read_fences
from batch_orchestration.gpu.health import GpuCheck, check_gpu

GIB = 2**30
NONE = "-"


@click.command()
@click.option("--clear", "uuid", metavar="UUID", help="Remove the fence of this device first.")
@json_option
def gpu(uuid: str | None, as_json: bool) -> None:
    """Show the GPUs, and whether an engine may be started on them; exit 1 if not.

    The check is that of the gate before each start of vLLM on BATCH_DEVICE=cuda. A device that
    had a fault is fenced: no engine is started on it until it has recovered, or until --clear. The
    data folder keeps the name of the person who cleared it in `fences/cleared`.
    """
    context = open_context()
    if uuid is not None:
        _clear(context, uuid)
    check = check_gpu(context.settings)
    if as_json:
        print_json({"healthy": check.healthy, **msgspec.to_builtins(check)})
    else:
        for device in check.devices:
            context.console.print(_table(device))
        _say(check)
    if not check.healthy:
        click.get_current_context().exit(1)


def _clear(context: Context, uuid: str) -> None:
    fence = clear_fence(context.folder, uuid, at=context.clock(), by=person())
    if fence is None:
        known = ", ".join(read_fences(context.folder)) or "none"
        raise click.ClickException(f"{uuid} is not fenced; fenced are: {known}")
    say(f"{uuid} is no longer fenced. It was: {fence.reason}", err=True)


def _say(check: GpuCheck) -> None:
    if check.unreadable:
        say(f"No device can be shown: {check.unreadable}", err=True)
    elif not check.devices:
        say("There is no GPU, or CUDA_VISIBLE_DEVICES shows none.")
    if check.no_gate:
        say(check.no_gate)
        return
    needed = check.need.memory_bytes
    amount = "Memory needed" if needed is None else f"{needed / GIB:.1f} GiB are needed"
    say(f"{amount}: {check.need.why}")
    for reason in check.reasons:
        say(f"unhealthy: {reason}")
    shown = {device.hardware_uuid for device in check.devices}
    for uuid, why in check.fences.items():
        if uuid not in shown:
            say(f"not shown: {uuid}: {why}")
    if check.healthy:
        say("healthy: an engine may be started")


def _table(device: GpuFacts) -> Table:
    """Return all facts of a device, a row each; the names have the units."""
    facts = msgspec.to_builtins(device)
    processes = facts.pop("processes") or ()
    rows = [(name.replace("_", " "), _value(value)) for name, value in facts.items()]
    rows += [
        (f"process {found['pid']}", f"{found['name'] or NONE}, {_value(found['memory_bytes'])}")
        for found in processes
    ]
    return table((f"GPU {device.index}", device.name), rows)


def _value(value: object) -> str:
    """Return a fact as text; large numbers are bytes."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, int) and value >= 2**20:
        return f"{value:,} ({value / GIB:.2f} GiB)"
    return NONE if value is None else str(value)
