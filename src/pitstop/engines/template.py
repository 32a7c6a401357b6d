"""Chat messages to the prompt text, by the base's own template; the same code trains, checks and serves."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

from pitstop.bundle.manifest import Prompting
from pitstop.errors import BrokenInput, UsageError

Message = Mapping[str, str]  # {"role": "user", "content": "…"}


def render(prompting: Prompting, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
    """Render messages with the chat template; the adapter's system message goes first unless one is given.

    Raises:
        UsageError: the template refuses these messages (roles out of order, say).
        BrokenInput: the template itself cannot be read.
    """
    if prompting.system is not None and not any(message["role"] == "system" for message in messages):
        messages = [{"role": "system", "content": prompting.system}, *messages]
    try:
        return _compiled(prompting.chat_template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=prompting.bos_token,
            eos_token=prompting.eos_token,
        )
    except jinja2.TemplateSyntaxError as error:
        raise BrokenInput(f"the chat template cannot be read: {error}") from error
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise UsageError(f"the chat template refuses these messages: {error}") from error


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    # A template comes from outside: the sandbox keeps it from reaching Python. trim/lstrip as transformers sets them.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return environment.from_string(template)


def _refuse(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))
