"""Questions from files, the hub and generators: values, splits and errors."""

import contextlib
import json
import os
import sys

import pytest

from reference.training.errors import UserError
from reference.training.tasks import data
from reference.training.tasks.data import HELD_OUT
from reference.training.tasks.questions import Question


def write(path, *rows):
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return path


def texts(questions):
    return [question.text for question in questions]


def answers(questions):
    return {question.text: question.answer for question in questions}


def test_directory_keeps_its_split_without_shared_questions(tmp_path):
    write(tmp_path / "train.jsonl", *({"prompt": str(n), "answer": n} for n in range(6)))
    write(tmp_path / "test.jsonl", {"prompt": "2", "answer": 2}, {"prompt": "9", "answer": 9})
    found = data.read(tmp_path, seed=0)
    assert texts(found.train) == ["0", "1", "3", "4", "5"]
    assert texts(found.held_out) == ["2", "9"]
    assert found.summary == (
        f"{tmp_path}: 8 rows read, 0 dropped as duplicates, 1 dropped because they are in the test "
        "split too, 5 kept to train on and 2 held out"
    )


@pytest.mark.parametrize(("n", "count"), [(5, 1), (9, 1), (100, 20), (640, 128), (2000, 128)])
def test_one_file_is_split_without_loss_or_overlap(tmp_path, n, count):
    rows = [{"prompt": str(i), "answer": i} for i in range(n)]
    path = write(tmp_path / "a.jsonl", *rows, *rows[:3])
    found = data.read(path, seed=1)
    assert sorted(texts(found.train) + texts(found.held_out)) == sorted(str(i) for i in range(n))
    assert len(found.held_out) == count
    assert data.read(path, seed=1) == found
    assert n < 100 or data.read(path, seed=2).train != found.train
    assert found.summary == (
        f"{path}: {n + 3:,} rows read, 3 dropped as duplicates, {n - count:,} kept to train on and "
        f"{count} held out"
    )


def test_too_few_questions_raise(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"prompt": "p", "answer": "a"} for _ in range(9)))
    message = "9 rows read, 8 dropped as duplicates, 1 kept to train on and 0 held out; expected"
    with pytest.raises(UserError, match=message):
        data.read(path, 0)


CONVERSATION = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


def test_conversations_with_another_example_are_not_duplicates(tmp_path):
    last = [{"role": "user", "content": "7+5?"}]
    rows = [{"prompt": p, "answer": 12} for p in (last, CONVERSATION + last, last, "7+5?")]
    found = data.read(
        write(tmp_path / "a.jsonl", *rows, *({"prompt": str(n)} for n in range(9))), 0
    )
    assert len(found.train) + len(found.held_out) == 12
    assert "1 dropped as duplicates" in found.summary
    assert found.summary.endswith("2 held out; 9 without a ground truth")


def test_columns_are_found_by_name_or_chosen(tmp_path):
    rows = [{"problem": f"p{n}", "solution": n, "level": n % 3, "id": None} for n in range(5)]
    path = write(tmp_path / "a.jsonl", *rows, {"problem": "p5", "other": "x"})
    found = data.read(path, 0)
    by_text = {q.text: q for q in (*found.train, *found.held_out)}
    columns = {"problem": "p4", "solution": "4", "level": 1, "id": None, "other": None}
    assert by_text["p4"] == Question("p4", "4", columns)
    assert by_text["p5"].answer is None and by_text["p5"].columns["other"] == "x"
    found = data.read(path, 0, answer_column="level")
    assert {q.text: q for q in (*found.train, *found.held_out)}["p4"].answer == "1"


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"prompt_column": "Problems"}, "--prompt-column: .* has no column Problems, but Problem, "
         "solution; did you mean Problem\\?"),
        ({"prompt_column": "x"}, "no column x, but Problem, solution; choose one"),
        ({}, "no column prompt or question or problem or messages, .*did you mean Problem\\?"),
        ({"prompt_column": "Problem", "answer_column": "solutions"},
         "--answer-column: .* did you mean solution\\?"),
    ],
)  # fmt: skip
def test_unknown_column_raises_with_those_that_exist(tmp_path, columns, says):
    path = write(tmp_path / "a.jsonl", {"Problem": "p", "solution": "a"})
    with pytest.raises(UserError, match=says):
        data.read(path, 0, **columns)


def test_column_under_the_name_of_another_input_is_reported(tmp_path):
    rows = [{"prompt": f"p{n}", "answer": "long", "short": "a", "completions": 1} for n in range(5)]
    found = data.read(write(tmp_path / "a.jsonl", *rows), 0, answer_column="short")
    assert found.train[0].columns == {"short": "a"} and found.train[0].answer == "a"
    assert "rewards receive something else as completions, not that column" in found.summary
    assert "as answer, not that column" in found.summary


