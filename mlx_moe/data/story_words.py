"""Words of the stories: names, three worlds with their contents, and phrases for every plot."""

from __future__ import annotations

from dataclasses import dataclass


def words(text: str) -> tuple[str, ...]:
    """Split a comma-separated list."""
    return tuple(item.strip() for item in text.split(","))


GIRLS = words(
    "Ada, Anna, Bella, Cleo, Daisy, Dora, Elsa, Emma, Fay, Flora, Gina, Hana, Holly, Iris, Ivy, Jade, Julia, Kira, "
    "Lena, Lola, Maya, Mia, Mina, Nora, Olive, Penny, Pia, Poppy, Rosa, Ruby, Sana, Tara, Tess, Uma, Wanda, Zara, "
    "Zoe"
)
BOYS = words(
    "Abel, Adam, Arlo, Ben, Bruno, Carl, Dan, Eli, Emil, Felix, Finn, Gus, Hugo, Ian, Ivan, Jack, Jon, Kai, Leo, "
    "Luca, Max, Milo, Ned, Noah, Omar, Oscar, Otto, Paul, Pip, Ravi, Rex, Sam, Sven, Theo, Toby, Umar, Vic, Walt, "
    "Yan, Zeke"
)
PRONOUNS = {
    "girl": {"he": "she", "him": "her", "his": "her"},
    "boy": {"he": "he", "him": "him", "his": "his"},
}
TRAITS = words(
    "little, kind, curious, brave, playful, gentle, cheerful, quiet, clever, lively, silly, friendly, happy, shy, "
    "small, careful, merry, young, eager, honest"
)
COLORS = words("red, blue, green, yellow, orange, purple, pink, white, silver, golden, brown, shiny, striped")


@dataclass(frozen=True)
class World:
    """Vocabulary for one kind of hero. Places and spots include their preposition."""

    girls: tuple[str, ...]
    boys: tuple[str, ...]
    elders: tuple[tuple[str, str], ...]  # words with or without a {his} of the hero; girl or boy
    homes: tuple[str, ...]
    places: tuple[str, ...]
    spots: tuple[str, ...]
    things: tuple[str, ...]
    goods: tuple[str, ...]
    hobbies: tuple[str, ...]
    skills: tuple[str, ...]


CHILDREN = World(
    girls=("girl",),
    boys=("boy",),
    elders=(
        ("{his} mom", "girl"),
        ("{his} grandma", "girl"),
        ("{his} aunt", "girl"),
        ("{his} dad", "boy"),
        ("{his} grandpa", "boy"),
        ("{his} uncle", "boy"),
    ),
    homes=words(
        "in a small town, in a tall house, near the sea, in a house with a red door, on a green hill, by a wide river, "
        "in a big city, on a farm, in a white house, at the end of a long road, next to a bakery"
    ),
    places=words(
        "at the park, at the beach, in the garden, in the woods, at the playground, at the farm, at the market, "
        "by the lake, in the meadow, at the zoo, by the river, at the school"
    ),
    spots=words(
        "under the bed, behind the door, in the closet, on the shelf, under the table, in the basket, "
        "under the stairs, in the kitchen, behind the chair, in the toy box, under the blanket"
    ),
    things=words(
        "ball, kite, toy train, hat, teddy bear, cup, toy boat, drum, scarf, book, bell, bucket, toy car, doll, ring, "
        "umbrella, flute, crayon, backpack, marble, whistle, top"
    ),
    goods=words(
        "cookies, grapes, cherries, crayons, stickers, blocks, apples, muffins, balloons, marbles, strawberries, "
        "pancakes, oranges, peaches, toy cars"
    ),
    hobbies=words(
        "draw pictures, climb trees, sing songs, read books, play outside, run in the grass, look at the clouds, "
        "play with blocks, ride a bike, dance in the kitchen, count the birds, build towers, help in the garden, "
        "bake bread, pick flowers, jump in puddles, play hide and seek, watch the trains"
    ),
    skills=words(
        "ride a bike, whistle, swim, skip rope, tie a bow, catch a ball, do a cartwheel, fly a kite, play the piano, "
        "bake a cake, draw a horse, skate, juggle, read a long book, throw a ball far, write a letter, swing very high"
    ),
)

