"""What stops a run before it does harm, and what it says."""

import fcntl
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reference import train
from reference.training import evaluate
from reference.training import warm_start as supervised
from reference.training.command_line import parse_command_line
from reference.training.errors import UserError
from reference.training.model import load as models
from reference.training.model.policy import Policy
from reference.training.run import plots, run_directory
from reference.training.run import run_log as runlog
from reference.training.update.learner import Learner
from tests.helpers.learner import ADVANTAGES, QUESTIONS, make_learner
from tests.helpers.training_runs import tiny

NAN = float("nan")


pytestmark = pytest.mark.usefixtures("one_thread")


def weights(learner):
    return [each.detach().clone() for each in learner.policy.model.parameters()]


def spoilt(learner, monkeypatch, change, number: int):
    """The learner, with the loss of the given micro-batch changed."""
    original, calls = learner.loss, []

    def loss(batch, denominators):
        output = original(batch, denominators)
        calls.append(batch)
        return change(output) if len(calls) == number else output

    monkeypatch.setattr(learner, "loss", loss)
    return learner


@pytest.mark.parametrize(
    ("changes", "metric", "value", "message"),
    [
        ({}, "policy_loss", "nan", r"micro-batch 2 of 2 is nan: policy nan\. The weights are as"),
        ({"beta": 0.1}, "kl", "inf", r"micro-batch 2 of 4 is inf: KL inf\. The weights are as"),
        ({"entropy_coef": 0.1}, "entropy", "-inf", r"2 of 4 is -inf: entropy -inf\. The weights"),
    ],
)
def test_a_loss_that_is_no_number_is_placed_and_touches_no_weight(
    monkeypatch, changes, metric, value, message
):
    learner, samples = make_learner(micro_batch=1, learning_rate=0.1, **changes)
    bad = torch.tensor(float(value), dtype=torch.float64)

    def change(output):
        loss = output.loss * bad.abs() + bad
        return output._replace(loss=loss, metrics=output.metrics | {metric: bad})

    learner.step(samples, ADVANTAGES)
    before = weights(learner)
    spoilt(learner, monkeypatch, change, 2)
    with pytest.raises(UserError, match=rf"^step 2: the loss of .*{message}"):
        learner.step(samples, ADVANTAGES)
    assert all(map(torch.equal, weights(learner), before))
    assert all(each.grad is None for each in learner.policy.model.parameters())


def test_a_gradient_that_is_no_number_is_named_and_touches_no_weight():
    learner, samples = make_learner(learning_rate=0.1)
    before = weights(learner)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = dict(learner.policy.model.named_parameters())[name]
    weight.register_hook(lambda gradient: gradient * NAN)
    with pytest.raises(UserError, match=rf"^step 1: the gradient of {name} is not finite\. The"):
        learner.step(samples, ADVANTAGES)
    assert all(map(torch.equal, weights(learner), before))


def test_a_gradient_whose_norm_overflows_is_told_from_one_that_is_no_number():
    learner, samples = make_learner(learning_rate=0.1)
    weight = learner.policy.model.model.norm.weight
    weight.register_hook(lambda gradient: gradient.sign() * 1e300)
    with pytest.raises(UserError, match=r"^step 1: the norm of the gradient overflows\. The"):
        learner.step(samples, ADVANTAGES)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    MemoryError(),
]


def failing(learner, monkeypatch, error, calls):
    """The learner, whose n-th passes find no memory."""
    original, count = learner.loss, []

    def loss(batch, denominators):
        count.append(batch.num_questions)
        if len(count) in calls:
            raise error
        return original(batch, denominators)

    monkeypatch.setattr(learner, "loss", loss)
    return count


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:20])
def test_without_memory_the_step_is_done_again_in_halves_to_the_same_result(
    monkeypatch, capsys, error
):
    flags = {"beta": 0.1, "inner_iterations": 2, "learning_rate": 0.01, "warmup_steps": 0}
    whole, samples = make_learner(**flags)
    half, _ = make_learner(micro_batch=2, **flags)
    learner, _ = make_learner(**flags)
    seen = failing(learner, monkeypatch, error, {1})
    for _ in range(2):
        found = learner.step(samples, ADVANTAGES)
        assert found == half.step(samples, ADVANTAGES)
        assert found == pytest.approx(whole.step(samples, ADVANTAGES), rel=1e-9, abs=1e-12)
    assert all(map(torch.equal, weights(learner), weights(half)))
    assert seen == [4, *[2] * 8]
    assert capsys.readouterr().err == (
        "out of memory in step 1 with micro-batches of 4 questions: from here on 2; the gradient "
        "is the same\n"
    )


