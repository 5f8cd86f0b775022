"""A person's SQL reads the store, and does nothing else whatever it says."""

import resource
from pathlib import Path

import pytest

from batch_orchestration.core.errors import StorageError, StoreDamaged
from batch_orchestration.store.user_queries import ask
from batch_orchestration_tests.support.workbench import Workbench

SECRET = "the-secret-of-another"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("asked")
    (root / "secret.csv").write_text(f"a,b\n{SECRET},1\n")
    return root


@pytest.fixture(scope="module")
def bench(root: Path) -> Workbench:
    bench = Workbench(root / "data")
    bench.admitted(20)
    return bench


def everything_below(root: Path) -> dict[str, bytes]:
    """The content of each file but the store itself and its lock."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith("batch.duckdb")
    }


REFUSED = [
    "COPY (SELECT 'gone') TO '{root}/data/inbox/evil.jsonl'",
    "COPY batches TO '{root}/evil' (FORMAT parquet)",
    "COPY batches FROM '{root}/secret.csv'",
    "EXPORT DATABASE '{root}/evil'",
    "IMPORT DATABASE '{root}'",
    "ATTACH '{root}/evil.duckdb'",
    "ATTACH ':memory:' AS m",
    "SELECT * FROM read_text('{root}/secret.csv')",
    "SELECT * FROM read_blob('/proc/self/environ')",
    "SELECT * FROM read_csv('{root}/secret.csv')",
    "SELECT * FROM read_json('{root}/secret.csv')",
    "SELECT * FROM sniff_csv('{root}/secret.csv')",
    "SELECT * FROM '{root}/secret.csv'",
    "FROM '{root}/secret.csv'",
    "SELECT * FROM glob('{root}/*')",
    "SELECT * FROM query('SELECT * FROM read_text(''{root}/secret.csv'')')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql("
    "'SELECT * FROM read_text(''{root}/secret.csv'')'))",
    "SELECT * FROM enable_logging('QueryLog', storage = 'file', storage_path = '{root}/evil')",
    "CALL enable_logging()",
    "CALL force_checkpoint()",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{root}/evil.so'",
    "UPDATE EXTENSIONS",
    "SET memory_limit = '1TB'",
    "SET enable_external_access = true",
    "SET lock_configuration = false",
    "RESET memory_limit",
    "SET VARIABLE a = 1",
    "PRAGMA memory_limit = '1TB'",
    "PRAGMA version",
    "USE memory",
    "SELECT getenv('HOME')",
    "SELECT 1 INTO evil",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP TABLE batches",
    "DROP TABLE batches",
    "DELETE FROM batches",
    "UPDATE batches SET file_name = 'x'",
    "INSERT INTO batches SELECT * FROM batches",
    "WITH gone AS (DELETE FROM batches RETURNING *) SELECT * FROM gone",
    "CREATE TABLE evil (i INT)",
    "CREATE TEMP TABLE evil AS SELECT 1",
    "CREATE SECRET evil (TYPE s3)",
    "ALTER TABLE batches RENAME TO evil",
    "PREPARE p AS SELECT 1",
    "EXPLAIN ANALYZE SELECT 1",
    "BEGIN",
    "COMMIT",
    "CHECKPOINT",
    "VACUUM",
    "SELECT * FROM os",
    "SELECT * FROM settings",
    "",
    ";",
    "-- nothing",
    "SELEC 1",
    "SELECT * FROM checksum",
]


@pytest.mark.parametrize("sql", REFUSED)
def test_what_is_more_than_a_look_at_the_store_is_refused_and_leaves_no_trace(
    bench: Workbench, root: Path, sql: str
) -> None:
    before = everything_below(root)

    with pytest.raises(StorageError) as refused:
        bench.store.query(sql.format(root=root))

    assert SECRET not in str(refused.value)
    assert not isinstance(refused.value, StoreDamaged)
    assert everything_below(root) == before
    assert bench.store.query("SELECT count(*) FROM batches")[1] == [(1,)]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) FROM batches",
        "select count(*) from batches;",
        "WITH b AS (SELECT * FROM batches) SELECT count(*) FROM b -- all",
        "FROM (SELECT count(*) FROM batches)",
    ],
)
def test_one_select_is_answered_however_it_is_written(bench: Workbench, sql: str) -> None:
    assert bench.store.query(sql)[1] == [(1,)]


def test_tables_and_columns_can_be_looked_up(bench: Workbench) -> None:
    assert ("batches",) in bench.store.query("SHOW TABLES")[1]
    assert any(row[0] == "batch_id" for row in bench.store.query("DESCRIBE batches")[1])


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("SELECT * FROM range(1_000_000_000)", "more than 1,000 rows"),
        ("SELECT repeat('x', 100_000) FROM range(900)", "more than 1,000 rows or 8 MiB"),
        ("SELECT count(*) FROM range(1_000_000_000) a, range(1_000_000) b", "took more than 1 s"),
        ("SELECT list(range) FROM range(400_000_000)", "Out of Memory|took more than 1 s"),
    ],
)
def test_a_query_without_bounds_ends_with_a_reason_and_leaves_the_store_free(
    bench: Workbench, sql: str, reason: str
) -> None:
    with pytest.raises(StorageError, match=reason):
        ask(
            bench.folder.duckdb,
            sql,
            deadline_seconds=60,
            most_seconds=1.0,
            most_rows=1000,
            most_bytes=8 * 2**20,
        )

    assert bench.store.query("SELECT 1")[1] == [(1,)]


def test_a_string_that_outgrows_the_memory_ends_its_query_alone(bench: Workbench) -> None:
    """DuckDB's `memory_limit` bounds its buffers; one long string is none."""
    before = resource.getrlimit(resource.RLIMIT_DATA)

    with pytest.raises(StorageError, match="Out of Memory"):
        bench.store.query("SELECT length(repeat('x', 3000000000))")

    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert bench.store.query("SELECT 1")[1] == [(1,)]
