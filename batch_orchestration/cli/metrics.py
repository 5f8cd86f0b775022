"""`metrics`: all metrics for Prometheus, from the data folder alone."""

from pathlib import Path

import click

from batch_orchestration.cli.context import open_context
from batch_orchestration.operations.metrics.collector import (
    metrics_text,
    serve_metrics,
    write_textfile,
)


@click.command()
@click.option("--serve", is_flag=True, help="Answer scrapes until Ctrl-C.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve on.")
@click.option("--port", default=9464, show_default=True, help="Port to serve on.")
@click.option(
    "--textfile",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the page there instead: a .prom file of node exporter's textfile collector.",
)
def metrics(serve: bool, host: str, port: int, textfile: Path | None) -> None:
    """Print the metrics of this deployment in Prometheus's text format, or serve them.

    Only the data folder is read, and nothing in it is changed; Dagster and a GPU are not needed.
    """
    if serve and textfile is not None:
        raise click.UsageError("--serve and --textfile exclude each other")
    folder = open_context().folder
    if textfile is not None:
        write_textfile(folder, textfile)
    elif serve:
        _serve(host, port)
    else:
        click.echo(metrics_text(folder), nl=False)


def _serve(host: str, port: int) -> None:
    try:
        server, thread = serve_metrics(open_context().folder, host=host, port=port)
    except OSError as error:
        raise click.ClickException(f"cannot serve on {host}:{port}: {error}") from error
    click.echo(f"metrics on http://{host}:{server.server_port}/metrics", err=True)
    try:
        thread.join()
    except KeyboardInterrupt:
        server.shutdown()
