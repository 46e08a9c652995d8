"""Problem files and benchmarks read in their own fields, and problems put into prompts."""

import json

import pytest
import tiny

from dcod_jax import config as configs
from dcod_jax.errors import DcodError
from dcod_jax.evaluate import problems
from dcod_jax.evaluate.answers import reference_answer
from dcod_jax.evaluate.benchmarks import BENCHMARKS, SetEntry, parse_set
from dcod_jax.evaluate.grading import grade
from dcod_jax.evaluate.problems import (
    difficulty_group,
    read_problems,
    read_set,
)
from dcod_jax.evaluate.prompts import read_exemplars

# ---------------------------------------------------------------- problem files


def test_problems_in_the_fields_people_have(tmp_path):
    file = tiny.write_jsonl(
        tmp_path / "problems.jsonl",
        [
            {"id": "a", "prompt": "1+1?", "answer": "2", "template": "sum"},
            {"question": "2+2?", "answer": 4},
            {"problem": "3+3?", "answer": 6.5},
            {"messages": [{"role": "system", "content": "Hm."}, {"role": "user", "content": "4?"}],
             "answer": "4"},
        ],
    )  # fmt: skip
    plain = read_problems(file)
    assert [p.id for p in plain] == ["a", "1", "2", "3"]
    assert [p.answer for p in plain] == ["2", "4", "6.5", "4"]
    assert plain[0].fields["template"] == "sum"
    assert plain[1].source == f"{file}:2"
    led = read_problems(file, system_prompt="Think.", limit=4)
    assert [p.messages[0]["content"] for p in led] == ["Think.", "Think.", "Think.", "Hm."]
    assert len(read_problems(file, limit=2)) == 2


