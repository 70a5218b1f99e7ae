"""``<lora:...>`` tags: parsing, errors, and round trips."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nora_diffusion import UserError
from nora_diffusion.generation.tags import FORBIDDEN, Tag, parse_tags, write_tags


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("<lora:dog>", Tag("dog")),
        ("<lora:dog:0.8>", Tag("dog", 0.8, 0.8)),
        ("<lora:dog:0.8:0.6>", Tag("dog", 0.6, 0.8)),
        ("<lora:dog:te=0.6>", Tag("dog", 0.6, 0.6)),
        ("<lora:dog:te=0.6:unet=-2>", Tag("dog", -2, 0.6)),
        ("<lora:dog:0.5:te=0>", Tag("dog", 0, 0)),
        ("<lora:dog:0.5:unet=1>", Tag("dog", 1, 0.5)),
        ("<LoRA: my dog : .5e0 >", Tag("my dog", 0.5, 0.5)),
        ("<lora:a=b:1>", Tag("a=b")),
    ],
)
def test_every_form_of_a_tag(text: str, tag: Tag) -> None:
    assert parse_tags(f"a dog {text} in snow") == ("a dog in snow", [tag])


@pytest.mark.parametrize(
    ("prompt", "clean"),
    [
        ("a (dog:1.2), <b> [x|y] 1 < 2", "a (dog:1.2), <b> [x|y] 1 < 2"),
        ("<lora:a:1> <lora:b:1> a dog", "a dog"),
        ("a dog <lora:a:1><lora:b:1>", "a dog"),
        ("<lora:a:1>", ""),
        ("a dog\n<lora:a:1>", "a dog\n"),
        ("  a  dog  ", "  a  dog  "),
    ],
)
def test_the_rest_of_the_prompt_is_unchanged(prompt: str, clean: str) -> None:
    assert parse_tags(prompt)[0] == clean


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<lora:dog:big>", "'big' in <lora:dog:big> is not a number"),
        ("<lora:dog:nan>", "is not a number"),
        ("<lora:dog:1e999>", "out of range"),
        ("<lora:dog:101>", "choose -100 to 100"),
        ("<lora:dog:>", "is not a number"),
        ("<lora::0.5>", "<lora::0.5> is not a valid tag"),
        ("<lora:dog:1:1:1>", "is not a valid tag"),
        ("<lora:dog:dyn=4>", "'dyn=4' in <lora:dog:dyn=4> is unknown or repeated"),
        ("<lora:dog:te=1:te=2>", "name each weight once"),
        ("<lora:dog:0.8", "is not a complete tag"),
        ("<lora dog>", "'<lora dog>' in the prompt is not a complete tag"),
        ("<lo<lora:dog:1>ra:cat:1>", "is not a complete tag"),
        ("<lora:dog:1> and <lora:dog:0.5>", "names the adapter 'dog' twice"),
        ("<lora:a\x00b:1>", "is not valid in a tag"),
        ("<lora:dog:1_0>", "is not a number"),
    ],
)
def test_errors_quote_the_tag(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_tags(f"a dog {text}")
    assert message in str(caught.value)


def test_writing_keeps_positions() -> None:
    prompt = "<lora:hat:0.5> a dog <lora:dog:0.8> in snow"
    assert write_tags(prompt, [Tag("dog", 0.3, 0.3), Tag("hat")]) == "<lora:hat:1> a dog <lora:dog:0.3> in snow"
    assert write_tags(prompt, [Tag("dog", 0.3, 0.1)]) == "a dog <lora:dog:unet=0.3:te=0.1> in snow"
    assert write_tags(prompt, [Tag("cat")]) == "a dog in snow <lora:cat:1>"
    assert write_tags(prompt, []) == "a dog in snow"
    with pytest.raises(UserError, match="same adapter name"):
        write_tags("a dog", [Tag("dog"), Tag("dog", 0.5, 0.5)])


weights = st.floats(-100, 100).map(lambda w: w + 0.0)  # -0.0 becomes 0.0
names = st.text(min_size=1, max_size=12).filter(lambda n: n == n.strip() != "" and not FORBIDDEN.search(n))
tag_lists = st.lists(st.builds(Tag, names, weights, weights), max_size=4, unique_by=lambda tag: tag.name)
texts = st.text(alphabet=st.sampled_from("a, <>:\n(lora1"), max_size=20) | st.text(max_size=20)


def _without_tags(text: str) -> bool:
    try:
        return parse_tags(text) == (text, [])
    except UserError:
        return False


@given(texts.filter(_without_tags), tag_lists)
def test_parsing_inverts_writing(prompt: str, tags: list[Tag]) -> None:
    assert parse_tags(write_tags(prompt, tags)) == (prompt, tags)


@given(texts.filter(_without_tags), texts.filter(_without_tags), tag_lists, tag_lists)
def test_rewriting_leaves_only_the_new_tags(before: str, after: str, old: list[Tag], new: list[Tag]) -> None:
    prompt = f"{before} {' '.join(map(str, old))} {after}"
    rewritten = write_tags(prompt, new)
    assert parse_tags(rewritten)[0] == parse_tags(prompt)[0]
    assert sorted(parse_tags(rewritten)[1], key=str) == sorted(new, key=str)


@given(st.text(alphabet=st.sampled_from("<>lora:=te.5 -dog"), max_size=40) | st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        clean, tags = parse_tags(text)
    except UserError:
        return
    assert parse_tags(clean) == (clean, [])
    assert parse_tags(write_tags(clean, tags)) == (clean, tags)


@pytest.mark.parametrize(
    ("prompt", "without"),
    [
        ("a photo <lora:mug:0.8>of a mug", "a photo of a mug"),
        ("a mug<lora:mug>in the snow", "a mug in the snow"),
        ("a mug<lora:mug><lora:hat>in the snow", "a mug in the snow"),
        ("a mug <lora:mug> <lora:hat> in the snow", "a mug in the snow"),
        ("<lora:mug>a mug", "a mug"),
        ("a mug<lora:mug>", "a mug"),
    ],
)
def test_removing_a_tag_keeps_words_separate(prompt: str, without: str) -> None:
    assert parse_tags(prompt)[0] == without
