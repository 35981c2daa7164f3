"""The teacher of a distillation: other sizes, and models that are refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from reference.training.config import TrainConfig
from reference.training.errors import UserError
from reference.training.model import load as models
from reference.training.model.policy import load_policy
from reference.training.model.teacher import Teacher
from reference.training.rollout.samplers import SharedPrompt
from reference.training.tasks.tasks import Question
from tests.helpers.model_directories import save_family

CPU = torch.device("cpu")


def load(student, teacher, questions=(), **changes):
    config = TrainConfig(model=str(student), teacher=str(teacher), max_new_tokens=4, **changes)
    found = Teacher.find(config)
    policy = load_policy(config, CPU, SharedPrompt(), None, questions, check=found.check_student)
    return found.load(policy, questions), policy


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("student"), "Llama")


def test_teacher_of_another_width_is_frozen(student, tmp_path):
    teacher, policy = load(student, save_family(tmp_path, "Llama", hidden_size=48), lora_rank=2)
    widths = [x.model.config.hidden_size for x in (teacher, policy)]
    assert widths == [48, 32]
    assert not any(param.requires_grad for param in teacher.model.parameters())
    assert not hasattr(teacher.model, "disable_adapter")


def test_linear_layers_of_the_teacher_are_bf16_under_autocast(student, tmp_path):
    teacher, _ = load(student, save_family(tmp_path, "Llama"), autocast="bf16")
    assert teacher.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert teacher.model.model.embed_tokens.weight.dtype == torch.float32


def test_another_tokenizer_raises_before_weights_are_read(student, tmp_path, monkeypatch):
    model, tokenizer = models.from_scratch()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail())
    with pytest.raises(UserError) as raised:
        load(student, tmp_path)
    said = str(raised.value)
    assert said.startswith(f"--teacher {tmp_path} and --model {student} have different tokenizers")
    assert "has 16 tokens, that of the student 258" in said


def test_a_token_with_another_id_is_named(student, tmp_path):
    save_family(tmp_path, "Llama")
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    ids = content["model"]["vocab"]
    ids["A"], ids["B"] = ids["B"], ids["A"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"for example 'A' is 33 and 32$"):
        load(student, tmp_path)


def test_a_teacher_with_fewer_rows_raises(student, tmp_path):
    save_family(tmp_path, "Llama", vocab_size=270)
    load(student, tmp_path)
    with pytest.raises(UserError, match=r"the student has 270 rows .* teacher, with 258 rows"):
        load(tmp_path, student)


def test_missing_teacher_names_its_flag(student, tmp_path):
    with pytest.raises(UserError, match=f"^--teacher {tmp_path}/none: there is no such directory"):
        load(student, tmp_path / "none")


def test_a_prompt_beyond_the_positions_of_the_teacher_raises(student, tmp_path):
    save_family(tmp_path, "GPT2", n_positions=16)
    with pytest.raises(UserError, match="GPT2LMHeadModel has 16 positions"):
        load(student, tmp_path, [Question("a question of many letters", "1")])


def test_another_softcap_raises(student, tmp_path):
    save_family(tmp_path, "Gemma2", final_logit_softcapping=5.0)
    with pytest.raises(UserError, match=r"got 1 and 5\.0 of the teacher, 1 and None of the"):
        load(student, tmp_path)
