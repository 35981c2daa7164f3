"""Training on one's own data, end to end: each file type, with a reward that reads a column."""

import csv
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reference import train
from reference.training.model import load as models

STEPS = 3
# Each completion gets the difficulty of its question, so the mean reward says what was received.
REWARDS = """
def hard(completions, difficulty):
    return [None if level is None else float(level) for level in difficulty]


def text_length(prompts, completions, **columns):
    assert set(columns) >= {"difficulty"}
    return [len(c if isinstance(c, str) else c[0]["content"]) / 100 for c in completions]


def typing_mistake(completions, dificulty):
    return [0.0] * len(completions)


def steps(prompts, completions, difficulty):
    return [[] for _ in completions]


def one_step_too_far(completions):
    texts = (c if isinstance(c, str) else c[0]["content"] for c in completions)
    return [[(len(text) + 1, 1.0)] for text in texts]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Save the tokenizer of digits with a random model that knows its end token."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = models.from_scratch()[1]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}={% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


ROWS = [{"question": f"{n}+1", "answer": str(n + 1), "difficulty": 2} for n in range(20)]


def as_csv(directory, rows):
    with (directory / "mine.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return directory / "mine.csv"


def as_conversations(directory, rows):
    lines = []
    for row in rows:
        example = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
        prompt = [{"role": "system", "content": "9"}, *example]
        prompt.append({"role": "user", "content": row["question"]})
        completion = [{"role": "assistant", "content": row["answer"]}]
        lines.append({"prompt": prompt, "completion": completion, "difficulty": 2})
    (directory / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return directory / "mine.jsonl"


def as_parquet(directory, rows):
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(rows), directory / "mine.parquet")
    return directory / "mine.parquet"


def as_json(directory, rows):
    (directory / "mine.json").write_text(json.dumps({"data": rows}))
    return directory / "mine.json"


def run(directory, model, data, *flags):
    arguments = ["--model", model, "--task", "data", "--data", data, "--steps", STEPS]
    arguments += ["--prompts", 4, "--group-size", 2, "--max-new-tokens", 4, "--eval-questions", 4]
    arguments += ["--output-dir", directory / "run", "--no-tensorboard", "--threads", 1]
    return train.main([str(x) for x in (*arguments, "--checkpoint-every", "None", *flags)])


def rewards(directory):
    (directory / "rewards.py").write_text(REWARDS)
    return directory / "rewards.py"


@pytest.mark.parametrize("make", [as_csv, as_conversations, as_parquet, as_json])
def test_train_on_a_file(make, tmp_path, model, capsys):
    path, source = make(tmp_path, [*ROWS, ROWS[0]]), rewards(tmp_path)
    flags = ["--reward", f"{source}:hard=0.5", f"{source}:text_length=0"]
    assert run(tmp_path, model, path, *flags) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert (
        f"{path}: 21 rows read, 1 dropped as duplicates, 16 kept to train on and 4 held" in printed
    )
    assert "accuracy" in printed
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in lines if "reward" in row]
    assert len(steps) == STEPS
    for row in steps:
        assert row["rewards/hard/mean"] == 2.0 and row["rewards/text_length/mean"] >= 0.0
        assert row["reward"] == pytest.approx(1.0 + row["rewards/correct/mean"])
    shown = (tmp_path / "run" / "completions.txt").read_text()
    assert "answer:" in shown and "hard 2" in shown


def test_train_without_ground_truths(tmp_path, model, capsys):
    levels = [1, None] * 10
    rows = [
        {"prompt": row["question"], "difficulty": level}
        for row, level in zip(ROWS, levels, strict=True)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = rewards(tmp_path)
    flags = ["--reward", f"{source}:hard=0.5", "--step-reward", f"{source}:steps"]
    assert run(tmp_path, model, tmp_path / "mine.jsonl", *flags) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    assert "20 without a ground truth" in captured.out
    assert "held-out questions: mean reward 0.5" in captured.out and "strict" not in captured.out
    (line,) = [line for line in captured.out.splitlines() if line.startswith("  mean reward")]
    assert line.split() == ["mean", "reward", "0.5", "0.5"]
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["reward"] == 0.5 for row in lines if "reward" in row)
    assert not any("accuracy" in name for row in lines for name in row)
    assert "answer:" not in (tmp_path / "run" / "completions.txt").read_text()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "no row has a ground truth to reward: name its column with --answer-column"),
        (["--reward", "{}:typing_mistake"], "'dificulty', .*; did you mean difficulty?"),
        (["--reward", "{}:hard", "--pass-at", "4"], "--pass-at 4 needs ground truths"),
        (["--reward", "{}:hard", "--step-reward", "{}:one_step_too_far"], "--step-reward gave"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "locate", lambda *_: pytest.fail("a model was looked for"))
    rows = [{"prompt": row["question"], "difficulty": 1} for row in ROWS]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = rewards(tmp_path)
    flags = [flag.format(source) for flag in flags]
    assert run(tmp_path, "smollm2-135m", tmp_path / "mine.jsonl", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in says.split(".*"))
    assert not (tmp_path / "run").exists()