def test_the_assistants_own_turn_is_not_part_of_the_question(tmp_path):
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}]
    file = tiny.write_jsonl(tmp_path / "p.jsonl", [{"messages": turns, "answer": "1"}])
    assert read_problems(file)[0].messages == turns[:1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "1', "truncated JSON"),
        (b'{"prompt": "\xff"}', "invalid UTF-8 at byte 12"),
        (b'["prompt"]', "expected a JSON object, got list"),
        (b'{"text": "1", "answer": "1"}', "no prompt.*prepare.prompt_field"),
        (b'{"prompt": "1"}', "no answer; expected one in 'answer'.*prepare.answer_field"),
        (b'{"prompt": " ", "answer": "1"}', "non-empty text"),
        (b'{"prompt": [{"role": "user"}], "answer": "1"}', "non-empty text"),
        (b'{"id": "x", "prompt": "1", "answer": "1"}', "used before at .*:1"),
        (b'{"prompt": "1", "answer": ["1", "2"]}', "text or a number, got .*several answers"),
        (b'{"prompt": "1", "answer": true}', "text or a number, got True"),
        (b'{"prompt": "1", "answer": "' + b"1" * 90 + b'"}', "120 bytes, more than the 100 of a"),
        (b'{"prompt": "1", "answer": NaN}', "text or a number, got nan"),
        (b'{"prompt": "1", "answer": "1", "x": "\\ud83d"}', "half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(problems, "LONGEST", 100)
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"id": "x", "prompt": "2", "answer": "2"}\n\n' + line + b"\n")
    with pytest.raises(DcodError, match=f"bad.jsonl:3: .*{message}"):
        read_problems(file)


def test_a_file_as_other_programs_write_it(tmp_path):
    """A byte order mark, CRLF, and fields that are there but null."""
    file = tmp_path / "p.jsonl"
    record = b'{"id": null, "prompt": null, "question": "%d?", "answer": %d}\r\n'
    file.write_bytes(b"\xef\xbb\xbf" + record % (1, 1) + b"\r\n" + record % (2, 2))
    read = read_problems(file)
    assert [(p.id, p.messages[0]["content"], p.answer) for p in read] == [
        ("0", "1?", "1"),
        ("1", "2?", "2"),
    ]


def test_no_file_and_no_problems(tmp_path):
    with pytest.raises(DcodError, match="no such file"):
        read_problems(tmp_path / "none.jsonl")
    with pytest.raises(DcodError, match="no problems"):
        read_problems(tiny.write_jsonl(tmp_path / "empty.jsonl", []))


# ---------------------------------------------------------------- benchmarks


ROWS = {
    "gsm8k": {"question": "q", "answer": "2+2=<<2+2=4>>4\n#### 1,004"},
    "math": {"problem": "q", "solution": "so $\\boxed{\\frac{1}{2}}$.", "level": "Level 5"},
    "math500": {"problem": "q", "answer": "7", "level": 3, "unique_id": "t/1"},
    "amc23": {"id": 4, "question": "q", "answer": 27.0},
    "aime24": {"id": 60, "problem": "q", "answer": "073"},
    "aime25": {"id": "0", "problem": "q", "answer": "70"},
    "olympiadbench": {"id": 1606, "question": "q", "final_answer": ["2", "$-1$"]},
    "aqua": {"question": "q", "options": ["A)21", "B)22"], "correct": "B"},
    "omnimath": {"problem": "q", "answer": "[2, 3]", "difficulty": 6.5},
}
EXPECTED = {
    "gsm8k": ("0", "1,004", ""),
    "math": ("0", "\\frac{1}{2}", "Level 5"),
    "math500": ("t/1", "7", "3"),
    "amc23": ("4", "27", ""),
    "aime24": ("60", "073", ""),
    "aime25": ("0", "70", ""),
    "olympiadbench": ("1606", "2, $-1$", ""),
    "aqua": ("0", "(B) 22", ""),
    "omnimath": ("0", "[2, 3]", "6-7"),
}


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_each_benchmark_is_read_in_its_own_fields(name, tmp_path):
    file = tiny.write_jsonl(tmp_path / "set.jsonl", [ROWS[name]])
    (problem,) = read_set(SetEntry(name, str(file)))
    assert (problem.id, problem.answer, problem.difficulty) == EXPECTED[name]
    shown = "\n\nA) 21\nB) 22" if name == "aqua" else ""
    assert problem.messages == [{"role": "user", "content": f"q{shown}"}]
    assert problem.source == f"{file}:1"


OPTIONS = [
    ({"options": ["A)21", "B)21.5", "C) 22 km"], "answer": "B"}, "(B) 21.5"),
    ({"options": ["21", "21.5", "22 km"], "answer": "(b)"}, "(B) 21.5"),
    ({"choices": ["21", "21.5", "22 km"], "answer": 1}, "(B) 21.5"),
    ({"choices": [21, 21.5, 22], "answer": "43/2"}, "(B) 21.5"),
    ({"options": {"A": "21", "B": "21.5", "C": "22 km"}, "answer": "22 km"}, "(C) 22 km"),
    ({"choices": {"label": ["A", "B"], "text": ["up", "down"]}, "answer": "B"}, "(B) down"),
    ({"choices": [{"text": "up"}, {"text": "down"}], "answer": "down"}, "(B) down"),
    ({"options": "a ) 21 , b ) 1,250 , c ) none of these", "answer": "b"}, "(B) 1,250"),
    ({"options": "A) 21 (b) B) 21.5 C) 22 km", "answer": "B"}, "(B) 21.5"),
]


@pytest.mark.parametrize(("fields", "answer"), OPTIONS)
def test_options_are_shown_and_the_answer_is_one_of_them(tmp_path, fields, answer):
    rows = [{"prompt": "How far?"} | fields]
    problem = read_problems(tiny.write_jsonl(tmp_path / "p.jsonl", rows))[0]
    assert problem.answer == answer
    shown = problem.messages[-1]["content"]
    assert shown.startswith("How far?\n\nA) ")
    assert answer[1:] in shown
    again = [{"prompt": shown} | fields]  # a prompt that has its options is left as it is
    assert read_problems(tiny.write_jsonl(tmp_path / "q.jsonl", again))[0].messages == (
        problem.messages
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": ["A)21", "B)22"], "answer": "C"}, "'C' is none of the options A"),
        ({"options": ["21", "22"], "answer": "23"}, "'23' is none of the options"),
        ({"options": ["21", "22"], "answer": 2}, "place from 0"),
        ({"choices": ["21"], "answer": "A"}, "'choices' must be 2 to 10 options"),
        ({"options": {"first": "21", "second": "22"}, "answer": "21"}, "rename the field"),
    ],
)
def test_options_that_cannot_be_read_are_named(tmp_path, fields, message):
    file = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q"} | fields])
    with pytest.raises(DcodError, match=rf"p\.jsonl:1: .*{message}"):
        read_problems(file)


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("\\boxed{B}", True),
        ("\\boxed{21.5}", True),
        ("\\boxed{\\frac{43}{2}}", True),
        ("The answer is (B) 21.5.", True),
        ("Answer: b", True),
        ("#### 21.5 miles", True),
        ("\\boxed{A}", False),
        ("\\boxed{21}", False),
        ("\\boxed{\\text{(C) } 21.5}", False),  # the letter decides
        ("The answer is A or B.", False),
    ],
)
def test_a_choice_is_right_by_its_letter_or_its_value(text, correct):
    assert grade(text, "(B) 21.5").correct == correct


