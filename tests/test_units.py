"""The systemd units of boards: commands that exist, and units that systemd accepts."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pitstop.cli import app

UNITS = Path(__file__).resolve().parents[1] / "devices" / "systemd"
COMMANDS = re.findall(r"ExecStart=/opt/pitstop/bin/pitstop (\w+)(.*)", "".join(p.read_text() for p in UNITS.iterdir()))


@pytest.mark.parametrize(("command", "arguments"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_the_commands_have_these_options(command: str, arguments: str) -> None:
    helped = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert helped.exit_code == 0
    assert all(option in helped.output for option in re.findall(r"--[\w-]+", arguments))


def test_every_setting_is_in_the_file_that_the_units_read() -> None:
    used = set(re.findall(r"\$\{(\w+)\}", str(COMMANDS)))
    assert used == set(re.findall(r"^(\w+)=", (UNITS / "pitstop.conf").read_text(), re.MULTILINE))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_them(tmp_path: Path) -> None:
    program = shutil.which("true")
    for unit in UNITS.glob("pitstop-*"):
        text = unit.read_text().replace("/opt/pitstop/bin/pitstop", str(program))
        (tmp_path / unit.name).write_text(text)
    command = ["systemd-analyze", "verify", *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