def test_a_half_done_gradient_is_forgotten(monkeypatch):
    half, samples = make_learner(micro_batch=1, beta=0.1)
    learner, _ = make_learner(micro_batch=2, beta=0.1)
    failing(learner, monkeypatch, OUT_OF_MEMORY[0], {2})
    assert learner.step(samples, ADVANTAGES) == half.step(samples, ADVANTAGES)
    assert all(map(torch.equal, weights(learner), weights(half)))


@pytest.mark.parametrize(
    ("flags", "calls", "size"),
    [({}, {1, 2}, 2), ({"micro_batch": 1}, {1}, 1), ({"top_entropy": 0.2}, {1}, 4)],
    ids=["twice", "one question", "tokens ranked within a micro-batch"],
)
def test_where_halving_does_not_help_the_flags_to_lower_are_named(monkeypatch, flags, calls, size):
    learner, samples = make_learner(beta=0.1, **flags)
    before = weights(learner)
    failing(learner, monkeypatch, OUT_OF_MEMORY[0], calls)
    expected = (
        rf"^out of memory in step 1 with micro-batches of {size} questions: lower --micro-batch, "
        r"--max-new-tokens or --group-size, or set --gradient-checkpointing$"
    )
    with pytest.raises(UserError, match=expected):
        learner.step(samples, ADVANTAGES)
    assert all(map(torch.equal, weights(learner), before))


def test_another_error_is_not_taken_for_one_of_memory(monkeypatch):
    learner, samples = make_learner()
    failing(learner, monkeypatch, RuntimeError("shapes do not match"), {1})
    with pytest.raises(RuntimeError, match="shapes"):
        learner.step(samples, ADVANTAGES)


def test_without_memory_for_answers_the_flags_to_lower_are_named():
    learner, _ = make_learner()

    def sampler(*_):
        raise OUT_OF_MEMORY[0]

    with pytest.raises(
        UserError,
        match=r"^out of memory while answers were sampled: lower --prompts, --group-size or --max-",
    ):
        learner.policy.sample(QUESTIONS, 4, 1.0, sampler)


def test_the_optimiser_that_finds_no_memory_says_what_trains_less(monkeypatch):
    learner, samples = make_learner()

    def step():
        raise OUT_OF_MEMORY[0]

    monkeypatch.setattr(learner.optimizer, "step", step)
    with pytest.raises(UserError, match="out of memory while the optimiser stepped: --lora-rank"):
        learner.step(samples, ADVANTAGES)


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(Policy, "load", lambda *_, **__: pytest.fail("a model was loaded"))


EARLY = {
    "--task revers --model x": "error: --task revers: expected one of arithmetic, reverse",
    "--task jsonl --data nowhere.jsonl --model x": "error: cannot read nowhere.jsonl",
    "--reward nowhere.py:f": "error: reward 'nowhere.py:f': there is no file nowhere.py",
    "--sampler vlm": "error: --sampler must be shared-prompt",
    "--epsilon-low -1": "error: --loss grpo: --epsilon-low",
    "--output-dir mine": "error: --output-dir mine is not empty: name a new one, or leave the flag "
    "out; or go on with its run by --resume mine, or replace it by --overwrite",
    "--output-dir mine --overwrite": "error: --overwrite: mine is not empty, and not the directory",
    "--overwrite": "error: --overwrite replaces the run in --output-dir: name one",
    "--output-dir mine/file": "error: cannot write to the output directory mine/file: File exists",
    "--resume mine": "error: --resume mine is not the directory of a run",
}


