import json

import hostile
import numpy as np
import pytest
import yaml
from PIL import Image

from mmkd.reading import (
    DEEPEST_YAML,
    OversizedError,
    check_picture,
    decodes,
    opened_picture,
    read_json,
    read_yaml,
)


def test_json_comes_as_it_was_written(tmp_path):
    content = dict(a=[1, 2.5, None, True, 'ä'], b=dict(c='x' * 1000))
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(content), encoding='utf-8')
    assert read_json(path, 'who', kind=dict) == content


def test_a_message_says_who_what_where_and_what_to_do(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text('[1]')
    with pytest.raises(ValueError) as caught:
        read_json(path, 'me', 'a card', 'Make it again.', dict)
    assert str(caught.value) == (
        f'me expected a card in {str(path)!r}, got a list. Make it again.'
    )


def test_what_is_not_there_is_left_to_the_caller(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / 'a.json', 'me')
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / 'a.yaml')


def test_yaml_comes_as_it_was_written(tmp_path):
    content = dict(names={0: 'cat', 1: 'dog'}, train=['a', 'b'], nc=2, x=None)
    path = tmp_path / 'a.yaml'
    path.write_text(yaml.safe_dump(content))
    assert read_yaml(path) == content


def test_a_name_in_yaml_that_nobody_repeats_is_harmless(tmp_path):
    path = tmp_path / 'a.yaml'
    path.write_text('a: &name [1, 2]')
    assert read_yaml(path) == dict(a=[1, 2])


@pytest.mark.parametrize('more', [0, 1])
def test_yaml_has_a_depth(more, tmp_path):
    path = tmp_path / 'a.yaml'
    depth = DEEPEST_YAML + more
    path.write_text('[' * depth + ']' * depth)
    if not more:
        read_yaml(path)
        return
    with pytest.raises(ValueError, match='too deep'):
        read_yaml(path)


def test_many_neighbours_are_not_deep(tmp_path):
    path = tmp_path / 'a.yaml'
    path.write_text('[' + '[1], {a: 2}, ' * 2 * DEEPEST_YAML + ']')
    assert len(read_yaml(path)) == 4 * DEEPEST_YAML


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'bmp', 'tif', 'webp'])
def test_pictures_of_every_usual_kind_are_opened(suffix, tmp_path):
    path = tmp_path / f'a.{suffix}'
    Image.fromarray(np.full((6, 8, 3), 90, np.uint8)).save(path)
    check_picture(path)
    assert decodes(path)
    with opened_picture(path) as image:
        assert image.size == (8, 6)


def test_a_picture_of_another_kind_says_what_it_is(tmp_path):
    path = tmp_path / 'a.png'
    path.write_text('a text')
    with pytest.raises(ValueError, match=r'a\.png. of 6 bytes is no image'):
        check_picture(path)


def test_a_vast_picture_is_not_called_damaged(tmp_path):
    hostile.vast_png(tmp_path / 'a.png')
    for read in (check_picture, decodes):
        with pytest.raises(OversizedError, match='Cut it into tiles'):
            read(tmp_path / 'a.png')
