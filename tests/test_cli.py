"""The command line: order, exit codes, messages instead of tracebacks, and JSON for scripts."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pitstop import __version__, cli, records
from pitstop.bundle.manifest import Artifact, Bundle, BundleKind, Prompting
from pitstop.files import sha256_file
from pitstop.progress import be_quiet
from pitstop.retention import builders

COMMANDS = [
    *("demo", "init", "base", "train", "import", "settle", "check", "repair", "export", "merge", "parity", "pack"),
    *("build", "tell"),
    *("keys", "publish", "update", "status", "rollback", "serve", "web", "chat", "bench", "suites", "doctor"),
]


def run(*arguments: object) -> Result:
    """Run pitstop in this process."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    be_quiet(False)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def start(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run pitstop in a process of its own, after a script that prepares it."""
    command = [sys.executable, "-c", f"{script}\nfrom pitstop.cli import main\nmain()", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_help_lists_the_commands_in_the_order_of_the_flow() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert re.findall(r"^│ ([a-z]+)  +[A-Z]", result.stdout, re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    assert run(command, "--help").exit_code == 0


def test_the_version_is_the_packages() -> None:
    assert run("--version").stdout == f"pitstop {__version__}\n"


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["--no-such-option"], ["serve", "--port", "70000"]])
def test_wrong_use_is_exit_code_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_an_unknown_command_suggests_the_right_one() -> None:
    assert "Did you mean 'train'?" in run("trian").stderr


