"""Small tokenizers that the tests of this room share."""

import pytest

from xushi.tokenizer import Tokenizer

CODE = """
def area(width: float, height: float) -> float:
    '''The area of a rectangle 12 by 34.'''
    if width < 0 or height < 0:
        raise ValueError("negative size <think> 2024")
    return width * height
"""

CHINESE = """天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。寒来暑往，秋收冬藏。闰余成岁，律吕调阳。
云腾致雨，露结为霜。金生丽水，玉出昆冈。剑号巨阙，珠称夜光。果珍李柰，菜重芥姜。
海咸河淡，鳞潜羽翔。龙师火帝，鸟官人皇。始制文字，乃服衣裳。推位让国，有虞陶唐。
"""


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([CODE, CODE, CHINESE, CHINESE], 420)


@pytest.fixture(scope="session")
def with_tools() -> Tokenizer:
    return Tokenizer.train([CODE, CODE, CHINESE, CHINESE], 427, tools=True)


@pytest.fixture(scope="session")
def bare() -> Tokenizer:
    return Tokenizer.train([], 263)
