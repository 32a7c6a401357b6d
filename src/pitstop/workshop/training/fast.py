"""What makes a training fast on a processor, put into a model at once."""

from typing import Any

from peft import PeftModel

from pitstop.engines.activation import Activation
from pitstop.workshop.training import attention
from pitstop.workshop.training.elementwise import slim
from pitstop.workshop.training.lora import fuse


def make_fast(adapted: PeftModel) -> Activation:
    """Let a frozen base with one LoRA compute what it computes, in fewer and cheaper steps.

    Returns:
        What says where the LoRA acts in the rows of a batch.
    """
    base: Any = adapted.get_base_model()
    attention.use(base)
    activation = Activation()
    fuse(adapted, activation)
    slim(adapted)
    activation.watch(adapted, "default")
    return activation