def test_a_command_that_cannot_be_done_now_says_why_and_what_to_do(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    assert run("init", recipe).exit_code == 0
    result = run("init", recipe)
    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert "do:" in result.stderr
    assert result.stdout == ""


def test_broken_input_is_exit_code_3(tmp_path: Path) -> None:
    result = run("suites", "list", tmp_path)
    assert result.exit_code == 3
    assert str(tmp_path) in result.stderr


def test_a_recipe_with_three_mistakes_reports_three(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    run("init", recipe)
    text = recipe.read_text().replace("[train]", "[train]\nrnak = 8").replace('name = "', 'nmae = "', 1)
    recipe.write_text(text + "\n[exprot]\nprecision = 'f16'\n")
    result = run("publish", recipe, "--keys", tmp_path / "keys")
    assert result.exit_code == 3
    for mistake in (
        "rnak: no such key; did you mean 'rank'?",
        "nmae: no such key",
        "exprot: no such key; did you mean",
    ):
        assert mistake in result.stderr


def test_what_is_not_packed_cannot_be_published(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="the publish extra is not installed")
    result = run("publish", tmp_path, "--keys", tmp_path / "keys")
    assert result.exit_code == 2
    assert f"pitstop pack {tmp_path}" in result.stderr.replace("\n", "")


def test_without_an_extra_the_message_is_the_command_that_installs_it() -> None:
    done = start("import sys; sys.modules['torch'] = None", "train", "recipe.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert 'pip install "pitstop[workshop]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_says_that_nothing_was_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(builders, "build", interrupted)
    result = run("suites", "build", tmp_path)
    assert result.exit_code == 130
    assert result.stderr == "stopped; nothing was lost: run the same command again\n"


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json", "-"], ["--help"]])
def test_a_reader_that_leaves_is_no_reason_to_complain(arguments: list[str]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-c", "from pitstop.cli import main; main()", *arguments]
    done = subprocess.run(command, check=False, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    assert done.stderr == b""
    assert done.returncode != 0


def test_json_on_standard_output_is_all_there_is(tmp_path: Path) -> None:
    result = run("status", "--device", tmp_path, "--json", "-")
    assert json.loads(result.stdout)["active"] == {}
    assert result.stderr == ""


def test_json_goes_to_a_file_beside_the_text(tmp_path: Path) -> None:
    file = tmp_path / "out" / "status.json"
    result = run("status", "--device", tmp_path, "--json", file)
    assert "nothing is active" in result.stdout
    assert json.loads(file.read_text())["state"]["good"] is None


def test_the_device_root_comes_from_the_environment_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PITSTOP_DEVICE", str(tmp_path / "mine"))
    assert str(tmp_path / "mine") in run("status").stdout


def test_rolling_back_an_empty_device_is_wrong_use(tmp_path: Path) -> None:
    result = run("rollback", "--device", tmp_path)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_keys_are_made_once(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="the publish extra is not installed")
    assert run("keys", "create", tmp_path / "keys").exit_code == 0
    assert run("keys", "create", tmp_path / "keys").exit_code == 2


def test_doctor_names_versions_missing_extras_and_what_to_type() -> None:
    done = start("import sys; sys.modules['torch'] = None", "doctor")
    assert done.returncode == 0
    assert f"pitstop {__version__}" in done.stdout
    for extra in ("llama", "onnx", "serve", "device", "workshop", "publish", "demo", "dev"):
        assert re.search(rf"^  {extra} +(installed|missing) ", done.stdout, re.MULTILINE)


def bundle(folder: Path, file: Path, base: Path, counter: int = 1) -> Path:
    """Make a bundle folder of a real model file."""
    folder.mkdir(parents=True)
    (folder / file.name).symlink_to(file)
    kind: BundleKind = "base" if file == base else "adapter"
    artifact = Artifact(kind, "gguf", "q4_1", file.name, sha256_file(file), file.stat().st_size)
    made = Bundle(
        kind=kind,
        name=folder.parent.name,
        version=f"1.0.{counter}",
        counter=counter,
        license="Apache-2.0",
        base_name="smollm2",
        base_sha256=sha256_file(base),
        prompting=Prompting("{{ messages[0]['content'] }}", "<|im_start|>", "<|im_end|>"),
        context_length=512,
        artifacts=(artifact,),
    )
    records.save_json(made, folder / "bundle.json")
    return folder.parent


@pytest.mark.slow
def test_from_keys_to_an_active_release_and_back(
    tmp_path: Path, smollm2_gguf: Path, make_adapter: Callable[..., Path]
) -> None:
    pytest.importorskip("cryptography", reason="the publish extra is not installed")
    pytest.importorskip("llama_cpp", reason="the llama extra is not installed")
    keys, repository, device = tmp_path / "keys", tmp_path / "repository", tmp_path / "device"
    root = repository / "metadata" / "1.root.json"
    base = bundle(tmp_path / "smollm2" / "bundle", smollm2_gguf, smollm2_gguf)
    home = bundle(tmp_path / "home" / "bundle", make_adapter(tmp_path / "home.gguf", seed=1), smollm2_gguf)
    assert run("keys", "create", keys).exit_code == 0
    assert run("publish", base, home, "--keys", keys, "--to", repository).exit_code == 0
    first = run("update", repository, "--device", device, "--root", root, "--json", "-")
    assert first.exit_code == 0, first.stderr
    report = json.loads(first.stdout)
    assert [model["name"] for model in report["probes"][0]["models"]] == ["smollm2", "home"]
    assert "up to date" in run("update", repository, "--device", device).stdout
    assert "smollm2 1.0.1, home 1.0.1" in run("status", "--device", device).stdout

    useless = make_adapter(tmp_path / "useless.gguf", seed=1, strength=0.0)
    bad = bundle(tmp_path / "again" / "home" / "bundle", useless, smollm2_gguf, counter=2)
    assert run("publish", bad, "--keys", keys, "--to", repository).exit_code == 0
    refused = run("update", repository, "--device", device)
    assert refused.exit_code == 3
    assert "changes nothing" in refused.stderr
    assert run("update", repository, "--device", device).exit_code == 1  # known to be bad: not fetched again
    assert "home 1.0.1" in run("status", "--device", device).stdout

    better = make_adapter(tmp_path / "better.gguf", seed=2)
    good = bundle(tmp_path / "once more" / "home" / "bundle", better, smollm2_gguf, counter=3)
    assert run("publish", good, "--keys", keys, "--to", repository).exit_code == 0
    assert "now active: " in run("update", repository, "--device", device).stdout
    assert "home 1.0.3" in run("status", "--device", device).stdout
    assert "home 1.0.1" in run("rollback", "--device", device).stdout
    assert run("rollback", "--device", device).exit_code == 2


def test_a_suite_of_ones_own_is_added_and_shown(tmp_path: Path) -> None:
    rows = tmp_path / "facts.jsonl"
    rows.write_text('{"prompt": "The sky is", "options": ["blue", "green"], "answer": "blue"}\n')
    folder = tmp_path / "suites"
    said = ("--license", "CC0-1.0", "--source", "made here", "--to", folder)
    added = run("suites", "add", rows, "--kind", "choice", *said)
    assert (added.exit_code, added.stdout) == (0, f"{folder / 'facts'}: 1 items\n")
    shown = run("suites", "show", "facts", folder).stdout
    for words in ("accuracy: 50.0% is guessing", "CC0-1.0", "made here", "The sky is", "* blue", "digest"):
        assert words in shown
    assert json.loads(run("suites", "show", "facts", folder, "--json", "-").stdout)["record"]["count"] == 1
    unknown = run("suites", "show", "fact", folder)
    assert (unknown.exit_code, "choose one of: facts" in unknown.stderr) == (2, True)
    assert run("suites", "add", rows, *said).exit_code == 2


def test_where_no_suites_were_built_those_that_pitstop_carries_are_listed(tmp_path: Path) -> None:
    listed = run("suites", "list", tmp_path / "suites")
    assert listed.exit_code == 0
    assert {line.split()[0] for line in listed.stdout.splitlines()} == builders.DEFAULT_SIZES.keys()
    assert "WordNet 3.0 licence" in run("suites", "show", "wordnet", tmp_path / "suites").stdout
