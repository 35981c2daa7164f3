"""Weights reach a server that answers as vLLM does, or the run says how to start one."""

import stat
from types import SimpleNamespace

import pytest
import torch

from reference.training.distributed import SINGLE_PROCESS
from reference.training.errors import UserError
from reference.training.model import lora
from reference.training.rollout import weight_push
from reference.training.rollout.server import Server
from reference.training.rollout.synced_weights import synced_weights
from reference.training.rollout.weight_push import AdapterPush, CheckpointPush, pick_weight_push
from tests.helpers.model_directories import make_family
from tests.helpers.vllm_emulator import COLLECTIVE_RPC, LOAD_ADAPTER


def make_policy(rank=None, **changes):
    model, tokenizer = make_family("Llama", **changes)
    model = model if rank is None else lora.add_lora(model, rank, 8.0)
    return SimpleNamespace(model=model, tokenizer=tokenizer, ranks=SINGLE_PROCESS)


def pick(emulator, directory, policy):
    return pick_weight_push(Server(emulator.url, 5.0), directory, policy, "my model")


def perturb(policy):
    with torch.no_grad():
        for param in policy.model.parameters():
            if param.requires_grad:
                param += 0.1 * torch.randn_like(param)


@pytest.mark.parametrize(
    ("rank", "tied", "kind"),
    [(None, False, CheckpointPush), (None, True, CheckpointPush), (3, True, AdapterPush)],
)
def test_each_push_has_the_weights_of_the_policy_in_a_new_directory(
    emulator, tmp_path, rank, tied, kind
):
    if rank is not None:
        emulator.routes = {LOAD_ADAPTER}
    policy = make_policy(rank, tie_word_embeddings=tied)
    push = pick(emulator, tmp_path / "weights", policy)
    assert type(push) is kind
    for _ in range(3):
        perturb(policy)
        name = push.push(policy)
        path, tensors = emulator.loaded[-1]
        if kind is AdapterPush:
            assert emulator.adapters == {name}
            expected = {
                key.replace(".default", ""): x
                for key, x in policy.model.state_dict().items()
                if "lora_" in key
            }
        else:
            expected = dict(synced_weights(policy))
        assert tensors.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(tensors[key], value), key
        assert [*(tmp_path / "weights").iterdir()] == [path]  # the older ones are gone
        mode = stat.S_IMODE((path / next(iter(path.glob("*.safetensors"))).name).stat().st_mode)
        assert mode == stat.S_IMODE(path.stat().st_mode) & 0o666
    assert len({path for path, _ in emulator.loaded}) == 3
    if kind is CheckpointPush:  # after each reload, and again if it failed
        assert emulator.resets == [1, 1, 2, 2, 3, 3]
    push.close()
    push.close()
    assert not (tmp_path / "weights").exists()


def test_directory_of_another_and_its_files_are_left_alone(emulator, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("")
    for name, left in (("empty", []), ("used", ["mine"])):
        push = pick(emulator, tmp_path / name, make_policy())
        push.push(make_policy())
        push.close()
        assert [path.name for path in (tmp_path / name).iterdir()] == left


def test_server_that_is_gone_is_the_only_reason(emulator, tmp_path):
    policy = make_policy()
    push = pick(emulator, tmp_path / "weights", policy)
    emulator.shutdown()
    emulator.server_close()
    with pytest.raises(UserError, match=r"/collective_rpc is out of reach: .* refused$"):
        push.push(policy)
    push.close()
    assert [*tmp_path.iterdir()] == []


def test_adapter_is_in_the_format_of_peft(emulator, tmp_path):
    from peft import PeftModel

    emulator.routes = {LOAD_ADAPTER}
    policy = make_policy(3)
    perturb(policy)
    pick(emulator, tmp_path, policy).push(policy)
    loaded = PeftModel.from_pretrained(make_policy().model, emulator.loaded[0][0])
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, policy.model(ids).logits)


def test_base_model_comes_before_the_first_adapter_where_it_can_be_replaced(emulator, tmp_path):
    policy, base = make_policy(3), make_policy().model.state_dict()
    perturb(policy)
    push = pick(emulator, tmp_path, policy)
    push.push(policy)
    push.push(policy)
    sent = [tensors.keys() for _, tensors in emulator.loaded]
    assert sent[0] == base.keys() and sent[1] == sent[2] != sent[0]
    for name, value in base.items():
        assert torch.equal(emulator.loaded[0][1][name], value)
    assert [*tmp_path.iterdir()] == [emulator.loaded[2][0]]


def test_lora_is_merged_for_a_server_without_adapters(emulator, tmp_path):
    emulator.routes = {COLLECTIVE_RPC}
    policy = make_policy(3)
    push = pick(emulator, tmp_path, policy)
    perturb(policy)
    assert push.push(policy) is None
    tensors = emulator.loaded[0][1]
    for name, value in lora.merged(policy.model).state_dict().items():
        torch.testing.assert_close(tensors[name], value)


