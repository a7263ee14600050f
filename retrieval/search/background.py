"""Texts that nobody asks for, and how a query fares among them.

How similar an image is to a query says little by itself. How probable the query is among other
texts, given the image, says more: a picture of a wolf is similar to "dog", and more so to "wolf".
"""

import numpy as np
from jaxtyping import Bool, Float

WORDS = (
    "animal", "baby", "beach", "bicycle", "bird", "boat", "building", "cake", "car", "cat",
    "child", "dog", "face", "flower", "food", "forest", "fruit", "garden", "house", "lake",
    "mountain", "night", "people", "portrait", "river", "road", "sea", "sky", "snow", "street",
    "sun", "toy", "train", "tree", "a drawing", "text on paper",
)  # fmt: skip
"""What albums answer."""
NONSENSE = (
    "xqzt", "asdf ghjk", "the of and to", "lorem ipsum dolor sit", "blorf wug", "null pointer",
    "12 % 7 == 5", "vrk tlo mni", "per annum ad hoc", "aaa bbb ccc", "whereas hereby", "qwertz",
)  # fmt: skip
"""What no image answers."""
COMMON = (
    *WORDS,
    "horse", "cow", "sheep", "pig", "goat", "chicken", "duck", "fish", "shark", "whale", "frog",
    "snake", "turtle", "spider", "butterfly", "bee", "ant", "mouse", "rabbit", "fox", "wolf",
    "bear", "lion", "tiger", "elephant", "monkey", "owl", "eagle", "penguin", "dinosaur", "insect",
    "apple", "banana", "orange", "grapes", "strawberry", "lemon", "tomato", "potato", "carrot",
    "onion", "mushroom", "bread", "cheese", "egg", "meat", "rice", "soup", "pizza", "sandwich",
    "salad", "ice cream", "chocolate", "coffee", "tea", "beer", "wine", "a glass of water",
    "bottle", "cup", "plate", "fork", "knife", "spoon", "pan", "table", "chair", "bed", "sofa",
    "lamp", "window", "door", "key", "lock", "mirror", "clock", "watch", "telephone", "computer",
    "keyboard", "television", "radio", "camera", "book", "newspaper", "letter", "pencil", "pen",
    "scissors", "hammer", "screwdriver", "saw", "nail", "rope", "wheel", "engine", "bus", "truck",
    "motorcycle", "airplane", "helicopter", "rocket", "ship", "sailing boat", "bridge", "tower",
    "castle", "church", "school", "hospital", "factory", "shop", "market", "farm", "field", "hill",
    "island", "desert", "waterfall", "volcano", "cave", "cloud", "rain", "storm", "lightning",
    "rainbow", "moon", "star", "fire", "smoke", "ice", "stone", "sand", "leaf", "grass", "rose",
    "tulip", "cactus", "palm tree", "man", "woman", "boy", "girl", "old man", "family", "wedding",
    "birthday party", "doctor", "teacher", "policeman", "firefighter", "soldier", "farmer", "cook",
    "king", "queen", "hand", "foot", "eye", "ear", "nose", "mouth", "hair", "heart", "brain",
    "bone", "shirt", "trousers", "dress", "coat", "hat", "shoe", "glove", "sock", "glasses", "ring",
    "crown", "umbrella", "bag", "suitcase", "box", "basket", "gift", "money", "coin", "flag", "map",
    "globe", "football", "basketball", "tennis", "swimming", "running", "dancing", "singing",
    "sleeping", "reading", "guitar", "piano", "drum", "violin", "trumpet", "painting", "statue",
    "puzzle", "chess", "dice", "doll", "robot", "ghost", "dragon", "angel", "skull", "arrow",
    "circle", "square", "triangle", "number", "letter of the alphabet", "question mark",
    "traffic light", "road sign", "battery", "light bulb", "candle", "magnet", "microscope",
    "telescope", "pill", "syringe", "soap", "toothbrush", "towel", "broom", "bucket", "shovel",
    "axe", "sword", "bomb", "shield", "tent", "a happy person", "a sad person", "an angry face",
    "two people", "a crowd", "an empty room", "a kitchen", "a bathroom", "a city at night",
    "a country road", "a sunset by the sea", "a plate of food", "a red car", "a black cat",
    "a small dog", "a white horse", "a blue sky", "a green leaf", "an old book", "a wooden box",
    "a screenshot", "a diagram", "a pattern", "a logo",
)  # fmt: skip
"""Common English nouns and phrases."""


# Chosen on the demo's trained names; on other captions of theirs AUROC is best as well, refusals at
# 5% are not (benchmarks/absent.py).
ALIKE = 0.9  # cosine of two texts from which on they are no rivals
SHARP = 3.0  # of the model's logit scale, at which rivals are compared
LOGIT_SHARE = 0.5  # of the query's own logit in its score


def log_probabilities(
    queries: Float[np.ndarray, "q d"],
    images: Float[np.ndarray, "q d"],
    background: Float[np.ndarray, "b d"],
    scale: float,
    rivals: Bool[np.ndarray, "q b"] | None = None,
) -> Float[np.ndarray, " q"]:
    """How probable each query is among the background, given its image; nats.

    All are of unit norm. scale: of the logits. rivals: which background texts count; all when not
    given, but for those much like the query (`ALIKE`).
    """
    own = scale * np.einsum("qd,qd->q", queries, images)
    others = scale * (images @ background.T)
    others[queries @ background.T >= ALIKE] = -np.inf
    if rivals is not None:
        others[~rivals] = -np.inf
    largest = np.maximum(others.max(axis=1, initial=-np.inf), own)
    with np.errstate(under="ignore"):
        powers = np.exp(others - largest[:, None]).sum(axis=1) + np.exp(own - largest)
    return np.asarray(own - largest - np.log(powers))


def answer_scores(
    queries: Float[np.ndarray, "q d"],
    images: Float[np.ndarray, "q d"],
    background: Float[np.ndarray, "b d"],
    scale: float,
    rivals: Bool[np.ndarray, "q b"] | None = None,
) -> Float[np.ndarray, " q"]:
    """How well each query's best image answers it: its log-probability at `SHARP` times the model's
    logit scale, as much less again, and a share of its logit. Alone, the first tells near twins
    apart, and the second whatever is far away."""
    probable = log_probabilities(queries, images, background, SHARP * scale, rivals)
    return probable / SHARP + LOGIT_SHARE * scale * np.einsum("qd,qd->q", queries, images)
