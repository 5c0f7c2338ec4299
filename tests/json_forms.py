"""The many ways to write one JSON document: number spellings, blanks, escapes."""

import json
import random
from typing import Any

BLANKS = ["", "", "", " ", "\t", "\r\n", "  \n"]


class Raw(str):
    """A part of a document that is written as it is."""


def spell(value: Any, seed: int) -> str:
    """Return a way to write `value` in JSON, after `seed`."""
    return _spell(value, random.Random(seed))


def _spell(value: Any, chance: random.Random) -> str:
    def blank() -> str:
        return chance.choice(BLANKS)

    if isinstance(value, Raw):
        written = str(value)
    elif isinstance(value, dict):
        members = (f"{blank()}{spell_text(k, chance)}{blank()}:{_spell(v, chance)}" for k, v in value.items())
        written = "{" + (",".join(members) or blank()) + "}"
    elif isinstance(value, list):
        written = "[" + (",".join(_spell(item, chance) for item in value) or blank()) + "]"
    elif isinstance(value, str):
        written = spell_text(value, chance)
    elif isinstance(value, float):
        written = spell_number(value, chance)
    else:
        written = json.dumps(value)
    return blank() + written + blank()


def spell_number(value: float, chance: random.Random) -> str:
    """Return a way to write `value` that is read as the same double."""
    digits, exponent = f"{value:.16e}".split("e")
    significant = digits.replace(".", "").replace("-", "").rstrip("0") or "0"
    sign, power = "-" if digits.startswith("-") else "", int(exponent)
    zeros = chance.randrange(4) if value else 0
    ways = [
        repr(value),
        f"{sign}{significant[0]}.{significant[1:] or '0'}e{power}",
        f"{sign}0.{significant}E{power + 1:+}",
        f"{sign}{significant}{'0' * zeros}e{power - len(significant) + 1 - zeros:+03}",
    ]
    if value.is_integer() and abs(value) < 1e15:
        ways += [f"{value:.0f}", f"{value:.0f}.0", f"{value:.0f}e0", f"{value:.0f}.000"]
    way = chance.choice(ways)
    return way if float(way) == value else repr(value)


def spell_text(text: str, chance: random.Random) -> str:
    """Return a way to write a string: any character may be escaped."""
    may_escape = chance.random() < 0.5
    written = ""
    for character in text:
        if character in '"\\' or ord(character) < 32 or (may_escape and chance.random() < 0.3):
            encoded = character.encode("utf-16-be")
            written += "".join(f"\\u{encoded[at : at + 2].hex()}" for at in range(0, len(encoded), 2))
        else:
            written += character
    return f'"{written}"'
