"""A preference log whose truth is known: who likes what, how noisy the answers are, how well anybody could do.

A reply to a household question is put together from templates and has six attributes. Two of them everybody wants
(`polite`, `safe`); on the other four (`long`, `casual`, `cheerful`, `exact`) people differ. A user's weight on each
attribute is

    w_u = SHARED + sum_k m_uk TASTES[k],        m_u a mixture of the three tastes (sums to 1)

and the user prefers reply a to reply b with the Bradley-Terry probability

    P(a over b) = sigmoid(w_u . (f(a) - f(b))),        f the attributes, in [0, 1]

So the best rule there is for one user always takes the sign of the true margin. It is right with probability
max(P, 1 - P) on a pair, which the noise keeps well below one. The texts do not name the attributes: a model has to find
them in the words. Nothing here is taken from real people.
"""

from dataclasses import dataclass

import numpy as np


ATTRIBUTES = ("polite", "safe", "long", "casual", "cheerful", "exact")

# What everybody wants, and three ways in which people differ; columns as in ATTRIBUTES, units of log-odds.
SHARED = np.array([2.0, 2.0, 0.0, 0.0, 0.0, 0.0])
TASTES = {
    "brief": np.array([0.0, 0.0, -6.0, 0.0, -3.0, 3.0]),
    "chatty": np.array([0.0, 0.0, 3.0, 5.0, 4.0, -3.0]),
    "thorough": np.array([0.0, 0.0, 4.0, -5.0, -2.0, 3.0]),
}

# (what is asked, the advice)
TOPICS = (
    ("clean a kettle", "boil vinegar in it"),
    ("keep bread fresh", "wrap it in a cloth"),
    ("water a cactus", "let it stand in water"),
    ("cook rice", "simmer it under a lid"),
    ("remove a wine stain", "put salt on it"),
    ("sleep better", "leave the phone in another room"),
    ("fix a squeaky door", "rub oil on the hinge"),
    ("learn new words", "read the list aloud"),
    ("sharpen a knife", "draw it along a wet stone"),
    ("save on heating", "turn the radiator down"),
    ("ripen an avocado", "store it beside a banana"),
    ("paint a wall", "sand the surface first"),
)
QUESTIONS = ("How do I {}?", "What is the best way to {}?", "I want to {}.", "Any advice on how to {}?")
POLITE, RUDE = ("Thank you for asking.", "I am glad to help."), ("What a silly question.", "Not this again.")
CASUAL, FORMAL = ("Yeah, just {} {}.", "Oh, you wanna {} {}."), ("It is advisable to {} {}.", "One ought to {} {}.")
EXACT, VAGUE = ("for 10 minutes", "for 2 hours"), ("for a while", "for some time")
SAFE, RECKLESS = (
    ("Wear gloves and go slowly.", "Read the label first."),
    ("Forget about gloves.", "Never mind the label."),
)
CHEERFUL = ("Have a lovely day!", "What fun this is!")
MORE = ("Many people have tried this before.", "All that is needed is there.", "If it fails, repeat it.")

# Each way of having an attribute, or not having it, and how that is said. `RICH` says it in many ways, most of which one user
# hardly ever sees: what the words have in common must be learned from everybody.
PLAIN = {
    "polite": (RUDE, POLITE),
    "casual": (FORMAL, CASUAL),
    "safe": (RECKLESS, SAFE),
    "exact": (VAGUE, EXACT),
    "cheerful": ((), CHEERFUL),
    "more": MORE,
}


