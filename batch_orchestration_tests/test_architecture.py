"""Rules about the code that no linter knows: sizes, purity, and who reads the environment.

Who may import whom is in `pyproject.toml` (import-linter); what importing the definitions loads is
in `integration/defs/test_definitions.py`.
"""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CODE = [ROOT / folder for folder in ("batch_orchestration", "scripts", "benchmarks")]
TESTS = [ROOT / "batch_orchestration_tests"]
FILE_LINES, TEST_FILE_LINES = 500, 500
FOLDER_MODULES = 12
#: One thin file for each wing.
FACES = {"batch_orchestration/defs", "batch_orchestration/cli"}
NAMES_THAT_SAY_NOTHING = {"services", "utils", "util", "common", "helpers", "misc"}
#: Docstrings do not count: nobody shall save on them.
FUNCTION_LINES = 50

#: Longer than that, and why.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}

#: What a rule may import besides msgspec and other rules: nothing of it does I/O.
WITHOUT_IO = {
    *("abc", "base64", "collections", "contextlib", "dataclasses", "datetime", "enum", "fractions"),
    *("functools", "hashlib", "heapq", "html", "itertools", "json", "logging", "math", "msgspec"),
    *("operator", "pathlib", "random", "re", "shlex", "statistics", "string", "textwrap", "types"),
    *("typing", "unicodedata", "urllib.parse", "zlib"),
}

#: Besides `settings.py`, and why.
READ_THE_ENVIRONMENT = {
    "batch_orchestration/settings.py": "the deployment's settings",
    "batch_orchestration/core/crash_points.py": "for tests only, and no setting on purpose",
    "batch_orchestration/engines/processes/environment.py": "passes on what an engine needs of it",
    "batch_orchestration/engines/vllm/flags.py": "adds to a variable of vLLM's",
    "batch_orchestration/engines/processes/parent_guard.py": "runs within the engine's processes",
    "batch_orchestration/engines/simulated/engine.py": "is the engine's process",
    "batch_orchestration/gpu/nvml.py": "CUDA's own variable says which devices are meant",
}


def sources(folders: list[Path]) -> Iterator[tuple[str, str]]:
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text()


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, those of its own docstring left out."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or 0) - docstring.lineno + 1
    return lines


@pytest.mark.parametrize(("folders", "budget"), [(CODE, FILE_LINES), (TESTS, TEST_FILE_LINES)])
def test_no_file_is_longer_than_a_person_can_keep_in_mind(folders: list[Path], budget: int) -> None:
    long = {name for name, text in sources(folders) if len(text.splitlines()) > budget}

    assert long <= LONG_FILES.keys()


def test_no_function_is_longer_than_a_screen() -> None:
    long = {
        f"{name}:{function.name} ({lines_of(function)} lines)"
        for name, text in sources([*CODE, *TESTS])
        for function in functions(text)
        if lines_of(function) > FUNCTION_LINES and f"{name}:{function.name}" not in LONG_FUNCTIONS
    }

    assert long == set()


def test_the_lists_of_exceptions_name_what_is_there() -> None:
    everything = dict(sources([*CODE, *TESTS]))

    assert LONG_FILES.keys() <= everything.keys()
    assert READ_THE_ENVIRONMENT.keys() <= everything.keys()
    assert {name.partition(":")[0] for name in LONG_FUNCTIONS} <= everything.keys()


def test_nobody_else_reads_the_environment() -> None:
    """Else a setting could be in force that `config` does not show."""
    readers = {
        name
        for name, text in sources([ROOT / "batch_orchestration"])
        if any(word in text for word in ("os.environ", "os.getenv", "import environ"))
    }

    assert readers == READ_THE_ENVIRONMENT.keys()


def test_workspace_dagster_and_dg_load_the_same_module() -> None:
    """The two tables of `pyproject.toml` win over `workspace.yaml` without a word."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    (workspace,) = yaml.safe_load((ROOT / "workspace.yaml").read_text())["load_from"]

    assert (
        workspace["python_module"]["module_name"]
        == tools["dagster"]["module_name"]
        == tools["dg"]["project"]["code_location_target_module"]
    )
    assert (
        workspace["python_module"]["location_name"]
        == tools["dagster"]["code_location_name"]
        == tools["dg"]["project"]["code_location_name"]
    )


def test_no_folder_has_more_modules_than_a_person_can_keep_in_mind() -> None:
    full = {
        str(folder.relative_to(ROOT)): len(modules)
        for folder in (ROOT / "batch_orchestration").rglob("*")
        if folder.is_dir()
        and len(modules := [path for path in folder.glob("*.py") if path.name != "__init__.py"])
        > FOLDER_MODULES
    }

    assert full.keys() <= FACES, full


def test_no_folder_has_a_name_that_says_nothing() -> None:
    folders = {path.name for path in (ROOT / "batch_orchestration").rglob("*") if path.is_dir()}

    assert not folders & NAMES_THAT_SAY_NOTHING


def test_the_contract_lists_each_pure_module() -> None:
    """Import-linter holds the listed ones to be pure; a rule that nobody lists is unguarded."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (listed,) = (
        contract["source_modules"]
        for contract in contracts["contracts"]
        if contract["name"].startswith("Rules are pure")
    )

    assert set(listed) == pure_modules()


def pure_modules() -> set[str]:
    """Return the modules of the product that import nothing but what does no I/O."""
    imports = {
        name.removesuffix(".py").replace("/", "."): set(imported(text))
        for name, text in sources([ROOT / "batch_orchestration"])
        if not name.endswith("__init__.py")
    }
    pure = set(imports)
    while True:
        left = {name for name in pure if all(is_pure(each, pure) for each in imports[name])}
        if left == pure:
            return pure
        pure = left


def imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_pure(name: str, pure: set[str]) -> bool:
    """Whether an imported module, or the module of an imported name, does no I/O."""
    home = name.rpartition(".")[0]
    return bool({name, home, name.partition(".")[0]} & (WITHOUT_IO | pure))
