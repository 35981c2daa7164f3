"""A run is not resumed over other data or another reward."""

import json

import pytest

from reference import train
from reference.training.command_line import parse_command_line
from reference.training.run.inputs import digest_inputs
from reference.training.tasks.tasks import load_task
from tests.helpers.training_runs import tiny

REWARD = "def zero(completions, **_):\n    return [0.0] * len(completions)\n"


def write_data(path, count=8):
    rows = [{"prompt": str(100_000 + i), "answer": str(i)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write data, a reward, a step reward and a module with a reward, and return their flags."""
    write_data(tmp_path / "mine.jsonl")
    (tmp_path / "own.py").write_text(REWARD)
    (tmp_path / "module_with_a_reward.py").write_text(REWARD.replace("zero", "none"))
    (tmp_path / "steps.py").write_text(
        "def steps(completions, **_):\n    return [[(1, 0.0)] for _ in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(train, "plot_dashboard", lambda *_: None)
    return {
        "--data": [str(tmp_path / "mine.jsonl")],
        "--reward": [f"{tmp_path / 'own.py'}:zero=0.5", "module_with_a_reward.none"],
        "--step-reward": [f"{tmp_path / 'steps.py'}:steps"],
    }


def flags_of(files):
    given = (word for flag, values in files.items() for word in (flag, *values))
    return ["--task", "jsonl", *given]


def test_digests_change_with_their_file(files, tmp_path):
    config = parse_command_line([*flags_of(files)])
    before = digest_inputs(config, load_task(config))
    assert list(before) == [
        f"--data {tmp_path / 'mine.jsonl'}",
        f"--reward {tmp_path / 'own.py'}:zero=0.5",
        "--reward module_with_a_reward.none",
        f"--step-reward {tmp_path / 'steps.py'}:steps",
    ]
    assert digest_inputs(config, load_task(config)) == before
    for name in ("own.py", "module_with_a_reward.py", "steps.py"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "# changed\n")
    write_data(tmp_path / "mine.jsonl", 9)
    after = digest_inputs(config, load_task(config))
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)


def test_digest_of_a_value_that_json_lacks_has_no_address(files, tmp_path):
    config = parse_command_line([*flags_of(files)])
    task = load_task(config)
    digests = []
    for _ in range(2):
        task.train[0].columns["object"] = object()
        digests.append(digest_inputs(config, task))
    assert digests[0] == digests[1]


def test_task_without_data_is_digested_too():
    seeds = [parse_command_line(["--seed", str(seed)]) for seed in (0, 1)]
    first, second = (digest_inputs(config, load_task(config)) for config in seeds)
    assert first.keys() == second.keys() == {"--task arithmetic"} and first != second


@pytest.mark.parametrize("changed", ["mine.jsonl", "own.py"])
def test_resume_over_a_changed_file_raises_unless_accepted(
    files, tmp_path, tiny_model, changed, capsys
):
    reward = ["--reward", files["--reward"][0]]
    flags = ["--task", "jsonl", "--data", files["--data"][0], *reward, "--model", tiny_model]
    assert tiny(tmp_path / "run", *flags, "--steps", "1") == 0
    if changed == "own.py":
        (tmp_path / "own.py").write_text(REWARD + "# changed\n")
    else:
        write_data(tmp_path / "mine.jsonl", 9)
    capsys.readouterr()
    resume = ["--resume", str(tmp_path / "run"), "--steps", "2", *reward]
    assert train.main(resume) == 2
    (said,) = capsys.readouterr().err.splitlines()
    flag = f"--data {files['--data'][0]}" if changed == "mine.jsonl" else " ".join(reward)
    assert said == (
        f"error: --resume {tmp_path / 'run'}: {flag} changed after it was started, which would "
        "make another run of it; restore it, start anew from its model with --model, or go on all "
        "the same with --accept-changes"
    )
    assert train.main([*resume, "--accept-changes"]) == 0
    assert not json.loads((tmp_path / "run" / "settings.json").read_text())["accept_changes"]
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "3", *reward]) == 0


def test_checkpoint_without_digests_resumes(files, tmp_path, tiny_model, monkeypatch):
    flags = ["--task", "jsonl", "--data", files["--data"][0], "--model", tiny_model]
    with monkeypatch.context() as patch:
        patch.setattr(train, "digest_inputs", lambda *_: {})
        assert tiny(tmp_path / "run", *flags, "--steps", "1") == 0
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "2"]) == 0
