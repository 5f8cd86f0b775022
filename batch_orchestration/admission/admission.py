"""Admission: a claimed file becomes a batch, or is set aside with reasons.

After a crash between any two steps, admitting the claim again completes the work. Everything is
prepared in the claim's work folder, the author's file is moved there, and one rename makes that
folder the batch's. The batch is added to the store last; until then `register_missing` finds it on
the disk.
"""

import contextlib
import itertools
import logging
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from batch_orchestration.admission.claims import Attempts, Claim, ClaimFolder
from batch_orchestration.admission.reading.batch_files import (
    Fingerprint,
    is_gzip_name,
    open_batch_file,
)
from batch_orchestration.admission.reading.lines import BatchFileReading
from batch_orchestration.admission.reading.screening import Screening
from batch_orchestration.admission.refusal import next_step, refusal, write_errors_file
from batch_orchestration.admission.registration import (
    admission_lock,
    free_batch_id,
    register_batch,
    register_missing,
    write_fault_journals,
)
from batch_orchestration.admission.results import (
    Admission,
    AdmissionResult,
    Admitted,
    AlreadyAdmitted,
    Queued,
    Rejected,
    Returned,
)
from batch_orchestration.admission.scans import FileScan, FileScans
from batch_orchestration.admission.sidecars import read_options, sidecar_beside
from batch_orchestration.core.batches import BatchOptions, BatchPlan, LinePolicy, identity
from batch_orchestration.core.errors import (
    ClaimNotFound,
    FileRefused,
    FileStillChanging,
    StorageError,
)
from batch_orchestration.core.fault_isolation import concerns_everyone
from batch_orchestration.core.requests import Fault
from batch_orchestration.estimates.batch_estimates import (
    expected_ahead,
    read_calibration_data,
    record_estimate,
    write_estimate,
)
from batch_orchestration.estimates.engine import engine_in_force
from batch_orchestration.estimates.tables import EstimateTables
from batch_orchestration.files.atomic import shortages, sync_folder
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.moving import fit_name, move_over, readable_name
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.files.unfinished import mark
from batch_orchestration.queue.capacity import Blocker
from batch_orchestration.queue.load import check_file_capacity, demand_of, never_fits
from batch_orchestration.settings import Settings
from batch_orchestration.store.store import Store
from batch_orchestration.workers.reporter import holding

logger = logging.getLogger(__name__)

#: A file is rejected after this many failures of its own; the pauses add up to some minutes.
MAX_ADMISSION_FAILURES = 5
_REASON_LENGTH = 300
#: Faults that an admission result holds for logs and the UI; the errors file lists all.
_FAULTS_IN_RESULT = 20
_BLOCK_BYTES = 2**20
_decode_fault = msgspec.json.Decoder(Fault).decode


def admit(
    claim: Claim,
    *,
    folder: DataFolder,
    store: Store,
    settings: Settings,
    clock: Callable[[], float] = time.time,
) -> Admission:
    """Admit a claimed file as a batch, or determine why it cannot become one.

    Idempotent by claim: after a crash admission continues, and a settled claim returns its recorded
    result. Memory grows only with the number of requests, by about 150 bytes each (to find
    duplicate ids).

    If admission fails `MAX_ADMISSION_FAILURES` times because of the file itself, the file is
    rejected with the last failure as its reason.

    Raises:
        FileStillChanging: The file was still being written; it is back in the inbox.
        ClaimNotFound: There is no such claim.
        Shortage: The disk is full, or no file can be opened; the claim stays.
        StorageError: A write failed; the claim stays and can be admitted again.
        Exception: The file made admission fail; the claim stays and can be admitted again.
    """
    place = ClaimFolder(folder, claim.claim_id)
    with shortages(place.root), place.lock():
        result = place.settled_result()
        if result is None:
            result = _Admission(place, folder, store, settings, clock).settle()
        else:
            place.sweep()
    if isinstance(result, Returned):
        raise FileStillChanging(str(result))
    return result


