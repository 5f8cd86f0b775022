"""What a server's log says is found among all that it says."""

from pathlib import Path

from batch_orchestration.engines.processes.logs import TAIL_BYTES, causes, last_lines


def test_the_last_lines_are_the_last_that_say_something(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_bytes(b"one\n\ntwo\n \nthree\n\n")

    assert last_lines(log, 2) == ["two", "three"]


def test_of_a_progress_bar_only_its_latest_state_counts(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_bytes(b"Loading:   0%\rLoading:  50%\rLoading: 100%\n")

    assert last_lines(log, 5) == ["Loading: 100%"]


def test_colours_are_taken_off(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_bytes(b"\x1b[0;36m(EngineCore pid=7)\x1b[0;0m ready\n")

    assert last_lines(log, 1) == ["(EngineCore pid=7) ready"]


def test_what_an_earlier_server_wrote_does_not_count(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_bytes(b"earlier\nlater\n")

    assert last_lines(log, 5, start=8) == ["later"]


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_bytes(b"x" * 3 * TAIL_BYTES + b"\nlast\n")

    assert [len(line) for line in last_lines(log, 5)] == [TAIL_BYTES - 6, 4]


def test_a_log_that_is_missing_or_not_text_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "engine.log").write_bytes(b"\xff\xfe\n")

    assert last_lines(tmp_path / "engine.log", 1) == ["\ufffd\ufffd"]
    assert last_lines(tmp_path / "missing.log", 1) == []


def test_the_exceptions_are_found_below_vllms_prefixes_each_once() -> None:
    lines = [
        "(EngineCore pid=7) ERROR 11-23 19:30:00 [core.py:100] Traceback (most recent call last):",
        "(EngineCore pid=7) ERROR 11-23 19:30:00 [core.py:100] ValueError: no room for the cache",
        "ValueError: no room for the cache",
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
        "  Value error, the model type is unknown",
        "(APIServer pid=3) RuntimeError: Engine core initialization failed. See root cause above.",
        "MemoryError",
    ]

    assert causes(lines) == [
        "ValueError: no room for the cache",
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
        "Value error, the model type is unknown",
        "RuntimeError: Engine core initialization failed. See root cause above.",
        "MemoryError",
    ]


def test_talk_about_errors_is_not_an_exception() -> None:
    lines = [
        "WARNING 11-23 20:03:22 [system_utils.py:255] This can cause errors like `OSError: [24]`",
        "(APIServer pid=7) ERROR 11-23 20:03:41 [serving.py:274] Error with model error=ErrorInfo",
    ]

    assert causes(lines) == []
