"""What is generated is up to date."""

import docs


def test_names_for_help_are_up_to_date() -> None:
    assert docs.NAMES.read_text() == docs.names_file(), "run make docs"


def test_readme_is_up_to_date() -> None:
    assert docs.README.read_text() == docs.readme(), "run make docs"