def _many(frames: tuple[str, ...], *fillings: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(frame.format(word) for frame, words in zip(frames, fillings, strict=True) for word in words)


RICH = {
    "polite": (
        _many(
            ("What a {} question.", "Not this {}.", "You {} again."),
            ("silly", "dull", "daft", "tiresome", "pointless", "lazy"),
            ("again", "nonsense", "old thing", "one"),
            ("bother me", "waste my day", "ask that"),
        ),
        _many(
            ("Thank you for {}.", "I am {} to help.", "{} question!"),
            ("asking", "writing", "coming to me", "your trust", "your patience"),
            ("glad", "happy", "honoured", "delighted"),
            ("Lovely", "Excellent", "Thoughtful", "Kind"),
        ),
    ),
    "casual": (
        tuple(
            f"{start} {{}} {{}}."
            for start in (
                "It is advisable to",
                "One ought to",
                "It is customary to",
                "The reader should",
                "We recommend to",
                "It is prudent to",
                "The procedure is to",
                "Kindly proceed to",
            )
        ),
        tuple(
            f"{start} {{}} {{}}."
            for start in (
                "Yeah, just",
                "Oh, you wanna",
                "Dude,",
                "Easy peasy,",
                "Hey, simply",
                "No sweat,",
                "Nah, you gotta",
                "Okay so like",
            )
        ),
    ),
    "safe": (
        _many(
            ("Forget about {}.", "Never mind the {}.", "Who needs {}?"),
            ("gloves", "masks", "warnings", "rules"),
            ("label", "manual", "smoke", "risk"),
            ("goggles", "caution", "a plan", "insurance"),
        ),
        _many(
            ("Wear {} and go slowly.", "Read the {} first.", "Keep {} at hand."),
            ("gloves", "goggles", "an apron", "a mask"),
            ("label", "manual", "warnings", "leaflet"),
            ("water", "a towel", "a first aid box", "the phone"),
        ),
    ),
    "exact": (
        (
            "for a while",
            "for some time",
            "until it seems right",
            "for a bit",
            "as long as it takes",
            "more or less an age",
            "now and then",
            "for ages",
        ),
        tuple(f"for {number} {unit}" for number in (2, 3, 5, 8, 10, 15, 20, 45) for unit in ("minutes", "hours")),
    ),
    "cheerful": (
        (),
        (
            "Have a lovely day!",
            "What fun this is!",
            "Hooray!",
            "You will love it!",
            "How exciting!",
            "Big smiles!",
            "Happy days!",
            "Enjoy every bit!",
            "Wonderful!",
            "Best of luck!",
        ),
    ),
    "more": (
        "Many people have tried this before.",
        "All that is needed is there.",
        "If it fails, repeat it.",
        "The neighbours do it too.",
        "It has been so for years.",
        "There is more than one way.",
        "The season does not matter.",
        "Nobody will notice.",
    ),
}

NAMES = (
    "ann bob cat dan eve fay gus hal ida jon kim leo mia ned ola pam quy ray sue tom uma vic wes xia yan zoe "
    "abe bea cal dot eli flo gil hua ian jan kay lou max nia oki pia ron sam tia uli val wim yve zac"
).split()


@dataclass(frozen=True)
class User:
    """One person of the log.

    Args:
        user_id (`str`):
            The name in the log.
        mixture (`dict[str, float]`):
            Share of each taste; sums to 1.
        weights (`np.ndarray`):
            `(attributes,)`, the weight `w_u` on each of `ATTRIBUTES`, in log-odds.
        n_train (`int`):
            Comparisons this user gives for training.
    """

    user_id: str
    mixture: dict[str, float]
    weights: np.ndarray
    n_train: int

    @property
    def main_taste(self) -> str:
        return max(self.mixture, key=self.mixture.__getitem__)


def preference_probability(margin: np.ndarray | float) -> np.ndarray:
    """Bradley-Terry probability of preferring the reply whose true reward is higher by `margin` (log-odds)."""
    return 1.0 / (1.0 + np.exp(-np.asarray(margin, dtype=np.float64)))


def best_possible(margins: np.ndarray) -> float:
    """Expected accuracy of the best rule on pairs with these true margins: the mean of `max(P, 1 - P)`.

    Args:
        margins (`np.ndarray`):
            `(pairs,)`, true reward of one reply minus that of the other; which of the two comes first does not matter.
    """
    p = preference_probability(margins)
    return float(np.maximum(p, 1.0 - p).mean())


def make_users(n_users: int, fewest: int, most: int, rng: np.random.Generator) -> list[User]:
    """Users with mixed tastes and very uneven numbers of comparisons.

    The counts go from `fewest` to `most` in equal ratios, so that there are about as many thin users (10 to 20
    comparisons) as busy ones (100 to 200). Main tastes take turns; the mixture is Dirichlet with 4 on the main taste
    and 1/2 on the others.
    """
    if not 2 <= n_users <= len(NAMES):
        raise ValueError(f"{n_users} users asked for; the generator has names for 2 to {len(NAMES)}.")
    counts = np.rint(np.geomspace(most, fewest, n_users)).astype(int)
    users = []
    for i in range(n_users):
        concentration = np.full(len(TASTES), 0.5)
        concentration[i % len(TASTES)] = 4.0
        shares = rng.dirichlet(concentration)
        weights = SHARED + sum(share * taste for share, taste in zip(shares, TASTES.values(), strict=True))
        mixture = {name: round(float(share), 4) for name, share in zip(TASTES, shares, strict=True)}
        users.append(User(NAMES[i], mixture, weights, int(counts[i])))
    return users


def make_question(topic: int, rng: np.random.Generator) -> str:
    """A question on `TOPICS[topic]`, with a line break after it."""
    return _pick(QUESTIONS, rng).format(TOPICS[topic][0]) + "\n"


def make_reply(topic: int, rng: np.random.Generator, wordings: dict = PLAIN) -> tuple[str, np.ndarray]:
    """A reply to a question on `TOPICS[topic]` and its attributes `(attributes,)`."""
    polite, safe, casual, cheerful, exact = rng.integers(0, 2, size=5)
    n_more = int(rng.integers(0, 3))
    more = wordings["more"]
    parts = [
        _pick(wordings["polite"][polite], rng),
        _pick(wordings["casual"][casual], rng).format(TOPICS[topic][1], _pick(wordings["exact"][exact], rng)),
        _pick(wordings["safe"][safe], rng),
        *(more[place] for place in rng.permutation(len(more))[:n_more]),
    ]
    if cheerful:
        parts.append(_pick(wordings["cheerful"][1], rng))
    attributes = np.array([polite, safe, n_more / 2, casual, cheerful, exact], dtype=np.float64)
    return " ".join(parts), attributes


def make_log(users: list[User], n_test: int, rng: np.random.Generator, wordings: dict = PLAIN) -> list[dict]:
    """The preference log: every user's training rows and `n_test` test rows.

    No two rows of the log show the same two replies to the same question, in either order and whoever judges them, so no
    test pair is ever seen in training.

    Returns:
        Rows with `user_id`, `prompt`, `chosen`, `rejected`, `split` (`"train"` or `"test"`) and `true_margin`: the
        user's true reward of `chosen` minus that of `rejected` (log-odds; negative where noise turned the answer).
    """
    rows, seen = [], set()
    for user in users:
        for split, n_rows in (("train", user.n_train), ("test", n_test)):
            while n_rows:
                topic = int(rng.integers(len(TOPICS)))
                prompt = make_question(topic, rng)
                (text_a, f_a), (text_b, f_b) = (make_reply(topic, rng, wordings) for _ in range(2))
                pair = (prompt, *sorted((text_a, text_b)))
                if text_a == text_b or pair in seen:
                    continue
                seen.add(pair)
                margin = float(user.weights @ (f_a - f_b))
                a_wins = bool(rng.random() < preference_probability(margin))
                rows.append(
                    {
                        "user_id": user.user_id,
                        "prompt": prompt,
                        "chosen": text_a if a_wins else text_b,
                        "rejected": text_b if a_wins else text_a,
                        "split": split,
                        "true_margin": margin if a_wins else -margin,
                    }
                )
                n_rows -= 1
    return rows


def make_corpus(n_texts: int, rng: np.random.Generator, wordings: dict = PLAIN) -> list[str]:
    """Questions with one reply each, for the language model to read: the same world, but nobody's judgement."""
    texts = []
    for _ in range(n_texts):
        topic = int(rng.integers(len(TOPICS)))
        texts.append(make_question(topic, rng) + make_reply(topic, rng, wordings)[0])
    return texts


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
