"""README and docs name what is there: commands with their options, files, and what a module holds."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from itertools import chain, takewhile
from pathlib import Path

import pytest
from typer.main import get_command

from soloist.cli import app

CLI = get_command(app)
ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:^|`)(?:torchrun .* -m )?(soloist [a-z][^`\n]*)", re.MULTILINE)
FILE = re.compile(r"`((?:src|docs|tests|scripts|examples)/[\w./-]+\.\w+|[a-z_]+/\w+\.py)`")
NAME = re.compile(r"`(\w+)\.(\w+)(?:\(.*?\))?`")
ENDS = {"|", ">", "&&", "--"}  # words of a shell behind which a command is over
DATA = {"py", "json", "jsonl", "yaml", "csv", "npz", "png", "html", "md"}


def commands() -> list[str]:
    texts = (path.read_text().replace("\\\n", " ") for path in TEXTS)
    return sorted({command.strip() for text in texts for command in COMMAND.findall(text)})


@pytest.mark.parametrize("text", commands())
def test_a_command_and_its_options_exist(text: str) -> None:
    _, *words = takewhile(lambda word: word not in ENDS, shlex.split(text, comments=True))
    command = CLI
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"there is no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known | {"--help"}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_files_and_what_modules_hold_exist(path: Path) -> None:
    text, modules = path.read_text(), defaultdict[str, list[str]](list)
    for module in (ROOT / "src").rglob("*.py"):
        modules[module.stem].append(module.read_text())
    for name in FILE.findall(text):
        assert (ROOT / name).exists() or (ROOT / "src/soloist" / name).exists(), f"there is no file {name}"
    for module, name in NAME.findall(text):
        if module in modules and name not in DATA:
            named = rf"\b{module}\.{name}\b"  # an option like mpi.progress
            found = any(re.search(rf"\b{name}\b", held) for held in modules[module])
            assert found or any(re.search(named, held) for held in chain(*modules.values())), f"no {module}.{name}"
