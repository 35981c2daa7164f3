"""`patch()`: TRL's functions and trainers with and without our operators behind them."""

import sys
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, partial
from importlib import import_module

import pytest
import torch

pytest.importorskip("trl")

import trl
from datasets import Dataset
from peft import LoraConfig
from trl.trainer import utils as trl_utils

from grpo_kernels.integrations import trl_seam
from grpo_kernels.integrations.trl import FusedGRPOTrainer, fuse_trainer, patch
from grpo_kernels.integrations.trl_seam import chunked_divergence, chunked_logprob
from tests.helpers.trl import (
    check_same,
    digits,
    make_config,
    make_images,
    make_llama,
    make_processor,
    make_tokenizer,
    make_vision,
    train,
)

pytestmark = pytest.mark.usefixtures("pytorch_backend", "one_thread")

N, V, H = 7, 11, 6
OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def make_head(seed=0, *, bias=True, H=H, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, H, generator=generator) for n in (N, V))
    tensors = (hidden, weight, torch.randn(V, generator=generator) if bias else None)
    return [x if x is None else x.to(dtype).requires_grad_() for x in tensors]


def grads_of(outputs, tensors, seed=1):
    """Backpropagate random gradients of the outputs that have one."""
    outputs = [x for x in outputs if x is not None and x.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    return torch.autograd.grad(outputs, [x for x in tensors if x is not None], upstream)


TARGETS = torch.tensor([0, 1, 10, 3, 3, 7, 5])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (None, 0.5), (2.0, 1.0), (3.0, 0.25)])
def test_log_probs_match_trl_s(bias, softcap, scale):
    arguments = (TARGETS, 0.7, 4, softcap, scale)
    for outputs in [("log_probs",), ("entropy",), ("log_probs", *OPTIONAL), OPTIONAL[2:]]:
        tensors, same = make_head(bias=bias), make_head(bias=bias)
        found = chunked_logprob(*tensors, *arguments, outputs)
        expected = trl_seam.TRL_LOGPROB.apply(*same, *arguments, outputs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grads_of(found, tensors), grads_of(expected, same))
        for ours, theirs in zip(found, expected, strict=True):
            if theirs is not None:
                assert ours.requires_grad == theirs.requires_grad
                assert ours.dtype == theirs.dtype


def test_no_labels_give_zero_gradients():
    hidden, weight, bias = make_head()
    found = chunked_logprob(hidden[:0], weight, bias, TARGETS[:0], 1.0, 4)
    assert [x.shape for x in found] == [(0,)] * 5
    padded = hidden.new_zeros(3).masked_scatter(torch.zeros(3, dtype=torch.bool), found[0])
    gradients = torch.autograd.grad(padded.sum(), (hidden, weight, bias))
    assert all((x == 0).all() for x in gradients)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("teacher", [(0.5, 3.0), (0.25, None)])