@pytest.mark.parametrize("flags", EARLY)
def test_what_is_wrong_is_found_before_a_model_is_loaded(
    flags, no_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    assert train.main(["--preset", "tiny", *flags.split()]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(EARLY[flags])
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "file"]


def test_missing_matplotlib_is_found_before_a_model_is_loaded(
    no_model, tmp_path, monkeypatch, capsys
):
    def missing():
        raise UserError("the curves need matplotlib")

    monkeypatch.setattr(train, "load_matplotlib", missing)
    assert plots.load_matplotlib() is None
    assert tiny(tmp_path / "run") == 2
    assert capsys.readouterr().err == "error: the curves need matplotlib\n"


@pytest.mark.parametrize("left", [[], ["settings.json"]], ids=["empty", "in its first phase"])
def test_a_directory_that_another_process_trains_in_is_left_alone(tmp_path, left, no_model, capsys):
    for name in left:
        (tmp_path / name).write_text("{}")
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        assert tiny(tmp_path, "--overwrite") == 2
    finally:
        os.close(handle)
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"error: another process trains in {tmp_path}: wait for it or end it"
    assert [path.name for path in tmp_path.iterdir()] == left


def no_such_model(*_, **__):
    raise UserError("no model")


def test_a_run_that_never_began_takes_back_what_it_made_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(Policy, "load", no_such_model)
    (tmp_path / "mine").mkdir()
    for name in ("mine", "new"):
        assert tiny(tmp_path / name) == 2
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_a_disk_without_room_for_settings_leaves_nothing(tmp_path, no_model, monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_directory.os, "fsync", full)
    assert tiny(tmp_path / "run") == 2
    path = tmp_path / "run" / "settings.json"
    assert capsys.readouterr().err == f"error: cannot write {path}: No space left on device\n"
    assert not (tmp_path / "run").exists()


def test_a_mount_that_cannot_be_removed_hides_no_error(tmp_path, monkeypatch, capsys):
    def busy(_):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Policy, "load", no_such_model)
    monkeypatch.setattr(run_directory.Path, "rmdir", busy)
    assert tiny(tmp_path / "run") == 2
    assert capsys.readouterr().err == "error: no model\n"


def test_a_refused_resume_leaves_a_run_that_was_killed_in_its_warm_start(tmp_path, no_model):
    config = parse_command_line(["--preset", "tiny", "--output-dir", str(tmp_path)])
    run_directory.save_json(tmp_path / "settings.json", config.as_json())
    assert train.main(["--resume", str(tmp_path), "--seed", "1"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


@pytest.fixture
def old_run(tmp_path):
    """What runs leave, also those that were killed, beside what is not theirs."""
    for name in ("metrics.jsonl", "settings.json", "events.out.tfevents.1", "notes.txt"):
        (tmp_path / name).write_text("{}")
    folders = ["checkpoints/step-000002", "model", "model.partial", "model.before.partial"]
    for name in (*folders, "mine", "mine.partial"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text(name)
    return tmp_path


def test_overwrite_removes_what_a_run_leaves_and_nothing_else(old_run):
    run_directory.clear(old_run, {"seed": 7})
    names = ["mine", "mine.partial", "notes.txt", "settings.json"]
    assert sorted(path.name for path in old_run.iterdir()) == names
    assert json.loads((old_run / "settings.json").read_text()) == {"seed": 7}


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (run_directory.shutil, "rmtree"),
        (run_directory.Path, "unlink"),
        (run_directory.Path, "rename"),
    ],
)
def test_an_overwrite_that_was_killed_can_be_done_again(old_run, owner, name, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            run_directory.clear(old_run, {})
    config = parse_command_line(["--preset", "tiny", "--output-dir", str(old_run), "--overwrite"])
    assert run_directory.make_run_directory(config) == old_run
    run_directory.clear(old_run, {})
    assert not (old_run / "metrics.jsonl").exists()


def test_overwrite_does_not_remove_the_model_that_it_starts_from(old_run, no_model, capsys):
    model = old_run / "mine" / ".." / "model"
    assert tiny(old_run, "--overwrite", "--model", str(model)) == 2
    assert capsys.readouterr().err == (
        f"error: --overwrite removes the run in {old_run}, and --model {model} lies in it: move "
        "the model, or name another --output-dir\n"
    )
    assert (old_run / "model" / "file").exists()


LINKS = ["completions.txt", "settings.json.partial", "model.partial", "checkpoints"]
LINKS += ["mine/below", "wandb"]


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("by", ["--resume", "--overwrite"])
def test_a_run_directory_that_points_elsewhere_is_refused(by, name, tmp_path, no_model, capsys):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run / "mine").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "file").write_text("kept")
    config = parse_command_line(["--preset", "tiny", "--output-dir", str(run)])
    run_directory.save_json(run / "settings.json", config.as_json())
    (run / name).symlink_to(elsewhere)
    if by == "--resume":
        assert train.main(["--resume", str(run)]) == 2
    else:
        assert tiny(run, "--overwrite") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == (
        f"error: {by}: {run / name} is a symbolic link, and may lead out of the run: remove it"
    )
    assert [path.name for path in elsewhere.iterdir()] == ["file"]


