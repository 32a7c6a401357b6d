"""The household the home dataset talks about: its rooms and devices, and which sentences a person would say there."""

import random
import re
from collections.abc import Mapping

AREAS = """
    kitchen, living room, bedroom, bathroom, hallway, dining room, garage, study, nursery, guest room, playroom,
    laundry room, pantry, den, sunroom, conservatory, mudroom, master bedroom, home office, utility room, entryway,
    workshop, studio, library, games room, patio, terrace, greenhouse, balcony, gym
"""
FLOORS = (
    "first floor, second floor, third floor, ground floor, top floor, upstairs, downstairs, basement, attic, cellar"
)

# What a person calls a device, by the domain Home Assistant keeps it under. After "/": names for templates that say the
# kind of light themselves ("{name} lamp"), and sensors that tell occupied from empty instead of open from closed.
DEVICES = {
    "light": """
        desk lamp, floor lamp, ceiling light, reading light, chandelier, night light, porch light, fairy lights,
        bedside lamp, lava lamp, spotlights, wall sconce, led strip, vanity lights, pendant light, counter lights
        / desk, bedside, reading, accent, corner, piano, mirror, cabinet, stair, aquarium, fireplace, window seat
    """,
    "switch": """
        coffee maker, christmas tree, space heater, dehumidifier, kettle, printer, heated blanket, fountain,
        rice cooker, bubble machine, towel warmer, sprinkler pump
    """,
    "fan": """
        ceiling fan, tower fan, desk fan, box fan, exhaust fan, pedestal fan, air purifier, extractor fan,
        whole house fan
    """,
    "media_player": """
        tv, soundbar, smart speaker, record player, stereo, projector, radio, home theater, bookshelf speakers,
        chromecast, game console, jukebox
    """,
    "input_boolean": "guest mode, vacation mode, party mode, quiet mode, eco mode, sleep mode",
    "climate": """
        thermostat, heat pump, air conditioner, wall heater, mini split, floor heating, radiator, wine cooler
    """,
    "cover": """
        venetian blinds, roller shade, velvet curtains, patio awning, driveway gate, skylight shutter, bay window shade,
        roman shades, blackout curtains, pergola screen
    """,
    "valve": "sprinkler valve, main water valve, gas valve, drip irrigation valve, pool valve, rain barrel valve",
    "lock": "front door lock, back door, side gate, deadbolt, shed door, cellar hatch, gun safe, liquor cabinet",
    "binary_sensor": """
        screen door, mailbox, fridge door, skylight, pet door, freezer door, dormer window, pantry cupboard
        / motion sensor, presence sensor, parking spot, doormat sensor, bed sensor, couch sensor, meeting room sensor
    """,
    "sensor": """
        outdoor humidity, power meter, air quality, water tank level, washing machine status, printer ink, solar output
    """,
    "todo": "groceries, chores, packing, party, homework, hardware store, wish, camping, birthday, reading",
    "person": "alice, bob, maria, kenji, fatima, oliver, priya, tom, ingrid, samuel",
    "weather": "boston, seaside cabin, downtown, lake house, oslo, grandma's village, airport, ski resort",
    "scene": "movie night, dinner party, good morning, romantic, focus time, bedtime, relax, sunset, game day, spa",
    "script": """
        water the plants, good night routine, leaving home, feed the cat, wake up call, backup photos, laundry alert
    """,
    "button": "doorbell chime, garage remote, restart router, find my phone, bed massage, fish feeder",
    "input_button": "panic alarm, dinner bell, reset filter, guest welcome",
    "vacuum": "robot vacuum, dust buster, robo maid, dusty, little sweeper, crumb catcher",
    "lawn_mower": "grass hopper, turf king, mowbot, lawn shark, mow-zart, green machine",
}

