"""Admission: what becomes of a claimed file, and that asking again gives the same answer."""

import gzip
import json
from pathlib import Path

import msgspec
import pytest

from batch_orchestration.admission.admission import admit
from batch_orchestration.admission.registration import ADMISSION_RUN_ID, register_missing
from batch_orchestration.admission.results import Admitted, AlreadyAdmitted, Rejected
from batch_orchestration.core.batches import BatchOptions, BatchStatus, LinePolicy
from batch_orchestration.core.errors import ClaimNotFound, FileStillChanging
from batch_orchestration.core.outcomes import Failure, FailureCode
from batch_orchestration.core.requests import UTF8_BOM
from batch_orchestration.files.input_lines import read_chunk
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import (
    ENDPOINT,
    NOW,
    make_body,
    make_input,
    make_line,
)
from batch_orchestration_tests.support.workbench import LATER, Workbench


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path)


def errors_of(verdict: Rejected) -> dict:
    return json.loads(Path(verdict.errors_path).read_text())


def test_a_flawless_file_becomes_a_batch(bench):
    content = make_input(25)

    verdict = bench.admit_file("My File.jsonl", content, meta=b'{"priority": 7}')

    assert isinstance(verdict, Admitted)
    assert verdict.batch_id.startswith("my-file-")
    assert (verdict.requests, verdict.faulty, verdict.chunks) == (25, 0, 3)
    plan = bench.folder.read_plan(verdict.batch_id)
    assert (plan.file_name, plan.options.priority) == ("My File.jsonl", 7)
    assert plan.settings == bench.settings.answer_settings()
    assert plan.created_at == NOW
    assert bench.folder.input_path(verdict.batch_id).read_bytes() == content
    record = bench.store.batch(verdict.batch_id)
    assert (record.status, record.total, record.chunks) == (BatchStatus.IN_PROGRESS, 25, 3)
    assert bench.files_of(bench.folder.claims) == set()
    assert bench.files_of(bench.folder.batches / plan.batch_id) == {
        "estimate.json",
        "input.jsonl",
        "input.jsonl.meta.json",
        "plan.json",
        "profile.json",
    }


def test_faulty_lines_are_settled_in_the_journals_of_their_chunks(bench):
    content = b"".join(
        b"not json\n" if number in (3, 4, 25) else make_line(number) for number in range(40)
    )

    plan = bench.plan_of("a.jsonl", content + make_line(1))

    entries = bench.settled(plan)
    assert (plan.requests, plan.faulty) == (41, 4)
    assert [entry.index for entry in entries] == [3, 4, 25, 40]
    assert {entry.provenance.run_id for entry in entries} == {ADMISSION_RUN_ID}
    assert {entry.attempts for entry in entries} == {0}
    assert entries[0].outcome == Failure(
        code=FailureCode.INVALID_JSON,
        message="line 4: not JSON: invalid character (byte 4)",
    )
    assert entries[3].outcome.code is FailureCode.DUPLICATE_CUSTOM_ID
    # A commit needs no second look at the file.
    torn, repeated = entries[0].settled(), entries[3].settled()
    assert (torn.line, torn.custom_id, torn.endpoint, torn.body) == (4, None, "", b"not json\n")
    assert (repeated.line, repeated.custom_id, repeated.endpoint) == (41, "request-1", ENDPOINT)
    assert msgspec.json.decode(repeated.body) == make_body("question 1")
    assert sorted(p.name for p in (bench.folder.journals / plan.batch_id).glob("*.journal")) == [
        "00000.1.journal",
        "00002.1.journal",
        "00004.1.journal",
    ]


def test_every_chunk_of_the_kept_input_is_what_was_planned(bench):
    plan = bench.plan_of("a.jsonl", UTF8_BOM + b"\n" + make_input(25) + b"\n\n")

    path = bench.folder.input_path(plan.batch_id)
    lines = [line for chunk in plan.chunks for line in read_chunk(path, chunk, 2**20)]

    assert [line.index for line in lines] == list(range(25))


def test_a_compressed_file_is_expanded_and_its_original_kept(bench):
    content, compressed = make_input(12), gzip.compress(make_input(12))

    plan = bench.plan_of("a.jsonl.gz", compressed)

    kept = bench.folder.input_path(plan.batch_id)
    assert kept.read_bytes() == content
    assert kept.with_name("input.jsonl.gz").read_bytes() == compressed
    assert plan.size_bytes == len(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"\n  \r\n\n", "the file has only blank lines"),
        (b"hello\nworld\n", "none of its 2 requests can be used"),
        (b"[" + make_line().strip() + b"]", "one JSON array; one object per line is needed"),
        (b'[\n{"a": 1},\n{"b": 2}\n]\n', "one JSON array"),
        (json.dumps(json.loads(make_line()), indent=2).encode(), "spread over many lines"),
        (make_line().decode().encode("utf-16"), "save it as UTF-8"),
        (gzip.compress(make_line()), "its name must then end in .jsonl.gz"),
        (make_line(url="/v1/responses"), "none of its 1 requests can be used"),
    ],
)
def test_a_file_of_which_nothing_can_be_used_is_rejected(bench, content, reason):
    verdict = bench.admit_file("a.jsonl", content)

    assert isinstance(verdict, Rejected)
    assert reason in verdict.reason
    assert Path(verdict.rejected_path).read_bytes() == content
    assert bench.files_of(bench.folder.rejected) == {"a.jsonl", "a.jsonl.errors.json"}
    assert bench.files_of(bench.folder.claims) == set()
    assert bench.store.batches() == []


