"""What is said of a split that nobody can have meant, and that nothing is said of others."""

from __future__ import annotations

from rdtf_ds.data.indexing.split_check import split_doubts
from tests.data.made_index import found, make_index


def window(video: str, number: int) -> dict:
    return found(video, path=f"{video}#{number:04d}", window_first=4 * number, window_count=4)


def test_a_share_that_holds_out_nothing(tmp_path):
    clips = [found("a.gif"), found("b.gif")]
    (told,) = split_doubts(make_index(tmp_path / "none", clips, validation_fraction=0.05))
    assert "rdtf.data.validation_fraction is 0.05" in told and "Raise it" in told and "rdtf.data.group_pattern" in told
    clips[1] |= {"held_out": True}
    assert split_doubts(make_index(tmp_path / "some", clips, validation_fraction=0.05)) == []
    assert split_doubts(make_index(tmp_path / "off", clips[:1])) == []


def test_a_pattern_that_matches_no_path(tmp_path):
    clips = [found("x/a.gif"), found("y/b.gif")]
    (told,) = split_doubts(make_index(tmp_path / "none", clips, group_pattern="^z"))
    assert "rdtf.data.group_pattern is '^z'" in told and "'x/a.gif'" in told
    assert split_doubts(make_index(tmp_path / "last", clips, group_pattern="^y")) == [], "one is enough, wherever it stands"


def test_a_pattern_is_searched_in_the_path_of_a_windows_video(tmp_path):
    clips = [found("a#1.gif"), window("v_1.mp4", 0), window("v_1.mp4", 1)]
    index = make_index(tmp_path / "windows", clips, group_pattern=r"(\d)\.mp4$")
    assert list(index.file_paths()) == ["a#1.gif", "v_1.mp4", "v_1.mp4"] and split_doubts(index) == []
    assert len(split_doubts(make_index(tmp_path / "number", clips[1:], group_pattern="#"))) == 1


def test_both_at_once(tmp_path):
    assert len(split_doubts(make_index(tmp_path, [found("a.gif")], validation_fraction=0.5, group_pattern="^z"))) == 2
