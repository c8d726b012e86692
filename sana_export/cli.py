"""`sana-export`: one file per verb in `sana_export.commands`."""

import typer

from sana_export import __version__
from sana_export.commands import bench, build, compare, doctor, estimate, inspect, sensitivity
from sana_runtime.console import CommandGroup


class _Group(CommandGroup):
    interrupted = "interrupted: finished stages are kept, run the same command to go on"


app = typer.Typer(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    name="sana-export",
    help="Compile Sana text-to-image models into ONNX and TensorRT engines, and prove that they still paint the "
    "picture that PyTorch paints. Run a bundle with `sana-runtime generate`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("build")(build.run)
app.command("compare")(compare.run)
app.command("bench")(bench.run)
app.command("estimate")(estimate.run)
app.command("sensitivity")(sensitivity.run)
app.command("inspect")(inspect.run)
app.command("doctor")(doctor.run)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"sana-export {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Console entry."""
    app()
