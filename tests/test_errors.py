"""How errors are told: by their first line, under the name of what they are about."""

from __future__ import annotations

import pytest

from trainer.errors import UserError, first_line, naming


def test_an_error_is_told_by_its_first_line_or_else_its_kind() -> None:
    assert [first_line(ValueError("\n one\ntwo")), first_line(ValueError(" ")), first_line("text")] == [
        "one", "ValueError", "text"]


def test_what_a_user_can_mend_begins_with_what_it_is_about_and_a_bug_stays_as_it_is() -> None:
    with pytest.raises(UserError, match="^a file: too long$"), naming("a file"):
        raise UserError("too long")
    with pytest.raises(ValueError, match="^odd$"), naming("a file"):
        raise ValueError("odd")
