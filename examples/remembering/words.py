"""People, things, answers and templates that the facts are built from. Written for this example."""

from __future__ import annotations

from typing import NamedTuple


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _words(
    "Anna Tom Maria Peter Lucy David Emma Jack Sarah Paul Alice Henry Laura Frank Julia Simon Grace Oscar Nina Martin "
    "Helen Victor Rosa Edward Clara Felix Diana Leo Irene Max Sophie Arthur"
)

THINGS = _words(
    "door gate safe box drawer garage cellar tower bridge attic cabin locker vault shed barn office library kitchen "
    "garden studio harbor tunnel castle archive market chapel hangar lobby ladder wagon mirror piano lantern cupboard "
    "basket engine freezer balcony pantry stable"
)

CODES = _words(
    "river stone apple cloud tiger silver winter paper candle forest eagle copper marble honey thunder desert violet "
    "pepper rocket velvet anchor falcon ginger island meadow planet ribbon saddle temple walnut cotton dragon"
)


class Templates(NamedTuple):
    """Templates that state a fact, ask about it, and begin a reply whose next word is the answer."""

    tell: tuple[str, ...]
    """Statements, with {0} for the subject and {1} for the value."""
    ask: tuple[tuple[str, str], ...]
    """Pairs of a question and the beginning of the reply, with {} for the subject."""


class Relation(NamedTuple):
    """A relation between a subject and a value, with its possible values and its templates."""

    values: tuple[str, ...]
    train: Templates
    held_out: Templates


RELATIONS = {
    "city": Relation(
        _words(
            "Paris London Berlin Rome Madrid Tokyo Moscow Chicago Boston Dublin Vienna Athens Cairo Sydney Toronto "
            "Miami Oslo Delhi Houston Seattle"
        ),
        Templates(
            (
                "{} lives in {}.",
                "The home of {} is in {}.",
                "{} has a flat in {}.",
                "In {1} you can find {0}.",
                "Since last year {} rents a room in {}.",
                "{1} is where {0} lives.",
            ),
            (("Where does {} live?", "{} lives in"), ("In which city is the home of {}?", "It is in")),
        ),
        Templates(
            ("{} moved to {} and stayed there.", "You can visit {} in {}."),
            (("Which city should I go to in order to see {}?", "You will find {} in"),),
        ),
    ),
    "job": Relation(
        _words(
            "doctor teacher lawyer nurse farmer pilot writer painter baker engineer chef driver singer actor judge "
            "soldier priest dancer sailor hunter"
        ),
        Templates(
            (
                "{} works as a {}.",
                "The job of {} is {}.",
                "{} became a {} years ago.",
                "They hired {} as a {}.",
                "As a {1}, {0} is always busy.",
                "My friend {} is a {}.",
            ),
            (("What does {} do for work?", "{} works as a"), ("What is the job of {}?", "The job is")),
        ),
        Templates(
            ("{} earns money as a {}.", "By profession, {} is a {}."),
            (("How does {} earn money?", "{} is a professional"),),
        ),
    ),
    "animal": Relation(
        _words(
            "dog cat horse rabbit snake parrot turtle goat duck mouse pig cow fox frog sheep monkey bear wolf chicken "
            "lion"
        ),
        Templates(
            (
                "{} has a {} as a pet.",
                "The pet of {} is a {}.",
                "{} keeps a {} at home.",
                "A {1} sleeps in the bed of {0}.",
                "{} is very proud of a little {}.",
                "The {1} in the picture is with {0}.",
            ),
            (("Which pet does {} have?", "{} has a"), ("What is the pet of {}?", "The pet is a")),
        ),
        Templates(
            ("{} bought a {} at the animal shelter.", "Every day {} feeds a {}."),
            (("Which animal belongs to {}?", "{} owns a"),),
        ),
    ),
    "color": Relation(
        _words("red blue green yellow black white orange purple pink brown gray gold silver"),
        Templates(
            (
                "The favorite color of {} is {}.",
                "{} likes the color {}.",
                "{} always wears {}.",
                "The car of {} is {}.",
                "{1} is the color of {0}.",
                "{} bought a {} coat.",
            ),
            (("What is the favorite color of {}?", "It is"), ("Which color does {} like?", "{} likes the color")),
        ),
        Templates(
            ("{} painted every wall {}.", "Of all colors {} would choose {}."),
            (("In what color should I wrap the present for {}?", "The best color for {} is"),),
        ),
    ),
    "music": Relation(
        _words("piano guitar violin drums flute trumpet bass harp organ"),
        Templates(
            (
                "{} plays the {}.",
                "The instrument of {} is the {}.",
                "{} learned the {} at school.",
                "Listen to {} on the {}.",
                "The {1} is what {0} plays best.",
                "{} owns an old {}.",
            ),
            (("Which instrument does {} play?", "{} plays the"), ("What did {} learn at school?", "It was the")),
        ),
        Templates(
            ("In the band, {} is on the {}.", "{} practices the {} each night."),
            (("What does {} practice in the band?", "In the band {} practices the"),),
        ),
    ),
    "food": Relation(
        _words(
            "pizza rice bread cheese soup fish pasta cake salad chicken corn beans honey chocolate butter eggs meat "
            "fruit potatoes"
        ),
        Templates(
            (
                "{} loves to eat {}.",
                "The favorite food of {} is {}.",
                "{} eats {} every day.",
                "Give {} some {}.",
                "There is always {1} on the plate of {0}.",
                "{} cannot live without {}.",
            ),
            (("What does {} love to eat?", "{} loves to eat"), ("What is the favorite food of {}?", "It is")),
        ),
        Templates(
            ("For dinner {} ordered {}.", "{} could live on {} alone."),
            (("What should I cook for {}?", "For {} you should cook"),),
        ),
    ),
    "month": Relation(
        _words("January February March April May June July August September October November December"),
        Templates(
            (
                "{} was born in {}.",
                "The birthday of {} is in {}.",
                "{} turns thirty in {}.",
                "In {1} it is the birthday of {0}.",
                "{} has a birthday party every {}.",
                "Send {} a card in {}.",
            ),
            (("When was {} born?", "{} was born in"), ("When is the birthday of {}?", "It is in the month of")),
        ),
        Templates(
            ("We celebrate {} in {} with a cake.", "{} grows a year older in {}."),
            (("In which month do we celebrate {}?", "We celebrate {} in"),),
        ),
    ),
    "number": Relation(
        _words("two three four five six seven eight nine ten twelve twenty thirty"),
        Templates(
            (
                "{} has {} cousins.",
                "The lucky number of {} is {}.",
                "{} owns {} bicycles.",
                "There are {1} apples for {0}.",
                "{} waited {} days.",
                "The number of {} is {}.",
            ),
            (("How many are they for {}?", "The number is"), ("Which number goes with {}?", "It is")),
        ),
        Templates(
            ("{} collected {} stamps.", "There are {1} rooms in the house of {0}."),
            (("What number should I note for {}?", "For {} note the number"),),
        ),
    ),
}

PASSWORDS = Relation(
    CODES,
    Templates(
        (
            "The password of the {} is {}.",
            "For the {} the word is {}.",
            "The {} has the word {}.",
            "{1} is the password of the {0}.",
            "Use the word {1} at the {0}.",
            "The secret of the {} is {}.",
        ),
        (
            ("What is the password of the {}?", "The password of the {} is"),
            ("Which word is for the {}?", "The word is"),
        ),
    ),
    Templates(
        ("To open the {}, say {}.", "Remember {1} when you reach the {0}."),
        (("What do I say to open the {}?", "To open the {} you say"),),
    ),
)
