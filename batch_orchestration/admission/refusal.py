"""Why a whole file is rejected, in words for its author, and the errors file beside it."""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path

from batch_orchestration.admission.reading.lines import BatchFileReading
from batch_orchestration.admission.results import Rejected
from batch_orchestration.core.batches import LinePolicy, OnOversize
from batch_orchestration.core.requests import Fault
from batch_orchestration.files.atomic import atomic_writer
from batch_orchestration.settings import Settings

#: Length of a fault's message within a rejection reason.
_QUOTED_CHARACTERS = 300
#: First bytes of files in other formats than JSON lines.
_OTHER_FORMATS = (
    (b"[", "it looks like one JSON array; one object per line is needed"),
    (b"{\n", "it looks like JSON spread over many lines; one object per line is needed"),
    (b"{\r\n", "it looks like JSON spread over many lines; one object per line is needed"),
    (b"\x1f\x8b", "it looks like gzip; its name must then end in .jsonl.gz"),
    (b"PK\x03\x04", "it looks like a zip archive; gzip (.jsonl.gz) is read, zip is not"),
    (b"\xff\xfe", "it looks like UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "it looks like UTF-16; save it as UTF-8"),
)


def refusal(reading: BatchFileReading, settings: Settings) -> str | None:
    """Return why a file that has been read cannot become a batch; None if it can."""
    if not reading.size_bytes:
        return "the file is empty"
    if not reading.requests:
        return "the file has only blank lines"
    if not reading.usable:
        why = _hint(reading.beginning) or _commonest(reading)
        return f"none of its {reading.requests:,} requests can be used: {why}"
    if settings.line_policy is LinePolicy.STRICT and reading.faulty:
        return (
            f"{reading.faulty:,} of its {reading.requests:,} requests are faulty,"
            " and the line policy is strict"
        )
    most = settings.max_requests_per_batch
    if settings.on_oversize is OnOversize.REJECT and reading.requests > most:
        return (
            f"its {reading.requests:,} requests are more than the {most:,} that"
            " BATCH_MAX_REQUESTS_PER_BATCH allows, and BATCH_ON_OVERSIZE is reject; cut it into"
            " several files, or set BATCH_ON_OVERSIZE=window"
        )
    return None


def next_step(rejected_path: Path) -> str:
    """Return advice for the author of a rejected file."""
    command = f"python -m batch_orchestration validate {shlex.quote(str(rejected_path))}"
    return f"Correct the file, check it with `{command}`, and drop it into the inbox again."


def write_errors_file(result: Rejected, faults: Iterable[Fault]) -> None:
    """Write all faults of a rejected file beside it, streaming, as one JSON object."""
    head = {
        "file": result.file_name,
        "reason": result.reason,
        "next": result.next_step,
        "error_count": result.error_count,
    }
    with atomic_writer(Path(result.errors_path)) as file:
        file.write(_json(head).removesuffix(b"}") + b', "errors": [')
        separator = b"\n"
        for fault in faults:
            entry = {
                "line": fault.line,
                "custom_id": fault.custom_id,
                "code": fault.code,
                "message": fault.message,
            }
            file.write(separator + _json(entry))
            separator = b",\n"
        file.write(b"\n]}\n")


def _hint(beginning: bytes) -> str:
    return next((hint for magic, hint in _OTHER_FORMATS if beginning.startswith(magic)), "")


def _commonest(reading: BatchFileReading) -> str:
    """Describe the commonest fault; the errors file lists all."""
    found = reading.commonest_fault()
    if found is None:
        return "no line of it is a request"
    lines, fault = found
    message = fault.message
    short = message if len(message) <= _QUOTED_CHARACTERS else f"{message[:_QUOTED_CHARACTERS]}…"
    like = f" ({lines:,} lines are like it)" if lines > 1 else ""
    return f"line {fault.line:,}: {short}{like}"


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
