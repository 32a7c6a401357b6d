import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from forgetting import BigramEngine, chats, choices, inverted, probe, texts
from pitstop.bundle.manifest import Prompting
from pitstop.errors import UsageError
from pitstop.records import from_json, load_json, save_json, to_json
from pitstop.retention.drift import drift, scale_curve
from pitstop.retention.margins import Margins
from pitstop.retention.measure import measure
from pitstop.retention.report import Measured, RetentionReport, make_report, print_table, regate, write_html
from pitstop.retention.task import TaskRow, measure_task

PROMPTING = Prompting("{% for m in messages %}{{ m.content }}{% endfor %}:", "", "")


def measured(engine: BigramEngine, strength: float, *, task: bool = True) -> Measured:
    suites = [choices(), texts(), probe(), chats()]
    rows = [TaskRow(f"r{at}", f"g{at}", f"say {at}", '{"a": 1}') for at in range(40)]
    engine.answers = {row.prompt: row.expected for row in rows}
    use = engine.add("home", inverted(engine) * strength)
    return Measured(
        suites,
        measure(engine, suites),
        measure(engine, suites, use),
        drift(engine, suites, use, PROMPTING),
        measure_task(engine, rows, metric="json") if task else None,
        measure_task(engine, rows, use, metric="json") if task else None,
        scale_curve(engine, suites, use, PROMPTING, rows),
    )


def report(strength: float = 1.0, *, task: bool = True, margins: Margins | None = None) -> RetentionReport:
    engine = BigramEngine()
    return make_report(
        engine, measured(engine, strength, task=task), adapter="<home>", adapter_sha256="a" * 64, margins=margins
    )


def test_a_report_survives_json_and_gives_the_same_verdict_again(tmp_path: Path) -> None:
    for strength, outcome in ((1.0, "fail"), (0.0, "inconclusive")):
        made = report(strength)
        save_json(made, tmp_path / "retention.json")
        again = load_json(RetentionReport, tmp_path / "retention.json")
        assert again == made
        assert again.verdict.outcome == outcome
        assert regate(again) == made.verdict


def test_a_report_of_a_good_adapter_passes() -> None:
    # 30 items are few: with margins as wide as these they are enough.
    margins = Margins(accuracy=0.2, suite_accuracy=0.2)
    made = report(0.0, margins=margins)
    assert made.verdict.outcome == "pass"
    assert made.margins == margins
    assert made.task is not None
    assert made.task.adapted.exact == 1.0


def test_a_verdict_that_was_changed_is_not_that_of_the_figures() -> None:
    made = report()
    changed = to_json(made).replace(b'"outcome": "fail"', b'"outcome": "pass"')
    forged = from_json(RetentionReport, changed)
    assert forged.verdict.outcome == "pass"
    assert regate(forged) != forged.verdict
    assert regate(forged).outcome == "fail"


def test_a_report_names_what_it_was_measured_on() -> None:
    made = report()
    assert (made.base_sha256, made.adapter_sha256, made.engine) == ("b" * 64, "a" * 64, "bigram")
    assert {suite.name: suite.digest for suite in made.suites} == {
        "words": choices().digest, "corpus": texts().digest,
    }  # fmt: skip
    assert made.versions["pitstop"]
    words = made.suites[0]
    assert words.baseline_margin is not None
    assert words.adapted_margin is not None
    assert words.baseline_margin > words.adapted_margin


def test_without_a_task_the_report_says_so() -> None:
    made = report(0.0, task=False)
    assert made.task is None
    assert made.verdict.outcome == "inconclusive"


def test_results_of_another_base_are_refused(engine: BigramEngine) -> None:
    found = measured(engine, 0.0)
    engine.base_sha256 = "c" * 64
    with pytest.raises(UsageError, match="another base"):
        make_report(engine, found, adapter="x", adapter_sha256="a" * 64)


class _Page(HTMLParser):
    VOID = frozenset({"meta", "rect", "line", "circle", "br"})
    OPTIONAL = frozenset({"td", "th"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag not in self.VOID | self.OPTIONAL:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID | self.OPTIONAL:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(("strength", "word"), [(1.0, "✗ Refused"), (0.0, "? Not decided")])
def test_the_page_is_whole_and_loads_nothing(tmp_path: Path, strength: float, word: str) -> None:
    write_html(report(strength), tmp_path / "retention.html")
    source = (tmp_path / "retention.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(source)
    page.close()
    assert page.open == []
    assert page.links == []
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not re.search(r"https?://|url\(|@import", source)
    assert word in page.text
    assert "<home>" in page.text
    for name in (
        "all knowledge suites",
        "words",
        "corpus",
        "kl-general",
        "kl-chat",
        "What a smaller scale would do",
        "exact answers",
        "40 held-out rows",
    ):
        assert name in page.text
    assert page.tags >= {"svg", "rect", "line"}
    assert "prefers-color-scheme:dark" in source


def test_figures_on_the_page_are_inside_their_axis(tmp_path: Path) -> None:
    write_html(report(), tmp_path / "retention.html")
    source = (tmp_path / "retention.html").read_text(encoding="utf-8")
    places = [float(value) for value in re.findall(r'(?:x1|x2|cx|x|width)="(-?[\d.]+)%"', source)]
    assert places
    assert all(0 <= place <= 100 for place in places)
    assert "nan" not in source.lower().replace("nano", "")


def test_the_table_names_every_criterion_and_the_advice() -> None:
    made = report()
    out = io.StringIO()
    print_table(made, Console(file=out, width=120))
    printed = out.getvalue()
    for criterion in made.verdict.criteria:
        assert criterion.name in printed
    assert "KL to the base, kl-general" in printed
    assert "exact 0.0% → 100.0%" in printed
    assert "it forgets" in printed


def test_a_criterion_without_bounds_is_printed_too(tmp_path: Path) -> None:
    made = report(0.0)
    few = replace(made.paired[0], groups=("one",) * 30)
    made = replace(made, paired=(few, made.paired[1]))
    made = replace(made, verdict=regate(made))
    out = io.StringIO()
    print_table(made, Console(file=out, width=120))
    assert "? … ?" in out.getvalue()
    write_html(made, tmp_path / "retention.html")
    assert from_json(RetentionReport, to_json(made)) == made
