"""The command line is the manual: every --help answers at once, every documented command exists."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from sana_export.cli import app as export_app
from sana_runtime.cli import app as runtime_app

ROOT = Path(__file__).resolve().parents[2]
APPS = {"sana-export": export_app, "sana-runtime": runtime_app}
MODULES = {"sana-export": "sana_export.cli", "sana-runtime": "sana_runtime.cli"}
HEAVY = ("torch", "triton", "onnx", "onnxruntime", "transformers", "diffusers", "numpy")
# Programs a document may call whose arguments are not ours to check.
OTHER_PROGRAMS = {"pip", "git", "cd", "source", ".", "apt-get", "sudo", "docker", "ls", "export"}

FENCE = re.compile(r"^```(?:sh|bash|console|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def verbs_of(program: str) -> dict[str, click.Command]:
    command = typer.main.get_command(APPS[program])
    return dict(getattr(command, "commands", {}))


def all_verbs() -> list[tuple[str, ...]]:
    return [(program, *rest) for program in APPS for rest in ((), *((verb,) for verb in verbs_of(program)))]


@pytest.mark.parametrize("words", all_verbs(), ids=" ".join)
def test_help_answers(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(APPS[words[0]], [*words[1:], "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.output


@pytest.mark.parametrize("words", [words for words in all_verbs() if len(words) > 1], ids=" ".join)
def test_every_verb_and_option_explains_itself(words: tuple[str, ...]) -> None:
    command = verbs_of(words[0])[words[1]]
    assert command.help
    silent = [parameter.name for parameter in command.params if not getattr(parameter, "help", None)]
    assert silent == []


@pytest.mark.parametrize("program", APPS)
def test_help_loads_nothing_heavy(program: str) -> None:
    script = (
        f"import sys; sys.argv = ['{program}', '--help']\n"
        f"import {MODULES[program]} as cli\n"
        "try:\n    cli.main()\n"
        "finally:\n"
        f"    heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    assert not heavy, heavy\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def documented_commands() -> Iterator[tuple[str, str]]:
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "runtime" / "README.md"]):
        for block in FENCE.findall(path.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                for command in commands_of(line.removeprefix("$ ")):
                    yield path.relative_to(ROOT).as_posix(), shlex.join(command)


def commands_of(line: str) -> list[list[str]]:
    """The words of each command in one line of shell, without comments and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if {*word} <= {*"();<>|&"}:
            commands.append([">"] if ">" in word or "<" in word else [])
        else:
            commands[-1].append(word)
    return [command for command in commands if command and command[0] != ">"]


COMMANDS = list(dict.fromkeys(documented_commands()))


def test_the_readme_shows_commands() -> None:
    assert any(path == "README.md" and line.startswith("sana-export ") for path, line in COMMANDS)


@pytest.mark.parametrize(("document", "line"), COMMANDS, ids=[line for _, line in COMMANDS])
def test_documented_command_exists(document: str, line: str) -> None:
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    program = Path(words[0]).name
    if program in APPS:
        check_our_command(program, words[1:])
    elif program == "make":
        targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {*words[1:]} <= {*targets}
    elif program.startswith("python"):
        check_python_command(words[1:])
    elif "/" in words[0]:
        assert (ROOT / words[0]).is_file(), f"{document} calls {words[0]}"
    else:
        assert program in OTHER_PROGRAMS, f"{document} calls {program}"


def check_our_command(program: str, words: list[str]) -> None:
    if words and words[0].startswith("-"):
        assert words[0] in ("--help", "--version")
        return
    verbs = verbs_of(program)
    assert words, f"{program} without a verb"
    assert words[0] in verbs
    known = {option for parameter in verbs[words[0]].params for option in parameter.opts} | {"--help"}
    used = {word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
    assert used <= known


def check_python_command(words: list[str]) -> None:
    if words[0] in ("-m", "-c"):
        return
    assert (ROOT / words[0]).is_file()