def test_a_list_written_as_text_and_plain_fields_are_read_too(tmp_path):
    rows = [{"id": 7, "question": "q", "final_answer": "['2', '3']"}, {"prompt": "q", "answer": 5}]
    file = tiny.write_jsonl(tmp_path / "set.jsonl", rows)
    assert [p.answer for p in read_set(SetEntry("olympiadbench", str(file)))] == ["2, 3", "5"]
    assert [
        p.answer for p in read_set(SetEntry("math", str(tiny.write_jsonl(file, rows[1:]))))
    ] == ["5"]


def test_a_directory_of_the_hubs_layout_is_read_by_split(tmp_path):
    tiny.write_jsonl(tmp_path / "test.jsonl", [ROWS["math500"]])
    (problem,) = read_set(SetEntry("math500", str(tmp_path)))
    assert (problem.id, problem.answer, problem.difficulty) == ("t/1", "7", "3")
    assert problem.source == f"{tmp_path}[test]:1"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", {"question": "q", "answer": "4"}, "has no ####"),
        ("math", {"problem": "q", "solution": "it is 4"}, r"has no \\boxed"),
        ("aime24", {"problem": "q"}, "no answer; expected one in 'answer'"),
        (
            "aime24",
            {"problem": " ", "answer": 1},
            "no prompt; expected non-empty text .* in one of problem",
        ),
        ("aime24", {"problem": "q", "answer": {}}, "must be text or a number, got {}"),
    ],
)
def test_a_row_that_is_not_the_benchmarks_is_named(name, row, message, tmp_path):
    file = tiny.write_jsonl(tmp_path / "set.jsonl", [row])
    with pytest.raises(DcodError, match=f"set.jsonl:1: .*{message}"):
        read_set(SetEntry(name, str(file)))


def test_a_set_that_cannot_be_opened_says_what_to_write(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DcodError, match=r"aime24 cannot be read from .*aime24=FILE\.jsonl"):
        read_set(SetEntry("aime24", str(tmp_path / "empty")))
    file = tiny.write_jsonl(tmp_path / "twice.jsonl", [ROWS["amc23"], ROWS["amc23"]])
    with pytest.raises(DcodError, match=r"twice\.jsonl:2: id '4' was used before"):
        read_set(SetEntry("amc23", str(file)))


