"""Jobs of one op, each made from one function."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import dagster as dg

from batch_orchestration.core.errors import BatchOrchestrationError


def one_op_job(
    op_name: str, *, pool: str | None = None, tags: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], dg.JobDefinition]:
    """Return a decorator that makes a function the only op of a job.

    The job has the function's name and its docstring, which the UI shows. An error of ours fails
    the run with its message; the step is not retried.
    """

    def made(function: Callable[..., None]) -> dg.JobDefinition:
        @functools.wraps(function)
        def body(*args: Any, **resources: Any) -> None:
            try:
                function(*args, **resources)
            except BatchOrchestrationError as error:
                raise dg.Failure(description=str(error), allow_retries=False) from error

        description = inspect.getdoc(function)
        op = dg.op(name=op_name, pool=pool, description=description)(body)

        @dg.job(name=function.__name__, description=description, tags=tags)
        def job() -> None:
            op()

        return job

    return made


def config_of(job: dg.JobDefinition, **values: object) -> dict[str, Any]:
    """Return the run config that gives a job of one op these values."""
    (op,) = job.nodes
    return {"ops": {op.name: {"config": values}}}
