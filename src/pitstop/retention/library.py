"""Functions out of Python's own library: code to measure, and other code to mix into training."""

import ast
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from pitstop.errors import BrokenInput

# Modules that change little from one Python to the next. No module stands in both lists.
SUITE_MODULES = tuple(
    """
    argparse ast bisect calendar cmd code codecs collections/__init__ configparser contextlib copy csv dataclasses
    difflib dis enum filecmp fileinput fnmatch fractions functools getopt glob graphlib gzip heapq html/parser
    inspect ipaddress json/decoder json/encoder locale mailbox mimetypes netrc numbers operator optparse os pathlib
    pickletools posixpath pprint queue quopri random reprlib sched selectors shelve shlex shutil statistics string
    stringprep tarfile tempfile textwrap timeit tokenize traceback types typing urllib/parse uuid weakref zipfile
    """.split()  # noqa: SIM905
)
REPLAY_MODULES = tuple(
    """
    asyncio/base_events asyncio/locks asyncio/queues asyncio/streams asyncio/tasks concurrent/futures/thread doctest
    email/header email/message ftplib http/client http/cookies http/server imaplib logging/__init__ logging/config
    logging/handlers multiprocessing/managers multiprocessing/pool pdb poplib profile pydoc smtplib socket
    socketserver subprocess threading trace turtle unittest/case unittest/mock xml/dom/minidom zipapp
    """.split()  # noqa: SIM905
)
CHARACTERS = (150, 480)  # about 50 to 160 tokens
LINES = (6, 30)


def functions(modules: Sequence[str]) -> list[str]:
    """Return the functions of these modules that are neither short nor long, each once.

    Raises:
        BrokenInput: Python was installed without the source of its library.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    found = list(dict.fromkeys(text for module in modules for text in _functions(folder / f"{module}.py")))
    if not found:
        raise BrokenInput("Python's own library has no source files here", where=folder)
    return found


def _functions(path: Path) -> Iterator[str]:
    if not path.is_file():
        return
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            whole = text.startswith("def ")  # a text inside it may stand further left than the function does
            if whole and LINES[0] <= len(text.splitlines()) <= LINES[1] and CHARACTERS[0] <= len(text) <= CHARACTERS[1]:
                yield text