FIELDS = {  # of sets that people have as files: (record, fields of the entry, reference answer)
    "minerva": (
        {"problem": "q", "solution": "so $\\boxed{9.6 \\text{ m}}$"},
        {"answer_field": "solution"},
        "9.6 \\text{ m}",
    ),
    "svamp": (
        {"question_concat": "q", "Answer": 145.0},
        {"prompt_field": "question_concat", "answer_field": "Answer"},
        "145",
    ),
    "mathqa": (
        {"question": "q", "correct": "E"},
        {"answer_field": "correct"},
        "E",
    ),
    "gsm8k": (
        {"ask": "q", "gold": "18"},
        {"prompt_field": "ask", "answer_field": "gold"},
        "18",
    ),
}


@pytest.mark.parametrize("name", list(FIELDS))
def test_an_entry_of_the_sets_names_its_fields(name, tmp_path):
    record, fields, answer = FIELDS[name]
    file = tiny.write_jsonl(tmp_path / "set.jsonl", [record])
    (problem,) = read_set(SetEntry(name, str(file), **fields))
    assert problem.messages[-1]["content"] == "q"
    assert reference_answer(problem.answer) == answer
    with pytest.raises(DcodError, match=r"set\.jsonl:1: .*(answer|prompt)_field=NAME behind"):
        read_set(SetEntry(name, str(file)))
    with pytest.raises(
        DcodError, match=r"write answer_field=NAME behind the file in evaluate\.sets"
    ):
        read_set(SetEntry(name, str(file), **(fields | {"answer_field": "absent"})))


@pytest.mark.parametrize("name", ["mine", "aime24", "olympiadbench"])
def test_problems_with_an_empty_answer_are_skipped_and_counted(name, tmp_path, caplog):
    field = BENCHMARKS[name].answer if name in BENCHMARKS else "answer"
    rows = [
        {"question": f"q{i}", field: answer} for i, answer in enumerate(["1", "", None, " ", "2"])
    ]
    file = tiny.write_jsonl(tmp_path / "set.jsonl", rows)
    skipped: list[str] = []
    problems = read_set(SetEntry(name, str(file)), skipped=skipped)
    assert [(p.id, p.answer) for p in problems] == [("0", "1"), ("4", "2")]
    assert skipped == [f"{file}:2", f"{file}:3", f"{file}:4"]
    assert f"3 problems are skipped, as their reference answer is empty (the first: {file}:2)" in (
        caplog.text
    )
    with pytest.raises(DcodError, match="3 with an empty answer"):
        read_set(SetEntry(name, str(tiny.write_jsonl(file, rows[1:4]))))


def test_the_tolerance_of_olympiadbench(tmp_path):
    errors = ["1e-1", None, "", "0.1,0.01"]
    rows = [ROWS["olympiadbench"] | {"id": i, "error": e} for i, e in enumerate(errors)]
    file = tiny.write_jsonl(tmp_path / "set.jsonl", rows)
    read = read_set(SetEntry("olympiadbench", str(file)))
    assert [problem.tolerance for problem in read] == [0.1, 0.0, 0.0, 0.01]
    for wrong in ("much", "-1", "nan", "inf"):
        tiny.write_jsonl(file, [rows[0] | {"error": wrong}])
        with pytest.raises(DcodError, match=r"set\.jsonl:1: expected numbers of at least 0"):
            read_set(SetEntry("olympiadbench", str(file)))


def test_one_json_array_is_a_file_of_problems(tmp_path):
    file = tmp_path / "p.json"
    rows = [{"prompt": "1?", "answer": 1}, {"prompt": "2?", "answer": 2}]
    file.write_bytes(
        b"\xef\xbb\xbf\r\n" + json.dumps(rows, indent=1).encode().replace(b"\n", b"\r\n")
    )
    assert [(p.answer, p.source) for p in read_problems(file)] == [
        ("1", f"{file}[0]"),
        ("2", f"{file}[1]"),
    ]
    assert [p.answer for p in read_set(SetEntry("aime24", str(file)))] == ["1", "2"]
    file.write_text('[{"prompt": "1?", "answer": 1}, 5]')
    with pytest.raises(DcodError, match=r"p\.json\[1\]: expected a JSON object, got int"):
        read_problems(file)
    file.write_text('[{"prompt": "1?",')
    with pytest.raises(DcodError, match=r"p\.json\[0\]: truncated JSON"):
        read_problems(file)
    file.write_text('[{"prompt": "1?", "answer": 1}, {"prom')
    assert len(read_problems(file, limit=1)) == 1  # no more is read


