"""The home dataset: Home Assistant commands and the intent each one means, as JSON.

The sentences are drawn from the templates the Home Assistant community wrote (package home-assistant-intents); nobody
logged them. Names of rooms and devices are ours. Every row is read back by Home Assistant's own parser, hassil.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pitstop.demo import dataset, household
from pitstop.demo.dataset import DatasetCard, Row
from pitstop.errors import MissingExtra, UsageError
from pitstop.progress import progress

if TYPE_CHECKING:
    from hassil.expression import Expression, ListReference, Sentence
    from hassil.intents import IntentData, Intents, SlotList

VERSIONS = {"home-assistant-intents": "2026.10.27", "hassil": "3.12.1"}  # other versions give other rows
SEED = 0
ROWS_PER_INTENT = 250
ROWS_PER_TEMPLATE = 16  # more where an intent has few templates: enough for SMALL_INTENT rows
SMALL_INTENT = 60
WALKS, READS = 300, 8  # tries at one new sentence before its template counts as exhausted
TEST, VALID = 150, 100  # of 1000 templates
SPLIT_RULE = (
    f"by template: sha256(template) % 1000 < {TEST} is test, the next {VALID} valid, the rest train; no training "
    "sentence fits a held-out template of its intent; an intent left without training rows is moved to train whole"
)
# One order of keys for every row, so that the next key never depends on how the sentence was put.
KEYS = (
    "domain",
    "device_class",
    "media_class",
    "name",
    "area",
    "floor",
    "item",
    "search_query",
    "message",
    "conversation_command",
    "state",
    "fan_mode",
    "color",
    "brightness",
    "temperature",
    "position",
    "percentage",
    "volume_level",
    "volume_step",
    "hours",
    "minutes",
    "seconds",
    "start_hours",
    "start_minutes",
    "start_seconds",
)


@dataclass
class Template:
    """One sentence template of one intent, and the rows drawn from it."""

    intent: str
    data: "IntentData"
    sentence: "Sentence"
    text: str
    rng: random.Random
    split: str
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    exhausted: bool = False


def build(folder: Path) -> DatasetCard:
    """Write the home dataset into a folder, the same bytes every time, and return its card.

    Raises:
        MissingExtra: the packages that hold the templates are not installed.
        UsageError: they are of another version.
        StorageError: the disk refused.
    """
    source = [f"{package}=={version}" for package, version in VERSIONS.items()]
    code = dataset.builder_digest(__file__, household.__file__)
    if (card := dataset.finished(folder, code, source)) is not None:
        return card
    home = Home(load_templates())
    home.draw()
    return dataset.write(
        folder,
        home.splits(),
        name="home",
        description="Home Assistant commands to JSON intents, sampled from community-written templates",
        licence="Apache-2.0",
        source=source,
        builder=code,
        seed=SEED,
        split_rule=SPLIT_RULE,
    )


def load_templates() -> dict[str, Any]:
    """Read the English templates of the installed package.

    Raises:
        MissingExtra: it is not installed.
        UsageError: it, or hassil, is of another version.
    """
    for package, wanted in VERSIONS.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise MissingExtra("demo", "demo") from error
        if found != wanted:
            raise UsageError(
                f"the demo's home dataset is made with {package} {wanted}, {found} is installed",
                cure=f'pip install "{package}=={wanted}"',
            )
    spec = importlib.util.find_spec("home_assistant_intents")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("demo", "demo")
    path = Path(spec.submodule_search_locations[0]) / "data" / "en.json"
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


class Home:
    """Templates, the household's names, and the parser that checks every sentence."""

    def __init__(self, source: Mapping[str, Any]) -> None:
        from hassil import Intents
        from hassil.intents import TextSlotList

        self.intents: Intents = Intents.from_dict(dict(source))
        names = [(name, name, {"domain": domain}) for name, domain in household.all_devices()]
        self.lists: dict[str, SlotList] = {
            **self.intents.slot_lists,
            "area": TextSlotList.from_strings(household.listed(household.AREAS), name="area"),
            "floor": TextSlotList.from_strings(household.listed(household.FLOORS), name="floor"),
            "name": TextSlotList.from_tuples(names, allow_template=False, name="name"),
        }
        self.templates = list(self._templates())
        self.held_out = self._only_held_out()
        self.prompts: set[str] = set()

    def _templates(self) -> Iterator[Template]:
        for intent in self.intents.intents.values():
            for number, data in enumerate(intent.data):
                if "area" in data.requires_context:
                    continue  # the room would come from the device that listens, not from the text
                for sentence in data.sentences:
                    text = sentence.text or ""
                    rng = random.Random(f"{SEED} {intent.name} {number} {text}")
                    yield Template(intent.name, data, sentence, text, rng, split_of(text))

    def _only_held_out(self) -> "dict[str, Intents]":
        """For each intent, a parser that knows its held-out templates and nothing else."""
        from hassil.intents import Intent

        kept: dict[str, list[IntentData]] = defaultdict(list)
        for template in self.templates:
            if template.split != "train":
                kept[template.intent].append(dataclasses.replace(template.data, sentence_texts=[template.text]))
        return {
            name: dataclasses.replace(self.intents, intents={name: Intent(name, data)}) for name, data in kept.items()
        }

    def draw(self) -> None:
        """Fill the templates, one sentence each in turn, until their intent has enough or nothing new comes."""
        by_intent: dict[str, list[Template]] = defaultdict(list)
        for template in self.templates:
            by_intent[template.intent].append(template)
        with progress("home dataset", len(self.templates), "templates") as advance:
            for intent, templates in by_intent.items():
                self._fill(templates)
                if not any(template.rows for template in templates if template.split == "train"):
                    self._train_on_all(intent, templates)
                advance(len(templates), intent)

    def _train_on_all(self, intent: str, templates: list[Template]) -> None:
        """Give up holding out templates of an intent: nobody can guess the name of an intent never shown."""
        self.held_out.pop(intent, None)
        for template in templates:
            self.prompts -= template.rows.keys()
            template.split, template.exhausted, template.rows = "train", False, {}
        self._fill(templates)

    def _fill(self, templates: list[Template]) -> None:
        each = max(ROWS_PER_TEMPLATE, SMALL_INTENT // len(templates))
        for _ in range(each):
            for template in templates:
                if sum(len(other.rows) for other in templates) < ROWS_PER_INTENT and not template.exhausted:
                    self._add_row(template)

    def _add_row(self, template: Template) -> None:
        reads = 0
        for _ in range(WALKS):
            walk = Walk(template, self.lists, self.intents.expansion_rules)
            prompt, slots = walk.sentence()
            if prompt in self.prompts or not household.sounds_natural(prompt, slots, walk.domain):
                continue
            self.prompts.add(prompt)
            if self._means(prompt, template.intent, slots) and not self._leaks(prompt, template):
                template.rows[prompt] = slots
                return
            reads += 1
            if reads == READS:
                break
        template.exhausted = True

    def _means(self, prompt: str, intent: str, slots: Mapping[str, Any]) -> bool:
        """Tell whether Home Assistant's parser reads exactly this intent and these slots out of the prompt."""
        return self.parse(prompt) == (intent, slots)

    def parse(self, prompt: str) -> tuple[str, dict[str, Any]] | None:
        """Return the intent and slots that hassil finds in a prompt."""
        from hassil import recognize_best

        result = recognize_best(prompt, self.intents, slot_lists=self.lists, best_slot_name="name")
        if result is None:
            return None
        return result.intent.name, {key: plain(entity.value) for key, entity in result.entities.items()}

    def _leaks(self, prompt: str, template: Template) -> bool:
        """Tell whether a training sentence could as well have come from a held-out template of its intent."""
        from hassil import recognize

        if template.split != "train" or template.intent not in self.held_out:
            return False
        return recognize(prompt, self.held_out[template.intent], slot_lists=self.lists) is not None

    def splits(self) -> dict[str, list[Row]]:
        """Return the rows of every split, in the order of their ids: one fixed shuffle."""
        splits: dict[str, list[Row]] = {name: [] for name in dataset.SPLITS}
        for template in self.templates:
            for prompt, slots in template.rows.items():
                completion = dataset.compact({"intent": template.intent, **ordered(slots)})
                digest = hashlib.sha256(prompt.encode()).hexdigest()
                splits[template.split].append(Row(f"home-{digest[:12]}", prompt, completion, template.text))
        for rows in splits.values():
            rows.sort(key=lambda row: row.id)
        return splits


class Walk:
    """One walk through a template: the words said, and the slots they stand for."""

    def __init__(self, template: Template, lists: "Mapping[str, SlotList]", rules: "Mapping[str, Sentence]") -> None:
        self.template, self.lists = template, {**lists, **template.data.slot_lists}
        self.rules = {**rules, **template.data.expansion_rules}
        self.rng = template.rng
        self.slots: dict[str, Any] = {}
        self.domain: str | None = None

    def sentence(self) -> tuple[str, dict[str, Any]]:
        """Return the words and all slots, those the template fixes included."""
        words = " ".join(self._say(self.template.sentence.expression).split())
        return words, {**self.template.data.slots, **self.slots}

    def _say(self, part: "Expression") -> str:
        from hassil.expression import Alternative, Group, ListReference, Permutation, RuleReference, TextChunk

        if isinstance(part, TextChunk):
            return part.original_text
        if isinstance(part, RuleReference):
            return self._say(self.rules[part.rule_name].expression)
        if isinstance(part, ListReference):
            return self._say_list(part)
        assert isinstance(part, Group), part
        if isinstance(part, Alternative):
            return self._say(self.rng.choice(part.items)) if part.items else ""
        if isinstance(part, Permutation):
            return " ".join(self._say(item) for item in self.rng.sample(part.items, len(part.items)))
        return "".join(self._say(item) for item in part.items)

    def _say_list(self, reference: "ListReference") -> str:
        from hassil.intents import RangeSlotList, TextSlotList

        values, name = self.lists[reference.list_name], reference.list_name
        if name == "name":
            said = value = self._device()
        elif isinstance(values, TextSlotList):
            chosen = self.rng.choice(values.values)
            said, value = self._say(chosen.text_in), chosen.value_out
        elif isinstance(values, RangeSlotList):
            drawn = household.number(name, self.rng)
            said, value = f"{drawn:g}", plain(drawn * (values.multiplier or 1))
        else:
            said = value = household.wildcard(name, self.slots, self.rng)
        self.slots[reference.slot_name] = value
        return f"{reference.prefix or ''}{said}{reference.suffix or ''}"

    def _device(self) -> str:
        self.domain = self.rng.choice(self.template.data.requires_context["domain"])
        return self.rng.choice(household.device_names(str(self.domain), self.template.text))


def split_of(template: str) -> str:
    """Return the split a template belongs to."""
    place = int(hashlib.sha256(template.encode()).hexdigest(), 16) % 1000
    if place < TEST:
        return "test"
    return "valid" if place < TEST + VALID else "train"


def plain(value: Any) -> Any:
    """Return a whole float as the int that people write."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def ordered(slots: Mapping[str, Any]) -> dict[str, Any]:
    """Return the slots in the order of KEYS."""
    return {key: slots[key] for key in sorted(slots, key=KEYS.index)}
