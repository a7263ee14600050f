"""Words for the captions of emoji: the kinds of things in Unicode's subgroups, keywords that
describe no image, and prompt templates that fit these captions.
"""

# Subgroup -> how a person would name that kind of thing, the most specific first.
KINDS: dict[str, tuple[str, ...]] = {
    "face-smiling": ("a smiling face", "a happy face"),
    "face-affection": ("a loving face", "a face full of affection"),
    "face-tongue": ("a face with its tongue out", "a playful face"),
    "face-hand": ("a face with hands", "a face and a gesture"),
    "face-neutral-skeptical": ("a doubtful face", "a neutral face"),
    "face-sleepy": ("a sleepy face", "a tired face"),
    "face-unwell": ("a sick face", "a face of someone unwell"),
    "face-hat": ("a face with a hat", "a face dressed up"),
    "face-glasses": ("a face with glasses", "a clever face"),
    "face-concerned": ("a worried face", "an unhappy face"),
    "face-negative": ("an angry face", "a furious or evil face"),
    "face-costume": ("a fantasy face", "a monster or a mask"),
    "cat-face": ("a cat's face", "a cat with feelings"),
    "monkey-face": ("a monkey's face", "a funny monkey"),
    "heart": ("a heart", "a symbol of love"),
    "emotion": ("a comic symbol", "a sign of emotion"),
    "hand-fingers-open": ("an open hand", "a hand gesture"),
    "hand-fingers-partial": ("a hand gesture", "a hand with some fingers up"),
    "hand-single-finger": ("a pointing finger", "a hand gesture"),
    "hand-fingers-closed": ("a fist or a thumb", "a hand gesture"),
    "hands": ("a pair of hands", "two hands"),
    "hand-prop": ("a hand holding something", "a hand at work"),
    "body-parts": ("a part of the body", "anatomy"),
    "person": ("a person", "someone's face and hair"),
    "person-gesture": ("a person making a gesture", "someone's body language"),
    "person-role": ("a person at work", "someone with a job or a role"),
    "person-fantasy": ("a fantasy character", "someone from a fairy tale"),
    "person-activity": ("a person doing something", "someone on the move"),
    "person-sport": ("a person doing sports", "an athlete"),
    "person-resting": ("a person resting", "someone relaxing"),
    "family": ("a couple or a family", "people who belong together"),
    "person-symbol": ("a sign for people", "a human silhouette"),
    "animal-mammal": ("a mammal", "an animal"),
    "animal-bird": ("a bird", "an animal with wings"),
    "animal-amphibian": ("an amphibian", "an animal"),
    "animal-reptile": ("a reptile", "a cold-blooded animal"),
    "animal-marine": ("a sea animal", "an animal that lives in water"),
    "animal-bug": ("an insect", "a small crawling animal"),
    "plant-flower": ("a flower", "something that blooms"),
    "plant-other": ("a plant", "something green that grows"),
    "food-fruit": ("a fruit", "something sweet that grows on plants"),
    "food-vegetable": ("a vegetable", "healthy food"),
    "food-prepared": ("a dish", "a meal, prepared food"),
    "food-asian": ("an asian dish", "food from asia"),
    "food-sweet": ("a dessert", "something sweet"),
    "drink": ("a drink", "a beverage in a cup, glass or bottle"),
    "dishware": ("tableware", "cutlery and dishes for the kitchen"),
    "place-map": ("a map or a globe", "geography"),
    "place-geographic": ("a landscape", "a natural place"),
    "place-building": ("a building", "architecture"),
    "place-religious": ("a religious building", "a place of worship"),
    "place-other": ("a place to visit", "a scene in a city or outdoors"),
    "transport-ground": ("a land vehicle", "traffic on the road or the rails"),
    "transport-water": ("a boat or a ship", "travel on water"),
    "transport-air": ("an aircraft", "something that flies, air travel"),
    "hotel": ("a hotel thing", "travel, staying overnight"),
    "time": ("a clock", "a device that tells the time"),
    "sky-weather": ("weather and sky", "something in the sky"),
    "event": ("a celebration", "a holiday decoration"),
    "award-medal": ("an award", "a prize for winners"),
    "sport": ("sports equipment", "a sport"),
    "game": ("a game", "a toy to play with"),
    "arts-crafts": ("arts and crafts", "a creative hobby"),
    "clothing": ("clothing", "something to wear"),
    "sound": ("a sound", "something loud"),
    "music": ("music", "audio equipment"),
    "musical-instrument": ("a musical instrument", "something to make music with"),
    "phone": ("a phone", "a device to call people"),
    "computer": ("computer equipment", "an electronic device"),
    "light-video": ("light and video", "cameras, films and lamps"),
    "book-paper": ("paper and books", "something to read"),
    "money": ("money", "finance"),
    "mail": ("mail", "the post"),
    "writing": ("a writing tool", "something to write with"),
    "office": ("an office supply", "stationery"),
    "lock": ("a lock or a key", "security"),
    "tool": ("a tool", "an instrument or a weapon"),
    "science": ("a scientific instrument", "science in a laboratory"),
    "medical": ("a medical item", "medicine and health"),
    "household": ("a household item", "a thing found at home"),
    "other-object": ("an object", "a thing"),
    "transport-sign": ("a public sign", "a sign at a station or airport"),
    "warning": ("a warning sign", "something is forbidden"),
    "arrow": ("an arrow sign", "a direction"),
    "religion": ("a religious symbol", "a sign of faith"),
    "zodiac": ("a zodiac sign", "a star sign"),
    "av-symbol": ("a media player button", "a control for audio or video"),
    "gender": ("a gender symbol", "a sign for a sex"),
    "math": ("a math symbol", "a sign for calculating"),
    "punctuation": ("a punctuation mark", "a sign in a text"),
    "currency": ("a currency symbol", "a sign for money"),
    "other-symbol": ("a symbol", "a mark or a sign"),
    "keycap": ("a key on a keypad", "a number on a button"),
    "alphanum": ("letters in a box", "text on a button"),
    "geometric": ("a geometric shape", "a coloured shape"),
}

# Keywords of chat language, which no image shows.
_CHATTER = """
143 a+ +1 -1 bae babe brb btw bye feels g2g gtg hbu idk ily imo lmao lol lolz nvm obvs omg omw pog
rofl smh tbh tfw tmi ttyl whatever wtf xoxo ya yolo ideograph <3
"""
CHATTER = frozenset(_CHATTER.split())

# Keywords too common to stand in a caption without the name or another word.
_WEAK_WORDS = """
face animal man woman person hand food button not no open closed mouth eye eyes mark sign tale up
down right left you good
"""
WEAK_WORDS = frozenset(_WEAK_WORDS.split())

# Prompt templates for zero-shot classification, in CLIP_benchmark's notation.
TEMPLATES = ("{c}", "an emoji of {c}", "a drawing of {c}", "a picture of {c}")
