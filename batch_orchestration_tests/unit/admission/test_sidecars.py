"""Side-cars: whose they are, and what is said of one that cannot be used."""

import pytest

from batch_orchestration.admission.sidecars import read_options
from batch_orchestration.admission.submit import submit
from batch_orchestration.admission.validation import validate
from batch_orchestration.core.errors import FileRefused
from batch_orchestration_tests.support.builders import make_input, make_settings
from batch_orchestration_tests.support.workbench import LATER, Workbench


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path)


@pytest.mark.parametrize(
    ("one", "other", "sidecar"),
    [
        ("a.jsonl", "a.jsonl.gz", "a.meta.json"),
        ("a.jsonl", "a.JSONL", "a.meta.json"),
        ("a.jsonl.gz", "a.jsonl.GZ", "a.jsonl.meta.json"),
    ],
)
def test_a_side_car_that_fits_two_files_holds_both_until_one_of_them_is_meant(
    bench, one, other, sidecar
):
    for name in (one, other):
        bench.drop(name, b"content")
    dropped = bench.drop(sidecar, b'{"priority": 5}')

    assert bench.inbox.claim_ready(now=LATER) == []
    told = {waiting.name: waiting.reason for waiting in bench.inbox.waiting(now=LATER)}
    assert told.keys() == {one, other}
    for name, reason in told.items():
        assert f"the side-car {sidecar} fits" in reason
        assert f"rename it to {name}.meta.json" in reason

    dropped.rename(dropped.with_name(f"{one}.meta.json"))
    claims = {claim.file_name: claim for claim in bench.inbox.claim_ready(now=LATER)}
    assert claims[one].sidecar.read_bytes() == b'{"priority": 5}'
    assert claims[other].sidecar is None


def test_a_side_car_with_the_whole_name_of_one_file_is_in_doubt_for_no_other(bench):
    bench.drop("a.jsonl", b"content", meta=b"{}")
    bench.drop("a.jsonl.gz", b"content")
    bench.drop("a.meta.json", b'{"priority": 5}')

    claims = {claim.file_name: claim for claim in bench.inbox.claim_ready(now=LATER)}

    assert claims["a.jsonl"].sidecar.name == "a.jsonl.meta.json"
    assert claims["a.jsonl.gz"].sidecar.name == "a.meta.json"


def test_validate_and_submit_say_the_same_of_a_side_car_in_doubt(bench, tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(make_input(2))
    (tmp_path / "a.meta.json").write_bytes(b'{"priority": 5}')

    report = validate(tmp_path / "a.jsonl", settings=make_settings())

    assert "the side-car a.meta.json fits a.jsonl and a.jsonl.gz" in (report.refusal or "")
    with pytest.raises(FileRefused, match=r"fits a\.jsonl and a\.jsonl\.gz"):
        submit(tmp_path / "a.jsonl", None, bench.folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"completion_window": "24 hours"}', "`completion_window`: expected a time like 24h"),
        (b'{"completion_window": "1d\\n"}', "`completion_window`: expected a time like 24h"),
        (b'{"user": "a\\u0000"}', "`user`: expected a name without control characters"),
        (b'{"priority": 1e999}', "the number in `priority` is out of range"),
        (b'{"priority": %s}' % (b"9" * 5000), "the number in `priority` is out of range"),
        (b'{"metadata": {"a": NaN}}', "NaN is no JSON value"),
        (b'{"metadata": {"a": "\\ud83d"}}', "half of a surrogate pair"),
        (b"[" * 50_000, "nested more than 128 deep"),
        (b'{"priority": 5', "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"[]", "Expected `object`, got `array`"),
    ],
)
def test_a_side_car_that_cannot_be_used_names_the_field_and_what_to_write(tmp_path, content, words):
    path = tmp_path / "a.jsonl.meta.json"
    path.write_bytes(content)

    with pytest.raises(FileRefused) as refused:
        read_options(path)

    assert str(refused.value).startswith("side-car a.jsonl.meta.json: ")
    assert words in str(refused.value)
