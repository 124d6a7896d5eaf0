"""data/records.jsonl.gz: addresses and names that people wrote, and what they say, as JSON.

    python benchmarks/quality/prepare_records.py USADDRESS_SDIST PROBABLEPEOPLE_SDIST

The records are those that DataMade's parsers are trained on, labelled by hand, word for word: usaddress 0.5.16
(training/labeled.xml, us50_train_tagged.xml, us50_messiest_manual_label.xml) and probablepeople 0.5.6
(name_data/labeled/*.xml), MIT, from the source packages of PyPI (`pip download --no-deps --no-binary :all: NAME`).
Adjacent words of one label are one value, a label that comes again makes a list. Records of one word say nothing of
structure and are left out.
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from splits import Sizes, assign_slices, write_items

SIZES = Sizes(train=1600, a=240, b=400)
FILES = {
    "training/labeled.xml": "address",
    "training/us50_train_tagged.xml": "address",
    "training/us50_messiest_manual_label.xml": "address",
    "name_data/labeled/person_labeled.xml": "person",
    "name_data/labeled/company_labeled.xml": "company",
}
# labels that say that the record is no address, or that a label is a guess
LEFT_OUT = ("NotAddress", "suffix")


def snake_case(label: str) -> str:
    """StreetNamePostType -> street_name_post_type, USPSBoxID -> usps_box_id"""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", label).lower()


def fields_of(record: ElementTree.Element) -> dict[str, str | list[str]]:
    """label -> its words; a list where it stands in several places."""
    runs: list[tuple[str, list[str]]] = []
    for token in record:
        if runs and runs[-1][0] == token.tag:
            runs[-1][1].append(token.text or "")
        else:
            runs.append((token.tag, [token.text or ""]))
    found: dict[str, str | list[str]] = {}
    for label, words in runs:
        key, value = snake_case(label), " ".join(words).strip(" ,;")
        before = found.get(key)
        found[key] = value if before is None else [*([before] if isinstance(before, str) else before), value]
    return found


def read(sdist: Path) -> list[dict[str, str]]:
    items = []
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            kind = FILES.get(member.name.partition("/")[2])
            if kind is None:
                continue
            stream = archive.extractfile(member)
            assert stream is not None
            for i, record in enumerate(ElementTree.parse(stream).getroot()):
                if len(record) < 2 or any(token.tag in LEFT_OUT or not token.text for token in record):
                    continue
                text = " ".join(token.text.strip() for token in record if token.text)
                target = json.dumps({"kind": kind, **fields_of(record)}, ensure_ascii=False)
                # flats of one house, and one name in other letters, belong together
                group = re.sub(r"[\W\d]+", " ", text.lower()).strip()
                items.append(
                    {"id": f"{Path(member.name).stem}-{i}", "group": group, "text": text, "json": target, "kind": kind}
                )
    return items


def main(sdists: list[str]) -> None:
    items = [item for sdist in sdists for item in read(Path(sdist))]
    seen: set[str] = set()
    unique = [item for item in items if not (item["text"].lower() in seen or seen.add(item["text"].lower()))]  # type: ignore[func-returns-value]
    write_items("records", assign_slices(unique, SIZES))


if __name__ == "__main__":
    main(sys.argv[1:])
