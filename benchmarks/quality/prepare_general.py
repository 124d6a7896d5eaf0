"""data/general.jsonl: paragraphs that no run trains on, for what is forgotten: of the Python language reference.

    python benchmarks/quality/prepare_general.py

From the standard library's pydoc_data.topics (Python 3.11, PSF licence), so nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
from pathlib import Path

COUNT, SHORTEST, LONGEST = 40, 200, 500  # characters of a paragraph

if __name__ == "__main__":
    text = "\n\n".join(pydoc_data.topics.topics.values())
    paragraphs = {" ".join(part.split()) for part in text.split("\n\n") if part[:1].isalpha()}
    fitting = [part for part in paragraphs if SHORTEST <= len(part) <= LONGEST and part.endswith(".")]
    fitting.sort(key=lambda part: hashlib.sha256(part.encode()).hexdigest())
    lines = "".join(json.dumps({"text": part}) + "\n" for part in fitting[:COUNT])
    (Path(__file__).parent / "data" / "general.jsonl").write_text(lines, encoding="utf-8")