_ANIMALS = words(
    "rabbit, mouse, squirrel, fox, bear cub, duck, frog, turtle, hedgehog, kitten, puppy, bird, pig, goat, lamb, pony, "
    "owl, otter, beaver, mole, elephant, monkey, deer, badger, penguin"
)
ANIMALS = World(
    girls=_ANIMALS,
    boys=_ANIMALS,
    elders=(
        ("{his} mother", "girl"),
        ("{his} grandmother", "girl"),
        ("the wise old goose", "girl"),
        ("{his} father", "boy"),
        ("{his} grandfather", "boy"),
        ("the wise old owl", "boy"),
    ),
    homes=words(
        "in a deep forest, near a blue pond, under a big tree, on a quiet farm, at the foot of a hill, by a stream, "
        "in a green valley, at the edge of the woods, in a cozy den, on a small island, in a field of flowers"
    ),
    places=words(
        "at the pond, in the forest, by the stream, in the meadow, on the hill, in the orchard, at the waterfall, "
        "by the old mill, in the field, on the sand, in the valley, at the edge of the woods"
    ),
    spots=words(
        "under a log, behind a rock, in the tall grass, under the leaves, inside a hollow tree, behind a bush, "
        "near the roots, beside the path, under a mushroom, in the reeds, between two stones, under the old bridge"
    ),
    things=words(
        "feather, stone, shell, leaf, acorn, button, ribbon, bell, nut, flower, pebble, stick, egg, coin, hat, scarf, "
        "basket, spoon, key, ball"
    ),
    goods=words(
        "berries, nuts, apples, carrots, plums, mushrooms, pears, acorns, seeds, cherries, grapes, honey cakes, figs, "
        "blueberries, onions"
    ),
    hobbies=words(
        "roll in the grass, chase butterflies, sing songs, look for shells, play by the water, hop over logs, "
        "nap in the sun, count the stars, dig holes, watch the clouds, pick berries, run down the hill, "
        "tell stories, splash in the mud, climb on rocks, listen to the wind, play hide and seek, smell the flowers"
    ),
    skills=words(
        "climb the tall tree, swim, whistle, hop over the stream, sing, build a strong house, dig a tunnel, dance, "
        "jump very high, find honey, float on a leaf, make a boat, roll like a ball, catch a falling leaf, hum a tune, "
        "balance on a log, run very fast"
    ),
)

_DOLLS = words("rag doll, wooden horse, teddy bear, toy robot, paper bird, toy mouse, puppet, toy lion, clay cat")
_SOLDIERS = words("tin soldier, wooden horse, teddy bear, toy robot, paper bird, toy mouse, toy lion, toy train")
TOYS = World(
    girls=_DOLLS,
    boys=_SOLDIERS,
    elders=(
        ("the old music box", "girl"),
        ("the big rag doll", "girl"),
        ("the old clock", "boy"),
        ("the rocking horse", "boy"),
        ("the oldest teddy bear", "boy"),
    ),
    homes=words(
        "in a toy shop, in a big toy box, on a high shelf, in a playroom, in an attic full of toys, "
        "by a window with yellow curtains, in a wooden chest, in a dollhouse, in a small bedroom"
    ),
    places=words(
        "at the window, on the big rug, in the garden, in the dollhouse, on the stairs, in the kitchen, by the fire, "
        "under the tree, in the hall, on the table, in the attic, in the playroom"
    ),
    spots=words(
        "under the rug, behind the books, in the toy box, under the couch, behind the curtain, in the drawer, "
        "under a pillow, behind the lamp, inside a boot, on the shelf, in the sewing box, under the bed"
    ),
    things=words(
        "key, ribbon, button, bell, paper crown, marble, star, coin, hat, flag, drum, scarf, bead, paper boat, card, "
        "cape, wheel, spring"
    ),
    goods=words(
        "blocks, stickers, crayons, beads, marbles, ribbons, buttons, paper stars, balloons, bells, chalks, stamps, "
        "paints"
    ),
    hobbies=words(
        "march in a line, dance on the rug, build towers, sing songs, look at the moon, slide down the stairs, "
        "tell stories, play with blocks, spin around, play hide and seek, wave at the birds, roll across the floor, "
        "watch the snow, listen to music, jump on the pillows, play the drum"
    ),
    skills=words(
        "spin on one foot, dance, play the drum, march, jump over a book, juggle, whistle, build a tall tower, sing, "
        "climb the curtain, draw a circle, skip, catch a marble, stand on one leg, ride the toy train, tie a knot"
    ),
)