class _Admission:
    """The admission of one claim, whose lock is held."""

    def __init__(
        self,
        place: ClaimFolder,
        folder: DataFolder,
        store: Store,
        settings: Settings,
        clock: Callable[[], float],
    ) -> None:
        self._place = place
        self._folder = folder
        self._store = store
        self._settings = settings
        self._clock = clock
        self._spool = place.work / "faults.jsonl"

    def settle(self) -> AdmissionResult:
        user_file = self._place.restore()
        result = self._place.result() if user_file is None else self._attempt(user_file)
        if result is None:
            raise ClaimNotFound(f"claim {self._place.claim_id} holds no file")
        self._finish(result)
        self._place.settle()
        return result

    def _attempt(self, user_file: Path) -> AdmissionResult:
        """Reach a result, and count the attempts that end without one."""
        before = self._place.attempts()
        # Counted first: an attempt that is killed cannot record itself afterwards.
        self._place.note(msgspec.structs.replace(before, begun=before.begun + 1))
        try:
            return self._decide(user_file)
        except Exception as error:  # any kind: a file must not block the others indefinitely
            if concerns_everyone(error):
                with contextlib.suppress(StorageError):
                    self._place.note(before)
                raise
            if isinstance(error, StorageError | OSError):
                raise  # no reason to reject the file, which blocks no other
            where = "".join(traceback.format_exception(error))
            logger.warning("%s: admission failed\n%s", user_file.name, readable_name(where))
            failed = before.failed + 1
            text = " ".join(str(error).split())[:_REASON_LENGTH]
            # The error may quote input that cannot be encoded as UTF-8.
            reason = readable_name(f"{type(error).__name__}: {text}")
            if failed < MAX_ADMISSION_FAILURES or self._place.restore() != user_file:
                attempts = Attempts(
                    begun=before.begun, failed=failed, reason=reason, at=self._clock()
                )
                self._place.note(attempts)
                raise
        self._place.clear_work()
        why = f"its admission failed {failed} times, at last by {reason}"
        return self._reject(user_file, why, None)

    def _decide(self, user_file: Path) -> AdmissionResult:
        """Reach a result and move the author's file accordingly."""
        self._place.clear_work()
        reading: BatchFileReading | None = None
        try:
            before = Fingerprint.of(user_file)
            try:
                options = read_options(self._place.sidecar(), self._place.origin())
                screening = self._screening(options)
                reading = BatchFileReading(self._settings, options, screening=screening)
                self._read(user_file, reading)
                self._keep_estimate(screening, reading, options)
            except FileRefused as refused:
                before.verify()
                return self._reject(user_file, str(refused), reading)
            before.verify()
            return self._admit(user_file, before, reading, options)
        except FileStillChanging as changing:
            return self._release(user_file, str(changing))

    def _screening(self, options: BatchOptions) -> Screening:
        settings = self._settings
        data = read_calibration_data(EstimateTables(self._store), engine_in_force(settings))
        return Screening(options, settings=settings, calibration_data=data, now=self._clock())

    def _keep_estimate(
        self, screening: Screening, reading: BatchFileReading, options: BatchOptions
    ) -> None:
        """Write the estimate into the folder that will become the batch's.

        Raises:
            FileRefused: The estimate exceeds the completion window, and windows are strict.
        """
        profile = screening.profile()
        ahead = expected_ahead(self._folder, self._store, priority=options.priority)
        estimate = screening.estimate(
            profile, ahead_seconds=ahead, at=self._clock(), seed=reading.sha256
        )
        screening.refuse_if_too_late(estimate)
        write_estimate(self._place.work, profile, estimate)

    def _read(self, user_file: Path, reading: BatchFileReading) -> None:
        path = self._expand(user_file) if is_gzip_name(user_file.name) else user_file
        encode = msgspec.json.encode
        # A strict file with a fault is rejected, and the list of its faults shows no bodies.
        is_strict = self._settings.line_policy is LinePolicy.STRICT
        with (
            open_batch_file(path, max_bytes=self._settings.max_file_bytes) as file,
            shortages(self._spool),
            self._spool.open("wb") as spool,
        ):
            for parsed in reading.read(file):
                if isinstance(parsed, Fault):
                    spool.write(encode(parsed.lean() if is_strict else parsed) + b"\n")
        if (reason := refusal(reading, self._settings)) is not None:
            raise FileRefused(reason)

    def _expand(self, user_file: Path) -> Path:
        target = self._place.work / "input.jsonl"
        limit = self._settings.max_file_bytes
        with (
            open_batch_file(user_file, max_bytes=limit) as source,
            shortages(target),
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, _BLOCK_BYTES)
            file.flush()
            os.fsync(file.fileno())
        return target

    def _faults(self) -> Iterator[Fault]:
        if self._spool.exists():
            with self._spool.open("rb") as spool:
                yield from map(_decode_fault, spool)

    def _admit(
        self,
        user_file: Path,
        before: Fingerprint,
        reading: BatchFileReading,
        options: BatchOptions,
    ) -> AdmissionResult:
        name = self._place.file_name(user_file)
        key = identity(reading.sha256, options)
        with holding(admission_lock(self._folder)):
            register_missing(self._folder, self._store, at=self._clock())
            if (first := self._store.find_identity(key)) is not None:
                return self._keep_duplicate(user_file, name, first.batch_id)
            plan = BatchPlan(
                batch_id=free_batch_id(self._folder, name, key),
                identity=key,
                file_name=name,
                sha256=reading.sha256,
                size_bytes=reading.size_bytes,
                requests=reading.requests,
                faulty=reading.faulty,
                chunks=reading.chunks,
                options=options,
                settings=self._settings.answer_settings(),
                created_at=self._clock(),
                max_line_bytes=self._settings.max_line_bytes,
                source=options.source,
                arrived_at=self._place.origin().arrived_at,
            )
            if (aside := self._wait(user_file, before, plan, reading)) is not None:
                return aside
            return self._commit(user_file, before, plan)

    def _commit(self, user_file: Path, before: Fingerprint, plan: BatchPlan) -> Admitted:
        work = self._place.work
        write_fault_journals(work, plan, self._faults(), at=self._clock())
        StateFile(work / "plan.json", BatchPlan).write(plan)
        self._spool.unlink()
        result = Admitted(
            batch_id=plan.batch_id,
            file_name=plan.file_name,
            requests=plan.requests,
            faulty=plan.faulty,
            chunks=len(plan.chunks),
        )
        self._take_in(user_file, before, result, self._folder.plan_path(plan.batch_id).parent)
        return result

    def _take_in(
        self, user_file: Path, before: Fingerprint, result: Admitted, target: Path
    ) -> None:
        """Carry out the result: the work folder, with the author's file, becomes the batch's."""
        self._place.decide(result)
        before.verify()
        self._place.take_in(user_file)
        mark(self._folder, target.name)
        self._place.work.rename(target)
        sync_folder(target.parent)

    def _keep_duplicate(self, user_file: Path, name: str, first_id: str) -> AlreadyAdmitted:
        return self._place.set_aside(
            user_file,
            self._folder.plan_path(first_id).with_name("duplicates"),
            lambda target: AlreadyAdmitted(batch_id=first_id, file_name=name, kept_as=str(target)),
        )

    def _reject(self, user_file: Path, reason: str, reading: BatchFileReading | None) -> Rejected:
        first = itertools.islice(self._faults(), _FAULTS_IN_RESULT)
        faults = tuple(fault.lean() for fault in first)
        return self._place.set_aside(
            user_file,
            self._folder.rejected,
            lambda target: Rejected(
                file_name=self._place.file_name(user_file),
                reason=reason,
                error_count=reading.faulty if reading else 0,
                errors=faults,
                rejected_path=str(target),
                errors_path=str(target.with_name(fit_name(target.name, ".errors.json"))),
                next_step=next_step(target),
            ),
        )

    def _wait(
        self, user_file: Path, before: Fingerprint, plan: BatchPlan, reading: BatchFileReading
    ) -> Queued | Rejected | None:
        """Return the result of a file without capacity; None if there is capacity for it.

        Call it under `admission_lock`, so that no two files take the last capacity.
        """
        demand = demand_of(plan, self._place.work)
        if (too_large := never_fits(demand, self._settings)) is not None:
            return self._reject(user_file, too_large, reading)
        blocker = check_file_capacity(
            plan,
            demand,
            folder=self._folder,
            store=self._store,
            settings=self._settings,
            now=self._clock(),
        )
        if blocker is None:
            return None
        before.verify()
        # Before the file reappears in the inbox: without a scan it would be claimed and read again.
        scan = FileScan(
            requests=plan.requests,
            tokens=demand.tokens or 0,
            size_bytes=plan.size_bytes,
            arrived_at=plan.arrived_at or self._clock(),
        )
        FileScans(self._folder).keep(user_file.lstat(), scan)
        return self._hold(user_file, blocker)

    def _hold(self, user_file: Path, blocker: Blocker) -> Queued:
        return self._place.set_aside(
            user_file,
            self._place.inbox_folder(),
            lambda target: Queued(
                file_name=self._place.file_name(user_file),
                reason=blocker.reason,
                detail=blocker.detail,
                released_path=str(target),
            ),
        )

    def _release(self, user_file: Path, reason: str) -> Returned:
        return self._place.set_aside(
            user_file,
            self._place.inbox_folder(),
            lambda target: Returned(
                file_name=self._place.file_name(user_file),
                reason=reason,
                released_path=str(target),
            ),
        )

    def _finish(self, result: AdmissionResult) -> None:
        """Complete the steps after the move of the author's file. Idempotent."""
        match result:
            case Admitted():
                with holding(admission_lock(self._folder)):
                    register_batch(self._folder, self._store, result.batch_id, at=self._clock())
                record_estimate(self._folder, self._store, result.batch_id)
                beside = self._folder.input_path(result.batch_id)
            case AlreadyAdmitted():
                beside = Path(result.kept_as)
            case Rejected():
                write_errors_file(result, self._faults())
                beside = Path(result.rejected_path)
            case Returned() | Queued():
                self._place.release_sidecar()
                return
        if (sidecar := self._place.sidecar()) is not None:
            move_over(sidecar, sidecar_beside(beside))