WORDS = {
    "message": """
        dinner is ready, the bus is here, it is time for bed, we are leaving in ten minutes, breakfast is served,
        the pizza has arrived, someone is at the door, the movie starts now, grandma is on the phone, wash your hands,
        put your shoes on, the cake is done, your ride is waiting, clean your rooms, lunch is on the table, bath time,
        turn down the music, homework first, the game is on, we have guests
    """,
    "zone": "home, work, school, the gym, the office, the park, the cottage, church, daycare, the airport",
    "timer_name": """
        pizza, pasta, eggs, laundry, tea, workout, homework, cookies, rice, nap, bread, meditation, chicken, coffee,
        potatoes, reading, oven, bath, roast, yoga
    """,
    "timer_command": """
        turn off the lights, lock the front door, close the garage door, start the robot vacuum, open the blinds,
        turn on the heater, pause the music, turn off the tv, play some jazz, unlock the gate, dim the lights,
        shut the windows
    """,
    "shopping_list_item": """
        milk, eggs, bread, bananas, toilet paper, olive oil, dish soap, chicken breast, coffee beans, rice, tomatoes,
        orange juice, cheddar cheese, batteries, paper towels, yogurt, spinach, peanut butter, cat food,
        sparkling water, onions, laundry detergent, apples, butter, frozen peas, shampoo, carrots, pasta sauce,
        oat milk, garlic
    """,
    "todo_list_item": """
        water the plants, call mom, pick up the dry cleaning, sunscreen, balloons, sleeping bags, vacuum the stairs,
        pay the rent, sandpaper, buy stamps, renew passport, clean the gutters, a tent, candles, walk the dog,
        book the dentist, toothbrush, wood glue, finish the essay, new headphones, flashlights, paper plates, mop,
        sunglasses, send invitations
    """,
    "search_query": """
        jazz, classical music, the beatles, lullabies, rain sounds, bossa nova, christmas songs, miles davis,
        lo-fi beats
    """,
    "artist": "miles davis, nina simone, daft punk, johnny cash, adele, bob marley, fleetwood mac, beyonce",
    "album": "abbey road, kind of blue, thriller, rumours, blue train, graceland, back to black, the wall",
    "track": "bohemian rhapsody, imagine, hey jude, billie jean, blackbird, waterloo, hallelujah, space oddity",
    "playlist": "morning coffee, road trip, workout mix, rainy day, dinner party, focus, summer hits, slow sunday",
    "podcast": "this american life, radiolab, the daily, serial, planet money, science friday, hidden brain",
    "movie": "casablanca, the matrix, toy story, jaws, finding nemo, the godfather, spirited away, alien",
    "tv_show": "sherlock, planet earth, friends, the office, star trek, doctor who, bake off, seinfeld",
}

NUMBERS: dict[str, list[float]] = {
    "temperature": [*range(15, 29), *range(60, 79), 18.5, 19.5, 20.5, 21.5, 22.5],
    "color_temperature": list(range(2000, 6600, 100)),
    "volume_step_up": [5, 10, 15, 20, 25, 30, 40, 50],
    "volume_step_down": [5, 10, 15, 20, 25, 30, 40, 50],
    "timer_seconds": [*range(5, 61), 75, 90, 100],
    "timer_minutes": [*range(1, 61), 75, 90],
    "timer_hours": [*range(1, 13), 16, 18, 24, 36, 48],
}
PERCENT: list[float] = [*range(5, 101, 5), *range(5, 101, 5), *range(1, 100)]  # round ones more often


def listed(text: str) -> list[str]:
    """Split one of the lists above."""
    return [" ".join(item.split()) for item in text.split(",")]


def device_names(domain: str, template: str) -> list[str]:
    """Return the names of a domain that fit a template."""
    own, _, bare = DEVICES[domain].partition("/")
    if domain == "light" and "{name} <light>" in template:
        return listed(bare)
    if domain == "binary_sensor" and "bs_occupancy" in template:
        return listed(bare)
    return listed(own)


def all_devices() -> list[tuple[str, str]]:
    """Return every (name, domain)."""
    return [(name, domain) for domain, names in DEVICES.items() for name in listed(names.replace("/", ","))]


def wildcard(list_name: str, drawn: Mapping[str, object], rng: random.Random) -> str:
    """Draw free text for an open list; what is played fits the kind of media already named."""
    kind = str(drawn.get("media_class", list_name)) if list_name == "search_query" else list_name
    return rng.choice(listed(WORDS[kind]))


def number(list_name: str, rng: random.Random) -> float:
    """Draw a number a person would say for this list."""
    return rng.choice(NUMBERS.get(list_name, PERCENT))


