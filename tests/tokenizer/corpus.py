"""12,000 lines of random text for testing tokenizers, identical on every machine.

Prose, code, numbers, emoji, scripts from around the world, whitespace and arbitrary characters. All
characters are in Unicode 3.2, which Python includes as `ucd_3_2_0`: their categories are the same in all
later versions of Python and of regex engines.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from random import Random

LINES = 12_000


def _list(*rows: str) -> tuple[str, ...]:
    return tuple(" ".join(rows).split())


_WORDS = _list(
    "the of and to in that it is was he for as with his on be at by had not are but from or have an they",
    "which one you were all her she there would their we him been has when who will no more if out so up",
    "said what its about than into them can only other time new some could these two may first then do",
    "antidisestablishmentarianism rhythm OpenAI YouTube iPhone NASA's McDonald's café naïve façade",
    "Zürich co-op",
)
_NAMES = _list(
    "x i n_items self.value HTTPServer parseJSON MAX_SIZE __init__ tmp2 utf8 fooBar a1b2 _ $el @app"
)
_OPERATORS = _list("= == != <= >= += -> => :: && || ?? // ** << >> ... %= ^= := |> <=>")
_CONTRACTIONS = _list("don't I'm you're we'll they've he'd it's CAN'T I'LL y'all o'clock won’t l’été 'tis 'S")
_SPACES = (
    " ",
    "  ",
    "    ",
    "\t",
    "\t\t",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\r",
    "\x0b",
    "\x0c",
    "\u200b",
    "\ufeff",
)
_NUMBERS = _list(
    "7 42 3.14159 1,000,000 1e-5 0xFF 0b1010 2024-11-05 12:34:56 50% £9.99 ١٢٣ ४५६ Ⅷ ½ x² 10⁻³ ①",
)
_EMOJI = _list(
    "😀 🦙 🚀 ❤️ ❤ 👍🏽 👩‍💻 👨‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 🇯🇵 1️⃣ #️⃣ ☺️ ✌🏿 🤷‍♀️ © ™ ☃ 🀄 🧑‍🔬",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # a flag spelled in tags
)
_PHRASES = _list(
    "你好，世界！ 東京は日本の首都です。 カタカナ と ひらがな 안녕하세요 세계 مرحبا بالعالم שלום עולם",
    "Привет, мир! Καλημέρα κόσμε สวัสดีชาวโลก नमस्ते दुनिया Tiếng Việt Grüße aus Köln Příliš žluťoučký kůň",
    "¿Qué tal? Ñandú Łódź İstanbul ﷺ ﬁne ｆｕｌｌｗｉｄｔｈ 𝕬𝖓𝖓𝖆 𝟙𝟚",
)
_RANGES = (
    (0x4E00, 0x9FA5),
    (0x3041, 0x3094),
    (0x30A1, 0x30FA),
    (0xAC00, 0xD7A3),
    (0x0621, 0x063A),
    (0x0905, 0x0939),
)
_ACCENTS = "\u0300\u0301\u0302\u0303\u0308\u030a\u0327\u0328\u0323\u20dd"


def lines() -> list[str]:
    """Returns the corpus; some lines contain newlines."""
    # Only Random.random() is guaranteed to be the same in every version of Python.
    random = Random(20_230_718)
    corpus: list[str] = []
    while len(corpus) < LINES:
        generator = _GENERATORS[int(random.random() * len(_GENERATORS))]
        corpus.append(generator(random))
    return corpus


def _pick(random: Random, choices: Sequence[str]) -> str:
    return choices[int(random.random() * len(choices))]


def _repeat(random: Random, max_count: int, make: Callable[[Random], str], separator: str = " ") -> str:
    return separator.join(make(random) for _ in range(1 + int(random.random() * max_count)))


def _prose(random: Random) -> str:
    text = _repeat(random, 14, lambda r: _pick(r, _WORDS if r.random() < 0.9 else _CONTRACTIONS))
    text = text[0].upper() + text[1:] if random.random() < 0.7 else text
    return _pick(random, ("", " ", '"')) + text + _pick(random, (".", "!", "?", ",", "...", '"', ".\n", ""))


def _code(random: Random) -> str:
    indent = _pick(random, ("", "    ", "        ", "\t", "  "))
    name, value, operator = (_pick(random, choices) for choices in (_NAMES, _NUMBERS, _OPERATORS))
    forms = (
        f"{name} {operator} {value};",
        f"def {name}({_repeat(random, 3, lambda r: _pick(r, _NAMES), ', ')}):  # {_pick(random, _WORDS)}",
        f"if ({name}{operator}{value}) {{ return &{name}[{value}]; }}",
        f'print(f"{{{name}!r:>10}} {value}\\n", end="")',
        f"<div class='{name}'>{_prose(random)}</div>",
        f"SELECT * FROM {name} WHERE id = {value}--",
        f"https://example.com/{name}?q={value}&r={_pick(random, _WORDS)}#{name}",
        f"for {name} in range(10):\n{indent}    {name} {operator} {value}\n\n",
        "#" * (1 + int(random.random() * 70)),
    )
    return indent + _pick(random, forms)


def _numbers(random: Random) -> str:
    long = "".join(str(int(random.random() * 10)) for _ in range(int(random.random() * 25)))
    return long + _repeat(random, 8, lambda r: _pick(r, _NUMBERS), _pick(random, ("", " ", "  ", ", ", "\n")))


def _emoji(random: Random) -> str:
    return _repeat(
        random, 6, lambda r: _pick(r, _EMOJI if r.random() < 0.6 else _WORDS), _pick(random, ("", " "))
    )


def _scripts(random: Random) -> str:
    def word(random: Random) -> str:
        if random.random() < 0.5:
            return _pick(random, _PHRASES)
        first, last = _RANGES[int(random.random() * len(_RANGES))]
        return _repeat(random, 6, lambda r: chr(first + int(r.random() * (last - first + 1))), "")

    return _repeat(random, 6, word, _pick(random, ("", " ", "、")))


def _accents(random: Random) -> str:
    return _repeat(
        random, 12, lambda r: _pick(r, "aeiouncyAEIO ") + _repeat(r, 3, lambda s: _pick(s, _ACCENTS), ""), ""
    )


def _spaces(random: Random) -> str:
    def run(random: Random) -> str:
        return _pick(random, _SPACES) * (1 + int(random.random() * 5)) + _pick(
            random, (*_WORDS, "", "1", "\n", "!")
        )

    return _repeat(random, 6, run, "") + _pick(random, ("", " ", "   ", "\n\n"))


def _anything(random: Random) -> str:
    def character(random: Random) -> str:
        while True:
            top = 0x250 if random.random() < 0.3 else 0x2FA1E
            found = chr(int(random.random() * top))
            if unicodedata.ucd_3_2_0.category(found) not in ("Cn", "Cs", "Co"):
                return found

    return _repeat(random, 20, character, "")


def _mixed(random: Random) -> str:
    parts = (_prose, _code, _numbers, _emoji, _scripts, _accents, _spaces)
    return _repeat(random, 3, lambda r: parts[int(r.random() * len(parts))](r), "")


_GENERATORS = (
    _prose,
    _prose,
    _code,
    _code,
    _code,
    _numbers,
    _emoji,
    _scripts,
    _scripts,
    _accents,
    _spaces,
    _anything,
    _mixed,
)
