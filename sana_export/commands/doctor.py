"""`sana-export doctor`."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sana_export.commands.options import JsonFile, check_files

if TYPE_CHECKING:
    from sana_export.doctor import Finding

_STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def run(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="Also check which targets of a bundle run here.")
    ] = None,
    json: JsonFile = None,
) -> None:
    """Say what this machine has and lacks for building and running bundles.

    Each line is ok, warn (something is slower or absent, nothing is broken) or FAIL, with what to do.
    Exit code 1 if any line is FAIL, else 0.
    """
    from sana_export.doctor import check_bundle, examine_machine, exit_code, worst

    check_files({"--json": json})
    console = Console(highlight=False)
    findings: list[Finding] = []
    with console.status("looking at this machine"):
        findings += examine_machine()
        if bundle is not None:
            findings += check_bundle(bundle)
    console.print(_table(findings))
    console.print(f"overall: {worst(findings)}")
    if json is not None:
        _write_json(json, findings)
    raise typer.Exit(exit_code(findings))


def _table(findings: "Iterable[Finding]") -> Table:
    table = Table("", "component", "found", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for finding in findings:
        found = Text(finding.detail)
        if finding.remedy:
            found.append(f"\n-> {finding.remedy}", style="dim")
        table.add_row(Text(finding.status, style=_STYLES[finding.status]), finding.component, found)
    return table


def _write_json(path: Path, findings: "list[Finding]") -> None:
    import msgspec

    from sana_export.doctor import worst
    from sana_runtime.files import whole_file

    report = {"status": worst(findings), "findings": findings}
    with whole_file(path) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
