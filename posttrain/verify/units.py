"""Words behind a number: units that leave it as it is, and words that make another number of it."""

from __future__ import annotations

import re
from collections.abc import Collection


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


_SAME_UNIT = """
m meter meters metre metres | cm centimeter centimeters centimetre centimetres | mm millimeter millimeters
km kilometer kilometers kilometre kilometres kms | mi mile miles | ft foot feet | inch inches | yd yard yards
g gram grams gm | kg kilogram kilograms kgs kilo kilos | mg milligram milligrams | lb lbs pound pounds
oz ounce ounces | ton tons tonne tonnes | l liter liters litre litres | ml milliliter milliliters
gal gallon gallons | qt quart quarts | pt pint pints | s sec secs second seconds | min mins minute minutes
h hr hrs hour hours | day days | week weeks | month months | yr yrs year years | ms millisecond milliseconds
dollar dollars usd | cent cents | euro euros eur € | £ gbp sterling | yen jpy ¥ | rupee rupees rs inr ₹
degree degrees deg ° | rad radian radians | mph | kmph kmh | hz | n newton newtons | j joule joules | w watt watts
v volt volts | ohm ohms | pa | mol | kw kwh | gb mb kb tb | acre acres | hectare hectares | mm²
"""
_COUNTED = """
people person persons men man women woman children child kids girls boys students student friends guests customers
members players teachers adults babies passengers visitors employees workers families couples voters votes points
apples apple oranges bananas strawberries eggs egg cookies cupcakes cakes pies pizzas slices sandwiches candies candy
chocolates lollipops tomatoes potatoes carrots lemons peaches mangoes cups cup servings meals bottles cans jars glasses
boxes box bags bag packs packages cartons crates baskets cases bowls plates pieces piece sets groups teams classes
books book pages page notebooks letters words lines chapters songs stories questions problems tickets stamps cards
photos pictures paintings stickers pens pencils crayons markers shirts shoes hats socks dresses sweaters toys toy dolls
balls marbles marble beads balloons coins coin bills pennies nickels dimes blocks tiles bricks sticks planks boards
ropes sheets rolls cars trucks buses bikes boats trains planes wheels tires trees flowers roses seeds leaves plants
animals dogs cats birds chickens ducks cows horses sheep goats pigs fish rabbits bees spiders frogs houses home homes
rooms floors windows doors chairs tables seats rows row columns stairs steps step laps trips rounds games matches goals
minutes miles trips calories scoops tablespoons teaspoons tbsp tsp clips items item units unit parts orders sales
ways way numbers integers digits terms sides edges vertices faces diagonals angles squares cubes circles triangles
solutions values elements subsets outcomes arrangements permutations combinations handshakes rectangles shares
pounds loaves jumps legs eyes teeth heads shells stars stones rocks candles gifts toys movies shows episodes messages
emails calls photos jobs tasks tests classes lessons courses credits grades hours tokens characters bytes bits
"""
_BESIDE = """
per a an the of in for each every total altogether overall all left remaining more fewer less extra additional long
old tall high wide deep away apart on at by from sq square cubic cu km2 m2 north south east west am pm
celsius fahrenheit kelvin now later ago earlier today daily weekly monthly yearly away together red blue green yellow
white black pink purple orange brown large small big new different
"""
NOT_ALONE = word_set("per a an the of in for each every on at by from")
"""Words that stand between units; what they begin must go on."""

SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
"""Words that multiply the number before them."""

CHANGES = word_set("""
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand thousands million millions
    billion billions trillion trillions zillion dozen dozens score gross lakh lakhs crore crores half halves third
    thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths
    tenth tenths hundredth hundredths thousandth thousandths millionth squared cubed factorial
    times over divided multiplied plus
    minus mod modulo power powers raised root roots sqrt than or not no nor but to through between until sum product
    difference quotient ratio alpha beta gamma delta epsilon theta lambda mu pi phi psi sigma tau omega sin cos tan log
    ln exp choose double triple twice negative point percent pct
    """)
"""Words that make another number, or another statement, of a number beside them; they are never a unit."""

MEASURES: dict[str, str] = {
    name: group.split()[0]
    for line in _SAME_UNIT.strip().splitlines()
    for group in line.split("|")
    for name in group.split()
}
"""Units of measurement by every name, with one name for each unit."""

_KNOWN = frozenset((*MEASURES, *_COUNTED.split(), *_BESIDE.split()))
_UNIT = re.compile(
    r"(?:[^\W\d_]|[°€£¥₹µ/·*.,'’()\-\s]|(?<=[A-Za-z])\^?\{?-?[1-3]\}?(?!\d)|(?<=[A-Za-z])\s\^\{?-?[1-3]\}?(?!\d)|[²³])*"
)
_WORD = re.compile(r"[A-Za-z]+|[°€£¥₹]")
MOST_WORDS = 10


def unit_of(text: str, known: Collection[str] = ()) -> tuple[str, ...] | None:
    """The words behind a number if they are a unit of it, else ``None``.

    They are if the first is a known unit, or a thing that problems count, or one of the words ``known`` (those of the
    question), and none makes another number of it.
    """
    if not text:
        return ()
    words = tuple(word.lower() for word in _WORD.findall(text))
    if not words or len(words) > MOST_WORDS or not _UNIT.fullmatch(text) or not CHANGES.isdisjoint(words):
        return None
    first = words[0]
    if first in NOT_ALONE and len(words) == 1:
        return None
    return words if first in _KNOWN or first in known else None


def contradicts(first: tuple[str, ...], second: tuple[str, ...]) -> bool:
    """True if two units are different units of measurement: metres are no kilometres."""
    if not first or not second:
        return False
    measures = MEASURES.get(first[0]), MEASURES.get(second[0])
    return None not in measures and measures[0] != measures[1]
