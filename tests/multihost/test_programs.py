"""Compiled programs on their way from host 0's cache to another host's."""

import pytest

from jaxserve.engine import follow
from jaxserve.engine.plan_stream import MAX_FRAME_BYTES, encode_frame


@pytest.mark.parametrize("content", [b"x", b"abc", b"abcdefgh"], ids=len)
def test_program_comes_in_pieces_and_is_whole_before_it_has_its_name(tmp_path, monkeypatch, content):
    monkeypatch.setattr(follow, "PIECE_BYTES", 3)
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    (here / "a-cache").write_bytes(content)
    pieces = list(follow.pieces_of(here / "a-cache"))
    assert max(len(piece.content) for piece in pieces) <= 3
    for _ in range(2):  # the second time over what a start before left behind
        for piece in pieces:
            assert not (there / "a-cache").exists()
            follow.keep(there, piece)
        assert (there / "a-cache").read_bytes() == content
        (there / "a-cache").unlink()
        follow.keep(there, pieces[0]) if len(pieces) > 1 else None


def test_piece_fits_a_message(tmp_path):
    (tmp_path / "a-cache").write_bytes(bytes(follow.PIECE_BYTES + 1))
    first, last = follow.pieces_of(tmp_path / "a-cache")
    assert (len(first.content), len(last.content)) == (follow.PIECE_BYTES, 1)
    assert len(encode_frame(first)) < MAX_FRAME_BYTES / 2


def test_name_of_a_program_is_that_of_a_file_alone(tmp_path):
    (tmp_path / "cache").mkdir()
    follow.keep(tmp_path / "cache", follow.Program("../evil", b"x"))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["evil"]
    assert (tmp_path / "cache" / "evil").exists()