@pytest.mark.parametrize(
    "content",
    [gzip.compress(make_input(99))[:-20], b"no gzip", gzip.compress(b"x") + b"rest"],
    ids=["cut off", "no gzip", "more behind it"],
)
def test_a_broken_gzip_file_is_rejected(bench, content):
    verdict = bench.admit_file("a.jsonl.gz", content)

    assert isinstance(verdict, Rejected)
    assert "not a whole gzip file" in verdict.reason
    assert Path(verdict.rejected_path).read_bytes() == content
    assert bench.files_of(bench.folder.rejected) == {"a.jsonl.gz", "a.jsonl.gz.errors.json"}


def test_the_errors_file_lists_every_fault(bench):
    content = b"".join(make_line(n, url="/v1/responses") for n in range(2500))

    verdict = bench.admit_file("a.jsonl", content)

    errors = errors_of(verdict)
    assert (errors["file"], errors["error_count"]) == ("a.jsonl", 2500)
    assert [e["line"] for e in errors["errors"]] == list(range(1, 2501))
    assert errors["errors"][7]["custom_id"] == "request-7"
    assert errors["errors"][7]["code"] == "unsupported_endpoint"
    assert "python -m batch_orchestration validate" in errors["next"]
    assert verdict.error_count == 2500
    assert len(verdict.errors) == 20


def test_under_the_strict_policy_one_fault_refuses_the_file(tmp_path):
    bench = Workbench(tmp_path, line_policy=LinePolicy.STRICT)

    verdict = bench.admit_file("a.jsonl", make_input(9) + b"nope\n")

    assert isinstance(verdict, Rejected)
    assert "1 of its 10 requests are faulty, and the line policy is strict" in verdict.reason
    assert [e["line"] for e in errors_of(verdict)["errors"]] == [10]


@pytest.mark.parametrize(
    ("meta", "named"),
    [
        (b'{"priority": "high"}', "`priority`"),
        (b'{"priority": 5000}', "`priority`"),
        (b'{"completion_window": "soon"}', "`completion_window`"),
        (b'{"metadata": {"a": 1}}', "`metadata"),
        (b'{"prioritty": 1}', "`prioritty`"),
        (json.dumps({"metadata": {str(n): "" for n in range(17)}}).encode(), "`metadata`"),
        (b"priority: 1", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"", "not JSON"),
        (b" " * 300_000, "larger than"),
    ],
)
def test_a_side_car_with_a_fault_refuses_the_file_and_names_the_field(bench, meta, named):
    verdict = bench.admit_file("a.jsonl", make_input(3), meta=meta)

    assert isinstance(verdict, Rejected)
    assert "a.jsonl.meta.json" in verdict.reason
    assert named in verdict.reason
    assert errors_of(verdict)["errors"] == []
    assert bench.files_of(bench.folder.rejected) == {
        "a.jsonl",
        "a.jsonl.errors.json",
        "a.jsonl.meta.json",
    }


def test_a_file_that_may_not_be_read_is_rejected(bench, monkeypatch):
    claim = bench.claim("a.jsonl", make_input(3))
    original = Path.open

    def refuse(self, *args, **kwargs):
        if self == claim.path:
            raise PermissionError(13, "Permission denied")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)

    assert "it cannot be read: Permission denied" in bench.admit(claim).reason


def test_rejected_files_never_overwrite_each_other(bench):
    for content in (b"one", b"two", b"three"):
        bench.admit_file("a.jsonl", content)

    kept = {p.name: p.read_bytes() for p in bench.folder.rejected.glob("*.jsonl")}
    assert kept == {"a.jsonl": b"one", "a (2).jsonl": b"two", "a (3).jsonl": b"three"}
    assert (bench.folder.rejected / "a (3).jsonl.errors.json").exists()


@pytest.mark.parametrize("stem", ["x" * 249, "é" * 120, "a\\..\\..\\etc", "a 'b' c"])
def test_strange_names_are_rejected_and_admitted_like_others(bench, stem):
    rejected = bench.admit_file(f"{stem}.jsonl", b"nope")
    admitted = bench.admit_file(f"{stem}.jsonl", make_input(1), meta=None)

    assert Path(rejected.rejected_path).name == f"{stem}.jsonl"
    assert Path(rejected.errors_path).exists()
    assert bench.folder.read_plan(admitted.batch_id).file_name == f"{stem}.jsonl"
    assert bench.folder.input_path(admitted.batch_id).parent.parent == bench.folder.batches


