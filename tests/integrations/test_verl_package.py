"""The plugin inside the real verl: its FSDP engine's forward and loss on a tiny model, on a CPU.

Without verl these tests are skipped.
"""

import functools
import importlib
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from grpo_kernels.integrations import verl_head

pytest.importorskip("verl", exc_type=ImportError)
pytest.importorskip("tensordict")
pytestmark = pytest.mark.filterwarnings("ignore")  # verl's own, when it is imported

PLUGIN = "grpo_kernels.integrations.verl_plugin"
LENGTHS, V = (5, 3, 4), 31
RESPONSES = (3, 2, 1)


@pytest.fixture(scope="module")
def engine_module():
    """verl's engine with our plugin, loaded as a worker loads it; on a machine without a GPU."""
    from verl.utils.import_utils import import_external_libs

    module = importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
    import_external_libs(PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "get_device_id", lambda: "cpu")
        patch.setattr(module, "get_device_name", lambda: "cpu")
        yield module


@pytest.fixture
def head_calls(monkeypatch):
    """Calls of our kernel."""
    calls, original = [], verl_head.linear_token_stats

    def counted(*arguments, **keywords):
        calls.append(keywords)
        return original(*arguments, **keywords)

    monkeypatch.setattr(verl_head, "linear_token_stats", counted)
    return calls


def make_engine(module, *, fused, backend="torch", softcap=None):
    """verl's engine around a tiny model that its own monkey patch prepared, without FSDP."""
    import verl.utils.torch_functional as verl_functional
    from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": V}
    plain = {"attn_implementation": "eager", "use_cache": False}
    family, config = Qwen2ForCausalLM, Qwen2Config(**sizes, **plain)
    if softcap is not None:
        family = Gemma2ForCausalLM
        config = Gemma2Config(**sizes, **plain, head_dim=8, final_logit_softcapping=softcap)
    model = type("TinyModel", (family,), {})(config)  # verl patches the class
    torch.nn.init.normal_(model.lm_head.weight)
    patch_forward_with_backends(model, use_fused_kernels=fused, fused_kernels_backend=backend)
    engine = object.__new__(module.FSDPEngineWithLMHead)
    vars(engine).update(
        module=model,
        use_ulysses_sp=False,
        pad_to_length=False,
        _autocast_dtype=torch.float32,
        engine_config=SimpleNamespace(
            entropy_checkpointing=False, entropy_from_logits_with_chunking=False
        ),
        compute_entropy_from_logits=verl_functional.entropy_from_logits,
        get_data_parallel_group=lambda: None,
    )
    return engine