@pytest.mark.parametrize(
    ("rank", "routes", "command"),
    [
        (None, {LOAD_ADAPTER}, "VLLM_SERVER_DEV_MODE=1 vllm serve 'my model' --host 127.0.0.1"),
        (20, set(), r"UPDATING=1 vllm serve 'my model' --enable-lora --max-lora-rank 32 --logprob"),
    ],
)
def test_server_that_takes_no_weights_is_refused(emulator, tmp_path, rank, routes, command):
    emulator.routes = routes
    with pytest.raises(UserError, match=f"{emulator.url} takes over no weights: .*{command}"):
        pick(emulator, tmp_path, make_policy(rank))


@pytest.mark.parametrize(
    ("device", "tied", "overrides", "is_right"),
    [
        ("cpu", True, None, False),
        ("cpu", True, {"tie_word_embeddings": False}, True),
        ("cpu", False, None, True),
        ("cuda", True, None, True),
    ],
)
def test_server_that_would_keep_a_tied_head_is_refused(
    emulator, tmp_path, device, tied, overrides, is_right
):
    emulator.info["vllm_config"] = {
        "device_config": {"device": device},
        "model_config": {"hf_overrides": overrides},
    }
    policy = make_policy(tie_word_embeddings=tied)
    if is_right:
        assert isinstance(pick(emulator, tmp_path, policy), CheckpointPush)
        return
    with pytest.raises(UserError, match=r"""tied to the embedding; start it by: .*'{"tie_word"""):
        pick(emulator, tmp_path, policy)


@pytest.mark.parametrize(("device", "is_right"), [("cpu", False), ("cuda", True)])
def test_server_that_would_split_prompts_on_a_cpu_is_refused(emulator, tmp_path, device, is_right):
    emulator.info["vllm_config"] = {
        "device_config": {"device": device},
        "scheduler_config": {"enable_chunked_prefill": True},
    }
    if is_right:
        assert isinstance(pick(emulator, tmp_path, make_policy()), CheckpointPush)
        return
    with pytest.raises(UserError, match=r"start it with --no-enable-chunked-prefill$"):
        pick(emulator, tmp_path, make_policy())


@pytest.mark.parametrize("rank", [None, 3])
def test_refused_weights_are_removed_and_the_reason_is_given(emulator, tmp_path, rank):
    emulator.routes = {COLLECTIVE_RPC if rank is None else LOAD_ADAPTER}
    policy = make_policy(rank)
    push = pick(emulator, tmp_path, policy)
    push.push(policy)
    emulator.refusal = "no such directory"
    with pytest.raises(UserError, match=r"answered 500: no such directory; .* \(--weights-dir\)"):
        push.push(policy)
    assert [*tmp_path.iterdir()] == [emulator.loaded[0][0]]


def test_adapter_is_read_from_parameters_which_are_whole_under_fsdp(
    emulator, tmp_path, monkeypatch
):
    emulator.routes = {LOAD_ADAPTER}
    policy = make_policy(3)
    push = pick(emulator, tmp_path, policy)
    monkeypatch.delattr(torch.nn.Module, "state_dict")  # it returns shards
    push.push(policy)
    names = {name.replace(".default", "") for name, _ in policy.model.named_parameters()}
    assert emulator.loaded[0][1].keys() == {name for name in names if "lora_" in name}


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_weights_of_an_interrupted_push_are_removed(emulator, tmp_path, monkeypatch, error):
    def interrupt(*_):
        raise error

    policy = make_policy()
    push = pick(emulator, tmp_path / "weights", policy)
    monkeypatch.setattr(push.server, "post", interrupt)  # after the weights
    with pytest.raises(error):
        push.push(policy)
    assert [*(tmp_path / "weights").iterdir()] == []
    push.close()
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("info", [{"error": "Unexpected endpoint"}, {"vllm_config": "text"}])
def test_server_whose_settings_are_unknown_is_refused(emulator, tmp_path, info):
    emulator.info = info
    with pytest.raises(UserError, match="/server_info has no vllm_config in JSON"):
        pick(emulator, tmp_path, make_policy())


def test_cache_that_is_never_dropped_raises(emulator, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_push, "RETRY_S", 0.1)
    emulator.resets_work = False
    policy = make_policy()
    with pytest.raises(UserError, match="does not drop the prompts that it has cached"):
        pick(emulator, tmp_path, policy).push(policy)


def test_full_disk_is_one_line(emulator, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_push, "save_file", fails)
    policy = make_policy()
    with pytest.raises(UserError, match=rf"^cannot write {tmp_path}/weights-\w+: No space left"):
        pick(emulator, tmp_path, policy).push(policy)
    assert [*tmp_path.iterdir()] == []
