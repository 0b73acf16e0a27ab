import pytest

from mmkd.files import check_free, remove_unfinished, whole


def test_what_is_not_finished_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(KeyboardInterrupt), whole(path) as part:
        part.write_text('ne')
        raise KeyboardInterrupt
    assert path.read_text() == 'old'
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_finished_takes_its_place(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with whole(path) as part:
        part.write_text('new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new'
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_only_where_that_is_said(tmp_path):
    path = tmp_path / 'file'
    check_free(path)
    path.write_text('old')
    with pytest.raises(FileExistsError, match='file is there.*--overwrite'):
        check_free(tmp_path / 'other', path)
    check_free(path, overwrite=True)


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    with whole(tmp_path / 'file') as part:
        part.write_text('new')
        part.with_name('.other.part').write_text('ne')  # as SIGKILL leaves it
    (tmp_path / 'a.part').write_text("somebody's")
    (tmp_path / '.folder.part').mkdir()
    (removed,) = remove_unfinished(tmp_path)
    assert removed == tmp_path / '.other.part'
    assert {one.name for one in tmp_path.iterdir()} == {
        'file',
        'a.part',
        '.folder.part',
    }
