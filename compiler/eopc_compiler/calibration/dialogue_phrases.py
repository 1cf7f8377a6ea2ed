"""Phrases and values of the generated task dialogues; dialogue.py puts them together."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

Rng = random.Random


@dataclass(frozen=True, slots=True)
class Slot:
    """One thing the assistant has to know: how it is asked for, answered, and said in passing."""

    name: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    in_passing: str
    value: Callable[[Rng], str]


@dataclass(frozen=True, slots=True)
class Service:
    """A booking: openings, slots, facts that may be asked about, and how it is closed with {ref} and {total}."""

    openings: tuple[str, ...]
    slots: tuple[Slot, ...]
    facts: tuple[tuple[str, str], ...]
    done: tuple[str, ...]
    price: tuple[int, int]  # of one unit, range


@dataclass(frozen=True, slots=True)
class Repair:
    """Trouble with a thing, and what to try: (instruction, what the user sees while it does not help)."""

    complaints: tuple[str, ...]
    steps: tuple[tuple[str, str], ...]
    cause: str


NAMES = (
    "Alvarez", "Brandt", "Chen", "Dubois", "Eriksen", "Fofana", "Garcia", "Haddad", "Ivanova", "Jansen", "Kimura",
    "Lindqvist", "Moreau", "Nowak", "Okafor", "Patel", "Quinn", "Rossi", "Santos", "Tanaka", "Usman", "Vogel", "Weber",
)  # fmt: skip
CITIES = (
    "Lisbon", "Hamburg", "Toronto", "Kyoto", "Nairobi", "Leeds", "Porto", "Denver", "Lyon", "Gdansk", "Seville",
    "Auckland", "Ghent", "Bergen", "Montreal", "Turin", "Cork", "Osaka", "Valencia", "Aarhus",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "March", "April", "May", "June", "August", "September", "October", "November")
FOODS = ("Thai", "vegetarian", "Lebanese", "Korean", "seafood", "Mexican", "Ethiopian", "Greek", "sushi", "Indian")
FILMS = ("The Long Harbour", "Glass Mountain", "Seven Lanterns", "A Quiet Engine", "Paper Boats", "Northern Line")
BOOKS = ("a history of bridges", "the poems of Rilke", "a guide to mushrooms", "a book on knots", "an atlas of rivers")
GOODS = ("a kettle", "two shirts", "a pair of boots", "a desk lamp", "a rucksack", "headphones", "a bicycle pump")
REASONS = (
    "it is too small",
    "the wrong colour came",
    "it arrived broken",
    "I ordered it twice",
    "it does not switch on",
)
AILMENTS = (
    "a sore throat",
    "a stiff shoulder",
    "a rash on my arm",
    "headaches",
    "a cough",
    "a check-up",
    "a twisted ankle",
)
CARS = ("a small car", "an estate car", "a van", "an electric car", "something with seven seats")
JOBS = ("a leaking tap", "a blocked sink", "a cold radiator", "a dripping shower", "a boiler that will not light")

ACKNOWLEDGED = (
    "",
    "",
    "Certainly. ",
    "Of course. ",
    "Good choice. ",
    "Understood. ",
    "Happy to help. ",
    "All right. ",
    "Noted. ",
)
CHANGES = ("Sorry, one thing is different,", "Could you change the", "I made a mistake with the", "Please correct the")
SUMMARIES = (
    "Please confirm: {}.", "So that is {}. Is that right?", "Let me repeat: {}. Shall I go ahead?", "I have {}.",
    "To be sure I have understood: {}. Correct?",
)  # fmt: skip
AGREED = (
    "Yes, that is right.",
    "Perfect, go ahead.",
    "Yes please.",
    "Correct.",
    "That is all fine, please do.",
    "Yes, exactly.",
)
THANKS = (
    "Thank you.", "Great, thanks a lot.", "That is good to know.", "Wonderful, thank you for your help.",
    "Okay, thanks.", "Thanks, that is what I needed.", "Very good.",
)  # fmt: skip
GOODBYES = (
    "You are welcome. Goodbye!", "My pleasure. Have a nice day.", "Any time. Is there anything else? If not, goodbye.",
    "Glad I could help. Enjoy the rest of your day.", "You are welcome. Write again whenever you need something.",
)  # fmt: skip
SINCE = (
    "this morning",
    "two days ago",
    "after the last update",
    "when I moved house",
    "last week",
    "out of the blue",
    "after a storm",
)
FIRST = (
    "Let us see.",
    "I am sorry to hear that.",
    "That is annoying, but it can usually be solved.",
    "First of all,",
    "Let us begin simply:",
)
NEXT = ("Then", "In that case,", "Not to worry,", "All right, next", "Thanks for trying; now", "Another idea:")
FAILED = ("Done, but ", "I tried that, and still ", "No change: ", "That did not help, ", "Hm, ")
WORKED = (
    "That did it, it works again!",
    "Yes, now it is fine.",
    "It works, finally.",
    "Oh, that solved it.",
    "Great, it is back to normal.",
)
WATCH = (
    "If it comes back within {} days, tell me.", "Check it again in {} hours.", "It should now last {} months or more.",
    "Should it happen again, wait {} minutes before you try the same.",
)  # fmt: skip


def _pick(*values: str) -> Callable[[Rng], str]:
    return lambda rng: rng.choice(values)


def _date(rng: Rng) -> str:
    return rng.choice((f"{rng.choice(DAYS)}", f"{rng.randint(1, 28)} {rng.choice(MONTHS)}", f"next {rng.choice(DAYS)}"))


def _time(rng: Rng) -> str:
    hour, minute = rng.randint(1, 12), rng.choice((0, 15, 30, 45))
    return rng.choice((f"{hour}:{minute:02d} {rng.choice(('am', 'pm'))}", f"{rng.randint(8, 21)}:{minute:02d}"))


DAY = Slot(
    "day",
    ("Which day suits you?", "For what day is it?", "On which date should it be?", "When would you like that?"),
    ("{} would be good.", "Make it {}.", "I was thinking of {}.", "{}, if that is possible.", "Let us say {}."),
    "on {}",
    _date,
)
TIME = Slot(
    "time",
    ("At what time?", "What time do you prefer?", "And the time?", "Do you have a time in mind?"),
    ("Around {}.", "{} please.", "At {} if there is room.", "Not before {}.", "Say, {}."),
    "at {}",
    _time,
)
NAME = Slot(
    "name",
    ("May I have your name?", "What name shall I put it under?", "Who is it for?"),
    ("It is {}.", "{}, please.", "Under {}.", "My name is {}."),
    "for {}",
    _pick(*NAMES),
)
PEOPLE = Slot(
    "people",
    ("How many of you are there?", "For how many people?", "How many will come?"),
    ("There are {} of us.", "{} people.", "Just {}.", "{}, two of them children."),
    "for {} people",
    lambda rng: str(rng.randint(2, 9)),
)
CITY = Slot(
    "city",
    ("In which city?", "Which town are you in?", "Where should I look?"),
    ("In {}.", "{}, near the centre.", "I will be in {}.", "{} please."),
    "in {}",
    _pick(*CITIES),
)


def _slot(name: str, question: str, answer: str, in_passing: str, values: tuple[str, ...]) -> Slot:
    """A slot that only one service has."""
    return Slot(name, (question,), (answer, "{}."), in_passing, _pick(*values))


SERVICES = (
    Service(
        ("I would like to book a table{}.", "Can you find me a restaurant{}?", "We want to eat out{}. Can you help?"),
        (DAY, TIME, PEOPLE, CITY, _slot("food", "What kind of food?", "Something {}.", "with {} food", FOODS)),
        (
            ("Is there parking?", "Yes, {n} places behind the house, free after {hour} pm."),
            ("Do they have a garden?", "They do, with {n} tables, open from {hour} am when it is dry."),
        ),
        ("The table is booked, reference {ref}. The set menus: {total}.", "Done, number {ref}; expect {total}."),
        (12, 60),
    ),
    Service(
        ("I need a train ticket{}.", "How do I get there by rail{}? I want to book.", "Please find me a train{}."),
        (
            DAY, TIME, _slot("from", "Where do you start?", "From {}.", "from {}", CITIES[:10]),
            _slot("to", "Where do you want to go?", "To {}.", "to {}", CITIES[10:]),
            _slot("class", "First or second class?", "{} class will do.", "in {} class", ("first", "second")),
        ),
        (
            ("How long does it take?", "About {n} hours with one change; the first train leaves at {hour} am."),
            ("Can I take a bicycle?", "Yes, for ${n}, but not before {hour} am."),
        ),
        ("Tickets are on their way, code {ref}: {total}.", "Booked. Show {ref} at the gate. You paid {total}."),
        (9, 120),
    ),
    Service(
        ("I want to see a doctor{}.", "Could I get an appointment{}?", "Is there a free slot at the practice{}?"),
        (DAY, TIME, NAME, _slot("reason", "What is it about?", "I have {}.", "because of {}", AILMENTS)),
        (
            ("Do I have to fast before?", "Only if blood is taken; then eat nothing for {n} hours."),
            ("Can Mr {who} come along?", "Of course. The waiting room has {n} seats and opens at {hour} am."),
        ),
        ("You are in the book as {ref}. Extra tests, if any: {total}.", "See you then; your number is {ref}."),
        (15, 80),
    ),
    Service(
        ("I am looking for a hotel{}.", "We need rooms{}.", "Please reserve a place to stay{}."),
        (CITY, DAY, PEOPLE, _slot("nights", "How many nights?", "{} nights.", "for {} nights", tuple("23457")), NAME),
        (
            ("Is breakfast included?", "It is, from {hour} am, and costs ${n} for guests from outside."),
            ("How far is the station?", "A walk of {n} minutes; the bus runs from {hour} am."),
        ),
        ("Your rooms are reserved under {ref}: {total}.", "All set, confirmation {ref}. The bill will be {total}."),
        (45, 220),
    ),
    Service(
        ("I want to go to the cinema{}.", "Are there seats left{}?", "Two friends and I would like to see a film{}."),
        (DAY, TIME, CITY, PEOPLE, _slot("film", "Which film?", "We want to see {}.", "to see {}", FILMS)),
        (
            ("Is it shown with subtitles?", "Yes, in hall {n}; the late show without them starts at {hour} pm."),
            ("How long is it?", "Two hours and {n} minutes, with a break at {hour} pm."),
        ),
        ("Seats are kept until half an hour before, code {ref}: {total}.", "Enjoy it! {ref} is your code; {total}."),
        (7, 19),
    ),
    Service(
        ("I have to send something back{}.", "How do I return a parcel{}?", "I would like my money back{}."),
        (
            NAME, _slot("item", "What did you order?", "It was {}.", "with {} in it", GOODS),
            _slot("reason", "What is wrong with it?", "Well, {}.", "because {}", REASONS), DAY,
        ),
        (
            ("How long does the refund take?", "Usually {n} working days; the money comes before {hour} am."),
            ("Do I need the box?", "Any box will do, as long as it weighs under {n} kilograms."),
        ),
        ("The label {ref} is in your mail. We will refund {total}.", "Write {ref} on the parcel. You get {total}."),
        (8, 140),
    ),
    Service(
        ("I would like to rent a car{}.", "Do you have cars free{}?", "We need something to drive{}."),
        (CITY, DAY, TIME, _slot("car", "What kind of car?", "I need {}.", "preferably {}", CARS), NAME),
        (
            ("Can my wife drive too?", "Yes, a second driver costs ${n} a day."),
            ("What if I am late?", "You have {n} hours; the desk closes at {hour} pm."),
        ),
        ("The key is in box {ref}. It costs {total}.", "Reserved as {ref}; the price is {total}."),
        (28, 110),
    ),
    Service(
        ("Can I reserve a book{}?", "I am looking for something to read{}.", "Does the library have a copy{}?"),
        (NAME, _slot("book", "Which book is it?", "I am looking for {}.", "namely {}", BOOKS), DAY, CITY),
        (
            ("For how long may I keep it?", "Four weeks, and you may renew it {n} times."),
            ("What does it cost if I forget?", "Twenty cents a day, at most ${n}; we open at {hour} am."),
        ),
        ("It is on the shelf under {ref}. Your old fines: {total}.", "Done, the slip says {ref}. Nothing else is due."),
        (1, 5),
    ),
    Service(
        ("I need a plumber{}.", "Can you send someone{}? It is about the water.", "Who can repair something for me{}?"),
        (DAY, TIME, NAME, CITY, _slot("job", "What has to be done?", "It is {}.", "for {}", JOBS)),
        (
            ("Must I be there?", "Yes, for the first {n} minutes; after that a neighbour with a key is enough."),
            ("Who will come?", "Ms {who}, who has done this for {n} years."),
        ),
        ("The visit has number {ref}. Hours and parts: {total}.", "Someone will ring; quote {ref}. We expect {total}."),
        (35, 95),
    ),
)  # fmt: skip

REPAIRS = (
    Repair(
        (
            "My laptop does not connect to the network.",
            "The wireless at home keeps dropping.",
            "I have no internet on my computer.",
        ),
        (
            ("please restart the router and wait until the light is green.", "the page will not load."),
            ("forget the network on the laptop and type the password again.", "it says the password is wrong."),
            ("move closer to the router, into the same room.", "I see only one bar."),
            ("switch flight mode on and off.", "nothing appears in the list."),
            ("change the channel in the settings of the router from 6 to 11.", "it drops after a minute."),
        ),
        "Most likely the router had given the same address to two devices.",
    ),
    Repair(
        ("The printer prints empty pages.", "My printer jams all the time.", "Nothing comes out of the printer."),
        (
            ("open the lid and take out any paper that is stuck.", "the lamp blinks orange."),
            ("clean the print head from the maintenance menu.", "there are stripes on the page."),
            ("check that the cartridge clicks into place.", "the menu says the level is unknown."),
            ("delete all waiting jobs and print a test page.", "the queue fills up again."),
        ),
        "Dried ink had closed the nozzles.",
    ),
    Repair(
        (
            "My phone is empty after half a day.",
            "The battery of my phone hardly lasts.",
            "My phone gets warm and dies early.",
        ),
        (
            ("look in the battery menu which app uses the most.", "the map is at the top of the list."),
            ("turn the brightness down to about a third.", "it loses ten per cent an hour."),
            ("switch off location for apps you rarely open.", "it is warm even in my pocket."),
            ("install the pending update and restart.", "it is at forty per cent by noon."),
        ),
        "An app had been looking for your position all the time.",
    ),
    Repair(
        ("My tomato plants have yellow leaves.", "The basil on my balcony is dying.", "My pot plants look sad."),
        (
            ("feel the soil; water only when the top is dry.", "the leaves hang in the afternoon."),
            ("move the pot out of the midday sun.", "there are brown edges now."),
            ("look under the leaves for small insects.", "I see tiny white dots."),
            ("give it a larger pot with holes in the bottom.", "new leaves come out pale."),
        ),
        "The roots had been standing in water.",
    ),
    Repair(
        ("My bread does not rise.", "The dough stays flat whatever I do.", "My loaves are heavy like bricks."),
        (
            ("check the date on the yeast and stir some into warm water.", "there are hardly any bubbles."),
            ("let the dough rest near the oven for an hour longer.", "it has grown only a little."),
            ("knead it for ten minutes instead of five.", "it tears when I stretch it."),
            ("use a little less salt and add it last.", "the crust is pale."),
        ),
        "Water that is too hot kills the yeast.",
    ),
    Repair(
        ("My bicycle makes a grinding noise.", "The gears of my bike jump.", "My brakes squeal terribly."),
        (
            ("clean the chain with a cloth and put on a few drops of oil.", "it clicks when I push hard."),
            ("turn the barrel at the end of the cable by half a turn.", "third gear slips."),
            ("see whether the wheel sits straight in the frame.", "it rubs on the left."),
            ("measure the chain; replace it if it is worn.", "it creaks uphill."),
        ),
        "The cable had stretched, as new ones do.",
    ),
)
