"""Tasks of lm-evaluation-harness to suites: a YAML file and local JSON data, read without running any code of theirs.

What is done: multiple_choice and loglikelihood_rolling, without few-shot examples; doc_to_text, doc_to_choice and
doc_to_target as field names or Jinja templates (in the sandbox); include. Everything else that a task asks for is
refused by name, for a task that is read half is another task.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from pitstop.errors import BrokenInput, MissingExtra, RecordError
from pitstop.retention.importing import MUST, index_of
from pitstop.retention.suite import ChoiceItem, Item, Kind, Scoring, Suite, TextItem, make, parse_object

OUTPUT_KINDS: Mapping[str, Kind] = {"multiple_choice": "choice", "loglikelihood_rolling": "text"}
UNDERSTOOD = {
    *("task", "include", "output_type", "dataset_path", "dataset_kwargs", "test_split", "validation_split"),
    *("doc_to_text", "doc_to_choice", "doc_to_target", "target_delimiter", "description", "num_fewshot", "metric_list"),
}
# They change no item and no score of one.
IRRELEVANT = {
    *("tag", "group", "task_alias", "metadata", "dataset_name", "training_split", "repeats", "fewshot_split"),
    *("fewshot_delimiter", "fewshot_config", "should_decontaminate", "doc_to_decontamination_query"),
}
METRICS = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes"),
    "loglikelihood_rolling": ("bits_per_byte", "byte_perplexity", "word_perplexity"),
}
Doc = Mapping[str, Any]


def from_task(
    path: Path, name: str | None = None, *, data: Path | None = None, scoring: Scoring | None = None, **said: Any
) -> Suite:
    """Make a suite out of a task's YAML file.

    Args:
        name: of the suite; the task's own by default.
        data: rows to read instead of the task's own data set, as JSON.
        scoring: what options compete with; by default what the task's metric asks for (acc_norm: per byte, acc: whole).
        said: what `suite.make` wants to know besides: license, source, description and so on.

    Raises:
        MissingExtra: PyYAML is not installed.
        BrokenInput: a file cannot be read.
        RecordError: everything in the task that is not understood, at once.
        DatasetError: everything wrong with its rows, at once.
    """
    task = _included(path, ())
    problems = _refusals(task) + ([] if data else _unreadable(task))
    problems += [f"{field}: it must not be empty" for field in MUST if not said.get(field, "").strip()]
    if problems:
        raise RecordError(problems, where=path, cure="change a copy of the task, or write the items as JSONL")
    kind = OUTPUT_KINDS[task["output_type"]]
    items: list[Item] = []
    places: list[str] = []
    wrong: list[str] = []
    for at, doc in enumerate(_rows(data) if data else _docs(task, path), 1):
        try:
            items.append(_item(kind, task, doc, f"{name or task['task']}-{at:04}"))
            places.append(f"row {at}")
        except RecordError as error:
            wrong += [f"row {at}: {problem}" for problem in error.problems]
    said = {"description": f"{task['task']}, a task of lm-evaluation-harness", **said}
    said["scoring"] = scoring or (_scoring(task) if kind == "choice" else "per byte")
    return make(name or task["task"], kind, items, **said, places=places, problems=wrong, where=path)


def _included(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Return a task with what it includes beneath it."""
    if path.resolve() in seen:
        raise RecordError([f"include: {path.name} includes itself"], where=path)
    task = _yaml(path)
    names = task.pop("include", None)
    merged: dict[str, Any] = {}
    for name in [names] if isinstance(names, str) else names or []:
        merged |= _included(path.parent / str(name), (*seen, path.resolve()))
    return merged | task


def _yaml(path: Path) -> dict[str, Any]:
    try:
        import yaml  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise MissingExtra("reading a task of lm-evaluation-harness", "workshop") from error
    try:
        found = yaml.safe_load(path.read_bytes())  # safe: a tag that would run code, as !function, is an error
    except OSError as error:
        raise BrokenInput(f"cannot read {path.name}: {error.strerror}", where=path) from error
    except yaml.constructor.ConstructorError as error:
        tag = re.search(r"'(!\S+)'", str(error.problem))
        what = f"{tag[1]} would run code of the task's" if tag else str(error.problem)
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise RecordError([f"{what}{line}: pitstop does not do this"], where=path) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecordError([f"not YAML: {error}"], where=path) from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise RecordError(["not a table of names and values"], where=path)
    return found


def _refusals(task: Mapping[str, Any]) -> list[str]:
    """Return everything in a task that is not done here."""
    problems = [f"{key}: pitstop does not do this" for key in sorted(task.keys() - UNDERSTOOD - IRRELEVANT)]
    kind = task.get("output_type")
    if kind not in OUTPUT_KINDS:
        problems.append(f"output_type: {kind!r} is not done, only {' and '.join(OUTPUT_KINDS)}")
    known = METRICS.get(str(kind), ())
    problems += [
        f"metric_list: {metric!r} is not done, only {', '.join(known)}"
        for metric in _metrics(task)
        if known and metric not in known
    ]
    wanted = ["task", "doc_to_target", *(["doc_to_text", "doc_to_choice"] if kind == "multiple_choice" else [])]
    problems += [f"{key}: missing" for key in wanted if key not in task]
    if task.get("num_fewshot") not in (None, 0):
        problems.append(f"num_fewshot: {task['num_fewshot']} examples before each item are not done, only 0")
    if task.get("target_delimiter", " ") not in (" ", ""):
        problems.append(f"target_delimiter: {task['target_delimiter']!r} is not done, options follow one space")
    for key in ("task", "doc_to_text", "description"):
        if not isinstance(task.get(key, ""), str):
            problems.append(f"{key}: expected a text, found {task[key]!r}")
    return problems


