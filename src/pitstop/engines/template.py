"""Chat messages to the prompt text, by the base's own template; the same code trains, checks and serves."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
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
    return "".join(_parts(prompting, messages, add_generation_prompt))


def generated(prompting: Prompting, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """Render a whole conversation; say which characters the template's own `{% generation %}` blocks hold.

    Raises:
        UsageError, BrokenInput: as `render`.
    """
    text, spans = "", []
    for part in _parts(prompting, messages, add_generation_prompt=False):
        if isinstance(part, _Generated) and part:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return text, spans


class _Generated(str):
    """What a generation block rendered: it stays apart from the text around it."""

    __slots__ = ()


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, as transformers has it: marks the assistant's words in a template."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return _Generated(caller())


def _parts(prompting: Prompting, messages: Sequence[Message], add_generation_prompt: bool) -> list[str]:
    if prompting.system is not None and not any(message["role"] == "system" for message in messages):
        messages = [{"role": "system", "content": prompting.system}, *messages]
    try:
        parts = _compiled(prompting.chat_template).generate(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=prompting.bos_token,
            eos_token=prompting.eos_token,
        )
        return list(parts)
    except jinja2.TemplateSyntaxError as error:
        raise BrokenInput(f"the chat template cannot be read: {error}") from error
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise UsageError(f"the chat template refuses these messages: {error}") from error


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    # A template comes from outside: the sandbox keeps it from reaching Python. trim/lstrip as transformers sets them.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return environment.from_string(template)


def _refuse(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))