def make_batch(temperature, *, fused, **settings):
    """A micro-batch as verl's workers pass it: nested tensors, and settings beside them."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    def nested(values):
        return torch.nested.nested_tensor(values, layout=torch.jagged)

    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, V, (length,), generator=generator) for length in LENGTHS]
    batch = TensorDict(
        {
            "input_ids": nested(rows),
            "position_ids": nested([torch.arange(length) for length in LENGTHS]),
            "prompts": nested([row[:-n] for row, n in zip(rows, RESPONSES, strict=True)]),
            "responses": nested([row[-n:] for row, n in zip(rows, RESPONSES, strict=True)]),
            "response_mask": nested([torch.ones(n) for n in RESPONSES]),
            "old_log_probs": nested([torch.full((n,), -3.3) for n in RESPONSES]),
            "advantages": nested([torch.full((n,), 1.5 - n) for n in RESPONSES]),
        },
        batch_size=[len(LENGTHS)],
    )
    settings |= {"dp_size": 1, "batch_num_tokens": 6, "global_batch_size": 3}
    if isinstance(temperature, torch.Tensor):
        batch["temperature"] = temperature
    else:
        settings["temperature"] = temperature
    settings |= {"use_fused_kernels": fused, "calculate_entropy": True, "max_response_length": 3}
    tensordict_utils.assign_non_tensor(batch, **settings)
    return batch


def predicted(nested):
    """The entries that verl reads: all but the last of each sequence, whose label is not in it."""
    return torch.cat([row[:-1] for row in nested.unbind()])


def forward(module, *, fused, temperature, backend="torch", softcap=None, **settings):
    engine = make_engine(module, fused=fused, backend=backend, softcap=softcap)
    batch = make_batch(temperature, fused=fused, **settings)
    _, output = engine.forward_step(batch, loss_function=None, forward_only=True)
    return {name: predicted(x) for name, x in output["model_output"].items()}


PER_SAMPLE = torch.tensor([0.7, 1.3, 1.0])


@pytest.mark.parametrize("remove_padding", [True, False])
@pytest.mark.parametrize("temperature", [0.7, PER_SAMPLE], ids=["one", "per sample"])
@pytest.mark.parametrize("squares", [False, True])
def test_engine_forward(engine_module, head_calls, temperature, remove_padding, squares):
    """verl without fused kernels is the oracle."""
    settings = {
        "temperature": temperature,
        "use_remove_padding": remove_padding,
        "calculate_sum_pi_squared": squares,
    }
    expected = forward(engine_module, fused=False, **settings)
    assert not head_calls
    found = forward(engine_module, fused=True, **settings)
    assert len(head_calls) == 1
    assert set(found) == set(expected) == {"log_probs", "entropy", *["sum_pi_squared"] * squares}
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["torch", "liger", "triton"])
def test_every_backend_calls_our_kernel(engine_module, head_calls, backend):
    expected = forward(engine_module, fused=False, temperature=0.7)
    found = forward(engine_module, fused=True, temperature=0.7, backend=backend)
    assert len(head_calls) == 1
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_softcap(engine_module, head_calls, backend):
    settings = {"temperature": 0.7, "softcap": 1.5}
    expected = forward(engine_module, fused=False, **settings)
    found = forward(engine_module, fused=True, backend=backend, **settings)
    assert len(head_calls) == 1
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("temperature", [0.7, PER_SAMPLE], ids=["one", "per sample"])
def test_training_step(engine_module, head_calls, temperature):
    """Gradients of verl's ppo_loss, with our head and our objective, equal those with verl's."""
    from verl.workers.config import ActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    gradients, metrics = [], []
    for fused, mode in ((False, "vanilla"), (True, "grpo_kernels/grpo")):
        actor = ActorConfig(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, entropy_coeff=0.1,
            policy_loss=PolicyLossConfig(loss_mode=mode),
        )  # fmt: skip
        engine = make_engine(engine_module, fused=fused)
        batch = make_batch(temperature, fused=fused)
        loss, output = engine.forward_step(
            batch, functools.partial(ppo_loss, actor), forward_only=False
        )
        loss.backward()
        gradients.append([x.grad for x in engine.module.parameters()])
        metrics.append(output["metrics"])
    assert len(head_calls) == 1
    torch.testing.assert_close(*gradients)
    for name in ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_loss", "actor/entropy_loss"):
        values = [x[name].aggregate() for x in metrics]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_model_without_our_head_raises(engine_module, monkeypatch):
    engine = make_engine(engine_module, fused=True)
    batch = make_batch(0.7, fused=True, calculate_sum_pi_squared=True)
    _, output_args = engine.prepare_model_inputs(batch)
    with pytest.raises(RuntimeError, match="FusedLinearForPPO or linear_cross_entropy: TinyModel"):
        engine.prepare_model_outputs(SimpleNamespace(), output_args, batch, None)


def test_installing_twice_changes_nothing(engine_module, monkeypatch):
    """Modules that imported verl's function, as Megatron's models do, get ours too."""
    from verl.utils.kernel import linear_cross_entropy as kernel

    earlier = types.ModuleType("verl.models.earlier")
    earlier.linear_cross_entropy = kernel.linear_cross_entropy
    monkeypatch.setitem(sys.modules, "verl.models.earlier", earlier)
    engine = engine_module.FSDPEngineWithLMHead
    before = engine.prepare_model_inputs, engine.prepare_model_outputs
    verl_head.install_kernel()
    assert before == (engine.prepare_model_inputs, engine.prepare_model_outputs)
    assert earlier.linear_cross_entropy is verl_head.linear_cross_entropy


def test_registered_names(engine_module):
    from verl.trainer.ppo import core_algos

    assert core_algos.get_policy_loss_fn("grpo_kernels/dppo_kl")
    assert core_algos.get_adv_estimator_fn("grpo_kernels/opo")
