"""Rows of a table: kept as soon as they are made, made once, refused where their settings are others."""

import pytest

from enmp_jax.errors import UserError
from enmp_jax.runs.rows import Rows


def never():
    raise AssertionError("made again")


def test_a_row_is_made_once_and_read_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = Rows(path)
    assert not rows.check("a", {"n": 1})
    assert rows.row("a", {"n": 1, "of": (1, 2)}, lambda: {"x": 0.5}) == {"x": 0.5}
    assert rows.row("a", {"n": 1, "of": (1, 2)}, never) == {"x": 0.5}
    again = Rows(path)
    assert again.check("a", {"n": 1, "of": [1, 2]}) and again.row("a", {"n": 1, "of": [1, 2]}, never) == {
        "x": 0.5
    }
    assert list(again.finished) == ["a"]


def test_other_settings_are_named(tmp_path):
    Rows(tmp_path / "rows.jsonl").row("a", {"n": 1, "of": 2, "same": 3}, dict)
    rows = Rows(tmp_path / "rows.jsonl")
    for ask in (
        lambda: rows.row("a", {"n": 2, "same": 3}, never),
        lambda: rows.check("a", {"n": 2, "same": 3}),
    ):
        with pytest.raises(UserError, match="the row a was made with other settings for n, of: choose"):
            ask()


def test_half_a_line_is_forgotten_and_written_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    Rows(path).row("a", {}, lambda: {"x": 1})
    whole = path.read_text()
    for part in ('{"row": "b", "set', '{"row": "b"}', whole.replace('"a"', '"b"').rstrip("\n}")):
        path.write_text(whole + part)
        rows = Rows(path)
        assert list(rows.finished) == ["a"]
        rows.row("c", {}, lambda: {"x": 2})
        assert list(Rows(path).finished) == ["a", "c"]


def test_damage_before_the_last_line_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = Rows(path)
    rows.row("a", {}, dict)
    rows.row("b", {}, dict)
    path.write_text(path.read_text()[5:])
    with pytest.raises(UserError, match=r"rows.jsonl is damaged in line 1"):
        Rows(path)


def test_without_a_path_nothing_is_kept_on_disk():
    rows = Rows(None)
    assert rows.row("a", {}, lambda: {"x": 1}) == rows.row("a", {}, never) == {"x": 1}
