"""What the tests of the page ask of a tab, whichever browser it is in."""

import json
from abc import ABC, abstractmethod
from typing import Any

PATIENCE = 60  # seconds; what takes this long hangs


class PageError(AssertionError):
    """The browser could not do what a test asked."""


class Page(ABC):
    """One tab."""

    @abstractmethod
    def goto(self, url: str) -> None:
        """Load an address."""

    @abstractmethod
    def run(self, script: str) -> Any:
        """Return the value of an expression in the page."""

    @abstractmethod
    def wait_until(self, condition: str) -> None:
        """Wait until an expression in the page is true; raises a PageError."""

    def wait(self, condition: str) -> None:
        """Wait until an expression in the page is true; if it never is, say what the page shows."""
        try:
            self.wait_until(condition)
        except PageError as error:
            shown = self.run("document.body.innerText")
            raise PageError(f"never came true: {condition}\n{error}\nthe page shows:\n{shown}") from error

    def wait_for_text(self, text: str, where: str = "body") -> str:
        """Wait until an element shows a text, and return all of its text."""
        element = f"(document.querySelector({json.dumps(where)})?.innerText ?? '')"
        self.wait(f"{element}.includes({json.dumps(text)})")
        return str(self.run(element))

    def press(self, selector: str) -> None:
        """Press a button once it can be."""
        self.wait(f"document.querySelector({json.dumps(selector)})?.disabled === false")
        self.run(f"document.querySelector({json.dumps(selector)}).click()")