def test_gsm8k_answer_is_extracted_from_the_solution(tmp_path):
    write(tmp_path / "train.jsonl", {"question": "q", "answer": "6*3=<<6*3=18>>18\n#### 1,018"})
    write(tmp_path / "test.jsonl", {"question": "r", "answer": "-5"})
    found = data.gsm8k(tmp_path, 0)
    assert answers(found.train) == {"q": "1018"} and answers(found.held_out) == {"r": "-5"}


def test_gsm8k_solution_without_a_number_raises_with_its_line(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "It is twelve"})
    with pytest.raises(UserError, match=r"a.jsonl:1: expected a number.*got 'It is twelve'"):
        data.gsm8k(path, 0)


def test_gsm8k_from_the_hub_keeps_its_split(monkeypatch):
    parts = {
        "train": [{"question": "q", "answer": "#### 1"}, {"question": "r", "answer": "#### 2"}],
        "test": [{"question": "r", "answer": "#### 2"}],
    }
    monkeypatch.setattr("datasets.load_dataset", lambda *names: parts)
    found = data.gsm8k(None, 0)
    assert answers(found.train) == {"q": "1"} and answers(found.held_out) == {"r": "2"}


def test_gsm8k_without_answers_raises(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"question": str(n)} for n in range(9)))
    with pytest.raises(UserError, match=r"a\.jsonl has no column answer"):
        data.gsm8k(path, 0)


def test_unreachable_hub_raises_user_error_with_the_file_layout(monkeypatch):
    def unreachable(*names):
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        UserError, match=r"reach the Hub second line\).*train\.\* and test\.\*.*#### 18"
    ) as error:
        data.gsm8k(None, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("datasets", lambda: data.gsm8k(None, 0)),
        ("reasoning_gym", lambda: data.reasoning_gym("chain_sum", 0)),
    ],
)
def test_missing_package_raises_user_error_with_the_extra(monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{module.replace('_', '-')}.*\.\[tasks\]"):
        call()


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("name", ["chain_sum", "tower_of_hanoi"])
def test_generated_splits_share_no_question(name, seed):
    (train, held_out), _ = data.reasoning_gym(name, seed)
    assert not set(texts(train)) & set(texts(held_out))
    assert len(set(texts(train))) == len(train) > len(held_out) == len(set(texts(held_out))) > 0
    assert data.reasoning_gym(name, seed)[0] == (train, held_out)


def test_generated_questions_differ_between_seeds():
    first, second = (data.reasoning_gym("basic_arithmetic", seed)[0] for seed in (0, 1))
    assert len(first[1]) == HELD_OUT
    assert len(set(texts(first[0])) & set(texts(second[0]))) < 100


@pytest.mark.parametrize("name", ["chain_sum", "prime_factorization"])
def test_verifier_scores_right_answers_1_and_nonsense_0(name):
    (train, held_out), verify = data.reasoning_gym(name, 3)
    for question in train[:50] + held_out[:50]:
        assert verify(question.text, question.answer) == 1
        assert verify(question.text, "hello") == 0  # at which that of prime_factorization raises


def test_unknown_generator_raises_user_error_with_similar_names():
    with pytest.raises(UserError, match="no generator 'chain_sums'; near it: chain_sum,"):
        data.reasoning_gym("chain_sums", 0)
    with pytest.raises(UserError, match="no generator '@@'; it has ab, acre"):
        data.reasoning_gym("@@", 0)


def test_generator_without_required_settings_raises():
    with pytest.raises(UserError, match=r"composite does not work with the settings \{\}"):
        data.reasoning_gym("composite", 0)


def test_verifier_that_runs_completions_raises():
    for name in data.GYM_RUNS_COMPLETIONS:
        with pytest.raises(UserError, match=f"{name}: its verifier runs completions"):
            data.reasoning_gym(name, 0)


@pytest.mark.slow
def test_other_verifiers_do_not_run_completions(monkeypatch):
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    code = "__import__('os').environ.__setitem__('COMPLETION_RAN', '1')"
    ran = set()
    for name in sorted(set(DATASETS) - {"composite"}):
        gym_set = reasoning_gym.create_dataset(name, size=1, seed=5)
        for completion in (code, f"[{code}]", f"[[{code}]]", f"x + {code}"):
            monkeypatch.delenv("COMPLETION_RAN", raising=False)
            with contextlib.suppress(Exception):
                gym_set.score_answer(completion, gym_set[0])
            if "COMPLETION_RAN" in os.environ:
                ran.add(name)
    assert ran == data.GYM_RUNS_COMPLETIONS


def test_generator_takes_settings():
    one_digit = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    (train, held_out), verify = data.reasoning_gym("chain_sum", 0, one_digit)
    for question in (*train, *held_out):
        a, _, b = question.text.rpartition(":")[2].strip(" =.").split()
        assert len(a) == len(b) == 1
        assert verify(question.text, question.answer) == 1.0
    with pytest.raises(UserError, match=r"chain_sum does not work with the settings .*nothing"):
        data.reasoning_gym("chain_sum", 0, {"nothing": 1})
