"""What numbers this machine computes with: bfloat16 where it has instructions for them, else float32."""

from functools import cache
from typing import Any

import torch

STORED = torch.bfloat16  # what matrices are rounded to: they are the same on every machine, whatever it computes with
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # as torch names what processors have


@cache
def compute_dtype() -> torch.dtype:
    """Return the type that matrices are kept and multiplied in.

    A processor without instructions for bfloat16 takes 4 to 5 times as long in it as in float32 (measured with
    AVX-512), one with them half as long.
    """
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not tell
        native = any(has.get(name) for name in BFLOAT16)
    return torch.bfloat16 if native else torch.float32
