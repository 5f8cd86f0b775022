"""Shared by all commands: settings, folder, store, and exceptions turned into exit codes."""

import logging
import os
import pwd
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click
import msgspec
from pydantic import ValidationError
from rich.console import Console

from batch_orchestration.cli.escaping import VisibleConsole, escaped, visible
from batch_orchestration.core.errors import BatchOrchestrationError
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.settings import PREFIX, Settings, load_settings
from batch_orchestration.store.store import Store

#: A person waits for the answer, so a locked store is reported soon, with its holder.
STORE_DEADLINE_SECONDS = 3.0

#: Width of tables written to a file or a pipe.
PIPED_WIDTH = 200
#: pydantic-settings names the field only in the text of the error.
_UNPARSED_FIELD = re.compile(r'error parsing value for field "(\w+)"')

#: Shown to a user outside the group.
WHO_MAY = "The data folder is for its owner and its group (docs/operations.md, who may do what)"

F = TypeVar("F", bound=Callable[..., Any])


class SettingsRefused(click.ClickException):
    """The settings are invalid: a mistake in how the command was called."""

    exit_code = 2


class Commands(click.Group):
    """A group whose commands fail with a message and exit code 1 instead of a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the requested command."""
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            vars(error)["message"] = visible(error.message)  # the error keeps its class and context
            raise
        except BatchOrchestrationError as error:
            raise click.ClickException(visible(str(error))) from error
        except PermissionError as error:
            raise click.ClickException(
                f"{person()} may not use {visible(str(error.filename))}: {error.strerror}."
                f" {WHO_MAY}"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Context:
    """The deployment that a command works on.

    Attributes:
        monotonic: Monotonic seconds.
        sleep: Waits this many seconds; polling commands use it.
    """

    settings: Settings
    folder: DataFolder
    store: Store
    console: Console
    clock: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def open_context() -> Context:
    """Return the context passed to the command, or one built from the environment.

    Raises:
        SettingsRefused: A setting is invalid.
    """
    given = click.get_current_context(silent=True)
    if given and isinstance(given.obj, Context):
        return given.obj
    # Services log that they wait for the store; commands report it themselves.
    logging.getLogger("batch_orchestration").addHandler(logging.NullHandler())
    settings = settings_or_refusal()
    folder = DataFolder(settings.data_dir)
    store = Store(folder.duckdb, deadline_seconds=STORE_DEADLINE_SECONDS)
    return Context(settings=settings, folder=folder, store=store, console=_console())


def _console() -> Console:
    console = VisibleConsole()
    # Without a terminal, rich assumes 80 columns, which would fold ids.
    return console if console.is_terminal else VisibleConsole(width=max(console.width, PIPED_WIDTH))


def settings_or_refusal() -> Settings:
    """Read the settings.

    Raises:
        SettingsRefused: Settings are invalid; the message has a line for each of them.
    """
    try:
        return load_settings()
    except ValidationError as error:
        raise SettingsRefused("\n".join(_complaints(error))) from error
    except ValueError as error:
        field = _UNPARSED_FIELD.search(str(error))
        complaint = f"{_variable((field[1],))}: not JSON" if field else str(error)
        raise SettingsRefused(complaint) from error


def person() -> str:
    """Return the name of the user who runs the command, for histories."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def json_option(command: F) -> F:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def print_json(value: object, *, lines: bool = False) -> None:
    """Print a value as JSON: indented, or on one line if it is one of several `lines`."""
    encoded = msgspec.json.encode(value, enc_hook=str)
    if not lines:
        encoded = msgspec.json.format(encoded, indent=2)
    sys.stdout.write(escaped(encoded.decode()) + "\n")
    sys.stdout.flush()


def _complaints(error: ValidationError) -> Sequence[str]:
    # Values are left out: one of them may be a secret.
    return [
        f"{_variable(detail['loc'])}: {detail['msg'].removeprefix('Value error, ')}"
        for detail in error.errors(include_input=False, include_url=False)
    ]


def _variable(location: tuple[int | str, ...]) -> str:
    return f"{PREFIX}{location[0]}".upper() if location else "settings"
