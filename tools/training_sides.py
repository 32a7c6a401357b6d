"""One training of `bench_train.py`, in a process of its own: by pitstop, or by TRL's SFTTrainer on the same NF4 base.

python tools/training_sides.py JOB    # a Job as JSON; prints an Outcome as JSON
"""

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

from pitstop import progress
from pitstop.engines.activation import Activation
from pitstop.workshop import base_model
from pitstop.workshop.dataset import encode, load_rows
from pitstop.workshop.recipe import LINEAR_MODULES, BaseChoice, Data, Recipe, Train
from pitstop.workshop.training import attention
from pitstop.workshop.training import trainer as trainers
from pitstop.workshop.training.attach import attach
from pitstop.workshop.training.batches import Batches
from pitstop.workshop.training.elementwise import slim
from pitstop.workshop.training.lora import fuse

RANK, ALPHA, RATE, WARMUP = 16, 32.0, 5e-4, 5
UNTIMED = 2  # steps: kernels are chosen in them


@dataclass(frozen=True)
class Job:
    """What to train."""

    side: str
    base: str  # prepared base folder
    rows: str  # JSONL
    test: str  # JSONL; empty: no loss is taken
    steps: int
    batch: int
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What it took."""

    speed: float  # real tokens a second, padding not counted
    cpu_speed: float  # the same a second of processor time: what other programs take does not count
    peak: float  # MB of the process
    loss: float  # held out, nats per answer token; NaN: not taken
    tokens: int  # real ones of all steps


class Clock(TrainerCallback):
    """Takes the time of every step."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.cpu_ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note when a step ended."""
        self.ends.append(time.perf_counter())
        self.cpu_ends.append(time.process_time())


def main() -> None:
    """Train one job and print what it took."""
    job = Job(**json.loads(sys.argv[1]))
    progress.be_quiet()
    torch.manual_seed(job.seed)
    clock = Clock()
    model, tokens = _pitstop(job, clock) if job.side == "pitstop" else _trl(job, clock)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    seconds, cpu_seconds = (ends[-1] - ends[UNTIMED - 1] for ends in (clock.ends, clock.cpu_ends))
    timed = sum(tokens[UNTIMED:])
    loss = held_out(model, AutoTokenizer.from_pretrained(Path(job.base, "hf")), Path(job.test)) if job.test else None
    found = Outcome(timed / seconds, timed / cpu_seconds, peak, loss or float("nan"), sum(tokens))
    print(json.dumps(asdict(found)))


def _pitstop(job: Job, clock: Clock) -> tuple[Any, list[int]]:
    recipe = Recipe(
        "bench",
        BaseChoice(Path(job.base), precision="nf4"),
        Data(Path(job.rows), test_share=0.0, max_tokens=job.max_tokens),
        train=Train(
            steps=job.steps,
            batch=job.batch,
            learning_rate=RATE,
            warmup_steps=WARMUP,
            rank=RANK,
            alpha=ALPHA,
            seed=job.seed,
            checkpoint_every=job.steps,
        ),
    )
    ref, tokenizer = base_model.load_ref(recipe.base.folder), base_model.load_tokenizer(recipe.base.folder)
    rows = encode(load_rows(recipe.data.train), tokenizer, ref.prompting, job.max_tokens)
    model = base_model.load_weights(recipe.base.folder, ref, precision="nf4", artifact="q8_0")
    attention.use(model)
    adapted, activation = attach(model, recipe), Activation()
    fuse(adapted, activation)
    slim(adapted)
    batches = Batches(rows.examples, [], recipe.train, recipe.retain, pad=tokenizer.pad_token_id or 0)
    trainer = trainers.make(adapted, batches, recipe, activation=activation, invocation=())
    trainer.add_callback(clock)
    trainer.train()
    return adapted, batches.tokens_per_step


def _trl(job: Job, clock: Clock) -> tuple[Any, list[int]]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    folder = Path(job.base, "hf")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.bfloat16)
    rows = [json.loads(line) for line in Path(job.rows).read_text().splitlines()]
    chats = [
        {
            "prompt": [{"role": "user", "content": one["prompt"]}],
            "completion": [{"role": "assistant", "content": one["completion"]}],
        }
        for one in rows
    ]
    arguments = SFTConfig(
        output_dir="trl",
        max_steps=job.steps,
        per_device_train_batch_size=job.batch,
        max_length=job.max_tokens,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        gradient_checkpointing=job.side.endswith("checkpointed"),
        bf16=True,
        use_cpu=True,
        seed=job.seed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=5,
    )
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(LINEAR_MODULES), task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(chats),
        peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[clock],
    )
    tokens: list[int] = []
    collate = trainer.data_collator

    def counting(batch: list[Any]) -> Any:
        made = collate(batch)
        tokens.append(int(made["attention_mask"].sum()))
        return made

    trainer.data_collator = counting
    trainer.train()
    return trainer.model, tokens[: job.steps]


def held_out(model: Any, tokenizer: Any, file: Path) -> float:
    """Return the mean loss over the answer tokens of held-out rows, by transformers' own way to the logits."""
    model.eval()
    total, count = 0.0, 0
    for line in file.read_text().splitlines():
        one = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": one["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(one["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=torch.tensor([before + answer])).logits[0, len(before) - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    return total / count


if __name__ == "__main__":
    main()