def _unreadable(task: Mapping[str, Any]) -> list[str]:
    """Return why a task's data set cannot be read here."""
    path, settings = task.get("dataset_path"), task.get("dataset_kwargs")
    if path != "json":
        return [f"dataset_path: {path!r} is not read, only 'json'; export its rows as JSONL and name them with --data"]
    if not isinstance(settings, dict) or settings.keys() != {"data_files"}:
        return ["dataset_kwargs: it must have data_files, and nothing else"]
    return []


def _docs(task: Mapping[str, Any], path: Path) -> list[Doc]:
    """Return the rows of the split that is to be measured; paths are relative to the task's file."""
    files = task["dataset_kwargs"]["data_files"]
    if isinstance(files, dict):
        split = task.get("test_split") or task.get("validation_split")
        if split not in files:
            raise RecordError([f"data_files: none of the split {split!r} (test_split, validation_split)"], where=path)
        files = files[split]
    names = [files] if isinstance(files, str) else files
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecordError([f"data_files: expected names of files, found {files!r}"], where=path)
    far = [f"data_files: {name} is not on this machine" for name in names if "://" in name or "*" in name]
    if far:
        raise RecordError(far, where=path)
    return [doc for name in names for doc in _rows(path.parent / name)]


def _rows(path: Path) -> list[Doc]:
    """Return the objects of a file: one a line, or a list of them."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BrokenInput(f"cannot read {path.name}: {error.strerror}", where=path) from error
    found: list[Doc] = []
    problems = []
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError):
        whole = None
    lines = [json.dumps(row).encode() for row in whole] if isinstance(whole, list) else data.split(b"\n")
    for at, line in enumerate(lines, 1):
        try:
            found += [parse_object(line)] if line.strip() else []
        except RecordError as error:
            problems += [f"line {at}: {problem}" for problem in error.problems]
    if problems:
        raise RecordError(problems, where=path)
    return found


def _item(kind: Kind, task: Mapping[str, Any], doc: Doc, id: str) -> Item:
    """Return one row as an item.

    Raises:
        RecordError: a template refuses it, or what comes out is no item.
    """
    if kind == "text":
        return TextItem(id, id, _text(task["doc_to_target"], doc, "doc_to_target"))
    prompt = task.get("description", "") + _text(task["doc_to_text"], doc, "doc_to_text")
    options = _options(task["doc_to_choice"], doc)
    answer = _answer(task["doc_to_target"], doc, options)
    if task.get("target_delimiter") == "":
        prompt, options = _apart(prompt, options)
    return ChoiceItem(id, id, prompt, tuple(options), answer)


def _apart(prompt: str, options: Sequence[str]) -> tuple[str, list[str]]:
    """Return a prompt and options that are one after the other as they stand, without the space between them."""
    if prompt.endswith(" "):
        return prompt[:-1], list(options)
    if not all(option.startswith(" ") for option in options):
        raise RecordError(["target_delimiter: '' without a space between prompt and option is not done"])
    return prompt, [option[1:] for option in options]


def _text(template: Any, doc: Doc, key: str) -> str:
    """Return a field of the row by its name, or what a template makes of the row."""
    if not isinstance(template, str):
        raise RecordError([f"{key}: expected a field or a template, found {template!r}"])
    if template in doc:
        return str(doc[template])
    try:
        return _environment().from_string(template).render(**doc)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise RecordError([f"{key}: {error}"]) from error


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["regex_replace"] = lambda text, pattern, by="", count=0: re.sub(pattern, by, text, count=count)
    return environment


def _options(template: Any, doc: Doc) -> list[str]:
    if isinstance(template, list):
        return [_text(one, doc, "doc_to_choice") for one in template]
    if isinstance(template, dict):
        raise RecordError(["doc_to_choice: a table of options is not done"])
    found = doc[template] if template in doc else _text(template, doc, "doc_to_choice")
    if isinstance(found, str):  # a template that writes a list
        try:
            found = ast.literal_eval(found)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise RecordError([f"doc_to_choice: {found!r} is no list of options"]) from error
    if not isinstance(found, list) or not all(isinstance(option, str) for option in found):
        raise RecordError([f"doc_to_choice: {found!r} is no list of texts"])
    return found


def _answer(template: Any, doc: Doc, options: Sequence[str]) -> int:
    if type(template) is int:
        return template
    found = doc[template] if isinstance(template, str) and template in doc else _text(template, doc, "doc_to_target")
    if type(found) is int:
        return found
    if not isinstance(found, str):
        raise RecordError([f"doc_to_target: {found!r} is neither an index nor an option"])
    stripped = found.strip()
    if re.fullmatch(r"[0-9]{1,4}", stripped) and stripped not in options:
        return int(stripped)
    return index_of(found, list(options))


def _metrics(task: Mapping[str, Any]) -> list[Any]:
    listed = task.get("metric_list") or []
    if not isinstance(listed, list):
        return [listed]
    return [one.get("metric") if isinstance(one, dict) else one for one in listed]


def _scoring(task: Mapping[str, Any]) -> Scoring:
    metrics = _metrics(task)
    return "whole" if set(metrics) == {"acc"} else "per byte"