def test_divergences_match_trl_s(beta, teacher):
    found, gradients = [], []
    for function in (chunked_divergence, trl_seam.TRL_DIVERGENCE.apply):
        student, other = make_head(), make_head(seed=2, bias=False, H=4)
        found.append(function(*student, *other, beta, 0.7, 0.5, 3.0, *teacher))
        gradients.append(grads_of(found[-1], student))
        assert [x.requires_grad for x in found[-1]] == [True, False]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"logit_scale": 0.0}, "logit_scale must be positive, got 0.0"),
        ({"final_logit_softcapping": 0.0}, "softcap must be positive, got 0.0"),
        ({"temperature": -1.0}, "temperature must be positive, got -1.0"),
    ],
)
def test_trl_s_own_function_computes_the_rest(monkeypatch, caplog, arguments, reason):
    monkeypatch.setattr(trl_seam, "_warned", set())
    arguments = {"temperature": 1.0, "chunk_size": 4, **arguments}
    head = make_head()
    for _ in range(2):
        found = chunked_logprob(*head, TARGETS, **arguments)
    names = ("temperature", "chunk_size", "final_logit_softcapping", "logit_scale")
    defaults = {"final_logit_softcapping": None, "logit_scale": 1.0}
    expected = trl_seam.TRL_LOGPROB.apply(
        *head, TARGETS, *((defaults | arguments)[name] for name in names)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [record.getMessage() for record in caplog.records] == [
        f"TRL's own log-prob function runs: {reason}"
    ]


class Sharded(torch.nn.Parameter):
    """A parameter that ZeRO-3 shards: empty but while it is gathered."""

    ds_status = "NOT_AVAILABLE"


@contextmanager
def gathered(*params):
    """Stand in for TRL's `maybe_gather_lm_head_ctx` and DeepSpeed's GatheredParameters."""
    params = [x for x in params if hasattr(x, "ds_status") and not x.numel()]
    for param in params:
        param.data = param.whole.clone()
    yield
    for param in params:
        param.data = param.whole.new_empty(0)


@pytest.mark.parametrize("beta", [None, 0.0])
def test_zero3_weights_are_gathered_again_in_backward(monkeypatch, beta):
    monkeypatch.setattr(trl_utils, "maybe_gather_lm_head_ctx", gathered)

    def compute(hidden, weight, bias):
        if beta is None:
            with gathered(weight, bias):
                return chunked_logprob(hidden, weight, bias, TARGETS, 0.7, 4)[:2]
        return chunked_divergence(hidden, weight, bias, *make_head(seed=2), beta)[:1]

    head = make_head()
    expected = grads_of(compute(*head), head)
    hidden, *params = make_head()
    sharded = []
    for param in params:
        sharded.append(Sharded(param.detach().new_empty(0)))
        sharded[-1].whole = param.detach()
    outputs = compute(hidden, *sharded)
    assert all(param.numel() == 0 for param in sharded), "no gathered copy is left in forward"
    found = grads_of(outputs, (hidden, *sharded))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(param.numel() == 0 for param in sharded)


# The patch itself.


def names_in_trl():
    return {
        (module, name): value
        for module, x in list(sys.modules.items())
        if module.split(".")[0] == "trl"
        for name, value in vars(x).items()
    }


def test_nothing_is_left_behind():
    before = names_in_trl()

    def is_ours():
        changed = {x for x, value in names_in_trl().items() if before.get(x) is not value}
        return ("trl.trainer.utils", trl_seam.LOGPROB) in changed

    with patch():
        assert is_ours()
        with patch():
            pass
        assert is_ours()
    handle, other = patch(), patch()
    handle.undo()
    handle.undo()
    assert is_ours()
    from trl.experimental import distillation as _  # noqa: F401, a module loaded meanwhile

    other.undo()
    after = names_in_trl()
    assert all(after[name] is value for name, value in before.items())
    ours = [x for x in trl_seam._OURS.values()]
    assert not [name for name, value in after.items() if any(value is x for x in ours)]


def test_a_module_that_is_loaded_meanwhile(monkeypatch):
    """Another thread may import while `patch` searches the modules."""

    class Importing(str):
        def split(self, separator):
            monkeypatch.setitem(sys.modules, f"loaded_{len(sys.modules)}", sys)
            return super().split(separator)

    monkeypatch.setitem(sys.modules, Importing("importing"), sys)
    with patch():
        assert getattr(trl_utils, trl_seam.LOGPROB) is not trl_seam.TRL_LOGPROB
    assert getattr(trl_utils, trl_seam.LOGPROB) is trl_seam.TRL_LOGPROB


def test_other_versions_of_trl_are_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.kernels.chunked_divergence", None)
    monkeypatch.delitem(sys.modules, trl_seam.__name__)
    with pytest.raises(ImportError, match=r"needs the fused LM head of TRL 1\.16, got TRL 1"):
        import_module(trl_seam.__name__)


# Trainers.


def text(*columns, rows=16):
    """Make rows of digits for a data set."""
    rows = [
        {name: f"{i * (j + 3) % 97}+{i}=" for j, name in enumerate(columns)} for i in range(rows)
    ]
    return Dataset.from_list(rows)


LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
COPIED_HEAD = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
COLUMNS = {
    "SFT": ("prompt", "completion"),
    "DPO": ("prompt", "chosen", "rejected"),
    "KTO": ("prompt", "completion"),
    "RLOO": ("prompt",),
    "GRPO": ("prompt",),
    "Distillation": ("prompt",),
}


def make_trl_trainer(name, *, kind=None, vision=False, peft_config=None, **settings):
    """Make the trainer of a name, on text or on texts that begin with an image."""
    torch.manual_seed(0)
    kind = kind or getattr(trl, f"{name}Trainer")
    data = text(*COLUMNS[name])
    if name == "KTO":
        data = data.add_column("label", [i % 3 == 0 for i in range(len(data))])
    if vision:
        messages = data.map(as_messages).to_dict()
        data = Dataset.from_dict(messages | {"image": make_images(len(data))})
    keywords = {"peft_config": deepcopy(peft_config)}
    if name == "Distillation":
        keywords["teacher_model"] = make_llama(noise=0.1)
    if name in ("RLOO", "GRPO"):
        keywords["reward_funcs"] = rate
    return kind(
        make_vision() if vision else make_llama(),
        args=make_config(getattr(trl, f"{name}Config"), **settings),
        train_dataset=data,
        processing_class=make_processor() if vision else make_tokenizer(),
        **keywords,
    )


def as_messages(row):
    roles = {"prompt": "user", "completion": "assistant"}
    return {name: [{"role": roles[name], "content": x}] for name, x in row.items()}


def rate(completions, **_):
    """Reward digits in a completion, given as text or as messages."""
    return digits([x if isinstance(x, str) else x[0]["content"] for x in completions])


CASES = {
    "SFT": {"name": "SFT"},
    "SFT, lora": {"name": "SFT", "peft_config": LORA},
    "SFT, vision": {"name": "SFT", "vision": True, "max_length": None},
    "DPO, weighted": {"name": "DPO", "use_weighting": True},
    "KTO": {"name": "KTO"},
    "RLOO": {"name": "RLOO", "beta": 0.04, "temperature": 0.7},
    "GRPO, copied head": {"name": "GRPO", "peft_config": COPIED_HEAD, "beta": 0.04},
    "GRPO, vision": {"name": "GRPO", "vision": True, "beta": 0.04, "entropy_coef": 0.01},
    "Distillation, forward": {"name": "Distillation", "beta": 0.0},
    "Distillation, reverse": {"name": "Distillation", "beta": 1.0},
}


@cache
def trained_by_trl(case):
    return train(make_trl_trainer(**CASES[case]))


@pytest.mark.parametrize("case", CASES)
def test_trainers_end_at_the_same_weights(monkeypatch, case):
    logs, changes = trained_by_trl(case)
    assert max(change.abs().max() for change in changes.values()) > 1e-4
    for name in ("TRL_LOGPROB", "TRL_DIVERGENCE"):
        monkeypatch.setattr(trl_seam, name, None)  # TRL's own functions are not called
    with patch():
        found = train(make_trl_trainer(**CASES[case]))
    check_same(found, (logs, changes))


@pytest.mark.parametrize("fuse_loss", [False, True])
def test_fused_trainer_on_images(fuse_loss):
    kind = partial(FusedGRPOTrainer, fuse_loss=fuse_loss)
    found = train(make_trl_trainer(**CASES["GRPO, vision"], kind=kind))
    check_same(found, trained_by_trl("GRPO, vision"))


def test_fuse_trainer_on_rloo():
    found = train(fuse_trainer(make_trl_trainer(**CASES["RLOO"])))
    check_same(found, trained_by_trl("RLOO"))
