"""Fixtures of the page in a browser, from tests/phone_site.py."""

from phone_site import built_page, chromium, server, site, tiny, tiny_adapters, visitor

__all__ = ["built_page", "chromium", "server", "site", "tiny", "tiny_adapters", "visitor"]
