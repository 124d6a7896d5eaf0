"""data/definitions.jsonl.gz: which word has this meaning, with the passages that a BM25 retriever found.

    python benchmarks/quality/prepare_definitions.py WORDNET_DATA_NOUN GCIDE_DICT_DZ     (needs bm25s)

Question: the gloss of a noun in WordNet 3.0 (Debian's wordnet-base, /usr/share/wordnet/data.noun; free to use with its
notice). Passages: definitions of Webster's Unabridged of 1913, in the public domain, from Debian's dict-gcide
(/usr/share/dictd/gcide.dict.dz), of which the entries marked [1913 Webster] are taken and nothing else. Answer: the
first word of the synset that Webster has. The two dictionaries know nothing of each other, so the retriever finds the
right entry for some of the questions and not for others, and its score tells which only in part.

`quality`: the best passage's BM25 score over the sum of the question's inverse document frequencies, which no passage
exceeds (Lucene's form of BM25, whose term frequencies saturate at 1), so it lies in [0, 1].
"""

from __future__ import annotations

import gzip
import hashlib
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import bm25s
from splits import Sizes, assign_slices, write_items

SIZES = Sizes(train=1600, a=240, b=400)
PASSAGES, LONGEST = 2, 160  # passages a question, characters a passage
INDENT = 8  # of a sense at most; quotations stand further in
HEAD = re.compile(r"^([A-Za-z][A-Za-z' -]*?) \\[^\\]+\\")
SENSE = re.compile(r"^(?:\d+\. )?(?:\([A-Z][^)]*\) )?")


def synsets(path: Path) -> Iterator[tuple[list[str], str]]:
    """The words of each noun synset, and its gloss without examples."""
    for line in path.read_text("latin-1").splitlines():
        if line.startswith("  "):
            continue
        data, _, gloss = line.partition(" | ")
        part = data.split()
        words = [part[4 + 2 * i].replace("_", " ") for i in range(int(part[3], 16))]
        yield words, gloss.split('; "')[0].strip().rstrip(";")


def passages(path: Path) -> Iterator[tuple[str, str]]:
    """headword, definition: the senses of 1913, each to its first quotation or example."""
    head, lines = "", list[str]()
    for line in gzip.decompress(path.read_bytes()).decode("utf-8", "replace").splitlines():
        start = HEAD.match(line)
        if start is not None:
            head, lines = start[1].strip(), []
            continue
        if line.strip() == "[1913 Webster]":
            text = " ".join(" ".join(lines).split())
            text = re.sub(r"^.*?\] (?=[A-Z])", "", text)  # of the etymology, where it ran over the head's line
            text = SENSE.sub("", re.sub(r"[{}]", "", text))
            text = re.split(r" --|; as, | \[|\"", text)[0].strip()
            is_quotation = lines and len(lines[0]) - len(lines[0].lstrip()) > INDENT
            if head and not is_quotation and len(text) >= 20 and text[0].isupper() and not text.startswith("Note:"):
                yield head, text[:LONGEST].rsplit(" ", 1)[0] if len(text) > LONGEST else text
            lines = []
        elif not line.strip():
            lines = []
        else:
            lines.append(line.rstrip())


def main(arguments: list[str]) -> None:
    wordnet, gcide = (Path(argument) for argument in arguments)
    corpus = list(dict.fromkeys(passages(gcide)))
    heads = {head.lower() for head, _ in corpus}
    questions = []
    for words, gloss in synsets(wordnet):
        answer = next((w for w in words if w.isalpha() and w.islower() and w in heads), None)
        named = re.search(rf"\b{re.escape(answer)}", gloss.lower()) if answer else None
        if answer is not None and named is None and 20 <= len(gloss) <= 140:
            questions.append((answer, gloss))
    # one in so many, by hash, so that the nouns are of all kinds
    questions.sort(key=lambda q: hashlib.sha256("\n".join(q).encode()).hexdigest())
    questions = questions[: 3 * (SIZES.train + SIZES.a + SIZES.b)]
    retriever = bm25s.BM25()
    texts = [f"{head}: {text}" for head, text in corpus]
    stems = bm25s.tokenize(texts, stopwords="en", show_progress=False, return_ids=False)
    retriever.index(stems, show_progress=False)
    asked = bm25s.tokenize([gloss for _, gloss in questions], stopwords="en", show_progress=False, return_ids=False)
    in_documents = Counter(stem for document in stems for stem in set(document))
    found, scores = retriever.retrieve(asked, k=PASSAGES, show_progress=False)
    items = []
    for (answer, gloss), places, score, words in zip(questions, found, scores, asked, strict=True):
        best = sum(math.log1p((len(corpus) - in_documents[w] + 0.5) / (in_documents[w] + 0.5)) for w in words)
        top = [corpus[int(place)] for place in places]
        items.append({
            "id": f"{answer}-{hashlib.sha256(gloss.encode()).hexdigest()[:6]}", "group": answer, "question": gloss,
            **{f"passage_{i + 1}": f"{head}: {text}" for i, (head, text) in enumerate(top)},
            "answer": answer, "is_found": any(head.lower() == answer for head, _ in top),
            "quality": round(min(1.0, float(score[0]) / best) if best else 0.0, 4),
        })  # fmt: skip
    total = SIZES.train + SIZES.a + SIZES.b
    answered = [item for item in items if item["is_found"]]
    others = [item for item in items if not item["is_found"]]
    print(f"{len(corpus):,} passages, {len(questions):,} questions, found {sum(i['is_found'] for i in items):,}")
    # all that the retriever answers, and of the others as many as make the sizes: else six of seven had no answer
    write_items("definitions", assign_slices([*answered, *others[: total - len(answered)]], SIZES))


if __name__ == "__main__":
    main(sys.argv[1:])
