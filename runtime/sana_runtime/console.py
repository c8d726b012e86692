"""How a command of ours ends: shared by `sana-runtime` and `sana-export`."""

from typing import Any

import typer
from typer.core import TyperGroup

from sana_runtime.errors import SanaError

_INTERRUPTED = 130


class CommandGroup(TyperGroup):
    """A user's error ends in one clear message without traceback and its exit code, an interrupt in 130."""

    interrupted = "interrupted"

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SanaError as error:
            print_error(f"error: {error}")
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            print_error(self.interrupted)
            raise typer.Exit(_INTERRUPTED) from error


def print_error(text: str) -> None:
    """To stderr; the first line in red where the terminal has colours."""
    from rich.console import Console
    from rich.text import Text

    first, *rest = text.splitlines()
    message = Text(first, style="bold red")
    message.append("".join(f"\n{line}" for line in rest), style="not bold default")
    Console(stderr=True, highlight=False, soft_wrap=True).print(message)
