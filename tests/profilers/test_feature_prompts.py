"""Files of prompts for pictures: text, JSON lines, seeds, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cacheplan.errors import InputError
from cacheplan.profilers.feature_prompts import digest, load_picture_prompts, picture_prompt


def test_text_has_a_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("  a red star \n\n{not json}\n", encoding="utf-8")
    found = load_picture_prompts(path, limit=None)
    assert [(p.call, p.seed, p.text) for p in found] == [
        ({"prompt": "a red star"}, 1, "a red star"),
        ({"prompt": "{not json}"}, 3, "{not json}"),
    ]
    assert load_picture_prompts(path, limit=1) == found[:1]


def test_json_lines_have_arguments_and_seeds(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "stern", "seed": 0, "height": 64}\n\n{"class_labels": [3]}\n{"x": 1}\n'
    )
    found = load_picture_prompts(path, limit=None)
    assert [p.seed for p in found] == [0, 3, 4]
    assert found[0].call == {"prompt": "stern", "height": 64}
    assert found[0].arguments == '{"height":64,"prompt":"stern"}'
    assert [p.text for p in found] == ["stern", "[3]", '{"x":1}']
    assert found[0] == picture_prompt({"prompt": "stern", "height": 64}, 0)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a star", "line 2 is not JSON"),
        ("[1]", "line 2 is no prompt, expected an object"),
        ('"star"', "line 2 is no prompt"),
        ("{}", "line 2 is no prompt"),
        ('{"seed": 3}', "line 2 is no prompt"),
        ('{"prompt": "x", "seed": -1}', "line 2 has the seed -1, expected an integer"),
        ('{"prompt": "x", "seed": true}', "line 2 has the seed True"),
        ('{"prompt": "x", "seed": "1"}', "line 2 has the seed '1'"),
        ('{"prompt": "x", "seed": 1.0}', "line 2 has the seed 1.0"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(InputError, match=reason) as error:
        load_picture_prompts(path, limit=None)
    assert str(error.value).count(". ") == 0


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    with pytest.raises(InputError, match="cannot be read"):
        load_picture_prompts(path, limit=None)
    path.write_text("\n \n")
    with pytest.raises(InputError, match="holds no prompts"):
        load_picture_prompts(path, limit=None)
    path.write_bytes(b"ab\xff")
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 2"):
        load_picture_prompts(path, limit=None)
    with pytest.raises(InputError, match="limit is 0 prompts"):
        load_picture_prompts(path, limit=0)


def test_digest() -> None:
    one, two = picture_prompt({"prompt": "a"}, 1), picture_prompt({"prompt": "b"}, 1)
    same = picture_prompt({"prompt": "a"}, 1)
    found = {digest(x) for x in ([one], [two], [one, two], [two, one], [])}
    assert len(found) == 5
    assert digest([same]) == digest([one])
    assert digest([picture_prompt({"prompt": "a"}, 2)]) not in found
    a, b = picture_prompt({"x": 1, "y": 2}, 0), picture_prompt({"y": 2, "x": 1}, 0)
    assert digest([a]) == digest([b])
    assert digest([a]).startswith("sha256:")
