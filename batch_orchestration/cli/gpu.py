"""`gpu`: the readings of the devices, and whether an engine may be started on them."""

import click
import msgspec
from rich.table import Table

from batch_orchestration.cli.context import Context, json_option, open_context, person, print_json
from batch_orchestration.cli.escaping import say
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.fences import clear_fence, read_fences
from batch_orchestration.gpu.health import GpuCheck, check_gpu

_GIB = 2**30
_NONE = "-"


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
        print_json(_object(check))
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
    amount = "Memory needed" if needed is None else f"{needed / _GIB:.1f} GiB are needed"
    say(f"{amount}: {check.need.why}")
    for reason in check.reasons:
        say(f"unhealthy: {reason}")
    shown = {device.hardware_uuid for device in check.devices}
    for uuid, why in check.fences.items():
        if uuid not in shown:
            say(f"not shown: {uuid}: {why}")
    if check.healthy:
        say("healthy: an engine may be started")


def _object(check: GpuCheck) -> dict[str, object]:
    return {
        "healthy": check.healthy,
        "reasons": check.reasons,
        "no_gate": check.no_gate,
        "unreadable": check.unreadable,
        "fences": check.fences,
        "need": msgspec.to_builtins(check.need),
        "devices": [msgspec.to_builtins(device) for device in check.devices],
    }


def _table(device: GpuFacts) -> Table:
    table = Table(title=f"GPU {device.index}: {device.name} ({device.uuid})", show_header=False)
    for name, value in _rows(device):
        table.add_row(name, value)
    return table


def _rows(device: GpuFacts) -> list[tuple[str, str]]:
    throttled = device.throttle_reasons
    return [
        ("memory used", _gib(device.memory_used_bytes)),
        ("memory free", _gib(device.memory_free_bytes)),
        ("memory in all", _gib(device.memory_total_bytes)),
        ("temperature", _with(device.temperature_celsius, "°C")),
        ("slows down at", _with(device.slowdown_celsius, "°C")),
        ("turns off at", _with(device.shutdown_celsius, "°C")),
        ("utilisation", _with(device.utilization_percent, "%")),
        ("power", _with(device.power_watts, "W")),
        ("power limit", _with(device.power_limit_watts, "W")),
        ("SM clock", _with(device.sm_clock_mhz, "MHz")),
        ("SM clock at most", _with(device.sm_clock_max_mhz, "MHz")),
        ("memory clock", _with(device.memory_clock_mhz, "MHz")),
        ("clock held down by", _NONE if throttled is None else ", ".join(throttled) or "nothing"),
        ("uncorrectable memory errors", _with(device.ecc_uncorrectable_errors, "")),
        ("remap pending", _with(device.remap_pending, "")),
        ("remap failed", _with(device.remap_failed, "")),
        ("recovery action", _with(device.recovery_action, "")),
        ("MIG", _with(device.mig_enabled, "")),
        *(
            (f"process {process.pid}", f"{process.name or _NONE}, {_gib(process.memory_bytes)}")
            for process in device.processes or ()
        ),
    ]


def _gib(value: int | None) -> str:
    return _NONE if value is None else f"{value / _GIB:.2f} GiB"


def _with(value: object, unit: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _NONE if value is None else f"{value} {unit}".strip()
