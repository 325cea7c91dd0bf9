"""Files of prompts: what is read, and what is said of a line that is none. Rows of corpora: news/test_sources.py."""

import os
from pathlib import Path

import pytest

from data import rows
from data.errors import UserError

PROMPTS = {  # what a file is -> (name, content, prompts or what is said)
    "one a line": ("p.txt", b"1+2\n3*4\n", ["1+2", "3*4"]),
    "empty lines, no end, Windows": ("p.txt", b"\xef\xbb\xbf1+2\r\n\r\n  \n3*4", ["1+2", "3*4"]),
    "a line separator within a line": ("p.txt", "a\u2028b\x0cc\n".encode(), ["a\u2028b\x0cc"]),
    "objects": ("p.jsonl", b'{"prompt": "1+2"}\n\n{"prompt": "a\\nb", "id": 3}\n', ["1+2", "a\nb"]),
    "nothing": ("p.txt", b"\n \n", "p.txt: no prompts"),
    "no JSON": ("p.jsonl", b'{"prompt": "1"}\n{"prompt"\n', "p.jsonl: line 2 is not JSON: Expecting ':' delimiter at column 10$"),
    "no object": ("p.jsonl", b'"1+2"\n', "p.jsonl: line 1: expected a JSON object"),
    "a key twice": ("p.jsonl", b'{"prompt": "1"}\n{"prompt": "2", "prompt": "3"}\n', "line 2: the key prompt stands twice in an object"),
    "no prompt": ("p.jsonl", b'{"text": "1+2"}\n', 'line 1: expected an object with a "prompt"'),
    "no text": ("p.jsonl", b'{"prompt": 3}\n', 'line 1: expected an object with a "prompt", which is text'),
    "no UTF-8": ("p.txt", b"1+2\n1+\xff", "p.txt: line 2 is not text in UTF-8"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_a_file(tmp_path, name):
    file, content, expected = PROMPTS[name]
    (tmp_path / file).write_bytes(content)
    if isinstance(expected, list):
        assert [*rows.read_prompts(tmp_path / file).values()] == expected
    else:
        with pytest.raises(UserError, match=expected):
            rows.read_prompts(tmp_path / file)


def test_prompts_come_from_standard_input(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf1+2\r\n\n3*4")
    kept = os.dup(0)
    try:
        with open(tmp_path / "p.txt") as given:
            os.dup2(given.fileno(), 0)
        assert rows.read_prompts(Path("-")) == {"-: line 1": "1+2", "-: line 3": "3*4"}
    finally:
        os.dup2(kept, 0)
        os.close(kept)