def test_the_links_that_wandb_makes_are_its_own(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "latest-run").symlink_to("run-1")
    config = parse_command_line(["--preset", "tiny", "--output-dir", str(tmp_path), "--overwrite"])
    assert run_directory.make_run_directory(config) == tmp_path


def test_a_model_directory_with_an_adapter_beside_the_weights_is_refused(tmp_path):
    run_directory.save_model(tmp_path, *models.from_scratch())
    model = tmp_path / "model"
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError,
        match=rf"^{model} holds an adapter \(adapter_config\.json\): merge it into the weights and "
        r"save these alone$",
    ):
        models.locate(str(model), None)


def test_an_evaluation_asks_after_no_other_gpu(monkeypatch):
    monkeypatch.setattr(evaluate, "accuracy", lambda *_: {"strict": torch.rand(1).item()})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("walked through them"))
    config = parse_command_line(["--preset", "tiny"])
    policy, before = SimpleNamespace(device=torch.device("cpu")), torch.get_rng_state()
    evaluate.evaluate(policy, SimpleNamespace(held_out=[]), config)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_is_overwritten_once_its_successor_begins(tmp_path, monkeypatch):
    def start(*arguments):
        log = arguments[-1]
        assert not (tmp_path / "metrics.jsonl").exists()
        log.evaluation(0, {"strict": 0.5})
        return {}

    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("old")
    monkeypatch.setattr(models, "from_scratch", lambda: refuse())

    def refuse():
        assert (tmp_path / "metrics.jsonl").read_text() == "old"
        raise UserError("no model")

    assert tiny(tmp_path, "--overwrite") == 2
    assert (tmp_path / "metrics.jsonl").read_text() == "old"
    monkeypatch.undo()
    monkeypatch.setattr(train, "train", start)
    monkeypatch.setattr(supervised, "TARGET", 0.0)
    assert tiny(tmp_path, "--overwrite") == 0
    assert "strict" in (tmp_path / "metrics.jsonl").read_text()
    config = parse_command_line(["--resume", str(tmp_path)])
    assert config.preset == "tiny" and not config.overwrite


def test_a_line_that_the_disk_has_no_room_for_names_its_file(tmp_path):
    log = runlog.RunLog(tmp_path, {}, tensorboard=False)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        UserError, match=r"^cannot write .*metrics\.jsonl: No space left on device$"
    ):
        log.step({"step": 1})


def test_half_a_line_is_no_line(tmp_path, monkeypatch):
    class Half:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, data):
            return len(data) // 2

    log = runlog.RunLog(tmp_path, {}, tensorboard=False)
    monkeypatch.setattr(runlog.Path, "open", lambda *_, **__: Half())
    with pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device$"):
        log.step({"step": 1})


def test_a_full_disk_wherever_it_is_met_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(supervised, "TARGET", 0.0)
    monkeypatch.setattr(train, "plot_dashboard", full)
    assert tiny(tmp_path) == 2
    (said,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert said == f"error: cannot write to {tmp_path}: No space left on device"


def test_a_nan_ends_the_run_with_one_line_and_its_checkpoint_stays(tmp_path, monkeypatch, capsys):
    original = Learner.loss

    def loss(learner, batch, denominators):
        output = original(learner, batch, denominators)
        return output._replace(loss=output.loss * NAN) if learner.steps == 3 else output

    monkeypatch.setattr(supervised, "TARGET", 0.02)
    monkeypatch.setattr(train, "plot_dashboard", lambda *_: None)
    monkeypatch.setattr(Learner, "loss", loss)
    assert tiny(tmp_path, "--checkpoint-every", "2") == 2
    said = capsys.readouterr().err
    assert "error: step 3: the loss of micro-batch 1 of 1 is nan. The weights are" in said
    assert f"to go on after step 2: python reference/train.py --resume {tmp_path}\n" in said
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_a_file_system_that_becomes_read_only_is_one_line(tmp_path, monkeypatch):
    """There even to remove what is not there is refused."""

    def refuse(self, *_, **__):
        raise OSError(30, "Read-only file system", str(self))

    for name in ("open", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    path = tmp_path / "summary.json"
    with pytest.raises(UserError, match=f"^cannot write {path}: Read-only file system"):
        run_directory.save_json(path, {})