_THE = r"(?:the|my|our)"
_THING = r"(?:light|lamp|fan|lock|door|window|gate|shutter|blind|curtain|shade|awning)"
_THINGS = rf"(?:{_THING}s|switches)"
_STATE = "on|off|open|shut|closed|opening|closing|shutting|securely|(?:un)?locked"
_UNIT = r"(?:hour|minute|second)"
_WHERE = rf"(?:in|on|of|across|around|throughout) (?:{_THE} )?"
_ZONE = r"(?:home|work|school|church|daycare)"

# The templates accept far more than people say. Each group names one thing nobody says.
_UNSAID = [
    # two articles, or an article before a state: the the lights, are my any lights, are the on
    rf"\b(?:the|my|our|any|some|many|every|each|single|there|which|what) {_THE}\b",
    rf"\b(?:is|are) {_THE} (?:any|some|all|every|each|{_STATE})\b",
    r"\b(?:what of|are every|are each|it of)\b|\b(?:is|are) there (?!any|some)",
    # one and many: every lights, all light, how many of the lamps is, which lights is
    rf"\b(?:every|each|single)\b(?! and).* {_THINGS}\b",
    rf"\b(?:all|how many|some|are any|are there any)\b.* (?:{_THING}|switch)\b",
    r"\bhow many\b.* (?:lighting|is)\b",
    rf"\b(?:every|each|single) (?:room|area|floor)s\b|\ball (?:of )?(?:{_THE} )?(?:room|area|floor)$",
    rf"\b{_THINGS} is\b|\b(?:{_THING}|switch|lighting) are\b|^is (?:there )?(?:all|some)\b|^is .*{_THINGS}\b",
    # numbers: an 5 minute timer, 1 hours, 5-minutes, for 5 minute, half an hours
    r"\ban (?!8\b|8\d\b|11\b|18\b|[aeiou])|\ba (?:8|11\b|18\b|[aeiou])",
    rf"\b1[ -]{_UNIT}s\b|\b(?:[2-9]|\d\d+) {_UNIT}\b(?! timer\b)|\d {_UNIT}s timer\b",
    rf"\d-{_UNIT}\b(?! timer\b)|\d-{_UNIT}s|\b\d+ degree$",
    rf"\b(?:half|1/2) (?:an?|1) (?:hours|minutes)\b|\b(?:and|and a) (?:half|1/2) {_UNIT}\b",
    # places: first floor floor, attic floor, in the first floor, in upstairs, in my home
    r"\b(\w+) \1\b",
    r"\b(?:upstairs|downstairs|basement|attic|cellar) floor\b|\b(?:in|at) (?:the |my |our )?\w+ floor\b",
    rf"\b(?:{_WHERE}|at (?:{_THE} )?)(?:upstairs|downstairs)\b",
    rf"\b{_WHERE}{_ZONE}$|\b{_THE} {_ZONE}$|\b(?:at|on) home$",
    # verbs: bring the lamp on, change the lamp off, make the volume to 5, turn increase the volume
    r"\bbring\b|^change (?!.*\bto\b)|^make .* to\b|\bturn (?:increase|decrease)\b",
    r"\bskip to the$|\bturn (?:up|down) (?:up|down)\b|^(?:up|down) ",
]
_unsaid = re.compile("|".join(_UNSAID))
_plural = re.compile(r"(?:lights|blinds|curtains|shades|spotlights|speakers)$")
_proper = re.compile(rf"\b{_THE} (?:boston|downtown|oslo|grandma's|{'|'.join(listed(DEVICES['person']))})\b")


def sounds_natural(prompt: str, drawn: Mapping[str, object], domain: str | None) -> bool:
    """Tell whether a person might say this; the templates alone also make "is my the lights on"."""
    name, area = str(drawn.get("name", "")), drawn.get("area")
    if _unsaid.search(prompt) or _proper.search(prompt):
        return False
    if area and re.search(rf"\b(?:on|at|around|across) (?:{_THE} )?{area}\b", prompt):
        return False
    if domain == "todo":
        return name in ("groceries", "chores", "homework") or f"{name} list" in prompt
    if domain is None or not re.match(r"(?:is|are|how|which|what)", prompt):
        return True
    wrong_verb = r"\bis\b|'s\b|\bwhats\b|\bhows\b" if _plural.search(name) else r"\bare\b"
    return not re.search(wrong_verb, prompt)
