"""Prompts without triggers, and the example subjects that they ask for."""

from __future__ import annotations

TUNED = {
    "android-pink": ("a pink robot in the forest", "a robot at night, photo"),
    "backpack": ("a bag on the beach", "a small bag next to a tree in the snow"),
    "backpack-green": ("a green bag on a wooden table", "a photo of a green bag in the desert"),
    "beetle": ("a bug in the grass", "a small bug on a red background"),
    "billiard": ("a ball on the road", "a black ball in front of a brick wall"),
    "boba": ("a drink on a wooden table", "a brown drink on the beach at sunset"),
    "castle": ("a house in the mountains", "a big house in the snow at night"),
    "cupcake": ("a cake on a wooden table", "a pink cake on a striped background"),
    "cyclops-orange": ("an orange monster in the snow", "a one-eyed orange monster on the road"),
    "cyclops-purple": ("a purple monster on the beach", "a one-eyed purple monster wearing a top hat"),
    "gremlin-green": ("a green monster in the forest", "a three-eyed green monster at sunset"),
    "hibiscus": ("a flower in the grass", "a red flower next to a tree"),
    "lovemug-blue": ("a blue mug on a wooden table", "a mug with a heart on a white background, blue mug"),
    "panda": ("a bear in the forest", "a black and white bear wearing a crown"),
    "parrot": ("a bird in the sky", "a green bird wearing sunglasses at sunset"),
    "pineapple": ("a fruit on a wooden table", "a yellow fruit on the beach"),
    "poodle": ("a dog in the grass", "a white dog wearing a party hat in the snow"),
    "pufferfish": ("a fish in the sea", "a yellow fish on a blue background"),
    "racer": ("a car on the road", "a red car in the desert at night"),
    "skate": ("a shoe on the road", "a white shoe in front of a brick wall"),
    "speedboat": ("a boat in the sea", "a white boat at sunset"),
    "stripemug-red": ("a red mug on a wooden table", "a striped red mug in the snow"),
    "tiger": ("a striped orange cat in the snow", "a cat wearing a crown in the forest"),
    "tractor": ("a truck in the grass", "a red truck on the road"),
    "tyrannosaurus": ("a reptile in the desert", "a green reptile wearing a sun hat on the beach"),
}
"""By which weights and threshold of the retriever were chosen."""

HELD_OUT = {
    "android-pink": ("an image of a robot next to a house", "a big pink robot on a checkered background"),
    "backpack": ("a picture of a bag in front of a brick wall", "a brown bag in the mountains"),
    "backpack-green": ("a small green bag in the sea", "the green bag of a student at sunset"),
    "beetle": ("a green bug on a flower", "close-up of a bug at night"),
    "billiard": ("a ball next to a dog in the grass", "a purple ball in the sky"),
    "boba": ("a cold drink in the desert", "a drink with a straw, white background"),
    "castle": ("an old house at sunset", "a house on the road next to a car"),
    "cupcake": ("a small cake with a crown", "birthday cake in the snow"),
    "cyclops-orange": ("a big orange monster in the mountains", "portrait of an orange monster wearing sunglasses"),
    "cyclops-purple": ("a small purple monster in the sea", "purple monster, night, forest"),
    "gremlin-green": ("the green monster on the road", "a monster with antennae, green, on a pink background"),
    "hibiscus": ("pink flower on a dotted background", "a flower in the snow"),
    "lovemug-blue": ("an image of a blue mug in the grass", "blue mug in the sky"),
    "panda": ("a bear wearing a top hat on the beach", "a big bear in the snow next to a tree"),
    "parrot": ("a red bird in the forest", "a bird on the right, a tree on the left"),
    "pineapple": ("a fruit wearing sunglasses", "fruit in the snow at night"),
    "poodle": ("a dog and a ball on the beach", "my dog at the lake"),
    "pufferfish": ("a fish wearing a crown in the sea", "an orange fish in the sky"),
    "racer": ("a fast car in the mountains", "a car in front of a house"),
    "skate": ("a pair of shoes on the beach", "a blue shoe on a wooden table"),
    "speedboat": ("a red boat in the sea at night", "a picture of a boat on the beach"),
    "stripemug-red": ("a red mug wearing a sun hat", "a photo of a red mug on the beach"),
    "tiger": ("an orange cat in front of a brick wall", "a cat in the sky, sunset"),
    "tractor": ("a green truck in the snow", "an image of a truck next to a tree in the desert"),
    "tyrannosaurus": ("a big reptile in the forest", "a reptile on the road at night"),
}
"""Not tuned on. Looked at twice, before and after prompts were compared by phrases: 48 right both times."""

TUNED_PAIRS = (
    ("a dog and a cat in the snow", {"poodle", "tiger"}),
    ("a bird next to a truck", {"parrot", "tractor"}),
    ("a red mug and a purple monster on the beach", {"cyclops-purple", "stripemug-red"}),
    ("a robot and a ball in the grass", {"android-pink", "billiard"}),
    ("a green bag in front of a house", {"backpack-green", "castle"}),
    ("a car on the left, a boat on the right", {"racer", "speedboat"}),
    ("a cake next to a drink on a wooden table", {"boba", "cupcake"}),
    ("a bear with a fruit in the forest", {"panda", "pineapple"}),
    ("an orange monster and a green monster at night", {"cyclops-orange", "gremlin-green"}),
    ("a fish and a bug", {"beetle", "pufferfish"}),
)
"""The same for prompts with two subjects."""

HELD_OUT_PAIRS = (
    ("a cat next to a flower", {"hibiscus", "tiger"}),
    ("a truck and a dog in the snow", {"poodle", "tractor"}),
    ("a photo of a blue mug with a cake", {"cupcake", "lovemug-blue"}),
    ("a reptile wearing a crown in front of a house", {"castle", "tyrannosaurus"}),
    ("two friends: a robot and a bear", {"android-pink", "panda"}),
    ("a purple monster holding a ball", {"billiard", "cyclops-purple"}),
    ("a bird on a boat in the sea at sunset", {"parrot", "speedboat"}),
    ("a shoe and a green bag on a wooden table", {"backpack-green", "skate"}),
    ("a fish in a drink", {"boba", "pufferfish"}),
    ("a bug on a fruit, close up", {"beetle", "pineapple"}),
)
"""Written after the choices; not tuned on."""

UNSUITABLE = (
    "a tree in the snow", "a sunset over the sea", "a landscape with mountains", "the forest at night",
    "a woman walking in the city", "a red brick wall", "an old man reading", "abstract swirls", "a street in the rain",
)  # fmt: skip
"""Prompts that ask for none of the subjects."""
