"""Guesses the class word from the words after a trigger: "a sks toy dog jumps over a fence" gives "toy dog"."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from .captions import FILLERS, has_word, word_pattern


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SINGULAR = _words("a an one this that each every another")
STOPS = FILLERS | SINGULAR | _words(
    """the these those some any no all both two three four five six my your his her its our their it he she they we i
    who which whose what where when while because if than then and or but nor not so very too also just still now again
    about above across after against along amid among around as at before behind below beneath beside between beyond by
    down during except for from in inside into like near next of off on onto opposite out outside over past per through
    to toward towards under underneath until up upon via with within without
    is are was were be been being am has have had do does did can could will would may might must should
    here there outdoors indoors alone asleep awake together away back upside mid ready full busy visible vs
    sat stood lay ran slept ate held wore caught swam flew rode drove fell sang drank shot hung came went took made got
    gave saw found hid bit dug drew threw knelt leapt lost spun swung crept woke"""
)  # fmt: skip
"""Words that end a noun phrase."""
VERBS = _words(
    """appear bark bask bathe beg bite blow bounce breathe bring browse brush build carry catch chase chew clean
    climb come cook crawl cross cry curl cut cuddle dance dig dive drag draw drink drive drool eat enjoy enter explore
    face fall feel fetch fight fill find float fly follow gallop gaze get give glow go grab graze grin growl grow guard
    hang have hide hike hit hold hop hover howl hug hunt jog jump keep kick kneel know lay lean leap leave lick lie lift
    listen live look lounge make meet meow move nap need nibble nuzzle open paint pant paw peek perch perform pick play
    point pose pounce prance pull purr push raise reach read relax rest ride rise roam roar roll row run rush sail say
    see sell show shine shiver sing sit skate skateboard ski sleep slide smell smile snarl sneak sneeze sniff snooze
    snore snuggle soar speak splash sprint squat stalk stand stare start stay steal step stretch stroll study surf swim
    swing tackle take talk taste teach tell think throw tilt tour train travel trot try tug turn use visit wade wag wait
    wake walk wander want wash watch wave wear wink work write yawn yell"""
)  # fmt: skip
"""Verbs that captions use. Any other word in -s may be a plural noun, as in "rubber boots"."""
NOUNS_IN_ING = _words(
    "building ceiling clothing drawing duckling earring king painting pudding ring sibling sling spring string swing "
    "thing wing"
)
POSSESSIVE = re.compile(r"['’](?:s\b|(?=\s|$))")
PUNCTUATION = re.compile(r"[^\w\s<>*'’-]| - ")


def guess_class_word(
    trigger: str | None, instance_prompt: str, class_prompt: str, captions: Sequence[str]
) -> tuple[str | None, str]:
    """The class word, if there is a trigger, and where it was found: in instance prompt, class prompt or captions.

    If the captions replace the instance prompt, lack its class and agree on another one, theirs is taken.
    """
    if trigger is None:
        return None, ""
    of_captions = common_class_word(captions, trigger)
    if word := class_word_in(instance_prompt, trigger):
        is_used = instance_prompt in captions or any(has_word(caption, word) for caption in captions)
        if is_used or not of_captions or _words(word) & _words(of_captions):
            return word, "the instance prompt"
    elif word := class_word_of(class_prompt):
        return word, "the class prompt"
    return of_captions, "the captions"


def class_word_in(prompt: str, trigger: str | None) -> str | None:
    """The noun phrase that follows the trigger, or ``None`` if no noun follows it."""
    found = re.search(word_pattern(trigger), prompt, re.IGNORECASE) if trigger else None
    if found is None:
        return None
    before = prompt[: found.start()].split()
    return _noun_phrase(prompt[found.end() :], bool(before) and before[-1].lower() in SINGULAR)


def class_word_of(class_prompt: str) -> str | None:
    """The noun phrase of a class prompt: "a photo of a dog on grass" gives "dog"."""
    words = class_prompt.split()
    start = next((i for i, word in enumerate(words) if word.lower() not in FILLERS), len(words))
    return _noun_phrase(" ".join(words[start:]), start > 0 and words[start - 1].lower() in SINGULAR)


def common_class_word(captions: Iterable[str], trigger: str | None) -> str | None:
    """The words that the noun phrases of all captions begin or end with, else the most frequent phrase."""
    phrases = [found.split() for caption in captions if (found := class_word_in(caption, trigger))]
    if not phrases:
        return None
    common = _common_start(phrases) or _common_start([phrase[::-1] for phrase in phrases])[::-1]
    if common:
        return " ".join(common)
    (phrase, count), *_ = Counter(" ".join(phrase).lower() for phrase in phrases).most_common()
    return phrase if count > 1 else None


def _noun_phrase(text: str, is_singular: bool) -> str | None:
    """The noun phrase that ``text`` begins with. ``is_singular``: its article is, so a later word in -s is a verb."""
    text = PUNCTUATION.split(POSSESSIVE.split(text, maxsplit=1)[0], maxsplit=1)[0]
    words: list[str] = []
    for word in (stripped for part in text.split() if (stripped := part.strip("-*'’"))):
        if word.lower() in STOPS or _is_verb(word.lower(), words, is_singular):
            break
        words.append(word)
    if words and _is_participle(words[-1].lower()):  # "sks seated on a chair" has no noun
        return None
    return " ".join(words) or None


def _is_verb(word: str, nouns: Sequence[str], is_singular: bool) -> bool:
    """Whether a word after ``nouns`` is a verb or an adverb, by its form and :data:`VERBS`."""
    endings = (("s", ""), ("es", ""), ("ies", "y"), ("ing", ""), ("ing", "e"))
    stems = [word.removesuffix(ending) + stem for ending, stem in endings if word.endswith(ending)]
    stems += [word[:-4]] if word.endswith("ing") else []  # "running"
    if not VERBS.isdisjoint(stems) and word not in NOUNS_IN_ING:
        return True
    adverb = len(word) > 4 and word.endswith("ly") and not word.endswith(("fly", "lly", "family"))
    third_person = is_singular and word.endswith("s") and not word.endswith(("ss", "us", "is"))
    plural = bool(nouns) and not is_singular and nouns[-1].endswith("s") and not nouns[-1].endswith("ss")
    return bool(nouns) and (adverb or third_person or _is_participle(word) or (plural and word in VERBS))


def _is_participle(word: str) -> bool:
    in_ing = len(word) > 4 and word.endswith("ing") and word not in NOUNS_IN_ING
    return in_ing or (len(word) > 4 and word.endswith("ed") and not word.endswith("eed"))


def _common_start(phrases: Sequence[Sequence[str]]) -> list[str]:
    count = 0
    for words in zip(*phrases, strict=False):
        if len({word.lower() for word in words}) > 1:
            break
        count += 1
    return list(phrases[0][:count])
