"""Code to measure and code to train on never come from one module, and are of the length they are said to be."""

from pitstop.retention import library


def test_no_function_is_both_measured_and_trained_on() -> None:
    assert not set(library.SUITE_MODULES) & set(library.REPLAY_MODULES)
    assert not set(library.functions(library.SUITE_MODULES)) & set(library.functions(library.REPLAY_MODULES))


def test_functions_are_neither_short_nor_long() -> None:
    found = library.functions(library.REPLAY_MODULES)
    assert len(found) > 300
    for text in found:
        assert text.startswith("def ")
        assert library.LINES[0] <= len(text.splitlines()) <= library.LINES[1]
        assert library.CHARACTERS[0] <= len(text) <= library.CHARACTERS[1]
