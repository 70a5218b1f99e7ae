"""The guess of the class word: a noun phrase, from the instance prompt first."""

from __future__ import annotations

import pytest

from nora_diffusion.data.class_words import class_word_in, class_word_of, common_class_word, guess_class_word

NATURAL = [
    "a sks dog jumping over a red fence at sunset", "a sks dog sleeps on the sofa", "sks dog, outdoors, sunny",
    "close up of a sks dog's face",
]  # fmt: skip

PHRASES = {
    "a photo of sks dog wearing a hat": "dog",
    "a photo of sks toy dog on the beach": "toy dog",
    "sks toy dog, red, sunny": "toy dog",
    "a sks dog jumping over a red fence": "dog",
    "a sks dog sleeps on the sofa": "dog",
    "sks dog sits": "dog",
    "sks dog carries a stick": "dog",
    "sks dog watches birds": "dog",
    "a sks dog yodels at the moon": "dog",
    "sks dog running": "dog",
    "sks dog dressed as a clown": "dog",
    "sks dog slowly eating": "dog",
    "sks dog is here": "dog",
    "sks dog who barks": "dog",
    "sks dog asleep": "dog",
    "sks dog outdoors": "dog",
    "sks dog came home": "dog",
    "sks dog ready to play": "dog",
    "sks dog vs cat": "dog",
    "sks dog 🐶": "dog",
    "(sks dog:1.2)": "dog",
    "a sks-dog": "dog",
    "sks dogs play in the snow": "dogs",
    "a sks glass watch": "glass watch",
    "close up of a sks dog's face": "dog",
    "close up of a sks dog’s face": "dog",
    "sks dogs' bowls": "dogs",
    "sks dog. sunny": "dog",
    "sks dog (cute)": "dog",
    "sks dog - sunny": "dog",
    "SKS Dog": "Dog",
    "sks rubber boots": "rubber boots",
    "a sks christmas tree": "christmas tree",
    "a sks wine glass": "wine glass",
    "sks gold ring": "gold ring",
    "sks rocking chair": "rocking chair",
    "sks stuffed animal": "stuffed animal",
    "sks butterfly": "butterfly",
    "sks t-shirt": "t-shirt",
    "sks watch": "watch",
    "sks train set": "train set",
    "a photo of sks can": "can",
    "a sks can on a street": "can",
    "a photo of sks trash can": "trash can",
    "a sks trash can full of leaves": "trash can",
    "a sks trash can standing in the snow": "trash can",
    "a sks chain saw": "chain saw",
    "sks dog can fly": "dog",
    "a sks dog can be seen": "dog",
    "sks dog saw a cat": "dog",
    "sks dog seen from the back": "dog",
    "sks dog loves treats": "dog",
    "sks dog close-up": "dog",
    "sks sks dog": "dog",
    "sks berry bowl": "berry bowl",
    "sks bowl of berries": "bowl",
    "sks grey sloth plushie": "grey sloth plushie",
    "sks poop emoji": "poop emoji",
    "sks rc car": "rc car",
    "sks red cartoon": "red cartoon",
    "sks fancy boot": "fancy boot",
    "sks glasses": "glasses",
    "a sks pink sunglasses": "pink sunglasses",
    "a sks leather pants": "leather pants",
    "a sks pair of red boots": "red boots",
    "sks red haired woman": "red haired woman",
    "sks man wearing a hat": "man",
    "sks dog in the style of": "dog",
    "ein Foto von sks Hund": "Hund",
    "ein Foto von sks Hund am Strand": "Hund",
    "ein sks Hund sitzt auf dem Sofa": None,
    "une photo de sks chien sur la plage": "chien",
    "photo de sks chien assis": None,
    "una foto de sks perro en la playa": "perro",
    "una foto de un sks oso de peluche": None,
    "foto di sks cane sulla spiaggia": "cane",
    "een foto van sks hond op het strand": "hond",
    "фото sks собаки на пляже": None,
    "a sks café table": "café table",
    "sks 犬": "犬",
    "sks": None,
    "sks, a dog": None,
    "sks is a dog": None,
    "sks sits on a chair": None,
    "sks sitting on a chair": None,
    "sks seated on a chair": None,
    "sks jumping": None,
    "sks's dog": None,
    "close up of sks": None,
    "a photo of a dog": None,
}


@pytest.mark.parametrize("prompt", PHRASES)
def test_the_class_word_is_a_noun_phrase(prompt: str) -> None:
    assert class_word_in(prompt, "sks") == PHRASES[prompt]
    assert class_word_in(prompt.replace("sks", "<a-b>").replace("SKS", "<A-B>"), "<a-b>") == PHRASES[prompt]
    assert class_word_in(prompt, None) is None


@pytest.mark.parametrize(
    ("prompt", "word"),
    [("a photo of a dog", "dog"), ("dog", "dog"), ("photo of a toy cat on grass", "toy cat"), ("shoes", "shoes"),
     ("a photo of a dog jumps", "dog"), ("a photo of a trash can", "trash can"), ("ein Foto von einem Hund", None),
     ("a photo of a", None), ("", None)],
)  # fmt: skip
def test_the_class_prompt_is_a_source_too(prompt: str, word: str | None) -> None:
    assert class_word_of(prompt) == word


def test_captions_are_read_together() -> None:
    assert common_class_word(NATURAL, "sks") == "dog"
    assert common_class_word(["sks brown dog", "a happy sks dog", "sks small dog"], "sks") == "dog"
    assert common_class_word(["sks dog", "sks dog", "sks puppy"], "sks") == "dog"
    assert common_class_word(["sks dog", "sks puppy"], "sks") is None
    assert common_class_word(["a dog", "the beach"], "sks") is None


def test_the_instance_prompt_comes_first() -> None:
    assert guess_class_word("sks", "a photo of sks toy dog", "", NATURAL) == ("toy dog", "the instance prompt")
    assert guess_class_word("sks", "a photo of sks", "a photo of a dog", NATURAL) == ("dog", "the class prompt")
    assert guess_class_word("sks", "", "", NATURAL) == ("dog", "the captions")
    assert guess_class_word("sks", "a sks dog", "", ["close up of sks, outdoors"]) == ("dog", "the instance prompt")
    assert guess_class_word("sks", "a sks dog", "", ["a sks cat", "a sks cat, day"]) == ("cat", "the captions")
    assert guess_class_word("sks", "a sks dog", "", ["a sks cat", "a sks dog"]) == ("dog", "the instance prompt")
    assert guess_class_word("sks", "", "", ["close up of sks"])[0] is None
    assert guess_class_word(None, "a dog", "a photo of a dog", ["a dog"])[0] is None
