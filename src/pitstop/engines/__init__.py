"""One interface to run a base with adapters; each file imports its own library, and only it."""