def test_an_id_that_is_null_is_none(tmp_path):
    rows = [ROWS["aime25"] | {"id": None}] * 2
    file = tiny.write_jsonl(tmp_path / "null.jsonl", rows)
    assert [problem.id for problem in read_set(SetEntry("aime25", str(file)))] == ["0", "1"]


def test_entries_of_the_list_of_sets():
    assert parse_set("gsm8k") == SetEntry("gsm8k")
    assert parse_set("mine=a/my b.jsonl") == SetEntry("mine", "a/my b.jsonl")
    text = "mine=a/b.jsonl  answer_field=gold prompt_field=my question"
    assert parse_set(text) == SetEntry("mine", "a/b.jsonl", "my question", "gold")
    assert parse_set("gsm8k answer_field=gold") == SetEntry("gsm8k", answer_field="gold")
    for text in ("unknown", "a/b.jsonl", "=x", "x=f.jsonl field=a", "x=f.jsonl prompt_field="):
        with pytest.raises(ValueError, match=r"evaluate\.sets"):
            parse_set(text)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("evaluate.sets", "gms8k", "is no benchmark"),
        ("evaluate.sets", "gsm8k,gsm8k=x.jsonl", "named more than once"),
        ("evaluate.samples", "4", "same greedy answer"),
        ("evaluate.top_p", "0", r"must be in \(0, 1\]"),
        ("generate.min_p", "1", r"must be in \[0, 1\)"),
        ("evaluate.form", "few", "must be one of chat, plain"),
        ("evaluate.shots", "-1", "must not be negative"),
    ],
)
def test_settings_that_cannot_work_are_refused(key, value, message):
    config = configs.load_recipe(configs.BASE)
    configs.assign(config, key, value)
    with pytest.raises(DcodError, match=message):
        configs.check(config)


def test_a_difficulty_is_a_group():
    values = ("Level 3", 3, 4.0, 6.5, None, "", True, ["x"], float("inf"), float("nan"))
    groups = [difficulty_group(value) for value in values]
    assert groups == ["Level 3", "3", "4", "6-7", "", "", "", "", "", ""]


def test_a_file_of_more_problems_than_are_held_is_refused(tmp_path, monkeypatch):
    file = tiny.write_jsonl(tmp_path / "set.jsonl", tiny.sums(3))
    assert len(read_problems(file)) == 3
    monkeypatch.setattr(problems, "MOST", 2)
    with pytest.raises(DcodError, match=r"set.jsonl:3: more than 2 problems, or .* split the file"):
        read_problems(file)


@pytest.mark.parametrize("text", ["[{[]: 1}]", "[" + "-" * 30_000 + "1]"])
def test_a_list_as_text_that_python_cannot_read_is_a_text(tmp_path, text):
    file = tmp_path / "o.jsonl"
    tiny.write_jsonl(file, [ROWS["olympiadbench"] | {"final_answer": text}])
    (problem,) = read_set(SetEntry("olympiadbench", str(file)))
    assert problem.answer == text


@pytest.mark.shared
def test_the_real_files_are_read_whole(shared_data):
    gsm8k = read_set(SetEntry("gsm8k", str(shared_data / "gsm8k" / "test.jsonl")))
    math500 = read_set(SetEntry("math500", str(shared_data / "math500" / "test.jsonl")))
    assert (len(gsm8k), len(math500)) == (1319, 500)
    assert [p.answer for p in gsm8k[:3]] == ["18", "3", "70000"]
    levels = [p.difficulty for p in math500]
    assert [levels.count(str(n)) for n in range(1, 6)] == [43, 90, 105, 128, 134]
    questions = {p.messages[0]["content"] for p in gsm8k + math500}
    assert not {q for q, _ in read_exemplars("", 8)} & questions
