"""The command `sana-runtime`: generate a picture, measure a bundle, look into one."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sana_runtime import __version__
from sana_runtime.console import CommandGroup
from sana_runtime.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from sana_runtime.image import Picture
    from sana_runtime.manifest import FileEntry
    from sana_runtime.pipeline import Pipeline

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run Sana text-to-image bundles made by `sana-export build`. Needs no torch.",
)

Bundle = Annotated[
    Path,
    typer.Argument(help="Directory written by `sana-export build`.", metavar="BUNDLE", show_default=False),
]
Target = Annotated[
    str | None,
    typer.Option(
        help="tensorrt-rtx, tensorrt, onnxruntime or inductor. Default: the bundle's first that this machine can run.",
        show_default=False,
    ),
]
NumSteps = Annotated[
    int | None,
    typer.Option(help="Denoising steps, 1 to 1000. Default: the model's.", metavar="N", show_default=False),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        help="How strongly to follow the prompt. 1 or less turns classifier-free guidance off. Default: the model's.",
        metavar="G",
        show_default=False,
    ),
]
Threads = Annotated[int, typer.Option(help="CPU threads for ONNX Runtime; 0 lets it choose.", metavar="N", min=0)]
OneAtATime = Annotated[
    bool,
    typer.Option(
        "--one-at-a-time",
        help="Keep one engine in memory: each is loaded when it is needed and dropped for the next.",
    ),
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Check the SHA-256 of every file, not only its size.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sana-runtime {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def generate(
    bundle: Bundle,
    prompt: Annotated[str, typer.Argument(help="What to paint. May be empty.", metavar="PROMPT", show_default=False)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="PNG file to write.", metavar="FILE", show_default=False),
    ],
    num_steps: NumSteps = None,
    guidance_scale: GuidanceScale = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise, a whole number >= 0.", metavar="S")] = 0,
    negative_prompt: Annotated[
        str, typer.Option(help="What to steer away from.", metavar="T", show_default=False)
    ] = "",
    latent: Annotated[
        Path | None,
        typer.Option(
            help="Start from this .npy file instead of the seed's noise: "
            "float, [1, 32, height/32, width/32], unit variance.",
            metavar="FILE.npy",
            show_default=False,
        ),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(help="Pixels; must be the bundle's.", metavar="PIXELS", show_default=False),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help="Pixels; must be the bundle's.", metavar="PIXELS", show_default=False),
    ] = None,
    target: Target = None,
    threads: Threads = 0,
    one_at_a_time: OneAtATime = False,
    verify: Verify = True,
) -> None:
    """Paint one picture into a PNG file that remembers its settings."""
    from sana_runtime.image import check_output
    from sana_runtime.manifest import read_manifest
    from sana_runtime.request import checked_settings

    check_output(output)
    manifest = read_manifest(bundle)
    arguments: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "num_steps": num_steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "latent": None if latent is None else read_latent(latent),
    }
    settings = checked_settings(manifest, "onnxruntime", **arguments)
    pipeline = _load(bundle, target, threads, verify, one_at_a_time=one_at_a_time)
    with _progress("denoising", settings.num_steps) as advance:
        picture = pipeline.generate(**arguments, on_step=lambda step: advance(1))
    picture.save(output)
    _print_summary(output, pipeline, picture)


@app.command()
def bench(
    bundle: Bundle,
    num_steps: NumSteps = None,
    runs: Annotated[int, typer.Option(help="Measured pictures.", metavar="N", min=1)] = 5,
    warmup: Annotated[int, typer.Option(help="Pictures before the first measured one.", metavar="N", min=0)] = 1,
    target: Target = None,
    threads: Threads = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Also write the rows to this file.", metavar="FILE", show_default=False),
    ] = None,
) -> None:
    """Measure milliseconds per stage and peak memory on this machine.

    One picture is one prompt through text encoder, all denoising steps and decoder.
    The empty negative prompt is encoded in the first picture only, as in any use of the pipeline.
    """
    from sana_runtime import bench as measure
    from sana_runtime.manifest import read_manifest
    from sana_runtime.request import checked_settings

    if json_file is not None:
        measure.check_json(json_file)
    checked_settings(read_manifest(bundle), "onnxruntime", prompt="", num_steps=num_steps)
    pipeline = _load(bundle, target, threads, verify=False)
    with _progress("pictures", warmup + runs) as advance:
        result = measure.measure(pipeline, num_steps=num_steps, runs=runs, warmup=warmup, on_picture=lambda: advance(1))
    if json_file is not None:
        measure.write_json(result, json_file)
    _out().print(measure.as_table(result))


@app.command()
def inspect(bundle: Bundle, verify: Verify = True) -> None:
    """Show what a bundle holds, whether it is intact, and which targets this machine can run."""
    from sana_runtime import inspection
    from sana_runtime.manifest import read_manifest, verify_files

    manifest = read_manifest(bundle)
    for part in inspection.describe(manifest):
        _out().print(part)
    with _verifying(manifest.files, verify) as on_bytes:
        verify_files(bundle, manifest.files, digests=verify, on_bytes=on_bytes)
    checked = "sizes and SHA-256" if verify else "sizes"
    _out().print(f"files: {len(manifest.files)}, {checked} as recorded")


def read_latent(path: Path) -> "npt.NDArray[np.generic]":
    """The array of a .npy file; pickled objects are refused. Raises `InputError`."""
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable_latent(path, str(error)) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise _unreadable_latent(path, "an .npz archive")
    return array


def _unreadable_latent(path: Path, received: str) -> InputError:
    return InputError(
        f"--latent {path} cannot be read",
        received=received,
        expected="one array of numbers in a .npy file",
        action="write it with numpy.save(path, latent)",
    )


def _load(bundle: Path, target: str | None, threads: int, verify: bool, *, one_at_a_time: bool = False) -> "Pipeline":
    from sana_runtime.manifest import read_manifest
    from sana_runtime.pipeline import Pipeline

    # Which of the files are hashed depends on the target: the bar ends early if some are not needed.
    with _verifying(read_manifest(bundle).files, verify) as on_bytes:
        return Pipeline.load(
            bundle,
            target,
            verify=verify,
            threads=threads,
            report=_report,
            on_bytes=on_bytes,
            one_at_a_time=one_at_a_time,
        )


@contextmanager
def _verifying(files: "tuple[FileEntry, ...]", verify: bool) -> Iterator[Callable[[int], None]]:
    with _progress("verifying", sum(entry.size for entry in files) if verify else 0) as advance:
        yield advance


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr that leaves nothing behind."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    # In a log file a bar is only noise.
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(label, total=total)
        yield lambda amount: progress.advance(task, amount)


def _print_summary(output: Path, pipeline: "Pipeline", picture: "Picture") -> None:
    settings, timings = picture.settings, picture.timings_ms
    stages = ", ".join(f"{name} {ms:.0f} ms" for name, ms in timings.items() if name != "total")
    typer.echo(f"wrote {output}")
    typer.echo(f"  {settings.width} x {settings.height} pixels, {settings.num_steps} steps, seed {settings.seed}")
    typer.echo(f"  {timings['total']:.0f} ms: {stages}")
    typer.echo(f"  on {pipeline.backend.description}")


def _report(line: str) -> None:
    typer.echo(line, err=True)


def _out() -> Any:
    from rich.console import Console

    return Console(highlight=False)


def main() -> None:
    """Console entry."""
    for stream in (sys.stdout, sys.stderr):
        # A prompt may hold characters that the terminal's encoding lacks: print a replacement, do not fail.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
