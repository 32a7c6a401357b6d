"""A suite in words, for people: what it is, how its figures are to be read, and some of its items."""

from pitstop.retention.suite import AnswerItem, ChatItem, ChoiceItem, ClozeItem, Item, Suite, SuiteRecord, TextItem

WIDTH = 300  # characters shown of a text


def describe(suite: Suite, items: int) -> str:
    """Return the record and the first items, which are a random sample if the suite was built by pitstop."""
    record = suite.record
    groups = len({item.group for item in suite.items})
    facts = {
        "suite": f"{record.name}, {record.count} {record.kind} items in {groups} groups",
        "about": record.description,
        "guards": record.guards if record.purpose == "retention" else "nothing: it gives KL to the base",
        "scoring": record.scoring + (f", neutral prompt {record.neutral!r}" if record.neutral else ""),
        "scale": scale(record),
        "source": record.source,
        "licence": record.license,
        "digest": record.items_sha256,
    }
    if record.kind != "choice":
        del facts["scoring"]
    lines = [f"{name:8} {words}" for name, words in facts.items()]
    return "\n".join([*lines, *(f"\n{_shown(item)}" for item in suite.items[:items])])


def scale(record: SuiteRecord) -> str:
    """Say what the lowest and the highest figure of a suite mean."""
    if record.purpose == "drift":
        return "KL to the base in nats per token: 0 is the base itself, and there is no highest"
    if record.guards == "stereotype":
        return "share of items: 50 % is no preference, a change either way counts"
    match record.kind:
        case "choice":
            return f"accuracy: {record.chance or 0:.1%} is guessing, where nothing is left to forget; 100 % is all"
        case "cloze":
            return "accuracy: 0 % is the floor, for guessing gives nothing; 100 % would be to foresee every word"
        case "answer":
            return "share of answers that keep their rule: 0 % to 100 %"
        case "text" | "chat":
            return "bits per byte, less is better: about 8 is knowing nothing, and no text goes down to 0"


def _shown(item: Item) -> str:
    match item:
        case ChoiceItem():
            options = [f"  {'*' if at == item.answer else ' '} {option}" for at, option in enumerate(item.options)]
            return "\n".join([f"{item.id}  {_short(item.prompt)}", *map(_short, options)])
        case ClozeItem():
            return f"{item.id}  {_short(item.prompt)}\n  * {item.answer}"
        case AnswerItem():
            rule = " ".join([item.checker, *map(repr, item.arguments)])
            return f"{item.id}  {_short(item.prompt)}\n  rule: {rule}, within {item.max_tokens} tokens"
        case ChatItem():
            return f"{item.id}  {_short(item.prompt)}\n  > {_short(item.reply)}"
        case TextItem():
            return f"{item.id}  {_short(item.given + item.text)}"


def _short(text: str) -> str:
    return text if len(text) <= WIDTH else f"{text[:WIDTH]} …"
