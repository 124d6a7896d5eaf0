"""What counts as a word, in any script: letters, digits and their marks; each sign of a script that writes no spaces.

    numbers keep their sign and their decimal point:  -5 is not 5, 3.14 is not 314; 1,000 is 1000

Text in ASCII has the words of SQuAD's script (`answer_words`) and of rouge-score (`word_tokens`), but for such numbers.
"""

from __future__ import annotations

import re
import string
import unicodedata

# Thai, Lao, Tibetan, Myanmar, Khmer; kana; Han with its extensions
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U000323af]"
)
NUMBER = re.compile(r"(?<![\w.])[-+\u2212]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?!\w)")
ARTICLES = re.compile(r"\b(a|an|the)\b")


def word_tokens(text: str) -> list[str]:
    """Runs of letters, digits and marks in lower case; a sign of an unspaced script is a word of its own."""
    plain = unicodedata.normalize("NFC", text.lower())
    return _split_unspaced("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in plain))


def answer_words(text: str) -> list[str]:
    """The words that exact match and F1 compare: lower case, without ASCII punctuation and the articles a, an, the.

    Where nothing would be left, the text as it stands is the one word: "A" is no article, and "?!" is not "...".
    """
    lower = unicodedata.normalize("NFC", text.lower()).strip()
    kept = "".join(c for c in NUMBER.sub(_plain_number, lower) if c not in string.punctuation)
    found = _split_unspaced(ARTICLES.sub(" ", kept))
    return [word.translate(_BACK) for word in found] or ([lower] if lower else [])


# the sign and the point of a number while punctuation is taken away: private signs, put back afterwards
_SIGN, _POINT = "\ue000", "\ue001"
_BACK = str.maketrans({_SIGN: "-", _POINT: "."})


def _plain_number(found: re.Match[str]) -> str:
    number = found.group().replace(",", "").lstrip("+").replace("\u2212", "-")
    whole, point, rest = number.partition(".")
    rest = rest.rstrip("0")
    digits = whole.lstrip("-").lstrip("0") or "0"
    sign = _SIGN if whole.startswith("-") and (digits != "0" or rest) else ""
    return f"{sign}{digits}{_POINT + rest if point and rest else ''}"


def _split_unspaced(text: str) -> list[str]:
    return UNSPACED.sub(lambda sign: f" {sign.group()} ", text).split()


def is_unspaced(texts: list[str]) -> bool:
    """Whether most letters of `texts` are of scripts that write no spaces."""
    letters = sum(c.isalpha() for text in texts for c in text)
    return 2 * sum(len(UNSPACED.findall(text)) for text in texts) > letters
