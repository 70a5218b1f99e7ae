"""Guesses the class word from the words after a trigger: "a sks toy dog jumps over a fence" gives "toy dog"."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from .captions import FILLERS, has_word, word_pattern


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SINGULAR = _words("a an one this that each every another")
PREPOSITIONS = _words(
    """about above across after against along amid among around as at before behind below beneath beside between
    beyond by down during for from in inside into near next of off on onto opposite out outside over past through to
    toward towards under underneath until up upon via with within without"""
)  # fmt: skip
STOPS = FILLERS | SINGULAR | PREPOSITIONS | _words(
    """the these those some any no all both two three four five six my your his her its our their it he they she we i
    who which whose what where when while because if than then and or but nor not so very too also just still now again
    except like per close-up is are was were be been being am has have had do does did could will would may might must
    should here there outdoors indoors alone asleep awake together away back upside mid ready full busy visible vs
    sat stood lay ran slept ate held wore caught swam flew rode drove fell sang drank shot hung came went took made got
    gave found hid dug drew threw knelt leapt lost spun swung crept woke seen shown taken drawn worn bit"""
)  # fmt: skip
"""Words that end a noun phrase."""
NOUNS_OR_VERBS = _words("can saw")
AFTER_NOUNS = PREPOSITIONS | _words("and or is was full")
"""Before these and at the end, :data:`NOUNS_OR_VERBS` are nouns: "sks trash can on a table", not "sks dog can fly"."""
PAIRS = _words(
    """boots glasses gloves goggles headphones heels jeans leggings mittens overalls pants sandals scissors shoes
    shorts skates skis slippers sneakers socks sunglasses tights trousers trunks"""
)  # fmt: skip
"""Plural nouns that follow a singular article in prompts made by a template: "a sks leather pants"."""
ATTRIBUTES_IN_ED = _words("haired eyed eared legged tailed headed faced handled sleeved shaped sized colored coloured")
"""They lead to a noun, as in "red haired woman", unlike "dog dressed as a clown"."""
FOREIGN = _words(
    """der das ein eine einem einen einer dem vom zum zur mit auf im beim und ist le la les une des du sur dans avec
    sous et est un una unos los las el del con en sobre bajo y es il gli su sul sulla nel nella uma um na em com het
    een van op met foto bild"""
)  # fmt: skip
"""Articles, prepositions and the like of other languages, without :data:`JOINING`."""
JOINING = _words("de di")
"""Words that stand inside a noun, as in "oso de peluche", and before a trigger, as in "photo de sks chien"."""
VERBS = _words(
    """appear approach bark bask bathe beg bite blow bounce breathe bring browse brush build carry catch chase chew
    chomp clean climb come cook crawl cross crouch cry curl cut cuddle dance devour dig dive drag draw drink drive
    drool eat emerge enjoy enter explore face fall feel fetch fight fill find float fly follow gallop gaze get give
    glow go grab graze grin growl grow guard hang have hide hike hit hold hop hover howl hug hunt jog jump keep kick
    kneel know laugh lay lean leap leave lick lie lift listen live look lounge love make meet meow munch move nap
    need nibble nuzzle open paint pant paw peek perch perform pick play point pose pounce prance pull purr push
    raise reach read relax rest ride rise roam roar roll row run rush sail say see sell show shine shiver sing sit
    skate skateboard ski sleep slide smell smile snarl sneak sneeze sniff snooze snore snuggle soar speak splash
    sprint squat stalk stand stare start stay steal step stretch stroll study surf swim swing tackle take talk taste
    teach tell think throw tilt tour train travel trot try tug turn use visit wade wag wait wake walk wander want
    wash watch wave wear wink work write yawn yell zoom"""
)  # fmt: skip
"""Verbs that captions use. Any other word in -s may be a plural noun, as in "rubber boots"."""
NOUNS_IN_ING = _words(
    "building ceiling clothing drawing duckling earring king painting pudding ring sibling sling spring string swing "
    "thing wing"
)
POSSESSIVE = re.compile(r"['’](?:s\b|(?=\s|$))")
PAIR_OF = re.compile(r"^\s*(pair|set|kind|type) of ", re.IGNORECASE)
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
    found = re.search(rf"({word_pattern(trigger)}\s*)+", prompt, re.IGNORECASE) if trigger else None
    return _noun_phrase(prompt[found.end() :], prompt[: found.start()].lower().split()) if found else None


def class_word_of(class_prompt: str) -> str | None:
    """The noun phrase of a class prompt: "a photo of a dog on grass" gives "dog"."""
    words = class_prompt.split()
    start = next((i for i, word in enumerate(words) if word.lower() not in FILLERS), len(words))
    return _noun_phrase(" ".join(words[start:]), class_prompt.lower().split()[:start])


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


def _noun_phrase(text: str, before: Sequence[str]) -> str | None:
    """The noun phrase that ``text`` begins with, after the words ``before`` it."""
    is_singular = bool(before) and before[-1] in SINGULAR  # then a later word in -s is a verb
    text = PUNCTUATION.split(POSSESSIVE.split(text, maxsplit=1)[0], maxsplit=1)[0]
    found = [stripped for part in PAIR_OF.sub("", text).split() if (stripped := part.strip("-*'’"))]
    words: list[str] = []
    for word, following in itertools.pairwise([*found, ""]):
        if _ends_phrase(word.lower(), following.lower(), words, is_singular):
            break
        words.append(word)
    if words and _is_participle(words[-1].lower()):  # "sks seated on a chair" has no noun
        return None
    return " ".join(_of_one_language(words, before)) or None


def _ends_phrase(word: str, following: str, nouns: Sequence[str], is_singular: bool) -> bool:
    """Whether a word after ``nouns`` and before ``following`` is not part of their phrase."""
    if word in PAIRS:
        return False
    if word in NOUNS_OR_VERBS:
        return bool(following) and following not in AFTER_NOUNS and not following.endswith("ing")
    return word in STOPS or _is_verb(word, nouns, is_singular)


def _of_one_language(words: Sequence[str], before: Sequence[str]) -> Sequence[str]:
    """The words. In another language, whose verbs are unknown: a first word that stands alone, or nothing."""
    is_foreign = any(word.lower() in FOREIGN or _is_of_another_script(word) for word in (*before, *words))
    if not is_foreign and JOINING.isdisjoint(before):
        return words
    noun = list(itertools.takewhile(lambda word: word.lower() not in FOREIGN, words))
    return noun if len(noun) == 1 else []


def _is_of_another_script(word: str) -> bool:
    return any(letter.isalpha() and letter > "\u024f" for letter in word)  # the last one of Latin


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
    if word in ATTRIBUTES_IN_ED:
        return False
    in_ing = len(word) > 4 and word.endswith("ing") and word not in NOUNS_IN_ING
    return in_ing or (len(word) > 4 and word.endswith("ed") and not word.endswith("eed"))


def _common_start(phrases: Sequence[Sequence[str]]) -> list[str]:
    count = 0
    for words in zip(*phrases, strict=False):
        if len({word.lower() for word in words}) > 1:
            break
        count += 1
    return list(phrases[0][:count])