WORLDS = (CHILDREN, ANIMALS, TOYS)

PHRASES: dict[str, tuple[str, ...]] = {
    "open": (
        "Once upon a time, there was {a:kind} named {hero}. {He} lived {home}.",
        "Once there was {a:kind} who lived {home}. {His} name was {hero}.",
        "{Home}, there lived {a:kind}. {His} name was {hero}.",
        "{hero} was {a:kind}. {He} lived {home}.",
        "Long ago, {a:kind} named {hero} lived {home}.",
    ),
    "habit": (
        "{hero} [loved|liked] to {hobby}.",
        "Every day, {he} [loved|liked] to {hobby} and {hobby2}.",
        "{He} liked to {hobby}, but most of all {he} liked to {hobby2}.",
        "{hero} was always happy when {he} could {hobby}.",
    ),
    "day": (
        "One {weather} [morning|day|afternoon]",
        "One day",
        "One morning after breakfast",
        "On a {weather} day",
    ),
    "meet": (
        "{friend}, {a:kind2}, came by.",
        "Then {his} friend {friend} came along. {He2} was {a:kind2}.",
        "Just then, {he} saw {friend}, {a:kind2}.",
    ),
    "unhappy": (
        "{hero} felt [very sad|sad and tired|so sad].",
        "{hero} sat down and [began to cry|cried a little|hid {his} face].",
        "A tear ran down {his} face.",
        "{hero} did not know what to do.",
    ),
    "ask": (
        '"What is wrong, {hero}?" asked',
        '"Why are you so sad?" asked',
        '"Are you all right?" asked',
        '"{hero}, what happened?" asked',
    ),
    "thanks": (
        '"Thank you, {friend}!" said {hero}.',
        '"You are a [good|true|kind] friend," said {hero}.',
        '"Thank you! You are the best," said {hero} with a big smile.',
        '{hero} [hugged|thanked] {friend}. "You helped me so much," {he} said.',
    ),
    "glad": (
        "{hero} was so [happy|glad] that {he} [jumped up and down|laughed out loud|danced around].",
        "{hero} smiled a big smile.",
        "{hero} felt [warm|happy and proud|light and happy] inside.",
        "{hero} laughed and clapped.",
    ),
    "together": (
        "{hero} and {friend} [played together|laughed and played] until the sun went down.",
        "Then the two friends went home, [tired and happy|singing all the way|side by side].",
        "After that, {hero} and {friend} were best friends.",
        "That night, {hero} told {elder} all about it.",
    ),
    "reason": (
        "You both won today",
        "This is for two good friends",
        "A kind heart is the best thing of all",
    ),
    "reward": (
        "It gave them {a:thing} to say thank you.",
        "It showed them a secret place {at_place}.",
        "It sang a happy song for them.",
        "It promised to visit them every day.",
    ),
}

# Props that a plot may use besides its cast and its own row.
PROPS = {
    "creature": words(
        "tiny bird, baby duck, small snail, green beetle, little bee, baby turtle, yellow butterfly, lizard, ant, "
        "ladybug, baby rabbit, old toad, white moth, grey mouse"
    ),
    "fragile": words(
        "blue bowl, tall vase, tea cup, flower pot, little lamp, old plate, glass bird, white jug, clay pot, "
        "orange teapot, egg cup, picture, mirror"
    ),
    "plant": words("red flower, round pumpkin, yellow flower, big tomato, sunflower, orange flower, melon"),
    "bed": words("in the garden, in a sunny spot, next to the path, near the gate, under the window, behind the hill"),
    "weather": words("sunny, warm, bright, windy, quiet, cool, cloudy, lovely, fine, cold"),
}
