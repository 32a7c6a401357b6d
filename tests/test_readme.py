"""What README tells a newcomer to type exists: every command, every option, every make target, every folder."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from pitstop.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    words.split()
    for block in SHELL
    for line in block.splitlines()
    for words in re.split(r"&&|;", line.partition("#")[0])
    if words.split()[:1] == ["pitstop"]
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_readme_exists(words: list[str]) -> None:
    command = get_command(app)
    rest = words[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]  # type: ignore[attr-defined]
    assert not hasattr(command, "commands"), f"{' '.join(words)}: no such command"
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("-")} <= known


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 10


def test_every_make_target_and_folder_of_the_readme_exists() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for block in SHELL:
        assert set(re.findall(r"\bmake ([a-z]+)", block)) <= set(targets)
    for folder in re.findall(r"^\| `([a-z/]+)`", README, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