def test_the_same_content_is_the_same_batch_whatever_it_is_called(bench):
    first = bench.admit_file("a.jsonl", make_input(3))

    second = bench.admit_file("b.jsonl", make_input(3), meta=b"{}")
    third = bench.admit_file("b.jsonl.gz", gzip.compress(make_input(3)))

    assert isinstance(second, AlreadyAdmitted)
    assert second.batch_id == third.batch_id == first.batch_id
    assert first.batch_id in str(second)
    assert Path(second.kept_as).read_bytes() == make_input(3)
    duplicates = bench.folder.batches / first.batch_id / "duplicates"
    assert bench.files_of(duplicates) == {"b.jsonl", "b.jsonl.meta.json", "b.jsonl.gz"}
    assert len(bench.store.batches()) == 1


def test_other_options_make_another_batch(bench):
    first = bench.admit_file("a.jsonl", make_input(3))
    second = bench.admit_file("a.jsonl", make_input(3), meta=b'{"metadata": {"try": "2"}}')

    assert isinstance(second, Admitted)
    assert second.batch_id != first.batch_id


def test_a_taken_id_is_made_longer(bench):
    plan = bench.plan_of("a.jsonl", make_input(3))
    other = Workbench(bench.folder.root.with_name("other"))
    (other.folder.batches / plan.batch_id).mkdir()
    (other.folder.outbox / f"a-{plan.identity[:9]}").mkdir()

    longer = other.plan_of("a.jsonl", make_input(3))

    assert longer.identity == plan.identity
    assert longer.batch_id == f"a-{plan.identity[:10]}"


def test_a_model_may_be_missing_if_the_options_name_one(bench):
    content = make_line(body={"messages": []})

    assert isinstance(bench.admit_file("a.jsonl", content), Rejected)
    assert isinstance(bench.admit_file("a.jsonl", content, meta=b'{"model": "m"}'), Admitted)


def test_a_settled_claim_repeats_its_verdict(bench):
    for name, content in [("a.jsonl", make_input(3)), ("b.jsonl", b""), ("c.jsonl", make_input(3))]:
        claim = bench.claim(name, content)

        first = bench.admit(claim)

        assert bench.admit(claim) == first
        assert bench.admit(bench.inbox.claim(claim.claim_id)) == first
    assert len(bench.store.batches()) == 1


def test_a_claim_that_never_was_is_not_admitted(bench):
    claim = bench.claim("a.jsonl", make_input(3))
    claim.path.unlink()

    with pytest.raises(ClaimNotFound):
        bench.admit(claim)


def test_a_file_that_is_appended_to_while_it_is_read_goes_back(bench):
    claim = bench.claim("a.jsonl", make_input(3), meta=b'{"priority": 1}')
    new = bench.drop("a.jsonl", b"another file of that name")

    def clock():
        # Asked for the time of the plan: after reading, before the file is moved.
        with claim.path.open("ab") as file:
            file.write(make_line(3))
        return NOW

    with pytest.raises(FileStillChanging, match=r"changed while it was read .*a \(2\)\.jsonl"):
        admit(
            claim,
            folder=bench.folder,
            store=bench.store,
            settings=bench.settings,
            clock=clock,
        )

    assert new.read_bytes() == b"another file of that name"
    assert new.with_name("a (2).jsonl").read_bytes().startswith(make_input(4))
    assert new.with_name("a (2).jsonl.meta.json").exists()
    assert bench.files_of(bench.folder.claims) == bench.files_of(bench.folder.batches) == set()
    with pytest.raises(FileStillChanging):
        bench.admit(claim)
    [_, again] = bench.inbox.claim_ready(now=LATER)
    assert isinstance(bench.admit(again), Admitted)


def test_a_lost_store_is_filled_again_from_the_plans(bench):
    plans = [bench.plan_of(f"{n}.jsonl", make_input(n) + b"nope\n") for n in (1, 2)]
    bench.folder.duckdb.unlink()
    store = Store(bench.folder.root / "new.duckdb")

    registered = register_missing(bench.folder, store, at=NOW)

    assert registered == sorted(plan.batch_id for plan in plans)
    assert {record.identity for record in store.batches()} == {plan.identity for plan in plans}
    assert [len(bench.settled(plan)) for plan in plans] == [1, 1]


def test_options_reach_the_plan_as_the_author_gave_them(bench):
    options = {"priority": -3, "metadata": {"team": "hr"}, "completion_window": "7d"}

    plan = bench.plan_of("a.jsonl", make_input(1), meta=json.dumps(options).encode())

    assert plan.options == BatchOptions(**options)


def test_a_megabyte_in_one_line_is_admitted_and_a_longer_line_fails_alone(bench):
    long = make_line(0, body=make_body("x" * 2**20))
    longer = make_line(1, body=make_body("x" * 2**21))

    plan = bench.plan_of("a.jsonl", long + longer + make_line(2))

    assert [entry.index for entry in bench.settled(plan)] == [1]
