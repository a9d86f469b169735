import pytest

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.corrupt import FILE_NAME, CorruptImages


def test_each_image_is_counted_once(tmp_path):
    record = CorruptImages(0.5, folder=tmp_path)
    record.expect(100)
    assert record.report(["b", "a", "b"]) == ["a", "b"]
    assert record.report(["a"]) == []
    assert record.report([]) == []
    assert (tmp_path / FILE_NAME).read_text() == "a\nb\n"
    assert record.summary() == f"2 of 100 training images could not be decoded (all in {tmp_path / FILE_NAME}): a, b"


def test_nothing_is_said_about_sound_data(tmp_path):
    record = CorruptImages(0.0, folder=tmp_path)
    record.expect(3)
    record.report([])
    assert record.summary() == ""
    assert not list(tmp_path.iterdir())


def test_limit_is_a_share_that_may_be_reached_and_not_exceeded():
    record = CorruptImages(0.01, folder=None)
    record.expect(200)
    record.report(["a", "b"])
    with pytest.raises(
        DataError, match=r"3 of 200 .*: a, b, c: got '1\.50%'; expected at most 1\.00% \(DATA\.MAX_CORRUPT"
    ):
        record.report(["c"])


def test_long_list_is_cut_and_the_file_holds_it_all(tmp_path):
    record = CorruptImages(1.0, folder=tmp_path / "new")
    record.expect(100)
    record.report([f"{index:02d}" for index in range(50)])
    assert record.summary().endswith("18, 19 and 30 more")
    assert len((tmp_path / "new" / FILE_NAME).read_text().split()) == 50


def test_rank_0_hears_of_the_others_and_decides_alone(tmp_path):
    ranks = [CorruptImages(0.1, folder=tmp_path, rank=rank, world_size=3) for rank in range(3)]
    for record in ranks:
        record.expect(20)
    ranks[1].report(["a"])
    ranks[2].report(["b"])
    assert ranks[0].report([]) == []
    assert ranks[0].paths == {"a", "b"}
    assert ranks[2].report(["c", "d", "e"]) == ["c", "d", "e"]  # over the limit, but rank 2 cannot save anything
    with pytest.raises(DataError, match="5 of 20"):
        ranks[0].report([])


def test_half_a_line_of_another_rank_is_left_for_later(tmp_path):
    record = CorruptImages(1.0, folder=tmp_path, world_size=2)
    record.expect(10)
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write("first\nsec")
        file.flush()
        record.report([])
        assert record.paths == {"first"}
        file.write("ond\n")
    record.report([])
    assert record.paths == {"first", "second"}


def test_list_of_an_earlier_run_is_forgotten(tmp_path):
    (tmp_path / FILE_NAME).write_text("repaired since\n")
    CorruptImages(0.0, folder=tmp_path, rank=1, world_size=2)
    assert (tmp_path / FILE_NAME).exists()
    CorruptImages(0.0, folder=tmp_path, rank=0, world_size=2)
    assert not (tmp_path / FILE_NAME).exists()
