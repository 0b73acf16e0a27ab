"""Files of others, read without trusting them.

JSON, plain YAML and pictures run nothing, but a few bytes can be nested so
deep, or claim to become so much, that the process dies of them. What is read
here has a bound, and what is beyond it is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageFile, UnidentifiedImageError

#: Bytes of JSON beyond which nothing is read: several times the largest
#: annotation files there are.
MOST_JSON = 2**33
#: Bytes of YAML: descriptions that a person writes.
MOST_YAML = 2**20
#: Lists and dicts in each other, in YAML.
DEEPEST_YAML = 50
#: What pictures may be, whatever their files are called. Pillow knows more,
#: and has other programs open some of it.
FORMATS = (
    'AVIF',
    'BMP',
    'DIB',
    'GIF',
    'JPEG',
    'JPEG2000',
    'MPO',
    'PNG',
    'PPM',
    'TIFF',
    'WEBP',
)


@cache
def _formats() -> tuple[str, ...]:
    """Those of :data:`FORMATS` that this Pillow knows."""
    Image.init()
    return tuple(one for one in FORMATS if one in Image.OPEN)


class OversizedError(ValueError):
    """A picture that would take more memory than pictures do."""


def read_json(
    path: str | Path,
    who: str,
    what: str = 'JSON',
    remedy: str = 'Copy or write it again.',
    kind: type | None = None,
) -> Any:
    """What a JSON file holds.

    Args:
        path: The file.
        who: Named in messages.
        what: That was expected there, for messages.
        remedy: What to do if it is something else.
        kind: Type that it must have as a whole.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON, of another kind, nested too deep or too
            large.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), 'a.json')
        >>> _ = path.write_text('[' * 10**5)
        >>> read_json(path, 'example')
        Traceback (most recent call last):
        ...
        ValueError: example expected JSON in ... nested too deep...
    """
    path = Path(path)
    start = f'{who} expected {what} in {str(path)!r}, got'
    size = path.stat().st_size
    if size > MOST_JSON:
        raise ValueError(
            f'{start} a file of {size} bytes; more than {MOST_JSON} are not '
            f'read. Divide it.'
        )
    try:
        with path.open(encoding='utf-8') as file:
            content = json.load(file)
    except RecursionError as error:
        raise ValueError(
            f'{start} JSON nested too deep to be meant. {remedy}'
        ) from error
    except ValueError as error:  # of JSON, of UTF-8, of a number
        raise ValueError(
            f'{start} a file that is no JSON ({error}). {remedy}'
        ) from error
    if kind is not None and not isinstance(content, kind):
        raise ValueError(f'{start} a {type(content).__name__}. {remedy}')
    return content


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds: numbers, text, lists and dicts.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML, asks for Python objects, repeats parts
            of itself, or is nested too deep or too large.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > MOST_YAML:
        raise ValueError(
            f'{path} has {size} bytes; of YAML no more than {MOST_YAML} are '
            f'read. Write lists to a file of their own.'
        )
    try:
        text = path.read_text(encoding='utf-8-sig')
        _check_events(path, text)
        return yaml.safe_load(text)
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f'{path} is no YAML of text, numbers, lists and dicts: '
            f'{error.problem or error}. Nothing of it was run.'
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is no YAML: {error}') from error


def _check_events(path: Path, text: str) -> None:
    """Look at YAML piece by piece, which builds nothing of it.

    The time that a parser takes grows with the square of the depth.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(
                f'{path} repeats a part of itself by *{event.anchor}, which '
                f'can become arbitrarily much. Write it out.'
            )
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_YAML:
            raise ValueError(
                f'{path} is YAML nested too deep to be meant. Write it flat.'
            )


@contextmanager
def opened_picture(path: str | Path) -> Iterator[Image.Image]:
    """A picture whose pixels are not decoded yet.

    Raises:
        OSError: If it is none, or none of :data:`FORMATS`.
        OversizedError: If it claims more pixels than Pillow opens.
    """
    try:
        image = Image.open(path, formats=_formats())
    except Image.DecompressionBombError as error:
        raise OversizedError(
            f'{str(path)!r} claims to be a picture of more than '
            f'{2 * Image.MAX_IMAGE_PIXELS} pixels, which is not opened. Cut '
            f'it into tiles, or take it out.'
        ) from error
    with image:
        yield image


def check_picture(path: str | Path) -> None:
    """A file must be a picture, and not claim to be a giant one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is something else, or too large.
    """
    try:
        with opened_picture(path):
            return
    except UnidentifiedImageError as error:
        raise ValueError(
            f'{str(path)!r} of {Path(path).stat().st_size} bytes is no '
            f'image, or a damaged one. Copy it again, or name another.'
        ) from error


def decodes(path: str | Path) -> bool:
    """Whether a picture can be read to its end.

    Raises:
        OversizedError: If it claims more pixels than Pillow opens.
    """
    forgiving = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with opened_picture(path) as image:
            image.load()
    except OversizedError:
        raise
    except (OSError, ValueError, SyntaxError):
        return False
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = forgiving
    return True
