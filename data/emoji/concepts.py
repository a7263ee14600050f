"""The concepts that emoji show: their names and captions, and which belong on one side of a split.

Labels, keywords and shortcodes come from `emojibase-data` (Unicode CLDR's, cleaned).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from data.emoji.npm import read_json
from data.emoji.words import CHATTER, KINDS, WEAK_WORDS

LEFT_OUT_GROUPS = ("component", "flags")

# Code points in lower-case hexadecimal.
_JOINERS = {"200d", "fe0f"}
_SIGNS = {"2640", "2642"}  # woman, man
_HAIR = {"1f9b0", "1f9b1", "1f9b2", "1f9b3"}  # red, curly, bald, white
_DIRECTION = {"27a1"}  # facing right
_ADULTS = {"1f468", "1f469", "1f9d1", "1f471", "1f9d4"}  # man, woman, person, blond, bearded
_CHILDREN = {"1f466", "1f467", "1f9d2"}
_TWINS = {
    "1f474": "1f9d3",  # old man, old woman -> older person
    "1f475": "1f9d3",
    "1f478": "1fac5",  # princess, prince -> person with crown
    "1f934": "1fac5",
    "1f936": "1f385",  # Mrs Claus, Mx Claus -> Santa Claus
    "1f9d1-1f384": "1f385",
    "1f57a": "1f483",  # man dancing -> woman dancing
    "1f930": "1fac4",  # pregnant woman, man -> person
    "1fac3": "1fac4",
    "1f931": "1f9d1-1f37c",  # breast-feeding -> person feeding baby
    "1f46b": "1f9d1-1f91d-1f9d1",  # couples -> people holding hands
    "1f46c": "1f9d1-1f91d-1f9d1",
    "1f46d": "1f9d1-1f91d-1f9d1",
    "1f6ba": "1f6b9",  # women's room -> men's room
    "2642": "2640",  # male sign -> female sign
}


@dataclass(frozen=True)
class Concept:
    """One thing that every style draws."""

    code: str  # code points, lower-case hexadecimal, joined by "-", without the variation selector
    name: str  # what it is called, in lower case; unique
    group: str  # the code of the group of variants it belongs to
    subgroup: str  # Unicode's, e.g. "animal-mammal"
    captions: tuple[str, ...]  # what a person would type, the name first


def load_concepts(package: Path) -> list[Concept]:
    """All concepts of an `emojibase-data` package but flags, components and skin tones.

    In Unicode's order. Names are unique.
    """
    sets = [f"en/shortcodes/{name}.json" for name in ("joypixels", "github", "iamcal", "emojibase")]
    meta, entries, *shortcodes = read_json(package, "meta/groups.json", "en/data.json", *sets)
    groups, subgroups = meta["groups"], meta["subgroups"]
    entries = [
        entry
        for entry in entries
        if groups.get(str(entry.get("group")), "component") not in LEFT_OUT_GROUPS
    ]
    # Shortcodes squeeze words ("womens", "clock8"); only those made of known words are kept.
    known = {
        word for entry in entries for word in _words(" ".join([entry["label"], *entry["tags"]]))
    }
    concepts = []
    for entry in entries:
        code, name = plain_code(entry["hexcode"]), plain_name(entry["label"])
        aliases = {
            " ".join(words)
            for codes in shortcodes
            for alias in _as_list(codes.get(entry["hexcode"]))
            if known.issuperset(words := _words(alias))
        }
        subgroup = subgroups[str(entry["subgroup"])]
        captions = make_captions(code, name, subgroup, entry["tags"], sorted(aliases - {name}))
        concepts.append(Concept(code, name, group_of(code), subgroup, captions))
    return concepts


def plain_code(code: str) -> str:
    """Code points joined by "-": lower case, without the variation selector that styles drop."""
    return "-".join(point for point in code.lower().split("-") if point != "fe0f")


def group_of(code: str) -> str:
    """One name for all variants that differ only in gender, hair, direction or family members."""
    points = [p for p in code.split("-") if p not in _JOINERS]
    adults = sum(p in _ADULTS for p in points)
    people = adults + sum(p in _CHILDREN for p in points)
    if "1f48b" in points and people:  # ... kissing
        return "1f48f"
    if "2764" in points and people:  # couple with heart
        return "1f491"
    if people > 1 and people == len(points):
        return "1f46a"  # family
    merged = []
    for i, point in enumerate(points):
        if i and point in _SIGNS | _HAIR | _DIRECTION:
            continue
        merged.append("1f9d1" if point in _ADULTS else "1f9d2" if point in _CHILDREN else point)
    key = "-".join(merged)
    return _TWINS.get(key, key)


def plain_name(label: str) -> str:
    """A Unicode label as a person would write it: "man: red hair" -> "man with red hair"."""
    label = label.lower().replace("’", "'").translate(dict.fromkeys(map(ord, "“”")))
    head, colon, rest = label.partition(": ")
    if colon:
        parts = rest.split(", ")
        listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
        if head == "kiss":
            label = f"{listed} kissing"
        elif head == "couple with heart":
            label = f"{listed} in love"
        elif head == "family":
            label = f"family of {listed}"
        elif rest == "facing right" or head == "keycap":
            label = f"{head} {rest}"
        elif rest == "bald":
            label = f"bald {head}"
        else:
            label = f"{head} with {'a ' if rest == 'beard' else ''}{rest}"
    if match := re.fullmatch(r"(\w+) button \(blood type\)", label):
        label = f"blood type {match[1]}"
    return label


def make_captions(
    code: str, name: str, subgroup: str, tags: Iterable[str], aliases: Iterable[str]
) -> tuple[str, ...]:
    """About a dozen captions of one concept, the name first, none twice.

    The name alone and in phrases, other names, the kind of thing, and the keywords in turn, with
    and without the name, so that a text tower meets many words in many places.
    """
    tags = [tag.lower().replace("’", "'") for tag in tags]
    tags = [tag for tag in tags if tag != name and tag not in CHATTER and _words(tag)]
    tags.sort(key=lambda tag: digest(code, tag))  # alphabetical order would favour the a's
    kinds = KINDS[subgroup]
    captions = [name, with_article(name), f"an emoji of {with_article(name)}", *list(aliases)[:2]]
    captions += [f"{name}, {kinds[0]}", *kinds[1:2]]
    strong = [tag for tag in tags if tag not in WEAK_WORDS] or tags
    for start in range(0, min(len(tags), 6), 2):
        captions.append(", ".join([name, *tags[start : start + 2]]))
    for start in range(0, min(len(strong), 6), 3):
        captions.append(", ".join([*strong[start : start + 3], *([] if start else kinds[:1])]))
    captions += strong[:1]
    return tuple(dict.fromkeys(captions))


def with_article(name: str) -> str:
    """A noun phrase with "a" or "an" where one fits; plurals and proper names stay as they are."""
    first, last = name.split()[0], name.split()[-1]
    if (last.endswith("s") and not last.endswith("ss")) or first in {"the", "santa", "mrs."}:
        return name
    return f"{'an' if first[0] in 'aeiou' else 'a'} {name}"


def without_names_of(concepts: Iterable[Concept], others: Iterable[Concept]) -> list[Concept]:
    """Concepts less those captions that are the plain name of one of the others.

    A keyword of the polar bear is "bear": where the bear is held out, it must not be trained.
    """
    names = {text for other in others for text in (other.name, with_article(other.name))}
    return [
        replace(concept, captions=tuple(c for c in concept.captions if c not in names))
        for concept in concepts
    ]


def held_out_groups(concepts: Iterable[Concept], seed: int) -> set[str]:
    """A fifth of the groups, drawn by a hash of (seed, group): the same on every machine."""
    groups = sorted({c.group for c in concepts}, key=lambda g: digest(str(seed), g))
    return set(groups[: round(len(groups) / 5)])


def digest(*parts: str) -> bytes:
    """Eight bytes that are a pure function of the strings; sorting by them shuffles."""
    return blake2b("\0".join(parts).encode(), digest_size=8).digest()


def _words(text: str) -> list[str]:
    return re.findall(
        r"[^\W\d_][\w']*|\d+:\d+|\d+", text.lower().replace("’", "'").replace("_", " ")
    )


def _as_list(value: str | list[str] | None) -> list[str]:
    return value if isinstance(value, list) else [value] if value else []
