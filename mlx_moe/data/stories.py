"""Children's stories generated from a grammar: training text that needs no network.

The style follows TinyStories (Eldan and Li 2023): few words, whole plots.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random
from typing import TypeVar

from mlx_moe.data.story_plots import PLOTS, Plot
from mlx_moe.data.story_words import BOYS, COLORS, GIRLS, PHRASES, PRONOUNS, PROPS, TRAITS, WORLDS

VERSION = 1  # of the text: increment with every change of the grammar or the words

Item = TypeVar("Item")


def stories(n: int, seed: int = 0) -> Iterator[str]:
    """Yield the first n stories of a seed."""
    return (story(index, seed) for index in range(n))


def story(index: int, seed: int = 0) -> str:
    """Return a story of 60 to 200 words, its paragraphs separated by blank lines: a pure function of (seed, index)."""
    teller = _Teller(seed, index)
    plot = teller.choose(PLOTS)
    teller.cast(plot)
    return "\n\n".join(" ".join(teller.tell(part).split()) for part in plot.text.split("\n\n"))


class _Teller:
    """Template filler. The cast is constant within a story; phrases are drawn anew each time."""

    def __init__(self, seed: int, index: int) -> None:
        # Python guarantees stable seeding and random(), but not choice().
        self._random = Random(f"{seed}:{index}").random
        self._bound: dict[str, str] = {}

    def choose(self, items: tuple[Item, ...]) -> Item:
        return items[int(self._random() * len(items))]

    def cast(self, plot: Plot) -> None:
        world, bound = self.choose(WORLDS), self._bound
        hero_is_girl = self._random() < 0.5
        for suffix, is_girl in (("", hero_is_girl), ("2", not hero_is_girl)):
            bound["species" + suffix] = self.choose(world.girls if is_girl else world.boys)
            bound["kind" + suffix] = f"{self.choose(TRAITS)} {bound['species' + suffix]}"
            bound["friend" if suffix else "hero"] = self.choose(GIRLS if is_girl else BOYS)
            self._bind_pronouns("girl" if is_girl else "boy", suffix)
        bound["elder"], elder_is = self.choose(world.elders)
        self._bind_pronouns(elder_is, "3")

        bound["home"] = self.choose(world.homes)
        bound["at_place"] = self.choose(world.places)
        bound["place"] = bound["at_place"].partition(" ")[2]
        bound["thing"] = f"{self.choose(COLORS)} {self.choose(world.things)}"
        bound["goods"] = self.choose(world.goods)
        bound["skill"] = self.choose(world.skills)
        bound["hobby"], bound["hobby2"] = self._two(world.hobbies)
        bound["spot"], bound["spot2"] = self._two(world.spots)
        bound.update(zip(plot.props, self.choose(plot.rows), strict=True))

    def tell(self, template: str) -> str:
        return _BLANK.sub(self._fill, template)

    def _fill(self, blank: re.Match[str]) -> str:
        choice, article, name = blank.groups()
        if choice is not None:
            return self.tell(self.choose(tuple(choice.split("|"))))
        text = self.tell(self._look_up(name.lower()))
        if article:
            text = f"{'an' if text[0] in 'aeiou' or text.startswith('honest') else 'a'} {text}"
        return text[0].upper() + text[1:] if name[0].isupper() else text

    def _look_up(self, name: str) -> str:
        if name in PHRASES:
            return self.choose(PHRASES[name])
        if name not in self._bound:
            self._bound[name] = self.choose(PROPS[name])
        return self._bound[name]

    def _two(self, items: tuple[str, ...]) -> tuple[str, str]:
        first = int(self._random() * len(items))
        second = (first + 1 + int(self._random() * (len(items) - 1))) % len(items)
        return items[first], items[second]

    def _bind_pronouns(self, who: str, suffix: str) -> None:
        for word, form in PRONOUNS[who].items():
            self._bound[word + suffix] = form


_BLANK = re.compile(r"\[([^\[\]]*)\]|\{(a:)?(\w+)\}")
