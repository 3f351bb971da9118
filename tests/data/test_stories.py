import re
import string
import subprocess
import sys

import pytest

from mlx_moe.data.stories import stories, story
from mlx_moe.data.story_plots import PLOTS
from mlx_moe.data.story_words import BOYS, GIRLS, PHRASES, PROPS, WORLDS


@pytest.fixture(scope="module")
def many() -> list[str]:
    return list(stories(10_000))


def test_all_distinct(many):
    assert len(set(many)) == len(many)


def test_length_and_shape(many):
    assert all(60 <= len(text.split()) <= 200 for text in many)
    assert all(4 <= text.count("\n\n") + 1 <= 5 for text in many)
    assert sum(len(text.split()) for text in many) > 1_000_000


def test_pure_function_of_seed_and_index(many):
    assert story(7_123) == many[7_123]
    assert list(stories(5, seed=1)) == [story(i, seed=1) for i in range(5)]
    assert not set(stories(2_000, seed=1)) & set(many)


def test_text_is_pinned():
    # The version of the grammar is part of the identity of all that was trained on it: change both together.
    assert story(51).startswith("Long ago, an eager girl named Bella lived at the end of a long road.")
    other_process = [sys.executable, "-c", "from mlx_moe.data.stories import story; print(story(51), end='')"]
    assert subprocess.run(other_process, capture_output=True, text=True, check=True).stdout == story(51)


def test_plain_ascii_with_every_template_filled_in(many):
    allowed = set(string.ascii_letters + " \n.,!?\":'")
    for text in many:
        assert set(text) <= allowed
        assert not re.search(r"  | $| \n|[,.!?]{2}| [,.!?]", text), text


def test_sentences_and_quotes_are_whole(many):
    for text in many:
        for paragraph in text.split("\n\n"):
            assert paragraph.count('"') % 2 == 0, paragraph
            assert paragraph[-1] in '.!?"', paragraph
            assert paragraph[0].isupper() or paragraph[0] == '"', paragraph
            spoken = paragraph.split('"')[1::2]
            assert all(speech[-1] in ".,!?" and speech[0].isupper() for speech in spoken), paragraph
            told = re.sub(r'"[^"]*"', "", paragraph)
            assert all(first.isupper() for first in re.findall(r"[.!?] (\w)", told)), paragraph


def test_articles_agree(many):
    for text in many:
        for article, word in re.findall(r"\b([Aa]n?) (\w+)", text):
            assert (article.lower() == "an") == (word[0] in "aeiou" or word == "honest"), f"{article} {word}"


def test_pronouns_belong_to_the_hero_and_a_friend_of_the_other_sex(many):
    for text in many[:2000]:
        names = [name for name in re.findall(r"\b[A-Z]\w+", text) if name in GIRLS or name in BOYS]
        assert 1 <= len(set(names)) <= 2
        assert len({name in GIRLS for name in names}) == len(set(names))


def test_every_word_of_the_grammar_is_used(many):
    everything = "\n".join(many)
    for world in WORLDS:
        for items in (world.homes, world.spots, world.things, world.goods, world.hobbies, world.skills, world.places):
            for item in items:
                assert item.partition(" ")[2] in everything if " " in item else item in everything
    assert all(name in everything for name in (*GIRLS, *BOYS, *PROPS["creature"], *PROPS["fragile"], *PROPS["plant"]))


def test_names_fit_one_sex():
    assert not set(GIRLS) & set(BOYS)


def test_plots_ask_only_for_what_there_is():
    pronouns = {word + who for word in ("he", "him", "his") for who in ("", "2", "3")}
    cast = {"hero", "friend", "elder", "kind", "kind2", "species", "home", "at_place", "place", "thing", "goods"}
    cast |= {"skill", "hobby", "hobby2", "spot", "spot2"} | pronouns | set(PHRASES) | set(PROPS)
    for plot in PLOTS:
        texts = [plot.text, *(cell for row in plot.rows for cell in row)]
        asked = {name.lower() for text in texts for name in re.findall(r"\{(?:a:)?(\w+)\}", text)}
        assert asked <= cast | set(plot.props)
        assert set(plot.props) <= asked
        assert all(len(row) == len(plot.props) for row in plot.rows)
